"""ITK transforms of many points at once, as `TransformPoint` maps each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from icon_nephi.io.itk_modules import specialized
from icon_nephi.space.frames import Array, other_components, other_order

Rows = Callable[[Array], Array]

# Of an inverse: what it may be off, of the size of where the points lie, and the most
# steps of Newton's until then.
_CLOSE, _STEPS = 1e-7, 40


def rows_through(transform: Any) -> Rows:
    """Return rows ``[N, d]`` LPS mm -> rows, float64, of an ITK transform.

    Linear ones, B-splines, displacement fields and chains of these are evaluated here
    for all points at once, by the numbers in them; of any other each point is asked for
    alone.
    """
    transform = specialized(transform)
    d = int(transform.GetInputSpaceDimension())
    if hasattr(transform, "GetNumberOfTransforms"):
        count = int(transform.GetNumberOfTransforms())
        parts = [rows_through(transform.GetNthTransform(i)) for i in range(count)]

        def composed(points: Array) -> Array:
            for part in reversed(parts):  # ITK applies the last first
                points = part(points)
            return points

        return composed
    if transform.IsLinear():
        return _linear(transform, d)
    kind = type(transform).__name__
    if "DisplacementFieldTransform" in kind and "Gaussian" not in kind:
        return _field(transform, d)
    if kind.startswith("itkBSplineTransform") and kind.endswith("3"):
        return _spline(transform, d)
    return lambda points: _one_by_one(transform, points)


def _one_by_one(transform: Any, points: Array) -> Array:
    moved = [tuple(transform.TransformPoint(p)) for p in points.tolist()]
    return np.array(moved, dtype=float).reshape(-1, points.shape[1])


def _linear(transform: Any, d: int) -> Rows:
    ends = _one_by_one(transform, np.concatenate([np.zeros((1, d)), np.eye(d)]))
    matrix = ends[1:] - ends[0]
    return lambda points: points @ matrix + ends[0]


def _field(transform: Any, d: int) -> Rows:
    """Read linearly; half a voxel beyond the field and farther nothing is moved."""
    import itk
    from scipy.ndimage import map_coordinates

    size, origin, into = _grid(transform, d)
    values = itk.array_from_vnl_vector(transform.GetParameters(), itk.D)
    values = np.moveaxis(values.reshape(*other_order(size.tolist()), d), -1, 0)
    last = size - 1.0

    def rows(points: Array) -> Array:
        index = (points - origin) @ into.T
        inside = ((index >= -0.5) & (index <= last + 0.5)).all(1)
        at = other_components(np.clip(index[inside], 0, last)).T
        moved = points.astype(np.float64)
        how = {"order": 1, "mode": "nearest"}
        moved[inside] += np.stack([map_coordinates(v, at, **how) for v in values], 1)
        return moved

    return rows


def _grid(transform: Any, d: int) -> tuple[Array, Array, Array]:
    """Return size and origin of a transform's grid, and the matrix into its steps."""
    told = transform.GetFixedParameters()
    numbers = np.array([told.GetElement(i) for i in range(told.Size())])
    origin, spacing = numbers[d : 2 * d], numbers[2 * d : 3 * d]
    steps = numbers[3 * d : 3 * d + d * d].reshape(d, d) * spacing
    return numbers[:d].astype(int), origin, np.linalg.inv(steps)


def _spline(transform: Any, d: int) -> Rows:
    """A cubic spline of coefficients; where some would be missing nothing is moved."""
    import itk
    from scipy.ndimage import map_coordinates

    size, origin, into = _grid(transform, d)
    values = itk.array_from_vnl_vector(transform.GetParameters(), itk.D)
    values = values.reshape(d, *other_order(size.tolist()))

    def rows(points: Array) -> Array:
        index = (points - origin) @ into.T
        inside = ((index >= 1) & (index <= size - 2.0)).all(1)
        at = other_components(index[inside]).T
        moved = points.astype(np.float64)
        how = {"order": 3, "mode": "nearest", "prefilter": False}
        moved[inside] += np.stack([map_coordinates(v, at, **how) for v in values], 1)
        return moved

    return rows


def inverse_of(rows: Rows) -> Rows:
    """Return the inverse of a map of rows, by Newton's method from its linear part.

    The function returned raises a ValueError where points come from nowhere: the map
    folds there, or ends.
    """

    def back(points: Array) -> Array:
        if not len(points):
            return points.astype(np.float64)
        found = points.astype(np.float64)
        size = max(float(np.ptp(points, axis=0).max()), 1e-12)
        off = rows(found) - points
        size = max(size, float(np.abs(off).max()))
        h = 1e-4 * size
        for _ in range(_STEPS):
            far = np.abs(off).max(1) > _CLOSE * size
            if not far.any():
                return found
            step = _newton(rows, found[far], off[far], h)
            moved, now = found[far] - step, off[far]
            length = np.linalg.norm(now, axis=1)
            for _ in range(6):  # a step that leads away is halved
                after = rows(moved) - points[far]
                worse = np.linalg.norm(after, axis=1) > length
                if not worse.any():
                    break
                step[worse] /= 2
                moved[worse] = found[far][worse] - step[worse]
            found[far], off[far] = moved, after
        far = np.abs(off).max(1) > 100 * _CLOSE * size
        if far.any():
            raise ValueError(
                f"the transform has no inverse at {int(far.sum())} of {len(points)} "
                "points: it folds there, or ends; take the inverse that was written "
                "with it"
            )
        return found

    return back


def _newton(rows: Rows, at: Array, off: Array, h: float) -> Array:
    """Return the steps ``[N, d]`` that undo what is off, by central differences."""
    d = at.shape[1]
    slopes = [rows(at + h * e) - rows(at - h * e) for e in np.eye(d)]
    jacobian = np.stack(slopes, -1) / (2 * h)  # [N, d, d]
    flat = np.abs(np.linalg.det(jacobian)) < 1e-6
    jacobian[flat] = np.eye(d)
    solved: Array = np.linalg.solve(jacobian, off[..., np.newaxis])[..., 0]
    return solved
