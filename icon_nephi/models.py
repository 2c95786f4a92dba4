"""Networks to train, by name; and what `register` takes as ``field`` (`Settings`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from icon_registration import DownsampleRegistration
from icon_registration.losses import NCC
from torch import Tensor, nn

from icon_nephi.fields import make_field
from icon_nephi.fields.encoders import HybridEncoder
from icon_nephi.fields.pyramid import reading_fields
from icon_nephi.fit.learned import general_encoder
from icon_nephi.fit.settings import PRESETS as PRESETS
from icon_nephi.fit.settings import Fit as Fit
from icon_nephi.fit.settings import Settings as Settings
from icon_nephi.fit.settings import find_effort as find_effort
from icon_nephi.fit.settings import find_settings as find_settings
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.losses.regularity import guarded_term, inverse_consistency_term
from icon_nephi.maps.networks import NePhi, TwoStepPair
from icon_nephi.space.sampling import Patches, Points


@dataclass(frozen=True)
class NetworkSettings:
    """What a trainable network is made of; see `make_network`."""

    encoder: dict[str, Any]  # arguments of `HybridEncoder`
    field: str  # of both directions: a name in `icon_nephi.fields.FIELDS`
    arguments: dict[str, Any]  # of the fields, beside dimension and code size
    similarity_points: dict[int, int]  # a pair and direction, by dimension
    regularity_points: dict[int, int]
    lmbda: float  # weight of the gradient inverse consistency
    prior_lmbda: float
    hinge: float = 0.0  # of determinants near folding, inside that of lmbda


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
    pretrained: str | None = None,
) -> GradientICONPoints:
    """Return a network to train: encoder, two fields, loss; at first the identity.

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
        pretrained: "general" for the network that `icon_nephi.predict` asks, with its
            weights and its own encoder and fields; for images of any shape.

    Raises:
        ValueError: unknown preset or pretrained network.
        FileNotFoundError: the weights are missing.
    """
    if pretrained not in (None, "general"):
        raise ValueError(f"pretrained must be None or 'general', got {pretrained!r}")
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
    if pretrained is None:
        pair = _predicted_pair(input_shape, preset, levels, generator)
    else:
        encoder = general_encoder(dimension).train().requires_grad_()
        pair = NePhi(encoder, *reading_fields(dimension))
    network = GradientICONPoints(
        pair,
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
    """Return a network that returns (phi_AB, phi_BA) of two images, coarse to fine."""
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
