"""How good a registration is: the one measurement of commands, pages and scripts.

They differ in where they look, which is said by the functions that they call.
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
from icon_nephi.maps.framed import Array
from icon_nephi.maps.jacobians import count_folds
from icon_nephi.maps.two_way import MOVING_TO_FIXED, Mapping, TwoWay
from icon_nephi.report.metrics import (
    dice,
    flips_percentage,
    landmark_summary,
    mean_dice,
    summarize,
    target_registration_error,
)
from icon_nephi.report.scene import Scene, spread_out
from icon_nephi.space.frames import Geometry, apply_affine, other_order

VOXELS = 200_000  # at most, at which the commands measure, in each image
SAMPLES = 60_000  # voxel centres at which the page measures, in each image
LABEL_SAMPLES = 1_000_000


@dataclass(frozen=True)
class Measured:
    """Numbers of two maps at places of the fixed image.

    Attributes:
        determinants: of the fixed -> moving map, ``[N]``.
        displacement: lengths ``[N]``.
        inverse_consistency: how far each place comes back from itself, ``[N]``.
        expected_error: ``[N]``, None where it is not known.
        folds: how many determinants of both directions are not positive.
        count: of how many.
    """

    determinants: Array
    displacement: Array
    inverse_consistency: Array
    expected_error: Array | None
    folds: int
    count: int

    @property
    def fold_fraction(self) -> float:
        """The share of determinants that are not positive, 0 to 1."""
        return self.folds / self.count


def measure_points(maps: TwoWay, points: Array) -> Measured:
    """Return the numbers of maps at fixed points ``[N, d]`` and where they go."""
    moved = maps.forward(points)
    forth = maps.forward.determinants(points)
    back = maps.backward.determinants(moved)
    return Measured(
        determinants=forth,
        displacement=np.linalg.norm(moved - points, axis=1),
        inverse_consistency=np.linalg.norm(maps.backward(moved) - points, axis=1),
        expected_error=None,
        folds=count_folds(forth) + count_folds(back),
        count=forth.size + back.size,
    )


@dataclass(frozen=True)
class SceneMeasured(Measured):
    """Numbers of a `Scene`, at evenly spread voxel centres.

    Attributes:
        where: in words, where the fixed places are.
        outside: the share of them that is mapped outside the moving image.
    """

    expected_error: Array
    where: str
    outside: float


def measure_scene(scene: Scene) -> SceneMeasured:
    """Return the numbers of the page, in its lengths.

    At about `SAMPLES` voxel centres of each image; but for folds only inside the mask,
    if it holds any. Displacements are from where the scene begins.
    """
    fixed = spread_out(scene.B.size, scene.B.unit_to_physical(), SAMPLES)
    moving = spread_out(scene.A.size, scene.A.unit_to_physical(), SAMPLES)
    moved, forth = scene.forward(fixed), scene.forward.determinants(fixed)
    back = scene.backward.determinants(moving)
    folds, count = count_folds(forth) + count_folds(back), forth.size + back.size
    inside = None if scene.mask is None else scene.mask(fixed) > 0
    masked = inside is not None and bool(inside.any())
    if masked:
        fixed, moved, forth = fixed[inside], moved[inside], forth[inside]
    missed, expected = scene.errors(fixed, moved)
    return SceneMeasured(
        determinants=forth,
        displacement=np.linalg.norm(moved - scene.before(fixed), axis=1),
        inverse_consistency=missed,
        expected_error=expected,
        folds=folds,
        count=count,
        where="in the mask" if masked else "in the fixed image",
        outside=float(scene.outside(moved).mean()),
    )


def measure_voxels(
    result: Mapping, others: Sequence[Any] = (), most: int = VOXELS
) -> Measured:
    """Return the numbers of a result at the voxels of its images, in millimetres.

    Displacements have their affine part.

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
    lengths = np.linalg.norm(array_of(result.displacement_field(fixed)), axis=-1)
    expected = getattr(result, "error_image", None)
    return Measured(
        determinants=forth,
        displacement=lengths.ravel(),
        inverse_consistency=array_of(result.inverse_consistency_error(fixed)).ravel(),
        expected_error=expected and array_of(expected(fixed, others)).ravel(),
        folds=count_folds(forth) + count_folds(back),
        count=forth.size + back.size,
    )


def sparse_image(place: Geometry, most: int) -> Any:
    """Return an ITK image without contents on every nth voxel of a grid.

    Args:
        place: the grid.
        most: voxels, about; an axis keeps two at least.
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


def summary(
    result: Mapping, others: Sequence[Any] = (), most: int = VOXELS
) -> dict[str, Any]:
    """Return what nephi-register says of a result: see `measure_voxels`.

    Folds in percent, and mean, median, 95th percentile and maximum of inverse
    consistency, displacement and expected error in mm; the determinant fixed -> moving;
    warnings, and how the optimisation ended.
    """
    measured = measure_voxels(result, others, most)
    numbers: dict[str, Any] = {
        "voxels_measured": measured.count,
        "folds_percent": 100 * measured.fold_fraction,
        "inverse_consistency_mm": summarize(measured.inverse_consistency),
        "displacement_mm": summarize(measured.displacement),
        "determinant": spread_of(measured.determinants),
        "warnings": list(result.warnings),
    }
    if measured.expected_error is not None:
        numbers["expected_error_mm"] = summarize(measured.expected_error)
    losses = getattr(result, "losses", None)
    if losses:
        numbers |= {"steps": len(losses), "last_losses": losses[-1]}
    return numbers


def flips_on_grid(moved: Array, place: Geometry) -> float:
    """Return ICON's percentage of flips of a map known at the voxels of a grid.

    Args:
        moved: ``[*grid, d]``, where they go, LPS mm.
        place: the grid.
    """
    d = place.dimension
    rows = torch.from_numpy(moved).double().reshape(-1, d)
    voxels = torch.tensor(place.size) - 1
    index = apply_affine(place.physical_to_unit(), rows) * voxels
    return flips_percentage(index.reshape(*place.size, d).movedim(-1, 0)[None])


def spread_of(determinants: Array) -> dict[str, float]:
    """Return the least, the median and the largest determinant."""
    return {
        "min": float(determinants.min()),
        "median": float(np.median(determinants)),
        "max": float(determinants.max()),
    }


# --- ground truth -------------------------------------------------------------------


def landmark_scores(result: Mapping, fixed: Array, moving: Array) -> dict[str, Any]:
    """Return the target registration error in mm before and after; see `summarize`.

    Args:
        result: what maps the points.
        fixed: ``[N, d]``, LPS mm.
        moving: the same landmarks in the moving image, same order.
    """
    moved = result.transform_points(fixed)
    return {
        "count": len(fixed),
        "before": landmark_summary(fixed, moving),
        "after": landmark_summary(moved, moving),
    }


def scene_landmarks(
    scene: Scene, fixed: Any, moving: Any
) -> tuple[Array, Array, Array] | None:
    """Return errors before and after, and those expected, of each landmark, ``[N]``.

    Args:
        scene: what maps them.
        fixed: ``[N, d]`` as the user gives them, or None.
        moving: the same landmarks in the moving image, row by row, or None.

    Raises:
        ValueError: one of them only, or points that do not correspond.
    """
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
        target_registration_error(scene.before(rows), goals),
        target_registration_error(moved, goals),
        scene.errors(rows, moved)[1],
    )


def label_scores(result: Mapping, fixed: Any, moving: Any) -> dict[str, Any]:
    """Return the Dice of each label in both maps, and its mean, before and after.

    Args:
        result: what warps the labels.
        fixed: label map in the fixed image's space; overlap is counted on its grid.
        moving: label map in the moving image's space.

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
        scores[when] = {
            "mean": mean_dice(truth, warped, labels),
            "labels": {str(k): v for k, v in dice(truth, warped, labels).items()},
        }
    return scores


def scene_overlap(
    scene: Scene, fixed: Any, moving: Any
) -> list[tuple[int, float, float]]:
    """Return each label, its Dice before and after; at voxels of the fixed labels.

    At about `LABEL_SAMPLES` of them, evenly spread.

    Args:
        scene: what maps them.
        fixed: label map of the registered images' kind, or None.
        moving: likewise.

    Raises:
        TypeError: another kind of image.
        ValueError: one of them only, or other numbers than whole ones.
    """
    if not _both("labels", "label maps", fixed, moving):
        return []
    for name, image in (("labels_fixed", fixed), ("labels_moving", moving)):
        place = scene.B if name == "labels_fixed" else scene.A
        scene.box(name, image, place)
        check_labels(name, voxels_of(image))
    own, frame = scene.box("labels_fixed", fixed, scene.B)
    points = spread_out(own.size, frame, LABEL_SAMPLES)
    truth = scene.labels("labels_fixed", fixed, scene.B)(points).astype(np.int64)
    read = scene.labels("labels_moving", moving, scene.A)
    before, after = (
        dice(truth, read(at).astype(np.int64))
        for at in (scene.before(points), scene.forward(points))
    )
    return [(k, before.get(k, 0.0), after[k]) for k in sorted(after)]


def mean_dice_at(
    fixed: Any, moving: Any, points: Array, labels: Sequence[int]
) -> float:
    """Return the mean Dice of labels where a map takes the voxels of the fixed ones.

    Args:
        fixed: ITK label map.
        moving: ITK label map, read at the nearest voxel, 0 outside.
        points: ``[*grid, d]`` LPS mm of the moving image, for each voxel of ``fixed``.
        labels: to score.
    """
    from icon_nephi.io.itk_images import array_of, geometry_of

    truth = array_of(fixed).astype(np.int64)
    values = array_of(moving).astype(np.int64)[..., np.newaxis]
    read = reader(values, geometry_of(moving).physical_to_unit(), "nearest", outside=0)
    rows = points.reshape(-1, points.shape[-1])
    return mean_dice(truth, read(rows).reshape(truth.shape), labels)


def _both(name: str, what: str, fixed: Any, moving: Any) -> bool:
    """Return whether both came (or none); a ValueError for one of them."""
    if (fixed is None) != (moving is None):
        missing = f"{name}_fixed" if fixed is None else f"{name}_moving"
        raise ValueError(f"{missing} is missing: {what} come in pairs, give both")
    return fixed is not None
