"""Points and meshes from files, LPS mm, and back with everything else in the file.

Only coordinates change: the columns of a table, the triangles and the data of a mesh
stay as they are, byte for byte where the format is text (GIFTI is written anew, and
STL's normals, which follow from its corners, too).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from icon_nephi.space.frames import Array

_RAS = np.array([-1.0, -1.0, 1.0])


class PointFile(NamedTuple):
    """The points of a file, and how to make such a file of other points.

    Attributes:
        points: ``[N, d]`` float64, LPS mm.
        content: moved points, LPS mm, same shape -> the bytes of the new file.
        frame: what the file's own coordinates are, ``"LPS"`` or ``"RAS"``.
    """

    points: Array
    content: Callable[[Array], bytes]
    frame: str = "LPS"


class _Bad(ValueError):
    """What is wrong with a file, without its name."""


def read_points(name: str, path: Path) -> PointFile:
    """Return the points of a CSV, FCSV, Slicer JSON, VTK, PLY, STL or GIFTI file.

    Args:
        name: of the argument, for errors.
        path: the file; its ending, one of `FORMATS`, says what it is.

    Raises:
        ValueError: missing or broken file, unknown ending, points that are not finite,
            or GIFTI without nibabel.
    """
    name_in_lower = path.name.lower()
    parse = next((p for end, p in FORMATS.items() if name_in_lower.endswith(end)), None)
    if parse is None:
        raise ValueError(f"{name}: {path} must end in {', '.join(FORMATS)}")
    if not path.is_file():
        raise ValueError(f"{name}: {path} does not exist or is not a file")
    try:
        file = parse(path.read_bytes())
        if file.points.ndim != 2 or file.points.shape[1] not in (2, 3):
            raise _Bad("holds no points")
        if not np.isfinite(file.points).all():
            raise _Bad("must hold finite numbers")
    except _Bad as error:
        raise ValueError(f"{name}: {path} {error}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name}: {path} is not a complete {path.suffix} file; write it again"
        ) from error
    return file


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Bad("cannot be read as text") from error


def _number(value: float) -> str:
    return f"{value:.6f}"


def _coordinates(rows: list[list[str]], columns: list[int]) -> Array:
    try:
        values = [[float(row[c]) for c in columns] for row in rows]
    except (ValueError, IndexError):
        values = [[np.nan]]
    if not np.isfinite(values).all():
        raise _Bad(f"must hold rows of {len(columns)} finite numbers")
    return np.array(values, dtype=float).reshape(-1, len(columns))


def _table(rows: list[list[str]], columns: list[int], moved: Array) -> str:
    """Return the table as CSV text with other coordinates."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row, point in zip(rows, moved.tolist(), strict=True):
        cells = list(row)
        for column, value in zip(columns, point, strict=True):
            cells[column] = _number(value)
        writer.writerow(cells)
    return out.getvalue()


def with_column(table: bytes, name: str, values: Array) -> bytes:
    """Return CSV with one more column, a number ``[N]`` a row."""
    head, *rows = table.decode().splitlines()
    cells = [name, *map(_number, values.tolist())]
    lines = zip((head, *rows), cells, strict=True)
    return "".join(f"{row},{cell}\n" for row, cell in lines).encode()


def _read_csv(data: bytes) -> PointFile:
    """Read columns x, y(, z), whatever else there is beside them."""
    try:
        lines = [row for row in csv.reader(_text(data).splitlines()) if "".join(row)]
    except csv.Error as error:
        raise _Bad("cannot be read as text") from error
    names = [cell.strip().lower() for cell in lines[0]] if lines else []
    if not {"x", "y"} <= set(names) or len(set(names)) < len(names):
        first = ",".join(names)[:60]
        raise _Bad(f"must begin with the line x,y,z (in 2D x,y), got {first!r}")
    columns = [names.index(axis) for axis in "xyz" if axis in names]
    rows = lines[1:]
    if any(len(row) != len(names) for row in rows):
        cells = f"{len(names)} cells, of them " if len(names) > len(columns) else ""
        raise _Bad(f"must hold rows of {cells}{len(columns)} finite numbers")
    head = ",".join(lines[0]) + "\n"
    points = _coordinates(rows, columns)
    return PointFile(
        points, lambda moved: (head + _table(rows, columns, moved)).encode()
    )


def _sign(frame: str) -> Array:
    if frame not in ("LPS", "RAS"):
        raise _Bad(f"has coordinates in {frame}; save it in LPS or RAS")
    return _RAS if frame == "RAS" else np.ones(3)


def _read_fcsv(data: bytes) -> PointFile:
    """Read fiducials of 3D Slicer; the header says LPS or RAS (in old ones 1 or 0)."""
    text = _text(data)
    header = [line for line in text.splitlines() if line.startswith("#")]
    body = [line for line in text.splitlines() if line and not line.startswith("#")]
    noted = re.search(r"CoordinateSystem\s*=\s*(\w+)", "\n".join(header))
    frame = noted[1].upper() if noted else "0"
    frame = {"0": "RAS", "1": "LPS", "2": "IJK"}.get(frame, frame)
    sign, columns, rows = _sign(frame), [1, 2, 3], list(csv.reader(body))
    head = "".join(f"{line}\n" for line in header)
    return PointFile(
        _coordinates(rows, columns) * sign,
        lambda moved: (head + _table(rows, columns, moved * sign)).encode(),
        frame,
    )


def _read_markups(data: bytes) -> PointFile:
    """Read markups of 3D Slicer, JSON: the control points of all lists in the file."""
    whole = json.loads(_text(data))
    owners: list[tuple[dict[str, Any], Array]] = []
    frames = []
    for markup in whole["markups"]:
        frames.append(markup.get("coordinateSystem", "LPS").upper())
        owners += [(p, _sign(frames[-1])) for p in markup["controlPoints"]]
    points = [np.array(p["position"], dtype=float) * sign for p, sign in owners]
    frame = frames[0] if frames else "LPS"

    def content(moved: Array) -> bytes:
        for (point, sign), place in zip(owners, moved, strict=True):
            point["position"] = (place * sign).tolist()
        return (json.dumps(whole, indent=2) + "\n").encode()

    return PointFile(np.array(points).reshape(-1, 3), content, frame)


def _read_vtk(data: bytes) -> PointFile:
    """Read legacy VTK, ASCII or binary; Slicer notes its frame in the second line."""
    start = re.search(rb"^POINTS\s+(\d+)\s+(float|double)[^\n]*\n", data, re.M | re.I)
    top = data[:400].split(b"\n", 4)
    if not data.startswith(b"# vtk DataFile") or start is None or len(top) < 4:
        raise _Bad("is not a legacy .vtk file with points; save it as one")
    noted = re.search(rb"SPACE=(\w+)", top[1])
    frame = noted[1].decode() if noted else "LPS"
    sign, count = _sign(frame), 3 * int(start[1])
    kind = np.dtype(">f4" if start[2].lower() == b"float" else ">f8")
    head, rest = data[: start.end()], data[start.end() :]
    if top[2].strip().upper() == b"BINARY":
        tail = rest[kind.itemsize * count :]
        values = np.frombuffer(rest, kind, count)

        def encode(moved: Array) -> bytes:
            return moved.astype(kind).tobytes()

    else:
        words = rest.split(None, count)
        tail = b"\n" + words.pop() if len(words) > count else b""
        values = np.array(words[:count], dtype=float)

        def encode(moved: Array) -> bytes:
            return b"\n".join(" ".join(map(_number, p)).encode() for p in moved)

    points = values.reshape(-1, 3).astype(np.float64) * sign
    if len(points) != int(start[1]):
        raise _Bad("is truncated; write it again")
    return PointFile(points, lambda moved: head + encode(moved * sign) + tail, frame)


_PLY_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4"},
    **{"uint": "u4", "float": "f4", "double": "f8", "int8": "i1", "uint8": "u1"},
    **{"int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float32": "f4", "float64": "f8"},
}


def _read_ply(data: bytes) -> PointFile:
    """Read PLY, ASCII or binary: x, y, z of its vertices, which come first."""
    end = re.search(rb"^end_header\r?\n", data, re.M)
    if not data.startswith(b"ply") or end is None:
        raise _Bad("is not a .ply file")
    head, rest = data[: end.end()], data[end.end() :]
    text = head.decode("ascii", "replace")
    elements = re.findall(r"^element\s+(\w+)\s+(\d+)", text, re.M)
    if not elements or elements[0][0] != "vertex":
        raise _Bad("must list its vertices first")
    count = int(elements[0][1])
    block = text.split("element vertex", 1)[1].split("element ", 1)[0]
    properties = re.findall(r"^property\s+(\w+)\s+(\w+)", block, re.M)
    names = [name for _, name in properties]
    columns = [names.index(axis) for axis in "xyz"]
    form = re.search(r"^format\s+(\w+)", text, re.M)
    if form is not None and form[1] == "ascii":
        lines = rest.splitlines(keepends=True)
        rows = [[w.decode() for w in line.split()] for line in lines[:count]]
        tail = b"".join(lines[count:])
        points = _coordinates(rows, columns)

        def encode(moved: Array) -> bytes:
            return _table(rows, columns, moved).replace(",", " ").encode()

    else:
        order = ">" if form is not None and "big" in form[1] else "<"
        kind = np.dtype([(n, order + _PLY_TYPES[t]) for t, n in properties])
        records = np.frombuffer(rest, kind, count)
        tail = rest[kind.itemsize * count :]
        points = np.stack([records[axis] for axis in "xyz"], 1).astype(np.float64)

        def encode(moved: Array) -> bytes:
            new = records.copy()
            for axis, column in zip("xyz", moved.T, strict=True):
                new[axis] = column
            return new.tobytes()

    if len(points) != count:
        raise _Bad("is truncated; write it again")
    return PointFile(points, lambda moved: head + encode(moved) + tail)


_FACET = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("rest", "<u2")])


def _read_stl(data: bytes) -> PointFile:
    """Read STL, binary or ASCII: three corners a triangle: N is a multiple of three."""
    count = int.from_bytes(data[80:84], "little")
    if len(data) == 84 + _FACET.itemsize * count:
        facets = np.frombuffer(data, _FACET, count, 84)

        def content(moved: Array) -> bytes:
            new, corners = facets.copy(), moved.reshape(-1, 3, 3)
            new["corners"], new["normal"] = corners, _normals(corners)
            return data[:84] + new.tobytes()

        return PointFile(facets["corners"].reshape(-1, 3).astype(float), content)
    if not data.lstrip().startswith(b"solid"):
        raise _Bad("is truncated, or not an .stl file; write it again")
    text = _text(data)
    vertex = re.compile(r"(?<=vertex)\s+(\S+)\s+(\S+)\s+(\S+)")
    points = _coordinates([list(m) for m in vertex.findall(text)], [0, 1, 2])
    if len(points) % 3:
        raise _Bad("is truncated; write it again")

    def rewritten(moved: Array) -> bytes:
        rows = iter(moved.tolist())
        normals = iter(_normals(moved.reshape(-1, 3, 3)).tolist())
        new = vertex.sub(lambda _: " " + " ".join(map(_number, next(rows))), text)
        normal = re.compile(r"(?<=facet normal)\s+\S+\s+\S+\s+\S+")
        new = normal.sub(lambda _: " " + " ".join(map(_number, next(normals))), new)
        return new.encode()

    return PointFile(points, rewritten)


def _normals(corners: Array) -> Array:
    """Return unit normals ``[N, 3]`` of triangles ``[N, 3, 3]``, or zeros."""
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    unit: Array = normal / np.where(length > 0, length, 1)
    return unit


def _read_gifti(data: bytes) -> PointFile:
    """Read a GIFTI surface: RAS mm in the file."""
    try:
        import nibabel as nib
    except ImportError as error:
        raise _Bad("needs nibabel: pip install icon_nephi[meshes]") from error
    try:
        image: Any = nib.GiftiImage.from_bytes(data)
    except Exception as error:  # of the XML parser, of base64, of zlib
        raise _Bad("is not a complete GIFTI file; write it again") from error
    arrays = image.get_arrays_from_intent("NIFTI_INTENT_POINTSET")
    if not arrays:
        raise _Bad("holds no points (a surface has an array POINTSET)")

    def content(moved: Array) -> bytes:
        arrays[0].data = (moved * _RAS).astype(arrays[0].data.dtype)
        whole: bytes = image.to_bytes()
        return whole

    return PointFile(arrays[0].data.astype(np.float64) * _RAS, content, "RAS")


#: Endings, and who reads such a file.
FORMATS: dict[str, Callable[[bytes], PointFile]] = {
    ".csv": _read_csv,
    ".fcsv": _read_fcsv,
    ".mrk.json": _read_markups,
    ".vtk": _read_vtk,
    ".ply": _read_ply,
    ".stl": _read_stl,
    ".gii": _read_gifti,
}
