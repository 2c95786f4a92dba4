"""ITK transforms: read, written, and made from maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import itk
import numpy as np
import torch
from torch import Tensor

from icon_nephi.io import itk_modules
from icon_nephi.io.itk_images import no_stderr
from icon_nephi.io.itk_modules import itk_class
from icon_nephi.io.splines import spline_nodes, spline_solver
from icon_nephi.maps.framed import FramedMap, linear_part, over_grid
from icon_nephi.maps.transforms import Map
from icon_nephi.space.frames import Array, Geometry, apply_affine, other_order

#: Nodes of an exported field, each three doubles: where an axis has steps finer than
#: the voxels at most the first number (70 MB as a file), else the second (200 MB).
FINE_NODES, MOST_NODES = 6_000_000, 2**24
#: Of an exported field: of points in millimetres (in voxels where these are below 1 mm
#: or above 100, as in microscopy), and of Jacobian determinants.
TOLERANCES = 1e-3, 1e-3
#: How far off determinants may be before it is said.
WORTH_SAYING = 0.05
_MARGIN = 0.05  # share of the image that the field has on every side of it


def read_transform(name: str, path: str | os.PathLike[str]) -> Any:
    """Return the one transform in an ITK transform file.

    Raises:
        ValueError: missing or unreadable file, or not exactly one transform.
    """
    if not Path(path).is_file():
        raise ValueError(f"{name}: {path} does not exist")
    try:
        with no_stderr():
            transforms = itk_modules.read_transforms(Path(path))
    except Exception as error:
        raise ValueError(f"{name}: {path} cannot be read as a transform") from error
    if len(transforms) != 1:
        raise ValueError(
            f"{name}: {path} holds {len(transforms)} transforms, expected one"
        )
    return transforms[0]


def composite_transform(
    phi: Map,
    source: Geometry,
    target: Geometry,
    matrix: Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
    said: list[str] | None = None,
) -> Any:
    """Return a map as an ``itk.CompositeTransform`` of LPS millimetres.

    ``TransformPoint(source point)`` is the target point: a cubic B-spline field along
    the source image's axes, then the exact affine map. On each axis the steps are as
    long as the errors of points and of Jacobian determinants allow
    (`icon_nephi.io.splines.spline_nodes`): up to 8 voxels, or a voxel or a part of one,
    and then the field is the map at voxel centres. Beyond a quarter of a million nodes
    points within a 200th of a voxel suffice, and determinants take more, up to twice
    what points took, only where that is enough. A rough map of a large image misses
    the tolerances then: of a CT with fine codes 99 in 100 determinants lie within
    0.01. (A displacement field is read linearly: at 2 mm steps
    and 12 mm of motion 0.03 mm off between voxels.)

    The map has a kink where the fixed image ends. Where that lies inside the moving
    image, the backward transform is up to a few hundredths of a millimetre off between
    voxels. In the margin around the image the field continues the displacement, within
    two steps of the border up to a few tenths off; beyond it only the affine is left.

    Args:
        phi: from the source's unit box to the target's.
        source: the image whose points go in (for phi_AB the fixed one).
        target: the image whose points come out.
        matrix: the affine part, homogeneous ``[d + 1, d + 1]`` between the unit boxes.
            Default: both images lie where their headers say.
        device: where phi is evaluated.
        said: takes a sentence if points are a 100th of a voxel off (and more than
            their tolerance), or determinants more than `WORTH_SAYING`.
    """
    d = source.dimension
    into, out = source.unit_to_physical(), target.unit_to_physical()
    if matrix is None:
        matrix = torch.linalg.inv(out) @ into
    linear, shift = linear_part(matrix, source, target)
    mapped = FramedMap(phi, into, out, device)
    back = np.linalg.inv(linear)

    def beside(points: Array, moved: Array) -> Array:
        result: Array = (moved - shift) @ back.T - points
        return result

    def smooth(unit: Array) -> Array:
        there = apply_affine(matrix.cpu(), torch.from_numpy(unit)).numpy()
        inside: Array = np.all((there > 0) & (there < 1), axis=1)
        return inside

    finest = min(FINE_NODES, max(10**6, 4**d * int(np.prod(source.size))))
    limits = max(MOST_NODES, finest), finest
    voxel = min(*source.spacing, *target.spacing)
    allowed = TOLERANCES[0] * (voxel if voxel < 1 or voxel > 100 else 1), TOLERANCES[1]
    relaxed = max(allowed[0], min(source.spacing) / 200)
    nodes, *off = spline_nodes(
        mapped, into, source.size, smooth, allowed, limits, relaxed
    )
    missed = off[0] > 2 * relaxed or off[1] > WORTH_SAYING
    if said is not None and missed:
        said.append(
            f"the ITK transform has no room for more nodes: between voxels it is up to "
            f"{off[0]:.1g} mm off, and its Jacobian determinants up to {off[1]:.1g} "
            "(those of the saved registration are exact)"
        )
    pads = [int(np.ceil(_MARGIN * n)) + 2 for n in nodes]  # 2: a cubic's reach
    grid = _padded(source, nodes, pads)
    frame = grid.unit_to_physical()
    field = over_grid(beside, grid.size, frame, d, np.float64, mapped=mapped)
    solvers = [_coefficients(n, p) for n, p in zip(nodes, pads, strict=True)]
    # Rounded so that files compress: a small part of what lies between the nodes.
    quantum = 2.0 ** np.floor(np.log2(max(allowed[0], off[0]) / 200))
    for component in range(d):
        values = field[..., component]
        for axis, solve in enumerate(solvers):
            values = np.moveaxis(np.tensordot(solve, values, (1, axis)), 0, axis)
        field[..., component] = np.round(values / quantum) * quantum
    spline = itk_class("BSplineTransform", f"D{d}3").New()
    numbers = [*grid.itk_size, *grid.origin, *grid.spacing]
    numbers += np.array(grid.direction).ravel().tolist()
    parameters = itk_class("OptimizerParameters", "D")
    spline.SetFixedParameters(parameters([float(x) for x in numbers]))
    values = parameters(field.size)
    # Copied as a block: from a sequence, ITK makes a Python object of every number.
    values.update(itk.vnl_vector_from_array(np.moveaxis(field, -1, 0).ravel()), 0)
    spline.SetParameters(values)
    return composed(spline, affine_transform(linear, shift))


def affine_transform(matrix: Array, shift: Array) -> Any:
    """Return the ``itk.AffineTransform`` of a matrix ``[d, d]`` and a shift ``[d]``."""
    affine = itk_class("AffineTransform", f"D{len(shift)}").New()
    affine.SetMatrix(itk.matrix_from_array(matrix))
    affine.SetTranslation(shift.tolist())
    return affine


def composed(first: Any, second: Any) -> Any:
    """Return the ``itk.CompositeTransform`` of one transform, then another."""
    d = first.GetInputSpaceDimension()
    both = itk_class("CompositeTransform", f"D{d}").New()
    both.AddTransform(second)  # ITK applies the one added last first
    both.AddTransform(first)
    return both


def _padded(source: Geometry, nodes: Sequence[int], pads: list[int]) -> Geometry:
    """Return the grid of nodes: over the image's box, ``pads`` more at each end."""
    steps = other_order(e / (n - 1) for e, n in zip(source.extent, nodes, strict=True))
    direction = np.array(source.direction)
    beyond = np.array(steps) * np.array(other_order(pads))
    return Geometry(
        size=tuple(n + 2 * p for n, p in zip(nodes, pads, strict=True)),
        spacing=steps,
        origin=tuple((np.array(source.origin) - direction @ beyond).tolist()),
        direction=source.direction,
    )


def _coefficients(nodes: int, pad: int) -> Array:
    """Return ``[nodes + 2 pad] * 2``: values at nodes -> B-spline coefficients.

    Inside the box the spline interpolates and its ends are free (not-a-knot), because
    the map has a kink at the border that would ring inwards; outside a coefficient is
    the value at its node, which is exact where the displacement is constant.
    """
    solve = np.eye(nodes + 2 * pad)
    inner = slice(pad - 1, pad + nodes + 1)
    solve[inner] = 0
    solve[inner, pad : pad + nodes] = spline_solver(nodes)
    return solve


def write_transform(transform: Any, path: Path) -> None:
    """Write an ITK transform, compressed where its format can be.

    Raises:
        ValueError: ITK could not.
    """
    try:
        itk_modules.write_transforms(transform, path)
    except RuntimeError as error:
        raise ValueError(
            f"a {path.suffix} transform could not be written: is the disk full?"
        ) from error
