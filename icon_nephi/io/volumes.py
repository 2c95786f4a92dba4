"""Images larger than memory: pyramids and files whose boxes are read when needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from icon_nephi._memory import MEMORY_LIMIT, to_bytes
from icon_nephi.io.ome_zarr import zarr_levels
from icon_nephi.io.raw import SUFFIXES, find_voxels, geometry_in
from icon_nephi.space.chunks import CHUNK, Box, ChunkedImage, Level
from icon_nephi.space.frames import (
    Array,
    Geometry,
    identity_map,
    other_components,
    other_order,
)

# Voxels of the level that is held whole; and of one between, made where there is none.
WORKING, BETWEEN = 6_000_000, 20_000_000


class Volume:
    """One image of one number a voxel, as levels over the same box, fine to coarse.

    Args:
        levels: in any order; the one with most voxels is the image.
        name: for errors.
        memory_limit: bytes that working with it may take, the whole process counted.

    Attributes:
        memory_limit: as given, in bytes.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        name: str = "image",
        memory_limit: int | str | None = None,
    ) -> None:
        self.levels = sorted(levels, key=lambda level: -level.voxels)
        self.name = name
        self._pyramids: dict[int, Sequence[Level]] = {}
        self.memory_limit = to_bytes(memory_limit or MEMORY_LIMIT)
        size = self.geometry.size
        if len(size) not in (2, 3) or min(size) < 2:
            raise ValueError(
                f"{name} has size {size}, expected 2 or 3 axes of at least two voxels; "
                "leave out the axes with one"
            )
        if self.levels[0].dtype.kind not in "biuf":
            raise ValueError(
                f"{name} holds {self.levels[0].dtype}, expected numbers; convert it"
            )

    @property
    def geometry(self) -> Geometry:
        """Where the finest level lies."""
        return self.levels[0].geometry

    def image(
        self,
        level: Level,
        limit: int,
        intensities: Callable[[Tensor], Tensor] = lambda values: values,
        device: torch.device | str = "cpu",
    ) -> ChunkedImage:
        """Return a level as a `ChunkedImage` over the unit box of the finest one.

        It holds at most ``limit`` bytes of chunks.
        """
        ours, its = self.geometry, level.geometry
        steps = np.array(its.tensor_spacing)
        between = np.array(ours.origin) - np.array(its.origin)
        along = np.linalg.inv(np.array(its.direction)) @ between
        shift = other_components(along) / steps
        scale = np.array(ours.extent) / steps
        cache = level.cache(limit)
        return ChunkedImage(cache, scale.tolist(), shift.tolist(), intensities, device)

    def pyramid(self, voxels: int = WORKING, progress: bool = False) -> Sequence[Level]:
        """Return levels down to the finest of at most that many voxels, fine to coarse.

        Where there is none it is made, and kept in memory: means of blocks, read once
        from the coarsest level there is, and one level between if the way is far.
        """
        if voxels in self._pyramids:
            return self._pyramids[voxels]
        levels = list(self.levels)
        for goal in (max(BETWEEN, voxels), voxels):
            last = levels[-1]
            far = goal > voxels and last.voxels < 8 * voxels
            if last.voxels > goal and not far:
                levels.append(_averaged(last, goal, self.name, progress))
        finer = [level for level in levels if level.voxels > voxels]
        self._pyramids[voxels] = levels[: len(finer) + 1]
        return self._pyramids[voxels]

    def working(self, voxels: int = WORKING, progress: bool = False) -> Level:
        """Return the coarsest level of the `pyramid`."""
        return self.pyramid(voxels, progress)[-1]

    def finer(
        self,
        voxels: int,
        limit: int,
        scale: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
    ) -> list[ChunkedImage]:
        """Return the levels of the `pyramid` finer than the working, coarse to fine.

        Each holds at most ``limit`` bytes of chunks; ``scale`` is of intensities
        ``[1, 1, *any]``, see `find_scale`.
        """
        ones = (1,) * (self.geometry.dimension + 1)

        def seen(values: Tensor) -> Tensor:
            return scale(values.reshape(*ones, -1)).reshape(values.shape)

        levels = reversed(self.pyramid(voxels)[:-1])
        return [self.image(level, limit, seen, device) for level in levels]

    def whole(self, level: Level) -> tuple[Tensor, Geometry]:
        """Return a level as ``[1, 1, *grid]`` float32 over the finest one's unit box.

        Its first and last voxels are moved onto those of the finest level, so that all
        levels have the same unit box.
        """
        size = level.geometry.size
        values = np.asarray(level.read(tuple(slice(0, n) for n in size)))
        held = Level.of(values.astype(np.float32, copy=False), level.geometry)
        image, slabs = self.image(held, 0), identity_map(size).split(8, dim=2)
        parts = [image.sample(slab.contiguous()) for slab in slabs]
        steps = [e / (n - 1) for e, n in zip(self.geometry.extent, size, strict=True)]
        place = replace(self.geometry, size=size, spacing=other_order(steps))
        return torch.cat(parts, 2), place


def open_volume(
    path: str | os.PathLike[str], memory_limit: int | str | None = None
) -> Volume:
    """Return the image of an OME-Zarr or Zarr folder, or of an uncompressed file.

    Only headers are read. OME-Zarr 0.4 and 0.5: all levels, spatial axes z, y, x, their
    scales, translations and units (to millimetres); a plain Zarr array has voxels of
    1 mm. Files: .nii, .mha, .mhd, .nrrd, .nhdr.

    Args:
        path: of the folder or file.
        memory_limit: bytes, or as "4GiB" (the default): see `Volume`.

    Raises:
        ValueError: not such an image, compressed, truncated, or several images in one.
        ImportError: a Zarr folder without the package zarr.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_dir():
        return Volume(zarr_levels(path), str(path), memory_limit)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path} cannot be read in parts; give a Zarr folder or an uncompressed "
            f"file ({', '.join(SUFFIXES)}), converting it where needed"
        )
    raw = find_voxels(path)
    place = geometry_in(path)
    raw.opened(place.size)
    chunk = (CHUNK,) * place.dimension
    level = Level(place, chunk, raw.dtype, partial(raw.read, place.size))
    return Volume([level], str(path), memory_limit)


def _averaged(level: Level, goal: int, name: str, progress: bool) -> Level:
    """Return means of blocks of a level, at most ``goal``, about equally wide."""
    place = level.geometry
    factors = np.ones(place.dimension, np.int64)
    while np.prod(np.array(place.size) // factors) > goal:
        width = np.array(place.tensor_spacing) * factors
        factors[width <= 1.5 * width.min()] *= 2
    size = [n // int(f) for n, f in zip(place.size, factors, strict=True)]
    # Of whole chunks, in voxels of the result.
    steps = -(-np.maximum(level.chunk, 32) // factors)
    means = np.empty(size, np.float32)
    starts = list(product(*(range(0, n, s) for n, s in zip(size, steps, strict=True))))
    for start in tqdm(starts, f"averaging {name}", disable=not progress, leave=False):
        first = np.array(start, np.int64)
        last = np.minimum(first + steps, size)
        shape = np.stack([last - first, factors], 1).ravel()
        values = level.read(_box(first * factors, last * factors)).astype(np.float32)
        axes = tuple(range(1, 2 * len(size), 2))
        means[_box(first, last)] = values.reshape(shape).mean(axis=axes)
    spacing, stretch = np.array(place.spacing), other_components(factors)
    shift = np.array(place.direction) @ (spacing * (stretch - 1) / 2)
    coarse = Geometry(
        size=tuple(size),
        spacing=tuple((spacing * stretch).tolist()),
        origin=tuple((np.array(place.origin) + shift).tolist()),
        direction=place.direction,
    )
    return Level.of(means, coarse)


def _box(first: Array, last: Array) -> Box:
    return tuple(map(slice, first.tolist(), last.tolist()))
