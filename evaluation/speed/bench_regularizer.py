"""Gradient inverse consistency and its gradient: ours and three rivals, in one run.

    python -m evaluation.speed.bench_regularizer [--counts 500 5000 50000] [--out CSV]

"ours" carries Jacobians forward and takes the points in chunks, each with its backward
pass (the loss is a mean over points). The rivals take all points at once: "double
backward" (autograd with create_graph), "finite differences" (steps of 1e-3, as ICON),
"torch.func" (vmap of jvp). Times are of the processor, turn by turn, as ratios to ours;
memory is that of a fresh process above what was there; errors are those of the gradient
by all weights and codes against double backward in float64. The floor is the time of
ours' products of matrices alone, in the same turns.
"""

from collections.abc import Callable
from itertools import product
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

import icon_nephi
from evaluation.speed import bench
from icon_nephi.fields import compiled
from icon_nephi.space.frames import points_as_grid
from icon_nephi.transforms import NeuralTransform

FIELDS = {
    "ModulatedSiren": icon_nephi.ModulatedSiren,
    "LatentMLP": icon_nephi.LatentMLP,
}
NODES = 16
CHUNK = 1000  # points; 500 and 2000 take 5 to 15 % longer
STEP = 1e-3
REPEATS = {500: 15, 5000: 5, 50_000: 2}
COLUMNS = (
    *("field", "points", "method", "seconds", "ratio", "ratio_least", "ratio_most"),
    *("mib", "gradient_error", "floor_seconds", "times_floor", "gflops"),
)


class Problem:
    """Two fields that are not the identity, a linear code (the paper's), points."""

    def __init__(self, kind: str, count: int, dtype=torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = icon_nephi.LatentCodeTable(
            grids=[(NODES,) * 3], interpolation="linear", generator=generator
        )
        fields = [FIELDS[kind](3, generator=generator) for _ in "AB"]
        for field in fields:
            scale = 1e-3 if kind == "ModulatedSiren" else 0.1
            torch.nn.init.normal_(field.last.weight, std=scale, generator=generator)
        self.fields = torch.nn.ModuleList(fields).to(dtype)
        self.table.to(dtype)
        self.weights = [*self.table.parameters(), *self.fields.parameters()]
        x = torch.rand(count + count // 50 + 50, 3, generator=generator)
        # A point on a face of a cell within rounding has two linear gradients.
        with torch.no_grad():
            moved = Problem.ours_maps(self)[1](points_as_grid(x[None].to(dtype)))
            near = torch.cat([x, moved[0, :, :, 0, 0].T.float()], 1) * (NODES - 1)
        x = x[((near - near.round()).abs() > 1e-4).all(1)][:count]
        self.x = x.to(dtype)

    def ours_maps(self) -> list[NeuralTransform]:
        code = self.table(torch.empty(0), torch.empty(0))
        return [NeuralTransform(f, code, owned=False) for f in self.fields]

    def plain(self, x: Tensor) -> Tensor:
        """phi_AB(phi_BA(x)) of rows ``[N, 3]`` in torch's own operations."""
        for field in reversed(self.fields):
            inside = x.clamp(0, 1)
            x = x + plain_field(field, inside, self.plain_code(inside))
        return x

    def plain_code(self, x: Tensor) -> Tensor:
        table = self.table.local_codes[0][0].flatten(1).T
        t = x * (NODES - 1)
        base = t.detach().floor().clamp(max=NODES - 2)
        share = t - base
        value = 0.0
        for corner in range(8):
            far = torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1])
            weight = torch.where(far > 0, share, 1 - share).prod(-1, keepdim=True)
            i, j, k = (base.long() + far).unbind(-1)
            value = value + weight * table[(i * NODES + j) * NODES + k]
        shared = self.table.global_codes[0].expand(*x.shape[:-1], -1)
        return torch.cat([shared, value], -1)


def plain_field(field: torch.nn.Module, x: Tensor, code: Tensor) -> Tensor:
    """A field's formulas, as anyone would write them."""
    if isinstance(field, icon_nephi.LatentMLP):
        hidden = torch.cat([2 * x - 1, code], -1)
        for layer in field.hidden:
            hidden = torch.sin(field.omega * layer(hidden))
        return field.last(hidden)
    phase = 2 * torch.pi * (2 * x - 1) @ field.frequencies.T
    features = torch.cat([phase.sin(), phase.cos()], -1)
    inputs = torch.cat([code, features], -1)
    first = gate = torch.sin(field.omega * field.modulator[0](inputs))
    hidden = torch.sin(field.first_omega * field.synthesis[0](features))
    for modulate, synthesise in zip(
        field.modulator[1:], field.synthesis[1:], strict=True
    ):
        gate = torch.sin(field.omega * modulate(gate)) + first
        hidden = gate * torch.sin(field.omega * synthesise(hidden))
    return field.last(hidden) / 2


def gradient(problem: Problem, columns: list[Tensor]) -> list[Tensor]:
    """Return the gradient of the loss of Jacobians, given by their columns."""
    difference = torch.stack(columns, -1) - torch.eye(3, dtype=columns[0].dtype)
    loss = difference.square().sum((1, 2)).mean() / 3
    return list(torch.autograd.grad(loss, problem.weights, materialize_grads=True))


def ours(problem: Problem) -> list[Tensor]:
    total = [torch.zeros_like(w) for w in problem.weights]
    for x in problem.x.split(CHUNK):
        phi_AB, phi_BA = problem.ours_maps()
        loss = icon_nephi.gradient_inverse_consistency(
            phi_AB, phi_BA, points_as_grid(x[None])
        )
        found = torch.autograd.grad(loss * (len(x) / len(problem.x)), problem.weights)
        torch._foreach_add_(total, found)
    return total


def double_backward(problem: Problem, x: Tensor | None = None) -> list[Tensor]:
    x = (problem.x if x is None else x).detach().requires_grad_()
    y = problem.plain(x)
    return gradient(
        problem,
        [torch.autograd.grad(y[:, i].sum(), x, create_graph=True)[0] for i in range(3)],
    )


def finite_differences(problem: Problem) -> list[Tensor]:
    y = problem.plain(problem.x)
    steps = STEP * torch.eye(3, dtype=y.dtype)
    columns = [(problem.plain(problem.x + step) - y) / STEP for step in steps]
    return gradient(problem, columns)


def torch_func(problem: Problem) -> list[Tensor]:
    def along(seed: Tensor) -> Tensor:
        seeds = seed.expand_as(problem.x)
        return torch.func.jvp(problem.plain, (problem.x,), (seeds,))[1]

    columns = torch.func.vmap(along)(torch.eye(3, dtype=problem.x.dtype))
    return gradient(problem, [*columns])


METHODS: dict[str, Callable[[Problem], list[Tensor]]] = {
    "ours": ours,
    "double backward": double_backward,
    "finite differences": finite_differences,
    "torch.func": torch_func,
}


def exact(kind: str, count: int) -> list[Tensor]:
    """Return the gradient in float64, by double backward, in chunks."""
    single = Problem(kind, count)
    problem = Problem(kind, 1, torch.float64)
    total = [torch.zeros_like(w) for w in problem.weights]
    for x in single.x.double().split(CHUNK):
        found = double_backward(problem, x)
        torch._foreach_add_(total, found, alpha=len(x) / count)
    return total


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    a, b = (torch.cat([t.double().flatten() for t in ts]) for ts in (found, expected))
    return float((a - b).norm() / b.norm())


def memory(kind: str, count: int, method: str, threads: int) -> dict[str, float]:
    """Return the peak of a call above what there was, MiB; for a fresh process."""
    torch.set_num_threads(threads)
    METHODS[method](Problem(kind, 50))  # what is loaded once does not count
    problem = Problem(kind, count)
    return {"mib": bench.peak_above(lambda: METHODS[method](problem)) / bench.MIB}


def rows_of(kind: str, count: int, names: list[str]) -> list[dict]:
    """Return a row for each method, with times, errors and memory."""
    problem, expected = Problem(kind, count), exact(kind, count)
    errors = {name: error(METHODS[name](problem), expected) for name in names}
    # Torch's products: the core's are the same, but no operators.
    by_torch = mock.patch.object(compiled, "suits", return_value=False)
    with by_torch, bench.Products() as noted:
        ours(problem)
    shapes = [s for s in noted.shapes if min(s) > 8]  # the few others cost nothing
    works = {name: lambda n=name: METHODS[n](problem) for name in names}
    works["floor"] = bench.products(shapes)
    repeats = REPEATS.get(count, 5)
    seconds = bench.in_turn(works, repeats)
    rows = []
    for name in names:
        ratio, least, most = bench.ratios(seconds[name], seconds["ours"])
        row = {
            "field": kind,
            "points": count,
            "method": name,
            "seconds": bench.median(seconds[name]),
            "ratio": ratio,
            "ratio_least": least,
            "ratio_most": most,
            "gradient_error": errors[name],
            **bench.alone(memory, kind, count, name, torch.get_num_threads()),
            **bench.provenance(),
        }
        if name == "ours":
            row["floor_seconds"] = bench.median(seconds["floor"])
            row["times_floor"] = bench.ratios(seconds["ours"], seconds["floor"])[0]
            row["gflops"] = bench.flops(shapes) / row["floor_seconds"] / 1e9
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Print a table; also write it as CSV if asked for."""
    parser = bench.parser(__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 5000, 50_000])
    parser.add_argument("--fields", nargs="+", choices=FIELDS, default=list(FIELDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    names = list(dict.fromkeys(["ours", *args.methods]))
    rows: list[dict] = []
    for kind, count in tqdm(list(product(args.fields, args.counts)), "measuring"):
        rows += rows_of(kind, count, names)
    bench.finish(args.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
