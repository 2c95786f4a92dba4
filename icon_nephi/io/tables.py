"""Points in tables: CSV, and fiducials and markups of 3D Slicer."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from icon_nephi.io.point_file import (
    Bad,
    PointFile,
    frame_of,
    number,
    sign_of,
    text_of,
)
from icon_nephi.space.frames import Array

_NAMES = (
    "name",
    "label",
    "id",
)  # columns that may name points, the first that is there


def rows_of(text: str) -> list[list[str]]:
    """Return the rows of CSV that are not empty; quoted cells may break lines."""
    try:
        return [
            row for row in csv.reader(io.StringIO(text, newline="")) if "".join(row)
        ]
    except csv.Error as error:
        raise Bad("cannot be read as text") from error


def coordinates(rows: list[list[str]], columns: list[int]) -> Array:
    """Return the numbers ``[N, len(columns)]`` in columns of a table."""
    try:
        values = [[float(row[c]) for c in columns] for row in rows]
    except (ValueError, IndexError):
        values = [[np.nan]]
    if not np.isfinite(values).all():
        raise Bad(f"must hold rows of {len(columns)} finite numbers")
    return np.array(values, dtype=float).reshape(-1, len(columns))


def as_csv(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as CSV text."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def with_coordinates(
    rows: list[list[str]], columns: list[int], moved: Array
) -> list[list[str]]:
    """Return the table with other coordinates."""
    table = [list(row) for row in rows]
    for cells, point in zip(table, moved.tolist(), strict=True):
        for column, value in zip(columns, point, strict=True):
            cells[column] = number(value)
    return table


def with_column(table: bytes, name: str, values: Array) -> bytes:
    """Return CSV with one more column, a number ``[N]`` a row."""
    rows = rows_of(table.decode())
    cells = [name, *map(number, values.tolist())]
    return as_csv(
        [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    ).encode()


def read_csv(data: bytes) -> PointFile:
    """Read columns x, y(, z), whatever else there is beside them."""
    lines = rows_of(text_of(data))
    names = [cell.strip().lower() for cell in lines[0]] if lines else []
    if not {"x", "y"} <= set(names) or len(set(names)) < len(names):
        first = ",".join(names)[:60]
        hint = ""
        if len(names) == 1 and re.search(r"[;\t]", first):
            hint = "; separate its cells by commas, and write 1.5 for 1,5"
        raise Bad(f"must begin with the line x,y,z (in 2D x,y), got {first!r}{hint}")
    columns = [names.index(axis) for axis in "xyz" if axis in names]
    head, *rows = lines
    if any(len(row) != len(names) for row in rows):
        cells = f"{len(names)} cells, of them " if len(names) > len(columns) else ""
        raise Bad(f"must hold rows of {cells}{len(columns)} finite numbers")
    points = coordinates(rows, columns)
    named = next((names.index(n) for n in _NAMES if n in names), None)

    def content(moved: Array, beside: Array | None = None) -> bytes:
        return as_csv([head, *with_coordinates(rows, columns, moved)]).encode()

    return PointFile(points, content, names=_all_named(rows, named))


def _all_named(rows: list[list[str]], column: int | None) -> list[str] | None:
    """Return what a column says, if it names every row."""
    if column is None or any(len(row) <= column for row in rows):
        return None
    names = [row[column].strip() for row in rows]
    return names if all(names) else None


def read_fcsv(data: bytes) -> PointFile:
    """Read fiducials of 3D Slicer; the header says LPS or RAS (in old ones 1 or 0)."""
    lines = [line.rstrip("\r") for line in text_of(data).split("\n")]
    header = [line for line in lines if line.startswith("#")]
    body = "\n".join(line for line in lines if line and not line.startswith("#"))
    noted = re.search(r"CoordinateSystem\s*=\s*(\w+)", "\n".join(header))
    sign, columns, rows = sign_of(noted[1] if noted else 0), [1, 2, 3], rows_of(body)
    head = "".join(f"{line}\n" for line in header)

    def content(moved: Array, beside: Array | None = None) -> bytes:
        table = with_coordinates(rows, columns, moved * sign)
        return (head + as_csv(table)).encode()

    points = coordinates(rows, columns) * sign
    return PointFile(points, content, frame_of(sign), names=_all_named(rows, 11))


def read_markups(data: bytes) -> PointFile:
    """Read markups of 3D Slicer, JSON: the control points of all lists in the file.

    Points that are not placed stay as they are. The centres of boxes and planes are
    moved along; their sizes and directions stay.
    """
    whole = json.loads(text_of(data))
    owners: list[tuple[dict[str, Any], str, Array]] = []
    centres: list[tuple[dict[str, Any], str, Array]] = []
    signs, unplaced = [], 0
    for markup in whole["markups"]:
        sign = sign_of(markup.get("coordinateSystem", "LPS"))
        signs.append(sign)
        for point in markup.get("controlPoints", ()):
            if _is_placed(point):
                owners.append((point, "position", sign))
            else:
                unplaced += 1
        for name in ("center", "origin"):
            if isinstance(markup.get(name), list) and len(markup[name]) == 3:
                centres.append((markup, name, sign))

    def places(held: list[tuple[dict[str, Any], str, Array]]) -> Array:
        rows = [np.array(o[name], dtype=float).reshape(3) * s for o, name, s in held]
        return np.array(rows).reshape(-1, 3)

    def content(moved: Array, beside: Array | None = None) -> bytes:
        rows = moved if beside is None else np.concatenate([moved, beside])
        for (owner, name, sign), place in zip(owners + centres, rows, strict=False):
            owner[name] = (place * sign).tolist()
        return (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()

    labels = [str(point.get("label", "")).strip() for point, _, _ in owners]
    note = f"{unplaced} points have no position; they stay as they are"
    return PointFile(
        places(owners),
        content,
        frame_of(signs[0]) if signs else "LPS",
        places(centres),
        labels if all(labels) else None,
        [note] if unplaced else (),
    )


def _is_placed(point: dict[str, Any]) -> bool:
    """Return whether a control point has a position; templates have some without."""
    status = point.get("positionStatus")
    if status is not None and status != "defined":
        return False
    position = point.get("position")
    if status == "defined":
        return True
    return isinstance(position, list) and bool(position) and None not in position
