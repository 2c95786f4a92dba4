"""Refine an affine map on the compiled core; the reference is `icon_nephi.affine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from icon_nephi.core.blocks import Channels, Layout, Measure, compare


class _Agreement(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        matrix: Tensor,
        centres: Tensor,
        layout: Layout,
        measure: Measure,
        moving: Channels,
        fixed: Channels,
    ) -> Tensor:
        d = centres.shape[1]
        at = layout.at(centres)
        rows = matrix[:d].detach().float()
        moved = (at @ rows[:, :d].T + rows[:, d]).contiguous()
        by_moves, identity = torch.empty_like(moved), torch.eye(d, d + 1)
        found = compare(
            layout,
            measure,
            centres,
            identity,
            moving,
            fixed,
            moved,
            torch.zeros_like(moved),
            by_moves,
        )
        ones = at.new_ones(len(at), 1)
        gradient = torch.zeros_like(matrix)
        gradient[:d] = by_moves.T @ torch.cat([at, ones], 1)
        ctx.save_for_backward(gradient)
        return matrix.new_tensor(found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad * ctx.saved_tensors[0], None, None, None, None, None


#: The similarity of blocks under an affine map of the unit boxes, ``[d + 1, d + 1]``,
#: differentiable by it: (matrix, centres ``[P, d]``, layout, measure, moving, fixed).
agreement = cast(Callable[..., Tensor], _Agreement.apply)
