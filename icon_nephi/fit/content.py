"""One pair as it is fitted: where there is something to match, and its features."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from icon_nephi.losses.features import turned, with_features
from icon_nephi.space.frames import identity_map, other_order
from icon_nephi.space.images import gaussian_blur, sample_image
from icon_nephi.space.intensities import PreparedImage

# Local spread of intensities below which there is nothing to match.
CONTENT = 0.05
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
        self.masked = image_B.mask is not None
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

    def _where(self, side: str, prepared: PreparedImage) -> Tensor:
        """The mask, or the voxels with something to match around them, or a label."""
        if prepared.mask is not None:
            return prepared.mask > 0
        image = prepared.values
        sigma = [2 * self.unit / s for s in prepared.place.tensor_spacing]
        spread = gaussian_blur((image - gaussian_blur(image, sigma)).square(), sigma)
        content = (spread.sqrt() > CONTENT).any(dim=1, keepdim=True)
        if self.segmentations:
            content = content | (self.segmentations[f"segmentation_{side}"] > 0)
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

    mask = image.mask
    if mask is not None:
        mask = (resized(mask) > 0).to(mask)
    spacing = [length / (n - 1) for length, n in zip(extent, fewer, strict=True)]
    place = replace(image.place, size=tuple(fewer), spacing=other_order(spacing))
    return replace(image, values=resized(image.values), mask=mask, place=place)


def _labels_on(image: Tensor, labels: Tensor) -> Tensor:
    """A label map over an image's box, at its voxels: the nearest, int64."""
    size = image.shape[2:]
    if labels.shape[2:] != size:
        grid = identity_map(size, device=image.device)
        labels = sample_image(labels.float(), grid, mode="nearest")
    return labels.long()
