"""The search for a proof: boxes that cover a region, split until each is decided.

Boxes lie in the unit box of the neural map psi(x) = x + u(x), or beyond it, where u is
that of the nearest border point. In a box psi's Jacobian is a polynomial and a
remainder (see `icon_nephi.expansions`). With P its inverse at the centre,
P J(x) = I + E(x), and bounds on |E| bound det(P J) from below. What cannot be proven is
split, until it is proven, refuted by a point, or too small.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from icon_nephi.bounds import WIDER, expand_displacement, knots
from icon_nephi.codes import LatentCode
from icon_nephi.expansions import INFLATE, monomials, unit
from icon_nephi.fields import LatentMLP
from icon_nephi.regions import Region

# Degrees of the polynomials: a deeper field loses more to its layers' magnitudes.
SHALLOW_DEGREE, DEEP_DEGREE = 5, 6
# Boxes expanded at once, and handled between two looks at the clock.
BATCH, ROUND = 256, 2**11
# How often a box is halved at most, along all axes together; and from how often on one
# that float32 does not prove is tried in float64.
HALVINGS, FINE = 15, 8
# A box is split further until its determinants are proven to be at least this share of
# that at its centre, so that the smallest one proven says something.
SHARE = 0.25
# Row sums of |E| above which a box is split along several axes at once.
FAR = 4.0
# Counterexamples kept.
KEPT = 1000


class Boxes(NamedTuple):
    """Axis-parallel boxes.

    Attributes:
        low: lowest corners ``[N, d]``.
        high: highest corners.
        halved: how often ``[N]``.
        least: ``[N]``, what determinants in them are already proven to exceed, else 0.
    """

    low: Tensor
    high: Tensor
    halved: Tensor
    least: Tensor

    def at(self, chosen: Tensor) -> Boxes:
        """Those chosen by a mask or by numbers."""
        return Boxes(*(part[chosen] for part in self))

    def volume(self) -> float:
        """Of all together."""
        return float((self.high - self.low).prod(1).sum())


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


def bound_determinant(
    field: nn.Module,
    code: LatentCode,
    low: Tensor,
    high: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Bounds:
    """The `Bounds` of det J in boxes that no knot crosses, nor the unit box's border.

    Args:
        field: `LatentMLP` or `ModulatedSiren`, float64.
        code: of batch 1, float64.
        low: lowest corners ``[N, d]``, float64.
        high: highest corners.
        dtype: see `expand_displacement`.
    """
    d = low.shape[1]
    shallow = isinstance(field, LatentMLP) and len(field.hidden) == 1
    degree = SHALLOW_DEGREE if shallow else DEEP_DEGREE
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
    slopes, degrees, lower = _derivation(d, degree)
    coefficients = inverse @ rows
    changes = coefficients.abs() @ slopes * by_x
    # What stands between P J and I at the centre, and the rounding of the products.
    offset = (inverse @ jacobian - torch.eye(d, dtype=low.dtype)).abs()
    rounding = 32 * unit(inverse) * inverse.abs() @ (jacobian.abs() + size)
    rest = offset + rounding + inverse.abs() @ remainder
    e = (changes + rest) * INFLATE[dtype]
    trace = (
        sum(
            (coefficients[:, k, n] * p * by_x[:, 0, k, None]) @ to
            for k, (n, p, to) in enumerate(lower)
        )
        .abs()
        .sum(1)
    )
    trace = (trace + rest.diagonal(dim1=1, dim2=2).sum(1)) * INFLATE[dtype]
    determinant = torch.linalg.det(jacobian)
    # How the determinant and its reciprocal, P's, may be rounded.
    sure = 1 - 1e-13 * jacobian.abs().sum(2).prod(1) / determinant
    known = (offset + rounding).sum(2).amax(1) < 1e-9
    least = _least(e, trace) * (1 - 1e-8) * sure
    least = torch.where(known & (determinant > 0) & (sure > 0), least, -torch.inf)
    blame = coefficients.abs().sum(1) @ degrees
    return Bounds(determinant, least.nan_to_num(-torch.inf), e.sum(2).amax(1), blame)


def _least(e: Tensor, trace: Tensor) -> Tensor:
    """A lower bound ``[N]`` of det(I + E), |E| <= e ``[N, d, d]``, |tr E| <= trace.

    The better of two. Ostrowski's for dominant diagonals: at least the product of
    1 - sum_j e_ij where all of these are positive. The expansion of the determinant:
    1 + tr E + the 2 x 2 minors on the diagonal (+ det E in 3D).
    """
    margins = 1 - e.sum(2)
    dominant = torch.where((margins > 0).all(1), margins.prod(1), -torch.inf)
    d = e.shape[1]
    minors = torch.zeros_like(trace)
    for i, j in itertools.combinations(range(d), 2):
        minors += e[:, i, i] * e[:, j, j] + e[:, i, j] * e[:, j, i]
    if d == 3:
        for a, b, c in itertools.permutations(range(3)):
            minors += e[:, 0, a] * e[:, 1, b] * e[:, 2, c]
    return torch.maximum(dominant, 1 - trace - minors * INFLATE[e.dtype])


@cache
def _derivation(
    d: int, degree: int
) -> tuple[Tensor, Tensor, list[tuple[list[int], Tensor, Tensor]]]:
    """Tables over monomials, of which the slopes of a polynomial follow.

    Powers ``[M, d]`` where that slope changes in the box, powers ``[M, d]`` of the
    highest degree, and by axis: which monomials, their powers, where their slopes go.
    """
    known = monomials(d, degree)
    powers = torch.tensor(known, dtype=torch.float64)
    total = powers.sum(1, keepdim=True)
    slopes = torch.where(total > 1, powers, 0.0)
    degrees = torch.where(total == degree, powers, 0.0)
    spot = {p: n for n, p in enumerate(known)}
    lower = []
    for axis in range(d):
        numbers = [n for n, p in enumerate(known) if p[axis] and sum(p) > 1]
        to = torch.zeros(len(numbers), len(known), dtype=torch.float64)
        for row, n in enumerate(numbers):
            p = list(known[n])
            p[axis] -= 1
            to[row, spot[tuple(p)]] = 1
        lower.append((numbers, powers[numbers, axis], to))
    return slopes, degrees, lower


class Search:
    """What is proven about one neural map over a region, and what not.

    Args:
        field: `LatentMLP` or `ModulatedSiren`.
        code: what it reads, of batch 1.
        region: where.

    Attributes:
        total: volume of the boxes that cover the region, in psi's unit boxes.
        proven: of it.
        refuted: of it.
        smallest: lower bound of det J in what is proven.
        points: counterexamples ``[N, d]`` in psi's frame, worst first.
        determinants: theirs ``[N]``.
        left: boxes that are neither.
        folded: boxes with a counterexample.
    """

    def __init__(self, field: nn.Module, code: LatentCode, region: Region) -> None:
        self.field = copy.deepcopy(field).cpu().double().requires_grad_(False)
        self.code = replace(
            code,
            global_code=code.global_code.detach().cpu().double(),
            local_codes=tuple(g.detach().cpu().double() for g in code.local_codes),
        )
        # Half the time, where products of matrices are not cut to bfloat16.
        products = cast(Any, torch.backends.mkldnn).matmul.fp32_precision
        exact = products in ("none", "ieee")
        self.dtype = torch.float32 if exact else torch.float64
        self.region = region
        self.total = self.proven = self.refuted = 0.0
        self.smallest = torch.inf
        self.left: list[Boxes] = []
        self.folded: list[Boxes] = []
        d = len(region.frame) - 1
        self.points = torch.empty(0, d, dtype=torch.float64)
        self.determinants = torch.empty(0, dtype=torch.float64)

    def run(self, ends: float | None, decided: Callable[[float], None]) -> None:
        """Nothing; works until all is decided, or until a time (`time.monotonic`).

        Args:
            ends: when to stop.
            decided: called with the share of the volume newly decided.
        """
        waiting, late = self._cover(), False
        self.total = sum(boxes.volume() for boxes in waiting)
        with torch.no_grad(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
            while waiting and not late:
                further: list[Boxes] = []
                while waiting and not late:
                    boxes = waiting.pop()
                    before = self.proven + self.refuted
                    split = (part.split(BATCH) for part in boxes[:3])
                    found = list(pool.map(self._bound, *split))
                    bounds = Bounds(*map(torch.cat, zip(*found, strict=True)))
                    further.append(self._decide(boxes, bounds))
                    decided((self.proven + self.refuted - before) / self.total)
                    late = ends is not None and time.monotonic() > ends
                waiting += further if late else _regrouped(further)
        # Some were split although they were proven, to say more.
        rest, self.left = [*self.left, *waiting], []
        for boxes in rest:
            done = boxes.least > 0
            self._prove(boxes.at(done), boxes.least[done])
            self.left.append(boxes.at(~done))
        self.left = [boxes for boxes in self.left if len(boxes.low)]

    def _bound(self, low: Tensor, high: Tensor, halved: Tensor) -> Bounds:
        """In float32 first; in float64 what that calls a fold, or leaves when small."""
        # In a thread of its own, which has its own switch for gradients.
        with torch.no_grad():
            found = bound_determinant(self.field, self.code, low, high, self.dtype)
            again = (halved >= FINE) & ~(found.least >= SHARE) | ~(found.centre > 0)
            if self.dtype != torch.float64 and again.any():
                finer = bound_determinant(
                    self.field, self.code, low[again], high[again]
                )
                for part, better in zip(found, finer, strict=True):
                    part[again] = better
            return found

    def _cover(self) -> list[Boxes]:
        """Boxes between knots and borders that cover the region, in rounds."""
        low, high = self.region.span()
        edges = []
        for axis in range(len(low)):
            borders = torch.tensor([0.0, 1.0], dtype=torch.float64)
            inner = torch.cat([borders, knots(self.code, axis)])
            inner = inner[(inner > low[axis]) & (inner < high[axis])]
            edges.append(
                torch.cat([low[axis, None], inner.sort()[0], high[axis, None]])
            )
        counts = tuple(len(e) - 1 for e in edges)
        kept = []
        for numbers in torch.arange(math.prod(counts)).split(2**18):
            places = torch.unravel_index(numbers, counts)
            low, high = (
                torch.stack([e[p + n] for e, p in zip(edges, places, strict=True)], 1)
                for n in (0, 1)
            )
            boxes = Boxes(low, high, torch.zeros_like(numbers), low.new_zeros(len(low)))
            kept.append(boxes.at(self.region.meets(boxes.low, boxes.high)))
        return _regrouped(kept)

    def _prove(self, boxes: Boxes, least: Tensor) -> None:
        if len(least):
            self.proven += boxes.volume()
            self.smallest = min(self.smallest, float(least.min()))

    def _decide(self, boxes: Boxes, bounds: Bounds) -> Boxes:
        """Count what is decided; the parts of what is not."""
        least = torch.where(bounds.least > 0, bounds.least * bounds.centre, 0.0)
        boxes = boxes._replace(least=torch.maximum(boxes.least, least))
        done = bounds.least >= SHARE
        self._prove(boxes.at(done), boxes.least[done])
        centres = (boxes.low + boxes.high) / 2
        folds = (bounds.centre <= 0) & (boxes.least <= 0) & self.region.holds(centres)
        if folds.any():
            self.refuted += boxes.at(folds).volume()
            self.folded.append(boxes.at(folds))
            values = torch.cat([self.determinants, bounds.centre[folds]])
            order = values.argsort()[:KEPT]
            self.determinants = values[order]
            self.points = torch.cat([self.points, centres[folds]])[order]
        more = ~done & ~folds
        small = more & (boxes.halved >= HALVINGS)
        if small.any():
            self.left.append(boxes.at(small))
        more &= ~small
        return self._split(boxes.at(more), bounds.far[more], bounds.blame[more])

    def _split(self, boxes: Boxes, far: Tensor, blame: Tensor) -> Boxes:
        """Halves, quarters or eighths of boxes; those off the region are dropped."""
        sides = boxes.high - boxes.low
        blame = blame.nan_to_num(torch.inf) + 1e-12 * sides
        most = blame.amax(1, keepdim=True)
        chosen = blame >= torch.where(far[:, None] < FAR, most, 0.4 * most)
        before = boxes.volume()
        for axis in range(sides.shape[1]):
            some = boxes.at(chosen[:, axis])
            middle = (some.low[:, axis] + some.high[:, axis]) / 2
            lower, upper = some.high.clone(), some.low.clone()
            lower[:, axis] = upper[:, axis] = middle
            some = some._replace(halved=some.halved + 1)
            rest = ~chosen[:, axis]
            parts = some._replace(high=lower), some._replace(low=upper)
            boxes = _joined([boxes.at(rest), *parts])
            some_chosen = chosen[chosen[:, axis]]
            chosen = torch.cat([chosen[rest], some_chosen, some_chosen])
        boxes = boxes.at(self.region.meets(boxes.low, boxes.high))
        self.total -= before - boxes.volume()
        return boxes


def _joined(parts: list[Boxes]) -> Boxes:
    return Boxes(*map(torch.cat, zip(*parts, strict=True)))


def _regrouped(parts: list[Boxes]) -> list[Boxes]:
    """The same boxes, `ROUND` at a time."""
    if not parts:
        return []
    splits = (part.split(ROUND) for part in _joined(parts))
    groups = [Boxes(*group) for group in zip(*splits, strict=True)]
    return [group for group in groups if len(group.halved)]
