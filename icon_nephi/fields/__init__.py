"""Functions of space: points and code values in, displacement out.

A field is any callable ``field(points, values) -> displacement`` on rows: points
``[B, N, d]`` in the unit box, values ``[B, N, C]``, displacement ``[B, N, d]`` in
unit-box units. A module may know more of itself, each of which is optional:

- ``jet(points, values)``: values ``[1 + d, B, N, C]`` (row 0 the code's values, row
  1 + a their derivative by coordinate a, or row 0 alone) to the same of the
  displacement, ``[1 + d, B, N, d]``. Derivatives are carried forward beside the values
  in one pass, so a loss on Jacobians needs one ordinary backward pass and no second
  derivatives. Nothing that learns may come in but the parameters. Without it
  `torch.func.jvp` derives the field.
- ``on_lines(weights, nodes)``: displacement ``[n, L, d]`` on lines of a lattice, from
  what `LatentCode.on_lines` returns. Without it the field is asked point by point.
- ``expand(points, values)``: the displacement as `expansions.Expansion`, of
  the degree and precision of the `Expansion` of the values; that of the points is of
  degree 1 and float64 (see `Expansion.matching`). Without it `icon_nephi.certify` can
  prove nothing.
- ``arguments``: names and numbers that its class makes the same field from, with
  ``dimension`` and ``code_size``. Without it a registration cannot be saved.

A new field is one file here and one line in `FIELDS`, or a class of one's own and
`register_field`; `Settings` take it by its name. Its class takes ``dimension``,
``code_size`` and a ``generator`` of initial weights (None: torch's own), and what else
`Settings.arguments` hold, by keyword.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from icon_nephi.fields.mlp import LatentMLP
from icon_nephi.fields.protocol import (
    Field,
    displacement_and_jacobian,
    displacement_on_lines,
    knows_its_jet,
)
from icon_nephi.fields.siren import ModulatedSiren

__all__ = [
    "FIELDS",
    "Field",
    "LatentMLP",
    "ModulatedSiren",
    "UnknownField",
    "displacement_and_jacobian",
    "displacement_on_lines",
    "knows_its_jet",
    "make_field",
    "name_of_field",
    "register_field",
]

#: What makes a field, by the name that `Settings` and saved files have for it.
FIELDS: dict[str, Callable[..., nn.Module]] = {
    "LatentMLP": LatentMLP,
    "ModulatedSiren": ModulatedSiren,
}


class UnknownField(ValueError):
    """A name or a class of fields that is not registered."""


def register_field(name: str, kind: type[nn.Module]) -> None:
    """Let a class of fields be made, saved and loaded by a name.

    Args:
        name: for `Settings` and files; files are loaded where it is registered again.
        kind: the class.

    Raises:
        TypeError: not a class of modules.
        ValueError: the name is another class's.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a class of torch modules, got {kind!r}")
    if FIELDS.setdefault(name, kind) is not kind:
        raise ValueError(
            f"name {name!r} is that of {FIELDS[name]!r} already; choose another"
        )


def make_field(name: str, arguments: dict[str, Any]) -> nn.Module:
    """A field of a class by name, from its constructor's arguments.

    Raises:
        UnknownField: the name is not registered.
    """
    if name not in FIELDS:
        raise UnknownField(
            f"field must be one of {sorted(FIELDS)}, got {name!r}; register another "
            "with icon_nephi.fields.register_field"
        )
    return FIELDS[name](**arguments)


def name_of_field(field: object) -> str:
    """The name that a field's class is registered by.

    Raises:
        UnknownField: it is not.
    """
    for name, kind in FIELDS.items():
        if type(field) is kind:
            return name
    raise UnknownField(
        f"fields are known by name to be made again, and {type(field).__name__} has "
        "none; register it with icon_nephi.fields.register_field"
    )
