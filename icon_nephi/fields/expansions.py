"""Functions in boxes: polynomials around centres, and how far slopes stray from them.

In a box with centre c and half-sides r a function is a polynomial of s, x = c + r s,
|s| <= 1, of some total degree, and a bound on how far each of its slopes by s_a gets
from the polynomial's anywhere in the box. Signs survive in the polynomials, so what
cancels between the units of a network stays cancelled; the bounds hold only what has a
higher degree, and vanish quickly with the size of the box. (These are Taylor models of
the first derivatives.)

Rounding is part of the bounds: a sum of n products errs by at most (n + 2) u times the
sum of their magnitudes, u = 2^-53 in float64 and 2^-24 in float32, the usual forward
analysis; each operation adds that, generously. Bounds are sums and products of numbers
that are not negative, whose own relative rounding is below `INFLATE`, applied once at
the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INFLATE = {torch.float64: 1 + 1e-9, torch.float32: 1 + 1e-3}


@dataclass(frozen=True)
class Expansion:
    """C functions in each of N boxes.

    Attributes:
        rows: ``[M, N, C]``: coefficients of the monomials of `monomials`.
        stray: ``[1 + d, N, C]``: at most how far the value is from the polynomial's at
            the centre (rounding only), and the slopes by s_a anywhere in the box.
        size: ``[1 + d, N, C]``: at most the magnitude of the value at the centre, and
            the sum of those of each slope's coefficients.
        dimension: d.
        degree: the highest total degree of the polynomials.
    """

    rows: Tensor
    stray: Tensor
    size: Tensor
    dimension: int
    degree: int

    @staticmethod
    def of(rows: Tensor, stray: Tensor, dimension: int, degree: int) -> Expansion:
        """One whose sizes are those of its coefficients."""
        table = _sums(dimension, degree, rows.dtype)
        table = table.unflatten(0, (1 + dimension, -1)).sum(1)
        table[0, 1:] = 0
        size = (table @ rows.abs().flatten(1)).view(1 + dimension, *rows.shape[1:])
        return Expansion(rows, stray, size, dimension, degree)

    def rounded(self, dtype: torch.dtype) -> Expansion:
        """The same in another precision; what that rounds is added to ``stray``."""
        stray = (self.stray + 2 * unit(self.rows.to(dtype)) * self.size).to(dtype)
        rows, size = self.rows.to(dtype), self.size.to(dtype)
        return replace(self, rows=rows, stray=stray, size=size)

    def matching(self, other: Expansion) -> Expansion:
        """The same of another's degree, at least the own one, and precision."""
        new = len(monomials(other.dimension, other.degree)) - len(self.rows)
        rows = F.pad(self.rows, (0, 0, 0, 0, 0, new))
        raised = replace(self, rows=rows, degree=other.degree)
        return raised.rounded(other.rows.dtype)

    @property
    def off(self) -> Tensor:
        """``[N, C]``: how far the value is from the polynomial's, anywhere."""
        return self.stray.sum(0)


def unit(like: Tensor) -> float:
    """The most by which an operation on such numbers rounds, relatively."""
    return torch.finfo(like.dtype).eps / 2


@cache
def monomials(dimension: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """The powers of every monomial up to a total degree, by degree: 1, s_0, s_1, ..."""
    every = itertools.product(range(degree + 1), repeat=dimension)
    powers = [p for p in every if sum(p) <= degree]
    return tuple(sorted(powers, key=lambda p: (sum(p), tuple(-n for n in p))))


# (i, j, factor): monomial i times monomial j, and what that is multiplied by.
_Terms: TypeAlias = list[tuple[int, int, float]]


@cache
def _products(dimension: int, degree: int) -> list[_Terms]:
    """For each monomial the pairs whose product it is, without those with a 1 first."""
    powers = monomials(dimension, degree)
    place = {p: n for n, p in enumerate(powers)}
    terms: list[_Terms] = [[] for _ in powers]
    for (i, p), (j, q) in itertools.product(enumerate(powers), repeat=2):
        both = place.get(tuple(a + b for a, b in zip(p, q, strict=True)))
        if i and both is not None:
            terms[both].append((i, j, 1.0))
    return terms


@cache
def _chain(dimension: int, own: int, degree: int) -> list[_Terms]:
    """For each monomial s^n how f(q) follows from q and f', q of degree own.

    d f(q)/ds_a = f'(q) dq/ds_a, any a with n_a > 0: n_a times f's coefficient is the
    sum over i + j = n of i_a q_i f'_j. The a with the fewest terms is taken.
    """
    powers = monomials(dimension, degree)
    place = {p: n for n, p in enumerate(powers)}
    terms: list[_Terms] = []
    for n in powers:
        ways: list[_Terms] = []
        for axis in (a for a in range(dimension) if n[a]):
            ways.append([])
            for i in itertools.product(*(range(k + 1) for k in n)):
                if i[axis] and sum(i) <= own:
                    j = tuple(a - b for a, b in zip(n, i, strict=True))
                    ways[-1].append((place[i], place[j], i[axis] / n[axis]))
        terms.append(min(ways, key=len, default=[]))
    return terms


@cache
def _sums(dimension: int, degree: int, dtype: torch.dtype) -> Tensor:
    """``[(1 + d) (1 + degree), M]``: magnitudes, and those of slopes, by degree."""
    every = monomials(dimension, degree)
    table = torch.zeros(1 + dimension, 1 + degree, len(every), dtype=dtype)
    for n, powers in enumerate(every):
        k = sum(powers)
        table[0, k, n] = 1
        for axis, power in enumerate(powers):
            if power:
                table[1 + axis, k - 1, n] = power
    return table.flatten(0, 1)


def by_degree(rows: Tensor, dimension: int, degree: int) -> Tensor:
    """``[1 + degree, ...]``: sums of |coefficients| of rows ``[M, ...]`` by degree."""
    table = _sums(dimension, degree, rows.dtype)[: 1 + degree]
    return (table @ rows.abs().flatten(1)).view(-1, *rows.shape[1:])


def _magnitudes(of: Expansion) -> Tensor:
    """``[1 + d, 1 + degree, N, C]``: sums of |coefficients| by degree.

    Row 0 is of the polynomials, row 1 + a of their slopes by s_a.
    """
    table = _sums(of.dimension, of.degree, of.rows.dtype)
    sums = table @ of.rows.abs().flatten(1)
    return sums.view(1 + of.dimension, 1 + of.degree, *of.rows.shape[1:])


def linear(inputs: Expansion, weight: Tensor, bias: Tensor | None = None) -> Expansion:
    """W q + b."""
    rows = F.linear(inputs.rows, weight)
    rounding = (weight.shape[1] + 8) * unit(inputs.rows)
    before = torch.cat([inputs.stray + rounding * inputs.size, inputs.size])
    stray, size = F.linear(before, weight.abs()).chunk(2)
    if bias is not None:
        rows[0] += bias
        size[0] += bias.abs()
        stray[0] += 4 * unit(rows) * size[0]
    return replace(inputs, rows=rows, stray=stray, size=size)


def through(layer: nn.Module, inputs: Expansion, factor: float = 1.0) -> Expansion:
    """factor (W q + b) of an `nn.Linear`, in the precision of the inputs."""
    assert isinstance(layer, nn.Linear)
    like = inputs.rows
    weight, bias = (layer.weight * factor).to(like), (layer.bias * factor).to(like)
    return linear(inputs, weight, bias)


def centred(points: Expansion) -> Expansion:
    """2 x - 1."""
    rows, stray = 2 * points.rows, 2 * points.stray
    rows[0] -= 1
    stray[0] += 4 * unit(rows)
    return Expansion.of(rows, stray, points.dimension, points.degree)


def add(first: Expansion, second: Expansion) -> Expansion:
    """a + b."""
    size = first.size + second.size
    stray = first.stray + second.stray + 2 * unit(size) * size
    return replace(first, rows=first.rows + second.rows, stray=stray, size=size)


def beside(*parts: Expansion) -> Expansion:
    """The functions of all parts, in order."""
    columns = zip(*((p.rows, p.stray, p.size) for p in parts), strict=True)
    rows, stray, size = (torch.cat(column, -1) for column in columns)
    return replace(parts[0], rows=rows, stray=stray, size=size)


def sine(inputs: Expansion, degree: int) -> Expansion:
    """sin q, as polynomials of a degree (at least that of q's).

    Coefficients of sine and cosine follow from each other's, see `_chain`.
    """
    d = inputs.dimension
    orders = [sum(p) for p in monomials(d, degree)]
    y = inputs.rows.new_empty(len(orders), *inputs.rows.shape[1:])
    q, into = inputs.rows.unbind(), y.unbind()
    torch.sin(q[0], out=into[0])
    w = [q[0].cos()]
    for k, terms in enumerate(_chain(d, inputs.degree, degree)):
        if k:
            _add_up(q, w, terms, into[k])
            if orders[k] < degree:
                w.append(_add_up(q, into, terms, torch.empty_like(w[0])).neg_())
    # The slopes: cos q q' against the polynomial's, with q = P + e.
    sums = _magnitudes(inputs)
    up, across = into[0].abs(), w[0].abs()
    # What sine and cosine themselves round counts as an error of q.
    off, steep = inputs.off + 8 * unit(up), sums[1:].sum(1)
    reach = sums[0, 1:].sum(0) + off
    most_sine = (up + across * reach).clamp(max=1)
    most_cosine = (across + up * reach).clamp(max=1)
    beyond, most = _beyond(sums, steep, up, across, degree)
    stray, size = torch.empty_like(inputs.stray), torch.ones_like(inputs.stray)
    stray[0] = inputs.stray[0] + 8 * unit(up)
    stray[1:] = (off * most_sine) * steep
    stray[1:].addcmul_(most_cosine, inputs.stray[1:])
    stray[1:] += beyond
    size[1:] = most
    return Expansion(y, stray, size, d, degree)


def _beyond(
    sums: Tensor, steep: Tensor, up: Tensor, across: Tensor, degree: int
) -> tuple[Tensor, Tensor]:
    """What sin P's slopes hold from a degree on; what they hold in all ``[d, N, C]``.

    With magnitudes for coefficients, cos(p_0 + Q) is at most |cos p_0| cosh A +
    |sin p_0| sinh A, A = sum_k A_k; its degrees below ``degree`` are taken off.
    """
    a, b = sums[0], sums[1:]
    of_cosine, of_sine = [across], [up]
    for k in range(1, degree):
        terms = [(a[m] * (m / k), k - m) for m in range(1, min(k + 1, len(a)))]
        cosine, sine = torch.zeros_like(up), torch.zeros_like(up)
        for term, rest in terms:
            cosine.addcmul_(term, of_sine[rest])
            sine.addcmul_(term, of_cosine[rest])
        of_cosine.append(cosine)
        of_sine.append(sine)
    total = a[1:].sum(0)
    most = (across * total.cosh() + up * total.sinh()) * steep
    low = torch.zeros_like(steep)
    for k, part in enumerate(of_cosine):
        low.addcmul_(part, b[:, : degree - k].sum(1))
    # The difference rounds, and so did the polynomial.
    rounding = (64 + 8 * degree * degree) * unit(most)
    return (most - low).clamp_(min=0).add_(most, alpha=rounding), most


def _add_up(
    p: Sequence[Tensor], q: Sequence[Tensor], terms: _Terms, out: Tensor
) -> Tensor:
    """out, which becomes the sum of the terms' products."""
    if not terms:
        return out.zero_()
    for number, (i, j, factor) in enumerate(terms):
        if number:
            out.addcmul_(p[i], q[j], value=factor)
        else:
            torch.mul(p[i], q[j], out=out)
            if factor != 1:
                out.mul_(factor)
    return out


def multiplied(a: Tensor, b: Tensor, dimension: int, degree: int) -> Tensor:
    """Coefficients ``[M, ...]`` of products of polynomials, up to a total degree."""
    rows = a[0] * b
    p, q, into = a.unbind(), b.unbind(), rows.unbind()
    for k, terms in enumerate(_products(dimension, degree)):
        for i, j, _ in terms:
            into[k].addcmul_(p[i], q[j])
    return rows


def product(first: Expansion, second: Expansion) -> Expansion:
    """a b."""
    d, degree = first.dimension, first.degree
    rows = multiplied(first.rows, second.rows, d, degree)
    p, q = first.rows, second.rows
    a, b = _magnitudes(first), _magnitudes(second)
    stray, size = torch.zeros_like(first.stray), torch.zeros_like(first.stray)
    for one, other, sums, others in ((first, second, a, b), (second, first, b, a)):
        values = others[0].sum(0)
        steep = sums[1:].sum(1)
        stray[1:].addcmul_(one.stray[1:], values + other.off).addcmul_(other.off, steep)
        for k in range(degree):
            stray[1:].addcmul_(sums[1:, k], others[0, degree - k :].sum(0))
        size[1:].addcmul_(steep, values)
    stray[1:] += 64 * unit(size) * size[1:]
    size[0] = p[0].abs() * q[0].abs()
    stray[0] = p[0].abs() * second.stray[0] + q[0].abs() * first.stray[0]
    stray[0] += first.stray[0] * second.stray[0] + 4 * unit(size) * size[0]
    return Expansion(rows, stray, size, d, degree)
