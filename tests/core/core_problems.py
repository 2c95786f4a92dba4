"""Fields, codes and losses that the core and torch are compared on."""

from dataclasses import replace
from functools import partial

import torch

from icon_nephi.fields import LatentMLP, ModulatedSiren
from icon_nephi.fields.codes import LatentCode
from icon_nephi.fit.settings import PRESETS, make_pair
from icon_nephi.losses.features import FeatureDifference, FeaturesAlone, with_features
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.losses.regularity import guarded_term
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.maps.networks import AffinePair
from icon_nephi.space.images import gaussian_blur
from icon_nephi.space.sampling import Patches, Points

GRIDS = (5, 7, 6), (9, 8, 11), (4, 4, 3)


def apart(actual, expected):
    """Relative distance of two tensors, as norms."""
    actual, expected = (t.detach().double() for t in (actual, expected))
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-12))


def numbers(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator)


def make_field(kind, dimension, size, layers, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "small":
        field = LatentMLP(
            dimension,
            size,
            width=width,
            hidden_layers=layers,
            omega=2.0,
            generator=generator,
        )
    else:
        field = ModulatedSiren(
            dimension,
            size,
            width=width,
            hidden_layers=layers - 1,
            frequencies=width // 2 + 1,
            omega=5.0,
            generator=generator,
        )
    field.last.weight.data.normal_(0, 0.2, generator=generator)
    field.last.bias.data.normal_(0, 0.2, generator=generator)
    return field


def make_code(dimension, channels, shared, order, dtype=torch.float32, seed=0):
    grids = [
        numbers(1, c, *nodes[:dimension], seed=seed + 1 + n)
        for n, (c, nodes) in enumerate(zip(channels, GRIDS, strict=False))
    ]
    tensors = [t.to(dtype).requires_grad_() for t in (numbers(1, shared), *grids)]
    return LatentCode(tensors[0], tuple(tensors[1:]), order)


def rows(count, dimension, seed=0):
    """Places in the unit box and around it."""
    generator = torch.Generator().manual_seed(seed)
    return 1.4 * torch.rand(1, count, dimension, generator=generator) - 0.2


def border(dimension):
    """Places on the border, beyond it by a rounding, and far outside."""
    line = torch.tensor([-3.0, -2e-6, -5e-7, 0.0, 0.25, 1.0, 1 + 5e-7, 1 + 2e-6, 9.0])
    return torch.cartesian_prod(*[line] * dimension)[None]


def make_loss(
    dimension,
    kind="plain",
    *,
    channels=1,
    corners=True,
    masked=False,
    counted=False,
    size=3,
    field="small",
    count=60,
):
    """A loss of an untrained pair that moves, its two images and their masks."""
    g = torch.Generator().manual_seed(0)
    shapes = (21, 18, 23)[:dimension], (17, 24, 20)[:dimension]
    images = [
        3 * gaussian_blur(torch.rand(1, channels, *s, generator=g), [1.5] * dimension)
        for s in shapes
    ]
    masks = [
        torch.rand(1, 1, *s, generator=g) > 0.3 if masked else None for s in shapes
    ]
    counts = [
        (gaussian_blur(torch.rand(1, 1, *s, generator=g), [1.0] * dimension) > 0.47)
        if counted
        else None
        for s in shapes
    ]
    similarity = PatchNCC(1e-3, squared=kind == "squared", shared=kind == "shared")
    if kind in ("features", "mind"):
        images = [in_16_bits(with_features(i), channels) for i in images]
        if kind == "mind":
            similarity = FeaturesAlone(similarity, channels)
        else:
            similarity = FeatureDifference(similarity, channels, 10.0)
    preset = PRESETS["siren" if field == "sines" else "grid"][dimension]
    settings = replace(preset, grids=(5, 8), channels=(8, 5))
    extent = (30.0, 40.0, 35.0)[:dimension]
    net = make_pair(settings, extent, g)
    for one in (net.field_AB, net.field_BA):
        one.last.weight.data.normal_(0, 0.01, generator=g)
    for grid in net.net.local_codes:
        grid.data.mul_(5)
    matrix = torch.eye(dimension + 1)
    matrix[:dimension] += 0.03 * torch.randn(dimension, dimension + 1, generator=g)
    loss = GradientICONPoints(
        AffinePair(net, matrix),
        similarity,
        1.3,
        prior_lmbda=0.01,
        similarity_sampler=Patches(count, size, 2.0, corners=corners),
        regularity_sampler=Points(100),
        regularity=partial(guarded_term, consistency=30.0, weight=2.0),
        extent=torch.tensor(extent),
        counts=tuple(counts),
        generator=torch.Generator().manual_seed(5),
    )
    return loss, images, masks


def in_16_bits(image, channels):
    """Features as the core keeps them, so that both see the same."""
    image[:, channels:] = (image[:, channels:] * 65535).round() / 65535
    return image


def groups_of(loss):
    net = loss.regis_net.net
    fields = [*net.field_AB.parameters(), *net.field_BA.parameters()]
    return [
        {"params": list(net.net.parameters()), "lr": 0.03},
        {"params": fields, "lr": 0.003},
    ]
