"""Many pairs from a CSV: one after the other, resumable, none stops the others."""

from __future__ import annotations

import csv
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from icon_nephi._memory import memory_for
from icon_nephi.commands import register
from icon_nephi.commands.flags import MODALITIES, RegisterFlags
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


def register_pairs(flags: RegisterFlags, command: list[str]) -> tuple[list[Row], Path]:
    """Register the pairs of ``--pairs``; return a row of `HEADER` for each, and where.

    That file, summary.csv in ``--out_dir``, grows with them. A pair whose own summary
    is there, made with the same flags, is skipped. Whatever a pair raises goes into its
    row. Of several processes (torchrun) each takes its share of the rows.

    Args:
        flags: that all share.
        command: what was typed.

    Raises:
        ValueError: flags that do not go with a table, or not such a table.
        KeyboardInterrupt: with what it has come to.
    """
    pairs, folder = _check_flags(flags)
    # As torchrun says; run alone afterwards, all rows are in one file.
    rank, world = (
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )
    summary = folder / ("summary.csv" if world == 1 else f"summary_{rank}.csv")
    rows, done = read_pairs(pairs)[rank::world], list[Row]()
    with tqdm(rows, "registering", disable=flags.quiet, leave=False) as bar:
        try:
            for row in bar:
                done.append(_register_row(row, flags, folder, command))
                write_csv(summary, HEADER, done)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{len(done)} of {len(rows)} pairs are done, and the same command goes "
                "on with the others"
            ) from None
    return done, summary


def _check_flags(flags: RegisterFlags) -> tuple[Path, Path]:
    """Return ``--pairs`` and ``--out_dir`` if all flags are for many pairs."""
    if flags.pairs is None or flags.out_dir is None:
        raise ValueError("--pairs and --out_dir belong together: give both")
    for name in (*register.OUTPUTS, *FILES):
        if getattr(flags, name) is not None:
            raise ValueError(
                f"--{name} is for one pair; with --pairs inputs are columns of the "
                "table and outputs lie in --out_dir"
            )
    if flags.keep_on_interrupt:
        raise ValueError(
            "--keep_on_interrupt is for one pair; of --pairs the finished ones are "
            "kept in any case, and the one that was stopped is done again next time"
        )
    if not flags.out_dir.is_dir() or not os.access(flags.out_dir, os.W_OK):
        what = "cannot be written to" if flags.out_dir.is_dir() else "is not a folder"
        raise ValueError(f"--out_dir: {flags.out_dir} {what}")
    return flags.pairs, flags.out_dir


def read_pairs(path: Path) -> list[Row]:
    """Return what each row gives, by flag, and its name.

    Args:
        path: CSV with the columns fixed and moving and, where wanted, name, `FILES`
            and `WORDS`; relative paths start at its folder.

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
        where = f"--pairs: {path}: row {number} has"
        if len(line) != len(header):
            raise ValueError(f"{where} {len(line)} cells, expected {len(header)}")
        row: Row = {"name": f"pair_{number:03d}"}
        for name, cell in zip(header, map(str.strip, line), strict=True):
            if name in WORDS and cell and cell not in MODALITIES:
                raise ValueError(
                    f"{where} {name} {cell!r}, expected one of {', '.join(MODALITIES)}"
                )
            if cell:
                row[name] = path.parent / cell if name in FILES else cell
        if not re.fullmatch(r"[\w-][\w.-]*", row["name"]):
            raise ValueError(
                f"{where} the name {row['name']!r}; use letters, digits, '_', '-' and "
                "'.'"
            )
        rows.append(row)
    names = [row["name"].lower() for row in rows]
    double = {name for name in names if names.count(name) > 1}
    if double:
        raise ValueError(
            f"--pairs: {path} has the name {min(double)!r} twice; each needs its own"
        )
    return rows


def _register_row(
    row: Row, shared: RegisterFlags, home: Path, command: list[str]
) -> Row:
    """Register one pair into its folder; return its row of `HEADER`."""
    name, folder = row["name"], home / row["name"]
    flags = replace(
        shared,
        **{flag: value for flag, value in row.items() if flag != "name"},
        transform_out=folder / "transform.hdf5",
        inverse_transform_out=folder / "inverse_transform.hdf5",
        warped_moving_out=folder / "warped.nii.gz",
        json=folder / SUMMARY,
        save=folder / "pair.nephi" if shared.model == "none" else None,
        quiet=True,
    )
    finished = _finished(folder / SUMMARY, register.flags_of(flags))
    if finished is not None:
        return _as_row(name, "skipped", finished)
    fresh = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        with memory_for("this"):
            return _as_row(name, "done", register.run(flags, command))
    except Exception as error:  # the other pairs go on
        plain = isinstance(error, ValueError | TypeError | MemoryError)
        kind = "" if plain else type(error).__name__
        sentence = " ".join(f"{kind}: {error}".lstrip(": ").split())
        return {"name": name, "status": "failed", "error": sentence}
    finally:
        if fresh and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _finished(path: Path, flags: dict[str, str]) -> Row | None:
    """Return the summary in a file if it was made with these flags."""
    try:
        summary: Row = json.loads(path.read_text("utf-8"))
        return summary if summary["flags"] == flags else None
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
