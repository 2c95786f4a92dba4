"""The nodes that a cubic spline of a map needs, and its coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from icon_nephi.maps.framed import FramedMap
from icon_nephi.space.frames import Array

# Steps of a spline to a voxel, from the coarsest on.
_RUNGS = (1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 1, 2, 3, 4, 5, 6, 8, 12, 16)
# Places where an axis is tried, and the nodes around each: at 6 nodes from an end a
# spline has forgotten it but for 4 parts in 10,000.
_SAMPLES, _WINDOW = 800, 12
# The worst of all places is about so much worse than the worst of the samples.
_WORSE = 2.0
# So many nodes are no burden. What takes more has to be worth it.
_MODEST = 250_000


class Nodes(NamedTuple):
    """How many nodes a spline has, and how far off it is.

    Attributes:
        counts: from the first to the last voxel centre, per tensor axis.
        place: about the farthest that a point is off, in the target's unit.
        volume: about the most that a Jacobian determinant is off.
    """

    counts: tuple[int, ...]
    place: float
    volume: float


def spline_nodes(
    mapped: FramedMap,
    frame: Tensor,
    size: Sequence[int],
    smooth: Callable[[Array], Array],
    tolerance: tuple[float, float],
    limits: tuple[int, int],
    relaxed: float,
) -> Nodes:
    """Return the fewest nodes with which an interpolating cubic spline is the map.

    Whichever axis misses most is refined, first for the places, then for the
    determinants. Beyond a quarter of a million nodes a looser tolerance does for the
    places, and determinants take more, up to twice what places took, only where that
    brings them within their tolerance. What an axis misses is found at random places
    from splines through the map at the nodes around them. Determinants need many more
    nodes than places: the map's second derivatives jump where pieces of a quadratic
    code meet, and half the steps then divide what determinants miss by little more
    than two.

    Args:
        mapped: the map.
        frame: homogeneous matrix, the image's unit box -> the frame of the points.
        size: voxels per tensor axis.
        smooth: rows of the unit box -> whether they lie where the map has no kinks.
        tolerance: of places, in the target's unit, and of determinants.
        limits: nodes in all where all steps are of a voxel or more, and else.
        relaxed: tolerance of places beyond a quarter of a million nodes.
    """
    unit = np.random.default_rng(0).uniform(size=(10 * _SAMPLES, len(size)))
    if not smooth(unit).any():
        smooth = _everywhere
    ladders = [
        sorted({c for f in _RUNGS if (c := math.ceil((n - 1) * f) + 1) >= 5})
        for n in size
    ]
    counts = [ladder[0] for ladder in ladders]
    shrink = min(1.0, (limits[0] / math.prod(counts)) ** (1 / len(size)))
    counts = [max(5, int(shrink * n)) for n in counts]

    missed = partial(_missed, mapped, frame, unit, smooth)
    misses = [missed(axis, n) for axis, n in enumerate(counts)]
    within_reason = [*counts], [*misses]
    for kind in (0, 1):
        if kind:
            within_reason = [*counts], [*misses]
            cheap = max(_MODEST, math.prod(counts))
            modest = max(_MODEST, 2 * math.prod(counts))
            limits = min(limits[0], modest), min(limits[1], modest)
        left = set(range(len(size)))
        while left:
            axis = max(left, key=lambda a: misses[a][kind])
            if misses[axis][kind] <= tolerance[kind]:
                break
            finer = [*counts]
            finer[axis] = next((n for n in ladders[axis] if n > counts[axis]), 0)
            total = math.prod(finer)
            within = all(n <= voxels for n, voxels in zip(finer, size, strict=True))
            enough = not kind and total > _MODEST and misses[axis][0] <= relaxed
            if finer[axis] and total <= limits[0 if within else 1] and not enough:
                counts, misses[axis] = finer, missed(axis, finer[axis])
                if kind and total <= cheap:
                    within_reason = [*counts], [*misses]
            else:
                left.remove(axis)
    if max(m[1] for m in misses) > tolerance[1]:
        counts, misses = within_reason
    known = [m for m in misses if math.isfinite(m[0])] or [(0.0, 0.0)]
    place, volume = (max(m[kind] for m in known) for kind in (0, 1))
    return Nodes(tuple(counts), place, volume)


def _everywhere(unit: Array) -> Array:
    return np.ones(len(unit), bool)


def _missed(
    mapped: FramedMap,
    frame: Tensor,
    unit: Array,
    smooth: Callable[[Array], Array],
    axis: int,
    count: int,
) -> tuple[float, float]:
    """Return about the most that places and determinants are off, by one axis."""
    d, unit = unit.shape[1], unit.copy()
    # Half of them at nodes, where the voxels are; none where the map has its border.
    unit[::2, axis] = np.round(unit[::2, axis] * (count - 1)) / (count - 1)
    unit = unit.clip(1e-6, 1 - 1e-6)
    reach = np.zeros(d)
    reach[axis] = _WINDOW / 2 / (count - 1)
    ends = (np.clip(unit + way * reach, 0, 1) for way in (-1, 1))
    unit = unit[np.logical_and(*(smooth(end) for end in ends))][:_SAMPLES]
    if len(unit) < _SAMPLES // 25:
        return math.inf, math.inf  # on no such steps: each sees the kinks
    matrix = frame.numpy()
    nodes = min(_WINDOW, count)
    at = unit[:, axis] * (count - 1)
    first = np.clip(np.floor(at) - nodes // 2 + 1, 0, count - nodes)
    around = np.repeat(unit[:, np.newaxis], nodes + 1, axis=1)
    around[:, :nodes, axis] = (first[:, np.newaxis] + np.arange(nodes)) / (count - 1)
    points = around.reshape(-1, d) @ matrix[:d, :d].T + matrix[:d, d]
    moved = mapped(points).reshape(-1, nodes + 1, d)
    values = moved[:, :nodes] - moved[:, nodes:]
    weights, slopes = _weights(at - first, nodes)
    place = np.linalg.norm(np.einsum("nk,nkd->nd", weights, values), axis=1)
    jacobians = mapped.jacobians(points[nodes :: nodes + 1])
    slope = np.einsum("nk,nkd->nd", slopes, values) * (count - 1)
    off = slope - jacobians @ matrix[:d, axis]
    # A column of the Jacobian, seen along this axis, is off: so is the determinant.
    change = np.linalg.solve(jacobians @ matrix[:d, :d], off[..., np.newaxis])[:, axis]
    volume = np.abs(np.linalg.det(jacobians) * change[:, 0])
    return _WORSE * float(place.max()), _WORSE * float(volume.max())


def _weights(at: Array, nodes: int) -> tuple[Array, Array]:
    """Return ``[N, nodes]`` twice: values at nodes -> value and slope at places."""
    cell = np.clip(np.floor(at), 0, nodes - 2)
    t = (at - cell)[:, np.newaxis]
    u = 1 - t
    value = [u**3, 4 - 6 * t**2 + 3 * t**3, 4 - 6 * u**2 + 3 * u**3, t**3]
    slope = [-(u**2), 3 * t**2 - 4 * t, 4 * u - 3 * u**2, t**2]
    near = cell.astype(int)[:, np.newaxis] + np.arange(4)
    solve = spline_solver(nodes)[near]
    return (
        np.einsum("nk,nkc->nc", np.concatenate(value, 1) / 6, solve),
        np.einsum("nk,nkc->nc", np.concatenate(slope, 1) / 2, solve),
    )


def spline_solver(nodes: int) -> Array:
    """Return ``[nodes + 2, nodes]``: values at nodes -> cubic B-spline coefficients.

    One coefficient before the first node and one after the last. The ends are free
    (not-a-knot), so that cubics are kept.
    """
    system = np.zeros((nodes + 2, nodes + 2))
    for row in range(1, nodes + 1):
        system[row, row - 1 : row + 2] = np.array([1, 4, 1]) / 6
    system[0, :5] = system[-1, -5:] = [1, -4, 6, -4, 1]
    inverse: Array = np.linalg.inv(system)[:, 1:-1]
    return inverse
