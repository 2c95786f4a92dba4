"""Maps one after the other: points through all of them, images the other way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icon_nephi._check import check_dimension
from icon_nephi.io.image_input import check_points, voxels_of
from icon_nephi.io.itk_images import check_itk_image, geometry_of, image_of
from icon_nephi.io.itk_points import inverse_of, rows_through
from icon_nephi.io.resampling import (
    check_outside,
    least_value,
    reader,
    type_of_result,
)
from icon_nephi.maps.framed import over_grid
from icon_nephi.maps.two_way import FIXED_TO_MOVING, direction_of, opposite
from icon_nephi.registration.itk_pair import ItkPair
from icon_nephi.registration.result import Registration
from icon_nephi.space.frames import Array, Geometry


class Chain:
    """Several maps as one, points LPS mm ``[N, d]``.

    Args:
        steps: each a map and whether its inverse is meant. Points of the fixed image go
            through the first, then the second, ...: the first starts in the fixed
            image of all. ITK transforms without an inverse of their own are inverted
            point by point.

    Raises:
        ValueError: no steps, or maps of different dimensions.
    """

    def __init__(self, steps: Sequence[tuple[Registration | ItkPair, bool]]) -> None:
        if not steps:
            raise ValueError("a chain needs at least one map")
        self.steps = tuple(steps)
        self.dimension = self.steps[0][0].dimension
        for mapping, _ in self.steps[1:]:
            d = mapping.dimension
            check_dimension(
                "one transform",
                d,
                "another",
                self.dimension,
                "chain those of one space",
            )

    def place(self, direction: str = FIXED_TO_MOVING) -> Geometry | None:
        """Return where the image lies in which a direction starts, if it is known."""
        mapping, turned = self.steps[0 if direction == FIXED_TO_MOVING else -1]
        if isinstance(mapping, ItkPair):
            return None
        return mapping.two_way.place(opposite(direction) if turned else direction)

    def transform_points(self, points: Any, direction: str = FIXED_TO_MOVING) -> Array:
        """Return the mapped points ``[N, d]`` float64.

        Raises:
            ValueError: another shape, or points that an inverse does not reach.
        """
        rows = check_points("points", points, self.dimension)
        forth = direction == FIXED_TO_MOVING
        order = range(len(self.steps)) if forth else range(len(self.steps) - 1, -1, -1)
        for i in order:
            mapping, turned = self.steps[i]
            rows = _through(
                mapping, rows, direction if not turned else opposite(direction)
            )
        return rows

    def warp(
        self,
        image: Any,
        mode: str = "linear",
        reference: Any = None,
        *,
        inverse: bool = False,
        outside: float | None = None,
    ) -> Any:
        """Return an image of the last space on the grid of the first, or a reference's.

        See `icon_nephi.Registration.warp`.

        Raises:
            ValueError: no reference where one is needed, or another dimension.
        """
        direction = direction_of(inverse=inverse)
        target = self.place(direction)
        if reference is not None:
            check_itk_image("reference", reference)
            target = geometry_of(reference)
        if target is None:
            raise ValueError(
                "reference is needed where a chain starts with an ITK transform: the "
                "image whose grid the result gets"
            )
        check_itk_image("image", image, components=True)
        for name, place in (("the image", geometry_of(image)), ("the grid", target)):
            check_dimension(
                name,
                place.dimension,
                "the transforms",
                self.dimension,
                "pass those of the same registrations",
            )
        values, into = voxels_of(image), geometry_of(image).physical_to_unit()
        if outside is not None:
            check_outside(outside, values, mode)
        beyond = least_value(values) if outside is None else outside
        value_at = reader(values, into, mode, beyond)
        warped = over_grid(
            lambda points: value_at(self.transform_points(points, direction)),
            target.size,
            target.unit_to_physical(),
            values.shape[-1],
            type_of_result(values, mode),
        )
        return image_of(warped[..., 0] if values.shape[-1] == 1 else warped, target)


def _through(mapping: Registration | ItkPair, rows: Array, direction: str) -> Array:
    if isinstance(mapping, ItkPair) and not mapping.goes(direction):
        back = inverse_of(rows_through(mapping.transform(opposite(direction))))
        return back(rows)
    return mapping.transform_points(rows, direction)
