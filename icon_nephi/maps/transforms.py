"""Code + field -> phi, a callable in ICON's frame.

A map is any callable ``coordinates [B, d, *any] -> [B, d, *any]`` in the unit box,
as ICON's. Ours also know their Jacobian: ``.jacobian(coordinates)`` is
``[B, d, d, *any]``, entry (i, j) the derivative of component i by coordinate j.
`value_and_jacobian` finds both for any map, ours and ICON's.

Ownership: a map made with gradients on shares the live weights; one made with
gradients off owns a copy, so later training (or ICON's restoring of the weights after
fine-tuning) does not change it, and it can be called outside ``no_grad``.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from icon_nephi import fields
from icon_nephi._check import check_coordinates
from icon_nephi._memory import in_smaller_parts
from icon_nephi.fields import compiled
from icon_nephi.fields.codes import LatentCode
from icon_nephi.maps.jacobians import derived
from icon_nephi.space.frames import from_rows, to_rows, within

Map = Callable[[Tensor], Tensor]
CHUNK_SIZE = 2**13  # its layers fit the caches of a core (docs/performance.md)
# On a GPU a chunk takes as long as its calls whatever its size; what a graph keeps of
# one is a third of a GiB (`evaluation.speed.gpu` tries others). Without a graph a chunk
# may be so many times larger, also where points lie on a lattice.
GPU_CHUNK_SIZE, GPU_WITHOUT_GRAPH = 2**15, 16
_LEAST = 2**8  # points at once, however little memory there is
_TWICE = (
    b"autograd cannot derive a neural map twice: get its exact Jacobian from "
    b"icon_nephi.transforms.value_and_jacobian, and derive that once"
)
# What ICON's TwoStepRegistration returns.
_TWO_STEPS = "TwoStepRegistration.forward.<locals>.<lambda>"


class Composed:
    """What our maps share: what they are made of is in ``__closure__``."""

    @property
    def __closure__(self) -> tuple[types.CellType, ...]:
        """What the map closes over: ICON's tools walk the closures of maps."""
        parts = vars(self).values()
        walked = [v for v in parts if getattr(v, "__closure__", v) is not None]
        return tuple(types.CellType(part) for part in walked)

    def jacobian(self, coordinates: Tensor) -> Tensor:
        """Exact derivatives ``[B, d, d, *any]``; see `value_and_jacobian`."""
        return value_and_jacobian(cast(Map, self), coordinates)[1]


class NeuralTransform(Composed):
    """phi(x) = x + u(x, z(x)), callable on ICON-frame coordinates ``[B, d, *any]``.

    Coordinates of batch 1 are evaluated for every item of the code's batch. Outside
    the unit box the displacement is that of the nearest border point. More than
    ``chunk_size`` points are evaluated in chunks, which are recomputed in the backward
    pass, so memory does not follow their number; where it runs out all the same,
    ``chunk_size`` is halved and stays so.

    Args:
        field: see `icon_nephi.fields`.
        code: what the field reads.
        chunk_size: points evaluated at once; with its Jacobian one counts as 1 + d.
            Default: `CHUNK_SIZE`, and `GPU_CHUNK_SIZE` where the code is on no CPU.
        owned: take a copy of the weights (default: when gradients are off).
    """

    def __init__(
        self,
        field: fields.Field,
        code: LatentCode,
        *,
        chunk_size: int | None = None,
        owned: bool | None = None,
    ) -> None:
        if owned or (owned is None and not torch.is_grad_enabled()):
            code = code.detached()
            if isinstance(field, nn.Module):
                field = copy.deepcopy(field).requires_grad_(False)
        self.field, self.code = field, code
        on_cpu = code.global_code.device.type == "cpu"
        self.chunk_size = chunk_size or (CHUNK_SIZE if on_cpu else GPU_CHUNK_SIZE)

    def __call__(self, coordinates: Tensor) -> Tensor:
        """phi of ICON-frame coordinates ``[B, d, *any]``."""
        coordinates = self._expand(coordinates)
        (moved,) = self._as_memory_allows(self._in_chunks, False, to_rows(coordinates))
        return coordinates + from_rows(moved, coordinates).to(coordinates.dtype)

    def value_and_jacobian(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """phi and its Jacobian at ICON-frame coordinates, in one forward pass."""
        coordinates = self._expand(coordinates)
        d, rows = coordinates.shape[1], to_rows(coordinates)
        moved, slopes = self._as_memory_allows(self._in_chunks, True, rows)
        slopes = slopes + torch.eye(d, dtype=slopes.dtype, device=slopes.device)
        jacobian = from_rows(slopes.flatten(2), coordinates).unflatten(1, (d, d))
        values = coordinates + from_rows(moved, coordinates).to(coordinates.dtype)
        return values, jacobian.to(coordinates.dtype)

    def _expand(self, coordinates: Tensor) -> Tensor:
        """Batch 1 takes the code's batch, which may be 0."""
        grids = self.code.local_codes
        dimension = grids[0].dim() - 2 if grids else coordinates.shape[1]
        check_coordinates("coordinates", coordinates, dimension)
        batch = self.code.batch
        if coordinates.shape[0] == 1:
            return coordinates.expand(batch, *coordinates.shape[1:])
        if batch not in (1, coordinates.shape[0]):
            raise ValueError(
                f"coordinates have batch {coordinates.shape[0]} but the code describes "
                f"{batch} pairs; give coordinates of batch 1 or {batch}"
            )
        return coordinates

    def _as_memory_allows(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What ``work`` returns; while memory runs out, again with smaller chunks."""

        def sized(size: int) -> Any:
            self.chunk_size = size
            return work(*arguments)

        return in_smaller_parts(sized, self.chunk_size, _LEAST, "the points of a map")

    def _in_chunks(self, jets: bool, rows: Tensor) -> tuple[Tensor, ...]:
        """Displacements of rows; with ``jets`` their derivatives too."""
        rows = rows.to(self.code.global_code.dtype)
        if compiled.suits(self.field, self.code, rows):
            field = cast(nn.Module, self.field)
            return compiled.displacements(field, self.code, jets, rows)
        live = torch.is_grad_enabled()
        chunks = self._split(jets, rows, graph=live)
        ours = fields.knows_its_jet(self.field)
        if live and ours and not getattr(self.field, "_is_replica", False):
            codes = self.code.global_code, *self.code.local_codes
            weights = [*codes, *cast(nn.Module, self.field).parameters()]
            known = [w for w in weights if w.requires_grad and w.numel()]
            return _recomputed(self, jets, rows, *known)
        work: Callable[[Tensor], Any] = partial(self._evaluate, jets)
        if live and len(chunks) > 1:  # what else a field depends on, autograd knows
            work = partial(checkpoint, work, use_reentrant=False)
        return _joined(list(map(work, chunks)))

    def at_once(self, *, graph: bool) -> int:
        """How many points are evaluated at once, with a graph kept of them or none."""
        on_cpu = self.code.global_code.device.type == "cpu"
        return self.chunk_size * (1 if graph or on_cpu else GPU_WITHOUT_GRAPH)

    def _split(self, jets: bool, rows: Tensor, graph: bool = True) -> Any:
        cost = max(1, rows.shape[0] * (1 + jets * rows.shape[2]))
        return rows.split(max(1, self.at_once(graph=graph) // cost), dim=1)

    def _evaluate(self, jets: bool, rows: Tensor) -> tuple[Tensor, ...]:
        x = rows.clamp(0, 1)
        with torch.autocast(rows.device.type, enabled=False):
            if not jets:
                return (self.field(x, self.code.at(x)[0]),)
            # The derivatives of the clamped point; read_grids knows its own border.
            values = self.code.at(rows, gradient=True)
            moved, slopes = fields.displacement_and_jacobian(self.field, x, values)
        return moved, slopes * within(rows)[:, :, None, :]


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(p, dim=1) for p in zip(*parts, strict=True))


class _Recomputed(torch.autograd.Function):
    """Rows in chunks without a graph; several are evaluated again in backward.

    Graphs of chunks (as `checkpoint` keeps them) between large temporary tensors let
    glibc's heap grow as if nothing were freed. In a backward pass that is derived
    again (``create_graph``) the derivative by the rows is the analytic one.
    """

    @staticmethod
    def forward(
        ctx: Any, phi: NeuralTransform, jets: bool, rows: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.phi, ctx.jets, ctx.weights, ctx.graphs = phi, jets, weights, []
        ctx.save_for_backward(rows, *weights)
        chunks = phi._split(jets, rows)
        if len(chunks) > 1:
            return _joined([phi._evaluate(jets, chunk) for chunk in chunks])
        ctx.graphs = [_with_graph(ctx, rows)]
        return tuple(t.detach() for t in ctx.graphs[0][1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.phi._as_memory_allows(_gradients, ctx, *grads)


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    phi, rows, derive = ctx.phi, ctx.saved_tensors[0], ctx.needs_input_grad[2]
    slopes, sums = [], list[Tensor]()
    split = (lambda t: (t,)) if ctx.graphs else partial(phi._split, ctx.jets)
    for chunk, *outer in zip(*map(split, (rows, *grads)), strict=True):
        x, out = ctx.graphs.pop() if ctx.graphs else _with_graph(ctx, chunk)
        inputs = (*ctx.weights, x) if derive else ctx.weights
        of_inputs = [*torch.autograd.grad(out, inputs, [g.detach() for g in outer])]
        slopes.append(of_inputs.pop() if derive else x)
        sums = list(map(torch.add, sums, of_inputs)) if sums else of_inputs
    sums.append(torch.cat(slopes, dim=1))
    if torch.is_grad_enabled():
        once = torch._C._functions.DelayedError(_TWICE, len(sums))
        sums = list(once(*(t.requires_grad_() for t in sums)))
        if not ctx.jets:
            jacobian = phi._in_chunks(True, rows)[1]
            sums[-1] = torch.einsum("bnij,bni->bnj", jacobian, grads[0])
    return None, None, sums[-1] if derive else None, *sums[:-1]


def _with_graph(ctx: Any, rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.enable_grad():
        x = rows.detach().requires_grad_(ctx.needs_input_grad[2])
        return x, ctx.phi._evaluate(ctx.jets, x)


_recomputed = cast(Callable[..., tuple[Tensor, ...]], _Recomputed.apply)


class MatrixTransform(Composed):
    """An affine map of the unit box: homogeneous ``[B or 1, d + 1, d + 1]``."""

    def __init__(self, matrix: Tensor) -> None:
        owned = not torch.is_grad_enabled()
        self.matrix = matrix.detach().clone() if owned else matrix

    def __call__(self, coordinates: Tensor) -> Tensor:
        """The map of ICON-frame coordinates ``[B, d, *any]``."""
        d = coordinates.shape[1]
        matrix = self.matrix.to(coordinates)
        rows = to_rows(coordinates) @ matrix[:, :d, :d].mT + matrix[:, None, :d, d]
        return from_rows(rows, coordinates)

    def value_and_jacobian(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Both; the Jacobian is the matrix's linear part at every point."""
        d, ones = coordinates.shape[1], (1,) * (coordinates.dim() - 2)
        linear = self.matrix[:, :d, :d].to(coordinates)
        batch = coordinates.shape[0] if len(linear) == 1 else len(linear)
        return self(coordinates), linear.reshape(len(linear), d, d, *ones).expand(
            batch, d, d, *coordinates.shape[2:]
        )


class Composition(Composed):
    """phi o psi: psi first, then phi; Jacobians by the chain rule."""

    def __init__(self, phi: Map, psi: Map) -> None:
        self.phi, self.psi = phi, psi

    def __call__(self, coordinates: Tensor) -> Tensor:
        """phi(psi(coordinates)), ICON frame."""
        return self.phi(self.psi(coordinates))

    def value_and_jacobian(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Both; see `value_and_jacobian`."""
        between, inner = value_and_jacobian(self.psi, coordinates)
        values, outer = value_and_jacobian(self.phi, between)
        return values, torch.einsum("bij...,bjk...->bik...", outer, inner)


def value_and_jacobian(phi: Map, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """phi and its exact Jacobian ``[B, d, d, *any]`` at ICON-frame coordinates.

    Ours carry both forward. ICON's TwoStepRegistration closes over its two maps by
    name, so its Jacobian is their chain rule. Any other pointwise map (ICON's voxel
    fields, say) is derived by autograd, once per component, with a graph if it is on.
    """
    known = getattr(phi, "value_and_jacobian", None)
    if known is not None:
        return cast(tuple[Tensor, Tensor], known(coordinates))
    if getattr(phi, "__qualname__", "") == _TWO_STEPS:
        cells = getattr(phi, "__closure__", ())
        outer, inner = (cell.cell_contents for cell in cells)
        return Composition(outer, inner).value_and_jacobian(coordinates)
    return derived(phi, coordinates)
