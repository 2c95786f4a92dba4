"""Peak memory against resolution: voxel GradICON, NePhi training, NePhi IO.

    python -m evaluation.speed.memory_vs_resolution --out memory.csv [--small]

One pair of cubes from 40 to 560 voxels a side; a training step, or steps of instance
optimisation, in a process of its own each: peak resident memory, on a GPU the peak of
its tensors. What would not fit into this machine is not run: its figure comes from a
straight line through those that were (bytes for each voxel) and is marked as fitted.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluation import csv_file, machine, write_csv
from evaluation.speed import bench
from icon_nephi.commands import methods

SIDES = (40, 64, 96, 128, 160, 175, 200, 240, 280, 320, 360, 400, 480, 560)
PAPER = 5.0  # the factor of its abstract
SMALL = (32, 48, 64, 80, 96)
COLUMNS = (
    *("side", "method", "peak_gib", "fitted", "bytes_per_voxel", "step_ms", "error"),
    *("device", "machine"),
)
COLOURS = {"voxel training": "C3", "NePhi training": "C0", "NePhi IO": "C2"}


def optimise(side: int, device: str | None, steps: int = 3) -> dict[str, Any]:
    """Cost of steps of instance optimisation of a code and two fields, no encoder."""
    import torch

    from icon_nephi.fit.refine import refine_pair
    from icon_nephi.io.image_input import choose_device

    where = choose_device(device, None)
    torch.manual_seed(0)
    A, B = (torch.rand(1, 1, side, side, side, device=where) for _ in "AB")
    model = bench.coded_loss(3)
    model.assign_identity_map([1, 1, side, side, side])
    model.to(where)
    start = methods.now(where)
    refine_pair(model, A, B, steps=steps, progress=False)
    spent = methods.now(where) - start
    return {"step_ms": 1000 * spent / steps, "peak_gib": methods.peak_gib(where)}


def train(side: int, device: str | None, kind: str) -> dict[str, Any]:
    from evaluation.accuracy.voxel import training_step

    return training_step(kind, (side,) * 3, device=device)


METHODS = {
    "voxel training": partial(train, kind="voxel"),
    "NePhi training": partial(train, kind="nephi"),
    "NePhi IO": optimise,
}


def room(device: str | None) -> float:
    """GiB that a process may take: most of what is free."""
    from icon_nephi.io.image_input import choose_device

    where = choose_device(device, None)
    if where.type == "cuda":
        import torch

        return 0.9 * torch.cuda.mem_get_info(where)[0] / 2**30
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 0.6 * int(line.split()[1]) / 2**20
    return 4.0


def law(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Return GiB at no voxels and GiB for each voxel, by least squares."""
    done = [r for r in rows if r.get("peak_gib") is not None and not r["fitted"]]
    if len(done) < 2:
        return float("nan"), float("nan")
    voxels = np.array([r["side"] ** 3 for r in done], float)
    slope, start = np.polyfit(voxels, [r["peak_gib"] for r in done], 1)
    return float(start), float(slope)


def measure(
    sides: tuple[int, ...], device: str | None, limit: float
) -> list[dict[str, Any]]:
    """Return a row for each method and side, small to large."""
    rows: list[dict[str, Any]] = []
    fixed = {"device": device or "default", "machine": machine()}
    with tqdm(total=len(METHODS) * len(sides), desc="measuring") as bar:
        for name, function in METHODS.items():
            mine: list[dict[str, Any]] = []
            failed = False
            for side in sorted(sides):
                bar.set_postfix_str(f"{name}, {side}^3")
                start, slope = law(mine)
                expected = start + slope * side**3
                row: dict[str, Any] = {"side": side, "method": name, "fitted": False}
                if failed or expected > limit:  # nan compares as False
                    row |= {"fitted": True, "peak_gib": expected}
                else:
                    row |= bench.alone(function, side, device)
                    if "error" in row:
                        failed = True
                        row |= {"fitted": True, "peak_gib": expected}
                mine.append(row | fixed)
                bar.update()
            slope = law(mine)[1]
            rows += [row | {"bytes_per_voxel": slope * 2**30} for row in mine]
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="tight")
    axis = figure.subplots()
    for name, colour in COLOURS.items():
        mine = [row for row in rows if row["method"] == name]
        axis.plot([r["side"] for r in mine], [r["peak_gib"] for r in mine], colour)
        for fitted, fill in ((False, colour), (True, "white")):
            some = [r for r in mine if r["fitted"] == fitted]
            axis.scatter(
                [r["side"] for r in some],
                [r["peak_gib"] for r in some],
                facecolors=fill,
                edgecolors=colour,
                zorder=3,
                label=f"{name}{', fitted' if fitted else ''}" if some else None,
            )
    axis.set_xlabel("voxels a side")
    axis.set_ylabel("peak memory, GiB")
    axis.set_yscale("log")
    axis.legend()
    figure.savefig(path, dpi=100)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Return the paper's statement, ours, and whether they agree."""
    largest = max(row["side"] for row in rows)
    peaks = {r["method"]: r for r in rows if r["side"] == largest}
    voxel, ours = peaks["voxel training"], peaks["NePhi training"]
    ratio = voxel["peak_gib"] / ours["peak_gib"]
    how = "fitted" if voxel["fitted"] or ours["fitted"] else "measured"
    agrees = "agrees" if ratio >= PAPER else "does not agree at this size"
    return (
        "Paper: training takes several times less memory than voxel GradICON (at 360^3 "
        f"44.7 GB against 4.35 GB). Here at {largest}^3, {how}: "
        f"{voxel['peak_gib']:.2f} GiB against {ours['peak_gib']:.2f} GiB, "
        f"{ratio:.1f} times less: {agrees}."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=csv_file, required=True, help="CSV; PNG beside it"
    )
    parser.add_argument("--small", action="store_true", help="32 to 96 a side")
    parser.add_argument("--sides", type=int, nargs="+", help="voxels a side")
    parser.add_argument("--limit", type=float, help="GiB (default: what is free)")
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    sides = tuple(args.sides or (SMALL if args.small else SIDES))
    if min(sides) < methods.SMALLEST:
        parser.error(f"--sides must be at least {methods.SMALLEST}.")
    limit = room(args.device) if args.limit is None else args.limit
    rows = measure(sides, args.device, limit)
    write_csv(args.out, COLUMNS, rows)
    draw(rows, args.out.with_suffix(".png"))
    for row in rows:
        mark = " (fitted)" if row["fitted"] else ""
        print(f"{row['method']:15s} {row['side']}^3 {row['peak_gib']:.2f} GiB{mark}")
    print(verdict(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
