"""Maps in millimetres: points, Jacobians and whole grids, in chunks of bounded memory.

A map of the network lives in unit boxes; people want it from the fixed image's
millimetres to the moving image's. Rows here are numpy ``[N, d]`` float64 in the
components of the frame (LPS x, y(, z), or the tensor axes of the ICON frame).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from icon_nephi.maps.jacobians import count_folds, determinants
from icon_nephi.maps.lattices import on_lattice
from icon_nephi.maps.transforms import Map, value_and_jacobian
from icon_nephi.space.frames import (
    Array,
    Geometry,
    apply_affine,
    points_as_grid,
    to_rows,
)

CHUNK = 50_000  # points at once: Jacobians of a wide field take about 100 MB
# Of a box by which the far end of an axis may be askew and the axis still be straight.
_STRAIGHT = 1e-9


class FramedMap:
    """A map between two frames: rows in, rows out, never more than a chunk at once.

    Made of phi, between unit boxes, on ICON-frame coordinates ``[1, d, *any]`` on a
    device, and of homogeneous ``[d + 1, d + 1]`` float64 matrices from the source's and
    the target's unit boxes to their frames.
    """

    def __init__(
        self,
        phi: Map,
        source: Tensor,
        target: Tensor,
        device: torch.device | str = "cpu",
    ) -> None:
        self.phi, self.device = phi, torch.device(device)
        self.into, self.out = torch.linalg.inv(source), target
        self.dimension = source.shape[0] - 1
        # Metal has no float64; there a point is good to about 1e-5 of the image.
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64

    def __call__(self, points: Array) -> Array:
        """The mapped points ``[N, d]``, target frame."""
        with torch.no_grad():
            parts = [
                self._back(to_rows(self.phi(self._coordinates(p)))[0])
                for p in self._split(points)
            ]
        return np.concatenate(parts) if parts else np.empty((0, self.dimension))

    def on_grid(
        self, size: Sequence[int], frame: Tensor
    ) -> Iterator[tuple[slice, Array, Array]]:
        """As `slabs`, with the mapped points ``[n, d]`` of each, target frame.

        Where the grid's axes are those of the source's box it takes a fraction of the
        time that scattered points do, and is as exact.
        """
        d, into = self.dimension, self.into @ frame
        straight = torch.diag(into.diagonal()[:d])
        if not torch.allclose(into[:d, :d], straight, rtol=0, atol=_STRAIGHT):
            for part, points in slabs(size, frame):
                yield part, points, self(points)
            return
        axes = [
            torch.linspace(0, 1, n, dtype=torch.float64) * into[a, a] + into[a, d]
            for a, n in enumerate(size)
        ]
        axes = [x.to(dtype=self.dtype).to(self.device) for x in axes]
        first, last = _lines(size, frame)
        stop = 0
        for moved in on_lattice(self.phi, axes):
            start, stop = stop, stop + len(moved) // len(last)
            yield (*_slab(first, last, start, stop), self._back(moved))

    def jacobians(self, points: Array) -> Array:
        """Analytic d target_i / d source_j at points, ``[N, d, d]`` float64."""
        d, parts = self.dimension, [np.empty((0, self.dimension, self.dimension))]
        with torch.no_grad():
            for part in self._split(points):
                jacobian = value_and_jacobian(self.phi, self._coordinates(part))[1]
                matrices = jacobian[0].flatten(2).permute(2, 0, 1).cpu().double()
                framed = self.out[:d, :d] @ matrices @ self.into[:d, :d]
                parts.append(framed.numpy())
        return np.concatenate(parts)

    def determinants(self, points: Array) -> Array:
        """Analytic ``det`` of d target / d source at points, ``[N]`` float64."""
        d, parts = self.dimension, [np.empty(0)]
        volume = float(torch.linalg.det(self.out[:d, :d] @ self.into[:d, :d]))
        with torch.no_grad():
            for part in self._split(points):
                jacobian = value_and_jacobian(self.phi, self._coordinates(part))[1]
                # Sums of float32 products would lose digits; Metal has no float64.
                parts.append(volume * determinants(jacobian.cpu().double()).numpy())
        return np.concatenate([part.ravel() for part in parts])

    def _split(self, points: Array) -> Iterator[Tensor]:
        rows = torch.from_numpy(np.array(points, dtype=np.float64))
        return iter(rows.split(CHUNK)) if len(rows) else iter(())

    def _coordinates(self, rows: Tensor) -> Tensor:
        unit = apply_affine(self.into, rows)[None]
        return points_as_grid(unit.to(dtype=self.dtype).to(self.device))

    def _back(self, rows: Tensor) -> Array:
        return np.asarray(apply_affine(self.out, rows.cpu().double()))


def slabs(size: Sequence[int], frame: Tensor) -> Iterator[tuple[slice, Array]]:
    """Slices of flat voxel numbers, and those voxels' centres ``[n, d]`` in a frame.

    Of a grid of so many voxels per tensor axis; ``frame`` takes its unit box there.
    """
    first, last = _lines(size, frame)
    at_once = max(1, CHUNK // len(last))
    for start in range(0, len(first), at_once):
        yield _slab(first, last, start, min(start + at_once, len(first)))


def _lines(size: Sequence[int], frame: Tensor) -> tuple[Array, Array]:
    """Where the lines of the last axis begin, and how far on their voxels are."""
    d = len(size)
    steps = [
        np.linspace(0, 1, n)[:, np.newaxis] * frame[:d, a].numpy()
        for a, n in enumerate(size)
    ]
    first = frame[:d, d].numpy()[np.newaxis]
    for step in steps[:-1]:
        first = (first[:, np.newaxis] + step).reshape(-1, d)
    return first, steps[-1]


def _slab(first: Array, last: Array, start: int, stop: int) -> tuple[slice, Array]:
    """Some of those lines: flat voxel numbers and centres."""
    n, d = last.shape
    points = (first[start:stop, np.newaxis] + last).reshape(-1, d)
    return slice(start * n, stop * n), points


def over_grid(
    function: Callable[..., Array],
    size: Sequence[int],
    frame: Tensor,
    channels: int | None = None,
    dtype: npt.DTypeLike = np.float32,
    *,
    mapped: FramedMap | None = None,
) -> Array:
    """A function of rows at every voxel: ``[*size]``, or ``[*size, channels]``.

    It takes rows ``[n, d]`` in the frame, to which the homogeneous matrix ``frame``
    takes the grid's unit box, to ``[n]`` or ``[n, channels]``. With a map of the frame
    it takes the rows and the mapped rows, which is quicker than mapping them in it: see
    `FramedMap.on_grid`.
    """
    shape = () if channels is None else (channels,)
    result = np.empty((int(np.prod(size)), *shape), dtype)
    parts = slabs(size, frame) if mapped is None else mapped.on_grid(size, frame)
    for part, *points in parts:
        result[part] = function(*points)
    return result.reshape(*size, *shape)


def folded_share(maps: Iterable[tuple[FramedMap, Sequence[int], Tensor]]) -> float:
    """The share of the voxels where a determinant is not positive, of maps on grids."""
    folds = total = 0
    for mapped, size, frame in maps:
        for _, rows in slabs(size, frame):
            folds += count_folds(mapped.determinants(rows))
            total += len(rows)
    return folds / total


def linear_part(
    matrix: Tensor, source: Geometry, target: Geometry
) -> tuple[Array, Array]:
    """Matrix ``[d, d]`` and shift ``[d]`` in millimetres of a map of unit boxes."""
    whole = target.unit_to_physical() @ matrix.cpu() @ source.physical_to_unit()
    d = source.dimension
    return whole[:d, :d].numpy(), whole[:d, d].numpy()
