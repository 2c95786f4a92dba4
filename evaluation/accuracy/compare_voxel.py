"""Voxel GradICON and NePhi side by side: same pairs, same time, same machine, one run.

    python -m evaluation.accuracy.compare_voxel --data DIR --out compare.csv
    python -m evaluation.accuracy.compare_voxel --data DIR --voxel_weights W
        --nephi_weights W
    python -m evaluation.accuracy.compare_voxel --small --out compare.csv

Without weights every method is optimised for each pair from scratch: NePhi first, the
others for the seconds that it took (or all for ``--optimize-steps``). Weights are what
training/ writes (network_weights.trch); a trained network is added for each that is
given, with and without instance optimisation. The columns are those of the paper's
Table 2; docs/evaluation.md describes the folders.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation import csv_file, image_from, version, write_csv
from evaluation.accuracy.pairs import find_cases
from icon_nephi.commands import methods
from icon_nephi.commands.compare import COLUMNS, alone, compare_cases
from icon_nephi.commands.methods import Options
from icon_nephi.commands.text import comparison_table

PACKAGES = ("icon_nephi", "icon_registration", "torch", "itk")
EXTRA = ("training_step_ms", "training_peak_gib", "threads", "device", *PACKAGES)
SMALL = (32, 28, 32)  # voxels of the phantom


def scratch() -> dict[str, Any]:
    """Methods that need no training; the first one's time is everyone's."""
    from evaluation.accuracy.voxel import nephi_multi, voxel_multi

    return {
        "nephi": methods.nephi,
        "voxel": methods.voxel,
        "voxel_multi": voxel_multi,
        "nephi_multi": nephi_multi,
    }


def learned(args: argparse.Namespace) -> dict[str, Any]:
    """Methods whose weights are given."""
    from evaluation.accuracy.voxel import trained

    found = {}
    for kind in ("voxel", "voxel_multi", "nephi"):
        weights = getattr(args, f"{kind}_weights")
        if weights is None:
            continue
        if not weights.is_file():
            raise ValueError(f"--{kind}_weights: {weights} does not exist.")
        make = partial(trained, kind=kind, weights=weights, shape=tuple(args.shape))
        if kind == "nephi":
            make = partial(make, preset=args.preset, levels=args.levels)
        found[f"{kind} learned"] = make
        found[f"{kind} learned + IO"] = partial(make, io_steps=args.io_steps)
    return found


def training_costs(rows: list[dict[str, Any]], preset: str, device: str | None) -> None:
    """Add what a training step costs, on the grid of each row of a trained network."""
    from evaluation.accuracy.voxel import training_step

    known: dict[Any, dict[str, Any]] = {}
    for row in rows:
        kind, _, rest = row["method"].partition(" ")
        if not rest.startswith("learned") or "error" in row:
            continue
        key = kind, tuple(row["grid"])
        if key not in known:
            known[key] = alone(training_step, *key, preset, device)
        row["training_step_ms"] = known[key].get("step_ms")
        row["training_peak_gib"] = known[key].get("peak_gib")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy, folds, time and memory of every method, a dot for each case."""
    from matplotlib.figure import Figure

    done = [row for row in rows if "error" not in row]
    names = list(dict.fromkeys(row["method"] for row in rows))
    accuracy = "tre_mm" if any("tre_mm" in row for row in done) else "dice"
    panels = {
        accuracy: {"tre_mm": "TRE, mm", "dice": "Dice"}[accuracy],
        "folds_points_percent": "folds, % of points",
        "inference_ms": "images to map, ms",
        "peak_gib": "peak memory, GiB",
    }
    figure = Figure(figsize=(14, 1 + 0.4 * len(names)), layout="tight")
    axes = figure.subplots(1, 4, sharey=True)
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for row in done:
            if row.get(key) is not None:
                axis.plot(row[key], names.index(row["method"]), "ko", alpha=0.6)
        axis.set_title(title)
        axis.set_xlim(left=0)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=100)


def write_phantoms(
    folder: Path, count: int = 1, shape: tuple[int, ...] = SMALL
) -> None:
    """Write breathing chests as cases, with landmarks and label maps."""
    import itk

    from evaluation.demo import chest
    from icon_nephi.phantoms import breathing_thorax

    for seed in range(count):
        home = folder / f"phantom_{seed}"
        home.mkdir(parents=True)
        moving, fixed, points = chest(shape, seed)
        phantom = breathing_thorax(shape, seed=seed)
        images = {"moving": moving, "fixed": fixed}
        labels = {"moving": phantom.labels_A, "fixed": phantom.labels_B}
        for side, image in images.items():
            itk.imwrite(image, str(home / f"{side}.nii.gz"))
            label = image_from(labels[side][0, 0].numpy(), image)
            itk.imwrite(label, str(home / f"{side}_labels.nii.gz"))
            lines = [",".join(f"{x:.6f}" for x in row) for row in points[side]]
            header = ",".join("xyz"[: len(shape)])
            text = "\n".join([header, *lines]) + "\n"
            (home / f"{side}_landmarks.csv").write_text(text)
        (home / "case.json").write_text('{"modality": "ct"}')


def parser() -> argparse.ArgumentParser:
    new = argparse.ArgumentParser(
        prog="python -m evaluation.accuracy.compare_voxel",
        description=__doc__.splitlines()[0],
    )
    add = new.add_argument
    add("--data", type=Path, help="folder of cases")
    add("--small", action="store_true", help="a phantom of its own, in minutes")
    add("--cases", nargs="+", metavar="NAME", help="cases or groups (default: all)")
    add("--seconds", type=float, default=600.0, help="of NePhi, at most")
    add("--optimize-steps", type=int, help="of every method from scratch, not seconds")
    for kind in ("voxel", "voxel_multi", "nephi"):
        add(f"--{kind}_weights", type=Path, help="network_weights.trch of a training")
    add("--shape", type=int, nargs="+", default=[], help="grid of the trained networks")
    add("--preset", default="default", help="of the trained NePhi")
    add("--levels", type=int, default=1, help="resolutions of the trained NePhi")
    add("--io_steps", type=int, default=50, help="of instance optimisation")
    add("--only_learned", action="store_true", help="leave out what needs no weights")
    add("--side", type=int, default=methods.LARGEST, help="longest, of voxel networks")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--device")
    add("--out", type=csv_file, required=True, help="CSV; the picture gets its name")
    return new


def run(
    cases: dict[str, Any], methods: dict[str, Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the rows; the CSV is rewritten as a whole after each."""
    options = Options(
        seconds=args.seconds,
        steps=args.optimize_steps,
        seed=args.seed,
        device=args.device,
        threads=args.threads,
        side=args.side,
    )
    fixed = {"threads": args.threads, "device": args.device}
    fixed |= {name: version(name) for name in PACKAGES}
    rows: list[dict[str, Any]] = []
    found = compare_cases(cases, methods, options)
    for row in tqdm(found, "registering", len(cases) * len(methods)):
        rows.append(row | fixed)
        write_csv(args.out, (*COLUMNS, *EXTRA), rows)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 where a registration failed."""
    new = parser()
    args = new.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if (args.data is None) != args.small:
                raise ValueError("give --data or --small.")
            methods = ({} if args.only_learned else scratch()) | learned(args)
            if not methods:
                raise ValueError("--only_learned needs weights.")
            if args.small:
                args.data = Path(folder)
                write_phantoms(args.data)
                args.optimize_steps = args.optimize_steps or 20
            cases = find_cases(args.data, args.cases)
        except ValueError as error:
            new.error(str(error))
        rows = run(cases, methods, args)
    training_costs(rows, args.preset, args.device)
    write_csv(args.out, (*COLUMNS, *EXTRA), rows)
    draw(rows, args.out.with_suffix(".png"))
    print(comparison_table(rows))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
