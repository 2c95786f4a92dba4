"""Small blocks of samples: where a map takes them, and its determinants there."""

from __future__ import annotations

import torch
from torch import Tensor

from icon_nephi.maps.jacobians import determinants
from icon_nephi.maps.transforms import Map
from icon_nephi.space.sampling import Patches


def patch_maps(
    phi: Map, patches: Patches, centres: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """Samples of blocks and where phi takes them, both ``[B, d, P * s, s(, s)]``.

    The centres are rows ``[B, P, d]``, ICON frame; the stride of the patches counts
    voxels of a grid of that shape.
    """
    batch, count, d = centres.shape
    size = patches.size
    offsets = patches.offsets(shape, centres)
    middle = centres.transpose(1, 2).reshape(batch, d, count, *(1,) * d)
    samples = middle + offsets[:, None]
    grid = (batch, d, count * size, *(size,) * (d - 1))
    if not patches.corners:
        return samples.reshape(grid), phi(samples.reshape(grid))
    ends = torch.tensor([0, size - 1], device=centres.device)
    share = torch.linspace(0, 1, size, dtype=centres.dtype, device=centres.device)
    weights = torch.stack([1 - share, share])
    for axis in range(1, d + 1):
        offsets = offsets.index_select(axis, ends)
    corners = middle + offsets[:, None]
    at = corners.reshape(batch, d, count * 2, *(2,) * (d - 1))
    moves = (phi(at) - at).reshape(corners.shape)
    for axis in range(3, 3 + d):
        moves = torch.tensordot(moves.movedim(axis, -1), weights, 1).movedim(-1, axis)
    return samples.reshape(grid), (samples + moves).reshape(grid)


def as_blocks(samples: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """``[B * P, C, s, s(, s)]`` of ``[B, C, P * s, s(, s)]``."""
    batch, channels = samples.shape[:2]
    count, *rest = blocks
    size = samples.shape[2] // count
    split = samples.reshape(batch, channels, count, size, *rest)
    return split.transpose(1, 2).reshape(batch * count, channels, size, *rest)


def block_determinants(moved: Tensor, at: Tensor) -> Tensor:
    """det J at samples ``[N, d, s, s(, s)]`` of blocks: ``[N, 1, s, s(, s)]``.

    From differences of where a map takes them: exact where it is multilinear in a
    block, as between its corners.
    """
    columns = [
        torch.gradient(moved, dim=2 + axis)[0]
        / torch.gradient(at[:, axis : axis + 1], dim=2 + axis)[0]
        for axis in range(at.shape[1])
    ]
    return determinants(torch.stack(columns, 2))
