"""Measure the memory and time of one training step: ICON's losses, and ours.

    python -m evaluation.speed.bench_dense_losses [--sides 32 48 64] [--out CSV]

ICON's losses evaluate a map at every voxel, ten times a step (GradientICON in 3D);
`GradientICONPoints` evaluates it at its samples. One process per row, so that peaks do
not mix; "bytes a voxel" is the peak of the step above what was there before it.
"""

import time
from functools import partial
from itertools import product

import icon_registration as icon
import torch

import icon_nephi
from evaluation.speed import bench

GRIDS, CHANNELS = ((8,) * 3, (16,) * 3, (32,) * 3), (8, 8, 8)
FIELDS = {
    "LatentMLP": icon_nephi.LatentMLP,
    "ModulatedSiren": icon_nephi.ModulatedSiren,
}
LOSSES = {
    "GradientICON": lambda net: icon.GradientICON(net, icon.LNCC(sigma=4), 1.5),
    "GradientICONSparse": lambda net: icon.losses.GradientICONSparse(
        net, icon.LNCC(sigma=4), 1.5
    ),
    "GradientICONPoints": lambda net: icon_nephi.GradientICONPoints(
        net, icon.losses.NCC(), 1.5
    ),
}
COLUMNS = ("loss", "field", "side", "peak_mib", "bytes_per_voxel", "seconds", "error")


def make_step(loss: str, field: str, side: int):
    """Return a function that makes one step, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    table = icon_nephi.LatentCodeTable(
        grids=GRIDS, channels=CHANNELS, global_size=0, generator=generator
    )
    made = FIELDS[field](3, sum(CHANNELS), generator=generator)
    torch.nn.init.normal_(made.last.weight, std=1e-3, generator=generator)
    model = LOSSES[loss](icon_nephi.FunctionFromNeuralField(table, made))
    model.assign_identity_map([1, 1, side, side, side])
    shape = (2, 1, 1, side, side, side)
    image_A, image_B = torch.rand(shape, generator=generator)

    def step() -> None:
        model(image_A, image_B).all_loss.backward()

    return step


def measure(loss: str, field: str, side: int) -> dict:
    """Return one row; for a fresh process."""
    make_step(loss, field, 8)()  # what is loaded once does not count
    step = make_step(loss, field, side)
    start, peak = time.perf_counter(), bench.peak_above(step)
    return {
        "peak_mib": peak / bench.MIB,
        "bytes_per_voxel": peak / side**3,
        "seconds": time.perf_counter() - start,
        **bench.provenance(),
    }


def main(argv: list[str] | None = None) -> None:
    """Print a table; also write it as CSV if asked for."""
    parser = bench.parser(__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 48, 64])
    args = parser.parse_args(argv)
    rows = bench.alone_in_turn(
        (
            {"loss": loss, "field": field, "side": side},
            partial(measure, loss, field, side),
        )
        for field, loss, side in product(FIELDS, LOSSES, args.sides)
    )
    bench.finish(args.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
