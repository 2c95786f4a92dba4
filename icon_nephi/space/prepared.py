"""One image ready to be fitted: voxels, mask, place, noise and gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from icon_nephi.space.chunks import ChunkedImage
from icon_nephi.space.frames import Geometry, other_order
from icon_nephi.space.intensities import fill_missing, missing_slices, noise


@dataclass(frozen=True)
class PreparedImage:
    """One image as the fit takes it, with all that is known of it; see `of`.

    Attributes:
        values: ``[1, C, *grid]``, about [0, 1]: `prepare`, then `fill_missing`.
        place: where that grid lies.
        noise: standard deviation of the noise, see `noise`.
        gaps: slices between others that stayed empty.
        whole: where the finest level lies; ``place`` unless it is read in parts.
        finer: levels finer than ``values``, coarse to fine, over the same unit box.
        mask: ``[1, 1, *grid]``, where it is to be matched; None: wherever it can be.
        labels: label map ``[1, 1, *any]`` over its box, int64.
        modality: one of `MODALITIES`.
        placed: points are LPS millimetres, as they are of all but tensors.
    """

    values: Tensor
    place: Geometry
    noise: float
    gaps: int
    whole: Geometry
    finer: Sequence[ChunkedImage] = ()
    mask: Tensor | None = None
    labels: Tensor | None = None
    modality: str | None = None
    placed: bool = False

    @classmethod
    def of(
        cls, values: Tensor, place: Geometry, whole: Geometry | None = None, **rest: Any
    ) -> PreparedImage:
        """The image of scaled intensities; lost slices are filled in, see `prepare`.

        Args:
            values: ``[1, C, *grid]``, about [0, 1].
            place: where that grid lies.
            whole: see above (default: ``place``).
            rest: the attributes after it.
        """
        values = fill_missing(values)
        axes = range(2, values.dim())
        gaps = sum(len(missing_slices(values, axis)) for axis in axes)
        return cls(values, place, noise(values), gaps, whole or place, **rest)


#: Images with more voxels are made coarser where they get features: that takes memory.
FEATURED = 4_000_000


def coarser(image: PreparedImage, voxels: int = FEATURED) -> PreparedImage:
    """The same box with at most about that many voxels, about equally far apart."""
    size, extent = image.values.shape[2:], image.place.extent
    if size.numel() <= voxels:
        return image
    d = len(size)
    far = (torch.tensor(extent).prod().item() / voxels) ** (1 / d)
    fewer = [
        min(n, max(3, round(length / far)))
        for n, length in zip(size, extent, strict=True)
    ]

    def resized(values: Tensor) -> Tensor:
        mode = "bilinear" if d == 2 else "trilinear"
        return F.interpolate(values, fewer, mode=mode, align_corners=True)

    mask = image.mask
    if mask is not None:
        mask = (resized(mask) > 0).to(mask)
    spacing = [length / (n - 1) for length, n in zip(extent, fewer, strict=True)]
    place = replace(image.place, size=tuple(fewer), spacing=other_order(spacing))
    return replace(image, values=resized(image.values), mask=mask, place=place)
