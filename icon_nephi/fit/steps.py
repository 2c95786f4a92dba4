"""What an optimisation does at a step: derive a loss, go on, or take it back.

The choice between torch and the compiled core is made here, by `make_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from icon_registration.losses import ICONLoss
from torch import Tensor

from icon_nephi.fit import compiled
from icon_nephi.fit.adam import Adam
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.space.images import Image
from icon_nephi.space.sampling import Patches, Points

BETAS = (0.9, 0.99)


class Steps(Protocol):
    """Steps of Adam on a loss."""

    def begin(self, images: Sequence[Image], sampler: Points | Patches) -> None:
        """Go on with images as a stage smooths them, and its sampler."""
        ...

    def derive(self, similarity: Callable[..., Tensor] | None = None) -> ICONLoss:
        """The loss at fresh samples, and its gradients for `advance`."""
        ...

    def advance(self, part: float) -> None:
        """Go on by that part of the learning rates."""
        ...

    def restore(self) -> None:
        """Take back the last step that was made."""
        ...

    def finite(self) -> bool:
        """Whether all weights are finite numbers."""
        ...

    def write(self) -> None:
        """See that the network has the weights."""
        ...


class TorchSteps:
    """Steps by autograd and torch's Adam: any loss, on any device.

    Args:
        loss: what is minimised; its network's weights and codes are changed.
        masks: of both images.
        extras: what else the loss takes by name.
        groups: Adam's parameter groups, each with its ``lr``.
    """

    def __init__(
        self,
        loss: GradientICONPoints,
        masks: Sequence[Tensor | None],
        extras: dict[str, Tensor],
        groups: Sequence[dict[str, Any]],
    ) -> None:
        self.loss, self.masks, self.extras = loss, masks, extras
        self.optimizer = Adam(groups, BETAS)
        self.rates = [group["lr"] for group in groups]
        self.weights: list[Tensor] = [w for group in groups for w in group["params"]]
        self.before = [w.detach().clone() for w in self.weights]

    def begin(self, images: Sequence[Image], sampler: Points | Patches) -> None:
        """Go on with images as a stage smooths them, and its sampler."""
        self.images, self.sampler = images, sampler

    def derive(self, similarity: Callable[..., Tensor] | None = None) -> ICONLoss:
        """The loss at fresh samples; `advance` derives it."""
        self.result: ICONLoss = self.loss(
            *self.images,
            *self.masks,
            sampler=self.sampler,
            similarity=similarity,
            **self.extras,
        )
        return self.result

    def advance(self, part: float) -> None:
        """Go on by that part of the learning rates."""
        _copy(self.weights, self.before)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * part
        self.optimizer.zero_grad()
        self.result.all_loss.backward()
        self.optimizer.step()

    def restore(self) -> None:
        """Take back the last step that was made."""
        _copy(self.before, self.weights)

    def finite(self) -> bool:
        """Whether all weights are finite numbers."""
        return all(bool(w.isfinite().all()) for w in self.weights)

    def write(self) -> None:
        """Leave the weights: they are the network's own."""


def _copy(source: Sequence[Tensor], to: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for values, place in zip(source, to, strict=True):
            place.copy_(values)


def make_steps(
    loss: GradientICONPoints,
    images: Sequence[Image],
    masks: Sequence[Tensor | None],
    extras: dict[str, Tensor],
    groups: Sequence[dict[str, Any]],
    samplers: Sequence[object],
    similarity: Callable[..., Tensor] | None,
    beside: Steps | None = None,
) -> Steps:
    """Steps on the compiled core, where it suits, or else by torch.

    Args:
        loss: what is minimised.
        images: both.
        masks: of both.
        extras: what else the loss takes by name.
        groups: Adam's parameter groups, each with its ``lr``.
        samplers: of every stage; None where it needs more of torch than that.
        similarity: in place of the loss's own, at the first step.
        beside: steps of another pair with the same fields.
    """
    if compiled.suits(loss, images, samplers, similarity, extras):
        (A, B), (mask_A, mask_B) = cast(Any, images), masks
        pair = A, B, mask_A, mask_B
        other = beside if isinstance(beside, compiled.PairSteps) else None
        return compiled.PairSteps(loss, *pair, groups, similarity, other)
    return TorchSteps(loss, masks, extras, groups)


class StepsInTurn:
    """Steps of several pairs with the same fields, one pair after the other.

    Args:
        each: steps of every pair.
        images: of every pair, as its steps take them.
    """

    def __init__(
        self, each: Sequence[Steps], images: Sequence[Sequence[Image]]
    ) -> None:
        self.each, self.images, self.turn = each, images, 0

    def begin(self, images: Sequence[Image], sampler: Points | Patches) -> None:
        """Go on with another sampler; every pair keeps its own images."""
        for steps, own in zip(self.each, self.images, strict=True):
            steps.begin(own, sampler)

    def derive(self, similarity: Callable[..., Tensor] | None = None) -> ICONLoss:
        """The loss of the pair whose turn it is."""
        return self.each[self.turn].derive(similarity)

    def advance(self, part: float) -> None:
        """Go on with that pair; then it is the next one's turn."""
        self.each[self.turn].advance(part)
        self.turn = (self.turn + 1) % len(self.each)

    def restore(self) -> None:
        """Take back the last step that was made."""
        self.each[self.turn - 1].restore()

    def finite(self) -> bool:
        """Whether all weights of all pairs are finite numbers."""
        return all(steps.finite() for steps in self.each)

    def write(self) -> None:
        """See that the networks have the weights."""
        for steps in self.each:
            steps.write()
