"""Images written block by block: Zarr folders and uncompressed MetaImage files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from icon_nephi.io.atomic import part_of, written_whole
from icon_nephi.io.ome_zarr import zarr_writer
from icon_nephi.io.raw import write_meta_header
from icon_nephi.space.chunks import Box
from icon_nephi.space.frames import Array, Geometry

#: Voxels a side of a block, and of a chunk of Zarr.
BLOCK = 64


@contextmanager
def written_blocks(
    path: Path, place: Geometry, channels: tuple[int, ...], dtype: np.dtype[Any]
) -> Iterator[Callable[[Box, Array], None]]:
    """Give a function that writes a block; the path appears when all is written.

    Args:
        path: folder ending in .zarr (OME-Zarr 0.4), or file ending in .mha; new or old.
        place: the grid.
        channels: numbers a voxel, none for one: last in a block.
        dtype: of the numbers.

    Raises:
        ValueError: a path that cannot be written.
    """
    kind = path.suffix.lower()
    if kind not in (".zarr", ".mha"):
        raise ValueError(
            f"{path} cannot be written in parts; end the path in .zarr or .mha"
        )
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} does not exist; make the folder first")
    if kind == ".mha":
        if path.is_dir():
            raise ValueError(f"{path} is a folder; choose another name")
        with written_whole(path) as (part,):
            raw = write_meta_header(part, place, dtype, *channels)

            def write(box: Box, values: Array) -> None:
                # Mapped anew: pages that stay mapped count as memory.
                raw.opened((*place.size, *channels), "r+")[box] = values

            yield write
        return
    if not np.allclose(place.direction, np.eye(place.dimension)):
        raise ValueError(
            f"{path}: OME-Zarr holds no direction, and this grid has one; end the path "
            "in .mha"
        )
    part = part_of(path)
    try:
        yield zarr_writer(part, place, channels, dtype, BLOCK)
        if path.exists():
            old = part_of(path, kind="old")
            os.replace(path, old)
            os.replace(part, path)
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()
        else:
            os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
