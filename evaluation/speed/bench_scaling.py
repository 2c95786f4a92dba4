"""How a step's time and memory grow with the image, the samples and the code.

    python -m evaluation.speed.bench_scaling [--out CSV]

One step of registering a pair from scratch with the small field: blocks compared in
both directions, regularity points half as many, Adam. One of the three grows, the
others stay at the middle of theirs. Each row in a process of its own, on one core;
memory is beside the images: code, Adam's state and the step. "power" is the p of
cost ~ size^p between a row and the one before it.
"""

import argparse
import math
import time
from dataclasses import replace
from functools import partial
from typing import Any

from evaluation import csv_file
from evaluation.speed import bench
from icon_nephi._memory import held_memory, peak_memory
from icon_nephi.commands.compare import alone

SWEEPS = {
    "voxels a side": (48, 96, 192),
    "blocks": (150, 600, 2400),
    "nodes a side": (16, 32, 64),
}
COLUMNS = (
    *("grows", "size", "cpu_seconds", "mib_beside_images"),
    *("time_power", "memory_power", "error"),
    *bench.PROVENANCE,
)


def measure(side: int, blocks: int, nodes: int, steps: int) -> dict[str, Any]:
    """Return the cost of a step; for a fresh process."""
    import torch

    from icon_nephi.fit.settings import GRID, make_pair
    from icon_nephi.losses.gradient_icon import GradientICONPoints
    from icon_nephi.losses.similarities import PatchNCC
    from icon_nephi.space.sampling import Patches, Points

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def step_of(side: int, nodes: int) -> Any:
        A, B = (torch.rand(1, 1, *(side,) * 3, generator=generator) for _ in "AB")
        before = held_memory()
        settings = replace(GRID, grids=(nodes // 4, nodes // 2, nodes))
        pair = make_pair(settings, (float(side),) * 3, generator)
        loss = GradientICONPoints(
            pair,
            PatchNCC(1e-3),
            1.0,
            similarity_sampler=Patches(blocks, corners=True),
            regularity_sampler=Points(blocks // 2),
            generator=generator,
        )
        optimizer = torch.optim.Adam(pair.parameters(), lr=1e-3, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            loss(A, B).all_loss.backward()
            optimizer.step()

        return step, before

    step_of(20, 16)[0]()  # what is loaded once does not count
    step, before = step_of(side, nodes)
    step()
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return {
        "cpu_seconds": bench.median(seconds),
        "mib_beside_images": (peak_memory() - before) / bench.MIB,
        **bench.provenance(),
    }


def main(argv: list[str] | None = None) -> None:
    """Print a table; also write it as CSV if asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=csv_file, help="CSV file")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    print(f"{'grows':14s}{'size':>6s}{'CPU s':>9s}{'MiB':>8s}   power of time, memory")
    for number, (name, sizes) in enumerate(SWEEPS.items()):
        last: dict[str, Any] = {}
        for size in sizes:
            given = [middle for _, middle, _ in SWEEPS.values()]
            given[number] = size
            row = {"grows": name, "size": size}
            row |= alone(partial(measure, *given, args.steps))
            rows.append(row)
            if "error" in row:
                print(f"{name:14s}{size:6d} {row['error']}", flush=True)
                continue
            text = ""
            if last:
                for cost, power in (
                    ("cpu_seconds", "time_power"),
                    ("mib_beside_images", "memory_power"),
                ):
                    row[power] = math.log(row[cost] / last[cost], size / last["size"])
                text = f"{row['time_power']:8.2f}{row['memory_power']:8.2f}"
            last = row
            print(
                f"{name:14s}{size:6d}{row['cpu_seconds']:9.3f}"
                f"{row['mib_beside_images']:8.0f}{text}",
                flush=True,
            )
    bench.save(args.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
