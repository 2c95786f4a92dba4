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

import time
from functools import partial
from typing import Any

from evaluation import held_memory, peak_memory
from evaluation.speed import bench

RATIOS = {
    "seconds": "time_ratio",
    "cpu_seconds": "cpu_ratio",
    "peak_mib": "memory_ratio",
}
COLUMNS = (
    *("side", "method", "seconds", "least", "most", "cpu_seconds", "peak_mib"),
    *(*RATIOS.values(), "device", "error"),
)
STEPS = {"voxel": 1, "voxel_multi": 1, "nephi training": 3, "nephi IO": 20}
ON_GPU = 5  # times as many there


def step_of(method: str, side: int, device: str) -> Any:
    """Return a function that makes one step, forward, backward and Adam."""
    import torch

    import icon_nephi
    from evaluation.accuracy.voxel import NETWORKS

    torch.manual_seed(0)
    shape = [1, 1, side, side, side]
    A, B = (torch.rand(shape, device=device) for _ in "AB")
    if method in NETWORKS:
        network = NETWORKS[method](shape)
    elif method == "nephi training":
        network = icon_nephi.make_network(shape, preset="paper")
    else:
        network = bench.coded_loss(3, (4, 8, 16), (16,) * 3)
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
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = [], []
    for _ in range(STEPS[method] * (ON_GPU if cuda else 1)):
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
    parser = bench.parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128, 175])
    parser.add_argument("--large", type=int, nargs="*", default=[])
    parser.add_argument("--multi", action="store_true", help="the nest of networks too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    ours = ("nephi training", "nephi IO")
    everything = ("voxel", *(("voxel_multi",) if args.multi else ()), *ours)
    rows = bench.alone_in_turn(
        (
            {"side": side, "method": method, "device": args.device},
            partial(measure, method, side, args.device, args.threads),
        )
        for side in (*args.sizes, *args.large)
        for method in (everything if side in args.sizes else ours)
    )
    voxel = {row["side"]: row for row in rows if row["method"] == "voxel"}
    for row in rows:
        rival = voxel.get(row["side"], {})
        if "seconds" in row and "seconds" in rival:
            row |= {ratio: rival[cost] / row[cost] for cost, ratio in RATIOS.items()}
    bench.finish(args.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
