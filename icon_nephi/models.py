"""Named assemblies and the numbers that work: fields and codes for one pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from icon_nephi.codes import LatentCode, LatentCodeTable
from icon_nephi.fields import LatentMLP, ModulatedSiren
from icon_nephi.transforms import NePhi

_CLASSES: dict[str, Callable[..., nn.Module]] = {
    "ModulatedSiren": ModulatedSiren,
    "LatentMLP": LatentMLP,
}


@dataclass(frozen=True)
class Settings:
    """How a pair is registered from scratch; lengths are in 1/160 of the box.

    Attributes:
        field: class of both fields.
        arguments: of the fields, beside dimension and code size.
        grids: nodes a side of the local codes, coarse to fine.
        channels: of the local codes.
        strides: between the samples of a block, coarse to fine.
        shares: of the steps spent at each stride.
        steps: in all.
        exact: at each stride, evaluate the maps at every sample, not at the corners of
            the blocks only (see `Patches`).
        patches: blocks a step and direction.
        size: samples a side of a block.
        regularity_points: a step and direction.
        lmbda: weight of the gradient inverse consistency.
        consistency: weight of inverse consistency, inside that of lmbda.
        hinge: weight of determinants near folding, inside that of lmbda.
        prior_lmbda: weight of the prior.
        field_rate: Adam's learning rate of the fields.
        code_rate: Adam's learning rate of the codes.
        floor: see `PatchNCC`.
    """

    field: str = "ModulatedSiren"
    arguments: tuple[tuple[str, float], ...] = (
        ("width", 64),
        ("frequencies", 32),
        ("omega", 5.0),
    )
    grids: tuple[int, ...] = (6, 12, 24)
    channels: tuple[int, ...] = (16, 16, 8)
    strides: tuple[float, ...] = (10.0, 5.0, 2.5, 1.5)
    shares: tuple[float, ...] = (0.3, 0.3, 0.2, 0.2)
    steps: int = 300
    exact: tuple[bool, ...] = (False, False, False, False)
    patches: int = 600
    size: int = 3
    regularity_points: int = 300
    lmbda: float = 1.0
    consistency: float = 300.0
    hinge: float = 1.0
    prior_lmbda: float = 0.01
    field_rate: float = 1e-3
    code_rate: float = 1e-2
    floor: float = 1e-3


SIREN = Settings()
GRID = replace(
    SIREN,
    field="LatentMLP",
    arguments=(("width", 64),),
    grids=(8, 16, 32),
    channels=(8, 8, 8),
    field_rate=3e-3,
    code_rate=3e-2,
)
# Brains at 1 mm and the like: small structures everywhere, so finer codes, and maps
# evaluated at every sample, which the small field affords.
DETAIL = replace(
    GRID,
    grids=(8, 16, 32, 64),
    channels=(8, 8, 8, 4),
    strides=(7.0, 3.5, 1.8),
    shares=(0.3, 0.3, 0.4),
    exact=(True, True, True),
    steps=350,
    hinge=10.0,
    regularity_points=500,
)
# In 2D points are cheap: finer codes.
PRESETS = {
    "siren": {3: SIREN, 2: replace(SIREN, grids=(8, 16, 32))},
    "grid": {3: GRID, 2: GRID},
    "detail": {3: DETAIL, 2: GRID},
}
# Voxels a side (their mean) above which "auto" takes "detail".
DETAILED = 170


def find_settings(field: str | Settings, size: Sequence[int]) -> Settings:
    """The settings of a name in `PRESETS`, or "auto", for a fixed image of that size.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(field, Settings):
        return field
    if field == "auto":
        large = len(size) == 3 and sum(size) / 3 > DETAILED
        field = "detail" if large else "siren"
    if field not in PRESETS:
        raise ValueError(
            f"field must be 'auto' or one of {sorted(PRESETS)}, got {field!r}"
        )
    return PRESETS[field][len(size)]


@dataclass(frozen=True)
class Fit:
    """What registering a pair gives.

    Attributes:
        matrix: ``[d + 1, d + 1]`` float64, the affine part: fixed unit box -> moving
            unit box.
        code: of the pair.
        field_AB: of psi_AB; phi_AB = matrix o psi_AB.
        field_BA: of psi_BA; phi_BA = psi_BA o matrix^-1.
        losses: one entry a step.
        warnings: in words.
    """

    matrix: Tensor
    code: LatentCode
    field_AB: nn.Module
    field_BA: nn.Module
    losses: list[dict[str, float]]
    warnings: list[str]


def make_field(kind: str, arguments: dict[str, Any]) -> nn.Module:
    """A field of a class by name, from its constructor's arguments.

    Raises:
        ValueError: unknown class.
    """
    if kind not in _CLASSES:
        raise ValueError(f"field must be one of {sorted(_CLASSES)}, got {kind!r}")
    return _CLASSES[kind](**arguments)


def make_pair(
    settings: Settings, extent: Sequence[float], generator: torch.Generator
) -> NePhi:
    """An untrained `NePhi` with a learned code, for a box of that extent.

    Nodes are spread so that their distance in millimetres is about the same on every
    axis: a flat box has fewer along its short side.

    Args:
        settings: see `Settings`.
        extent: millimetres of the box along each tensor axis.
        generator: source of the initial numbers.
    """
    mean = sum(extent) / len(extent)
    grids = [
        tuple(max(4, round(nodes * length / mean)) for length in extent)
        for nodes in settings.grids
    ]
    table = LatentCodeTable(
        1,
        grids=grids,
        channels=settings.channels,
        global_size=0,
        generator=generator,
    )
    arguments = {
        "dimension": len(extent),
        "code_size": sum(settings.channels),
        **{k: int(v) if k != "omega" else v for k, v in settings.arguments},
    }
    make = _CLASSES[settings.field]
    field_AB, field_BA = (make(**arguments, generator=generator) for _ in "AB")
    return NePhi(table, field_AB, field_BA)
