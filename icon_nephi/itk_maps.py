"""ITK transforms asked as a `Registration` is asked: points, fields, Jacobians."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import itk
import numpy as np
import torch

from icon_nephi.coordinates import Geometry
from icon_nephi.itk_images import (
    array_of,
    check_itk_image,
    geometry_of,
    image_of,
    resample,
)
from icon_nephi.physical import Array, over_grid
from icon_nephi.resampling import reader

STEP = 0.05  # of central differences, in the reference's smallest spacing


class ItkMap:
    """One ITK transform; points LPS mm ``[N, d]``, grids those of a reference image.

    Args:
        transform: reference points -> image points.
    """

    def __init__(self, transform: Any) -> None:
        self.transform = transform
        self.dimension = int(transform.GetInputSpaceDimension())

    def __call__(self, points: Array) -> Array:
        """The mapped points ``[N, d]``, one `TransformPoint` each."""
        moved = [tuple(self.transform.TransformPoint(p)) for p in points.tolist()]
        return np.array(moved, dtype=float).reshape(-1, self.dimension)

    def warp(
        self, image: Any, reference: Any, mode: str, outside: float | None = None
    ) -> Any:
        """An image of the space mapped to, on the reference's grid.

        Args:
            image: ITK image.
            reference: ITK image, of the space the transform takes points from.
            mode: see `icon_nephi.resampling`.
            outside: the value beyond the image, for "cubic" and "onehot"; the others
                take the image's least value (linear) or 0 (nearest).

        Raises:
            ValueError: images of another dimension than the transform's.
        """
        self._check(reference, image)
        if mode in ("linear", "nearest"):
            return resample(image, reference, self.transform, mode)
        values, place = array_of(image)[..., np.newaxis], geometry_of(image)
        into = torch.linalg.inv(place.unit_to_physical())
        read = reader(values, into, mode, outside)
        target = geometry_of(reference)
        positions = _displacements(self.transform, target).astype(np.float64)
        frame = target.unit_to_physical()
        positions += over_grid(lambda p: p, target.size, frame, self.dimension, float)
        result = read(positions.reshape(-1, self.dimension))
        return image_of(result.reshape(target.size), target)

    def displacement_field(self, reference: Any) -> Any:
        """Mapped minus own place at every voxel: ITK image of vectors, LPS mm."""
        self._check(reference)
        place = geometry_of(reference)
        return image_of(_displacements(self.transform, place), place)

    def jacobian(self, reference: Any) -> Any:
        """d mapped_i / d place_j at every voxel, number d i + j; LPS axes, mm by mm.

        Central differences of the transform, `STEP` of the smallest spacing apart: at
        the nodes of a linearly read field the mean of the slopes on both sides.
        """
        place = geometry_of(reference)
        matrices = self.jacobians(reference)
        return image_of(matrices.reshape(*place.size, -1), place)

    def jacobian_determinant(self, reference: Any) -> Any:
        """The determinant of `jacobian` at every voxel, an ITK image."""
        values = np.linalg.det(self.jacobians(reference)).astype(np.float32)
        return image_of(values, geometry_of(reference))

    def jacobians(self, reference: Any) -> Array:
        """See `jacobian`: ``[*grid, d, d]`` float64."""
        self._check(reference)
        place, d = geometry_of(reference), self.dimension
        frame = place.unit_to_physical()
        middle = (frame[:d, :d] @ torch.full((d,), 0.5).double() + frame[:d, d]).numpy()
        h = STEP * min(place.spacing)
        ends = middle + h * np.concatenate([np.eye(d), -np.eye(d), np.zeros((1, d))])
        moved = self(ends)
        linear = (moved[:d] - moved[d : 2 * d]).T / (2 * h)
        if not abs(np.linalg.det(linear)) > 1e-6:
            linear = np.eye(d)
        # ITK's fields are float32: what is left of the map is small, and so exact.
        rest = _then_undone(self.transform, linear, moved[-1], middle)
        matrices = np.empty((*place.size, d, d))
        for axis, step in enumerate(h * np.eye(d)):
            forth, back = (
                _displacements(rest, _shifted(place, s * step)) for s in (1, -1)
            )
            slope = (forth.astype(np.float64) - back) / (2 * h)
            slope[..., axis] += 1
            matrices[..., axis] = slope @ linear.T
        return matrices

    def _check(self, *images: Any) -> None:
        for name, image in zip(("reference", "image"), images, strict=False):
            check_itk_image(name, image)
            if image.GetImageDimension() != self.dimension:
                raise ValueError(
                    f"the {name} is {image.GetImageDimension()}D but the transform "
                    f"{self.dimension}D; pass those of the same registration"
                )


def _shifted(place: Geometry, by: Array) -> Geometry:
    origin = tuple((np.array(place.origin) + by).tolist())
    return Geometry(place.size, place.spacing, origin, place.direction)


def _then_undone(transform: Any, linear: Array, there: Array, here: Array) -> Any:
    """The transform followed by the inverse of its linear part around a point."""
    d = len(here)
    affine = itk.AffineTransform[itk.D, d].New()
    back = np.linalg.inv(linear)
    affine.SetMatrix(itk.matrix_from_array(back))
    affine.SetTranslation((here - back @ there).tolist())
    both = itk.CompositeTransform[itk.D, d].New()
    both.AddTransform(affine)  # ITK applies the one added last first
    both.AddTransform(transform)
    return both


def _displacements(transform: Any, place: Geometry) -> Array:
    """``[*grid, d]`` float32: mapped minus own place, LPS mm."""
    d = place.dimension
    field = itk.TransformToDisplacementFieldFilter[
        itk.Image[itk.Vector[itk.F, d], d], itk.D
    ].New()
    field.SetTransform(transform)
    field.SetSize(place.itk_size)
    field.SetOutputSpacing(place.spacing)
    field.SetOutputOrigin(place.origin)
    field.SetOutputDirection(itk.matrix_from_array(np.array(place.direction)))
    field.Update()
    values: Array = itk.array_from_image(field.GetOutput())
    return values


class ItkPair:
    """Two ITK transforms as a `Registration`, for what the commands ask of it.

    Args:
        phi_AB: fixed points -> moving points.
        phi_BA: moving points -> fixed points.
        moving: ITK image.
        fixed: ITK image.
    """

    warnings: Sequence[str] = ()

    def __init__(self, phi_AB: Any, phi_BA: Any, moving: Any, fixed: Any) -> None:
        self.phi_AB, self.phi_BA = phi_AB, phi_BA
        self.geometry_A, self.geometry_B = geometry_of(moving), geometry_of(fixed)
        self._maps = {
            "fixed_to_moving": (ItkMap(phi_AB), fixed),
            "moving_to_fixed": (ItkMap(phi_BA), moving),
        }

    def warp(self, image: Any, mode: str = "linear", reference: Any = None) -> Any:
        """A moving-space image on the fixed grid or the reference's."""
        forward, fixed = self._maps["fixed_to_moving"]
        return forward.warp(image, fixed if reference is None else reference, mode)

    def warp_labels(self, labels: Any, reference: Any = None) -> Any:
        """A moving-space label map on the fixed grid: nearest, 0 outside."""
        return self.warp(labels, "nearest", reference)

    def transform_points(
        self, points: Array, direction: str = "fixed_to_moving"
    ) -> Array:
        """The mapped points ``[N, d]``, LPS mm."""
        return self._maps[direction][0](points)

    def displacement_field(
        self, reference: Any = None, direction: str = "fixed_to_moving"
    ) -> Any:
        """See `ItkMap.displacement_field`; the grid is that of the map's own image."""
        mapped, own = self._maps[direction]
        return mapped.displacement_field(own if reference is None else reference)

    def jacobian_determinant(
        self, reference: Any = None, direction: str = "fixed_to_moving"
    ) -> Any:
        """See `ItkMap.jacobian`; the grid is that of the map's own image."""
        mapped, own = self._maps[direction]
        return mapped.jacobian_determinant(own if reference is None else reference)

    def fold_fraction(self) -> float:
        """The share of both images' voxels where the determinant is not positive."""
        values = [np.asarray(self.jacobian_determinant(None, d)) for d in self._maps]
        folded = sum(int((~(v > 0)).sum()) for v in values)
        return folded / sum(v.size for v in values)

    def inverse_consistency_error(self, reference: Any = None) -> Any:
        """|phi_BA(phi_AB(x)) - x| in mm at every voxel of the fixed grid or another."""
        fixed = self._maps["fixed_to_moving"][1] if reference is None else reference
        both = itk.CompositeTransform[itk.D, fixed.GetImageDimension()].New()
        both.AddTransform(self.phi_BA)
        both.AddTransform(self.phi_AB)
        place = geometry_of(fixed)
        missed = np.linalg.norm(_displacements(both, place), axis=-1)
        return image_of(missed.astype(np.float32), place)


def write_image(image: Any, path: Path) -> None:
    """Nothing; writes an ITK image, compressed.

    Raises:
        ValueError: its format cannot hold it.
    """
    try:
        itk.imwrite(image, str(path), compression=True)
    except RuntimeError as error:
        raise ValueError(
            f"a {path.suffix} file could not be written: it cannot hold such an image, "
            "or the disk is full"
        ) from error


def write_transform(transform: Any, path: Path) -> None:
    """Nothing; writes an ITK transform, compressed where its format can be.

    Raises:
        ValueError: ITK could not.
    """
    try:
        itk.transformwrite(transform, str(path), compression=True)
    except RuntimeError as error:
        raise ValueError(
            f"a {path.suffix} transform could not be written: is the disk full?"
        ) from error
