"""The fast field: a small sine network on the point and the code."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icon_nephi.fields import expansions
from icon_nephi.fields.expansions import Expansion, through
from icon_nephi.fields.jets import sine
from icon_nephi.fields.layers import arguments_of, linear_layer, zero_layer
from icon_nephi.fields.protocol import displacement_at_each_point


class LatentMLP(nn.Module):
    """A small sine network on [2 x - 1, z(x)]: the fast field.

    Meant for codes with several local grids from coarse to fine, which carry the
    detail; the last layer starts at zero, so phi starts as the identity.

    Args:
        dimension: d.
        code_size: C, the number of code values at a point.
        width: of every hidden layer.
        hidden_layers: sine layers.
        omega: their frequency.
        generator: source of the initial weights.
    """

    def __init__(
        self,
        dimension: int,
        code_size: int = 64,
        *,
        width: int = 64,
        hidden_layers: int = 1,
        omega: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.arguments = arguments_of(locals())
        self.omega = omega
        sizes = [dimension + code_size] + [width] * hidden_layers
        self.hidden = nn.ModuleList(
            linear_layer(n, width, math.sqrt(6 / n) / omega, generator)
            for n in sizes[:-1]
        )
        self.last = zero_layer(sizes[-1], dimension)

    def forward(self, points: Tensor, values: Tensor) -> Tensor:
        """Displacement ``[B, N, d]`` (unit box) at rows ``[B, N, d]``."""
        return self.jet(points, values[None])[0]

    def jet(self, points: Tensor, values: Tensor) -> Tensor:
        """``[R, B, N, d]``; as `ModulatedSiren.jet`."""
        rows, batch, count, _ = values.shape
        dimension = points.shape[-1]
        located = 2 * points[None] - 1
        if rows > 1:
            axes = 2 * torch.eye(dimension, dtype=points.dtype, device=points.device)
            axes = axes[:, None, None, :].expand(dimension, batch, count, dimension)
            located = torch.cat([located, axes])
        hidden = torch.cat([located, values], -1).flatten(1, 2)
        for layer in self.hidden:
            hidden = _sine_layer(hidden, layer, self.omega)
        return _last_layer(hidden, self.last).reshape(rows, batch, count, dimension)

    def on_lines(self, weights: Tensor, nodes: Tensor) -> Tensor:
        """Displacement ``[n, L, d]`` on lines of a lattice: `LatentCode.on_lines`.

        The first layer takes the nodes, which are fewer than the points; its bias goes
        to the first of them, whose weight is one. No gradients.
        """
        d = self.last.out_features
        if not len(self.hidden):
            return displacement_at_each_point(self, weights, nodes, d)
        first, *others = self.hidden
        assert isinstance(first, nn.Linear)
        weight = first.weight * self.omega
        scale = torch.ones_like(weight[0])
        scale[:d] = 2  # 2 x - 1
        of_nodes = F.linear(nodes, weight * scale)
        of_nodes[0] += first.bias * self.omega - weight[:, :d].sum(1)
        hidden = (weights @ of_nodes.flatten(1)).sin_().view(1, -1, len(weight))
        for layer in others:
            hidden = _sine_layer(hidden, layer, self.omega)
        return _last_layer(hidden, self.last).view(len(weights), -1, d)

    def expand(self, points: Expansion, values: Expansion) -> Expansion:
        """The displacement as `Expansion`; see `icon_nephi.fields`."""
        hidden = expansions.beside(expansions.centred(points).matching(values), values)
        for layer in self.hidden:
            hidden = expansions.sine(through(layer, hidden, self.omega), values.degree)
        # A constant has no slope.
        return expansions.linear(hidden, self.last.weight.to(hidden.rows))


def _sine_layer(jet: Tensor, layer: nn.Module, omega: float) -> Tensor:
    """sin(omega (W x + b)) on a jet ``[R, M, C]``; omega is folded into W and b."""
    assert isinstance(layer, nn.Linear)
    return sine(F.linear(jet, layer.weight * omega), layer.bias * omega)


def _last_layer(jet: Tensor, layer: nn.Linear) -> Tensor:
    if len(jet) == 1:
        return F.linear(jet, layer.weight, layer.bias)
    out = F.linear(jet, layer.weight)
    return torch.cat([out[:1] + layer.bias, out[1:]])
