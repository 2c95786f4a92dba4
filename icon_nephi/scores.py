"""What a registration scored, in numbers: landmarks, labels, motion, folds."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np

from icon_nephi.coordinates import Geometry
from icon_nephi.itk_images import (
    array_of,
    image_of,
    resample_to,
)
from icon_nephi.metrics import (
    dice,
    fold_fraction,
    summarize,
    target_registration_error,
)
from icon_nephi.physical import Array

VOXELS = 200_000  # at most, at which the maps are measured, in each image
_PACKAGES = ("icon_nephi", "icon_registration", "torch", "itk", "numpy")


def check_landmarks(fixed: Array, moving: Array, dimension: int) -> None:
    """Nothing, or a ValueError: one row to each landmark in both, of that dimension."""
    for name, points in (("fixed", fixed), ("moving", moving)):
        if points.shape[1] != dimension:
            raise ValueError(
                f"--landmarks_{name} has {points.shape[1]} coordinates a point but the "
                f"images are {dimension}D"
            )
    if len(fixed) != len(moving) or not len(fixed):
        raise ValueError(
            f"--landmarks_fixed has {len(fixed)} points and --landmarks_moving "
            f"{len(moving)}: they must correspond row by row"
        )


def landmark_scores(result: Any, fixed: Array, moving: Array) -> dict[str, Any]:
    """Target registration error in mm before and after; see `summarize`.

    Args:
        result: has ``transform_points``; its default direction is fixed -> moving.
        fixed: ``[N, d]``, LPS mm.
        moving: the same landmarks in the moving image, same order.
    """
    moved = result.transform_points(fixed)
    return {
        "count": len(fixed),
        "before": summarize(target_registration_error(fixed, moving)),
        "after": summarize(target_registration_error(moved, moving)),
    }


def label_scores(result: Any, fixed: Any, moving: Any) -> dict[str, Any]:
    """Dice of each label in both maps, and its mean, before and after.

    Args:
        result: has ``warp_labels``.
        fixed: label map in the fixed image's space; overlap is counted on its grid.
        moving: label map in the moving image's space.

    Raises:
        ValueError: no common label.
    """
    there, here = array_of(fixed).astype(np.int64), array_of(moving).astype(np.int64)
    shared = sorted((set(np.unique(there)) & set(np.unique(here))) - {0})
    if not shared:
        raise ValueError(
            "--labels_fixed and --labels_moving have no label above 0 in common; give "
            "both the same numbers"
        )
    scores: dict[str, Any] = {}
    for when, image in (
        ("before", resample_to(moving, fixed)),
        ("after", result.warp_labels(moving, fixed)),
    ):
        found = dice(there, array_of(image).astype(np.int64), [int(n) for n in shared])
        scores[when] = {
            "mean": float(np.mean(list(found.values()))),
            "labels": {str(label): value for label, value in found.items()},
        }
    return scores


def summary(result: Any, others: Sequence[Any] = ()) -> dict[str, Any]:
    """Folds, inverse consistency, displacement, determinant, expected error.

    At the voxels of the fixed grid (folds: and of the moving one), of large images at
    about `VOXELS` of them, evenly spread; millimetres, the displacement with its affine
    part.

    Args:
        result: a `Registration`, or an `icon_nephi.itk_maps.ItkPair`: that expects no
            error.
        others: of the same pair with other seeds.
    """
    fixed, moving = _spread(result.geometry_B), _spread(result.geometry_A)
    errors = array_of(result.inverse_consistency_error(fixed))
    lengths = np.linalg.norm(array_of(result.displacement_field(fixed)), axis=-1)
    values = array_of(result.jacobian_determinant(fixed))
    back = array_of(result.jacobian_determinant(moving, "moving_to_fixed"))
    both = np.concatenate((values.ravel(), back.ravel()))
    found: dict[str, Any] = {
        "voxels_measured": both.size,
        "folds_percent": 100 * fold_fraction(both),
        "inverse_consistency_mm": summarize(errors),
        "displacement_mm": summarize(lengths),
        "determinant": {
            "min": float(values.min()),
            "median": float(np.median(values)),
            "max": float(values.max()),
        },
        "warnings": list(result.warnings),
    }
    if hasattr(result, "error_image"):
        expected = array_of(result.error_image(fixed, others))
        found["expected_error_mm"] = summarize(expected)
    losses = getattr(result, "losses", None)
    if losses:
        found |= {"steps": len(losses), "last_losses": losses[-1]}
    return found


def _spread(place: Geometry) -> Any:
    """An image without contents on every nth voxel of a grid."""
    counts, step = np.array(place.size[::-1]), 1
    while np.prod(-(-counts // step), dtype=float) > VOXELS:
        step += 1
    steps = np.minimum(step, counts - 1)  # an axis keeps two voxels
    first = (counts - 1) % steps // 2 * place.spacing
    sparse = Geometry(
        size=tuple((-(-counts // steps)[::-1]).tolist()),
        spacing=tuple((steps * place.spacing).tolist()),
        origin=tuple((np.array(place.direction) @ first + place.origin).tolist()),
        direction=place.direction,
    )
    return image_of(np.zeros(sparse.size, np.uint8), sparse)


def versions() -> dict[str, str | None]:
    """The installed versions of what a registration depends on."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def as_text(found: dict[str, Any]) -> list[str]:
    """The summary as lines for people."""
    text = [f"registered in {found['seconds']:.1f} s"]
    if "folds_percent" in found:
        errors, lengths = found["inverse_consistency_mm"], found["displacement_mm"]
        text += [
            f"folds: {found['folds_percent']:.3g} % of {found['voxels_measured']} "
            "voxels, both directions",
            f"inverse consistency: mean {errors['mean']:.3f} mm, "
            f"95th percentile {errors['p95']:.3f} mm",
            f"displacement, fixed -> moving: mean {lengths['mean']:.2f} mm, "
            f"largest {lengths['max']:.2f} mm",
        ]
    if "expected_error_mm" in found:
        errors = found["expected_error_mm"]
        text.append(
            f"expected error: median {errors['median']:.2f} mm, 95th percentile "
            f"{errors['p95']:.2f} mm"
        )
    if "landmarks_mm" in found:
        for when in ("before", "after"):
            one = found["landmarks_mm"][when]
            text.append(
                f"landmark error {when}: mean {one['mean']:.2f} mm, median "
                f"{one['median']:.2f} mm, 95th percentile {one['p95']:.2f} mm"
            )
    if "dice" in found:
        for when in ("before", "after"):
            one = found["dice"][when]
            each = ", ".join(f"{k}: {v:.3f}" for k, v in one["labels"].items())
            text.append(f"Dice {when}: mean {one['mean']:.3f} ({each})")
    return text + [f"{name}: {path}" for name, path in found["outputs"].items()]
