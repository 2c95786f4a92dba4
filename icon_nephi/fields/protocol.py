"""What a field is, what it may know besides, and what is done where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

Field = Callable[[Tensor, Tensor], Tensor]


def knows_its_jet(field: Field) -> bool:
    """Whether a field is a module with a ``jet``: see `icon_nephi.fields`."""
    return isinstance(field, nn.Module) and hasattr(field, "jet")


def displacement_and_jacobian(
    field: Field, points: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """``u [B, N, d]`` and ``du/dx [B, N, d, d]`` (last axis: by which coordinate).

    At rows ``[B, N, d]`` in the unit box with code values and their derivatives
    ``[1 + d, B, N, C]``; of a field without a ``jet`` by `torch.func.jvp`.
    """
    if knows_its_jet(field):
        rows = cast(Any, field).jet(points, values)
        return rows[0], rows[1:].permute(1, 2, 3, 0)
    columns = []
    displacement = points
    for axis in range(points.shape[-1]):
        seed = torch.zeros_like(points)
        seed[..., axis] = 1
        displacement, column = torch.func.jvp(  # type: ignore[misc]
            field, (points, values[0]), (seed, values[1 + axis])
        )
        columns.append(column)
    return displacement, torch.stack(columns, dim=-1)


def displacement_on_lines(
    field: Field, weights: Tensor, nodes: Tensor, dimension: int
) -> Tensor:
    """Displacement ``[n, L, d]`` (unit box) on lines of a lattice.

    Of weights and nodes as of `LatentCode.on_lines`; of a field without ``on_lines``
    point by point.
    """
    on_lines = getattr(field, "on_lines", None)
    if on_lines is not None:
        return cast(Tensor, on_lines(weights, nodes))
    return displacement_at_each_point(field, weights, nodes, dimension)


def displacement_at_each_point(
    field: Field, weights: Tensor, nodes: Tensor, dimension: int
) -> Tensor:
    """As `displacement_on_lines`, of any callable."""
    located = (weights @ nodes.flatten(1)).view(1, -1, nodes.shape[2])
    moved = field(located[..., :dimension], located[..., dimension:])
    return moved.view(len(weights), -1, dimension)
