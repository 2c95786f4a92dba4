"""Many pairs from a CSV: one after the other, resumable, none stops the others."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from icon_nephi._memory import memory_for
from icon_nephi.commands.register import flags_of
from icon_nephi.io.atomic import write_csv

Row: TypeAlias = dict[str, Any]

FILES = (
    *("fixed", "moving", "fixed_mask", "moving_mask"),
    *("fixed_segmentation", "moving_segmentation"),
    *("landmarks_fixed", "landmarks_moving", "labels_fixed", "labels_moving"),
)
WORDS = ("fixed_modality", "moving_modality")
SUMMARY = "summary.json"
#: Of the table and of summary.csv: the column, and where a summary has the number.
COLUMNS = {
    "seconds": ("seconds",),
    "folds_percent": ("folds_percent",),
    "inverse_consistency_p95_mm": ("inverse_consistency_mm", "p95"),
    "displacement_mean_mm": ("displacement_mm", "mean"),
    "tre_before_mm": ("landmarks_mm", "before", "mean"),
    "tre_mm": ("landmarks_mm", "after", "mean"),
    "dice_before": ("dice", "before", "mean"),
    "dice": ("dice", "after", "mean"),
}
HEADER = ("name", "status", *COLUMNS, "warnings", "error")
#: Of the table: how a column is headed and written.
HEADS = {
    **{"name": ("name", "s"), "status": ("status", "s"), "seconds": ("s", ".1f")},
    "folds_percent": ("folds %", ".2g"),
    "inverse_consistency_p95_mm": ("inverse p95 mm", ".3f"),
    "displacement_mean_mm": ("motion mm", ".2f"),
    **{"tre_before_mm": ("before mm", ".2f"), "tre_mm": ("TRE mm", ".2f")},
    **{"dice_before": ("before", ".3f"), "dice": ("Dice", ".3f")},
}


def read_pairs(path: Path, choices: Sequence[str]) -> list[Row]:
    """What each row gives, by flag, and its name.

    Args:
        path: CSV with the columns fixed and moving and, where wanted, name, `FILES`
            and `WORDS`; relative paths start at its folder.
        choices: the modalities there are.

    Raises:
        ValueError: not such a table.
    """
    if not path.is_file():
        raise ValueError(f"--pairs: {path} does not exist or is not a file")
    try:
        lines = list(csv.reader(path.read_text("utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--pairs: {path} cannot be read as text") from error
    lines = [line for line in lines if "".join(line).strip()]
    header = [cell.strip() for cell in lines[0]] if lines else []
    unknown = [n for n in header if n not in ("name", *FILES, *WORDS)]
    if not {"fixed", "moving"} <= set(header) or unknown:
        odd = (
            f"{unknown[0]!r} is no column" if unknown else "fixed or moving is missing"
        )
        raise ValueError(
            f"--pairs: {path}: {odd}; there are name, {', '.join((*FILES, *WORDS))}"
        )
    if len(lines) < 2 or len(set(header)) < len(header):
        raise ValueError(f"--pairs: {path} must hold each column once and a pair a row")
    rows: list[Row] = []
    for number, line in enumerate(lines[1:], 1):
        if len(line) != len(header):
            raise ValueError(
                f"--pairs: {path}: row {number} has {len(line)} cells, expected "
                f"{len(header)}"
            )
        cells = zip(header, (cell.strip() for cell in line), strict=True)
        given = {name: cell for name, cell in cells if cell}
        row: Row = {"name": given.pop("name", f"pair_{number:03d}")}
        if not re.fullmatch(r"[\w-][\w.-]*", row["name"]):
            raise ValueError(
                f"--pairs: {path}: row {number} has the name {row['name']!r}; use "
                "letters, digits, '_', '-' and '.'"
            )
        for name, cell in given.items():
            if name in WORDS and cell not in choices:
                raise ValueError(
                    f"--pairs: {path}: row {number} has {name} {cell!r}, expected one "
                    f"of {', '.join(choices)}"
                )
            row[name] = cell if name in WORDS else path.parent / cell
        rows.append(row)
    names = [row["name"].lower() for row in rows]
    double = {name for name in names if names.count(name) > 1}
    if double:
        raise ValueError(
            f"--pairs: {path} has the name {min(double)!r} twice; each needs its own"
        )
    return rows


def outputs_in(folder: Path, *, scratch: bool) -> dict[str, Path]:
    """Where the results of a pair go, by flag; the summary is complete when it is."""
    found = {
        "transform_out": folder / "transform.hdf5",
        "inverse_transform_out": folder / "inverse_transform.hdf5",
        "warped_moving_out": folder / "warped.nii.gz",
        "json": folder / SUMMARY,
    }
    return found | ({"save": folder / "pair.nephi"} if scratch else {})


def run_pairs(
    rows: Sequence[Row],
    given: argparse.Namespace,
    run: Callable[[argparse.Namespace], Row],
) -> Iterator[Row]:
    """A row of `HEADER` for each pair; the summary in the folder grows with them.

    A pair whose own summary is there, made with the same flags, is skipped. Whatever a
    pair raises goes into its row. Of several processes (torchrun) each takes its share
    of the rows.

    Args:
        rows: of `read_pairs`.
        given: the flags that all share; ``out_dir`` exists.
        run: registers one pair, writes its outputs and returns its summary.
    """
    done: list[Row] = []
    rank, world = place()
    for row in rows[rank::world]:
        done.append(_one(row, given, run))
        write_csv(summary_in(given.out_dir), HEADER, done)
        yield done[-1]


def place() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def summary_in(folder: Path) -> Path:
    """Where this process writes its rows; run alone afterwards, all are in one."""
    rank, world = place()
    return folder / ("summary.csv" if world == 1 else f"summary_{rank}.csv")


def _one(
    row: Row, given: argparse.Namespace, run: Callable[[argparse.Namespace], Row]
) -> Row:
    folder = given.out_dir / row["name"]
    inputs = {name: value for name, value in row.items() if name != "name"}
    outputs = outputs_in(folder, scratch=given.model == "none")
    pair = argparse.Namespace(**{**vars(given), **inputs, **outputs, "quiet": True})
    kept = _finished(folder / SUMMARY, flags_of(pair))
    if kept is not None:
        return _as_row(row["name"], "skipped", kept)
    fresh = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        with memory_for("this"):
            return _as_row(row["name"], "done", run(pair))
    except Exception as error:  # the other pairs go on
        plain = isinstance(error, ValueError | TypeError | MemoryError)
        kind = "" if plain else type(error).__name__
        said = " ".join(f"{kind}: {error}".lstrip(": ").split())
        return {"name": row["name"], "status": "failed", "error": said}
    finally:
        if fresh and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _finished(path: Path, flags: dict[str, str]) -> Row | None:
    try:
        found: Row = json.loads(path.read_text("utf-8"))
        return found if found["flags"] == flags else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _as_row(name: str, status: str, summary: Row) -> Row:
    row: Row = {"name": name, "status": status}
    for column, keys in COLUMNS.items():
        value: Any = summary
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            row[column] = value
    return row | {"warnings": "; ".join(summary.get("warnings", ()))}


def aligned(rows: Sequence[dict[str, Any]], heads: dict[str, tuple[str, str]]) -> str:
    """Rows as columns: key -> its head and format; errors stand behind their rows."""
    used = [key for key in heads if any(row.get(key) is not None for row in rows)]
    lines = [[heads[key][0] for key in used]]
    for row in rows:
        cells = ((row.get(key), heads[key][1]) for key in used)
        lines.append(["-" if v is None else format(v, form) for v, form in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    errors = ["", *(f"  {row['error']}" if "error" in row else "" for row in rows)]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + error
        for line, error in zip(lines, errors, strict=True)
    )
