"""Does a registration know where it is wrong? Estimates against landmark errors.

    python -m evaluation.accuracy.trust --data DIR --out FILE.csv [--cases NAME ...]
        [--fits DIR]

Each pair with landmarks is registered with several seeds. For each ingredient of the
estimate of `icon_nephi.report.expected_error` (and for some that were left out of it)
the table has Spearman's rank correlation with the true errors of the landmarks, first
seed; for the estimate also its median and how many true errors are smaller than one,
two and three times it. The weights are fitted again, once to all pairs and, for the
columns of the estimate, for each pair to the others. Writes a CSV and a PNG beside it;
``--fits`` keeps the registrations, so that a second run is quick.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import evaluation
from evaluation import Case, csv_file, write_csv
from evaluation.accuracy.pairs import load_pairs

CASES = (
    "lung3d_semireal/deep",
    "lung3d_elastix",
    "abdomen3d_eth4dmri_18/cyc_1_10",
    "abdomen3d_eth4dmri_18/cyc_3_10",
    "histology2d_lesions",
    "lung3d_semireal/followup",
    "cases/liver19_cyc_1_6",
    "cases/liver19_cyc_1_9",
    "cases/lobes_2-cd31",
    "cases/lobes_4-cc10",
    "cases/lesion3_CD31-3",
)
INGREDIENTS = (
    *("consistency", "spread", "dissimilarity", "difference"),
    *("displacement", "log_determinant", "sharp"),
)
ESTIMATES = {"alone": ("voxel", "consistency")}
ESTIMATES["sharp"] = ("consistency", "sharp")
ESTIMATES["ensemble"] = ("voxel", "consistency", "spread")
# What weights are multiplied with, so that 9 in 10 errors are below twice the estimate.
SAFE = {"sharp": 1.4}
COLUMNS = (
    *("case", "landmarks", "error_mean", "error_median"),
    *(f"rho_{name}" for name in INGREDIENTS),
    *(
        f"{name}_{what}"
        for name in ESTIMATES
        for what in ("rho", "median", "below_1", "below_2", "below_3", "weights")
    ),
)
BLOCK = 3  # samples to each side of a landmark, 1/107 of the image apart
LEAST = 0.05  # of a voxel: an error below is as good as none


@dataclass
class Measured:
    """The numbers of one pair, a row for each landmark; lengths in mm."""

    case: str
    error: np.ndarray
    numbers: dict[str, np.ndarray]  # "voxel" and INGREDIENTS


def register(pair: Case, seeds: int, folder: Path | None) -> list[Any]:
    """Return the registrations, read from the folder where they are there."""
    import icon_nephi

    registrations = []
    for seed in range(seeds):
        file = folder and folder / f"{pair.name.replace('/', '_')}_{seed}.nephi"
        if file and file.exists():
            registrations.append(icon_nephi.load(file))
            continue
        registrations.append(evaluation.register(pair, seed=seed))
        if file:
            registrations[-1].save(file)
    return registrations


def measure(pair: Case, registrations: list[Any]) -> Measured:
    """Return what there is to know at the landmarks, and the true errors."""
    from icon_nephi.report import expected_error as trust

    first, points = registrations[0], pair.fixed_points
    moved = first.transform_points(points)
    difference, dissimilarity = around(pair, first)
    return Measured(
        pair.name,
        np.linalg.norm(moved - pair.moving_points, axis=1),
        {
            "voxel": np.full(len(points), trust.voxel_side(first.geometry_B)),
            "consistency": trust.inverse_consistency(first, points),
            "spread": trust.spread(registrations, points),
            "dissimilarity": dissimilarity,
            "difference": difference,
            "displacement": np.linalg.norm(moved - points, axis=1),
            "log_determinant": growth(first, points),
            "sharp": first.sharp_at(points),
        },
    )


def around(pair: Case, registration: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return mean absolute difference and 1 - correlation of blocks at landmarks."""
    from icon_nephi.io.image_input import read_input
    from icon_nephi.io.resampling import reader
    from icon_nephi.space.intensities import prepare

    read = []
    for letter, image in (("A", pair.moving), ("B", pair.fixed)):
        values, _, place = read_input(letter, image, None)
        values = prepare(values, pair.modality)[0].movedim(0, -1).numpy()
        read.append(reader(values, place.physical_to_unit()))
    count, d = pair.fixed_points.shape
    step = 1.5 * max(registration.geometry_B.extent) / 160
    axis = step * np.arange(-BLOCK, BLOCK + 1)
    block = np.stack(np.meshgrid(*[axis] * d), -1).reshape(-1, d)
    rows = (pair.fixed_points[:, None] + block).reshape(-1, d)
    moving = read[0](registration.transform_points(rows)).reshape(count, -1)
    fixed = read[1](rows).reshape(count, -1)
    difference = np.abs(moving - fixed).mean(1)
    a, b = (v - v.mean(1, keepdims=True) for v in (moving, fixed))
    scale = np.sqrt((a * a).mean(1) * (b * b).mean(1) + 1e-6)
    return difference, 1 - (a * b).mean(1) / scale


def growth(registration: Any, points: np.ndarray, step: float = 0.01) -> np.ndarray:
    """Return |log det| of the map at points, by central differences."""
    columns = [
        (
            registration.transform_points(points + h)
            - registration.transform_points(points - h)
        )
        / (2 * step)
        for h in step * np.eye(points.shape[1])
    ]
    determinants = np.linalg.det(np.stack(columns, -1))
    return np.abs(np.log(np.maximum(determinants, 1e-3)))


def fit(measured: list[Measured], names: tuple[str, ...]) -> np.ndarray:
    """Return weights, none negative, with which half of the errors are smaller.

    Least squares of the logarithms; every pair counts the same.
    """
    from scipy.optimize import minimize

    def loss(logs: np.ndarray) -> float:
        total = 0.0
        for one in measured:
            least = LEAST * one.numbers["voxel"]
            wrong = np.log(weighted(one, names, np.exp(logs)) / (one.error + least))
            total += float(np.mean(wrong**2))
        return total + 1e-3 * float(np.square(logs).sum())

    found = minimize(loss, np.full(len(names), -1.0), method="Nelder-Mead")
    return np.exp(found.x)


def weighted(one: Measured, names: tuple[str, ...], weights: np.ndarray) -> np.ndarray:
    """Return the weighted sum of ingredients at each landmark."""
    return np.stack([one.numbers[name] for name in names], 1) @ weights


def tabulate(measured: list[Measured]) -> list[dict[str, Any]]:
    """Return the rows; estimates of a pair have weights fitted to the others."""
    from scipy.stats import spearmanr

    def rank(values: np.ndarray, error: np.ndarray) -> float:
        return float(spearmanr(values, error)[0])

    rows = []
    for one in measured:
        row: dict[str, Any] = {
            "case": one.case,
            "landmarks": len(one.error),
            "error_mean": one.error.mean(),
            "error_median": np.median(one.error),
        }
        for name in INGREDIENTS:
            row[f"rho_{name}"] = rank(one.numbers[name], one.error)
        rest = [other for other in measured if other is not one] or [one]
        for name, parts in ESTIMATES.items():
            weights = SAFE.get(name, 1.0) * fit(rest, parts)
            guess = weighted(one, parts, weights)
            row[f"{name}_rho"] = rank(guess, one.error)
            row[f"{name}_median"] = np.median(guess)
            for times in (1, 2, 3):
                row[f"{name}_below_{times}"] = np.mean(one.error < times * guess)
            row[f"{name}_weights"] = " ".join(f"{w:.2f}" for w in weights)
        rows.append(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        )
    return rows


def summary(rows: list[dict[str, Any]], name: str) -> str:
    """Return how well estimates do on pairs that their weights were not fitted to."""
    below = [row[f"{name}_below_2"] for row in rows]
    off = [abs(np.log(row[f"{name}_median"] / row["error_median"])) for row in rows]
    return (
        f"left out one by one: {100 * np.mean(below):.0f} % of the errors below twice "
        f"the estimate ({100 * min(below):.0f} to {100 * max(below):.0f}), rank "
        f"correlation {np.mean([row[f'{name}_rho'] for row in rows]):.2f}, median "
        f"within a factor 1.5 on {sum(o < np.log(1.5) for o in off)} of {len(rows)}"
    )


def draw(measured: list[Measured], path: Path) -> None:
    """Draw true errors over the package's estimates, a panel for each pair."""
    from matplotlib.figure import Figure

    from icon_nephi.report import expected_error as trust

    figure = Figure(figsize=(3 * len(measured), 3.2), layout="tight")
    panels = figure.subplots(1, len(measured), squeeze=False)
    for panel, one in zip(panels[0], measured, strict=True):
        guess = trust.estimate(
            one.numbers["voxel"][0],
            one.numbers["consistency"],
            sharp=one.numbers["sharp"],
        )
        panel.loglog(guess, np.maximum(one.error, 1e-2), ".", alpha=0.5)
        ends = np.array([guess.min(), guess.max()])
        panel.plot(ends, ends, "k-", lw=1, label="estimate")
        panel.plot(ends, 3 * ends, "k:", lw=1, label="three times it")
        panel.set_title(one.case, fontsize=8)
        panel.set_xlabel("estimate (mm)")
    panels[0, 0].set_ylabel("landmark error (mm)")
    panels[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of cases")
    parser.add_argument(
        "--out", type=csv_file, required=True, help="CSV; PNG beside it"
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="registrations a pair")
    parser.add_argument("--fits", type=Path, help="folder to keep registrations in")
    args = parser.parse_args(argv)
    if args.fits is not None and not args.fits.is_dir():
        parser.error(f"--fits: {args.fits} is no folder.")
    if args.seeds < 2:
        parser.error("--seeds must be at least 2.")
    measured = []
    for pair in load_pairs(args.data, args.cases):
        if pair.fixed_points is None:
            print(f"{pair.name}: no landmarks, left out")
            continue
        measured.append(measure(pair, register(pair, args.seeds, args.fits)))
    if not measured:
        parser.error("--cases: none has landmarks.")
    rows = tabulate(measured)
    write_csv(args.out, COLUMNS, rows)
    draw(measured, args.out.with_suffix(".png"))
    for row in rows:
        print("\n".join(f"{k}: {row[k]}" for k in COLUMNS), end="\n\n")
    for name, parts in ESTIMATES.items():
        weights = SAFE.get(name, 1.0) * fit(measured, parts)
        words = zip(weights, parts, strict=True)
        print(f"{name}: " + " + ".join(f"{w:.3f} {part}" for w, part in words))
        print(f"  {summary(rows, name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
