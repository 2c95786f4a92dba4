"""Both maps of two images, made once: directions, grids, and what lengths mean.

Points of the fixed image go to the moving image, ``"fixed_to_moving"``, or back. A
direction *starts* in the image whose points go in: there lies the grid of its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from icon_nephi.maps.framed import FramedMap, folded_share
from icon_nephi.maps.jacobians import fold_fraction
from icon_nephi.maps.transforms import Map
from icon_nephi.space.frames import Array, Geometry

FIXED_TO_MOVING, MOVING_TO_FIXED = "fixed_to_moving", "moving_to_fixed"
DIRECTIONS = (FIXED_TO_MOVING, MOVING_TO_FIXED)


def check_direction(direction: str) -> str:
    """Return the direction, if it is one.

    Raises:
        ValueError: it is none.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {DIRECTIONS}, got {direction!r}")
    return direction


def opposite(direction: str) -> str:
    """Return the direction back.

    Raises:
        ValueError: not a direction.
    """
    return DIRECTIONS[1 - DIRECTIONS.index(check_direction(direction))]


def direction_of(*, inverse: bool) -> str:
    """Return the direction in which an image's grid is mapped to warp it.

    An image is read where the points of its result's grid go: to bring a moving image
    onto the fixed grid (not ``inverse``) points go fixed to moving.
    """
    return MOVING_TO_FIXED if inverse else FIXED_TO_MOVING


class PointMapping(Protocol):
    """What an expected error is asked of: points through a map, there and back."""

    @property
    def geometry_B(self) -> Geometry:
        """Where the fixed image lies."""

    def lengths(self, direction: str) -> Array:
        """Return as `TwoWay.lengths`."""

    def transform_points(self, points: Any, direction: str = FIXED_TO_MOVING) -> Array:
        """Return the mapped points ``[N, d]``."""


class Mapping(PointMapping, Protocol):
    """What a registration and ITK transforms are both asked for.

    Directions, grids and units are as of `icon_nephi.registration.result.Registration`.
    """

    @property
    def geometry_A(self) -> Geometry:
        """Where the moving image lies."""

    @property
    def warnings(self) -> Sequence[str]:
        """What is doubtful about it, one sentence each."""

    def warp(
        self,
        image: Any,
        mode: str = "linear",
        reference: Any = None,
        *,
        inverse: bool = False,
        outside: float | None = None,
    ) -> Any:
        """Return a moving-space image on the fixed grid, or the reference's."""

    def warp_labels(
        self, labels: Any, reference: Any = None, *, inverse: bool = False
    ) -> Any:
        """Return a moving-space label map on the fixed grid, 0 outside."""

    def displacement_field(
        self, reference: Any = None, direction: str = FIXED_TO_MOVING
    ) -> Any:
        """Return mapped minus own place at every voxel."""

    def jacobian(self, reference: Any = None, direction: str = FIXED_TO_MOVING) -> Any:
        """Return d mapped_i / d place_j at every voxel, number d i + j."""

    def jacobian_determinant(
        self, reference: Any = None, direction: str = FIXED_TO_MOVING
    ) -> Any:
        """Return the determinant of `jacobian` at every voxel."""

    def fold_fraction(self) -> float:
        """Return the share of both grids where a determinant is not positive."""

    def inverse_consistency_error(self, reference: Any = None) -> Any:
        """Return how far each voxel of the fixed grid comes back from itself."""


@dataclass(frozen=True)
class TwoWay:
    """Two maps between the unit boxes of two images, in the frames of their points.

    What takes a direction raises a ValueError where it is none.

    Attributes:
        map_AB: fixed unit box -> moving unit box, ICON frames.
        map_BA: its counterpart, moving -> fixed.
        geometry_A: where the moving image lies.
        geometry_B: where the fixed image lies.
        device: where the maps are evaluated.
        frame: of points: ``"physical"``, those of the geometries (LPS millimetres; of
            tensors voxels, x first), or ``"unit"``, each image's unit box.
        matrix: the affine part of map_AB, homogeneous, between the unit boxes; None:
            none is known.
    """

    map_AB: Map
    map_BA: Map
    geometry_A: Geometry
    geometry_B: Geometry
    device: torch.device | str = "cpu"
    frame: Literal["physical", "unit"] = "physical"
    matrix: Tensor | None = None

    def physical(self) -> TwoWay:
        """Return the same maps with points in the physical frame."""
        return replace(self, frame="physical")

    @property
    def dimension(self) -> int:
        """The number of axes."""
        return self.geometry_B.dimension

    @cached_property
    def forward(self) -> FramedMap:
        """Fixed points to moving points."""
        return self._between(self.map_AB, self.geometry_B, self.geometry_A)

    @cached_property
    def backward(self) -> FramedMap:
        """Moving points to fixed points."""
        return self._between(self.map_BA, self.geometry_A, self.geometry_B)

    def _between(self, phi: Map, source: Geometry, target: Geometry) -> FramedMap:
        frames = self.frame_of(source), self.frame_of(target)
        return FramedMap(phi, *frames, self.device)

    def framed(self, direction: str) -> FramedMap:
        """Return the map of a direction: rows ``[N, d]`` to rows, in the frame."""
        forth = check_direction(direction) == FIXED_TO_MOVING
        return self.forward if forth else self.backward

    def transform_points(
        self, points: Array, direction: str = FIXED_TO_MOVING
    ) -> Array:
        """Return the mapped points ``[N, d]`` float64, unchecked."""
        return self.framed(direction)(points)

    def place(self, direction: str) -> Geometry:
        """Return where the image lies in which a direction starts."""
        forth = check_direction(direction) == FIXED_TO_MOVING
        return self.geometry_B if forth else self.geometry_A

    def frame_of(self, place: Geometry) -> Tensor:
        """Return ``[d + 1, d + 1]`` float64: an image's unit box -> frame of points."""
        if self.frame == "physical":
            return place.unit_to_physical()
        return torch.eye(place.dimension + 1, dtype=torch.float64)

    def from_fixed(self, direction: str) -> Tensor:
        """Return ``[d + 1, d + 1]`` float64: the fixed unit box -> that of the start.

        By the affine part: the fields are evaluated in the fixed image's unit box,
        a direction starts in its own image's.
        """
        place = self.place(direction)
        if direction == FIXED_TO_MOVING or self.matrix is None:
            return torch.eye(place.dimension + 1, dtype=torch.float64)
        return self.matrix.detach().cpu().double()

    def grid(
        self, direction: str, reference: Geometry | None = None
    ) -> tuple[tuple[int, ...], Tensor]:
        """Return voxels per tensor axis, and the grid's unit box -> frame of points.

        The grid is the reference's, else that of the image the direction starts in.
        """
        place = self.place(direction) if reference is None else reference
        return place.size, self.frame_of(place)

    def lengths(self, direction: str) -> Array:
        """Return ``[d]``: what differences of points are multiplied with for lengths.

        Lengths are those of the physical frame, in the image a direction starts in.
        """
        place = self.place(direction)
        if self.frame == "physical":
            return np.ones(place.dimension)
        return np.array(place.size) - 1.0

    def fold_fraction(self, points: Array | None = None) -> float:
        """Return the share, 0 to 1, of determinants that are not positive.

        At every voxel centre of both images, each in its direction; or at fixed-space
        points ``[N, d]`` and where they are mapped to.
        """
        if points is None:
            ways = ((self.framed(d), *self.grid(d)) for d in DIRECTIONS)
            return folded_share(ways)
        there = self.forward(points)
        signs = self.forward.determinants(points), self.backward.determinants(there)
        return fold_fraction(np.concatenate(signs))
