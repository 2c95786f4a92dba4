"""Meshes as bytes: VTK, PLY, STL, OBJ. Triangles and data stay byte for byte.

What the file says of its frame holds (``SPACE=RAS``, as 3D Slicer writes it), else it
is LPS. Normals are turned with the surface.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from icon_nephi.io.point_file import (
    Bad,
    PointFile,
    frame_of,
    number,
    sign_of,
    tangents,
    text_of,
    turned,
)
from icon_nephi.io.tables import coordinates
from icon_nephi.space.frames import Array

_TRUNCATED = "is truncated; write it again"


def _space(text: bytes) -> Array:
    """Return the sign of the frame that a header names, LPS if it names none."""
    noted = re.search(rb"SPACE=(\w+)", text)
    return sign_of(noted[1].decode("ascii", "replace") if noted else "LPS")


def _rows(values: Array) -> bytes:
    return b"\n".join(" ".join(map(number, row)).encode() for row in values)


def read_vtk(data: bytes) -> PointFile:
    """Read legacy VTK, ASCII or binary; Slicer notes its frame in the second line."""
    start = re.search(rb"^POINTS\s+(\d+)\s+(float|double)[^\n]*\n", data, re.M | re.I)
    top = data[:400].split(b"\n", 4)
    if not data.startswith(b"# vtk DataFile") or start is None or len(top) < 4:
        raise Bad("is not a legacy .vtk file with points; save it as one")
    sign, count = _space(top[1]), int(start[1])
    binary = top[2].strip().upper() == b"BINARY"
    values, encode, tail = _vtk_numbers(data[start.end() :], start[2], count, binary)
    if len(values) != count:
        raise Bad(_TRUNCATED)
    head, points = data[: start.end()], values * sign
    found = _vtk_normals(tail, count, binary)

    def content(moved: Array, beside: Array | None = None) -> bytes:
        rest = tail
        if found is not None and beside is not None and len(beside):
            before, normals, encode_normals, after = found
            new = turned(normals * sign, moved, beside) * sign
            rest = before + encode_normals(new) + after
        return head + encode(moved * sign) + rest

    beside = np.empty((0, 3))
    if found is not None:
        beside = tangents(points, found[1] * sign)
    return PointFile(points, content, frame_of(sign), beside)


def _vtk_numbers(
    rest: bytes, kind: bytes, count: int, binary: bool
) -> tuple[Array, Callable[[Array], bytes], bytes]:
    """Return ``[count, 3]`` numbers, what encodes such, and the bytes behind them."""
    if binary:
        stored = np.dtype(">f4" if kind.lower() == b"float" else ">f8")
        values = np.frombuffer(rest, stored, 3 * count).reshape(-1, 3)
        tail = rest[stored.itemsize * 3 * count :]
        return values.astype(float), lambda new: new.astype(stored).tobytes(), tail
    words = rest.split(None, 3 * count)
    tail = b"\n" + words.pop() if len(words) > 3 * count else b""
    values = np.array(words[: 3 * count], dtype=float).reshape(-1, 3)
    return values, _rows, tail


def _vtk_normals(
    tail: bytes, count: int, binary: bool
) -> tuple[bytes, Array, Callable[[Array], bytes], bytes] | None:
    """Return what is before the points' normals, these, what encodes such, the rest."""
    begin = re.search(rb"^POINT_DATA\s+\d+", tail, re.M)
    if begin is None or not count:
        return None
    start = re.search(rb"^NORMALS\s+\S+\s+(float|double)[^\n]*\n", tail, re.M)
    cells = re.search(rb"^CELL_DATA\s+\d+", tail, re.M)
    if start is None or start.start() < begin.start():
        return None
    if cells is not None and begin.start() < cells.start() < start.start():
        return None
    normals, encode, rest = _vtk_numbers(tail[start.end() :], start[1], count, binary)
    if len(normals) != count or not np.isfinite(normals).all():
        raise Bad(_TRUNCATED)
    return tail[: start.end()], normals, encode, rest


_PLY_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4"},
    **{"uint": "u4", "float": "f4", "double": "f8", "int8": "i1", "uint8": "u1"},
    **{"int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float32": "f4", "float64": "f8"},
}
_NORMAL = ("nx", "ny", "nz")


def read_ply(data: bytes) -> PointFile:
    """Read PLY, ASCII or binary: x, y, z of its vertices, which come first."""
    end = re.search(rb"^end_header\r?\n", data, re.M)
    if not data.startswith(b"ply") or end is None:
        raise Bad("is not a .ply file")
    head, rest = data[: end.end()], data[end.end() :]
    text = head.decode("ascii", "replace")
    elements = re.findall(r"^element\s+(\w+)\s+(\d+)", text, re.M)
    if not elements or elements[0][0] != "vertex":
        raise Bad("must list its vertices first")
    count, sign = int(elements[0][1]), _space(head)
    block = text.split("element vertex", 1)[1].split("element ", 1)[0]
    properties = re.findall(r"^property\s+(\w+)\s+(\w+)", block, re.M)
    names = [name for _, name in properties]
    columns = [*"xyz", *(_NORMAL if set(_NORMAL) <= set(names) else ())]
    form = re.search(r"^format\s+(\w+)", text, re.M)
    if form is not None and form[1] == "ascii":
        lines = rest.splitlines(keepends=True)
        rows = [[w.decode() for w in line.split()] for line in lines[:count]]
        tail = b"".join(lines[count:])
        places = [names.index(name) for name in columns]
        values = coordinates(rows, places)

        def encode(new: Array) -> bytes:
            for cells, numbers in zip(rows, new.tolist(), strict=True):
                for place, value in zip(places, numbers, strict=True):
                    cells[place] = number(value)
            return "".join(" ".join(cells) + "\n" for cells in rows).encode()

    else:
        order = ">" if form is not None and "big" in form[1] else "<"
        kind = np.dtype([(n, order + _PLY_TYPES[t]) for t, n in properties])
        records = np.frombuffer(rest, kind, count)
        tail = rest[kind.itemsize * count :]
        values = np.stack([records[name] for name in columns], 1).astype(np.float64)

        def encode(new: Array) -> bytes:
            changed = records.copy()
            for name, column in zip(columns, new.T, strict=True):
                changed[name] = column
            return changed.tobytes()

    if len(values) != count:
        raise Bad(_TRUNCATED)
    points, normals = values[:, :3] * sign, values[:, 3:] * sign[: len(columns) - 3]
    if not np.isfinite(values).all():
        raise Bad("must hold finite numbers")

    def content(moved: Array, beside: Array | None = None) -> bytes:
        new = normals
        if normals.size and beside is not None and len(beside):
            new = turned(normals, moved, beside)
        both = [moved * sign, new * sign[: new.shape[1]]]
        return head + encode(np.concatenate(both, 1)) + tail

    beside = tangents(points, normals) if normals.size else np.empty((0, 3))
    return PointFile(points, content, frame_of(sign), beside)


FACET = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("rest", "<u2")])
_VERTEX = re.compile(r"(?<=vertex)\s+(\S+)\s+(\S+)\s+(\S+)", re.I)
_FACET_NORMAL = re.compile(r"(?<=facet normal)\s+\S+\s+\S+\s+\S+", re.I)


def read_stl(data: bytes) -> PointFile:
    """Read STL, binary or ASCII: three corners a triangle: N is a multiple of three."""
    count = int.from_bytes(data[80:84], "little")
    size = 84 + FACET.itemsize * count
    text_like = data.lstrip()[:5].lower() == b"solid"
    if len(data) == size or (84 <= size < len(data) and not text_like):
        facets, sign = np.frombuffer(data, FACET, count, 84), _space(data[:80])

        def content(moved: Array, beside: Array | None = None) -> bytes:
            new, corners = facets.copy(), (moved * sign).reshape(-1, 3, 3)
            new["corners"], new["normal"] = corners, normals_of(corners)
            return data[:84] + new.tobytes() + data[size:]

        points = facets["corners"].reshape(-1, 3).astype(float)
        return PointFile(points * sign, content, frame_of(sign))
    if not text_like:
        raise Bad("is truncated, or not an .stl file; write it again")
    text, sign = text_of(data), _space(data.lstrip().split(b"\n", 1)[0])
    points = coordinates([list(m) for m in _VERTEX.findall(text)], [0, 1, 2])
    if len(points) % 3 or len(points) != 3 * len(_FACET_NORMAL.findall(text)):
        raise Bad(_TRUNCATED)

    def rewritten(moved: Array, beside: Array | None = None) -> bytes:
        corners = moved * sign
        rows = iter(corners.tolist())
        normals = iter(normals_of(corners.reshape(-1, 3, 3)).tolist())
        new = _VERTEX.sub(lambda _: " " + " ".join(map(number, next(rows))), text)
        new = _FACET_NORMAL.sub(
            lambda _: " " + " ".join(map(number, next(normals))), new
        )
        return new.encode()

    return PointFile(points * sign, rewritten, frame_of(sign))


def normals_of(corners: Array) -> Array:
    """Return unit normals ``[N, 3]`` of triangles ``[N, 3, 3]``, or zeros."""
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    unit: Array = normal / np.where(length > 0, length, 1)
    return unit


def read_obj(data: bytes) -> PointFile:
    """Read Wavefront OBJ: its vertices; normals turn with the vertex that uses them."""
    text = text_of(data)
    head = "\n".join(x for x in text.splitlines()[:50] if x.startswith("#"))
    sign, lines = _space(head.encode()), text.split("\n")
    words = [line.split() for line in lines]
    vertices = [i for i, w in enumerate(words) if w and w[0] == "v"]
    normals = [i for i, w in enumerate(words) if w and w[0] == "vn"]
    points = coordinates([words[i] for i in vertices], [1, 2, 3]) * sign
    old = coordinates([words[i] for i in normals], [1, 2, 3]) * sign
    owner = _owners(words, len(points), len(old))

    def content(moved: Array, beside: Array | None = None) -> bytes:
        new = list(lines)
        for i, point in zip(vertices, (moved * sign).tolist(), strict=True):
            new[i] = " ".join(["v", *map(number, point), *words[i][4:]])
        if len(old) and beside is not None and len(beside):
            facing = turned(old, moved[owner], beside) * sign
            for i, normal in zip(normals, facing.tolist(), strict=True):
                new[i] = " ".join(["vn", *map(number, normal)])
        return "\n".join(new).encode()

    beside = tangents(points[owner], old) if len(old) else np.empty((0, 3))
    return PointFile(points, content, frame_of(sign), beside)


def _owners(words: list[list[str]], points: int, normals: int) -> Array:
    """Return ``[normals]``: a vertex that each normal is used at."""
    owner: dict[int, int] = {}
    for row in words:
        if row and row[0] in ("f", "l", "p"):
            for corner in row[1:]:
                parts = corner.split("/")
                vertex = int(parts[0])
                vertex = vertex - 1 if vertex > 0 else points + vertex
                if not 0 <= vertex < points:
                    raise Bad("names vertices that it does not hold; write it again")
                if len(parts) == 3 and parts[2]:
                    normal = int(parts[2])
                    normal = normal - 1 if normal > 0 else normals + normal
                    if not 0 <= normal < normals:
                        raise Bad("names normals that it does not hold; write it again")
                    owner.setdefault(normal, vertex)
    return np.array([owner.get(i, min(i, points - 1)) for i in range(normals)], int)
