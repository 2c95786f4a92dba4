"""ITK transforms asked as a `Registration` is asked: points, fields, Jacobians."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import itk
import numpy as np
import torch

from icon_nephi._check import check_dimension
from icon_nephi.io import itk_images
from icon_nephi.io.image_input import voxels_of
from icon_nephi.io.itk_images import array_of, geometry_of, image_of
from icon_nephi.io.itk_modules import itk_class
from icon_nephi.io.itk_points import Rows, rows_through
from icon_nephi.io.itk_transforms import affine_transform, composed
from icon_nephi.io.resampling import check_outside, least_value, reader
from icon_nephi.maps.framed import over_grid
from icon_nephi.maps.jacobians import fold_fraction
from icon_nephi.maps.two_way import (
    DIRECTIONS,
    FIXED_TO_MOVING,
    MOVING_TO_FIXED,
    check_direction,
    direction_of,
)
from icon_nephi.space.frames import Array, Geometry

STEP = 0.05  # of central differences, in the reference's smallest spacing


class ItkPair:
    """ITK transforms between two images, a `Mapping`; points LPS mm ``[N, d]``.

    Methods are those of `icon_nephi.Registration`, except where they say more.

    Args:
        phi_AB: fixed points -> moving points.
        phi_BA: moving points -> fixed points, if there is one.
        moving: ITK image, whose grid results of phi_BA have; else a reference's.
        fixed: ITK image, whose grid results of phi_AB have; else a reference's.
    """

    warnings: Sequence[str] = ()

    def __init__(
        self, phi_AB: Any, phi_BA: Any = None, moving: Any = None, fixed: Any = None
    ) -> None:
        self.phi_AB, self.phi_BA = phi_AB, phi_BA
        self.dimension = int(phi_AB.GetInputSpaceDimension())
        self._transforms = dict(zip(DIRECTIONS, (phi_AB, phi_BA), strict=True))
        self._rows: dict[str, Rows] = {}
        self._images = dict(zip(DIRECTIONS, (fixed, moving), strict=True))

    @property
    def geometry_A(self) -> Geometry:
        """Where the moving image lies."""
        return geometry_of(self._image(None, MOVING_TO_FIXED))

    @property
    def geometry_B(self) -> Geometry:
        """Where the fixed image lies."""
        return geometry_of(self._image(None, FIXED_TO_MOVING))

    def lengths(self, direction: str) -> Array:
        """Return ones ``[d]``: points are in millimetres."""
        check_direction(direction)
        return np.ones(self.dimension)

    def transform_points(self, points: Any, direction: str = FIXED_TO_MOVING) -> Array:
        """Return the mapped points ``[N, d]`` float64.

        Raises:
            ValueError: not a direction, or one without a transform.
        """
        rows = np.asarray(points, dtype=float).reshape(-1, self.dimension)
        if direction not in self._rows:
            self._rows[direction] = rows_through(self.transform(direction))
        return self._rows[direction](rows)

    def goes(self, direction: str) -> bool:
        """Return whether there is a transform of a direction."""
        return self._transforms[check_direction(direction)] is not None

    def warp(
        self,
        image: Any,
        mode: str = "linear",
        reference: Any = None,
        *,
        inverse: bool = False,
        outside: float | None = None,
    ) -> Any:
        """Return a moving-space image on the fixed image's grid, or the reference's.

        Raises:
            ValueError: images of another dimension than the transform's, no transform
                of that direction, or no reference where one is needed.
        """
        direction = direction_of(inverse=inverse)
        transform = self.transform(direction)
        reference = self._image(reference, direction)
        self._check("image", image, components=True)
        values, place = voxels_of(image), geometry_of(image)
        if outside is not None:
            check_outside(outside, values, mode)
        beyond = least_value(values) if outside is None else outside
        channels = values.shape[-1]
        # Of what is not finite ITK makes the largest number there is.
        plain = channels == 1 and np.isfinite(values).all()
        if mode in ("linear", "nearest") and plain:
            return itk_images.resample(image, reference, transform, mode, beyond)
        into = torch.linalg.inv(place.unit_to_physical())
        value_at = reader(values, into, mode, beyond)
        target = geometry_of(reference)
        positions = _displacements(transform, target).astype(np.float64)
        frame = target.unit_to_physical()
        positions += over_grid(lambda p: p, target.size, frame, self.dimension, float)
        warped = value_at(positions.reshape(-1, self.dimension))
        shape = target.size if channels == 1 else (*target.size, channels)
        return image_of(warped.reshape(shape), target)

    def warp_labels(
        self, labels: Any, reference: Any = None, *, inverse: bool = False
    ) -> Any:
        """Return a moving-space label map on the fixed grid: nearest, 0 outside."""
        return self.warp(labels, "nearest", reference, inverse=inverse, outside=0)

    def displacement_field(
        self, reference: Any = None, direction: str = FIXED_TO_MOVING
    ) -> Any:
        """Return mapped minus own place at every voxel: vectors, LPS mm."""
        place = geometry_of(self._image(reference, direction))
        return image_of(_displacements(self.transform(direction), place), place)

    def jacobian(self, reference: Any = None, direction: str = FIXED_TO_MOVING) -> Any:
        """Return d mapped_i / d place_j at every voxel, number d i + j; LPS, mm by mm.

        Central differences of the transform, `STEP` of the smallest spacing apart: at
        the nodes of a linearly read field the mean of the slopes on both sides.
        """
        place = geometry_of(self._image(reference, direction))
        matrices = self._jacobians(place, direction)
        return image_of(matrices.reshape(*place.size, -1), place)

    def jacobian_determinant(
        self, reference: Any = None, direction: str = FIXED_TO_MOVING
    ) -> Any:
        """Return the determinant of `jacobian` at every voxel, an ITK image."""
        place = geometry_of(self._image(reference, direction))
        values = np.linalg.det(self._jacobians(place, direction))
        return image_of(values.astype(np.float32), place)

    def fold_fraction(self) -> float:
        """Return the share of both grids where a determinant is not positive."""
        images = [self.jacobian_determinant(None, d) for d in DIRECTIONS]
        return fold_fraction(np.concatenate([array_of(i).ravel() for i in images]))

    def inverse_consistency_error(self, reference: Any = None) -> Any:
        """Return |phi_BA(phi_AB(x)) - x| in mm at every voxel of the fixed grid."""
        there_and_back = composed(self.phi_AB, self.transform(MOVING_TO_FIXED))
        place = geometry_of(self._image(reference, FIXED_TO_MOVING))
        missed = np.linalg.norm(_displacements(there_and_back, place), axis=-1)
        return image_of(missed.astype(np.float32), place)

    def transform(self, direction: str) -> Any:
        """Return the ITK transform of a direction.

        Raises:
            ValueError: there is none.
        """
        transform = self._transforms[check_direction(direction)]
        if transform is None:
            raise ValueError(
                "an ITK transform goes one way, fixed_to_moving; take the transform "
                "that was written for moving_to_fixed"
            )
        return transform

    def _image(self, reference: Any, direction: str) -> Any:
        """Return the reference, else the image in which a direction starts."""
        own = self._images[check_direction(direction)]
        image = own if reference is None else reference
        if image is None:
            raise ValueError(
                "reference is needed with an ITK transform: the image whose grid the "
                "result gets, usually the fixed image"
            )
        return self._check("reference", image)

    def _check(self, name: str, image: Any, **allowed: bool) -> Any:
        itk_images.check_itk_image(name, image, **allowed)
        own, advice = image.GetImageDimension(), "pass those of the same registration"
        check_dimension(f"the {name}", own, "the transform", self.dimension, advice)
        return image

    def _jacobians(self, place: Geometry, direction: str) -> Array:
        """Return the matrices of `jacobian`, ``[*grid, d, d]`` float64."""
        d, frame = self.dimension, place.unit_to_physical()
        middle = (frame[:d, :d] @ torch.full((d,), 0.5).double() + frame[:d, d]).numpy()
        h = STEP * min(place.spacing)
        ends = middle + h * np.concatenate([np.eye(d), -np.eye(d), np.zeros((1, d))])
        moved = self.transform_points(ends, direction)
        linear = (moved[:d] - moved[d : 2 * d]).T / (2 * h)
        if not abs(np.linalg.det(linear)) > 1e-6:
            linear = np.eye(d)
        # ITK's fields are float32: what is left of the map is small, and so exact.
        back = np.linalg.inv(linear)
        undo = affine_transform(back, middle - back @ moved[-1])
        rest = composed(self.transform(direction), undo)
        matrices = np.empty((*place.size, d, d))
        for axis, step in enumerate(h * np.eye(d)):
            higher = _displacements(rest, _shifted(place, step)).astype(np.float64)
            slope = (higher - _displacements(rest, _shifted(place, -step))) / (2 * h)
            slope[..., axis] += 1
            matrices[..., axis] = slope @ linear.T
        return matrices


def _shifted(place: Geometry, by: Array) -> Geometry:
    return replace(place, origin=tuple((np.array(place.origin) + by).tolist()))


def _displacements(transform: Any, place: Geometry) -> Array:
    """Return ``[*grid, d]`` float32: mapped minus own place, LPS mm."""
    d = place.dimension
    field = itk_class("TransformToDisplacementFieldFilter", f"IVF{d}{d}D").New()
    field.SetTransform(transform)
    field.SetSize(place.itk_size)
    field.SetOutputSpacing(place.spacing)
    field.SetOutputOrigin(place.origin)
    field.SetOutputDirection(itk.matrix_from_array(np.array(place.direction)))
    field.Update()
    values: Array = itk.array_from_image(field.GetOutput())
    return values
