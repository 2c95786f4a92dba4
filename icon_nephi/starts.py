"""One pair as it is fitted: where there is something to match, and affine starts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from icon_nephi.affine import centre_of_mass, in_unit_boxes, refine, search
from icon_nephi.coordinates import (
    Geometry,
    apply_affine,
    identity_map,
    sample_image,
)
from icon_nephi.features import with_features
from icon_nephi.images import gaussian_blur
from icon_nephi.preprocess import PreparedImage
from icon_nephi.similarities import Comparison, MutualInformation

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


def coincide(geometry_A: Geometry, geometry_B: Geometry) -> bool:
    """Whether the boxes lie on each other, as two scans of one session do."""
    d = geometry_B.dimension
    corners = torch.cartesian_prod(*[torch.linspace(0, 1, 5, dtype=torch.float64)] * d)
    inner = apply_affine(in_unit_boxes(identity(d), geometry_B, geometry_A), corners)
    share = ((inner >= 0) & (inner <= 1)).all(1).double().mean()
    return bool(share > 0.95)


def identity(d: int) -> Tensor:
    """The affine map that moves nothing, homogeneous."""
    return torch.eye(d + 1, dtype=torch.float64)


def _between(
    geometry_A: Geometry,
    geometry_B: Geometry,
    weights_A: Tensor | None,
    weights_B: Tensor | None,
) -> Tensor:
    """The translation between the centres of mass (or of the boxes)."""
    d = geometry_B.dimension
    centres = [
        apply_affine(
            g.unit_to_physical(), torch.full((1, d), 0.5, dtype=torch.float64)
        )[0]
        if w is None
        else centre_of_mass(w.float(), g)
        for g, w in ((geometry_A, weights_A), (geometry_B, weights_B))
    ]
    matrix = identity(d)
    matrix[:d, d] = centres[0] - centres[1]
    return matrix


def find_affine(
    images: Images, choice: Comparison, generator: torch.Generator
) -> Tensor:
    """The affine map in the physical frame, by search and then by refinement."""
    d = images.geometry_B.dimension
    starts = [
        identity(d),
        _between(images.geometry_A, images.geometry_B, None, None),
        _between(images.geometry_A, images.geometry_B, images.where_A, images.where_B),
    ]
    best = search(
        *images.blurred(2.7),
        *images.geometries,
        starts,
        angles=range(-180, 180, 15) if d == 2 else (),
        mask_B=None if images.masks[1] is None else images.where_B.cpu(),
        count=2000,
        score=MutualInformation(16).counted if choice.contrast else None,
        generator=generator,
    )
    return refine(
        *images.blurred(2.0),
        *images.geometries,
        best,
        strides=(12 * images.unit, 6 * images.unit),
        steps=50,
        similarity=choice.alone,
        mask_A=images.where_A.cpu(),
        mask_B=images.where_B.cpu(),
        generator=generator,
    )
