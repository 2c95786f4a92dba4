"""Functions of space: points and code values in, displacement out.

A field is any callable ``field(points, values) -> displacement`` on rows: points
``[B, N, d]`` in the unit box, values ``[B, N, C]``, displacement ``[B, N, d]`` in
unit-box units. The two here also carry derivatives forward beside the values, in one
pass (a *jet* ``[R, M, C]``: row 0 the values, row 1 + a the derivative by coordinate
a), so a loss on Jacobians needs one ordinary backward pass and no second derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icon_nephi.jets import sine, siren

Field = Callable[[Tensor, Tensor], Tensor]


def displacement_and_jacobian(
    field: Field, points: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """``u [B, N, d]`` and ``du/dx [B, N, d, d]`` (last axis: by which coordinate).

    Args:
        field: one of ours, or any callable (then by `torch.func.jvp`).
        points: rows ``[B, N, d]`` in the unit box.
        values: code values and their derivatives ``[1 + d, B, N, C]``.
    """
    if isinstance(field, ModulatedSiren | LatentMLP):
        rows = field.jet(points, values)
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


class ModulatedSiren(nn.Module):
    """The paper's field: sine layers on Fourier features, gated by the code.

    With F = [sin, cos](2 pi B (2 x - 1)) and h, g the synthesis and modulator layers:
    g_0 = sin(w V_0 [z, F]), g_i = sin(w V_i g_{i-1}) + g_0, h_1 = sin(w_1 W_0 F),
    h_{i+1} = g_i * sin(w W_i h_i), u = (W h) / 2 (biases left out here). The default
    arguments are the official configuration, 140,419 parameters a field, 280,838 the
    pair. The last layer starts at zero, so phi starts as the identity.

    Differs from the paper: the text says width 512 and a modulator that reads only the
    code; the published parameter counts and the official code are as here. Registering
    one pair from scratch wants omega about 5, not 30 (see `icon_nephi.models`).

    Args:
        dimension: d.
        code_size: C, the number of code values at a point.
        width: of every hidden layer.
        hidden_layers: gated layers.
        frequencies: number of Fourier frequencies, drawn N(0, frequency_scale^2).
        frequency_scale: their standard deviation, in cycles per half box.
        first_omega: of the first synthesis layer.
        omega: of every other layer.
        generator: source of frequencies and initial weights.
    """

    frequencies: Tensor

    def __init__(
        self,
        dimension: int,
        code_size: int = 64,
        *,
        width: int = 128,
        hidden_layers: int = 2,
        frequencies: int = 128,
        frequency_scale: float = 1.0,
        first_omega: float = 1.0,
        omega: float = 30.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        #: What to make the same field from, as saved files do.
        self.arguments = {
            "dimension": dimension,
            "code_size": code_size,
            "width": width,
            "hidden_layers": hidden_layers,
            "frequencies": frequencies,
            "frequency_scale": frequency_scale,
            "first_omega": first_omega,
            "omega": omega,
        }
        self.first_omega, self.omega = first_omega, omega
        drawn = torch.randn(frequencies, dimension, generator=generator)
        self.register_buffer("frequencies", frequency_scale * drawn)
        features = 2 * frequencies

        def layer(inputs: int, bound: float) -> nn.Linear:
            return _linear(inputs, width, bound, generator)

        hidden = math.sqrt(6 / width) / omega
        self.synthesis = nn.ModuleList(
            [
                layer(features, 1 / features),
                *(layer(width, hidden) for _ in range(hidden_layers)),
            ]
        )
        inputs = code_size + features
        self.modulator = nn.ModuleList(
            [
                layer(inputs, 1 / inputs),
                *(layer(width, hidden) for _ in range(hidden_layers)),
            ]
        )
        self.last = _zero_linear(width, dimension)

    def forward(self, points: Tensor, values: Tensor) -> Tensor:
        """Displacement ``[B, N, d]`` (unit box) at rows ``[B, N, d]``."""
        return self.jet(points, values[None])[0]

    def jet(self, points: Tensor, values: Tensor) -> Tensor:
        """``[R, B, N, d]``: displacement, and its derivatives where values has them.

        Args:
            points: rows ``[B, N, d]`` in the unit box.
            values: ``[R, B, N, C]``, R = 1 or 1 + d.
        """
        flat = points.reshape(-1, points.shape[-1])
        omegas = self.first_omega, self.omega
        pairs = zip(self.modulator, self.synthesis, strict=True)
        weights: list[Tensor] = []
        for layer in (*chain(*pairs), self.last):
            assert isinstance(layer, nn.Linear)
            weights += [layer.weight, layer.bias]
        out = siren(flat, values.flatten(1, 2), self.frequencies, omegas, weights)
        return out.view(len(values), *points.shape)


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
        self.arguments = {
            "dimension": dimension,
            "code_size": code_size,
            "width": width,
            "hidden_layers": hidden_layers,
            "omega": omega,
        }
        self.omega = omega
        sizes = [dimension + code_size] + [width] * hidden_layers
        self.hidden = nn.ModuleList(
            _linear(n, width, math.sqrt(6 / n) / omega, generator) for n in sizes[:-1]
        )
        self.last = _zero_linear(sizes[-1], dimension)

    def forward(self, points: Tensor, values: Tensor) -> Tensor:
        """Displacement ``[B, N, d]`` (unit box) at rows ``[B, N, d]``."""
        return self.jet(points, values[None])[0]

    def jet(self, points: Tensor, values: Tensor) -> Tensor:
        """As `ModulatedSiren.jet`."""
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
        return _last_layer(hidden, self.last, 1.0).reshape(
            rows, batch, count, dimension
        )

    def on_lines(self, weights: Tensor, nodes: Tensor) -> Tensor:
        """Displacement ``[n, L, d]`` on lines of a lattice: `LatentCode.on_lines`.

        The first layer takes the nodes, which are fewer than the points; its bias goes
        to the first of them, whose weight is one. No gradients.
        """
        first, *others = self.hidden
        assert isinstance(first, nn.Linear)
        d = self.last.out_features
        weight = first.weight * self.omega
        scale = torch.ones_like(weight[0])
        scale[:d] = 2  # 2 x - 1
        read = F.linear(nodes, weight * scale)
        read[0] += first.bias * self.omega - weight[:, :d].sum(1)
        hidden = (weights @ read.flatten(1)).sin_().view(1, -1, len(weight))
        for layer in others:
            hidden = _sine_layer(hidden, layer, self.omega)
        return _last_layer(hidden, self.last, 1.0).view(len(weights), -1, d)


def _linear(
    inputs: int, outputs: int, bound: float, generator: torch.Generator | None
) -> nn.Linear:
    """A linear layer, weights uniform within the bound, biases as torch's default."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-1, 1, generator=generator).mul_(1 / math.sqrt(inputs))
    return layer


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _sine_layer(jet: Tensor, layer: nn.Module, omega: float) -> Tensor:
    """sin(omega (W x + b)) on a jet ``[R, M, C]``; omega is folded into W and b."""
    assert isinstance(layer, nn.Linear)
    return sine(F.linear(jet, layer.weight * omega), layer.bias * omega)


def _last_layer(jet: Tensor, layer: nn.Linear, scale: float) -> Tensor:
    if len(jet) == 1:
        return F.linear(jet, layer.weight * scale, layer.bias * scale)
    out = F.linear(jet, layer.weight * scale)
    return torch.cat([out[:1] + layer.bias * scale, out[1:]])
