"""Time a field's values and Jacobians per point, and reading the code.

    python -m evaluation.speed.bench_field [--out CSV]

"ours" carries derivatives forward beside the values; "autograd" is one backward pass
per component. Losses on Jacobians are compared in `evaluation.speed.bench_regularizer`.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from evaluation.speed import bench
from icon_nephi import LatentCode, LatentMLP, ModulatedSiren
from icon_nephi.fields import displacement_and_jacobian

CODES = ((8, 8), (16, 8), (32, 8))  # nodes a side and channels of each local grid
COLUMNS = ("what", "points", "microseconds_per_point", "ratio")


def seconds_of(work: Callable[[], None], least: float = 0.3) -> float:
    """Return the least seconds of one call: other programs only add to it."""
    work(), work()
    times, end = [], time.perf_counter() + least
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def workloads(field, code: LatentCode, points: torch.Tensor) -> dict:
    """Return what is timed, by name; the first is what the others compare with."""
    parameters = [*field.parameters(), code.global_code, *code.local_codes]

    def value():
        return field(points, code.at(points)[0])

    def ours():
        return displacement_and_jacobian(field, points, code.at(points, gradient=True))

    def autograd():
        x = points.detach().requires_grad_()
        u = field(x, code.at(x)[0])
        rows = [
            torch.autograd.grad(u[..., i].sum(), x, retain_graph=True)[0]
            for i in range(u.shape[-1])
        ]
        return u, torch.stack(rows, -2)

    def without_graph(work):
        def run():
            with torch.no_grad():
                work()

        return run

    def with_backward(work):
        def run():
            loss = sum(t.square().mean() for t in work())
            torch.autograd.grad(loss, parameters, allow_unused=True)

        return run

    return {
        "value": without_graph(value),
        "value + Jacobian, ours": without_graph(ours),
        "value + Jacobian, autograd": autograd,
        "value, with backward": with_backward(lambda: [value()]),
        "value + Jacobian, ours, with backward": with_backward(ours),
    }


def readings(code: LatentCode, points: torch.Tensor) -> dict:
    """Return how the code's grids are read: ours, and torch's grid_sample."""

    def ours(gradient):
        def run():
            with torch.no_grad():
                code.at(points, gradient=gradient)

        return run

    def grid_sample():
        at = (2 * points[..., None, None, :] - 1).flip(-1)
        with torch.no_grad():
            for grid in code.local_codes:
                torch.nn.functional.grid_sample(grid, at, align_corners=True)

    return {
        "read the code, value": ours(False),
        "read the code, value + gradient": ours(True),
        "grid_sample (linear), value": grid_sample,
    }


def main(counts: tuple[int, ...] = (500, 5000), out: Path | None = None) -> None:
    """Print a table; also write it as CSV if asked for."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    grids = tuple(
        torch.randn(1, c, n, n, n, generator=generator).requires_grad_()
        for n, c in CODES
    )
    empty = torch.zeros(1, 0, requires_grad=True)
    code = LatentCode(empty, grids)
    fields = {
        "LatentMLP (64)": LatentMLP(3, code.size),
        "ModulatedSiren (64)": ModulatedSiren(
            3, code.size, width=64, frequencies=32, omega=5.0
        ),
        "ModulatedSiren (the paper's)": ModulatedSiren(3, code.size),
    }
    for field in fields.values():  # zeros could be faster
        torch.nn.init.normal_(field.last.weight, std=0.01)
    for count in counts:
        points = torch.rand(1, count, 3, generator=generator)
        tables = {name: workloads(f, code, points) for name, f in fields.items()}
        for name, table in {**tables, "code": readings(code, points)}.items():
            costs = {w: 1e6 * seconds_of(work) / count for w, work in table.items()}
            base = next(iter(costs.values()))
            rows += [
                {
                    "what": f"{name}: {what}",
                    "points": count,
                    "microseconds_per_point": cost,
                    "ratio": cost / base,
                    **bench.provenance(),
                }
                for what, cost in costs.items()
            ]
    bench.finish(out, COLUMNS, rows)


if __name__ == "__main__":
    main(out=bench.parser(__doc__).parse_args().out)
