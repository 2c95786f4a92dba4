"""What the benchmarks share: times of rivals turn by turn, memory of a fresh process.

The processor's time of this process is measured, so other programs disturb little;
rivals take turns, so what disturbs one disturbs the others too.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import icon_nephi
from evaluation import csv_file, held_memory, machine, peak_memory, version, write_csv
from icon_nephi.commands.methods import alone as alone
from icon_nephi.commands.text import aligned
from icon_nephi.losses.similarities import PatchNCC

MIB = 2**20
PROVENANCE = ("threads", "machine", "torch", "icon_registration")


def provenance() -> dict[str, Any]:
    """Return what every row of every benchmark ends with."""
    return {
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "torch": version("torch"),
        "icon_registration": version("icon_registration"),
    }


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with ``--out``; the description is a module's docstring."""
    new = argparse.ArgumentParser(description=description.partition("\n")[0])
    new.add_argument("--out", type=csv_file, help="CSV file")
    return new


def alone_in_turn(
    jobs: Iterable[tuple[dict[str, Any], Callable[[], dict[str, Any]]]],
) -> list[dict[str, Any]]:
    """Return each row with what its function returns in a process of its own."""
    return [row | alone(work) for row, work in tqdm(list(jobs), desc="measuring")]


def finish(
    path: Path | None, columns: Sequence[str], rows: list[dict[str, Any]]
) -> None:
    """Print the rows as a table; write them as CSV, with their origin, if asked for."""
    short = [
        {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]
    print(f"{machine()}, {torch.get_num_threads()} threads")
    print(aligned(short, {name: (name, "") for name in columns if name != "error"}))
    if path is not None:
        write_csv(path, (*columns, *PROVENANCE), rows)
        print(f"\nwrote {path}")


def coded_loss(
    dimension: int, nodes: Sequence[int] = (16,), channels: Sequence[int] = (32,)
) -> icon_nephi.GradientICONPoints:
    """Return the loss of one pair's code and two fields, without an encoder."""
    code = icon_nephi.LatentCodeTable(
        grids=[(n,) * dimension for n in nodes], channels=channels
    )
    values = code.global_codes.shape[1] + sum(channels)
    fields = [icon_nephi.LatentMLP(dimension, values) for _ in "AB"]
    return icon_nephi.GradientICONPoints(
        icon_nephi.NePhi(code, *fields),
        PatchNCC(1e-3),
        1.0,
        similarity_sampler=icon_nephi.Patches(600, 3, 2.0, corners=True),
    )


def in_turn(
    works: Mapping[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Return the seconds of each call, after one that is not counted."""
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = clock()
            work()
            seconds[name].append(clock() - start)
    return seconds


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def ratios(rival: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Return the median, least and largest ratio of calls made in the same turn."""
    found = sorted(a / b for a, b in zip(rival, ours, strict=True))
    return median(found), found[0], found[-1]


def peak_above(work: Callable[[], Any]) -> float:
    """Return by how many bytes a call raised this process's peak of resident memory.

    For a fresh process, whose peak so far is what is resident.
    """
    before = held_memory()
    work()
    return peak_memory() - before


class Products(TorchDispatchMode):
    """While it is entered, note the products of matrices: ``shapes``, (M, K, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        begin = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(name)  # 1: a sum
        if begin is not None:
            first, second = (a.shape for a in args[begin : begin + 2])
            count = first[0] if len(first) == 3 else 1
            self.shapes += [(*first[-2:], second[-1])] * count
        return func(*args, **(kwargs or {}))


def flops(shapes: list[tuple[int, int, int]]) -> int:
    return sum(2 * m * k * n for m, k, n in shapes)


def products(shapes: list[tuple[int, int, int]]) -> Callable[[], None]:
    """Return a function that multiplies matrices ``[M, K] [K, N]`` of these shapes.

    The floor of a network: its products of matrices and nothing else, from and to
    memory that is in use already.
    """
    made = {
        (m, k, n): (torch.rand(m, k), torch.rand(k, n), torch.empty(m, n))
        for m, k, n in shapes
    }

    def work() -> None:
        for shape in shapes:
            a, b, out = made[shape]
            torch.mm(a, b, out=out)

    return work
