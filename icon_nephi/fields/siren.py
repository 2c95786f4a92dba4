"""The paper's field: a modulated sine network on Fourier features."""

from __future__ import annotations

import math
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from icon_nephi.fields import expansions
from icon_nephi.fields.expansions import Expansion, through
from icon_nephi.fields.jets import siren
from icon_nephi.fields.layers import arguments_of, linear_layer, zero_layer


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
        self.arguments = arguments_of(locals())
        self.first_omega, self.omega = first_omega, omega
        drawn = torch.randn(frequencies, dimension, generator=generator)
        self.register_buffer("frequencies", frequency_scale * drawn)
        features = 2 * frequencies

        layer = partial(linear_layer, outputs=width, generator=generator)
        hidden = math.sqrt(6 / width) / omega
        # The synthesis' layers are drawn before the modulator's.
        self.synthesis, self.modulator = (
            nn.ModuleList(
                [
                    layer(inputs, bound=1 / inputs),
                    *(layer(width, bound=hidden) for _ in range(hidden_layers)),
                ]
            )
            for inputs in (features, code_size + features)
        )
        self.last = zero_layer(width, dimension)

    def forward(self, points: Tensor, values: Tensor) -> Tensor:
        """Displacement ``[B, N, d]`` (unit box) at rows ``[B, N, d]``."""
        return self.jet(points, values[None])[0]

    def jet(self, points: Tensor, values: Tensor) -> Tensor:
        """``[R, B, N, d]``: displacement, and its derivatives where values has them.

        At rows ``[B, N, d]`` in the unit box, of values ``[R, B, N, C]``, R = 1 or
        1 + d.
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

    def expand(self, points: Expansion, values: Expansion) -> Expansion:
        """The displacement as `Expansion`; see `icon_nephi.fields`."""
        degree, omega = values.degree, self.omega
        # A cosine is a sine further on.
        turns = torch.cat([self.frequencies, self.frequencies]) * (2 * math.pi)
        further = torch.zeros_like(turns[:, 0])
        further[len(self.frequencies) :] = math.pi / 2
        waves = expansions.linear(expansions.centred(points), turns, further)
        features = expansions.sine(waves.rounded(values.rows.dtype), degree)

        def sine(inputs: Expansion, layer: nn.Module, factor: float) -> Expansion:
            return expansions.sine(through(layer, inputs, factor), degree)

        known = expansions.beside(values, features)
        start = gate = sine(known, self.modulator[0], omega)
        hidden = sine(features, self.synthesis[0], self.first_omega)
        for modulate, synthesise in zip(
            self.modulator[1:], self.synthesis[1:], strict=True
        ):
            gate = expansions.add(sine(gate, modulate, omega), start)
            hidden = expansions.product(gate, sine(hidden, synthesise, omega))
        weight = self.last.weight * 0.5  # a constant has no slope
        return expansions.linear(hidden, weight.to(hidden.rows))
