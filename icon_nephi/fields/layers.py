"""What fields start with: layers from a generator, or zero; their arguments."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import nn

LayerT = TypeVar("LayerT", bound=nn.Module)


def bare(kind: type[LayerT], *arguments: Any, **more: Any) -> LayerT:
    """A layer whose weights hold anything yet; no random numbers are drawn.

    As torch's ``skip_init``, which imports sympy.
    """
    still = {"reset_parameters": lambda self: None}
    layer: LayerT = type(kind.__name__, (kind,), still)(*arguments, **more)
    layer.__class__ = kind
    return layer


def linear_layer(
    inputs: int, outputs: int, bound: float, generator: torch.Generator | None
) -> nn.Linear:
    """A linear layer, weights uniform within the bound, biases as torch's default."""
    layer = bare(nn.Linear, inputs, outputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-1, 1, generator=generator).mul_(1 / math.sqrt(inputs))
    return layer


def zero_layer(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer of zeros: the last of a field whose map starts as the identity."""
    layer = bare(nn.Linear, inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def arguments_of(values: dict[str, Any]) -> dict[str, Any]:
    """Return what makes the same field, among the ``locals()`` of its constructor."""
    return {
        k: v
        for k, v in values.items()
        if k not in ("self", "generator") and k[0] != "_"
    }
