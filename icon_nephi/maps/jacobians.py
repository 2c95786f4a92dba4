"""Jacobians of maps that carry none (ICON's voxel fields); determinants and folds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from icon_nephi.core import arrays
from icon_nephi.space.frames import Array

# Of central differences; shorter where more digits are kept. ICON's is ten times that:
# a longer one crosses the border of a voxel, where slopes jump, at more of the points.
_STEPS = {torch.float32: 1e-4, torch.float64: 1e-6}


def derived(
    phi: Callable[[Tensor], Tensor], coordinates: Tensor
) -> tuple[Tensor, Tensor]:
    """Values and exact Jacobian ``[B, d, d, *any]`` by autograd, row by row.

    Of a pointwise map at ICON-frame coordinates ``[B, d, *any]``, with a graph if
    gradients are on. Where this torch cannot derive ``grid_sample`` twice (before 2.13)
    the Jacobian is exact all the same, and its gradient that of central differences.
    """
    live = torch.is_grad_enabled()
    with torch.enable_grad():
        x = coordinates
        if x.shape[0] == 1:
            x = x.expand(phi(x[..., :1]).shape[0], *x.shape[1:])
        if not (live and x.requires_grad):
            x = x.detach().requires_grad_()
        values = phi(x)
        graph = live and _derives_twice()
        derive = partial(torch.autograd.grad, create_graph=graph, retain_graph=True)
        rows = [derive(values[:, i].sum(), x)[0] for i in range(x.shape[1])]
        jacobian = torch.stack(rows, dim=1)
        if live and not graph:
            differences = _differences(phi, x)
            jacobian = jacobian + (differences - differences.detach())
    return (values, jacobian) if live else (values.detach(), jacobian.detach())


def _differences(phi: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    size, columns = _STEPS.get(x.dtype, 1e-2), []
    for axis in range(x.shape[1]):
        step = torch.zeros_like(x)
        step[:, axis] = size
        columns.append((phi(x + step) - phi(x - step)) / (2 * size))
    return torch.stack(columns, dim=2)


@cache
def _derives_twice() -> bool:
    """Whether what ``grid_sample``'s backward gives has a derivative."""
    image, grid = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 2, requires_grad=True)
    with torch.enable_grad():
        read = F.grid_sample(image, grid, align_corners=True).sum()
        slope = torch.autograd.grad(read, grid, create_graph=True)[0].sum()
        try:
            torch.autograd.grad(slope, grid)
        except RuntimeError:
            return False
    return True


def determinants(jacobian: Tensor) -> Tensor:
    """det of ``[N, d, d, *any]``, as ``[N, 1, *any]``."""
    d = jacobian.shape[1]
    if d not in (2, 3):
        matrices = jacobian.movedim((1, 2), (-2, -1))
        return cast(Tensor, torch.linalg.det(matrices))[:, None]
    derived = torch.is_grad_enabled() and jacobian.requires_grad
    if not derived and arrays.determine(jacobian):
        matrices = jacobian.movedim((1, 2), (-2, -1))
        found = arrays.determinants(matrices.reshape(-1, d, d))
        return found.reshape(len(jacobian), 1, *jacobian.shape[3:])
    # Written out: as exact as torch.linalg.det, of many small matrices much quicker.
    a, b, *c = jacobian.unbind(1)
    if d == 2:
        return (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])[:, None]
    minors: Tensor = torch.linalg.cross(b, c[0], dim=1)
    return (a * minors).sum(1, keepdim=True)


def count_folds(determinants: Tensor | Array) -> int:
    """Return how many determinants are not positive; NaN counts as folded."""
    return int((~(determinants > 0)).sum())


def fold_fraction(determinants: Tensor | Array) -> float:
    """Return the share of determinants that are not positive, 0 to 1: `count_folds`.

    Raises:
        ValueError: no determinants.
    """
    values = torch.as_tensor(determinants)
    if not values.numel():
        raise ValueError("determinants must hold a number, got none; is a mask empty?")
    return count_folds(values) / values.numel()
