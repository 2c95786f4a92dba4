"""Images as the losses read them: at points, whole in memory or not; smoothed ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from icon_nephi.space.frames import as_torch_samples
from icon_nephi.space.sampling import draw_points


class Readable(Protocol):
    """An image over the unit box that is read at points, wherever its voxels are."""

    @property
    def shape(self) -> torch.Size:
        """``[B, C, *grid]``."""

    def sample(self, coordinates: Tensor) -> Tensor:
        """Intensities ``[B, C, *any]`` at ICON-frame coordinates ``[B, d, *any]``."""

    def draw(
        self, count: int, mask: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Random rows ``[B, N, d]`` where samples of it are to lie."""


Image: TypeAlias = Tensor | Readable


class WholeImage:
    """A `Readable` of a tensor ``[B, C, *grid]``."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.shape = values, values.shape

    def sample(self, coordinates: Tensor) -> Tensor:
        """Intensities at ICON-frame coordinates, see `sample_image`."""
        return sample_image(self.values, coordinates)

    def draw(
        self, count: int, mask: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Random rows ``[B, N, d]`` in the unit box or the mask, see `draw_points`."""
        size, values = (count, self.shape[0], len(self.shape) - 2), self.values
        kind: dict[str, Any] = {"dtype": values.dtype, "device": values.device}
        return draw_points(*size, mask=mask, generator=generator, **kind)


def readable(image: Image) -> Readable:
    """The image as it is read at points, if it is not that already."""
    return WholeImage(image) if isinstance(image, Tensor) else image


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
        count, (first, *weights) = (
            image.shape[2 + axis],
            (kernel / kernel.sum()).tolist(),
        )
        image = padded.narrow(2 + axis, 0, count) * first
        for start, weight in enumerate(weights, 1):
            image.add_(padded.narrow(2 + axis, start, count), alpha=weight)
    return image


def sample_image(image: Tensor, coordinates: Tensor, mode: str = "bilinear") -> Tensor:
    """Intensities ``[B, C, *any]`` of ``[B, C, *grid]`` at ICON-frame coordinates.

    Multilinear (``mode="nearest"`` for labels); outside the unit box the nearest
    border value, as ICON's ``as_function``.
    """
    size = coordinates.shape[0] if image.shape[0] == 1 else image.shape[0]
    locations = as_torch_samples(coordinates)
    values = F.grid_sample(
        image.expand(size, *image.shape[1:]),
        locations.to(image.dtype).expand(size, *locations.shape[1:]),
        mode=mode,
        padding_mode="border",
        align_corners=True,
    )
    return values.reshape(size, image.shape[1], *coordinates.shape[2:])


def resize_image(image: Tensor, size: Sequence[int], mode: str = "linear") -> Tensor:
    """``[B, C, *size]`` of ``[B, C, *grid]``: other voxels, as `Geometry.resized`.

    The mode is ``"linear"`` or ``"nearest"``.
    """
    if mode == "linear":
        mode = "bilinear" if len(size) == 2 else "trilinear"
    return F.interpolate(image, size=tuple(size), mode=mode)
