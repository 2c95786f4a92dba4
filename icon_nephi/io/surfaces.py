"""Surfaces in XML: GIFTI, and VTK's .vtp."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from typing import Any

import numpy as np

from icon_nephi.io.point_file import (
    RAS,
    Bad,
    PointFile,
    frame_of,
    number,
    sign_of,
    tangents,
    turned,
)
from icon_nephi.space.frames import Array

_BROKEN = "is not a complete .vtp file; write it again"
_VTP_TYPES = {"Float32": "f4", "Float64": "f8"}


def read_gifti(data: bytes) -> PointFile:
    """Read a GIFTI surface: RAS mm, or FreeSurfer's own frame, whose offset it says."""
    try:
        import nibabel as nib
    except ImportError as error:
        raise Bad("needs nibabel: pip install icon_nephi[meshes]") from error
    try:
        image: Any = nib.GiftiImage.from_bytes(data)
    except Exception as error:  # of the XML parser, of base64, of zlib
        raise Bad("is not a complete GIFTI file; write it again") from error
    arrays = image.get_arrays_from_intent("NIFTI_INTENT_POINTSET")
    if not arrays:
        raise Bad("holds no points (a surface has an array POINTSET)")
    stored = arrays[0].data
    if stored.ndim != 2 or stored.shape[1] != 3:
        raise Bad("holds no points (a surface has an array POINTSET)")
    matrix = _to_scanner(arrays[0])
    linear, shift, back = matrix[:3, :3], matrix[:3, 3], np.linalg.inv(matrix)

    def content(moved: Array, beside: Array | None = None) -> bytes:
        own = (moved * RAS) @ back[:3, :3].T + back[:3, 3]
        arrays[0].data = own.astype(stored.dtype)
        whole: bytes = image.to_bytes()
        return whole

    points = (stored.astype(np.float64) @ linear.T + shift) * RAS
    return PointFile(points, content, "RAS")


def _to_scanner(array: Any) -> Array:
    """Return the matrix ``[4, 4]`` from an array's numbers to scanner RAS mm.

    FreeSurfer writes surfaces in "tkregister" RAS, whose origin is the middle of the
    volume: as dataspace 0, with the way to the scanner's frame as a matrix, or (older
    ones) only the middle, ``VolGeomC_R``, ``_A``, ``_S``.
    """
    matrix, told = np.eye(4), array.coordsys
    if told is not None and int(told.dataspace or 0) == 0:
        given = np.array(told.xform, dtype=float).reshape(4, 4)
        if int(told.xformspace or 0) == 1:
            matrix = given
        if np.allclose(matrix, np.eye(4)):
            matrix = np.eye(4)
            middle = [array.meta.get(f"VolGeomC_{axis}", 0) for axis in "RAS"]
            matrix[:3, 3] = [float(x) for x in middle]
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-6:
        raise Bad("has a coordinate system that is no place in space; write it again")
    return matrix


def read_vtp(data: bytes) -> PointFile:
    """Read VTK's XML PolyData: points of one piece, however they are packed.

    They are written as text, as are normals; all else stays byte for byte. Slicer
    notes its frame as field data.
    """
    if b"<VTKFile" not in data[:500] or b"PolyData" not in data[:2000]:
        raise Bad("is not a .vtp file with points (VTK PolyData)")
    whole = data.split(b"<AppendedData", 1)
    if len(re.findall(rb"<Piece\b", whole[0])) != 1:
        raise Bad("has several pieces; merge them into one")
    top = re.search(rb"<VTKFile[^>]*>", data)
    places = re.search(
        rb"<Points>\s*(<DataArray\b[^>]*?(?:/>|>.*?</DataArray>))", whole[0], re.S
    )
    count = re.search(rb'NumberOfPoints="\s*(\d+)"', whole[0])
    if top is None or places is None or count is None:
        raise Bad(_BROKEN)
    sign, arrays = sign_of(_vtp_space(whole[0])), [places]
    block = re.search(rb"<PointData\b.*?</PointData>", whole[0], re.S)
    active = re.search(rb'<PointData\b[^>]*Normals="([^"]*)"', whole[0])
    if block is not None and active is not None:
        named = re.compile(
            rb'<DataArray\b[^>]*Name="%s"[^>]*?(?:/>|>.*?</DataArray>)'
            % re.escape(active[1]),
            re.S,
        ).search(whole[0], block.start(), block.end())
        arrays += [named] if named is not None else []
    numbers = [_vtp_numbers(a[a.lastindex or 0], top[0], whole) for a in arrays]
    if any(values.shape != (int(count[1]), 3) for values in numbers):
        raise Bad(_BROKEN)
    points = numbers[0] * sign
    normals = numbers[1] * sign if len(numbers) > 1 else None

    def content(moved: Array, beside: Array | None = None) -> bytes:
        new = [(arrays[0], moved * sign)]
        if normals is not None and beside is not None and len(beside):
            new.append((arrays[1], turned(normals, moved, beside) * sign))
        head = whole[0]
        for found, values in sorted(new, key=lambda entry: -entry[0].start()):
            group = found.lastindex or 0
            text = _vtp_array(found[group], values)
            head = head[: found.start(group)] + text + head[found.end(group) :]
        return b"<AppendedData".join([head, *whole[1:]])

    beside = np.empty((0, 3)) if normals is None else tangents(points, normals)
    return PointFile(points, content, frame_of(sign), beside)


def _vtp_space(head: bytes) -> str:
    """Return the frame that field data name, as text or as its letters' numbers."""
    array = re.search(
        rb'<(?:Data)?Array\b[^>]*Name="SPACE"[^>]*>(.*?)</(?:Data)?Array>', head, re.S
    )
    if array is None:
        noted = re.search(rb"SPACE=(RAS|LPS)", head)
        return noted[1].decode() if noted else "LPS"
    words = re.sub(rb"<.*?>", b" ", array[1]).split()
    if all(word.isdigit() for word in words):
        return "".join(chr(int(w) % 128) for w in words if int(w)).strip() or "LPS"
    return b"".join(words).decode("ascii", "replace")


def _vtp_array(element: bytes, values: Array) -> bytes:
    """Return an element with other numbers, as text."""
    start = element.split(b">", 1)[0].rstrip(b"/")
    for name in (b"offset", b"RangeMin", b"RangeMax"):
        start = re.sub(rb'\s%s="[^"]*"' % name, b"", start)
    start = re.sub(rb'format="\w+"', b'format="ascii"', start)
    rows = "\n".join(" ".join(map(number, row)) for row in values.tolist())
    return start + b">\n" + rows.encode() + b"\n</DataArray>"


def _vtp_numbers(element: bytes, top: bytes, whole: list[bytes]) -> Array:
    """Return the numbers ``[N, 3]`` of an element: text, base64, raw, packed or not."""
    start, _, inner = element.partition(b">")
    kind = re.search(rb'type="(\w+)"', start)
    form = re.search(rb'format="(\w+)"', start)
    if kind is None or form is None or kind[1].decode() not in _VTP_TYPES:
        raise Bad(_BROKEN)
    body = inner.rsplit(b"</DataArray>", 1)[0]
    body = re.sub(
        rb"<InformationKey\b.*?(?:/>|</InformationKey>)", b"", body, flags=re.S
    )
    if form[1] == b"ascii":
        return np.array(body.split(), dtype=float).reshape(-1, 3)
    order = ">" if b'byte_order="BigEndian"' in top else "<"
    word = "Q" if b'header_type="UInt64"' in top else "I"
    packed = re.search(rb'compressor="(\w*)"', top)
    if packed is not None and packed[1] != b"vtkZLibDataCompressor":
        raise Bad(f"is packed by {packed[1].decode()}; save it with zlib or as text")
    encoded = True
    if form[1] == b"appended":
        offset = re.search(rb'offset="(\d+)"', start)
        if offset is None or len(whole) < 2:
            raise Bad(_BROKEN)
        told, _, raw = whole[1].partition(b">")
        encoded = b"raw" not in told
        body = raw[raw.index(b"_") + 1 + int(offset[1]) :]
    if encoded:
        body = re.sub(rb"\s", b"", body)
    unpack = _unzipped if packed is not None else _plain
    stored = np.dtype(order + _VTP_TYPES[kind[1].decode()])
    values = np.frombuffer(unpack(body, order + word, encoded), stored)
    return values.astype(np.float64).reshape(-1, 3)


def _take(body: bytes, count: int, encoded: bool) -> bytes:
    """Return the first bytes of a text of base64, or of bytes."""
    if not encoded:
        return body[:count]
    return base64.b64decode(body[: -(-count // 3) * 4])[:count]


def _plain(body: bytes, word: str, encoded: bool) -> bytes:
    room = struct.calcsize(word)
    count = struct.unpack(word, _take(body, room, encoded))[0]
    data = _take(body, room + count, encoded)[room:]
    if len(data) != count:
        raise Bad("is truncated; write it again")
    return data


def _unzipped(body: bytes, word: str, encoded: bool) -> bytes:
    """Return what blocks hold: their number, sizes, and then they themselves."""
    room = struct.calcsize(word)
    blocks = struct.unpack(word, _take(body, room, encoded))[0]
    if not 0 < blocks < 2**20:
        raise Bad(_BROKEN)
    head = (3 + blocks) * room
    numbers = _take(body, head, encoded)
    sizes = struct.unpack(f"{word[0]}{3 + blocks}{word[1]}", numbers)[3:]
    body = body[-(-head // 3) * 4 if encoded else head :]
    data = _take(body, sum(sizes), encoded)
    parts, place = [], 0
    for size in sizes:
        parts.append(zlib.decompress(data[place : place + size]))
        place += size
    return b"".join(parts)
