"""The voxels of NIfTI files, as their own headers say they lie; not where in space.

NIfTI-1 and 2, packed or not whatever the name says, one file or two. ITK reads a file
of another name that lies beside, takes missing voxels for zeros, and has not every
pixel type; of the header it is asked where the image lies, which `placing` is for.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from icon_nephi.space.frames import Array, other_order

ENDINGS = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")
_CODES = (256, 2, 4, 512, 8, 768, 1024, 1280, 16, 64)
_KINDS = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
TYPES = dict(zip(_CODES, _KINDS, strict=True))
_BLOCK = 2**20
# Where each number of a header is and what it is: of version 1 and of version 2.
_PLACES = {
    348: {
        **{"dim": (40, "8h"), "intent": (68, "h"), "type": (70, "h")},
        **{"pixdim": (76, "8f"), "start": (108, "f"), "scale": (112, "2f")},
        **{"units": (123, "b"), "codes": (252, "2h"), "quaternion": (256, "6f")},
        **{"rows": (280, "12f"), "magic": (344, "3s")},
    },
    540: {
        **{"dim": (16, "8q"), "intent": (504, "i"), "type": (12, "h")},
        **{"pixdim": (104, "8d"), "start": (168, "q"), "scale": (176, "2d")},
        **{"units": (500, "i"), "codes": (344, "2i"), "quaternion": (352, "6d")},
        **{"rows": (400, "12d"), "magic": (4, "3s")},
    },
}


@dataclass(frozen=True)
class NiftiFile:
    """What a header says.

    Attributes:
        voxels: the file that holds them.
        start: bytes before the first.
        size: voxels per tensor axis; two or three axes.
        stored: their type in the file, with its byte order.
        slope, intercept: to the values meant.
        fields: the header's numbers, as `_PLACES` names them.
    """

    voxels: Path
    start: int
    size: tuple[int, ...]
    stored: np.dtype[Any]
    slope: float
    intercept: float
    fields: dict[str, tuple[Any, ...]]

    @property
    def bytes_of_voxels(self) -> int:
        """How many there are."""
        return int(np.prod(self.size, dtype=object)) * self.stored.itemsize

    @property
    def rows(self) -> Array | None:
        """The matrix ``[3, 4]`` to RAS, as stored, if there is one (sform)."""
        if not self.fields["codes"][1] > 0:
            return None
        return np.array(self.fields["rows"], dtype=float).reshape(3, 4)

    def read(self) -> Array:
        """Return the values ``[*grid]``; scaled ones are floats.

        Raises:
            ValueError: fewer bytes than the header says, or damaged ones.
        """
        count = self.bytes_of_voxels
        with self.voxels.open("rb") as file:
            if is_packed(file):
                data = _unpacked(file, self.start + count)[self.start :]
            else:
                file.seek(self.start)
                data = bytearray(file.read(count))
        if len(data) < count:
            raise ValueError("is truncated; copy or download it again")
        values = np.frombuffer(data, self.stored, count // self.stored.itemsize)
        values = values.astype(self.stored.newbyteorder("="), copy=False)
        values = values.reshape(self.size)
        if (self.slope, self.intercept) == (1.0, 0.0):
            return values
        kind = np.float64 if self.stored.itemsize > 4 else np.float32
        return (values * np.float64(self.slope) + self.intercept).astype(kind)

    def placing(self) -> bytes:
        """Return a file of NIfTI-1 with the same place in space, and one voxel."""
        told = self.fields
        header = bytearray(352)
        struct.pack_into("<i", header, 0, 348)
        last = len(self.size)
        dims = [min(n, 2**15 - 1) for n in other_order(self.size)]
        _put(header, "dim", (last, *dims, *(1,) * (7 - last)))
        _put(header, "type", (2,))
        struct.pack_into("<h", header, 72, 8)  # bits of a voxel
        _put(header, "start", (352.0,))
        for name in ("pixdim", "units", "codes", "quaternion", "rows"):
            _put(header, name, told[name])
        header[344:348] = b"n+1\0"
        return bytes(header)


def _put(header: bytearray, name: str, numbers: tuple[Any, ...]) -> None:
    place, form = _PLACES[348][name]
    struct.pack_into("<" + form, header, place, *numbers)


def is_packed(file: BinaryIO) -> bool:
    """Return whether what follows is gzipped; leave the file where it is."""
    place = file.tell()
    first = file.read(2)
    file.seek(place)
    return first == b"\x1f\x8b"


def _unpacked(file: BinaryIO, count: int) -> bytearray:
    """Return at most so many bytes of what was gzipped; bytes after its end are left.

    One more is asked for, so that the checksum at the end of whole files is read.

    Raises:
        ValueError: damaged.
    """
    data = bytearray()
    try:
        for part in _parts(file, count + 1):
            data += part
    except zlib.error as error:
        raise ValueError(f"is damaged ({error}); copy or download it again") from error
    del data[count:]
    return data


def _parts(file: BinaryIO, count: int) -> Iterator[bytes]:
    unpack, left = zlib.decompressobj(31), b""
    while count > 0:
        left = left or file.read(_BLOCK)
        if not left:
            return
        part = unpack.decompress(left, count)
        count -= len(part)
        yield part
        left = unpack.unconsumed_tail
        if unpack.eof:
            left = unpack.unused_data or file.read(_BLOCK)
            if not left.startswith(b"\x1f\x8b"):
                return
            unpack = zlib.decompressobj(31)


def find_nifti(path: Path) -> NiftiFile | None:
    """Return what the header of a NIfTI file says; None of any other file.

    And None where it holds no scalar 2D or 3D image of numbers: series, vectors,
    colours, complex numbers.

    Raises:
        ValueError: it says what cannot be, or its voxels are in a file that is missing.
    """
    header_file, voxels = _two_files(path)
    if not header_file.is_file():
        return None
    with header_file.open("rb") as file:
        head = _unpacked(file, 540) if is_packed(file) else bytearray(file.read(540))
    if (fields := read_fields(head)) is None:
        return None
    order, version, told = fields
    if told["magic"][0] not in (b"n+1", b"ni1", b"n+2", b"ni2"):
        return None  # Analyze, in which ITK knows its way about
    axes, *dims = told["dim"]
    if not 1 <= axes <= 7 or min(dims[:axes]) < 1:
        raise ValueError(f"is damaged: its header says {axes} axes of {dims[:7]}")
    while axes > 3 and dims[axes - 1] == 1:
        axes -= 1
    kind = TYPES.get(told["type"][0])
    if axes not in (2, 3) or kind is None:
        return None
    one_file = told["magic"][0].startswith(b"n+")
    start = float(told["start"][0])
    least = version if one_file else 0
    if not least <= start < 2**62:
        if start != 0:
            raise ValueError(f"is damaged: its voxels are said to start at {start:g}")
        start = 352 if one_file else 0
    if not one_file and not voxels.is_file():
        raise ValueError(f"has its voxels in {voxels.name}, which is not beside it")
    return NiftiFile(
        header_file if one_file else voxels,
        int(start),
        other_order(dims[:axes]),
        np.dtype(order + kind),
        *scaling(told),
        told,
    )


def read_fields(
    head: bytes | bytearray,
) -> tuple[str, int, dict[str, tuple[Any, ...]]] | None:
    """Return byte order, length and numbers of a header, named as in `_PLACES`.

    None where the bytes are none.
    """
    for order in "<>":
        version = struct.unpack_from(order + "i", head.ljust(4, b"\0"))[0]
        if version in _PLACES and len(head) >= version:
            told = {
                name: struct.unpack_from(order + form, head, place)
                for name, (place, form) in _PLACES[version].items()
            }
            return order, version, told
    return None


def scaling(told: dict[str, tuple[Any, ...]]) -> tuple[float, float]:
    """Return slope and intercept from stored numbers to the values meant."""
    slope, intercept = map(float, told["scale"])
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        return 1.0, 0.0
    return slope, intercept


def _two_files(path: Path) -> tuple[Path, Path]:
    """Return the files of header and voxels: the same one, or .hdr and .img."""
    name = path.name
    lower = name.lower()
    ends = {".hdr": ".img", ".img": ".hdr", ".hdr.gz": ".img.gz", ".img.gz": ".hdr.gz"}
    end = next((e for e in ends if lower.endswith(e)), None)
    if end is None:
        return path, path
    stem = name[: -len(end)]
    names = [ends[end], ends[end].replace(".gz", ""), ends[end] + ".gz"]
    twins = [path.with_name(stem + twin) for twin in names]
    other = next((twin for twin in twins if twin.is_file()), twins[0])
    return (path, other) if end.startswith(".hdr") else (other, path)
