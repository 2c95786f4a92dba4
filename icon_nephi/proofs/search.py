"""The search for a proof: boxes that cover a region, split until each is decided.

Boxes lie in the unit box of the neural map psi(x) = x + u(x), or beyond it, where u is
that of the nearest border point. `icon_nephi.proofs.determinants` says how low the
determinant can fall in a box. What cannot be proven is split, until it is proven,
refuted by a point, or too small.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from icon_nephi.fields.codes import LatentCode
from icon_nephi.fields.expansions import monomials
from icon_nephi.proofs.bounds import knots
from icon_nephi.proofs.determinants import Bounds, bound_determinant, degree_for
from icon_nephi.proofs.regions import Region

# Coefficients of a layer of the boxes expanded at once. With fewer, threads wait for
# each other (Python lets one at a time begin an operation); with more, memory is mapped
# anew for each operation.
BATCH = 6 * 2**20
# How often a box is halved at most, along all axes together; and from how often on one
# that float32 does not prove is tried in float64.
HALVINGS, FINE = 15, 8
# A box is split further until its determinants are proven to be at least this share of
# that at its centre, so that the smallest one proven says something.
SHARE = 0.25
# `Bounds.far` above which a box is split along several axes at once.
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

    def at(self, chosen: Tensor | slice) -> Boxes:
        """Return those chosen by a mask, by numbers or in a row."""
        return Boxes(*(part[chosen] for part in self))

    def volume(self) -> float:
        """Return that of all together."""
        return float((self.high - self.low).prod(1).sum())


class Search:
    """What is proven about one neural map over a region, and what not.

    Args:
        field: with ``expand``, see `icon_nephi.fields`.
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
        """Work until all is decided, or until a time (`time.monotonic`).

        Args:
            ends: when to stop.
            decided: called with the share of the volume newly decided.
        """
        waiting, weak = deque([self._cover()]), deque[Boxes]()
        self.total = waiting[0].volume()
        threads, late = torch.get_num_threads(), False
        size = self._batch()
        under_way: deque[tuple[Boxes, Future[Bounds]]] = deque()
        with torch.no_grad(), _workers(threads) as pool:
            while not late:
                while len(under_way) < 2 * threads:
                    boxes = _taken(waiting, weak, size, whole=bool(under_way))
                    if boxes is None:
                        break
                    under_way.append((boxes, pool.submit(self._bound, boxes)))
                if not under_way:
                    break
                boxes, bounds = under_way.popleft()
                before = self.proven + self.refuted
                parts = self._decide(boxes, bounds.result())
                decided((self.proven + self.refuted - before) / self.total)
                proven = parts.least > 0
                waiting.append(parts.at(~proven))
                weak.append(parts.at(proven))
                late = ends is not None and time.monotonic() > ends
        for boxes in (*(boxes for boxes, _ in under_way), *waiting, *weak):
            self._leave(boxes)

    def _batch(self) -> int:
        """Return how many boxes to expand at once."""
        layers = [m for m in self.field.modules() if isinstance(m, nn.Linear)]
        width = max((m.out_features for m in layers), default=self.code.size)
        d = len(self.region.frame) - 1
        return max(1, BATCH // len(monomials(d, degree_for(self.field))) // width)

    def _bound(self, boxes: Boxes) -> Bounds:
        """Bound in float32; in float64 what that calls a fold, or leaves when small."""
        low, high, halved = boxes[:3]
        # In a thread of its own, which has its own switch for gradients.
        with torch.no_grad():
            bounds = bound_determinant(self.field, self.code, low, high, self.dtype)
            again = (halved >= FINE) & ~(bounds.least >= SHARE) | ~(bounds.centre > 0)
            if self.dtype != torch.float64 and again.any():
                finer = bound_determinant(
                    self.field, self.code, low[again], high[again]
                )
                for part, better in zip(bounds, finer, strict=True):
                    part[again] = better
            return bounds

    def _cover(self) -> Boxes:
        """Return boxes between knots and borders that cover the region."""
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
        covering = []
        for numbers in torch.arange(math.prod(counts)).split(2**18):
            places = torch.unravel_index(numbers, counts)
            low, high = (
                torch.stack([e[p + n] for e, p in zip(edges, places, strict=True)], 1)
                for n in (0, 1)
            )
            boxes = Boxes(low, high, torch.zeros_like(numbers), low.new_zeros(len(low)))
            covering.append(boxes.at(self.region.meets(boxes.low, boxes.high)))
        return _joined(covering)

    def _leave(self, boxes: Boxes) -> None:
        """Leave boxes as they are, proven or not."""
        proven = boxes.least > 0
        if proven.any():
            self.smallest = min(self.smallest, float(boxes.least[proven].min()))
        if not proven.all():
            self.left.append(boxes.at(~proven))

    def _decide(self, boxes: Boxes, bounds: Bounds) -> Boxes:
        """Count what is decided; return the parts of what is to be split."""
        least = torch.where(bounds.least > 0, bounds.least * bounds.centre, 0.0)
        self.proven += boxes.at((least > 0) & (boxes.least <= 0)).volume()
        boxes = boxes._replace(least=torch.maximum(boxes.least, least))
        done = bounds.least >= SHARE
        centres = (boxes.low + boxes.high) / 2
        folds = (bounds.centre <= 0) & (boxes.least <= 0) & self.region.holds(centres)
        if folds.any():
            self.refuted += boxes.at(folds).volume()
            self.folded.append(boxes.at(folds))
            values = torch.cat([self.determinants, bounds.centre[folds]])
            order = values.argsort()[:KEPT]
            self.determinants = values[order]
            self.points = torch.cat([self.points, centres[folds]])[order]
        done |= ~folds & (boxes.halved >= HALVINGS)
        self._leave(boxes.at(done))
        more = ~done & ~folds
        return self._split(boxes.at(more), bounds.far[more], bounds.blame[more])

    def _split(self, boxes: Boxes, far: Tensor, blame: Tensor) -> Boxes:
        """Return halves, quarters or eighths of boxes, without those off the region."""
        sides = boxes.high - boxes.low
        blame = blame.nan_to_num(torch.inf) + 1e-12 * sides
        most = blame.amax(1, keepdim=True)
        chosen = blame >= torch.where(far[:, None] < FAR, most, 0.4 * most)
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
        meets = self.region.meets(boxes.low, boxes.high)
        off = boxes.at(~meets)
        self.total -= off.volume()
        self.proven -= off.at(off.least > 0).volume()
        return boxes.at(meets)


@contextmanager
def _workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Make threads that take boxes of their own: no operation is split further."""
    pool = ThreadPoolExecutor(threads, "", torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _joined(parts: list[Boxes]) -> Boxes:
    return Boxes(*map(torch.cat, zip(*parts, strict=True)))


def _taken(
    first: deque[Boxes], then: deque[Boxes], most: int, *, whole: bool
) -> Boxes | None:
    """Return so many boxes from the front of two queues, or all; None: no box.

    None also where fewer are there and it must be whole.
    """
    if whole and sum(len(boxes.low) for boxes in (*first, *then)) < most:
        return None
    parts, room = [], most
    for queue in (first, then):
        while queue and room:
            boxes = queue.popleft()
            parts.append(boxes.at(slice(room)))
            if len(boxes.low) > room:
                queue.appendleft(boxes.at(slice(room, None)))
            room -= len(parts[-1].low)
    return _joined(parts) if room < most else None
