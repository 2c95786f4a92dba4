"""Where the voxels of an uncompressed NIfTI, MetaImage or NRRD file lie, and boxes.

ITK reads the geometry from the header, asked when it is needed; the rest is here. Of
a plain .nii, chunks of 64^3 take 8-11 ms from the memory map here, and 53-60 ms with
nibabel's lazy slices.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icon_nephi.io.nifti import TYPES, read_fields, scaling
from icon_nephi.space.chunks import Box
from icon_nephi.space.frames import Array, Geometry, other_order

SUFFIXES = (".nii", ".mha", ".mhd", ".nrrd", ".nhdr")
# Types of numpy, and what each format calls them.
_TYPES = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
_META_NAMES = "CHAR UCHAR SHORT USHORT INT UINT LONG_LONG ULONG_LONG FLOAT DOUBLE"
_META = {f"MET_{n}": t for n, t in zip(_META_NAMES.split(), _TYPES, strict=True)}
_NRRD = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
_HEADER = 2**16  # bytes that a text header may have


@dataclass(frozen=True)
class RawFile:
    """Voxels ``slope * stored + intercept`` in a file, the last axis fastest.

    Attributes:
        path: of the voxels, which may have a file of their own.
        offset: bytes before the first voxel; -1: they are the last in the file.
        stored: the type in the file, with its byte order.
        slope, intercept: to the values meant.
    """

    path: Path
    offset: int
    stored: np.dtype[Any]
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values meant, in this machine's byte order."""
        if (self.slope, self.intercept) != (1.0, 0.0):
            return np.dtype(np.float32)
        return self.stored.newbyteorder("=")

    def opened(self, shape: tuple[int, ...], mode: Any = "r") -> Array:
        """Return the stored voxels ``[*grid]``, mapped: nothing is read yet.

        Raises:
            ValueError: the file is too short for them.
        """
        size = int(np.prod(shape, dtype=np.int64)) * self.stored.itemsize
        length = self.path.stat().st_size
        offset = length - size if self.offset < 0 else self.offset
        if offset < 0 or offset + size > length:
            raise ValueError(f"{self.path} is truncated; copy or download it again")
        return np.memmap(self.path, self.stored, mode, offset, shape)

    def read(self, shape: tuple[int, ...], box: Box) -> Array:
        """Return the values of a box. Mapped anew: mapped pages count as memory."""
        values = np.array(self.opened(shape)[box])
        values = values.astype(self.stored.newbyteorder("="), copy=False)
        if self.dtype == values.dtype:
            return values
        return (values * self.slope + self.intercept).astype(np.float32)


def find_voxels(path: Path, *, several: bool = False) -> RawFile:
    """Return where the voxels of a file are, of ``several`` numbers each or of one.

    Raises:
        ValueError: compressed, or of a kind that cannot be mapped.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".nii":
            return _nifti(path)
        return _meta(path, several) if kind in (".mha", ".mhd") else _nrrd(path)
    except (LookupError, UnicodeDecodeError, OverflowError, struct.error) as error:
        raise ValueError(
            f"{path} has a header that says not where its voxels are ({error}); "
            "convert it to OME-Zarr or to an uncompressed .mha"
        ) from error


def geometry_in(path: Path) -> Geometry:
    """Return where the image of a file lies; only its header is read.

    Raises:
        ValueError: not an image, or not one number a voxel.
    """
    from icon_nephi.io.itk_images import read_header

    try:
        header = read_header(path)
        count, axes = header.GetNumberOfComponents(), header.GetNumberOfDimensions()
        columns = [map(float, header.GetDirection(a)) for a in range(axes)]
        place = Geometry(
            size=other_order(int(header.GetDimensions(a)) for a in range(axes)),
            spacing=tuple(float(header.GetSpacing(a)) for a in range(axes)),
            origin=tuple(float(header.GetOrigin(a)) for a in range(axes)),
            direction=tuple(zip(*columns, strict=True)),
        )
    except Exception as error:  # ITK raises RuntimeError, AttributeError and others
        raise ValueError(f"{path} cannot be read as an image") from error
    if count != 1:
        raise ValueError(f"{path} has {count} numbers per voxel, expected one")
    return place


def write_meta_header(
    path: Path, geometry: Geometry, stored: np.dtype[Any], channels: int = 1
) -> RawFile:
    """Make an .mha file with room for the voxels, for `RawFile.opened` to fill.

    Little-endian; sparse until it is written to. The channels of a voxel lie beside
    each other.
    """
    d = geometry.dimension
    stored = stored.newbyteorder("<")
    kind = next(name for name, code in _META.items() if code == stored.str[1:])

    def row(values: Any) -> str:
        return " ".join(repr(float(v)) for v in values)

    text = "\n".join(
        [
            "ObjectType = Image",
            f"NDims = {d}",
            "BinaryData = True",
            "BinaryDataByteOrderMSB = False",
            "CompressedData = False",
            # MetaImage lists the direction's columns, one after the other.
            f"TransformMatrix = {row(np.array(geometry.direction).T.ravel())}",
            f"Offset = {row(geometry.origin)}",
            f"ElementSpacing = {row(geometry.spacing)}",
            f"DimSize = {' '.join(str(n) for n in geometry.itk_size)}",
            f"ElementNumberOfChannels = {channels}",
            f"ElementType = {kind}",
            "ElementDataFile = LOCAL\n",
        ]
    )
    header = text.encode("ascii")
    size = int(np.prod((*geometry.size, channels), dtype=np.int64)) * stored.itemsize
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    return RawFile(path, len(header), stored)


def _compressed(path: Path) -> ValueError:
    return ValueError(
        f"{path} is compressed, so its parts cannot be read alone; convert it to "
        "OME-Zarr or to an uncompressed .nii, .mha or .nrrd"
    )


def _nifti(path: Path) -> RawFile:
    with open(path, "rb") as file:
        fields = read_fields(file.read(352))
    if fields is None:
        raise KeyError("not NIfTI-1")
    order, _, told = fields
    stored = np.dtype(order + TYPES[told["type"][0]])
    return RawFile(path, int(told["start"][0]), stored, *scaling(told))


def _lines(path: Path) -> tuple[list[str], int]:
    """Return the lines of a text header, up to its end, and the bytes they take."""
    lines: list[str] = []
    with open(path, "rb") as file:
        while line := file.readline(_HEADER - file.tell()):
            lines.append(line.rstrip(b"\r\n").decode("utf-8"))
            last = lines[-1].replace(" ", "")
            if not last.strip() or last.startswith("ElementDataFile="):
                break
        return lines, file.tell()


def _beside(path: Path, where: str) -> Path:
    """Return the file of voxels that a header names: in its folder or below."""
    if where.startswith("LIST") or "%" in where:
        raise KeyError("voxels in many files")
    voxels = (path.parent / where).resolve()
    if not voxels.is_relative_to(path.parent.resolve()) or not voxels.is_file():
        raise ValueError(
            f"{path} says that its voxels are in {where[:80]!r}, which is not there or "
            "not in its folder; put the two files beside each other"
        )
    return voxels


def _meta(path: Path, several: bool) -> RawFile:
    lines, place = _lines(path)
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    fields = {key.strip(): value.strip() for key, value in pairs}
    if fields.get("CompressedData", "False").lower() == "true":
        raise _compressed(path)
    big = fields.get("ElementByteOrderMSB", "False")
    big = fields.get("BinaryDataByteOrderMSB", big)
    order = ">" if big.lower() == "true" else "<"
    stored = np.dtype(order + _META[fields["ElementType"]])
    if int(fields.get("ElementNumberOfChannels", "1")) != 1 and not several:
        raise KeyError("several numbers a voxel")
    where = fields["ElementDataFile"]
    if where == "LOCAL":
        return RawFile(path, place, stored)
    skip = int(fields.get("HeaderSize", "0"))
    return RawFile(_beside(path, where), skip, stored)


def _nrrd(path: Path) -> RawFile:
    lines, place = _lines(path)
    if not lines[0].startswith("NRRD"):
        raise KeyError("not NRRD")
    pairs = (line.split(":", 1) for line in lines if ":" in line and line[0] != "#")
    fields = {key.strip().lower(): value.strip() for key, value in pairs}
    if fields["encoding"] != "raw":
        raise _compressed(path)
    order = ">" if fields.get("endian", "little") == "big" else "<"
    stored = np.dtype(order + _NRRD[fields["type"]])
    where = fields.get("data file", fields.get("datafile"))
    if int(fields.get("line skip", fields.get("lineskip", "0"))):
        raise KeyError("line skip")
    skip = int(fields.get("byte skip", fields.get("byteskip", "0")))
    if where is None:
        return RawFile(path, -1 if skip < 0 else place + skip, stored)
    return RawFile(_beside(path, where), skip, stored)
