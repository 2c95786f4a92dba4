"""The one measurement: of a summary, of a page, of a method beside others.

They differ in where they look, which each function says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from icon_nephi._check import check_labels
from icon_nephi.io.image_input import check_points, voxels_of
from icon_nephi.io.resampling import reader
from icon_nephi.maps.jacobians import fold_fraction
from icon_nephi.maps.two_way import MOVING_TO_FIXED, Mapping
from icon_nephi.report import metrics
from icon_nephi.report.metrics import dice, mean_dice, summarize
from icon_nephi.report.scene import Scene, spread_out
from icon_nephi.space.frames import Array, Geometry, apply_affine, other_order

VOXELS = 200_000  # at most, that a summary looks at, in each image
SAMPLES = 60_000  # voxel centres that a page looks at, in each image
LABEL_SAMPLES = 1_000_000


def summarize_result(
    result: Mapping, others: Sequence[Any] = (), most: int = VOXELS
) -> dict[str, Any]:
    """Return what nephi-register says of a result, at the voxels of its images.

    Folds in percent; mean, median, 95th percentile and maximum of inverse consistency,
    displacement (with its affine part) and expected error in mm; the determinant fixed
    -> moving; warnings, and how the optimisation ended.

    Args:
        result: a `Registration`, or an `ItkPair`: that expects no error.
        others: of the same pair with other seeds.
        most: voxels of an image, about: of a larger one as many, evenly spread.
    """
    from icon_nephi.io.itk_images import array_of

    fixed = sparse_image(result.geometry_B, most)
    moving = sparse_image(result.geometry_A, most)
    forth = array_of(result.jacobian_determinant(fixed)).ravel()
    back = array_of(result.jacobian_determinant(moving, MOVING_TO_FIXED)).ravel()
    moves = np.linalg.norm(array_of(result.displacement_field(fixed)), axis=-1)
    missed = array_of(result.inverse_consistency_error(fixed))
    both = np.concatenate([forth, back])
    numbers: dict[str, Any] = {
        "voxels_measured": both.size,
        "folds_percent": 100 * fold_fraction(both),
        "inverse_consistency_mm": summarize(missed),
        "displacement_mm": summarize(moves),
        "determinant": determinant_range(forth),
        "warnings": list(result.warnings),
    }
    if error_image := getattr(result, "error_image", None):
        numbers["expected_error_mm"] = summarize(array_of(error_image(fixed, others)))
    if losses := getattr(result, "losses", None):
        numbers |= {"steps": len(losses), "last_losses": losses[-1]}
    return numbers


def sparse_image(place: Geometry, most: int) -> Any:
    """Return an ITK image without contents on every nth voxel of a grid.

    It has about ``most`` voxels, and two at least on each axis.
    """
    from icon_nephi.io.itk_images import image_of

    counts, step = np.array(place.itk_size), 1
    while np.prod(-(-counts // step), dtype=float) > most:
        step += 1
    steps = np.minimum(step, counts - 1)
    first = (counts - 1) % steps // 2 * place.spacing
    sparse = Geometry(
        size=other_order((-(-counts // steps)).tolist()),
        spacing=tuple((steps * place.spacing).tolist()),
        origin=tuple((np.array(place.direction) @ first + place.origin).tolist()),
        direction=place.direction,
    )
    return image_of(np.zeros(sparse.size, np.uint8), sparse)


def determinant_range(determinants: Array) -> dict[str, float]:
    """Return the least, the median and the largest determinant."""
    return {
        "min": float(determinants.min()),
        "median": float(np.median(determinants)),
        "max": float(determinants.max()),
    }


def score_landmarks(result: Mapping, fixed: Array, moving: Array) -> dict[str, Any]:
    """Return the target registration error in mm before and after; see `summarize`.

    Landmarks are ``[N, d]``, LPS mm, in the same order.
    """
    moved = result.transform_points(fixed)
    return {
        "count": len(fixed),
        "before": metrics.landmark_summary(fixed, moving),
        "after": metrics.landmark_summary(moved, moving),
    }


def score_labels(result: Mapping, fixed: Any, moving: Any) -> dict[str, Any]:
    """Return the Dice of each label in both maps, and its mean, before and after.

    Of ITK label maps, in the spaces of their images; counted on the fixed one's grid.

    Raises:
        ValueError: no common label.
    """
    from icon_nephi.io.itk_images import array_of, resample_to

    truth = array_of(fixed).astype(np.int64)
    shared = set(np.unique(truth)) & set(np.unique(array_of(moving).astype(np.int64)))
    labels = [int(label) for label in sorted(shared - {0})]
    if not labels:
        raise ValueError(
            "--labels_fixed and --labels_moving have no label above 0 in common; give "
            "both the same numbers"
        )
    scores: dict[str, Any] = {}
    for when, image in (
        ("before", resample_to(moving, fixed)),
        ("after", result.warp_labels(moving, fixed)),
    ):
        warped = array_of(image).astype(np.int64)
        each = {str(k): v for k, v in dice(truth, warped, labels).items()}
        scores[when] = {"mean": mean_dice(truth, warped, labels), "labels": each}
    return scores


# --- of a page ----------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Numbers of a `Scene` at evenly spread voxel centres, in its lengths.

    Attributes:
        determinants: of the fixed -> moving map, ``[N]``.
        displacement: from where the scene begins, ``[N]``.
        inverse_consistency: how far each place comes back from itself, ``[N]``.
        expected_error: ``[N]``.
        folds_percent: of determinants, both directions, that are not positive.
        count: how many were looked at for that.
        where: in words, where the fixed places are.
        outside: the share of them that is mapped outside the moving image.
        landmarks: None, or errors before and after, and those expected, ``[n]`` each.
        overlap: of each label the number, and its Dice before and after.
    """

    determinants: Array
    displacement: Array
    inverse_consistency: Array
    expected_error: Array
    folds_percent: float
    count: int
    where: str
    outside: float
    landmarks: tuple[Array, Array, Array] | None
    overlap: list[tuple[int, float, float]]


def measure_scene(
    scene: Scene,
    landmarks: tuple[Any, Any] = (None, None),
    labels: tuple[Any, Any] = (None, None),
) -> Measured:
    """Return the numbers of a page.

    At about `SAMPLES` voxel centres of each image; but for folds only inside the mask,
    if it holds any. Overlap at about `LABEL_SAMPLES` voxels of the fixed labels.

    Args:
        scene: what maps.
        landmarks: fixed and moving ones, as the user gives them, row by row, or None.
        labels: fixed and moving maps of the registered images' kind, or None.

    Raises:
        TypeError: label maps of another kind.
        ValueError: one of two only, points that do not correspond, or labels that are
            not whole numbers.
    """
    errors, overlap = _landmark_errors(scene, *landmarks), _overlap(scene, *labels)
    fixed = spread_out(scene.B.size, scene.B.unit_to_physical(), SAMPLES)
    moving = spread_out(scene.A.size, scene.A.unit_to_physical(), SAMPLES)
    moved, forth = scene.forward(fixed), scene.forward.determinants(fixed)
    back = scene.backward.determinants(moving)
    both = np.concatenate([forth, back])
    folds_percent = 100 * fold_fraction(both)
    inside = None if scene.mask is None else scene.mask(fixed) > 0
    masked = inside is not None and bool(inside.any())
    if masked:
        fixed, moved, forth = fixed[inside], moved[inside], forth[inside]
    missed, expected = scene.errors(fixed, moved)
    return Measured(
        determinants=forth,
        displacement=np.linalg.norm(moved - scene.before(fixed), axis=1),
        inverse_consistency=missed,
        expected_error=expected,
        folds_percent=folds_percent,
        count=both.size,
        where="in the mask" if masked else "in the fixed image",
        outside=float(scene.A.outside(moved).mean()),
        landmarks=errors,
        overlap=overlap,
    )


def _landmark_errors(
    scene: Scene, fixed: Any, moving: Any
) -> tuple[Array, Array, Array] | None:
    if not _both("landmarks", "landmarks", fixed, moving):
        return None
    d = scene.B.dimension
    rows = check_points("landmarks_fixed", fixed, d)
    goals = check_points("landmarks_moving", moving, d)
    if rows.shape != goals.shape or not len(rows):
        raise ValueError(
            f"landmarks_fixed has {len(rows)} points and landmarks_moving "
            f"{len(goals)}; row n of one must be row n of the other, one or more"
        )
    rows, goals = scene.lengths(rows, scene.B), scene.lengths(goals, scene.A)
    moved = scene.forward(rows)
    return (
        metrics.target_registration_error(scene.before(rows), goals),
        metrics.target_registration_error(moved, goals),
        scene.errors(rows, moved)[1],
    )


def _overlap(scene: Scene, fixed: Any, moving: Any) -> list[tuple[int, float, float]]:
    if not _both("labels", "label maps", fixed, moving):
        return []
    for name, image in (("labels_fixed", fixed), ("labels_moving", moving)):
        place = scene.B if name == "labels_fixed" else scene.A
        scene.box(name, image, place)
        check_labels(name, voxels_of(image))
    own, frame = scene.box("labels_fixed", fixed, scene.B)
    points = spread_out(own.size, frame, LABEL_SAMPLES)
    truth = scene.labels("labels_fixed", fixed, scene.B)(points).astype(np.int64)
    label_at = scene.labels("labels_moving", moving, scene.A)
    places = scene.before(points), scene.forward(points)
    before, after = (dice(truth, label_at(at).astype(np.int64)) for at in places)
    return [(k, before.get(k, 0.0), after[k]) for k in sorted(after)]


def _both(name: str, what: str, fixed: Any, moving: Any) -> bool:
    """Return whether both came (or none); a ValueError for one of them."""
    if (fixed is None) != (moving is None):
        missing = f"{name}_fixed" if fixed is None else f"{name}_moving"
        raise ValueError(f"{missing} is missing: {what} come in pairs, give both")
    return fixed is not None


# --- of maps known at voxels ----------------------------------------------------------


def flips_on_grid(moved: Array, place: Geometry) -> float:
    """Return ICON's percentage of flips: ``[*grid, d]`` is where voxels go, LPS mm."""
    d = place.dimension
    rows = torch.from_numpy(moved).double().reshape(-1, d)
    voxels = torch.tensor(place.size) - 1
    index = apply_affine(place.physical_to_unit(), rows) * voxels
    return metrics.flips_percentage(index.reshape(*place.size, d).movedim(-1, 0)[None])


def mean_dice_at(
    fixed: Any, moving: Any, points: Array, labels: Sequence[int]
) -> float:
    """Return the mean Dice of labels where a map takes the voxels of the fixed ones.

    Of ITK label maps; points ``[*grid, d]``, LPS mm of the moving image, are where each
    fixed voxel goes: the nearest moving voxel counts, 0 outside.
    """
    from icon_nephi.io.itk_images import array_of, geometry_of

    truth = array_of(fixed).astype(np.int64)
    values = array_of(moving).astype(np.int64)[..., np.newaxis]
    into = geometry_of(moving).physical_to_unit()
    label_at = reader(values, into, "nearest", outside=0)
    rows = points.reshape(-1, points.shape[-1])
    return mean_dice(truth, label_at(rows).reshape(truth.shape), labels)
