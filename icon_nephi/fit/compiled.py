"""A whole step of one pair on the compiled core: loss, gradients, Adam.

The reference is `GradientICONPoints` with autograd and torch's Adam, see
`icon_nephi.fit.steps`; samples are drawn by the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from icon_registration.losses import ICONLoss
from torch import Tensor, nn

from icon_nephi.core.arrays import adam, suit
from icon_nephi.fields import compiled as fields
from icon_nephi.fields.codes import LatentCodeTable
from icon_nephi.losses.compiled import (
    Channels,
    Layout,
    Measure,
    compare,
    consistency,
    find_measure,
)
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.losses.regularity import GUARD, guarded_term
from icon_nephi.maps.networks import AffinePair, NePhi
from icon_nephi.space.sampling import Patches, draw_points

BETAS = (0.9, 0.99)


def suits(
    loss: GradientICONPoints,
    images: Sequence[object],
    samplers: Sequence[object],
    similarity: object = None,
    extras: dict[str, Tensor] | None = None,
) -> bool:
    """Whether the core takes the steps of a loss on two images.

    Args:
        loss: as `fitting` makes it.
        images: both, ``[1, C, *grid]``.
        samplers: of the similarity, at every stage.
        similarity: in place of the loss's own.
        extras: what else the loss takes.
    """
    pair = loss.regis_net
    if type(loss) is not GradientICONPoints or type(pair) is not AffinePair or extras:
        return False
    net: Any = pair.net
    if type(net) is not NePhi or type(net.net) is not LatentCodeTable:
        return False
    if loss.dice_loss_weight or loss.densities or loss.extent is None:
        return False
    if not all(type(s) is Patches for s in samplers) or not _guarded(loss.regularity):
        return False
    return _suit_images(similarity or loss.similarity, images) and _suit_fields(
        net, images
    )


def _guarded(regularity: object) -> bool:
    return (
        isinstance(regularity, partial)
        and regularity.func is guarded_term
        and not regularity.args
        and set(regularity.keywords) <= {"consistency", "weight"}
    )


def _suit_images(similarity: object, images: Sequence[object]) -> bool:
    for image in images:
        if not isinstance(image, Tensor) or not suit(image):
            return False
        if find_measure(similarity, image.shape[1]) is None:
            return False
    first, second = (image.shape for image in images if isinstance(image, Tensor))
    return first[:2] == second[:2] and len(first) == len(second)


def _suit_fields(net: Any, images: Sequence[Any]) -> bool:
    code = net.net(*images)
    rows = torch.zeros(1, 0, images[0].dim() - 2)
    return all(fields.suits(f, code, rows) for f in (net.field_AB, net.field_BA))


@dataclass
class _Map:
    """x -> post(y + u(y)), y = pre x, from the fixed image's box to the moving's."""

    plan: fields.Plan
    pre: Tensor | None  # None: the identity
    post: Tensor
    weights: slice  # of the flat gradients' parts

    def before(self, rows: Tensor) -> Tensor:
        """Where the field is evaluated."""
        return rows if self.pre is None else _moved(self.pre, rows)


def _moved(matrix: Tensor, rows: Tensor) -> Tensor:
    d = rows.shape[1]
    return rows @ matrix[:, :d].T + matrix[:, d]


class PairSteps:
    """Steps of a pair, on weights of its own: `write` hands them to the network.

    Args:
        loss: one that `suits`.
        image_A: moving ``[1, C, *grid]``.
        image_B: fixed.
        mask_A: where image_A's samples may lie.
        mask_B: the same of image_B.
        groups: Adam's parameter groups: of these, what the loss depends on moves.
        similarity: in place of the loss's own; another one later may differ from it in
            its weights, not in its channels.
        beside: steps of another pair with the same fields, which move for both.
    """

    def __init__(
        self,
        loss: GradientICONPoints,
        image_A: Tensor,
        image_B: Tensor,
        mask_A: Tensor | None,
        mask_B: Tensor | None,
        groups: Sequence[dict[str, Any]],
        similarity: object = None,
        beside: PairSteps | None = None,
    ) -> None:
        self.loss, pair = loss, cast(AffinePair, loss.regis_net)
        net: Any = pair.net
        self.dimension, self.steps = image_A.dim() - 2, 0
        self.patches = cast(Patches, loss.similarity_sampler)
        self._collect(net, groups, beside)
        measure = find_measure(similarity or loss.similarity, image_A.shape[1])
        assert measure is not None
        self.images = Channels.of((image_A, image_B), measure, loss.counts)
        self.shapes = image_A.shape[2:], image_B.shape[2:]
        self.channels = image_A.shape[1]
        self.masks = mask_A, mask_B
        self._layouts: dict[tuple[Patches, int], Layout] = {}
        d = self.dimension
        forth, back = (
            m[0, :d].detach().float().contiguous() for m in (pair.matrix, pair.inverse)
        )
        self.identity = torch.eye(d, d + 1)
        assert loss.extent is not None
        self.extent = loss.extent.detach().float().contiguous()
        first = len(self.grids) + 1
        count = (len(self.weights) - first) // 2
        slices = slice(first, first + count), slice(first + count, None)
        known = net.field_AB, net.field_BA
        plans = [self._plan(f, s, net.net) for f, s in zip(known, slices, strict=True)]
        self.maps = (
            _Map(plans[0], None, forth, slices[0]),
            _Map(plans[1], back, self.identity, slices[1]),
        )

    def _collect(
        self, net: Any, groups: Sequence[dict[str, Any]], beside: PairSteps | None
    ) -> None:
        """All weights beside each other, codes channels last, and what is of each."""
        self.grids = list(net.net.local_codes)
        self.owners: list[nn.Parameter] = [*self.grids, net.net.global_codes]
        self.owners += fields.weights_of(net.field_AB)  # type: ignore[arg-type]
        self.owners += fields.weights_of(net.field_BA)  # type: ignore[arg-type]
        count = len(self.grids)
        start = [fields.as_table(g) for g in self.grids]
        start += [w.detach() for w in self.owners[count:]]
        ends = torch.tensor([0, *(w.numel() for w in start)]).cumsum(0).tolist()

        def parts(flat: Tensor) -> list[Tensor]:
            cut = zip(ends, ends[1:], start, strict=False)
            return [flat[a:b].view(w.shape) for a, b, w in cut]

        buffers = [parts(torch.zeros(ends[-1])) for _ in range(5)]
        self.weights, self.gradients, self.means, self.squares, self.before = buffers
        for weight, before, first in zip(self.weights, self.before, start, strict=True):
            weight.copy_(first)
            before.copy_(first)
        if beside is not None:  # codes come first, then the fields
            for name in ("weights", "gradients", "means", "squares", "before"):
                getattr(self, name)[count + 1 :] = getattr(beside, name)[count + 1 :]
        sigma, prior = self.loss.sigma, self.loss.prior_lmbda
        self.decays = [
            prior / sigma**2 / (w[..., 0].numel() if n < count else 1)
            if n <= count
            else 0.0
            for n, w in enumerate(self.weights)
        ]
        self.sizes = [float(w.double().square().sum()) for w in self.weights]
        by_owner = {id(p): g for g, group in enumerate(groups) for p in group["params"]}
        self.rates = [float(group.get("lr", 0.0)) for group in groups]
        self.groups = [by_owner.get(id(owner)) for owner in self.owners]
        last = [*net.field_AB.last.parameters(), *net.field_BA.last.parameters()]
        self.last = {id(p) for p in last} if self.loss.still else set()

    def _plan(self, field: nn.Module, weights: slice, table: Any) -> fields.Plan:
        count = len(self.grids)
        return fields.Plan(
            field,
            self.weights[:count],
            [g.shape[1] for g in self.grids],
            self.weights[count],
            table.interpolation,
            self.dimension,
            self.weights[weights],
        )

    def begin(self, images: Sequence[object], sampler: object) -> None:
        """Go on with other `Patches`; images are those that were given."""
        self.patches = cast(Patches, sampler)

    def derive(self, similarity: object = None) -> ICONLoss:
        """The loss at fresh samples, in numbers; `advance` takes its gradients.

        Args:
            similarity: in place of the loss's own.
        """
        loss = self.loss
        measure = find_measure(similarity or loss.similarity, self.channels)
        assert measure is not None
        unlike = self._compare(0, measure) + self._compare(1, measure)
        regular_A = self._regularity(1, 0)[0]
        regular_B, magnitude, folded = self._regularity(0, 1)
        regular = (regular_A + regular_B) / 2
        pairs = zip(self.decays, self.sizes, strict=True)
        prior = sum(decay * size for decay, size in pairs)
        total = unlike + loss.lmbda * regular + prior + self._parts()
        flips = folded * self.shapes[1].numel()
        return ICONLoss(total, regular, unlike, magnitude, flips)

    def _rows(self, count: int, side: int, masked: bool) -> Tensor:
        return draw_points(
            count,
            1,
            self.dimension,
            mask=self.masks[side] if masked else None,
            generator=self.loss.generator,
            dtype=torch.float32,
        )[0]

    def _compare(self, side: int, measure: Measure) -> float:
        """Similarity of the moving image ``side`` and the other, under map ``side``."""
        fixed, phi, patches = 1 - side, self.maps[side], self.patches
        layout = self._layouts.get((patches, fixed))
        if layout is None:
            layout = Layout(patches, self.shapes[fixed])
            self._layouts[patches, fixed] = layout
        centres = self._rows(patches.count, fixed, True).contiguous()
        at = phi.before(layout.at(centres))
        (moves,) = phi.plan.forward(False, at)
        by_moves = torch.empty_like(moves)
        images = self.images[side], self.images[fixed]
        found = compare(
            layout, measure, centres, phi.post, *images, at, moves, by_moves
        )
        self._backward(phi, False, at, by_moves)
        return found

    def _regularity(self, first: int, then: int) -> tuple[float, float, float]:
        """The term of two maps; mean squared displacement and folds of the first."""
        loss: Any = self.loss
        d, one, two = self.dimension, self.maps[first], self.maps[then]
        x = self._rows(loss.regularity_sampler.count, 1 - first, False).contiguous()
        at = one.before(x)
        moves, slopes = one.plan.forward(True, at)
        between = _moved(one.post, at + moves)
        after = two.before(between)
        moves_2, slopes_2 = two.plan.forward(True, after)
        known = loss.regularity.keywords
        found = consistency(
            x,
            _moved(two.post, after + moves_2),
            (slopes, slopes_2),
            (
                self.identity if one.pre is None else one.pre,
                one.post,
                self.identity if two.pre is None else two.pre,
                two.post,
            ),
            self.extent,
            known.get("consistency", 300.0),
            known.get("weight", 1.0),
            GUARD,
            loss.lmbda / 2,
        )
        by_moves_2, by_after = found.by_values @ two.post[:, :d], torch.empty_like(x)
        self._backward(two, True, after, by_moves_2, found.by_2, by_after)
        by_between = by_after + by_moves_2
        if two.pre is not None:
            by_between = by_between @ two.pre[:, :d]
        self._backward(one, True, at, by_between @ one.post[:, :d], found.by_1)
        return found.term, float((between - x).square().mean()), found.folded

    def _parts(self) -> float:
        """What else is asked of both maps, by torch but for the fields."""
        parts, d, total = self.loss.parts, self.dimension, 0.0
        for side, phi in enumerate(self.maps if parts is not None else ()):
            assert parts is not None
            x = parts.places(side).contiguous()
            if not len(x):
                continue
            at = phi.before(x)
            moves, slopes = phi.plan.forward(True, at)
            with torch.enable_grad():
                moves, slopes = (t.clone().requires_grad_() for t in (moves, slopes))
                jacobian = phi.post[:, :d] @ (torch.eye(d) + slopes)
                if phi.pre is not None:
                    jacobian = jacobian @ phi.pre[:, :d]
                term = parts.of_map(side, _moved(phi.post, at + moves), jacobian)
                by = torch.autograd.grad(
                    term, (moves, slopes), allow_unused=True, materialize_grads=True
                )
            self._backward(phi, True, at, *(g.contiguous() for g in by))
            total += float(term.detach())
        return total

    def _backward(
        self,
        phi: _Map,
        jets: bool,
        at: Tensor,
        by_values: Tensor,
        by_jacobians: Tensor | None = None,
        by_rows: Tensor | None = None,
    ) -> None:
        count = len(self.grids)
        phi.plan.backward(
            jets,
            at,
            by_values,
            by_jacobians,
            tables=self.gradients[:count],
            shared=self.gradients[count],
            weights=self.gradients[phi.weights],
            by_rows=by_rows,
        )

    def advance(self, part: float) -> None:
        """Go on by that part of the learning rates."""
        self.steps += 1
        all_arrays = zip(
            *(self.weights, self.gradients, self.means, self.squares, self.before),
            strict=True,
        )
        for number, arrays in enumerate(all_arrays):
            group = self.groups[number]
            if id(self.owners[number]) in self.last:
                arrays[1][list(self.loss.still)] = 0
            if group is None:
                arrays[1].zero_()
                arrays[4].copy_(arrays[0])
            else:
                decay, rate = self.decays[number], part * self.rates[group]
                size = adam(self.steps, rate, BETAS, decay, *arrays)
                self.sizes[number] = size

    def finite(self) -> bool:
        """Whether all weights are finite numbers."""
        return all(bool(w.isfinite().all()) for w in self.weights)

    def restore(self) -> None:
        """Take back the last step."""
        for weight, before in zip(self.weights, self.before, strict=True):
            weight.copy_(before)

    @torch.no_grad()
    def write(self) -> None:
        """Hand the weights to the network."""
        for number, (owner, weight) in enumerate(
            zip(self.owners, self.weights, strict=True)
        ):
            grid = number < len(self.grids)
            owner.copy_(fields.as_grid(weight, owner) if grid else weight)
