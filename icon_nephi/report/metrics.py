"""How good a registration is: landmarks, overlap, folds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from icon_nephi.space.frames import Array


def target_registration_error(
    points_moved: Tensor | Array, points_true: Tensor | Array
) -> npt.NDArray[np.float64]:
    """Return the distance between each landmark and where it should be, [N] in mm.

    Args:
        points_moved: landmarks of the fixed image through phi_AB, [N, d] in mm.
        points_true: the same landmarks in the moving image, same frame and order.

    Raises:
        ValueError: not two equal [N, d] with d = 2 or 3, or a NaN or infinite number.
    """
    moved, true = (_to_numpy(p).astype(float) for p in (points_moved, points_true))
    if moved.shape != true.shape or moved.ndim != 2 or moved.shape[1] not in (2, 3):
        raise ValueError(
            "points_moved and points_true must both be [N, 2] or [N, 3] in mm, got "
            f"{moved.shape} and {true.shape}; give one row to each landmark"
        )
    _check_finite("points_moved and points_true", np.stack((moved, true)))
    distances: npt.NDArray[np.float64] = np.linalg.norm(moved - true, axis=1)
    return distances


def summarize(errors: Tensor | Array) -> dict[str, float]:
    """Return mean, median, 95th percentile (``p95``) and maximum, in the errors' unit.

    Raises:
        ValueError: no errors, or a NaN or infinite one.
    """
    values = _to_numpy(errors).astype(float).ravel()
    if not values.size:
        raise ValueError("errors must hold a number, got none; were landmarks read?")
    _check_finite("errors", values)
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": float(values.max()),
    }


def landmark_summary(
    points_moved: Tensor | Array, points_true: Tensor | Array
) -> dict[str, float]:
    """Return `summarize` of the `target_registration_error`, in mm."""
    return summarize(target_registration_error(points_moved, points_true))


def dice(
    labels_1: Tensor | Array,
    labels_2: Tensor | Array,
    labels: Sequence[int] | None = None,
    minimum_size: int = 0,
) -> dict[int, float]:
    """Return the overlap of each label, 2 |1 and 2| / (|1| + |2|), from 0 to 1.

    Args:
        labels_1: a map of integers, any shape.
        labels_2: the other one, same shape.
        labels: those to measure; one in neither map gets NaN. Default: all but 0.
        minimum_size: leave out labels with fewer voxels than this in both maps (one
            that a single map has lost still counts, as 0).

    Raises:
        ValueError: different shapes or numbers that are not integers.
    """
    first, second = _label_maps(labels_1, labels_2)
    sizes_1, sizes_2, shared = (
        dict(zip(*(u.tolist() for u in np.unique(m, return_counts=True)), strict=True))
        for m in (first, second, first[first == second])
    )
    result = {}
    every = sorted({*sizes_1, *sizes_2} - {0})
    for label in every if labels is None else map(int, labels):
        size_1, size_2 = sizes_1.get(label, 0), sizes_2.get(label, 0)
        if max(size_1, size_2) >= minimum_size:
            total = size_1 + size_2
            result[label] = 2 * shared.get(label, 0) / total if total else np.nan
    return result


def mean_dice(
    labels_1: Tensor | Array,
    labels_2: Tensor | Array,
    labels: Sequence[int] | None = None,
) -> float:
    """Return the mean of `dice` over the labels that are in a map."""
    return float(np.nanmean(list(dice(labels_1, labels_2, labels).values())))


def flips_percentage(phi_vectorfield: Tensor) -> float:
    """Return what ICON's ``flips(phi, in_percentage=True)`` returns, 0 to 100.

    A cell of [*(n - 1)] flips if its one-sided differences have a determinant below 0.

    Args:
        phi_vectorfield: the map (not the displacement), [B, d, *grid], any unit.

    Raises:
        ValueError: another shape.
    """
    phi = phi_vectorfield.detach()
    d = phi.dim() - 2
    if d not in (2, 3) or phi.shape[1] != d or not phi.shape[0]:
        raise ValueError(
            "phi_vectorfield must be [B, 2, H, W] or [B, 3, D, H, W], got shape "
            f"{tuple(phi.shape)}; add the batch axis with phi[None]"
        )
    scheme = "backward" if d == 3 else "forward"
    flipped = [_determinant(_one_sided(item, scheme)) < 0 for item in phi]
    return 100 * float(torch.stack(flipped).double().mean())


def _one_sided(field: Tensor, scheme: str) -> Tensor:
    """Return differences of [d, *grid] along each axis, [axis, d, *(n - 1)]."""
    near = slice(None, -1) if scheme == "forward" else slice(1, None)
    differences = []
    for axis in range(1, field.dim()):
        window = [slice(None), *[near] * (field.dim() - 1)]
        window[axis] = slice(None)
        differences.append(field[tuple(window)].diff(dim=axis))
    return torch.stack(differences)


def _determinant(jacobian: Tensor) -> Tensor:
    """Return determinants, [*grid], of matrices [d, d, *grid]."""
    determinant: Tensor
    if len(jacobian) == 2:
        (a, b), (c, d) = jacobian
        determinant = a * d - b * c
    else:
        normal = torch.linalg.cross(jacobian[0], jacobian[1], dim=0)
        determinant = (normal * jacobian[2]).sum(0)
    return determinant


def _to_numpy(values: Tensor | Array) -> Array:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)


def _check_finite(name: str, values: Array) -> None:
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(f"{name} must be finite, got {bad} NaN or inf; leave them out")


def _label_maps(labels_1: Tensor | Array, labels_2: Tensor | Array) -> list[Array]:
    """Return both label maps as integer arrays of one shape."""
    maps = [_to_numpy(labels) for labels in (labels_1, labels_2)]
    for name, labels in zip(("labels_1", "labels_2"), maps, strict=True):
        if labels.dtype.kind not in "iub":
            raise ValueError(
                f"{name} must hold integers, got {labels.dtype}; convert it to integers"
            )
    if maps[0].shape != maps[1].shape:
        raise ValueError(
            f"labels_2 must have the shape of labels_1, {maps[0].shape}, got "
            f"{maps[1].shape}; resample one map to the grid of the other"
        )
    return [m.astype(np.uint8) if m.dtype.kind == "b" else m for m in maps]
