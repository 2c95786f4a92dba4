"""Optimise a loss for one pair: coarse to fine, progress, early stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import cast

from icon_registration.losses import ICONLoss
from torch import Tensor
from tqdm import tqdm

from icon_nephi.core.threads import lent
from icon_nephi.fit.steps import Steps, TorchSteps, make_steps
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.space.images import Image, gaussian_blur
from icon_nephi.space.sampling import Patches, Points

#: How the sentence begins that says of a kept interrupt.
STOPPED = "stopped by the user"


@dataclass(frozen=True)
class FitOptions:
    """What all parts of one fit go by; its time runs from when this was made.

    Attributes:
        seed: of everything random.
        progress: show a bar.
        time_limit: seconds for all of the fit, after which its searches stop early.
        keep_on_interrupt: once a step is done Ctrl-C only ends the optimisation.
        allow_mirror: the affine start may be a mirror image.

    Raises:
        ValueError: a limit that is not positive.
    """

    seed: int = 0
    progress: bool = True
    time_limit: float | None = None
    keep_on_interrupt: bool = False
    allow_mirror: bool = False
    began: float = field(default_factory=lambda: time.monotonic(), repr=False)

    def __post_init__(self) -> None:
        """Refuse a limit that is not positive."""
        if self.time_limit is not None and not self.time_limit > 0:
            raise ValueError(
                f"time_limit must be positive seconds, got {self.time_limit}"
            )

    @property
    def seconds(self) -> float:
        """The time that the fit has taken so far."""
        return time.monotonic() - self.began

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return self.time_limit is not None and self.seconds > self.time_limit


@dataclass(frozen=True)
class Course:
    """How an optimisation went.

    Attributes:
        losses: the loss and its terms, one entry a step.
        warnings: why it ended before its time, if it did, in words.
    """

    losses: list[dict[str, float]]
    warnings: list[str]

    @property
    def closer(self) -> bool:
        """Whether what was compared is more alike in the end than at the start."""
        first, last = (self.losses[i]["similarity_loss"] for i in (0, -1))
        return last < first

    def complete(self) -> list[dict[str, float]]:
        """The losses; a ValueError where it ended before its time."""
        if self.warnings:
            raise ValueError(self.warnings[0])
        return self.losses


@dataclass(frozen=True)
class Stage:
    """A stretch of the optimisation with one way of sampling.

    Attributes:
        steps: how many.
        sampler: of the similarity.
        blur: millimetres (units of ``spacing``) of Gaussian smoothing of the images.
    """

    steps: int
    sampler: Points | Patches
    blur: float = 0.0


def optimize(
    loss: GradientICONPoints,
    image_A: Image,
    image_B: Image,
    stages: Sequence[Stage],
    parameters: Sequence[dict[str, object]],
    *,
    mask_A: Tensor | None = None,
    mask_B: Tensor | None = None,
    extras: dict[str, Tensor] | None = None,
    similarity: Callable[[int], Callable[..., Tensor]] | None = None,
    spacing_A: Sequence[float] | None = None,
    spacing_B: Sequence[float] | None = None,
    patience: int | None = None,
    callback: Callable[[int, ICONLoss], None] | None = None,
    ended: Callable[[], None] | None = None,
    options: FitOptions | None = None,
    make: Callable[..., Steps] | None = None,
) -> Course:
    """The `Course` of the losses; the network is left at its optimum.

    Adam with a cosine decay to zero over all stages. Where the loss is no longer a
    finite number it ends, at the weights that had the last one that was.

    Images, masks and ``extras`` (segmentations, say) are what the loss takes; the
    spacings are voxel sizes along each tensor axis, for the blur (default 1). The
    parameters are Adam's groups, each with its ``lr``. A ``similarity`` is taken in
    place of the loss's own, by the number of steps done. A stage ends early after
    ``patience`` steps without a new lowest moving average of the loss (default: never).
    The callback is called after every step with its number and ICONLoss, and ``ended``
    after every stage, when the network has the weights. The default options have no bar
    and no limit of time; ``make`` makes the steps, by default `make_steps`.

    Raises:
        ValueError: the loss was not finite at once.
    """
    options = options or FitOptions(progress=False)
    total = sum(stage.steps for stage in stages)
    history: list[dict[str, float]] = []
    masks = [None if m is None else m > 0 for m in (mask_A, mask_B)]
    warnings: list[str] = []
    steps: Steps | None = None
    lending = ExitStack()
    silent = not options.progress
    bar = tqdm(total=total, disable=silent, desc="registering", leave=False)
    try:
        for stage in stages:
            images = [
                _blurred(image, stage.blur, spacing)
                for image, spacing in ((image_A, spacing_A), (image_B, spacing_B))
            ]
            if steps is None:
                steps = (make or make_steps)(
                    loss,
                    images,
                    masks,
                    extras or {},
                    parameters,
                    # Blurs and callbacks are torch's.
                    [None if s.blur or callback else s.sampler for s in stages],
                    similarity and similarity(0),
                )
                if not isinstance(steps, TorchSteps):
                    lending.enter_context(lent())
            steps.begin(images, stage.sampler)
            average, lowest, waited = None, math.inf, 0
            for _ in range(stage.steps):
                done = len(history)
                result = steps.derive(similarity and similarity(done))
                values = {k: _number(v) for k, v in result._asdict().items()}
                if not math.isfinite(values["all_loss"]):
                    steps.restore()
                    return Course(history, [not_finite(done)])
                steps.advance(0.5 * (1 + math.cos(math.pi * done / total)))
                history.append(values)
                if callback is not None:
                    callback(len(history), result)
                bar.update()
                if len(history) % 10 == 0:
                    bar.set_postfix(similarity=f"{values['similarity_loss']:.3f}")
                level = values["all_loss"]
                average = level if average is None else 0.9 * average + 0.1 * level
                waited = 0 if average < lowest else waited + 1
                lowest = min(lowest, average)
                if options.late or (patience is not None and waited >= patience):
                    break
            if ended is not None and steps.finite():
                steps.write()
                ended()
            if options.late:
                break
    except KeyboardInterrupt:
        # Weights may be those of a step that only part of them has made: a step is
        # small enough for any part of it to be as good.
        if not (options.keep_on_interrupt and history):
            raise
        warnings.append(stopped(len(history), total))
    finally:
        lending.close()
        bar.close()
        broken = steps is not None and not steps.finite()  # by the last step
        if steps is not None and broken:
            steps.restore()
        if steps is not None:
            steps.write()
    if broken:
        warnings.append(not_finite(len(history)))
    return Course(history, warnings)


def stopped(done: int, steps: int) -> str:
    """The sentence that says that an interrupt was kept."""
    return f"{STOPPED} after {done} of {steps} steps: the map is what was reached"


def _number(value: Tensor | float) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _blurred(image: Image, blur: float, spacing: Sequence[float] | None) -> Image:
    """The image smoothed by a Gaussian of so many units of the spacing."""
    if not blur:
        return image
    sigma = [blur / s for s in spacing or [1.0] * (len(image.shape) - 2)]
    return gaussian_blur(cast(Tensor, image), sigma)  # coarse stages are in memory


def not_finite(steps: int) -> str:
    """The sentence that says that the loss was finite for these steps only."""
    sentence = (
        f"the loss was not a finite number after {steps} steps: what they reached was "
        "kept; lower the learning rates, or look for extreme intensities"
    )
    if not steps:
        raise ValueError(sentence)
    return sentence
