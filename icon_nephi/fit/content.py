"""One pair as it is fitted: where there is something to match, and its features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from icon_nephi.losses.features import with_features
from icon_nephi.space.frames import identity_map
from icon_nephi.space.images import gaussian_blur, sample_image
from icon_nephi.space.prepared import PreparedImage

# Local spread of intensities below which there is nothing to match.
CONTENT = 0.05


class Images:
    """A pair with its label maps, and where its samples are drawn.

    Args:
        image_A: moving.
        image_B: fixed.
        densities: channels, from the first, whose mass is kept.
    """

    def __init__(
        self, image_A: PreparedImage, image_B: PreparedImage, densities: int = 0
    ) -> None:
        self.image_A, self.image_B = image_A.values, image_B.values
        self.geometries = image_A.place, image_B.place
        self.geometry_A, self.geometry_B = self.geometries
        self.unit = max(self.geometry_B.extent) / 160
        self.spacing_A = self.geometry_A.tensor_spacing
        self.spacing_B = self.geometry_B.tensor_spacing
        self.masks = image_A.mask, image_B.mask
        self.densities = densities
        boxes = [i.place.unit_to_physical().det() for i in (image_A, image_B)]
        self.volumes = float(boxes[0] / boxes[1])
        self.extras = {
            f"segmentation_{side}": _labels_on(image.values, image.labels)
            for side, image in (("A", image_A), ("B", image_B))
            if image.labels is not None
        }
        self.where_A = self._where("A", image_A, self.spacing_A)
        self.where_B = self._where("B", image_B, self.spacing_B)

    def _where(
        self, side: str, prepared: PreparedImage, spacing: Sequence[float]
    ) -> Tensor:
        """The mask, or the voxels with something to match around them, or a label."""
        if prepared.mask is not None:
            return prepared.mask > 0
        image = prepared.values
        sigma = [2 * self.unit / s for s in spacing]
        spread = gaussian_blur((image - gaussian_blur(image, sigma)).square(), sigma)
        content = (spread.sqrt() > CONTENT).any(dim=1, keepdim=True)
        if self.extras:
            content = content | (self.extras[f"segmentation_{side}"] > 0)
        return content if bool(content.any()) else torch.ones_like(content)

    @cached_property
    def featured(self) -> tuple[Tensor, Tensor]:
        """Both images with their features, see `with_features`."""
        return with_features(self.image_A), with_features(self.image_B)

    def blurred(self, units: float) -> tuple[Tensor, Tensor]:
        """Both images smoothed by a Gaussian of that many units, on the CPU."""
        size = units * self.unit
        return (
            gaussian_blur(self.image_A.cpu(), [size / s for s in self.spacing_A]),
            gaussian_blur(self.image_B.cpu(), [size / s for s in self.spacing_B]),
        )


def _labels_on(image: Tensor, labels: Tensor) -> Tensor:
    """A label map over an image's box, at its voxels: the nearest, int64."""
    size = image.shape[2:]
    if labels.shape[2:] != size:
        grid = identity_map(size, device=image.device)
        labels = sample_image(labels.float(), grid, mode="nearest")
    return labels.long()
