"""Read an image between its voxels: linearly, by cubic splines, or as labels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icon_nephi.space.frames import Array, apply_affine, outside_grid, points_as_grid
from icon_nephi.space.images import sample_image

#: The ways; the last two give the image's own values, the others float32.
MODES = ("linear", "cubic", "nearest", "onehot")


def reader(
    voxels: Array, into: Tensor, mode: str = "linear", outside: float | None = None
) -> Callable[[Array], Array]:
    """Return rows ``[N, d]`` of a frame -> the image's values there, ``[N, C]``.

    Colours (uint8) are rounded and stay colours.

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
    size = voxels.shape[:-1]
    limits = np.array(size) - 1.0
    values_at, kind = _KINDS[mode](voxels), type_of_result(voxels, mode)

    def read(points: Array) -> Array:
        unit = apply_affine(into, torch.from_numpy(points)).numpy()
        index = unit * limits
        values = values_at(unit if mode == "linear" else np.clip(index, 0, limits))
        if values.dtype != kind:  # colours
            values = np.clip(np.round(values), 0, 255).astype(kind)
        if outside is not None:
            far = outside_grid(index, size)[:, np.newaxis]
            values = np.where(far, np.asarray(outside, values.dtype), values)
        return values

    return read


def _linear(voxels: Array) -> Callable[[Array], Array]:
    """Return places ``[N, d]`` in the unit box -> values ``[N, C]`` float32."""
    image = torch.from_numpy(voxels.astype(np.float32)).movedim(-1, 0)[None]

    def read(unit: Array) -> Array:
        at = points_as_grid(torch.from_numpy(unit)[None].float())
        values: Array = sample_image(image, at)[0].flatten(1).T.numpy()
        return values

    return read


def _nearest(voxels: Array) -> Callable[[Array], Array]:
    """Return voxel positions ``[N, d]`` -> the closest voxel's values ``[N, C]``."""
    return lambda at: voxels[tuple(np.floor(at + 0.5).astype(np.int64).T)]


def least_value(voxels: Array) -> float:
    """Return the least finite voxel, what is shown where there is no image.

    The border's value would go on as streaks that look like tissue, and 0 is water in
    CT; the least is air there, and 0 in most other images.
    """
    if voxels.dtype.kind != "f":
        return int(voxels.min())
    least = float(np.fmin.reduce(voxels, axis=None))
    if np.isinf(least):
        least = float(np.min(voxels, where=np.isfinite(voxels), initial=np.inf))
    return least if np.isfinite(least) else float("nan")


def is_coloured(voxels: Array) -> bool:
    """Return whether ``[*grid, C]`` are colours, which stay what they are: uint8."""
    return voxels.dtype == np.uint8 and voxels.shape[-1] in (3, 4)


def type_of_result(voxels: Array, mode: str) -> np.dtype[Any]:
    """Return the type of what is read of ``[*grid, C]``: see `reader`."""
    keeps = mode in ("nearest", "onehot") or is_coloured(voxels)
    return voxels.dtype if keeps else np.dtype(np.float32)


def check_outside(value: float, voxels: Array, mode: str) -> None:
    """Raise a ValueError unless results can have this value."""
    kind = type_of_result(voxels, mode)
    fits = kind.kind == "f" or (
        value == np.round(value) and np.iinfo(kind).min <= value <= np.iinfo(kind).max
    )
    if not fits:
        raise ValueError(
            f"outside is {value:g}, which the result's {kind.name} cannot hold; give a "
            "whole number in its range"
        )


def _cubic(voxels: Array) -> Callable[[Array], Array]:
    """Return voxel positions ``[N, d]`` -> values ``[N, C]`` float32.

    A spline reaches through the whole image: voxels that are not finite count as their
    nearest that is, and make NaN only what a linear reading would take of them.
    """
    from scipy.ndimage import distance_transform_edt, map_coordinates, spline_filter

    channels = np.moveaxis(voxels, -1, 0).astype(np.float64)
    holes = [~np.isfinite(c) for c in channels]
    splines = []
    for channel, hole in zip(channels, holes, strict=True):
        if hole.any():
            if hole.all():
                channel[:] = 0
            else:
                nearest = distance_transform_edt(
                    hole, return_distances=False, return_indices=True
                )
                channel = channel[tuple(nearest)]
        splines.append(spline_filter(channel, mode="mirror"))

    def read(at: Array) -> Array:
        how = {"order": 3, "mode": "mirror", "prefilter": False}
        values = [map_coordinates(spline, at.T, **how) for spline in splines]
        for value, hole in zip(values, holes, strict=True):
            if hole.any():
                share = map_coordinates(hole.astype(np.float32), at.T, order=1)
                value[share > 0] = np.nan
        return np.stack(values, 1).astype(np.float32)

    return read


def _largest_share(voxels: Array) -> Callable[[Array], Array]:
    """Return voxel positions ``[N, d]`` -> of 2^d neighbours' labels the weightiest."""
    last = np.array(voxels.shape[:-1]) - 2

    def read(at: Array) -> Array:
        base = np.minimum(at.astype(np.int64), last)
        part = at - base
        labels, weights = [], []
        for corner in product((0, 1), repeat=at.shape[1]):
            labels.append(voxels[tuple((base + corner).T)])
            weights.append(np.where(corner, part, 1 - part).prod(1))
        corners, weight = np.stack(labels), np.stack(weights)[..., np.newaxis]
        shares = np.stack([(weight * (corners == label)).sum(0) for label in corners])
        best: Array = np.take_along_axis(corners, shares.argmax(0)[np.newaxis], 0)[0]
        return best

    return read


_KINDS = dict(zip(MODES, (_linear, _cubic, _nearest, _largest_share), strict=True))
