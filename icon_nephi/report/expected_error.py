"""How far off a registration may be, point by point, without landmarks.

Where the way there and back does not return, where the images are little alike or would
be as alike elsewhere, or where registrations with other random numbers go elsewhere,
the images did not say where to go. Lengths are millimetres for
ITK images and voxels for tensors. Points ``[N, d]`` and directions are as of
``Registration.transform_points``, and so are errors for bad ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icon_nephi.maps.two_way import FIXED_TO_MOVING, PointMapping, opposite
from icon_nephi.space.frames import Array, Geometry, points_as_grid
from icon_nephi.space.images import sample_image

#: What `estimate` weighs the voxel, the inverse consistency and the spread with, where
#: it is not known how sharp the images are; where it is, the inverse consistency and
#: that. Fitted by `python -m evaluation.accuracy.trust`.
ALONE = (0.35, 1.3)
ENSEMBLE = (0.35, 0.5, 1.0)
SHARP = (1.9, 0.38)


def inverse_consistency(
    mapping: PointMapping, points: Any, direction: str = FIXED_TO_MOVING
) -> Array:
    """Return how far each point comes back from where it started, ``[N]``.

    In the direction and back; of tensors in voxels of the image the points lie in.
    """
    moved = mapping.transform_points(points, direction)
    back = mapping.transform_points(moved, opposite(direction))
    start = np.asarray(points.detach().cpu() if hasattr(points, "detach") else points)
    missed: Array = np.linalg.norm((back - start) * mapping.lengths(direction), axis=1)
    return missed


def spread(
    registrations: Sequence[PointMapping],
    points: Any,
    direction: str = FIXED_TO_MOVING,
) -> Array:
    """Return how far registrations of one pair lie apart at points, ``[N]``.

    Tensors: in voxels of the image the points are mapped to.

    Raises:
        ValueError: fewer than two; `icon_nephi.ensemble` makes them.
    """
    moved = [r.transform_points(points, direction) for r in registrations]
    if len(moved) < 2:
        raise ValueError(
            f"registrations must be two or more, got {len(moved)}; "
            "icon_nephi.ensemble makes them"
        )
    return scatter(np.stack(moved) * registrations[0].lengths(opposite(direction)))


def scatter(moved: Array) -> Array:
    """Return the RMS distances ``[N]`` of ``[n, N, d]`` from their mean over n.

    With n - 1 in the denominator: the same for any number of registrations.
    """
    squares = np.square(moved - moved.mean(0)).sum((0, 2))
    rms: Array = np.sqrt(squares / (len(moved) - 1))
    return rms


def estimate(
    voxel: float, missed: Array, apart: Array | None = None, sharp: Array | None = None
) -> Array:
    """Return a typical error of each point: about half of the true ones are smaller.

    Of twelve pairs with landmarks or a known motion, each with weights fitted to the
    others, 90 % of the errors were below twice the estimate (77 to 100 % of a pair's),
    its median was within a factor of 1.5 of the errors' on eight (too large where the
    truth is exact: 0.75 mm for 0.26 in a phantom), and it ranked a pair's points with
    a correlation of 0.3 in the mean. Without ``sharp`` 71 % were below twice.

    Args:
        voxel: side of a voxel of the fixed image (the geometric mean).
        missed: `inverse_consistency`.
        apart: `spread`, if there is an ensemble: then ``sharp`` is left out.
        sharp: `how_sharp`, if that is known.
    """
    if apart is not None:
        return ENSEMBLE[0] * voxel + ENSEMBLE[1] * missed + ENSEMBLE[2] * apart
    if sharp is not None:
        return SHARP[0] * missed + SHARP[1] * sharp
    return ALONE[0] * voxel + ALONE[1] * missed


def how_sharp(sharp: Tensor | None, rows: Array) -> Array | None:
    """Return how far off places may be by what the images show, ``[N]``, or None.

    Of `icon_nephi.fit.sharpness` at rows ``[N, d]`` of the fixed image's unit box: its
    bound, in millimetres, times how unlike the images are there.
    """
    if sharp is None:
        return None
    at = points_as_grid(torch.from_numpy(np.ascontiguousarray(rows))[None].float())
    known = sample_image(sharp.cpu().float(), at)[0].flatten(1)
    found: Array = (known[1] + known[2]).exp().double().numpy()
    return found


def error_estimate(
    registration: PointMapping,
    points: Any,
    others: Sequence[PointMapping] = (),
    direction: str = FIXED_TO_MOVING,
) -> Array:
    """Return about how far off each mapped point is, ``[N]``; see `estimate`.

    Others are registrations of the same pair with other seeds.
    """
    missed = inverse_consistency(registration, points, direction)
    together = [registration, *others]
    apart = spread(together, points, direction) if others else None
    sharp_at = getattr(registration, "sharp_at", None)
    sharp = sharp_at(points, direction) if sharp_at else None
    return estimate(voxel_side(registration.geometry_B), missed, apart, sharp)


def voxel_side(geometry: Geometry) -> float:
    """Return the side of a cube (square) of a voxel's volume."""
    return float(np.prod(geometry.spacing) ** (1 / geometry.dimension))
