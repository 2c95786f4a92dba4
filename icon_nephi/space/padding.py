"""Voxels that show nothing: what scanners and resampling put around an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from icon_nephi.space.frames import Array

# Padding covers at least this share of an image, and leaves at least that of it.
LEAST, LEFT = 0.002, 0.02
# A value this far from the others, in shares of their range, shows no tissue.
FAR = 0.4
# One that is nearer is padding where it ends as no body does: at a step of that share
# of the range, around a convex field of view that reaches the sides of the image.
STEP, CONVEX, SIDE = 0.05, 0.99, 0.06
# Fewer values than these beside it are a drawing's, or labels.
VALUES = 32
# The field of view is judged by at most so many voxels a side.
_COARSE = {2: 96, 3: 40}
_VOXELS = 200_000


@dataclass(frozen=True)
class Padding:
    """What is no part of an image.

    Attributes:
        where: boolean ``[1, 1, *grid]``, a voxel around it included: its values may be
            mixtures.
        value: of it, NaN among others.
    """

    where: Tensor
    value: float

    @property
    def share(self) -> float:
        """Of all voxels."""
        return float(self.where.double().mean())


def find_padding(image: Tensor) -> Padding | None:
    """What is no part of ``[C, *grid]``, if anything: NaN, or one constant value.

    That is the lowest or the highest value of an image of one channel, on its border,
    and far from all others or around a convex field of view.
    """
    known = image.isfinite().all(0, keepdim=True)
    if not bool(known.all()):
        if bool(image.isinf().any()) or not _usable(~known):
            return None
        return Padding(_grown(~known), math.nan)
    if len(image) > 1:
        return None
    for value in (float(image.min()), float(image.max())):
        where = image == value
        if _usable(where) and _is_padding(image, where, value):
            return Padding(_grown(where), value)
    return None


def filled(image: Tensor, counts: Tensor) -> Tensor:
    """The image where it counts; elsewhere it goes on smoothly from there.

    Both ``[1, C or 1, *grid]``; at least one voxel counts.
    """
    if bool(counts.all()):
        return image
    weight = counts.to(image)
    total = torch.where(counts > 0, image, torch.zeros((), dtype=image.dtype))
    size = image.shape[2:]
    d = len(size)
    pool = F.avg_pool2d if d == 2 else F.avg_pool3d
    steps = [2 if n > 1 else 1 for n in size]
    if max(steps) == 1:
        return total
    kind = {"ceil_mode": True, "count_include_pad": False}
    shares = pool(weight, steps, **kind)
    coarse = pool(total, steps, **kind) / shares.clamp(min=1e-12)
    coarse = filled(coarse, shares > 0)
    mode = "bilinear" if d == 2 else "trilinear"
    around = F.interpolate(coarse, size, mode=mode, align_corners=False)
    return torch.where(counts > 0, image, around)


def _usable(where: Tensor) -> bool:
    """Whether so much of an image, its border included, can be padding."""
    share = float(where.double().mean())
    if not LEAST <= share <= 1 - LEFT:
        return False
    return any(
        bool(where.select(axis, end).any())
        for axis in range(1, where.dim())
        for end in (0, -1)
    )


def _is_padding(image: Tensor, where: Tensor, value: float) -> bool:
    rest = image[~where]
    rest = rest[:: max(1, len(rest) // _VOXELS)].double()
    if len(rest.unique()) < VALUES:
        return False
    low, high = rest.quantile(torch.tensor([0.01, 0.99]).to(rest)).tolist()
    if high <= low:
        return False
    gap = max(low - value, value - high) / (high - low)
    if gap >= FAR:
        return True
    return _steps(image, where) >= STEP * (high - low) and _is_field(~where)


def _every(size: Sequence[int]) -> list[int]:
    most = _COARSE[len(size)]
    return [max(1, math.ceil(n / most)) for n in size]


def _steps(image: Tensor, where: Tensor) -> float:
    """By how much values change from one side of a border to the other, where much."""
    found = []
    every = _every(image.shape[1:])
    for axis in range(1, image.dim()):
        lines = tuple(
            slice(None) if a in (0, axis) else slice(None, None, every[a - 1])
            for a in range(image.dim())
        )
        crossed = where[lines].int().diff(dim=axis) != 0
        found.append(image[lines].diff(dim=axis)[crossed].abs())
    return float(torch.cat(found).double().quantile(0.9))


def _is_field(valid: Tensor) -> bool:
    """Whether voxels fill a convex region that reaches the sides of an image."""
    from scipy import ndimage  # slow to import
    from scipy.spatial import ConvexHull, QhullError

    every = _every(valid.shape[1:])
    coarse: Array = valid[0][tuple(slice(None, None, e) for e in every)].cpu().numpy()
    coarse = ndimage.binary_opening(coarse, iterations=1)
    at = np.argwhere(coarse)
    if not len(at):
        return False
    margin = [max(1.0, SIDE * (n - 1)) for n in coarse.shape]
    ends = zip(at.min(0), at.max(0), coarse.shape, margin, strict=True)
    if not all(low <= m and high >= n - 1 - m for low, high, n, m in ends):
        return False
    try:
        sides = cast(Array, ConvexHull(at).equations)
    except QhullError:
        return False
    grid = np.indices(coarse.shape).reshape(len(coarse.shape), -1)
    inside = np.ones(grid.shape[1], bool)
    for side in sides:
        inside &= side[:-1] @ grid + side[-1] <= 1e-9
    return bool(coarse.sum() >= CONVEX * inside.sum())


def _grown(where: Tensor) -> Tensor:
    """``[1, 1, *grid]``: one voxel more on every side."""
    pool = F.max_pool2d if where.dim() == 3 else F.max_pool3d
    grown: Tensor = pool(where.float()[None], 3, 1, 1) > 0
    return grown
