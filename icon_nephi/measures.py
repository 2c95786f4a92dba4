"""Numbers of a registration at evenly spread places, and what to doubt in them."""

from __future__ import annotations

from typing import Any

import numpy as np

from icon_nephi._check import check_labels
from icon_nephi.inputs import check_points, voxels_of
from icon_nephi.layers import Scales, Scene, spread_out
from icon_nephi.metrics import dice, target_registration_error
from icon_nephi.physical import Array

SAMPLES = 60_000  # voxel centres at which the maps are measured, in each image
LABEL_SAMPLES = 1_000_000


class Measured:
    """Numbers of the maps at evenly spread voxel centres.

    Attributes:
        determinants: of the fixed -> moving map, ``[N]``.
        folds: the share of `count` voxels of both images whose determinant is not
            positive.
        where: in words, where the fixed points are: in the mask if there is one.
        outside: the share of them that is mapped outside the moving image.
        shift: displacements, ``[N]``.
        missed: inverse consistency errors, ``[N]``.
        error: expected errors, ``[N]``.
    """

    def __init__(self, scene: Scene) -> None:
        fixed = spread_out(scene.B.size, scene.B.unit_to_physical(), SAMPLES)
        moving = spread_out(scene.A.size, scene.A.unit_to_physical(), SAMPLES)
        moved = scene.forward(fixed)
        self.determinants = scene.forward.determinants(fixed)
        both = np.concatenate((self.determinants, scene.backward.determinants(moving)))
        self.folds, self.count = float((~(both > 0)).mean()), len(both)
        self.masked = scene.mask is not None and bool((scene.mask(fixed) > 0).any())
        if scene.mask is not None and self.masked:
            kept = scene.mask(fixed) > 0
            fixed, moved = fixed[kept], moved[kept]
            self.determinants = self.determinants[kept]
        self.where = "in the mask" if self.masked else "in the fixed image"
        self.outside = float(scene.outside(moved).mean())
        self.shift = np.linalg.norm(moved - scene.before(fixed), axis=1)
        self.missed, self.error = scene.errors(fixed, moved)

    def scales(self) -> Scales:
        """Where the colours end: hardly any voxel is beyond."""
        good = self.determinants[self.determinants > 0]
        growth = np.abs(np.log2(good)) if len(good) else np.ones(1)
        return Scales(
            determinant=max(0.25, float(np.quantile(growth, 0.99))),
            consistency=max(1e-6, float(np.quantile(self.missed, 0.99))),
            error=max(1e-6, float(np.quantile(self.error, 0.99))),
        )


def landmark_errors(
    scene: Scene, fixed: Any, moving: Any
) -> tuple[Array, Array, Array] | None:
    """Errors before and after, and those expected, of each landmark."""
    if fixed is None and moving is None:
        return None
    if fixed is None or moving is None:
        missing = "landmarks_fixed" if fixed is None else "landmarks_moving"
        raise ValueError(f"{missing} is missing: landmarks come in pairs, give both")
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


def label_overlap(
    scene: Scene, fixed: Any, moving: Any
) -> list[tuple[int, float, float]]:
    """Label, Dice before, Dice after; at evenly spread voxels of the fixed labels."""
    if fixed is None and moving is None:
        return []
    if fixed is None or moving is None:
        missing = "labels_fixed" if fixed is None else "labels_moving"
        raise ValueError(f"{missing} is missing: label maps come in pairs, give both")
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


def warnings_of(
    scene: Scene,
    measured: Measured,
    landmarks: tuple[Array, Array, Array] | None,
    overlap: list[tuple[int, float, float]],
    result: Any,
) -> list[str]:
    """What a reader should doubt, a sentence each."""
    found = [
        str(w)
        .replace("image_B", "the fixed image")
        .replace("image_A", "the moving one")
        for w in result.warnings
    ]
    if measured.outside > 0.05 and not any("extrapolated" in w for w in found):
        found.append(
            f"{100 * measured.outside:.0f} % of what lies {measured.where} maps "
            "outside the moving image: it is extrapolated there"
        )
    if measured.folds and not any("folds" in w for w in found):
        found.append(f"the map folds at {100 * measured.folds:.2g} % of the voxels")
    limit = 2 * max(scene.B.spacing)
    if np.quantile(measured.missed, 0.95) > limit:
        found.append(
            "the way there and back misses by more than two voxels at one point in "
            "twenty: do not trust the map there (see the layer Inverse consistency)"
        )
    if landmarks is not None and landmarks[1].mean() > landmarks[0].mean():
        found.append("the landmarks lie farther apart than before registration")
    worse = [str(label) for label, before, after in overlap if after < before - 0.01]
    if worse:
        found.append(f"labels that overlap less than before: {', '.join(worse)}")
    if scene.apart:
        found.append(
            "the headers put the images beside each other: 'before' is after the "
            "affine start, and displacements are measured from there"
        )
    return [w[0].upper() + w[1:].rstrip(".") + "." for w in found]
