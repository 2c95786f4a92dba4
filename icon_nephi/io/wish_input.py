"""What else people hand over with a pair: a start, landmarks, parts that stay."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icon_nephi._check import check_both
from icon_nephi.fit.wishes import Wishes
from icon_nephi.io.image_input import check_points, read_label_map
from icon_nephi.space.frames import Array, Geometry, apply_affine, identity_map, to_rows

LANDMARKS = "landmarks"
# What an initial transform may differ from an affine one, in voxels.
_AFFINE = 0.05


def read_wishes(
    place_A: Geometry,
    place_B: Geometry,
    *,
    itk: bool,
    initial: Any = None,
    landmarks: Sequence[Any] = (None, None),
    landmark_error: float = 1.0,
    rigid_mask: Any = None,
    volume_mask: Any = None,
    restrict: Sequence[int] | None = None,
    stiffness: float = 1.0,
) -> Wishes:
    """Return what `register` was asked for, checked.

    The landmarks are of (A, B), whose places and kind are told; see
    `icon_nephi.register` for the others.

    Raises:
        ValueError: what cannot be used.
        TypeError: another kind of it.
    """
    d = place_B.dimension
    check_both("landmarks", *landmarks)
    for name, number in (("landmark_error", landmark_error), ("stiffness", stiffness)):
        if not (np.isfinite(number) and number > 0):
            raise ValueError(f"{name} must be above zero, got {number:g}")
    wishes = Wishes(landmark_error=landmark_error, stiffness=stiffness)
    if landmarks[0] is not None:
        moving, fixed = (
            _millimetres(f"landmarks_{letter}", points, place, itk)
            for letter, points, place in zip(
                "AB", landmarks, (place_A, place_B), strict=True
            )
        )
        if len(fixed) != len(moving) or not len(fixed):
            raise ValueError(
                f"landmarks_A has {len(moving)} points and landmarks_B {len(fixed)}: "
                "they must correspond row by row"
            )
        wishes = replace(wishes, landmarks=(fixed, moving))
    if restrict is not None:
        if len(restrict) != d or not set(restrict) <= {0, 1} or not any(restrict):
            raise ValueError(
                f"restrict must be {d} numbers 0 or 1, along which of image_B's axes "
                f"things may move, at least one of them 1, got {tuple(restrict)}"
            )
        if not all(restrict):
            wishes = replace(wishes, restrict=tuple(map(bool, restrict)))
    parts = (("rigid_mask", rigid_mask), ("volume_mask", volume_mask))
    rigid, volume = (_part(name, mask, place_B, itk) for name, mask in parts)
    wishes = replace(wishes, rigid=rigid, volume=volume)
    if isinstance(initial, str) and initial == LANDMARKS:
        if wishes.landmarks is None:
            raise ValueError(
                "initial is 'landmarks', but there are none: give landmarks_A and "
                "landmarks_B"
            )
        return replace(wishes, initial=wishes.start)
    if initial is not None:
        matrix, notes = _matrix(initial, place_A, place_B, itk)
        wishes = replace(wishes, initial=matrix, notes=notes)
    return wishes


def _part(name: str, mask: Any, place: Geometry, itk: bool) -> Tensor | None:
    """Return the labels of a part of image_B, at its voxels."""
    if mask is None:
        return None
    labels = read_label_map(name, mask, place, itk=itk)
    if not bool((labels > 0).any()):
        raise ValueError(f"{name} is empty: no voxel above zero lies in image_B")
    return labels


def _millimetres(name: str, points: Any, place: Geometry, itk: bool) -> Tensor:
    """Return points in the physical frame; those of tensors are in the unit box."""
    rows = torch.from_numpy(check_points(name, points, place.dimension))
    return rows if itk else apply_affine(place.unit_to_physical(), rows)


def _matrix(
    initial: Any, place_A: Geometry, place_B: Geometry, itk: bool
) -> tuple[Tensor, tuple[str, ...]]:
    """Return ``[d + 1, d + 1]`` float64 between the physical frames, and sentences."""
    d = place_B.dimension
    if isinstance(initial, str | os.PathLike):
        from icon_nephi.io.itk_transforms import read_transform

        initial = read_transform("initial", initial)
    if hasattr(initial, "TransformPoint"):
        return _of_transform(initial, place_B)
    matrix = torch.as_tensor(np.asarray(initial, np.float64))
    last = torch.eye(d + 1, dtype=torch.float64)[-1]
    if matrix.shape != (d + 1, d + 1) or not torch.equal(matrix[-1], last):
        raise ValueError(
            f"initial must be a homogeneous matrix [{d + 1}, {d + 1}], fixed -> "
            "moving, an ITK transform, the path of one, or 'landmarks', got shape "
            f"{tuple(matrix.shape)}"
        )
    if not bool(matrix.isfinite().all()) or abs(torch.linalg.det(matrix)) < 1e-9:
        raise ValueError("initial cannot be inverted: is it fixed -> moving?")
    if itk:
        return matrix, ()
    return place_A.unit_to_physical() @ matrix @ place_B.physical_to_unit(), ()


def _of_transform(transform: Any, place: Geometry) -> tuple[Tensor, tuple[str, ...]]:
    d = place.dimension
    if transform.GetInputSpaceDimension() != d:
        raise ValueError(
            f"initial is a {transform.GetInputSpaceDimension()}D transform but the "
            f"images are {d}D"
        )
    unit = to_rows(identity_map((5,) * d, dtype=torch.float64))[0]
    x: Array = apply_affine(place.unit_to_physical(), unit).numpy()
    y = np.array([[*transform.TransformPoint(row.tolist())] for row in x])
    rows = np.concatenate([x, np.ones((len(x), 1))], 1)
    middle = x.mean(0)
    centred = np.concatenate([x - middle, np.ones((len(x), 1))], 1)
    found = np.linalg.lstsq(centred, y, rcond=None)[0]
    matrix = np.eye(d + 1)
    matrix[:d, :d] = found[:d].T
    matrix[:d, d] = found[d] - matrix[:d, :d] @ middle
    left = np.linalg.norm(rows @ matrix[:d].T - y, axis=1).max()
    if not np.isfinite(left) or abs(np.linalg.det(matrix)) < 1e-9:
        raise ValueError("initial cannot be inverted: is it fixed -> moving?")
    notes: tuple[str, ...] = ()
    if left > _AFFINE * min(place.spacing):
        notes = (
            "the initial transform is not affine: its best affine part is the start, "
            f"up to {left:.3g} mm of its deformation are left to the registration",
        )
    return torch.from_numpy(matrix), notes
