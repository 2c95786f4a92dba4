"""Results larger than memory: warped images, displacements and Jacobians, by blocks.

The exact map is evaluated on a lattice in each block and carried between by cubics;
at random voxels of every block both are compared, and the lattice is made finer until
they agree to a third of the tolerance, down to the voxels themselves. Blocks cut by
the border of the field's box, where the map has a kink, begin with a finer one. Files
are complete or not there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from icon_nephi._memory import in_smaller_parts, plan, to_bytes
from icon_nephi.io import blocks as block_files
from icon_nephi.io.pair_input import as_volume
from icon_nephi.io.resampling import least_value
from icon_nephi.io.volumes import WORKING
from icon_nephi.maps.framed import FramedMap, over_grid
from icon_nephi.maps.two_way import FIXED_TO_MOVING, direction_of
from icon_nephi.registration.result import Registration
from icon_nephi.space.chunks import Box, ChunkCache, Level
from icon_nephi.space.frames import (
    Array,
    Geometry,
    apply_affine,
    outside_grid,
    points_as_grid,
)
from icon_nephi.space.images import sample_image

#: Voxels by which a place may be off; determinants: the number itself.
TOLERANCE, TOLERANCE_DETERMINANT = 0.1, 0.01
# Blocks a side that follow each other; voxels between the nodes of the first lattice;
# voxels a side of a block at least, where memory is short.
NEAR, STEP, LEAST = 4, 8, 8
# Voxels of a block that are compared; how much worse another may be.
_CHECKS, _SAFETY = 64, 3.0
_ROUNDING = 1e-9
_FLOAT = np.dtype(np.float32)


def warp_to(
    registration: Registration,
    image: Any,
    path: str | os.PathLike[str],
    *,
    reference: Any = None,
    mode: str = "linear",
    inverse: bool = False,
    outside: float | None = None,
    memory_limit: int | str | None = None,
    tolerance: float = TOLERANCE,
    progress: bool = True,
) -> float:
    """Write a moving-space image on the fixed grid; return the worst error, in voxels.

    As ``Registration.warp``, with the image's own pixel type.

    Args:
        registration: of the pair.
        image: a `Volume`, the path of a Zarr folder, or what `as_volume` takes.
        path: a new folder ending in .zarr (OME-Zarr 0.4), or a file ending in .mha.
        reference: a `Volume` or the like whose grid is written; default: the fixed.
        mode: ``"linear"`` or ``"nearest"``.
        inverse: take a fixed-space image to the moving grid instead.
        outside: the value where there is no image; default: the image's least, for
            which it is read once more.
        memory_limit: bytes, or as "4GiB"; default: that of the image.
        tolerance: voxels of the image by which a place may be off.
        progress: show a bar.

    Raises:
        ValueError: unknown mode, image or path that cannot be used.
    """
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode must be 'linear' or 'nearest', got {mode!r}")
    volume = as_volume("image", image, memory_limit)
    place, mapped, box = _way(registration, reference, direction_of(inverse=inverse))
    level, limit = volume.levels[0], to_bytes(memory_limit or volume.memory_limit)
    cache = level.cache(0 if level.array is not None else 2 * plan(limit, WORKING)[1])
    into = volume.geometry.physical_to_unit()
    last = np.array(volume.geometry.size) - 1.0

    def index(_: Array, moved: Array) -> Array:
        unit = apply_affine(into, torch.from_numpy(moved)).numpy()
        voxels: Array = unit * last
        return voxels

    read = _Image(level, cache, mode, outside).read
    try:
        task = (place, mapped, index, tolerance, box, read, (), level.dtype)
        return _stream(path, _Output("warping", *task), progress)
    finally:
        cache.close()


def displacement_to(
    registration: Registration,
    path: str | os.PathLike[str],
    *,
    reference: Any = None,
    direction: str = FIXED_TO_MOVING,
    tolerance: float = TOLERANCE,
    progress: bool = True,
) -> float:
    """Write mapped minus own place; return the largest error, in the grid's voxels.

    Float32 vectors in millimetres of the images' frame, components x, y(, z): in Zarr
    the first axis, in .mha beside each other. Arguments as in `warp_to`.

    Raises:
        ValueError: unknown direction, or a path that cannot be used.
    """
    place, mapped, box = _way(registration, reference, direction)
    width = min(place.spacing)
    output = _Output(
        "displacements",
        place,
        mapped,
        lambda points, moved: (moved - points) / width,
        tolerance,
        box,
        lambda voxels: voxels * np.float32(width),
        (place.dimension,),
    )
    return _stream(path, output, progress)


def jacobian_to(
    registration: Registration,
    path: str | os.PathLike[str],
    *,
    reference: Any = None,
    direction: str = FIXED_TO_MOVING,
    tolerance: float = TOLERANCE_DETERMINANT,
    progress: bool = True,
) -> float:
    """Write analytic determinants (mm by mm), float32; return the largest error.

    Arguments as in `warp_to`; ``tolerance`` is in units of the determinant.

    Raises:
        ValueError: unknown direction, or a path that cannot be used.
    """
    place, mapped, box = _way(registration, reference, direction)
    function = mapped.determinants
    output = _Output("determinants", place, None, function, tolerance, box)
    return _stream(path, output, progress)


def _way(
    registration: Registration, reference: Any, direction: str
) -> tuple[Geometry, FramedMap, Tensor]:
    """Return the grid that is written, and the map in millimetres (tensors: voxels).

    And the matrix from there to the unit box in which the field is evaluated.
    """
    two_way = registration.two_way.physical()
    place = start = two_way.place(direction)
    if isinstance(reference, Geometry):
        place = reference
    elif reference is not None:
        place = as_volume("reference", reference).geometry
    box = torch.linalg.inv(two_way.from_fixed(direction)) @ start.physical_to_unit()
    return place, two_way.framed(direction), box


@dataclass(frozen=True)
class _Output:
    """A function of places that is written at every voxel of a grid.

    Attributes:
        name, place: for the bar; the grid.
        mapped: a map of places, or None.
        function: of rows ``[N, d]`` in millimetres, and of the mapped rows if there is
            a map: ``[N]`` or ``[N, C]``.
        tolerance: of its values.
        into: homogeneous matrix, millimetres -> the unit box of the field, at whose
            border the function has a kink.
        finish: its values ``[*block, C]`` -> what is written, ``[*block, *channels]``.
        channels, dtype: of what is written.
    """

    name: str
    place: Geometry
    mapped: FramedMap | None
    function: Callable[..., Array]
    tolerance: float
    into: Tensor
    finish: Callable[[Array], Array] = lambda values: values[..., 0]
    channels: tuple[int, ...] = ()
    dtype: np.dtype[Any] = _FLOAT

    def at(self, points: Array) -> Array:
        """Return the function at rows: ``[N, C]``."""
        moved = () if self.mapped is None else (self.mapped(points),)
        values: Array = self.function(points, *moved).reshape(len(points), -1)
        return values

    def on_grid(self, size: Sequence[int], frame: Tensor) -> Tensor:
        """Return the function on a grid with that unit box: ``[*size, C]`` float64."""
        channels = self.at(np.zeros((1, len(size)))).shape[1]

        def rows(*points: Array) -> Array:
            return self.function(*points).reshape(len(points[0]), -1)

        kind, mapped = np.float64, self.mapped
        values = over_grid(rows, size, frame, channels, kind, mapped=mapped)
        return torch.from_numpy(values)


def _stream(path: str | os.PathLike[str], output: _Output, progress: bool) -> float:
    """Write an output by blocks; return the largest error of its function."""
    worst, width, dtype = 0.0, block_files.BLOCK, output.dtype
    size = output.place.size
    starts = list(product(*(range(0, n, width) for n in size)))
    # Neighbours follow each other, so that what one read the next finds.
    starts.sort(key=lambda s: (*(i // (NEAR * width) for i in s), *s))
    generator = np.random.default_rng(0)
    where = (Path(path), output.place, output.channels, dtype)
    with block_files.written_blocks(*where) as write:

        def work(block: Box, side: int) -> float:
            worst_part = 0.0
            for box in _parts(block, [side] * len(block)):
                values, error = _in_block(output, box, generator)
                worst_part, values = max(worst_part, error), output.finish(values)
                if dtype.kind in "iu":
                    ends = np.iinfo(dtype)
                    values = np.rint(values).clip(ends.min, ends.max)
                write(box, values.astype(dtype))
            return worst_part

        for start in tqdm(starts, output.name, disable=not progress, leave=False):
            ends = (min(s + width, n) for s, n in zip(start, size, strict=True))
            block = tuple(map(slice, start, ends))
            what = f"the {output.name}"
            error = in_smaller_parts(partial(work, block), width, LEAST, what)
            worst = max(worst, error)
    return worst


def _parts(block: Box, sides: Sequence[int]) -> Iterator[Box]:
    """Yield a box in boxes of at most so many voxels along each axis."""
    axes = [range(b.start, b.stop, n) for b, n in zip(block, sides, strict=True)]
    for starts in product(*axes):
        each = zip(starts, sides, block, strict=True)
        yield tuple(slice(s, min(s + n, b.stop)) for s, n, b in each)


def _in_block(
    output: _Output, box: Box, generator: np.random.Generator
) -> tuple[Array, float]:
    """Return the function at the voxels of a block ``[*block, C]``, and the error."""
    d, whole = len(box), output.place.size
    size = [b.stop - b.start for b in box]
    inner = torch.eye(d + 1, dtype=torch.float64)
    for axis, (b, n) in enumerate(zip(box, whole, strict=True)):
        inner[axis, axis] = (size[axis] - 1) / (n - 1)
        inner[axis, d] = b.start / (n - 1)
    frame = output.place.unit_to_physical() @ inner  # of the unit box of the block
    checks = generator.integers(0, size, (_CHECKS, d))
    unit = torch.from_numpy(checks / np.maximum(np.array(size) - 1, 1))
    exact = output.at(apply_affine(frame, unit).numpy())
    ends = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * d)
    ends = apply_affine(output.into @ frame, ends)
    low, high = ends.amin(0) + _ROUNDING, ends.amax(0) - _ROUNDING
    cut = [((low < edge) & (high > edge)).any() for edge in (0.0, 1.0)]
    step = (1 if output.mapped is None else 2) if any(cut) else STEP
    while True:
        nodes = [min(n, max(4, -(-(n - 1) // step) + 1)) for n in size]
        values = output.on_grid(nodes, frame)
        if step == 1:
            return values.float().numpy(), 0.0
        for axis, (n, k) in enumerate(zip(size, nodes, strict=True)):
            weights = torch.from_numpy(_cubic(n, k))
            values = torch.tensordot(weights, values, ([1], [axis])).movedim(0, axis)
            values = values.contiguous()
        dense = values.float().numpy()
        missed = dense[tuple(checks.T)] - exact
        error = float(np.linalg.norm(missed, axis=1).max())
        if _SAFETY * error <= output.tolerance:
            return dense, error
        step //= 2


def _cubic(count: int, nodes: int) -> Array:
    """Return ``[count, nodes]``: from nodes over as many voxels, by local cubics."""
    if nodes == count:
        return np.eye(count)
    x = np.arange(count) * (nodes - 1) / (count - 1)
    base = np.clip(np.floor(x).astype(int) - 1, 0, nodes - 4)
    weights = np.zeros((count, nodes))
    for k in range(4):
        share = np.ones(count)
        for other in range(4):
            if other != k:
                share *= (x - base - other) / (k - other)
        weights[np.arange(count), base + k] = share
    return weights


@dataclass(frozen=True)
class _Image:
    """An image read between its voxels; see `warp_to`."""

    level: Level
    cache: ChunkCache
    mode: str
    outside: float | None

    @cached_property
    def beyond(self) -> float:
        """The value where there is no image: all of it may be read for that, once."""
        if self.outside is not None:
            return self.outside
        whole = tuple(slice(0, n) for n in self.level.geometry.size)
        sides = [-(-block_files.BLOCK // c) * c for c in self.level.chunk]
        parts = _parts(whole, sides)
        return least_value(np.array([least_value(self.level.read(p)) for p in parts]))

    def read(self, at: Array) -> Array:
        """Return values ``[*block]`` at voxel indices ``[*block, d]`` float32."""
        rows, size = torch.from_numpy(at).flatten(0, -2), self.cache.shape
        box = []
        ends = zip(rows.amin(0).tolist(), rows.amax(0).tolist(), size, strict=True)
        for low, high, n in ends:
            start = min(max(math.floor(low) - 1, 0), n - 2)
            box.append(slice(start, min(max(math.ceil(high) + 2, start + 2), n)))
        voxels = self.cache.box(tuple(box))
        index = rows - rows.new_tensor([b.start for b in box])
        last = rows.new_tensor(voxels.shape) - 1
        if self.mode == "nearest":
            near = (index + 0.5).floor().clamp(min=0).minimum(last).long()
            values: Array = voxels[tuple(near.T.numpy())]
        else:
            tensor = torch.from_numpy(voxels.astype(np.float32))[None, None]
            unit = points_as_grid((index / last)[None])
            values = sample_image(tensor, unit).flatten().numpy()
        far = outside_grid(rows.numpy(), size)
        if far.any():
            values = np.where(far, np.asarray(self.beyond, values.dtype), values)
        return values.reshape(at.shape[:-1])
