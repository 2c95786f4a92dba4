"""Optimise a loss for one pair: coarse to fine, progress, early stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from icon_registration.losses import ICONLoss
from torch import Tensor
from tqdm import tqdm

from icon_nephi.losses import GradientICONPoints
from icon_nephi.sampling import Patches, Points

#: How the sentence begins that says of a kept interrupt.
STOPPED = "stopped by the user"


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


def gaussian_blur(image: Tensor, sigma: Sequence[float]) -> Tensor:
    """``[B, C, *grid]`` smoothed by a Gaussian of sigma voxels along each axis."""
    for axis, s in enumerate(sigma):
        reach = math.ceil(2.5 * s)
        reach = min(reach, image.shape[2 + axis] - 1)
        if s < 0.3 or reach < 1:
            continue
        x = torch.arange(-reach, reach + 1, dtype=torch.float64)
        kernel = torch.exp(-0.5 * (x / s) ** 2)
        pads = [0, 0] * (len(sigma) - 1 - axis) + [reach, reach] + [0, 0] * axis
        padded = F.pad(image, pads, mode="replicate")
        # Sums of shifted views: three times quicker than conv1d on one channel.
        parts = [
            padded.narrow(2 + axis, i, image.shape[2 + axis]) for i in range(len(x))
        ]
        weights = (kernel / kernel.sum()).tolist()
        image = parts[0] * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            image.add_(part, alpha=weight)
    return image


def optimize(
    loss: GradientICONPoints,
    image_A: Tensor,
    image_B: Tensor,
    stages: Sequence[Stage],
    parameters: Sequence[dict[str, object]],
    *,
    mask_A: Tensor | None = None,
    mask_B: Tensor | None = None,
    extras: dict[str, Tensor] | None = None,
    spacing_A: Sequence[float] | None = None,
    spacing_B: Sequence[float] | None = None,
    progress: bool = False,
    time_limit: float | None = None,
    patience: int | None = None,
    callback: Callable[[int, ICONLoss], None] | None = None,
    said: list[str] | None = None,
    keep_on_interrupt: bool = False,
) -> list[dict[str, float]]:
    """The loss history, one entry a step; the network is left at its optimum.

    Adam with a cosine decay to zero over all stages. Where the loss is no longer a
    finite number it ends, at the weights that had the last one that was.

    Args:
        loss: what is minimised; its network's weights and codes are changed.
        image_A: moving ``[B, C, *grid]``.
        image_B: fixed ``[B, C, *grid]``; may have another grid.
        stages: coarse to fine.
        parameters: Adam parameter groups, each with its ``lr``.
        mask_A: see `GradientICONPoints`.
        mask_B: see `GradientICONPoints`.
        extras: what else the loss takes by name, such as segmentations.
        spacing_A: voxel size along each tensor axis, for the blur (default 1).
        spacing_B: the same of image_B.
        progress: show a bar.
        time_limit: seconds after which to stop early.
        patience: steps without a new lowest moving average of the loss after which a
            stage ends early (default: never).
        callback: called after every step with its number and ICONLoss.
        said: a sentence is added if the loss was not finite, or for an interrupt.
        keep_on_interrupt: once a step is done Ctrl-C only ends the optimisation.

    Raises:
        ValueError: the loss was not finite, at once or with nobody to tell.
    """
    total = sum(stage.steps for stage in stages)
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    history: list[dict[str, float]] = []
    weights = [w for group in parameters for w in cast(list[Tensor], group["params"])]
    good = [w.detach().clone() for w in weights]
    mask_A, mask_B = (None if m is None else m > 0 for m in (mask_A, mask_B))
    ends = None if time_limit is None else time.monotonic() + time_limit
    with (
        _until_interrupted(history, total, said, keep_on_interrupt),
        tqdm(total=total, disable=not progress, desc="registering", leave=False) as bar,
    ):
        for stage in stages:
            images = [
                gaussian_blur(
                    image,
                    [stage.blur / s for s in spacing or [1.0] * (image.dim() - 2)],
                )
                for image, spacing in ((image_A, spacing_A), (image_B, spacing_B))
            ]
            loss.similarity_sampler = stage.sampler
            average, lowest, waited = None, math.inf, 0
            for _ in range(stage.steps):
                result = loss(*images, mask_A, mask_B, **(extras or {}))
                values = {k: float(v.detach()) for k, v in result._asdict().items()}
                if not math.isfinite(values["all_loss"]):
                    _copy(good, weights)
                    _tell(len(history), said)
                    return history
                _copy(weights, good)
                optimizer.zero_grad(set_to_none=True)
                result.all_loss.backward()
                optimizer.step()
                schedule.step()
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
                if patience is not None and waited >= patience:
                    break
                if ends is not None and time.monotonic() > ends:
                    break
            if ends is not None and time.monotonic() > ends:
                break
    if not all(bool(w.isfinite().all()) for w in weights):  # by the last step
        _copy(good, weights)
        _tell(len(history), said)
    return history


@contextmanager
def _until_interrupted(
    history: list[dict[str, float]], total: int, said: list[str] | None, keep: bool
) -> Iterator[None]:
    """Within, Ctrl-C ends the block; it goes on as ever where nothing is to be kept.

    Weights may then be those of a step that only part of them has made: a step is small
    enough for any part of it to be as good.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not (keep and history):
            raise
        if said is not None:
            said.append(
                f"{STOPPED} after {len(history)} of {total} steps: the map is what was "
                "reached"
            )


def _copy(source: Sequence[Tensor], to: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for one, other in zip(source, to, strict=True):
            other.copy_(one)


def _tell(steps: int, said: list[str] | None) -> None:
    """Say that the loss was finite for these steps only."""
    sentence = (
        f"the loss was not a finite number after {steps} steps: what they reached was "
        "kept; lower the learning rates, or look for extreme intensities"
    )
    if said is None or not steps:
        raise ValueError(sentence)
    said.append(sentence)
