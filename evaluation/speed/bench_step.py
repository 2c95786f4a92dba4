"""One training step and one step of instance optimisation, beside voxel GradICON's.

    python -m evaluation.speed.bench_step [--sizes 96 128 175] [--large 256] [--out CSV]

On one pair of cubes: the paper's network and field with 100,000 similarity and 500
regularity points; instance optimisation of the default field and its code (600 blocks,
500 regularity points); and ICON's GradientICONSparse around one tallUNet2, and around
its published nest of them (``--multi``). Each in a process of its own. The first step
is not timed: it makes the optimiser's state. Ratios are of the single voxel network to
ours; memory is what steps add to the process's, images included. ``--large`` are more
sizes for ours alone.
"""

import argparse
import time
from functools import partial
from typing import Any

from evaluation import csv_file
from evaluation.speed import bench
from icon_nephi._memory import held_memory, peak_memory
from icon_nephi.commands.compare import alone

COLUMNS = (
    *("side", "method", "seconds", "least", "most", "cpu_seconds", "peak_mib"),
    *("time_ratio", "cpu_ratio", "memory_ratio", "device", "error"),
    *bench.PROVENANCE,
)
STEPS = {"voxel": 1, "voxel_multi": 1, "nephi training": 3, "nephi IO": 20}


def step_of(method: str, side: int, device: str) -> Any:
    """Return a function that makes one step, forward, backward and Adam."""
    import torch

    import icon_nephi
    from evaluation.accuracy.voxel import NETWORKS
    from icon_nephi.fit.refine import SAMPLER
    from icon_nephi.losses.similarities import PatchNCC

    torch.manual_seed(0)
    shape = [1, 1, side, side, side]
    A, B = (torch.rand(shape, device=device) for _ in "AB")
    if method in NETWORKS:
        network = NETWORKS[method](shape)
    elif method == "nephi training":
        network = icon_nephi.make_network(shape, preset="paper")
    else:
        code = icon_nephi.LatentCodeTable(
            grids=[(n,) * 3 for n in (4, 8, 16)], channels=[16] * 3
        )
        fields = [icon_nephi.LatentMLP(3, 32 + 3 * 16) for _ in "AB"]
        network = icon_nephi.GradientICONPoints(
            icon_nephi.NePhi(code, *fields),
            PatchNCC(1e-3),
            1.0,
            similarity_sampler=SAMPLER,
        )
    network.to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        network(A, B).all_loss.backward()
        optimizer.step()

    return step


def measure(method: str, side: int, device: str, threads: int) -> dict[str, Any]:
    """Return the cost of a step; for a fresh process."""
    import torch

    torch.set_num_threads(threads)
    cuda = device.startswith("cuda")
    if not cuda and method.startswith("nephi"):
        step_of(method, 20, device)()  # what is loaded once does not count
    before = 0.0 if cuda else held_memory()
    step = step_of(method, side, device)
    step()
    wall, cpu = [], []
    for _ in range(STEPS[method]):
        started, used = time.perf_counter(), time.process_time()
        step()
        if cuda:
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    top = torch.cuda.max_memory_allocated() if cuda else peak_memory()
    return {
        "seconds": bench.median(wall),
        "least": min(wall),
        "most": max(wall),
        "cpu_seconds": bench.median(cpu),
        "peak_mib": (top - before) / bench.MIB,
        **bench.provenance(),
    }


def main(argv: list[str] | None = None) -> None:
    """Print a table; also write it as CSV if asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128, 175])
    parser.add_argument("--large", type=int, nargs="*", default=[])
    parser.add_argument("--multi", action="store_true", help="the nest of networks too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=csv_file, help="CSV file")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    print(f"{'side':>5s} {'method':16s}{'s':>9s}{'CPU s':>9s}{'MiB':>8s}   voxel / it")
    for side in (*args.sizes, *args.large):
        rivals = ["voxel", *(["voxel_multi"] if args.multi else [])]
        methods = [*(rivals if side in args.sizes else ()), "nephi training"]
        first: dict[str, Any] = {}
        for method in (*methods, "nephi IO"):
            row = {"side": side, "method": method, "device": args.device}
            row |= alone(partial(measure, method, side, args.device, args.threads))
            if method == "voxel":
                first = row
            rows.append(row)
            if "error" in row:
                print(f"{side:5d} {method:16s} {row['error']}", flush=True)
                continue
            text = ""
            if "seconds" in first:
                row["time_ratio"] = first["seconds"] / row["seconds"]
                row["cpu_ratio"] = first["cpu_seconds"] / row["cpu_seconds"]
                row["memory_ratio"] = first["peak_mib"] / row["peak_mib"]
                text = (
                    f"{row['time_ratio']:8.1f} x, {row['cpu_ratio']:.1f} x CPU, "
                    f"{row['memory_ratio']:.1f} x memory"
                )
            print(
                f"{side:5d} {method:16s}{row['seconds']:9.3f}{row['cpu_seconds']:9.3f}"
                f"{row['peak_mib']:8.0f}{text}",
                flush=True,
            )
    bench.save(args.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
