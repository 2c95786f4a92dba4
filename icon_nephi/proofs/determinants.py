"""How low the Jacobian's determinant can fall in a box.

In a box psi's Jacobian is a polynomial and a remainder (see `fields.expansions`).
With P its inverse at the centre, P J(x) = I + E(x), whose determinant is bounded from
below: as a polynomial, or by how far E's rows reach.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from icon_nephi.fields import Field
from icon_nephi.fields.codes import LatentCode
from icon_nephi.fields.expansions import INFLATE, by_degree, monomials, multiplied, unit
from icon_nephi.proofs.bounds import WIDER, expand_displacement

# Degrees of the polynomials, up to two layers and above: a deeper field loses more to
# its layers' magnitudes.
SHALLOW_DEGREE, DEEP_DEGREE = 5, 6
# More than sums of hundreds of products in float64 round, relatively.
_ROUNDED = 1e-12


class Bounds(NamedTuple):
    """What is known of the determinant of psi's Jacobian in each box, all ``[N]``.

    Attributes:
        centre: at the centre.
        least: a share of that below which it falls nowhere in the box; not above zero
            where that could not be shown.
        far: the largest row sum of |E|.
        blame: ``[N, d]``, how much of that comes from each axis.
    """

    centre: Tensor
    least: Tensor
    far: Tensor
    blame: Tensor


def degree_for(field: Field) -> int:
    """Return the degree of the polynomials that a field is bounded with."""
    parts = field.modules() if isinstance(field, nn.Module) else ()
    layers = sum(isinstance(part, nn.Linear) for part in parts)
    return SHALLOW_DEGREE if layers <= 2 else DEEP_DEGREE


def bound_determinant(
    field: Field,
    code: LatentCode,
    low: Tensor,
    high: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Bounds:
    """Bound det J in boxes that no knot crosses, nor the unit box's border.

    Args:
        field: with ``expand``, float64.
        code: of batch 1, float64.
        low: lowest corners ``[N, d]``, float64.
        high: highest corners.
        dtype: see `expand_displacement`.
    """
    d, degree = low.shape[1], degree_for(field)
    half = (high - low) / 2 * (1 + WIDER) + WIDER
    # Beyond a border the field sees the border: nothing changes along that axis.
    half = torch.where((low >= 1) | (high <= 0), 0.0, half)
    centre = ((low + high) / 2).clamp(0, 1)
    u = expand_displacement(field, code, centre, half, degree, dtype)
    by_x = torch.where(half > 0, 1 / half, 0.0)[:, None, :]
    rows = u.rows.double().permute(1, 2, 0)  # [N, i, monomial]
    jacobian = torch.eye(d, dtype=low.dtype) + rows[:, :, 1 : 1 + d] * by_x
    remainder, size = (
        part[1:].double().permute(1, 2, 0) * by_x for part in (u.stray, u.size)
    )
    inverse = torch.linalg.inv_ex(jacobian)[0]
    coefficients = inverse @ rows
    sources, powers, highest = _slopes(d, degree)
    entries = coefficients.permute(2, 1, 0)[sources].transpose(1, 2)
    entries = entries * powers[:, None, :, None] * by_x.permute(1, 2, 0)
    changes = entries[1:].abs().sum(0).permute(2, 0, 1)
    entries[0] = torch.eye(d, dtype=low.dtype)[:, :, None]
    # What stands between P J and I at the centre, and the rounding of the products.
    offset = (inverse @ jacobian - torch.eye(d, dtype=low.dtype)).abs()
    rounding = 32 * unit(inverse) * inverse.abs() @ (jacobian.abs() + size)
    rest = (offset + rounding + inverse.abs() @ remainder) * INFLATE[dtype]
    e = (changes + rest) * INFLATE[torch.float64]
    lowest = _lowest(entries, rest.permute(1, 2, 0), degree - 1)
    least = torch.maximum(_dominant(e), lowest)
    determinant = torch.linalg.det(jacobian)
    # How the determinant and its reciprocal, P's, may be rounded.
    sure = 1 - 1e-13 * jacobian.abs().sum(2).prod(1) / determinant
    known = (offset + rounding).sum(2).amax(1) < 1e-9
    least = least * (1 - 1e-8) * sure
    least = torch.where(known & (determinant > 0) & (sure > 0), least, -torch.inf)
    blame = coefficients.abs().sum(1) @ highest
    return Bounds(determinant, least.nan_to_num(-torch.inf), e.sum(2).amax(1), blame)


def _dominant(e: Tensor) -> Tensor:
    """Return a lower bound ``[N]`` of det(I + E), |E| <= e ``[N, d, d]``; -inf: none.

    Ostrowski's for dominant diagonals: at least the product of 1 - sum_j e_ij where all
    of these are positive.
    """
    margins = 1 - e.sum(2)
    return torch.where((margins > 0).all(1), margins.prod(1), -torch.inf)


class _Polynomials(NamedTuple):
    """``[M, K, N]``: K polynomials in each of N boxes; ``[K, N]``: what they stray."""

    rows: Tensor
    stray: Tensor


def _lowest(entries: Tensor, stray: Tensor, degree: int) -> Tensor:
    """Return a lower bound ``[N]`` of determinants of polynomials in boxes.

    Args:
        entries: ``[M, d, d, N]``.
        stray: ``[d, d, N]``, at most how far they are off, anywhere in the box.
        degree: their highest total degree.
    """
    d = entries.shape[1]

    def row(number: int, turned: int = 0) -> _Polynomials:
        return _Polynomials(
            entries[:, number].roll(turned, 1), stray[number].roll(turned, 0)
        )

    if d == 2:
        other = row(1, 1)
        signs = torch.tensor([[1.0], [-1.0]], dtype=entries.dtype)
        cofactors = _Polynomials(other.rows * signs, other.stray)
    else:
        # The cross product of the last two rows.
        plus = _times(row(1, -1), row(2, -2), degree)
        minus = _times(row(1, -2), row(2, -1), degree)
        cofactors = _Polynomials(plus.rows - minus.rows, plus.stray + minus.stray)
    products = _times(row(0), cofactors, degree)
    rows, off = products.rows.sum(1), products.stray.sum(0)
    # A monomial of even powers is at least 0, others at least -1.
    even = torch.tensor([all(p % 2 == 0 for p in q) for q in monomials(d, degree)])
    falls = torch.where(even[:, None], (-rows).clamp(min=0), rows.abs())[1:].sum(0)
    return rows[0] - falls - off * (1 + _ROUNDED) - _ROUNDED * rows.abs().sum(0)


def _times(first: _Polynomials, second: _Polynomials, degree: int) -> _Polynomials:
    """Return a b, up to a total degree; what is beyond it strays."""
    a, b = first.rows, second.rows
    d = a.shape[1]
    rows = multiplied(a, b, d, degree)
    sizes_a, sizes_b = (by_degree(x, d, degree) for x in (a, b))
    all_a, all_b = sizes_a.sum(0), sizes_b.sum(0)
    stray = first.stray * (all_b + second.stray) + second.stray * all_a
    stray += _ROUNDED * all_a * all_b
    for k in range(1, degree + 1):
        stray.addcmul_(sizes_a[k], sizes_b[degree - k + 1 :].sum(0))
    return _Polynomials(rows, stray)


@cache
def _slopes(d: int, degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tables of a polynomial's slopes, and of whom its last terms blame.

    Which monomial s_k's slope comes from and the power of s_k there, both ``[M, d]``, M
    monomials of a degree less; powers ``[all, d]`` of the monomials of the degree.
    """
    known = monomials(d, degree)
    place = {p: n for n, p in enumerate(known)}
    sources, powers = [], []
    for m in monomials(d, degree - 1):
        up = [tuple(n + (a == axis) for a, n in enumerate(m)) for axis in range(d)]
        sources.append([place[p] for p in up])
        powers.append([n + 1 for n in m])
    highest = [[n * (sum(p) == degree) for n in p] for p in known]
    return (
        torch.tensor(sources),
        torch.tensor(powers, dtype=torch.float64),
        torch.tensor(highest, dtype=torch.float64),
    )
