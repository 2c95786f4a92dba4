"""How a step's time and memory grow with the image, the samples and the code.

    python -m evaluation.speed.bench_scaling [--out CSV]

One step of registering a pair from scratch with the small field: blocks compared in
both directions, regularity points half as many, Adam. One of the three grows, the
others stay at the middle of theirs. Each row in a process of its own, on one core;
memory is beside the images: code, Adam's state and the step. "power" is the p of
cost ~ size^p between a row and the one before it.
"""

import math
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from evaluation import held_memory, peak_memory
from evaluation.speed import bench

SWEEPS = {
    "voxels a side": (48, 96, 192),
    "blocks": (150, 600, 2400),
    "nodes a side": (16, 32, 64),
}
POWERS = {"cpu_seconds": "time_power", "mib_beside_images": "memory_power"}
COLUMNS = ("grows", "size", *POWERS, *POWERS.values(), "error")


def measure(side: int, blocks: int, nodes: int, steps: int) -> dict[str, Any]:
    """Return the cost of a step; for a fresh process."""
    import torch

    from icon_nephi import GradientICONPoints, Patches, Points
    from icon_nephi.fit.settings import GRID, make_pair
    from icon_nephi.losses.similarities import PatchNCC

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
    parser = bench.parser(__doc__)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args(argv)
    middle = {name: sizes[1] for name, sizes in SWEEPS.items()}
    rows = bench.alone_in_turn(
        (
            {"grows": name, "size": size},
            partial(measure, *(middle | {name: size}).values(), args.steps),
        )
        for name, sizes in SWEEPS.items()
        for size in sizes
    )
    measured = [row for row in rows if "error" not in row]
    for last, row in pairwise(measured):
        if last["grows"] == row["grows"]:
            for cost, power in POWERS.items():
                times = row["size"] / last["size"]
                row[power] = math.log(row[cost] / last[cost], times)
    bench.finish(args.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
