"""Read an image between its voxels: linearly, by cubic splines, or as labels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from torch import Tensor

from icon_nephi import physical
from icon_nephi.coordinates import apply_affine
from icon_nephi.physical import Array

#: The ways; the last two give the image's own values, the others float32.
MODES = ("linear", "cubic", "nearest", "onehot")


def reader(
    voxels: Array, into: Tensor, mode: str = "linear", outside: float | None = None
) -> Callable[[Array], Array]:
    """A function of rows ``[N, d]`` in a frame: the image's values there, ``[N, C]``.

    Args:
        voxels: ``[*grid, C]``.
        into: homogeneous matrix, the frame -> the image's unit box.
        mode: ``"linear"``; ``"cubic"``, interpolating cubic B-splines, which may
            overshoot; ``"nearest"``; ``"onehot"``, the label with the largest share
            when each is read linearly: smoother borders than the nearest's.
        outside: the value half a voxel beyond the image and farther, default: the
            nearest border's.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if mode in ("linear", "nearest"):
        return physical.reader(voxels, into, mode, outside)
    limits = np.array(voxels.shape[:-1]) - 1.0
    inner = _cubic(voxels) if mode == "cubic" else _largest_share(voxels)

    def read(points: Array) -> Array:
        index = apply_affine(into, torch.from_numpy(points)).numpy() * limits
        values = inner(np.clip(index, 0, limits))
        if outside is not None:
            far = np.any((index < -0.5) | (index > limits + 0.5), axis=1)
            value = np.asarray(outside, values.dtype)
            values = np.where(far[:, np.newaxis], value, values)
        return values

    return read


def least_value(voxels: Array) -> float:
    """Return the least voxel that is a number, what is shown where there is no image.

    The border's value would go on as streaks that look like tissue, and 0 is water in
    CT; the least is air there, and 0 in most other images.
    """
    least: float = np.fmin.reduce(voxels, axis=None).item()
    return least


def _cubic(voxels: Array) -> Callable[[Array], Array]:
    """Voxel positions ``[N, d]`` in the grid -> values ``[N, C]`` float32."""
    from scipy.ndimage import map_coordinates, spline_filter

    channels = np.moveaxis(voxels, -1, 0).astype(np.float64)
    splines = [spline_filter(c, mode="mirror") for c in channels]

    def read(at: Array) -> Array:
        values = [
            map_coordinates(c, at.T, order=3, mode="mirror", prefilter=False)
            for c in splines
        ]
        return np.stack(values, 1).astype(np.float32)

    return read


def _largest_share(voxels: Array) -> Callable[[Array], Array]:
    """Voxel positions ``[N, d]`` -> of the 2^d neighbours' labels the weightiest."""
    last = np.array(voxels.shape[:-1]) - 2

    def read(at: Array) -> Array:
        base = np.minimum(at.astype(np.int64), last)
        part = at - base
        labels, weights = [], []
        for corner in product((0, 1), repeat=at.shape[1]):
            labels.append(voxels[tuple((base + corner).T)])
            weights.append(np.where(corner, part, 1 - part).prod(1))
        found, weight = np.stack(labels), np.stack(weights)[..., np.newaxis]
        shares = np.stack([(weight * (found == one)).sum(0) for one in found])
        best: Array = np.take_along_axis(found, shares.argmax(0)[np.newaxis], 0)[0]
        return best

    return read
