"""One pair as it is fitted: where there is something to match, and its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from icon_nephi.losses.features import turned, with_features
from icon_nephi.losses.similarities import Comparison
from icon_nephi.space.frames import identity_map, other_order
from icon_nephi.space.images import gaussian_blur, sample_image
from icon_nephi.space.intensities import PreparedImage

# Local spread of intensities below which there is nothing to match; around how many
# units it is looked at, so that neither sharp nor smooth images are left out, and how
# far around what was found is looked at, too: an edge shows on both of its sides.
CONTENT, AROUND, BESIDE = 0.05, (2.0, 6.0), 8.0
# Images with more voxels are made coarser where they get features: that takes memory.
FEATURED = 4_000_000


class ImagePair:
    """Two images with their label maps, and where samples of them are drawn.

    Args:
        image_A: moving.
        image_B: fixed.
        featured: features will be asked for, so large images are made `coarser`.
        mass_preserving: intensities are densities, whose mass is kept.
    """

    def __init__(
        self,
        image_A: PreparedImage,
        image_B: PreparedImage,
        *,
        featured: bool = False,
        mass_preserving: bool = False,
    ) -> None:
        if featured:
            image_A, image_B = coarser(image_A), coarser(image_B)
        self.image_A, self.image_B = image_A.values, image_B.values
        self.geometries = image_A.place, image_B.place
        self.geometry_A, self.geometry_B = self.geometries
        #: Millimetres: 1/160 of the fixed image's longest side.
        self.unit = max(self.geometry_B.extent) / 160
        self.masked = image_B.mask is not None or image_B.counts is not None
        #: Which voxels are compared; None: all.
        self.counts = image_A.counts, image_B.counts
        self.densities = self.image_A.shape[1] if mass_preserving else 0
        boxes = [place.unit_to_physical().det() for place in self.geometries]
        self.volumes = float(boxes[0] / boxes[1])
        #: Label maps at the voxels of their images, by the names that losses have.
        self.segmentations = {
            f"segmentation_{side}": _labels_on(image.values, image.labels)
            for side, image in (("A", image_A), ("B", image_B))
            if image.labels is not None
        }
        self.where_A = self._where("A", image_A)
        self.where_B = self._where("B", image_B)
        #: Where image_B itself shows something, nothing beside it.
        self.shown_B = self._where("B", image_B, 0.0)

    def _where(
        self, side: str, prepared: PreparedImage, beside: float = BESIDE
    ) -> Tensor:
        """The mask, or the voxels with something to match around them, or a label."""
        counts = prepared.counts
        if prepared.mask is not None:
            inside = prepared.mask > 0
            return inside if counts is None else inside & counts
        content = _content(prepared, self.unit, beside)
        if self.segmentations:
            content = content | (self.segmentations[f"segmentation_{side}"] > 0)
        if counts is not None:
            content = content & counts
            if not bool(content.any()):
                return counts
        return content if bool(content.any()) else torch.ones_like(content)

    @cached_property
    def _featured(self) -> tuple[Tensor, Tensor]:
        return with_features(self.image_A), with_features(self.image_B)

    def featured(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Both images with their features, see `with_features`.

        The start ``[d + 1, d + 1]`` is the map from image_B's unit box to image_A's
        that they are compared around: by it features of image_A are `turned`.
        """
        d = self.geometry_B.dimension
        lengths = [torch.tensor(place.extent) for place in self.geometries]
        matrix = start[:d, :d].cpu() * lengths[0][:, None] / lengths[1]
        return turned(self._featured[0], matrix), self._featured[1]

    @cached_property
    def smooth(self) -> tuple[Tensor, Tensor]:
        """Both images `blurred` by two units."""
        return self.blurred(2.0)

    def counts_on(self, device: str) -> tuple[Tensor | None, Tensor | None]:
        """`counts`, on a device."""
        A, B = (None if c is None else c.to(device) for c in self.counts)
        return A, B

    def blurred(self, units: float) -> tuple[Tensor, Tensor]:
        """Both images smoothed by a Gaussian of that many units, on the CPU."""
        size = units * self.unit
        A, B = (
            gaussian_blur(image.cpu(), [size / s for s in place.tensor_spacing])
            for image, place in zip(
                (self.image_A, self.image_B), self.geometries, strict=True
            )
        )
        return A, B


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

    mask, counts = image.mask, image.counts
    if mask is not None:
        mask = (resized(mask) > 0).to(mask)
    if counts is not None:
        counts = resized(counts.float()) > 1 - 1e-3
    spacing = [length / (n - 1) for length, n in zip(extent, fewer, strict=True)]
    place = replace(image.place, size=tuple(fewer), spacing=other_order(spacing))
    smaller = replace(image, values=resized(image.values), place=place)
    return replace(smaller, mask=mask, counts=counts)


def _content(image: PreparedImage, unit: float, beside: float) -> Tensor:
    """Boolean ``[1, 1, *grid]``: where there is local spread, and beside that."""
    values, found = image.values, torch.zeros_like(image.values[:, :1]) > 0
    for units in AROUND:  # on voxels of half that width, or its own
        apart = [
            max(1, min(n // 2, int(units / 2 * unit / s)))
            for n, s in zip(values.shape[2:], image.place.tensor_spacing, strict=True)
        ]
        both = torch.cat([values, values.square()], 1)
        if max(apart) > 1:
            pool = F.avg_pool2d if len(apart) == 2 else F.avg_pool3d
            both = pool(both, apart, ceil_mode=True)
        steps = zip(image.place.tensor_spacing, apart, strict=True)
        spacing = [s * n for s, n in steps]
        both = gaussian_blur(both, [units * unit / s for s in spacing])
        mean, squares = both.chunk(2, 1)
        content = (squares - mean.square() > CONTENT**2).any(1, keepdim=True)
        content = _widened(content[0], [beside * unit / s for s in spacing])[None]
        found |= F.interpolate(content.to(values), values.shape[2:]) > 0
    return found


def _widened(where: Tensor, voxels: Sequence[float]) -> Tensor:
    """``[1, *grid]``: where, or within so many voxels along every axis of it."""
    for axis, reach in enumerate(voxels, 1):
        n, count = round(reach), where.shape[axis]
        sums = where.cumsum(axis, dtype=torch.int32)
        at = torch.arange(count, device=where.device)
        before = sums.index_select(axis, (at - n - 1).clamp(min=0))
        first = (at <= n).view(-1, *(1,) * (where.dim() - 1 - axis))
        before = before * ~first
        where = sums.index_select(axis, (at + n).clamp(max=count - 1)) > before
    return where


def _labels_on(image: Tensor, labels: Tensor) -> Tensor:
    """A label map over an image's box, at its voxels: the nearest, int64."""
    size = image.shape[2:]
    if labels.shape[2:] != size:
        grid = identity_map(size, device=image.device)
        labels = sample_image(labels.float(), grid, mode="nearest")
    return labels.long()


def check_densities(modality: str | None, choice: Comparison) -> None:
    """Raise a ValueError where intensities cannot be taken for densities.

    The modality is that of both images, where it is the same.
    """
    if modality != "ct" or choice.contrast:
        raise ValueError(
            "mass_preserving takes intensities for densities: both images must be of "
            "modality ct, and similarity 'lncc', 'ncc' or a callable"
        )
