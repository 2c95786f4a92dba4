"""Settings, images and losses with which fitting takes a second."""

from dataclasses import replace

import torch

from icon_nephi.fields import LatentMLP
from icon_nephi.fields.codes import LatentCodeTable
from icon_nephi.fit.optimize import Stage, optimize
from icon_nephi.fit.settings import GRID
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.maps.networks import NePhi
from icon_nephi.space.frames import Geometry, identity_map
from icon_nephi.space.sampling import Patches, Points

SMALL = replace(
    GRID, grids=(5, 9), channels=(4, 4), steps=60, patches=150, regularity_points=80
)
PLACE = Geometry((48, 48), (2.0, 2.0), (0.0, 0.0), ((1.0, 0.0), (0.0, 1.0)))


def blobs(shape, shift=0.0):
    """A smooth image with something everywhere."""
    x = identity_map(shape)
    phase = [(3 + a) * (x[:, a] + shift) for a in range(len(shape))]
    return 0.5 + sum(torch.sin(2 * p) for p in phase)[None] / (2 * len(shape))


def a_loss(dimension, seed=0):
    source = torch.Generator().manual_seed(seed)
    table = LatentCodeTable(
        grids=[(4,) * dimension], channels=[3], global_size=0, generator=source
    )
    fields = [LatentMLP(dimension, 3, width=8, generator=source) for _ in range(2)]
    return GradientICONPoints(
        NePhi(table, *fields),
        PatchNCC(),
        0.1,
        regularity_sampler=Points(20),
        generator=source,
    )


def run(dimension=2, steps=30, seed=0, **options):
    shape = (20, 17, 18)[:dimension]
    loss = a_loss(dimension, seed)
    groups = [{"params": list(loss.parameters()), "lr": 0.01}]
    stages = [
        Stage(steps // 2, Patches(20, 3, 3.0), blur=1.0),
        Stage(steps - steps // 2, Points(60) if dimension == 0 else Patches(20)),
    ]
    image_A, image_B = blobs(shape, 0.05), blobs(shape)
    course = optimize(loss, image_A, image_B, stages, groups, **options)
    return course, loss
