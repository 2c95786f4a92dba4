"""Register image pairs with ground truth and print how well each went.

    python -m evaluation.register_pairs --data DIR [--cases NAME ...] [--out CSV]

Every registration runs in a fresh process, so that CPU seconds and peak memory are its
own. docs/evaluation.md says what each column means. A method is a function that takes
a Case and returns an object with the names of icon_nephi's Registration; what it lacks
(or answers with NotImplementedError) stays empty in the table.
"""

import argparse
import ast
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import (
    DIRECTIONS,
    STATISTICS,
    Case,
    before,
    csv_file,
    machine,
    peak_memory,
    register,
    score,
    version,
    write_csv,
    written_whole,
)
from evaluation.accuracy.pairs import find_cases
from evaluation.accuracy.peers import DEFAULT, PEERS, NotApplicable, missing

NOT_INSTALLED = "not installed"
OURS = {"icon_nephi": "evaluation.register_pairs:nephi"}
THREAD_VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)
PACKAGES = ("icon_nephi", "torch", "itk", "numpy")
RESULTS = (
    *("before_tre_mm", "before_dice"),
    *(f"tre_{d}_{s}_mm" for d in DIRECTIONS for s in STATISTICS),
    *("dice", "labels", "folds_voxels_percent", "folds_points_percent"),
    *("inverse_consistency_mean_mm", "inverse_consistency_p95_mm"),
    *("cpu_s", "wall_s", "peak_rss_gib", "file_kb", "warnings"),
)
CSV_COLUMNS = (
    *("case", "method", "error", *RESULTS, "threads", "masks", "options"),
    *(*PACKAGES, "python", "machine", "date"),
)
HEAD = (  # each column's name and unit
    *(("case", ""), ("method", ""), ("before", "mm or Dice")),
    ("TRE fixed->moving", "mean/median/p95 mm"),
    ("TRE moving->fixed", "mean/median/p95 mm"),
    *(("Dice", ""), ("folds", "% voxels"), ("folds", "% points")),
    ("inverse cons.", "mean/p95 mm"),
    *(("CPU", "s"), ("RSS", "GiB"), ("file", "kB")),
)


# --- one registration ---------------------------------------------------------------


def nephi(
    pair: Case, threads: int = 1, masks: bool = True, options: Iterable[str] = ()
) -> Any:
    """Return icon_nephi's Registration of a pair, from scratch."""
    import torch

    torch.set_num_threads(threads)
    arguments: dict[str, Any] = {"seed": 0}
    for option in options:
        key, _, value = option.partition("=")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
    return register(pair, masks=masks, **arguments)


def measure(
    pair: Case, method: Callable[[Case], Any], start: float | None = None
) -> dict[str, Any]:
    """Return what one registration cost and how good it is, by the names of RESULTS.

    CPU seconds count from a ``time.process_time()``; None means now.
    """
    start = time.process_time() if start is None else start
    wall = time.perf_counter()
    result = method(pair)
    row = {
        "cpu_s": time.process_time() - start,
        "wall_s": time.perf_counter() - wall,
        "peak_rss_gib": peak_memory() / 2**30 or None,
    }
    return row | before(pair) | score(pair, result)


# --- its own process ----------------------------------------------------------------


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    """Return the row of one case and method, or ``{"error": sentence}``."""
    module, _, function = task["function"].partition(":")
    try:
        method = getattr(importlib.import_module(module), function)
        _load_itk()
        read = find_cases(task["data"], [task["case"]])[task["case"]]
        start = time.process_time()
        pair = read()
        start = time.process_time() - start  # of the process, but for the reading
        whole = task.get("whole_process", True)
        row = measure(
            pair, partial(method, **task["arguments"]), start if whole else None
        )
    except NotApplicable as error:
        return {"not_applicable": str(error)}
    except Exception as error:
        traceback.print_exc()
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return {"error": textwrap.shorten(kind + str(error), 200, placeholder="...")}
    row = {k: float(v) if isinstance(v, np.generic) else v for k, v in row.items()}
    row["python"] = platform.python_version()
    return row | {name: version(name) for name in PACKAGES}


def _load_itk() -> None:
    """Load what reading images needs: it counts, the reading itself does not."""
    import itk

    _ = itk.ImageFileReader


def run_alone(task: dict[str, Any], threads: int, verbose: bool) -> dict[str, Any]:
    """Return the row of one task, run in a fresh process."""
    path = [str(Path(__file__).parents[1]), *(p for p in sys.path if p)]
    environment = os.environ | {name: str(threads) for name in THREAD_VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
    start = "from evaluation.register_pairs import work; work()"
    with tempfile.TemporaryDirectory() as folder:
        task_file, row_file = Path(folder) / "task.json", Path(folder) / "row.json"
        task_file.write_text(json.dumps(task), "utf-8")
        done = subprocess.run(
            [sys.executable, "-c", start, str(task_file), str(row_file)],
            env=environment,
            stdout=None if verbose else subprocess.DEVNULL,
            stderr=None if verbose else subprocess.DEVNULL,
            check=False,
        )
        if row_file.exists():
            return json.loads(row_file.read_text("utf-8"))
    code = done.returncode
    return {"error": f"the process ended with code {code} (-9: out of memory?)."}


def work() -> None:
    """Run the task in the first file named and write its row to the second."""
    task_file, row_file = map(Path, sys.argv[1:])
    row = run_task(json.loads(task_file.read_text("utf-8")))
    with written_whole(row_file) as (part,):
        part.write_text(json.dumps(row), "utf-8")


# --- the table ----------------------------------------------------------------------


def _numbers(row: dict[str, Any], form: str, *keys: str) -> str:
    values = [row.get(key) for key in keys]
    if all(value is None for value in values):
        return "-"
    return "/".join("-" if value is None else format(value, form) for value in values)


def _cells(row: dict[str, Any]) -> list[str]:
    dice = row.get("before_tre_mm") is None
    means = [f"inverse_consistency_{s}_mm" for s in ("mean", "p95")]
    return [
        row["case"],
        row["method"],
        _numbers(row, *((".3f", "before_dice") if dice else (".2f", "before_tre_mm"))),
        *(
            _numbers(row, ".2f", *(f"tre_{d}_{s}_mm" for s in STATISTICS))
            for d in DIRECTIONS
        ),
        _numbers(row, ".3f", "dice"),
        *(_numbers(row, ".3g", f"folds_{w}_percent") for w in ("voxels", "points")),
        _numbers(row, ".3f", *means),
        _numbers(row, ".1f", "cpu_s"),
        _numbers(row, ".2f", "peak_rss_gib"),
        _numbers(row, ".0f", "file_kb"),
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Return aligned columns; docs/evaluation.md explains them."""
    lines = [*zip(*HEAD, strict=True), *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for row, cells in zip([{}, {}, *rows], lines, strict=True):
        fitted = [
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        if error := row.get("error"):
            fitted[2:] = [error if error == NOT_INSTALLED else f"FAILED: {error}"]
        texts.append("  ".join(fitted).rstrip())
    rule = "-" * max(map(len, texts[:2]))
    return "\n".join([*texts[:2], rule, *texts[2:], *_group_means(rows)])


def _group_means(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line per method and group of label cases, where a group has several."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in rows if row.get("dice") is not None):
        group, _, member = row["case"].partition("/")
        if member:
            groups.setdefault(f"{group}  {row['method']}", []).append(row)
    return [
        f"{name}: mean Dice of {len(members)} pairs "
        f"{np.mean([row['dice'] for row in members]):.3f} "
        f"(before {np.mean([row['before_dice'] for row in members]):.3f})"
        for name, members in groups.items()
        if len(members) > 1
    ]


def summary(row: dict[str, Any]) -> str:
    """Return what became of one registration, in a few words."""
    if sentence := row.get("error") or row.get("not_applicable"):
        return sentence
    parts = []
    if (tre := row.get("tre_fixed_to_moving_mean_mm")) is not None:
        parts.append(f"TRE {row['before_tre_mm']:.2f} -> {tre:.2f} mm")
    if (dice := row.get("dice")) is not None:
        parts.append(f"Dice {row['before_dice']:.3f} -> {dice:.3f}")
    return ", ".join([*parts, f"{row['cpu_s']:.1f} CPU s"])


# --- the command --------------------------------------------------------------------


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.register_pairs",
        description="Register image pairs with ground truth and score the results.",
    )
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="folder of cases")
    add("--cases", nargs="+", metavar="NAME", help="cases or groups (default: all)")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    add("--out", type=csv_file, metavar="CSV", help="write every number to this file")
    add(
        "--peers",
        nargs="*",
        choices=PEERS,
        metavar="NAME",
        help=f"run peers too: {', '.join(PEERS)} (default: those that suit the case)",
    )
    add("--only_peers", action="store_true", help="leave icon_nephi out")
    add("--no_masks", action="store_true", help="give icon_nephi no masks")
    add(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="further arguments of icon_nephi.register",
    )
    add("--verbose", action="store_true", help="show what the methods print")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, not {args.threads}.")
    for option in args.options:
        if not option.partition("=")[0].isidentifier() or "=" not in option:
            parser.error(f"--options takes key=value, not {option!r}.")
    args.peers = [] if args.only_peers and args.peers is None else args.peers
    try:
        args.cases = list(find_cases(args.data, args.cases))
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None, methods: dict[str, str] | None = None) -> int:
    """Run the command; ``methods`` (label -> "module:function") replaces icon_nephi.

    Returns:
        0, or 1 where a registration failed (2, raised by argparse: wrong arguments).
    """
    args = _arguments(argv)
    ours: dict[str, Any] = {}
    if methods is None:
        methods = {} if args.only_peers else OURS
        ours = {"masks": not args.no_masks, "options": args.options}
        ours["threads"] = args.threads
    runs = {n: {"function": f, "arguments": ours} for n, f in methods.items()}
    for name in DEFAULT if args.peers == [] else args.peers or ():
        settings = {"asked": name in args.peers, "threads": args.threads}
        runs[name] = {
            "function": f"evaluation.accuracy.peers:{name}",
            "arguments": settings,
            "whole_process": False,
        }
        if sentence := missing(name):
            print(sentence)
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(args.cases, start=1):
        for name, run in runs.items():
            print(f"[{number}/{len(args.cases)}] {case} {name}: ", end="", flush=True)
            row = {"case": case, "method": name, "machine": machine()}
            row["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
            row |= {"threads": args.threads, "masks": run["arguments"].get("masks")}
            row["options"] = " ".join(run["arguments"].get("options", ()))
            if missing(name):
                row["error"] = NOT_INSTALLED
            else:
                task = {"data": args.data, "case": case, **run}
                row |= run_alone(task, args.threads, args.verbose)
            print(summary(row))
            if "not_applicable" not in row:
                rows.append(row)
            if args.out:  # what is done stays when the rest is stopped
                write_csv(args.out, CSV_COLUMNS, rows)
    print("\n" + table(rows))
    return int(any(row.get("error", NOT_INSTALLED) != NOT_INSTALLED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
