"""Both fields on the compiled core: displacements and Jacobians, with gradients.

The reference is `icon_nephi.fields` on `icon_nephi.codes`: one pair, float32, on a CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icon_nephi.core import loading, threads
from icon_nephi.core.arrays import address, pointers
from icon_nephi.fields import LatentMLP, ModulatedSiren
from icon_nephi.fields.codes import LatentCode

_LANES = 4  # channels of a table are a multiple of these
_KINDS: dict[type[Any], int] = {LatentMLP: 0, ModulatedSiren: 1}
_SUPPORT = {"linear": 2, "quadratic": 3}
_PLAIN = (Tensor, nn.Parameter)


def suits(field: object, code: LatentCode, rows: Tensor) -> bool:
    """Whether the core evaluates a field of this kind with a code at such rows.

    Args:
        field: any field.
        code: of any batch.
        rows: ``[B, N, d]`` in the unit box.
    """
    if type(field) not in _KINDS or loading.library() is None:
        return False
    if rows.dim() != 3 or len(rows) != 1 or rows.shape[2] not in (2, 3):
        return False
    if torch.compiler.is_compiling() or code.interpolation not in _SUPPORT:
        return False
    weights = weights_of(cast(nn.Module, field))
    tensors = [rows, code.global_code, *code.local_codes, *weights]
    if any(type(t) not in _PLAIN or not _ordinary(t) for t in tensors):
        return False
    return len(weights) > 2 and _fit(cast(nn.Module, field), code, weights, rows)


def _ordinary(tensor: Tensor) -> bool:
    """Whether its numbers are floats in this process's memory."""
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _fit(
    field: nn.Module, code: LatentCode, weights: Sequence[Tensor], rows: Tensor
) -> bool:
    d, grids = rows.shape[2], code.local_codes
    if code.batch != 1 or any(g.dim() != d + 2 for g in grids):
        return False
    least = _SUPPORT[code.interpolation]
    if any(not g.shape[1] or min(g.shape[2:]) < least for g in grids):
        return False
    if isinstance(field, ModulatedSiren):
        inputs = code.size + 2 * len(field.frequencies)
        return weights[0].shape[1] == inputs and field.frequencies.shape[1] == d
    return weights[0].shape[1] == code.size + d


def weights_of(field: nn.Module) -> list[Tensor]:
    """Weights and biases of a known field in the order that the core takes them."""
    known = cast(LatentMLP | ModulatedSiren, field)
    layers: list[nn.Module] = []
    if isinstance(known, ModulatedSiren):
        for pair in zip(known.modulator, known.synthesis, strict=True):
            layers += pair
    else:
        layers += known.hidden
    found: list[Tensor] = []
    for layer in (*layers, known.last):
        linear = cast(nn.Linear, layer)
        found += [linear.weight, linear.bias]
    return found


def as_table(grid: Tensor) -> Tensor:
    """``[*nodes, C]`` of a grid ``[1, C, *nodes]``, channels padded by zeros.

    No copy where the channels already lie beside each other, a multiple of four.
    """
    table = grid.detach()[0].movedim(0, -1)
    missing = -table.shape[-1] % _LANES
    return F.pad(table, (0, missing)) if missing else table.contiguous()


def as_grid(table: Tensor, like: Tensor) -> Tensor:
    """The grid of a table; a view."""
    return table[..., : like.shape[1]].movedim(-1, 0)[None]


class Plan:
    """A field and a code as the core reads them, in the memory where they are.

    Args:
        field: one that `suits`.
        tables: of the local codes, see `as_table`.
        used: channels of each that are not padding.
        global_code: ``[1, G]``.
        interpolation: see `LatentCode`.
        dimension: d.
        weights: of the field, in place of its own, see `weights_of`.
    """

    def __init__(
        self,
        field: nn.Module,
        tables: Sequence[Tensor],
        used: Sequence[int],
        global_code: Tensor,
        interpolation: str,
        dimension: int,
        weights: Sequence[Tensor] | None = None,
    ) -> None:
        known: Any = field
        self.kind, self.dimension = _KINDS[type(field)], dimension
        self.tables = list(tables)
        self.weights = [w.detach().contiguous() for w in weights or weights_of(field)]
        self.shared = global_code.detach().contiguous()
        frequencies = known.frequencies.contiguous() if self.kind else None
        nodes = [n for t in tables for n in t.shape[:-1]]
        lists = nodes, [t.shape[-1] for t in tables], used
        self._kept = [
            *((ctypes.c_int64 * max(1, len(part)))(*part) for part in lists),
            pointers(self.tables),
            pointers(self.weights),
            frequencies,
        ]
        self.raw = loading.Field(
            ctypes.sizeof(loading.Field),
            self.kind,
            dimension,
            _SUPPORT[interpolation],
            len(self.tables),
            *(ctypes.addressof(part) for part in self._kept[:4]),
            self.shared.shape[1],
            self.shared.data_ptr(),
            len(self.weights[0]),
            len(known.synthesis) if self.kind else len(known.hidden),
            len(frequencies) if frequencies is not None else 0,
            address(frequencies),
            known.first_omega if self.kind else known.omega,
            known.omega,
            ctypes.addressof(self._kept[4]),
        )

    @staticmethod
    def of(field: nn.Module, code: LatentCode, dimension: int) -> Plan:
        """Of a code as it is; tables are copied where their layout differs."""
        grids = code.local_codes
        tables, used = [as_table(g) for g in grids], [g.shape[1] for g in grids]
        return Plan(
            field, tables, used, code.global_code, code.interpolation, dimension
        )

    def forward(
        self, jets: bool, rows: Tensor, out: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """Displacements ``[N, d]`` at rows ``[N, d]``; with jets their derivatives."""
        count, d = len(rows), self.dimension
        if out is None:
            out = (rows.new_empty(count, d),)
            out += (rows.new_empty(count, d, d),) if jets else ()
        loading.call(
            "nephi_field_forward",
            ctypes.byref(self.raw),
            count,
            address(rows),
            jets,
            threads.count(),
            address(out[0]),
            address(out[1]) if jets else None,
        )
        return out

    def backward(
        self,
        jets: bool,
        rows: Tensor,
        by_values: Tensor | None,
        by_jacobians: Tensor | None = None,
        *,
        tables: Sequence[Tensor] | None = None,
        weights: Sequence[Tensor] | None = None,
        shared: Tensor | None = None,
        by_rows: Tensor | None = None,
    ) -> None:
        """Add the gradients by tables, weights and global code; write that by rows."""
        loading.call(
            "nephi_field_backward",
            ctypes.byref(self.raw),
            len(rows),
            address(rows),
            jets,
            threads.count(),
            address(by_values),
            address(by_jacobians),
            None if tables is None else pointers(tables),
            None if weights is None else pointers(weights),
            address(shared),
            address(by_rows),
        )


def displacements(
    field: nn.Module, code: LatentCode, jets: bool, rows: Tensor
) -> tuple[Tensor, ...]:
    """What `NeuralTransform` asks of its field and code, where they are `suits`.

    Differentiable by rows, code and weights, once.

    Args:
        field: `LatentMLP` or `ModulatedSiren`.
        code: of batch 1.
        jets: with derivatives.
        rows: ``[1, N, d]``; outside the unit box the displacement of the border.

    Returns:
        ``[1, N, d]`` and with jets ``[1, N, d, d]`` (last axis: by which coordinate).
    """
    weights = weights_of(field)
    given = rows, code.global_code, *code.local_codes, *weights
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return _displacements(field, code, jets, *given)
    plan = Plan.of(field, code, rows.shape[2])
    return tuple(t[None] for t in plan.forward(jets, rows[0].detach().contiguous()))


_TWICE = (
    b"autograd cannot derive a neural map twice: get its exact Jacobian from "
    b"icon_nephi.transforms.value_and_jacobian, and derive that once"
)


class _Displacements(torch.autograd.Function):
    """`displacements` with a graph; nothing but the rows is kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        field: nn.Module,
        code: LatentCode,
        jets: bool,
        rows: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.plan = Plan.of(field, code, rows.shape[2])
        ctx.field, ctx.code, ctx.jets = field, code, jets
        ctx.save_for_backward(rows, *weights)
        ctx.set_materialize_grads(False)
        out = ctx.plan.forward(jets, rows[0].detach().contiguous())
        return tuple(t[None] for t in out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        rows, shared, *rest = ctx.saved_tensors
        found = _gradients(ctx, rows, shared, rest, grads)
        if torch.is_grad_enabled():
            known = [t for t in found if t is not None]
            once = torch._C._functions.DelayedError(_TWICE, len(known))
            known = list(once(*(t.requires_grad_() for t in known)))
            found = [None if t is None else known.pop(0) for t in found]
            if not ctx.jets and found[0] is not None and grads[0] is not None:
                _, jacobian = displacements(ctx.field, ctx.code, True, rows)
                found[0] = torch.einsum("bnij,bni->bnj", jacobian, grads[0])
        return None, None, None, *found


def _gradients(
    ctx: Any,
    rows: Tensor,
    shared: Tensor,
    rest: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """By rows, global code, local codes and weights; None where not needed."""
    plan, needed = ctx.plan, ctx.needs_input_grad[3:]
    count = len(plan.tables)
    tables = weights = None
    if any(needed[2 : 2 + count]):
        tables = [torch.zeros_like(t) for t in plan.tables]
    if any(needed[2 + count :]):
        weights = [torch.zeros_like(w) for w in plan.weights]
    by_rows = torch.empty_like(rows[0]).contiguous() if needed[0] else None
    by_shared = torch.zeros_like(plan.shared) if needed[1] else None
    outer = [None if g is None else g.detach()[0].contiguous() for g in grads]
    plan.backward(
        ctx.jets,
        rows[0].detach().contiguous(),
        *outer,
        tables=tables,
        weights=weights,
        shared=by_shared,
        by_rows=by_rows,
    )
    grids = [as_grid(t, g) for t, g in zip(tables or (), rest, strict=False)]
    found: list[Tensor | None] = [None if by_rows is None else by_rows[None], by_shared]
    found += grids or [None] * count
    found += weights or [None] * (len(rest) - count)
    return [g if n else None for g, n in zip(found, needed, strict=True)]


_displacements = cast(Callable[..., tuple[Tensor, ...]], _Displacements.apply)
