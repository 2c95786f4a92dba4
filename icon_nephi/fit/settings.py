"""What one pair is fitted with: presets by kind of image, the fit that results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from icon_nephi.fields import LatentMLP, make_field
from icon_nephi.fields.codes import LatentCode, LatentCodeTable
from icon_nephi.fields.pyramid import reads_codes, teach_to_read
from icon_nephi.maps.networks import NePhi


@dataclass(frozen=True)
class Lattices:
    """How a pair is fitted on lattices, coarse to fine; see `icon_nephi.fit.dense`.

    Attributes:
        steps: at every level, coarse to fine; those of the last levels where there are
            fewer.
        finest: voxels between the places of the finest lattice.
        coarsest: lattices with no more places along their longest side are left out;
            of small images those with no more than a sixth of the voxels.
        places: of a lattice at most, in two and in three dimensions.
        apart: places between the nodes of the code, in two and in three dimensions.
        radius: of the windows, in places.
        rate: Adam's learning rate, in distances between places.
        lmbda: weight of the gradient inverse consistency.
        drift: weight of inverse consistency, inside that of lmbda.
        hinge: weight of determinants near folding, inside that of lmbda.
        tension: weight of the total variation of the displacements.
    """

    steps: tuple[int, ...] = (60, 60, 60, 50, 20)
    finest: float = 1.0
    coarsest: int = 10
    places: tuple[int, int] = (1_000_000, 1_000_000)
    apart: tuple[float, float] = (2.0, 2.0)
    radius: int = 3
    rate: float = 0.15
    lmbda: float = 1.0
    drift: float = 300.0
    hinge: float = 1000.0
    tension: float = 0.0


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
        noisy: the same where the images are noisy (see `space.intensities.noise`);
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
            `icon_nephi.losses.features`) at the start, fading to a share; 0: never.
        kept: that share, where the images have hardly any noise; else none.
        lattices: where it is fitted on lattices: how. The fields are then linear, and
            what is above says what is done where lattices do not suit.
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
    lattices: Lattices | None = None


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
# Of a registration without a deformation.
STILL = replace(GRID, grids=(4,), channels=(1,), arguments=(("width", 4),))
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
# Images of moderate size: all of their voxels, for there are not many.
LATTICES = replace(GRID, lattices=Lattices())
FLAT = replace(
    GRID,
    lattices=Lattices(steps=(60, 50, 30), coarsest=40, hinge=300.0, tension=0.1),
)
# Large images are slides: of neighbouring sections, whose cells are not the same ones.
# Their larger structures are what agrees, and lies on each other by smooth maps.
SLIDES = replace(
    GRID,
    lattices=Lattices(
        steps=(60, 60, 60, 50, 15), places=(200_000, 1), apart=(8.0, 1.0), lmbda=30.0
    ),
)
PRESETS = {
    "lattices": {3: LATTICES, 2: FLAT},
    "siren": {3: SIREN, 2: replace(SIREN, grids=(8, 16, 32))},
    "grid": {3: GRID, 2: GRID},
    "detail": {3: DETAIL, 2: GRID},
    "ct": {3: CT, 2: CT},
}
# Voxels a side (their mean) above which "auto" takes "detail".
DETAILED = 170
# Voxels along the longest side up to which it takes "lattices" in 3D, where images are
# no slabs; and above which a 2D image is a slide.
MODERATE, SLIDE = 128, 512
# Voxels between nodes of the finest code, at least: finer ones follow the noise.
APART = {2: 6.0, 3: 2.5}


def find_settings(
    field: str | Settings, size: Sequence[int], modality: str | None = None
) -> Settings:
    """The settings of a name in `PRESETS`, or "auto", for a fixed image of that size.

    `Settings` are returned as they are. Small images get coarser codes, with nodes
    `APART`. The modality is that of both images, where it is the same: "auto" takes
    "ct" for 3D CT.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(field, Settings):
        return field
    if field == "auto":
        solid = len(size) == 3
        large = solid and sum(size) / 3 > DETAILED
        field = "ct" if solid and modality == "ct" else "detail" if large else "siren"
        moderate = max(size) <= MODERATE and min(size) >= max(size) / 3
        field = "lattices" if field == "siren" and (moderate or not solid) else field
    if field not in PRESETS:
        raise ValueError(
            f"field must be 'auto' or one of {sorted(PRESETS)}, got {field!r}"
        )
    settings = PRESETS[field][len(size)]
    if settings is FLAT and max(size) > SLIDE:
        return SLIDES
    most = max(4, round(sum(size) / len(size) / APART[len(size)]))
    if settings.grids[-1] <= most:
        return settings
    grids = tuple(sorted({min(nodes, most) for nodes in settings.grids}))
    return replace(settings, grids=grids, channels=settings.channels[: len(grids)])


# Noise above which features fade out, and above which larger blocks are compared; real
# scans have 0.002 to 0.04.
CLEAN, NOISY = 0.01, 0.06


def suited(settings: Settings, level: float) -> Settings:
    """The settings for images with noise of that standard deviation."""
    if level > CLEAN:
        settings = replace(settings, kept=0.0)
    if level > NOISY:
        half = max(1, settings.patches // 2)
        settings = replace(settings, size=settings.noisy, patches=half)
    return settings


# Steps of the short fits that choose between starts.
TRIAL_STEPS = 40
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
    lattices = settings.lattices
    if lattices is not None:
        steps = tuple(round(times * n) for n in lattices.steps)
        lattices = replace(lattices, steps=steps)
    steps_of_samples = round(times * settings.steps)
    return replace(settings, steps=steps_of_samples, lattices=lattices)


def trial_of(settings: Settings) -> Settings:
    """Settings of a short coarse fit, one of some that are compared."""
    return replace(
        settings,
        steps=TRIAL_STEPS,
        strides=settings.strides[:1],
        shares=(1.0,),
        exact=settings.exact[:1],
        features=0.0,
        consistency=settings.consistency / 10,  # free to go far in few steps
        patches=settings.patches // 3,
        regularity_points=settings.regularity_points // 3,
    )


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
        evidence: the numbers they were made of, see `icon_nephi.fit.doubts`.
        similarity: the name of what was compared, if it has one.
        sharp: see `icon_nephi.fit.sharpness`.
    """

    matrix: Tensor
    code: LatentCode
    field_AB: nn.Module
    field_BA: nn.Module
    losses: list[dict[str, float]]
    warnings: list[str]
    evidence: dict[str, float] = field(default_factory=dict)
    similarity: str = ""
    sharp: Tensor | None = None


def make_pair(
    settings: Settings,
    extent: Sequence[float],
    generator: torch.Generator,
    begin: LatentCode | None = None,
) -> NePhi:
    """An untrained `NePhi` with a learned code, for a box of that extent.

    Nodes are spread so that their distance in millimetres is about the same on every
    tensor axis: a flat box has fewer along its short side. The maps begin as the
    identity, or as an `as_code` says, which is then one more local code.

    Raises:
        ValueError: there is such a code, and the field cannot read it.
    """
    mean = sum(extent) / len(extent)
    grids = [
        tuple(max(4, round(nodes * length / mean)) for length in extent)
        for nodes in settings.grids
    ]
    channels = settings.channels
    if begin is not None:
        (known,) = begin.local_codes
        grids, channels = [*grids, tuple(known.shape[2:])], (*channels, known.shape[1])
    table = LatentCodeTable(
        1, grids=grids, channels=channels, global_size=0, generator=generator
    )
    arguments = {
        "dimension": len(extent),
        "code_size": sum(channels),
        **dict(settings.arguments),
        "generator": generator,
    }
    field_AB, field_BA = (make_field(settings.field, arguments) for _ in "AB")
    if begin is not None:
        with torch.no_grad():
            table.local_codes[-1].copy_(known)
        for side, one in enumerate((field_AB, field_BA)):
            if not reads_codes(one):
                raise ValueError(
                    f"field {settings.field!r} cannot start from what the general "
                    "network predicts; pass field='grid', or start='scratch'"
                )
            teach_to_read(cast(LatentMLP, one), side, sum(settings.channels))
    return NePhi(table, field_AB, field_BA)
