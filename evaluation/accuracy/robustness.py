"""How often does a registration fail, and does it say so? Pairs, seeds, perturbations.

    python -m evaluation.accuracy.robustness --out FILE.csv [--small] [--data DIR]
        [--cases ...]

Each pair is registered as it is, then with its moving image perturbed in the ways of
PERTURBATIONS, each time with the same seed. A run fails where the mean landmark error
is above twice that of the pair as it is, or the mean Dice more than 0.05 below; it is
lost where the error is also above a voxel. The pairs are phantoms, with ``--data``
also those of `evaluation.accuracy.pairs`. The table has the failures and how well
``Registration.warnings`` told them: what share of the failures was warned of (recall),
of the warnings was a failure (precision), and of the good runs was warned of (false
alarms). It judges by the evidence in the CSV with the thresholds of today.

Rows are written one by one; what FILE.csv has is not run again. FILE.csv.fits holds
the unperturbed registrations, FILE.png the picture.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import evaluation
from evaluation import (
    Case,
    array_of,
    csv_file,
    geometry,
    image_from,
    to_index,
    to_physical,
    write_csv,
)
from evaluation.accuracy.pairs import find_cases
from evaluation.accuracy.perturbations import PERTURBATIONS, UNPROMISED, Change

EVIDENCE = (
    *("outside", "folded", "return", "return_most", "uneven"),
    *("alike", "alike_start", "opposed", "coarse", "gaps"),
)
COLUMNS = (
    *("pair", "seed", "perturbation", "tre_mm", "base_tre_mm", "dice", "base_dice"),
    *("voxel_mm", "cpu_s", "error", *EVIDENCE),
)
SIZES = {2: (64, 64), 3: (40, 36, 40)}
AS_IT_IS = "none"


# --- pairs --------------------------------------------------------------------------


def phantom(dimension: int, patient: int) -> Case:
    """Return a breathing thorax as ITK images, with its landmarks and organs."""
    from icon_nephi.phantoms import breathing_thorax

    made = breathing_thorax(SIZES[dimension], seed=patient)
    spacing = [float(s) for s in made.spacing[::-1]]

    def image(values: Any, kind: type) -> Any:
        result = image_from(values[0, 0].numpy().astype(kind))
        result.SetSpacing(spacing)
        return result

    points = [made.millimetres(p) for p in (made.points_B, made.points_A)]
    points = [np.ascontiguousarray(p.double().numpy()[:, ::-1]) for p in points]
    ids = np.unique(made.labels_A)
    shared = np.intersect1d(ids, np.unique(made.labels_B))
    return Case(
        f"thorax{dimension}d/{patient}",
        fixed=image(made.image_B, np.float32),
        moving=image(made.image_A, np.float32),
        modality="ct",
        fixed_points=points[0],
        moving_points=points[1],
        fixed_labels=image(made.labels_B, np.int16),
        moving_labels=image(made.labels_A, np.int16),
        # Few voxels make a Dice that jumps.
        label_ids=tuple(
            int(i)
            for i in shared
            if i > 0 and int((made.labels_B == int(i)).sum()) > 30
        ),
    )


def readers(args: argparse.Namespace) -> dict[str, Callable[[], Case]]:
    counts = {2: args.flat, 3: args.solid}
    found = {
        f"thorax{d}d/{patient}": partial(phantom, d, patient)
        for patient in range(max(counts.values()))
        for d in counts
        if patient < counts[d]
    }
    return found | (find_cases(args.data, args.cases) if args.data else {})


# --- one run ------------------------------------------------------------------------


def register(change: Change, seed: int, args: argparse.Namespace) -> Any:
    from icon_nephi.fit.settings import find_effort

    pair = change.pair
    size = tuple(int(n) for n in geometry(pair.fixed)[2])
    settings = find_effort(args.preset, size, pair.modality)
    if args.steps:
        settings = replace(settings, steps=args.steps)
    return evaluation.register(pair, field=settings, seed=seed, **change.options)


def _inside(image: Any, points: np.ndarray) -> np.ndarray:
    index = to_index(image, points)
    return ((index >= -0.5) & (index <= geometry(image)[2] - 0.5)).all(1)


def score(change: Change, result: Any, pair: Case, base: Any) -> dict[str, Any]:
    """Return errors of a perturbed run and of the unperturbed one, of what both see."""
    row: dict[str, Any] = {"voxel_mm": max(float(s) for s in pair.fixed.GetSpacing())}
    if pair.fixed_points is not None:
        kept = _inside(change.pair.moving, change.pair.moving_points)
        for key, which, found in (
            ("tre_mm", change.pair, result),
            ("base_tre_mm", pair, base),
        ):
            moved = found.transform_points(which.fixed_points[kept])
            away = np.linalg.norm(moved - which.moving_points[kept], axis=1)
            row[key] = float(away.mean())
    if pair.fixed_labels is not None:
        from icon_nephi.report.metrics import mean_dice

        fixed = array_of(pair.fixed_labels)
        index = np.stack(np.meshgrid(*map(range, fixed.shape), indexing="ij"), -1)
        rows = to_physical(pair.fixed, index.reshape(-1, fixed.ndim)[:, ::-1])
        kept = np.ones(len(rows), bool)
        if change.cut:
            kept = _inside(change.pair.moving, base.transform_points(rows))
        for key, which, found in (
            ("dice", change.pair, result),
            ("base_dice", pair, base),
        ):
            warped = array_of(found.warp_labels(which.moving_labels))
            row[key] = mean_dice(
                fixed.ravel()[kept], warped.ravel()[kept], pair.label_ids
            )
    return row


def run(
    name: str, pair: Case, seed: int, base: Any, args: argparse.Namespace
) -> tuple[dict[str, Any], Any]:
    """Return the row of one run and its registration (None where it was refused)."""
    row = {"pair": pair.name, "seed": seed, "perturbation": name}
    change = Change(pair, {})
    if name != AS_IT_IS:
        number = list(PERTURBATIONS).index(name)
        change = PERTURBATIONS[name](pair, np.random.default_rng([seed, number]))
    start = time.process_time()
    try:
        result = register(change, seed, args)
    except ValueError as error:
        return row | {"error": " ".join(str(error).split())}, None
    row["cpu_s"] = time.process_time() - start
    row |= result.fit.evidence
    return row | score(change, result, pair, base or result), result


# --- the table ----------------------------------------------------------------------


def failed(row: dict[str, Any]) -> bool:
    """Whether a run is worse than the unperturbed one beyond the limits."""
    return _worse(row, 0.0)


def lost(row: dict[str, Any]) -> bool:
    """Whether it failed, and is a voxel off or (labels only) 0.1 of the Dice below."""
    return _worse(row, float(row["voxel_mm"] or 0), 0.1)


def _worse(row: dict[str, Any], least: float, drop: float = 0.05) -> bool:
    tre, dice = row["tre_mm"], row["dice"]
    far = tre != "" and float(tre) > max(2 * float(row["base_tre_mm"]), least)
    low = dice != "" and float(row["base_dice"]) - float(dice) > drop
    return bool(row["error"]) or far or low


def warned(row: dict[str, Any]) -> bool:
    """Whether the user is told: refused, or a warning by the evidence."""
    from icon_nephi.fit.doubts import doubts

    if row["error"]:
        return True
    contrast = row["perturbation"] == "inverted"
    evidence = {name: float(row[name]) for name in EVIDENCE}
    return bool(doubts(evidence, contrast=contrast))


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the failures of every perturbation and how well they were told."""
    lines = [
        f"{'perturbation':16} {'runs':>5} {'failed':>8} {'lost':>8} {'warned':>8} "
        f"{'TRE ratio, median':>18}"
    ]
    names = [n for n in (*PERTURBATIONS, AS_IT_IS) if _of(rows, n)]
    promised = [r for n in PERTURBATIONS if n not in UNPROMISED for r in _of(rows, n)]
    for name, chosen in [(n, _of(rows, n)) for n in names] + [("all", promised)]:
        if not chosen:
            continue
        shares = [
            f"{100 * np.mean([judge(r) for r in chosen]):7.1f}%"
            for judge in (failed, lost, warned)
        ]
        ratios = [
            float(r["tre_mm"]) / max(float(r["base_tre_mm"]), 1e-6)
            for r in chosen
            if r["tre_mm"] != ""
        ]
        ratio = f"{np.median(ratios):18.2f}" if ratios else f"{'-':>18}"
        lines.append(f"{name:16} {len(chosen):5} {' '.join(shares)} {ratio}")
    for word, judge in (("failed", failed), ("lost", lost)):
        bad = [warned(r) for r in rows if judge(r)]
        good = [warned(r) for r in rows if not judge(r)]
        said = sum(bad) + sum(good)
        lines.append(
            f"{word}: {len(bad)} of {len(rows)} runs; warned of {sum(bad)} of them "
            f"(recall {_percent(sum(bad), len(bad))}), precision "
            f"{_percent(sum(bad), said)}, false alarms {_percent(sum(good), len(good))}"
        )
    return "\n".join(lines)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _of(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["perturbation"] == name]


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the distribution of errors over that of the pair as it is."""
    from matplotlib.figure import Figure

    names = [n for n in PERTURBATIONS if _of(rows, n)]
    figure = Figure(figsize=(8, 0.4 * len(names) + 1.5), layout="tight")
    axes = figure.subplots()
    for place, name in enumerate(names):
        chosen = [r for r in _of(rows, name) if r["tre_mm"] != ""]
        for said, colour in ((False, "tab:blue"), (True, "tab:red")):
            some = [r for r in chosen if warned(r) == said]
            ratio = [float(r["tre_mm"]) / float(r["base_tre_mm"]) for r in some]
            jitter = np.random.default_rng(0).uniform(-0.25, 0.25, len(ratio))
            label = ("no warning", "warning")[said] if place == 0 else None
            axes.scatter(ratio, place + jitter, s=9, color=colour, label=label)
    axes.axvline(2, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("landmark error over that of the pair as it is")
    axes.legend()
    figure.savefig(path, dpi=150)


# --- the command --------------------------------------------------------------------


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.accuracy.robustness",
        description="Count failed registrations of perturbed pairs, and the warnings.",
    )
    add = parser.add_argument
    add(
        "--out",
        type=csv_file,
        required=True,
        metavar="CSV",
        help="rows; kept and added to",
    )
    add("--small", action="store_true", help="4 phantoms, 1 seed, few steps")
    add("--flat", type=int, default=14, metavar="N", help="2D phantoms (default: 14)")
    add("--solid", type=int, default=6, metavar="N", help="3D phantoms (default: 6)")
    add("--data", type=Path, metavar="DIR", help="folder of cases, to add to them")
    add("--cases", nargs="+", metavar="NAME", help="cases or groups (default: all)")
    add("--seeds", type=int, default=5, metavar="N", help="default: 5")
    add("--perturbations", nargs="+", choices=PERTURBATIONS, metavar="NAME")
    add("--preset", default="fast", choices=("fast", "default", "accurate"))
    add("--steps", type=int, metavar="N", help="instead of the preset's")
    add("--threads", type=int, default=1, metavar="N", help="default: 1")
    add("--limit", type=float, metavar="MINUTES", help="start no run after these")
    add("--table", action="store_true", help="run nothing: only table and picture")
    args = parser.parse_args(argv)
    if args.small:
        args.flat, args.solid, args.seeds = 3, 1, 1
        args.steps = args.steps or 60
    return args


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    rows = read_rows(args.out)
    if not args.table:
        try:
            _run_all(rows, args)
        except ValueError as error:
            print(f"robustness: {error}", file=sys.stderr)
            return 2
    rows = read_rows(args.out)
    if rows:
        print(summary(rows))
        draw(args.out.with_suffix(".png"), rows)
    return 0


def _run_all(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    pairs, begin = readers(args), time.monotonic()
    folder = args.out.with_name(args.out.name + ".fits")
    folder.mkdir(exist_ok=True)
    wanted = (AS_IT_IS, *(args.perturbations or PERTURBATIONS))
    for seed in range(args.seeds):
        for pair_name, read in pairs.items():
            done = {
                r["perturbation"]
                for r in rows
                if (r["pair"], int(r["seed"])) == (pair_name, seed)
            }
            todo = [name for name in wanted if name not in done]
            if todo:
                _run_pair(read(), seed, todo, rows, folder, begin, args)


def _run_pair(
    pair: Case,
    seed: int,
    todo: list[str],
    rows: list[dict[str, Any]],
    folder: Path,
    begin: float,
    args: argparse.Namespace,
) -> None:
    import icon_nephi

    file = folder / f"{pair.name.replace('/', '_')}_{seed}.nephi"
    base = icon_nephi.load(file) if AS_IT_IS not in todo else None
    for name in todo:
        if args.limit is not None and time.monotonic() - begin > 60 * args.limit:
            return
        row, result = run(name, pair, seed, base, args)
        if name == AS_IT_IS:
            if result is None:
                raise ValueError(f"{pair.name} as it is: {row['error']}")
            result.save(file)
            base = result
        rows.append({key: row.get(key, "") for key in COLUMNS})
        write_csv(args.out, COLUMNS, rows)
        told = row.get("error") or (
            f"TRE {row.get('tre_mm', float('nan')):.2f} mm, "
            f"Dice {row.get('dice', float('nan')):.3f}, {row['cpu_s']:.1f} CPU s"
        )
        print(f"{pair.name} seed {seed} {name}: {told}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
