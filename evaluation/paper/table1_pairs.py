"""The paper's Table 1: pairs registered one by one, without training.

    python -m evaluation.paper.table1_pairs --copd DIR --out table1.csv
    python -m evaluation.paper.table1_pairs --fourdct DIR --external ants=FOLDER
        --out t.csv
    python -m evaluation.paper.table1_pairs --small --out table1.csv

mTRE over DIR-Lab's 300 landmarks of each case, interpolated and snapped to voxels,
expiration fixed; Dice for folders of label maps. ``--external NAME=FOLDER`` scores
another program: a file CASE.h5, CASE.nii.gz ... for each case (see dirlab.read_mover).
The figures of other systems are those printed in the paper, marked "quoted": other
machines, other programs; nothing here has checked them.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluation import csv_file, geometry_of, machine, version, write_csv
from evaluation.accuracy.peers import voxel_centres
from evaluation.paper.dirlab import (
    find_dirlab,
    find_external,
    find_people,
    landmark_errors,
    read_mover,
)
from icon_nephi.commands import compare, methods
from icon_nephi.commands.compare import alone
from icon_nephi.commands.methods import Options
from icon_nephi.commands.text import aligned
from icon_nephi.io.itk_images import resample_to
from icon_nephi.report.measure import flips_on_grid, mean_dice_at

COLUMNS = (
    *("method", "source", "case", "error", "before_tre_mm", "tre_mm"),
    *("tre_snapped_mm", "before_dice", "dice", "folds_voxels_percent"),
    *("folds_points_percent", "inverse_consistency_mm", "representation_m"),
    *("encoder_m", "inference_ms", "peak_gib", "training_peak_gib", "steps"),
    *("seconds", "device", "machine", "icon_nephi", "torch"),
)
QUOTED = [  # DIR-Lab COPDgene, 23.36 mm before; the paper's Table 1
    {"method": "PTVReg", "tre_mm": 0.84, "inference_ms": 442e3, "folds": 0.60},
    {"method": "RRN", "tre_mm": 0.83},
    {"method": "NePhi (S)", "tre_mm": 1.73, "inference_ms": 150e3, "folds": 3.4e-5},
]
CLAIM = "optimised for each pair, 1.73 mm on DIR-Lab COPDgene and 3.4e-5 % folds"
SHAPE = (40, 36, 40)  # of the phantoms of --small


# --- one row ------------------------------------------------------------------------


def work(read: Callable[[], Any], method: Any, options: Options) -> dict[str, Any]:
    """Return icon_nephi.commands.compare's row, with DIR-Lab's errors added."""
    case, kept = read(), []

    def keep(case: Any, options: Options) -> Any:
        kept.append(method(case, options))
        return kept[0]

    row = compare.measure(case, keep, options)
    if case.fixed_points is not None:
        maps = compare.maps_of(kept[0], options.device)
        row |= landmark_errors(case, maps.forward(case.fixed_points))
    return row


def score_file(read: Callable[[], Any], path: Path) -> dict[str, Any]:
    """Return the errors of a transform or displacement field of another program."""
    case = read()
    move = read_mover(path, case.fixed.GetImageDimension())
    row: dict[str, Any] = {}
    if case.fixed_points is not None:
        before = landmark_errors(case, case.fixed_points)
        row["before_tre_mm"] = before["tre_mm"]
        row |= landmark_errors(case, move(case.fixed_points))
    elif case.fixed_labels is None:
        return row
    start = voxel_centres(case.fixed)
    moved = move(start.reshape(-1, start.shape[-1])).reshape(start.shape)
    row["folds_voxels_percent"] = flips_on_grid(moved, geometry_of(case.fixed))
    if case.fixed_labels is not None:
        truth = resample_to(case.fixed_labels, case.fixed)
        row["before_dice"], row["dice"] = (
            mean_dice_at(truth, case.moving_labels, at, case.label_ids)
            for at in (start, moved)
        )
    return row


# --- the table ----------------------------------------------------------------------


def quoted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the paper's figures as rows of this table."""
    kept = []
    for row in rows:
        copy = {k: v for k, v in row.items() if k != "folds"}
        copy |= {"source": "quoted", "case": "DIR-Lab COPDgene, mean of 10"}
        kept.append(copy | {"folds_voxels_percent": row.get("folds")})
    return kept


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each method: the mean over its cases, where all have numbers."""
    found = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name and not row.get("error")]
        if not mine:
            continue
        row = {"method": name, "source": mine[0]["source"]}
        row["case"] = f"mean of {len(mine)}"
        for key in COLUMNS[4:-4]:
            values = [one.get(key) for one in mine]
            if all(isinstance(value, int | float) for value in values):
                row[key] = float(np.mean(values))
        found.append(row)
    return found


def text(rows: list[dict[str, Any]]) -> str:
    """Return the means and the quoted figures as lines."""
    heads = {name: (name, "s") for name in ("method", "source", "case")}
    return aligned(
        rows,
        heads
        | {
            "tre_mm": ("mTRE mm", ".2f"),
            "tre_snapped_mm": ("snapped", ".2f"),
            "dice": ("Dice", ".3f"),
            "folds_voxels_percent": ("folds %", ".2g"),
            "representation_m": ("map M", ".2f"),
            "encoder_m": ("encoder M", ".2f"),
            "inference_ms": ("ms", ".0f"),
            "peak_gib": ("peak GiB", ".2f"),
            "training_peak_gib": ("train GiB", ".2f"),
        },
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the error of every method, quoted figures in grey."""
    from matplotlib.figure import Figure

    key = "tre_mm" if any(row.get("tre_mm") is not None for row in rows) else "dice"
    bars = [row for row in rows if row.get(key) is not None]
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(bars)), layout="tight")
    axis = figure.subplots()
    colours = {"quoted": "0.7", "measured": "C0", "external": "C1"}
    for place, row in enumerate(bars):
        axis.barh(place, row[key], color=colours[row["source"]])
    axis.set_yticks(
        range(len(bars)), [f"{r['method']} ({r['source']})" for r in bars], fontsize=8
    )
    axis.invert_yaxis()
    axis.set_xlabel("mTRE, mm" if key == "tre_mm" else "Dice")
    figure.savefig(path, dpi=100)


def verdict(claim: str, name: str, rows: list[dict[str, Any]], goal: float) -> str:
    """Return the paper's statement, ours, and whether they agree."""
    mine = next((r for r in rows if r["method"] == name), None)
    if mine is None or mine.get("tre_mm") is None:
        return f"Paper: {claim}. Ours: no landmarks registered, nothing to compare."
    ours = (
        f"{mine['tre_mm']:.2f} mm ({mine['case']}), "
        f"{mine.get('folds_voxels_percent', float('nan')):.2g} % folds"
    )
    if mine.get("data") != "copd":
        return f"Paper: {claim}. Ours: {ours}, on other images: cannot be compared."
    agrees = "agrees" if mine["tre_mm"] <= goal else "does not agree"
    return f"Paper: {claim}. Ours: {ours}: {agrees}."


# --- the command --------------------------------------------------------------------


def parser(doc: str, name: str) -> argparse.ArgumentParser:
    prog = f"python -m evaluation.paper.{name}"
    new = argparse.ArgumentParser(prog=prog, description=doc)
    add = new.add_argument
    data = new.add_mutually_exclusive_group(required=True)
    data.add_argument("--copd", type=Path, help="folder of DIR-Lab's COPDgene")
    data.add_argument("--fourdct", type=Path, help="folder of DIR-Lab's 4DCT")
    data.add_argument("--people", type=Path, help="folder of images and label maps")
    data.add_argument("--small", action="store_true", help="two small phantoms")
    add("--numbers", type=int, nargs="+", help="cases of DIR-Lab (default: all)")
    add("--pairs", type=int, help="of people (default: all)")
    add("--fixed", choices=("exhale", "inhale"), default="exhale")
    add("--external", nargs="+", default=[], metavar="NAME=FOLDER")
    add("--only_external", action="store_true", help="register nothing")
    add("--seconds", type=float, default=600.0, help="of each registration, at most")
    add("--steps", type=int, help="of optimisation, not seconds")
    add("--side", type=int, default=methods.LARGEST, help="longest, of networks")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--device")
    add("--out", type=csv_file, required=True, help="CSV; PNG beside it")
    return new


def find(args: argparse.Namespace, folder: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the data and the readers of its cases; phantoms if asked."""
    if args.small:
        from evaluation.accuracy.compare_voxel import write_phantoms
        from evaluation.accuracy.pairs import find_cases

        write_phantoms(Path(folder), 2, SHAPE)
        args.steps = args.steps or 60
        return "phantoms", find_cases(folder)
    if args.people:
        return "people", find_people(args.people, args.pairs)
    kind = "copd" if args.copd else "4dct"
    root = args.copd or args.fourdct
    return kind, find_dirlab(root, kind, args.numbers, args.fixed)


def run(
    args: argparse.Namespace, cases: dict[str, Any], methods: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return a row for each case and method, each from a process of its own."""
    names = ("seconds", "steps", "side", "threads", "seed", "device")
    options = Options(**{name: getattr(args, name) for name in names})
    fixed = {"device": args.device or "default", "machine": machine()}
    fixed |= {name: version(name) for name in ("icon_nephi", "torch")}
    jobs = [
        (name, case, partial(alone, work, read, method, options), "measured")
        for name, method in methods.items()
        for case, read in cases.items()
    ]
    for external in args.external:
        name, equals, folder = external.partition("=")
        if not equals:
            raise ValueError(f"--external takes NAME=FOLDER, not {external!r}.")
        for case, read in cases.items():
            path = find_external(Path(folder), case)
            jobs.append(
                (name, case, partial(alone, score_file, read, path), "external")
            )
    rows = []
    for name, case, job, source in tqdm(jobs, "registering"):
        rows.append({"method": name, "source": source, "case": case} | fixed | job())
        write_csv(args.out, COLUMNS, rows)
    return rows


def finish(
    args: argparse.Namespace,
    data: str,
    rows: list[dict[str, Any]],
    figures: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Write CSV and PNG, print the table; returns the means."""
    summary = [row | {"data": data} for row in means(rows)]
    shown = [*quoted(figures), *summary]
    write_csv(args.out, COLUMNS, [*rows, *shown])
    draw(shown, args.out.with_suffix(".png"))
    print(text(shown))
    for row in rows:
        if row.get("error"):
            print(f"{row['method']}, {row['case']}: FAILED: {row['error']}")
    return summary


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 where a registration failed."""
    new = parser(__doc__.splitlines()[0], "table1_pairs")
    args = new.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            data, cases = find(args, folder)
            ours = {} if args.only_external else {"NePhi, ours": methods.nephi}
            rows = run(args, cases, ours)
        except ValueError as error:
            new.error(str(error))
    summary = finish(args, data, rows, QUOTED)
    print(verdict(CLAIM, "NePhi, ours", summary, goal=1.73))
    return int(any(row.get("error") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
