"""Maps and lattices: a map at all points of one, and the nodes a spline of it needs.

Along each axis the code is read by a matrix, so a lattice takes a few products of
matrices where scattered points would each read their 27 nodes: exact, and cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from icon_nephi.coordinates import points_as_grid, to_rows
from icon_nephi.fields import LatentMLP
from icon_nephi.transforms import Composition, Map, MatrixTransform, NeuralTransform

_Array: TypeAlias = npt.NDArray[Any]
# Steps of a spline to a voxel, from the coarsest on.
_RUNGS = (1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 1, 2, 3, 4, 5, 6, 8, 12, 16)
# Places where an axis is tried, and the nodes around each: at 6 nodes from an end a
# spline has forgotten it but for 4 parts in 10,000.
_SAMPLES, _WINDOW = 800, 12
# The worst of all places is about so much worse than the worst of the samples.
_WORSE = 2.0
# Determinants may take so many nodes, or twice as many as places take.
_MODEST = 250_000
# Points whose lines are prepared together: whole planes of the lattice.
_PREPARED = 2**18


@torch.no_grad()
def on_lattice(phi: Map, axes: Sequence[Tensor]) -> Iterator[Tensor]:
    """Where a map takes the points of a lattice, in parts of rows ``[N, d]``.

    Lines of the last axis follow each other as in a C-contiguous grid. No gradients.

    Args:
        phi: of a single pair, on ICON-frame coordinates.
        axes: ICON-frame positions along each axis, ``[n_a]`` each.
    """
    if isinstance(phi, Composition):
        inner = _straight(phi.psi, axes)
        if inner is not None:
            yield from on_lattice(phi.phi, inner)
        else:
            for rows in on_lattice(phi.psi, axes):
                yield to_rows(phi.phi(points_as_grid(rows[None])))[0]
        return
    size = math.prod(len(x) for x in axes[1:])
    for first in axes[0].split(max(1, _PREPARED // size)):
        part = [first, *axes[1:]]
        if isinstance(phi, NeuralTransform):
            yield from _on_lines(phi, part)
        else:
            rows = torch.cartesian_prod(*part)
            yield to_rows(phi(points_as_grid(rows[None])))[0]


def _straight(phi: Map, axes: Sequence[Tensor]) -> list[Tensor] | None:
    """The axes of the lattice where a map takes a lattice, if it is one still."""
    if not isinstance(phi, MatrixTransform) or len(phi.matrix) != 1:
        return None
    d, matrix = len(axes), phi.matrix[0].to(axes[0])
    scale = matrix.diagonal()[:d]
    if not bool((matrix[:d, :d] == torch.diag(scale)).all()):
        return None
    return [x * scale[a] + matrix[a, d] for a, x in enumerate(axes)]


def _on_lines(phi: NeuralTransform, axes: Sequence[Tensor]) -> Iterator[Tensor]:
    weights, nodes = phi.code.on_lines([x.clamp(0, 1) for x in axes])
    *first, last = axes
    starts = torch.stack(torch.meshgrid(*first, indexing="ij"), -1).flatten(0, -2)
    at_once = max(1, phi.chunk_size // len(last))
    for lines, start in zip(
        nodes.split(at_once, 1), starts.split(at_once), strict=True
    ):
        moved = _displacement(phi, weights, lines).transpose(0, 1)  # [L, n, d]
        rows = moved.to(last).contiguous()
        rows[..., :-1] += start[:, None]
        rows[..., -1] += last
        yield rows.flatten(0, 1)


def _displacement(phi: NeuralTransform, weights: Tensor, nodes: Tensor) -> Tensor:
    """``[n, L, d]`` in the unit box."""
    if isinstance(phi.field, LatentMLP) and len(phi.field.hidden):
        return phi.field.on_lines(weights, nodes)
    located = (weights @ nodes.flatten(1)).view(1, -1, nodes.shape[2])
    d = nodes.shape[2] - phi.code.size
    moved = phi.field(located[..., :d], located[..., d:])
    return moved.view(len(weights), -1, d)


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
    mapped: Any,
    frame: Tensor,
    size: Sequence[int],
    smooth: Callable[[_Array], _Array],
    tolerance: tuple[float, float],
    limits: tuple[int, int],
) -> Nodes:
    """The fewest nodes with which an interpolating cubic spline is the map.

    Whichever axis misses most is refined, first for the places, then for the
    determinants. What an axis misses is found at random places from splines through the
    map at the nodes around them. Determinants need many more nodes than places: the
    map's second derivatives jump where pieces of a quadratic code meet, and half the
    steps then divide what determinants miss by little more than two.

    Args:
        mapped: a `icon_nephi.physical.FramedMap`.
        frame: homogeneous matrix, the image's unit box -> the frame of the points.
        size: voxels per tensor axis.
        smooth: rows of the unit box -> whether they lie where the map has no kinks.
        tolerance: of places, in the target's unit, and of determinants.
        limits: nodes in all where all steps are of a voxel or more, and else.
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

    def missed(axis: int, count: int) -> tuple[float, float]:
        return _missed(mapped, frame, axis, count, unit, smooth)

    misses = [missed(axis, n) for axis, n in enumerate(counts)]
    for kind in (0, 1):
        if kind:
            modest = max(_MODEST, 2 * math.prod(counts))
            limits = min(limits[0], modest), min(limits[1], modest)
        left = set(range(len(size)))
        while left:
            axis = max(left, key=lambda a: misses[a][kind])
            if misses[axis][kind] <= tolerance[kind]:
                break
            finer = [*counts]
            finer[axis] = next((n for n in ladders[axis] if n > counts[axis]), 0)
            within = all(n <= voxels for n, voxels in zip(finer, size, strict=True))
            if finer[axis] and math.prod(finer) <= limits[0 if within else 1]:
                counts, misses[axis] = finer, missed(axis, finer[axis])
            else:
                left.remove(axis)
    known = [m for m in misses if math.isfinite(m[0])] or [(0.0, 0.0)]
    place, volume = (max(m[kind] for m in known) for kind in (0, 1))
    return Nodes(tuple(counts), place, volume)


def _everywhere(unit: _Array) -> _Array:
    return np.ones(len(unit), bool)


def _missed(
    mapped: Any,
    frame: Tensor,
    axis: int,
    count: int,
    unit: _Array,
    smooth: Callable[[_Array], _Array],
) -> tuple[float, float]:
    """About the most that places and determinants are off by the steps of one axis."""
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
    weights, slopes = _read(at - first, nodes)
    place = np.linalg.norm(np.einsum("nk,nkd->nd", weights, values), axis=1)
    jacobians = mapped.jacobians(points[nodes :: nodes + 1])
    slope = np.einsum("nk,nkd->nd", slopes, values) * (count - 1)
    off = slope - jacobians @ matrix[:d, axis]
    # A column of the Jacobian, seen along this axis, is off: so is the determinant.
    change = np.linalg.solve(jacobians @ matrix[:d, :d], off[..., np.newaxis])[:, axis]
    volume = np.abs(np.linalg.det(jacobians) * change[:, 0])
    return _WORSE * float(place.max()), _WORSE * float(volume.max())


def _read(at: _Array, nodes: int) -> tuple[_Array, _Array]:
    """``[N, nodes]`` twice: values at nodes 0, 1, ... -> value and slope at places."""
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


def spline_solver(nodes: int) -> _Array:
    """``[nodes + 2, nodes]``: values at nodes -> cubic B-spline coefficients.

    One coefficient before the first node and one after the last. The ends are free
    (not-a-knot), so that cubics are kept.
    """
    system = np.zeros((nodes + 2, nodes + 2))
    for row in range(1, nodes + 1):
        system[row, row - 1 : row + 2] = np.array([1, 4, 1]) / 6
    system[0, :5] = system[-1, -5:] = [1, -4, 6, -4, 1]
    inverse: _Array = np.linalg.inv(system)[:, 1:-1]
    return inverse
