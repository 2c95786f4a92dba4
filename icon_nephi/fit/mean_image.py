"""The mean of many images that lie on each other, and which is most like it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from icon_nephi.fit.content import CONTENT
from icon_nephi.maps.lattices import on_lattice
from icon_nephi.maps.transforms import Map
from icon_nephi.space.frames import apply_affine, identity_map, inside, to_rows
from icon_nephi.space.images import gaussian_blur, sample_image
from icon_nephi.space.intensities import PreparedImage

# Nodes at which maps are asked; between them they are read linearly.
NODES = 60_000
# Difference from the mean, of intensities that reach from 0 to 1, at which an image
# counts for half of one that is equal to it.
ROBUST = 0.1
# Voxels a side where images are compared as a whole.
SIDE = 32


def mean_image(
    size: Sequence[int],
    sources: Sequence[Callable[[], PreparedImage]],
    maps: Sequence[Map],
    matrices: Tensor,
) -> Tensor:
    """``[1, C, *size]``: the robust mean of images on their frame.

    Args:
        size: voxels of the frame.
        sources: read the images, one at a time.
        maps: psi of each, frame unit box -> itself, ICON frame.
        matrices: ``[K, d + 1, d + 1]``, from there to the unit box of each image.
    """
    moves = [_displacement(psi, size) for psi in maps]
    ways = list(zip(sources, moves, matrices, strict=True))
    middle: Tensor | None = None
    for _ in range(2 if len(ways) > 2 else 1):
        total = weight = torch.zeros(())
        for source, move, matrix in ways:
            values, there = _moved(source(), size, move, matrix)
            share = there
            if middle is not None:
                far = (values - middle).square().mean(1, keepdim=True)
                share = there / (1 + far / ROBUST**2)
            total, weight = total + share * values, weight + share
        middle = total / weight.clamp(min=1e-6)
    assert middle is not None
    return middle


def _displacement(psi: Map, size: Sequence[int]) -> Tensor:
    """``[1, d, *nodes]`` float32: psi minus own place, unit box."""
    d = len(size)
    apart = max(1.0, (np.prod(size, dtype=float) / NODES) ** (1 / d))
    nodes = [max(2, round(n / apart)) for n in size]
    axes = [torch.linspace(0, 1, n) for n in nodes]
    rows = torch.cat([part.float() for part in on_lattice(psi, axes)])
    return rows.T.reshape(1, d, *nodes) - identity_map(nodes)


def _moved(
    image: PreparedImage, size: Sequence[int], move: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """An image on the frame's voxels, and 1 where there is one that counts, else 0."""
    at = identity_map(size)
    there = at + sample_image(move, at)
    rows = apply_affine(matrix.float(), to_rows(there))
    there = rows.transpose(1, 2).reshape(there.shape)
    share = inside(there).float()
    if image.counts is not None:
        share = share * sample_image(image.counts.float(), there)
    return sample_image(image.values, there), share


def content(image: PreparedImage) -> Tensor:
    """``[1, 1, *grid]`` bool: where there is something to match, as `ImagePair` has it.

    Everywhere, if it is nowhere.
    """
    unit = max(image.place.extent) / 160
    sigma = [2 * unit / s for s in image.place.tensor_spacing]
    values = image.values
    spread = gaussian_blur((values - gaussian_blur(values, sigma)).square(), sigma)
    where = (spread.sqrt() > CONTENT).any(dim=1, keepdim=True)
    return where if bool(where.any()) else torch.ones_like(where)


def most_like_the_others(sources: Sequence[Callable[[], PreparedImage]]) -> int:
    """The number of the image that is nearest to the mean of all, on a coarse grid."""
    views = []
    for source in sources:
        values = source().values
        grid = identity_map([min(n, SIDE) for n in values.shape[2:]])
        blur = [max(0.0, n / SIDE / 2) for n in values.shape[2:]]
        views.append(sample_image(gaussian_blur(values.cpu(), blur), grid))
    d = views[0].dim() - 2
    least = [min(view.shape[2 + a] for view in views) for a in range(d)]
    alike = torch.cat([sample_image(v, identity_map(least)) for v in views])
    far = (alike - alike.mean(0)).square().flatten(1).mean(1)
    return int(far.argmin())
