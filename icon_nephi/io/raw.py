"""Where the voxels of an uncompressed NIfTI, MetaImage or NRRD file lie, and boxes.

ITK reads the geometry from the header, asked when it is needed; the rest is here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icon_nephi.space.chunks import Array, Box
from icon_nephi.space.frames import Geometry, other_order

SUFFIXES = (".nii", ".mha", ".mhd", ".nrrd", ".nhdr")
_NIFTI = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
_META = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
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
        """The stored voxels ``[*grid]``, mapped: nothing is read yet.

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
        """The values of a box. Mapped anew: pages that stay mapped count as memory."""
        values = np.array(self.opened(shape)[box]).astype(
            self.stored.newbyteorder("="), copy=False
        )
        if self.dtype == values.dtype:
            return values
        return (values * self.slope + self.intercept).astype(np.float32)


def find_voxels(path: Path) -> RawFile:
    """Where the voxels of a file are.

    Raises:
        ValueError: compressed, or of a kind that cannot be mapped.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".nii":
            return _nifti(path)
        return _meta(path) if kind in (".mha", ".mhd") else _nrrd(path)
    except (LookupError, UnicodeDecodeError, OverflowError, struct.error) as error:
        raise ValueError(
            f"{path} has a header that says not where its voxels are ({error}); "
            "convert it to OME-Zarr or to an uncompressed .mha"
        ) from error


def geometry_in(path: Path) -> Geometry:
    """Where the image of a file lies; only its header is read.

    Raises:
        ValueError: not an image, or not one number a voxel.
    """
    import itk

    try:
        mode = itk.CommonEnums.IOFileMode_ReadMode
        header = itk.ImageIOFactory.CreateImageIO(str(path), mode)
        header.SetFileName(str(path))
        header.ReadImageInformation()
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
    """A new .mha file with room for the voxels, for `RawFile.opened` to fill.

    Little-endian; sparse until it is written to. The channels of a voxel lie beside
    each other.
    """
    d = geometry.dimension
    names = {code: name for name, code in _META.items()}

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
            f"ElementType = {names[stored.str[1:]]}",
            "ElementDataFile = LOCAL\n",
        ]
    )
    header = text.encode("ascii")
    size = int(np.prod((*geometry.size, channels), dtype=np.int64)) * stored.itemsize
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    return RawFile(path, len(header), stored.newbyteorder("<"))


def _compressed(path: Path) -> ValueError:
    return ValueError(
        f"{path} is compressed, so its parts cannot be read alone; convert it to "
        "OME-Zarr or to an uncompressed .nii, .mha or .nrrd"
    )


def _nifti(path: Path) -> RawFile:
    with open(path, "rb") as file:
        header = file.read(352)
    order = "<" if struct.unpack("<i", header[:4])[0] == 348 else ">"
    if struct.unpack(order + "i", header[:4])[0] != 348:
        raise KeyError("not NIfTI-1")
    code = struct.unpack(order + "h", header[70:72])[0]
    offset, slope, intercept = struct.unpack(order + "3f", header[108:120])
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        slope, intercept = 1.0, 0.0
    return RawFile(path, int(offset), np.dtype(order + _NIFTI[code]), slope, intercept)


def _lines(path: Path) -> tuple[list[str], int]:
    """Lines of a text header, up to its end, and the bytes they take."""
    with open(path, "rb") as file:
        start = file.read(_HEADER)
    lines, place = [], 0
    while place < len(start):
        end = start.find(b"\n", place)
        end = len(start) if end < 0 else end
        line = start[place:end].rstrip(b"\r").decode("utf-8")
        place = end + 1
        lines.append(line)
        if not line.strip() or line.replace(" ", "").startswith("ElementDataFile="):
            break
    return lines, place


def _beside(path: Path, where: str) -> Path:
    """The file of voxels that a header names: in its folder or below, nowhere else."""
    found = (path.parent / where).resolve()
    if not found.is_relative_to(path.parent.resolve()) or not found.is_file():
        raise ValueError(
            f"{path} says that its voxels are in {where[:80]!r}, which is not there or "
            "not in its folder; put the two files beside each other"
        )
    return found


def _meta(path: Path) -> RawFile:
    lines, place = _lines(path)
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    fields = {key.strip(): value.strip() for key, value in found.items()}
    if fields.get("CompressedData", "False").lower() == "true":
        raise _compressed(path)
    big = fields.get(
        "BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False")
    )
    stored = np.dtype(
        (">" if big.lower() == "true" else "<") + _META[fields["ElementType"]]
    )
    if int(fields.get("ElementNumberOfChannels", "1")) != 1:
        raise KeyError("several numbers a voxel")
    where = fields["ElementDataFile"]
    if where == "LOCAL":
        return RawFile(path, place, stored)
    if where.startswith("LIST") or "%" in where:
        raise KeyError("voxels in many files")
    skip = int(fields.get("HeaderSize", "0"))
    return RawFile(_beside(path, where), skip, stored)


def _nrrd(path: Path) -> RawFile:
    lines, place = _lines(path)
    if not lines[0].startswith("NRRD"):
        raise KeyError("not NRRD")
    found = dict(line.split(":", 1) for line in lines if ":" in line and line[0] != "#")
    fields = {key.strip().lower(): value.strip() for key, value in found.items()}
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
    if where.startswith("LIST") or "%" in where:
        raise KeyError("voxels in many files")
    return RawFile(_beside(path, where), skip, stored)
