"""The displacement at every voxel: a neural map's export, and tallUNet2's inference.

    python -m evaluation.speed.bench_export [--side 175] [--out CSV]

"ours" is `over_grid` of a map in millimetres, exact at every voxel,
with the small field of `register` ("by points": as if the voxels were scattered) and
with the paper's; the rival is one forward pass of ICON's voxel network. Each in a
process of its own, on one core; memory is beside the images and the result.
"""

import time
from functools import partial
from typing import Any

from evaluation import held_memory, peak_memory
from evaluation.speed import bench

METHODS = ("tallUNet2", "default field", "by points", "paper's field")
COLUMNS = ("side", "method", "cpu_seconds", "mib_beside_output", "ratio", "error")


def make_map(method: str, side: int, device: str = "cpu") -> Any:
    """Return a neural map of a cube's unit box, of the default or the paper's field."""
    import torch

    import icon_nephi
    from icon_nephi.fit.settings import PRESETS, make_pair
    from icon_nephi.transforms import NeuralTransform

    generator = torch.Generator().manual_seed(0)
    if method != "paper's field":
        pair = make_pair(PRESETS["grid"][3], (side,) * 3, generator).to(device)
        code, field = pair.net(None, None), pair.field_AB
    else:
        table = icon_nephi.LatentCodeTable(generator=generator).to(device)
        code = table(None, None)
        field = icon_nephi.ModulatedSiren(3, generator=generator).to(device)
    return NeuralTransform(field, code, owned=True)


def export(method: str, side: int, device: str = "cpu") -> Any:
    """Return a function that makes the displacement on a cube of voxels."""
    import torch

    from icon_nephi.commands.methods import voxel_step
    from icon_nephi.maps.framed import FramedMap, over_grid
    from icon_nephi.space.frames import Geometry

    size = (side,) * 3
    if method == "tallUNet2":
        torch.manual_seed(0)
        A, B = (torch.rand(1, 1, *size, device=device) for _ in "AB")
        network = voxel_step(A.shape).eval().to(device)

        def infer() -> Any:
            with torch.no_grad():
                return network.net(A, B)

        return infer
    frame = Geometry.unit(size).unit_to_physical()
    phi = FramedMap(make_map(method, side, device), frame, frame, device)
    if method == "by points":
        return lambda: over_grid(lambda points: phi(points) - points, size, frame, 3)
    return lambda: over_grid(
        lambda points, moved: moved - points, size, frame, 3, mapped=phi
    )


def measure(method: str, side: int, repeats: int) -> dict[str, Any]:
    """Return the cost of the fastest call; for a fresh process."""
    import torch

    torch.set_num_threads(1)
    export(method, 20)()  # what is loaded once does not count
    work = export(method, side)
    before, seconds = held_memory(), []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    beside = (peak_memory() - before - 12 * side**3) / bench.MIB  # 3 float32 a voxel
    return {
        "cpu_seconds": min(seconds),
        "mib_beside_output": beside,
        **bench.provenance(),
    }


def main(argv: list[str] | None = None) -> None:
    """Print a table; also write it as CSV if asked for."""
    parser = bench.parser(__doc__)
    parser.add_argument("--side", type=int, default=175)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args(argv)
    rows = bench.alone_in_turn(
        (
            {"side": args.side, "method": method},
            partial(measure, method, args.side, args.repeats),
        )
        for method in args.methods
    )
    rival = rows[0].get("cpu_seconds") if rows[0]["method"] == METHODS[0] else None
    for row in rows:
        if rival and "cpu_seconds" in row:
            row["ratio"] = rival / row["cpu_seconds"]
    bench.finish(args.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
