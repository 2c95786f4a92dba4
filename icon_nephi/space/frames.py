"""The frames and the ways between them; nobody else reorders axes.

ICON frame: ``[B, d, *grid]``, unit box, channel c = tensor axis c, voxel i of axis a
at ``i / (n_a - 1)``. Rows: the same numbers as ``[B, N, d]``. Physical frame: ITK/LPS
millimetres, component order x, y(, z), which is the reverse of the tensor axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[Any]
T = TypeVar("T")

# What rounding may put a place of the unit box beyond its border, in float32.
EDGE = 1e-6


def identity_map(
    shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The voxel centres of a grid, ICON frame: ``[1, d, *shape]``."""
    axes = [torch.linspace(0, 1, n, dtype=dtype, device=device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def to_rows(coordinates: Tensor) -> Tensor:
    """Rows ``[B, N, d]`` of ICON-frame coordinates ``[B, d, *any]``."""
    return coordinates.flatten(2).transpose(1, 2)


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """ICON-frame ``[B, C, *any]`` of rows ``[B, N, C]``; ``*any`` is that of like."""
    batch, _, channels = rows.shape
    return rows.transpose(1, 2).reshape(batch, channels, *like.shape[2:])


def points_as_grid(points: Tensor) -> Tensor:
    """Degenerate grid ``[B, d, N, 1(, 1)]`` of rows ``[B, N, d]``: ICON takes these."""
    dimension = points.shape[-1]
    return points.transpose(1, 2).reshape(
        points.shape[0], dimension, points.shape[1], *(1,) * (dimension - 1)
    )


def as_torch_samples(coordinates: Tensor) -> Tensor:
    """Where torch's ``grid_sample`` reads for ICON-frame coordinates ``[B, d, *any]``.

    ``[B, N, 1(, 1), d]``, from -1 to 1, the last axis of the grid first.
    """
    rows = to_rows(2 * coordinates - 1).flip(-1)
    batch, count, dimension = rows.shape
    return rows.reshape(batch, count, *(1,) * (dimension - 1), dimension)


def inside(coordinates: Tensor) -> Tensor:
    """Boolean ``[B, 1, *any]``: which ICON-frame coordinates lie in the unit box."""
    return ((coordinates >= 0) & (coordinates <= 1)).all(dim=1, keepdim=True)


def within(rows: Tensor) -> Tensor:
    """Of each number of rows 1 where it lies in [0, 1], else 0.

    Or beyond by a rounding of physical frames: voxel centres on the border of the box
    are of the box.
    """
    return ((rows >= -EDGE) & (rows <= 1 + EDGE)).to(rows.dtype)


def outside_grid(index: Array, size: Sequence[int]) -> Array:
    """Return a boolean ``[N]``: which places lie beyond the voxels of a grid.

    A voxel reaches half a step to every side of its centre; a place on its face, or
    beyond that by rounding, is not outside. The places are ``[N, d]``, in voxels per
    tensor axis from the first centre.
    """
    last = np.array(size) - 0.5
    return np.asarray(((index < -0.5 - EDGE) | (index > last + EDGE)).any(1))


def other_order(values: Iterable[T]) -> tuple[T, ...]:
    """Return numbers of the tensor axes in the order x, y(, z), or the way back."""
    return tuple(values)[::-1]


def other_components(values: Array) -> Array:
    """Return ``[*any, d]`` with its components as `other_order` has them, a view."""
    return values[..., ::-1]


@dataclass(frozen=True)
class Geometry:
    """Where an image lies in the physical frame.

    Attributes:
        size: voxels per tensor axis (the reverse of ITK's order).
        spacing: millimetres, physical component order x, y(, z).
        origin: LPS millimetres of the first voxel's centre.
        direction: ``[d, d]`` direction cosines, columns are the index axes i, j(, k).
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[tuple[float, ...], ...]

    @staticmethod
    def unit(size: Sequence[int]) -> Geometry:
        """A geometry whose physical frame is the ICON frame (axes reversed)."""
        dimension = len(size)
        spacing = tuple(1.0 / (n - 1) for n in other_order(size))
        direction = tuple(map(tuple, np.eye(dimension).tolist()))
        whole = tuple(int(n) for n in size)
        return Geometry(whole, spacing, (0.0,) * dimension, direction)

    @property
    def dimension(self) -> int:
        """The number of axes."""
        return len(self.size)

    @property
    def extent(self) -> tuple[float, ...]:
        """Millimetres from the first to the last voxel centre, per tensor axis."""
        steps = zip(self.size, self.tensor_spacing, strict=True)
        return tuple((n - 1) * spacing for n, spacing in steps)

    @property
    def tensor_spacing(self) -> tuple[float, ...]:
        """Millimetres from voxel to voxel, per tensor axis."""
        return other_order(self.spacing)

    @property
    def itk_size(self) -> tuple[int, ...]:
        """Voxels in the order x, y(, z)."""
        return other_order(self.size)

    def resized(self, size: Sequence[int]) -> Geometry:
        """Another grid of voxels in the same box: its edges are kept, centres are not.

        So ICON resizes images (``align_corners=False``).
        """
        old = np.array(self.spacing)
        new = old * self.itk_size / np.array(other_order(size))
        origin = self.origin + np.array(self.direction) @ ((new - old) / 2)
        frame = tuple(new.tolist()), tuple(origin.tolist()), self.direction
        return Geometry(tuple(int(n) for n in size), *frame)

    def unit_to_physical(self) -> Tensor:
        """``[d + 1, d + 1]`` float64: homogeneous ICON frame -> LPS millimetres."""
        d = self.dimension
        reverse = torch.eye(d, dtype=torch.float64).flip(0)
        direction = torch.tensor(self.direction, dtype=torch.float64)
        steps = torch.tensor(self.spacing, dtype=torch.float64)
        counts = torch.tensor([n - 1.0 for n in self.size], dtype=torch.float64)
        matrix = torch.eye(d + 1, dtype=torch.float64)
        matrix[:d, :d] = direction @ torch.diag(steps) @ reverse @ torch.diag(counts)
        matrix[:d, d] = torch.tensor(self.origin, dtype=torch.float64)
        return matrix

    def physical_to_unit(self) -> Tensor:
        """``[d + 1, d + 1]`` float64: homogeneous LPS millimetres -> ICON frame."""
        inverse: Tensor = torch.linalg.inv(self.unit_to_physical())
        return inverse

    def outside(self, points: Array) -> Array:
        """Return a boolean ``[N]``: which points ``[N, d]`` lie beyond the voxels.

        They are float64, in the physical frame.
        """
        unit = apply_affine(self.physical_to_unit(), torch.from_numpy(points)).numpy()
        return outside_grid(unit * (np.array(self.size) - 1.0), self.size)


def apply_affine(matrix: Tensor, points: Tensor) -> Tensor:
    """Rows ``[..., N, d]`` mapped by a homogeneous ``[d + 1, d + 1]`` matrix."""
    d = points.shape[-1]
    return points @ matrix[:d, :d].T + matrix[:d, d]
