"""Whether an image file holds all the voxels that its header promises.

ITK's readers of several formats take zeros, or what lies in memory, for missing ones.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from icon_nephi.io.raw import SUFFIXES, find_voxels

_TRUNCATED = "is truncated; copy or download it again"
# Bytes of a number of each of TIFF's types, and how struct calls whole ones.
_TIFF_TYPES = {3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
# Tags: where strips or tiles begin, and how many bytes they have.
_STRIPS = {273: 279, 324: 325}


def check_complete(path: Path, header: Any) -> None:
    """Raise unless a file is as long as its header says.

    Args:
        path: of an image other than NIfTI.
        header: ITK's reader of it, which has read the header.

    Raises:
        ValueError: it is too short.
    """
    kind = path.suffix.lower()
    count = int(header.GetImageSizeInBytes())
    if kind in SUFFIXES:
        if kind in (".mha", ".mhd"):
            _check_meta_files(path)
        try:
            raw = find_voxels(path, several=True)
        except ValueError:  # compressed, in many files, ...: ITK misses what it misses
            return
        whole = count <= raw.path.stat().st_size - max(raw.offset, 0)
    elif kind in (".tif", ".tiff"):
        whole = _tiff_is_whole(path)
    elif kind == ".vtk":
        whole = _vtk_is_whole(path, count)
    elif kind in (".img", ".hdr"):  # Analyze, by now
        data = path.with_suffix(".img")
        whole = not data.is_file() or data.stat().st_size >= count
    else:
        whole = _ends_well(path, kind)
    if not whole:
        raise ValueError(_TRUNCATED)


def _check_meta_files(path: Path) -> None:
    """Raise unless the files with the voxels of a MetaImage are there.

    ITK reads memory that is not its own where they are not.

    Raises:
        ValueError: one is missing.
    """
    with path.open("rb") as file:
        found = re.search(rb"ElementDataFile *= *([^\r\n]*)", file.read(1 << 16))
    words = found[1].decode("latin-1").split() if found else []
    if not words or words[0] in ("LOCAL", "LIST"):
        return
    name = words[0]
    if "%" in name:  # of many files, numbered: from, to, every
        try:
            name = name % int(words[1])
        except (IndexError, TypeError, ValueError):
            name = ""
    if not name or not (path.parent / name).is_file():
        raise ValueError(
            f"names {words[0]!r} for its voxels, which is no file beside it"
        )


def _ends_well(path: Path, kind: str) -> bool:
    """Return whether the last bytes are those that a format ends with."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        end = file.read()
    if kind == ".png":
        return b"IEND" in end
    if kind in (".jpg", ".jpeg"):
        return b"\xff\xd9" in end
    if kind == ".bmp":
        with path.open("rb") as file:
            told: int = struct.unpack_from("<I", file.read(6).ljust(6, b"\0"), 2)[0]
        return path.stat().st_size >= told
    return True


def _tiff_is_whole(path: Path) -> bool:
    """Return whether all strips and tiles of all pages end within a file."""
    length = path.stat().st_size
    try:
        with path.open("rb") as file:
            for page in _tiff_pages(file):
                for starts, counts in _STRIPS.items():
                    both = zip(page.get(starts, ()), page.get(counts, ()), strict=False)
                    if any(start + count > length for start, count in both):
                        return False
    except (struct.error, KeyError, OverflowError):
        return False
    return True


def _tiff_pages(file: BinaryIO) -> Iterator[dict[int, tuple[int, ...]]]:
    """The whole numbers of each page by tag, of a TIFF or a BigTIFF."""
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", head, 2)[0] == 43
    word, count, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
    place = struct.unpack_from(order + word, head, 8 if big else 4)[0]
    room, seen = struct.calcsize(word), set[int]()
    while place and place not in seen and len(seen) < 100_000:
        seen.add(place)
        file.seek(place)
        entries = struct.unpack(order + count, file.read(struct.calcsize(count)))[0]
        table = file.read(entries * entry + room)
        page: dict[int, tuple[int, ...]] = {}
        for i in range(entries):
            tag, kind = struct.unpack_from(order + "2H", table, i * entry)
            many = struct.unpack_from(order + word, table, i * entry + 4)[0]
            if tag in (*_STRIPS, *_STRIPS.values()) and kind in _TIFF_TYPES:
                form = f"{order}{many}{_TIFF_TYPES[kind]}"
                at = i * entry + 4 + room
                data = table[at : at + room]
                if struct.calcsize(form) > room:
                    file.seek(struct.unpack(order + word, data)[0])
                    data = file.read(struct.calcsize(form))
                page[tag] = struct.unpack_from(form, data)
        yield page
        place = struct.unpack_from(order + word, table, entries * entry)[0]


def _vtk_is_whole(path: Path, count: int) -> bool:
    """Return whether a legacy VTK file of structured points holds its numbers."""
    with path.open("rb") as file:
        head = file.read(4096)
    start = re.search(rb"LOOKUP_TABLE[^\n]*\n", head, re.I) or re.search(
        rb"^(VECTORS|TENSORS|COLOR_SCALARS|SCALARS)[^\n]*\n", head, re.I | re.M
    )
    if start is None:
        return True
    if re.search(rb"^BINARY", head, re.I | re.M):
        return path.stat().st_size - start.end() >= count
    sizes = re.search(rb"^DIMENSIONS\s+(\d+)\s+(\d+)\s+(\d+)", head, re.I | re.M)
    if sizes is None:
        return True
    numbers = int(sizes[1]) * int(sizes[2]) * int(sizes[3])
    return len(path.read_bytes()[start.end() :].split()) >= numbers
