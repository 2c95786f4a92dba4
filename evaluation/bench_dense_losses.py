"""Measure the memory and time of one training step: ICON's losses, and ours.

    python -m evaluation.bench_dense_losses [--sides 32 48 64] [--out CSV]

ICON's losses evaluate a map at every voxel, ten times a step (GradientICON in 3D);
`GradientICONPoints` evaluates it at its samples. One process per row, so that peaks do
not mix; "bytes a voxel" is the peak of the step above what was there before it.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import icon_registration as icon
import torch

import icon_nephi
from evaluation import machine, write_csv
from icon_nephi.memory import held_memory, peak_memory
from icon_nephi.versions import version

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
COLUMNS = (
    *("loss", "field", "side", "peak_mib", "bytes_per_voxel", "seconds"),
    *("threads", "machine", "torch"),
)


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
    """Return one row; call it in a process of its own."""
    make_step(loss, field, 8)()  # what is loaded once does not count
    step = make_step(loss, field, side)
    before, start = held_memory(), time.perf_counter()
    step()
    seconds, peak = time.perf_counter() - start, peak_memory() - before
    return {
        "loss": loss,
        "field": field,
        "side": side,
        "peak_mib": peak / 2**20,
        "bytes_per_voxel": peak / side**3,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "torch": version("torch"),
    }


def measure_alone(loss: str, field: str, side: int) -> dict:
    """Return `measure`'s row, from a new process."""
    code = f"from evaluation import bench_dense_losses as b\nb.tell({loss!r}, {field!r}"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}, {side})"],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def tell(loss: str, field: str, side: int) -> None:
    print(json.dumps(measure(loss, field, side)))


def main(sides: tuple[int, ...] = (32, 48, 64), out: Path | None = None) -> None:
    """Print a table; also write it as CSV if asked for."""
    rows = []
    print(f"{machine()}, {torch.get_num_threads()} threads, 3D, one training step")
    print(f"{'loss':20s}{'field':16s}{'side':>5s}{'MiB':>9s}{'B/voxel':>9s}{'s':>8s}")
    for field in FIELDS:
        for loss in LOSSES:
            for side in sides:
                row = measure_alone(loss, field, side)
                rows.append(row)
                print(
                    f"{loss:20s}{field:16s}{side:5d}{row['peak_mib']:9.0f}"
                    f"{row['bytes_per_voxel']:9.0f}{row['seconds']:8.1f}",
                    flush=True,
                )
    if out is not None:
        write_csv(out, COLUMNS, rows)
        print(f"\nwrote {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 48, 64])
    parser.add_argument("--out", type=Path, help="CSV file")
    arguments = parser.parse_args()
    main(tuple(arguments.sides), arguments.out)
