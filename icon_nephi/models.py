"""Named assemblies and the numbers that work: fields and codes for one pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from icon_registration import DownsampleRegistration
from icon_registration.losses import NCC
from torch import Tensor, nn

from icon_nephi.codes import LatentCode, LatentCodeTable
from icon_nephi.encoders import HybridEncoder
from icon_nephi.fields import make_field
from icon_nephi.folds import guarded_term
from icon_nephi.losses import GradientICONPoints, inverse_consistency_term
from icon_nephi.sampling import Patches, Points
from icon_nephi.transforms import NePhi, TwoStepPair


@dataclass(frozen=True)
class Settings:
    """How a pair is registered from scratch; lengths are in 1/160 of the box.

    Attributes:
        field: of both directions: a name in `icon_nephi.fields.FIELDS`.
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
        noisy: the same where the images are noisy (see `icon_nephi.preprocess.noise`);
            half as many blocks are taken then.
        regularity_points: a step and direction.
        lmbda: weight of the gradient inverse consistency.
        consistency: weight of inverse consistency, inside that of lmbda.
        hinge: weight of determinants near folding, inside that of lmbda.
        prior_lmbda: weight of the prior.
        field_rate: Adam's learning rate of the fields.
        code_rate: Adam's learning rate of the codes.
        floor: see `PatchNCC`.
        features: weight of the difference of self-similarity features (see
            `icon_nephi.features`) at the start, fading to a share; 0: never.
        kept: that share, where the images have hardly any noise; else none.
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
    noisy: int = 5
    regularity_points: int = 300
    lmbda: float = 1.0
    consistency: float = 300.0
    hinge: float = 1.0
    prior_lmbda: float = 0.01
    field_rate: float = 1e-3
    code_rate: float = 1e-2
    floor: float = 1e-3
    features: float = 0.0
    kept: float = 0.5


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
# CT has detail down to the voxel, and two scans of one body differ in noise and
# density: self-similarity features find the way, intensities the last bit of it (where
# they have noise: the features see it, too).
CT = replace(GRID, strides=(10.0, 5.0, 2.5, 1.2), features=10.0)
# In 2D points are cheap: finer codes.
PRESETS = {
    "siren": {3: SIREN, 2: replace(SIREN, grids=(8, 16, 32))},
    "grid": {3: GRID, 2: GRID},
    "detail": {3: DETAIL, 2: GRID},
    "ct": {3: CT, 2: CT},
}
# Voxels a side (their mean) above which "auto" takes "detail".
DETAILED = 170
# Voxels between nodes of the finest code, at least: finer ones follow the noise.
APART = {2: 6.0, 3: 2.5}


def find_settings(
    field: str | Settings, size: Sequence[int], modality: str | None = None
) -> Settings:
    """The settings of a name in `PRESETS`, or "auto", for a fixed image of that size.

    Small images get coarser codes, with nodes `APART`.

    Args:
        field: what to find; `Settings` are returned as they are.
        size: voxels a side.
        modality: of both images, where it is the same: "auto" takes "ct" for 3D CT.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(field, Settings):
        return field
    if field == "auto":
        solid = len(size) == 3
        large = solid and sum(size) / 3 > DETAILED
        field = "ct" if solid and modality == "ct" else "detail" if large else "siren"
    if field not in PRESETS:
        raise ValueError(
            f"field must be 'auto' or one of {sorted(PRESETS)}, got {field!r}"
        )
    settings = PRESETS[field][len(size)]
    most = max(4, round(sum(size) / len(size) / APART[len(size)]))
    if settings.grids[-1] <= most:
        return settings
    grids = tuple(sorted({min(nodes, most) for nodes in settings.grids}))
    return replace(settings, grids=grids, channels=settings.channels[: len(grids)])


# How long to work at a pair, by name: whose settings, and times their steps.
EFFORTS = {"fast": ("grid", 0.5), "default": ("auto", 1.0), "accurate": ("auto", 2.0)}


def find_effort(
    name: str, size: Sequence[int], modality: str | None = None
) -> Settings:
    """The settings of a name in `EFFORTS`; the others as in `find_settings`.

    Raises:
        ValueError: unknown name.
    """
    if name not in EFFORTS:
        raise ValueError(f"preset must be one of {sorted(EFFORTS)}, got {name!r}")
    field, times = EFFORTS[name]
    settings = find_settings(field, size, modality)
    return replace(settings, steps=round(times * settings.steps))


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
        evidence: the numbers they were made of, see `icon_nephi.doubts`.
    """

    matrix: Tensor
    code: LatentCode
    field_AB: nn.Module
    field_BA: nn.Module
    losses: list[dict[str, float]]
    warnings: list[str]
    evidence: dict[str, float] = field(default_factory=dict)


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
        **dict(settings.arguments),
        "generator": generator,
    }
    field_AB, field_BA = (make_field(settings.field, arguments) for _ in "AB")
    return NePhi(table, field_AB, field_BA)


@dataclass(frozen=True)
class NetworkSettings:
    """What a trainable network is made of; see `make_network`.

    Attributes:
        encoder: arguments of `HybridEncoder`.
        field: of both directions: a name in `icon_nephi.fields.FIELDS`.
        arguments: of the fields, beside dimension and code size.
        similarity_points: a pair and direction, by dimension.
        regularity_points: a pair and direction, by dimension.
        lmbda: weight of the gradient inverse consistency.
        prior_lmbda: weight of the prior.
        hinge: weight of determinants near folding, inside that of lmbda.
    """

    encoder: dict[str, Any]
    field: str
    arguments: dict[str, Any]
    similarity_points: dict[int, int]
    regularity_points: dict[int, int]
    lmbda: float
    prior_lmbda: float
    hinge: float = 0.0


NETWORKS = {
    "default": NetworkSettings(
        encoder={
            "grids": (4, 8, 16),
            "channels": (16, 16, 16),
            "widths": (16, 32, 64, 128, 128, 128),
        },
        field="LatentMLP",
        arguments={"width": 64},
        similarity_points={2: 300, 3: 2000},
        regularity_points={2: 150, 3: 100},
        lmbda=1.0,
        prior_lmbda=0.0,
        hinge=10.0,
    ),
    "paper": NetworkSettings(
        encoder={"grids": (6,), "top_down": False, "interpolation": "linear"},
        field="ModulatedSiren",
        arguments={},
        similarity_points={2: 2000, 3: 100_000},
        regularity_points={2: 500, 3: 500},
        # The official 10 and 0.01: there both similarities and the d^2 entries of the
        # Jacobian are averaged, here similarities add up and d entries are averaged.
        lmbda=2 * 10 / 3,
        prior_lmbda=2 * 0.01,
    ),
}


def make_network(
    input_shape: Sequence[int],
    *,
    preset: str | NetworkSettings = "default",
    levels: int = 1,
    similarity: Callable[..., Tensor] | None = None,
    similarity_sampler: Points | Patches | None = None,
    regularity_sampler: Points | None = None,
    lmbda: float | None = None,
    prior_lmbda: float | None = None,
    extent: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> GradientICONPoints:
    """A network to train: encoder, two fields, loss; phi is the identity at the start.

    Its identity map is assigned, so ICON's ``train_batchfunction`` takes it as it is.
    Trained on pairs, it predicts the code of a pair in one pass; its ``regis_net`` is
    what goes on to ICON's wrappers and files.

    ``preset="paper"``: sizes, samples and weights of the published 3D model, 280,838
    parameters in the fields and, for 175^3, 3,069,080 in the encoder. Differs from the
    paper as `HybridEncoder` and `GradientICONPoints` do.

    Args:
        input_shape: ICON's ``[B, C, *grid]``; B is ignored.
        preset: a name in `NETWORKS`, or settings.
        levels: resolutions; above 1 a pair that sees images of half the size goes
            first, and the full size sees A warped by it, as in ICON's networks.
        similarity: any ICON similarity that fits the sampler (default: the preset's).
        similarity_sampler: `Points` or `Patches`, a pair and direction.
        regularity_sampler: `Points`, a pair and direction.
        lmbda: weight of the gradient inverse consistency, as ICON's.
        prior_lmbda: weight of the prior on the code.
        extent: see `GradientICONPoints`.
        generator: source of the initial weights (default: torch's own); the loss draws
            its samples from torch's own until its ``generator`` is set.

    Raises:
        ValueError: unknown preset.
    """
    if isinstance(preset, str):
        if preset not in NETWORKS:
            raise ValueError(
                f"preset must be one of {sorted(NETWORKS)}, got {preset!r}"
            )
        preset = NETWORKS[preset]
    dimension = len(input_shape) - 2
    regularity: Callable[..., Tensor] = inverse_consistency_term
    if preset.hinge:
        regularity = partial(guarded_term, consistency=0.0, weight=preset.hinge)
        extent = torch.ones(dimension) if extent is None else extent
    network = GradientICONPoints(
        _predicted_pair(input_shape, preset, levels, generator),
        similarity or NCC(),
        preset.lmbda if lmbda is None else lmbda,
        prior_lmbda=preset.prior_lmbda if prior_lmbda is None else prior_lmbda,
        similarity_sampler=similarity_sampler
        or Points(preset.similarity_points[dimension]),
        regularity_sampler=regularity_sampler
        or Points(preset.regularity_points[dimension]),
        regularity=regularity,
        extent=extent,
    )
    network.assign_identity_map([1, *(int(n) for n in input_shape[1:])])
    return network


def _predicted_pair(
    input_shape: Sequence[int],
    settings: NetworkSettings,
    levels: int,
    generator: torch.Generator | None,
) -> nn.Module:
    """A network that returns (phi_AB, phi_BA) of two images, coarse to fine."""
    dimension = len(input_shape) - 2
    encoder = HybridEncoder(input_shape, **settings.encoder, generator=generator)
    arguments = {
        "dimension": dimension,
        "code_size": encoder.code_size,
        **settings.arguments,
        "generator": generator,
    }
    field_AB, field_BA = (make_field(settings.field, arguments) for _ in "AB")
    pair = NePhi(encoder, field_AB, field_BA)
    if levels == 1:
        return pair
    half = [*input_shape[:2], *(math.ceil(n / 2) for n in input_shape[2:])]
    first = _predicted_pair(half, settings, levels - 1, generator)
    return TwoStepPair(DownsampleRegistration(first, dimension), pair)
