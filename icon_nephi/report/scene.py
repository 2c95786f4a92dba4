"""What a registration looks like: images before and after, and its maps, on slices.

Here everything is in lengths, fixed image to moving image: LPS millimetres for ITK
images; for tensors voxels, x first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from icon_nephi.io.image_input import place_of, read_input, voxels_of
from icon_nephi.io.pair_input import as_volume, is_volume
from icon_nephi.io.resampling import reader
from icon_nephi.maps.two_way import MOVING_TO_FIXED, Mapping, TwoWay
from icon_nephi.report import pictures
from icon_nephi.report.expected_error import (
    estimate,
    how_sharp,
    scatter,
    voxel_side,
)
from icon_nephi.space.frames import Array, Geometry, apply_affine
from icon_nephi.space.intensities import prepare

PICTURE, MAP, FLAT = 240, 88, 640  # pixels of the longer side; FLAT: of the one of 2D
SLICES = 24
_CT = 1.4  # of what `prepare` makes of CT, shown white: 400 HU


class Registered(Mapping, Protocol):
    """What a page shows: an `icon_nephi.Registration`, whose attributes these are."""

    itk: bool
    two_way: TwoWay
    device: torch.device
    images: tuple[Any, ...] | None
    made_with: dict[str, Any]

    @property
    def losses(self) -> list[dict[str, float]]:
        """The loss and its terms at every step."""


class Scene:
    """The maps and images of a registration, ready to be read anywhere.

    Args:
        result: with its images.
        others: of the same pair, for the spread.

    Attributes:
        unit: "mm" or "voxels".
        start: homogeneous matrix, where the fixed points lie in the moving image before
            registration.
        apart: whether the headers put the images beside each other; then ``start`` is
            the affine part of the registration.
    """

    def __init__(self, result: Registered, others: Sequence[Registered] = ()) -> None:
        assert result.images is not None  # `write_report` has looked
        self.itk = result.itk
        self.unit = "mm" if result.itk else "voxels"
        self.A, self.B = result.geometry_A, result.geometry_B
        two_way = result.two_way.physical()
        self.forward, self.backward = two_way.forward, two_way.backward
        self.sharp = getattr(getattr(result, "fit", None), "sharp", None)
        self.others = [r.two_way.physical().forward for r in others]
        out, into = self.A.unit_to_physical(), self.B.unit_to_physical()
        eye = torch.eye(self.B.dimension + 1, dtype=torch.float64)
        self.start = eye if self.itk else out @ torch.linalg.inv(into)
        places = spread_out(self.B.size, into, 1000)
        shared = 1 - float(self.A.outside(self.before(places)).mean())
        self.apart = shared < 0.1
        if self.apart:
            affine = two_way.from_fixed(MOVING_TO_FIXED)
            self.start = out @ affine @ torch.linalg.inv(into)
        moving, fixed, _, mask = result.images
        kinds = result.made_with.get("modality")
        kinds = kinds if isinstance(kinds, tuple) else (kinds, kinds)
        self.moving = _shown("A", moving, kinds[0], self.A)
        self.fixed = _shown("B", fixed, kinds[1], self.B)
        self.mask = None
        if mask is not None and not is_volume(mask):
            self.mask = self.labels("mask_B", mask, self.B)

    def before(self, points: Array) -> Array:
        """Return where fixed points lie in the moving image before registration."""
        moved: Array = apply_affine(self.start, torch.from_numpy(points)).numpy()
        return moved

    def errors(self, points: Array, moved: Array) -> tuple[Array, Array]:
        """Return inverse consistency and expected error of points that go there."""
        missed: Array = np.linalg.norm(self.backward(moved) - points, axis=1)
        apart = None
        if self.others:
            apart = scatter(np.stack([moved, *(m(points) for m in self.others)]))
        unit = apply_affine(self.B.physical_to_unit(), torch.from_numpy(points)).numpy()
        sharp = how_sharp(self.sharp, unit)
        return missed, estimate(voxel_side(self.B), missed, apart, sharp)

    def lengths(self, points: Array, place: Geometry) -> Array:
        """Return points as the user gives them, in this frame."""
        if self.itk:
            return points
        rows = torch.from_numpy(points)
        scaled: Array = apply_affine(place.unit_to_physical(), rows).numpy()
        return scaled

    def box(self, name: str, image: Any, place: Geometry) -> tuple[Geometry, Tensor]:
        """Return the grid of another image of a space; its unit box -> this frame.

        Raises:
            TypeError: not an image of the registered kind.
            ValueError: another dimension.
        """
        own = place_of(name, image, itk=self.itk, dimension=self.B.dimension)
        return own, (own if self.itk else place).unit_to_physical()

    def labels(
        self, name: str, image: Any, place: Geometry
    ) -> Callable[[Array], Array]:
        """Return points ``[N, d]`` of a space -> nearest labels ``[N]``, 0 outside."""
        into = torch.linalg.inv(self.box(name, image, place)[1])
        label_at = reader(voxels_of(image)[..., :1], into, "nearest", outside=0)
        return lambda points: label_at(points)[:, 0]


def _shown(
    letter: str, image: Any, kind: str | None, place: Geometry
) -> Callable[[Array], Array]:
    """Return points ``[N, d]`` -> intensities ``[N]``, 0 black (outside) to 1 white."""
    if is_volume(image):
        volume = as_volume(f"image_{letter}", image)
        values, place = volume.whole(volume.working())
    else:
        values = read_input(letter, image, None)[0]
    values = prepare(values.cpu(), kind)[0, 0]
    values = values / (_CT if kind == "ct" else 1.0)
    value_at = reader(values[..., None].numpy(), place.physical_to_unit(), outside=0)
    return lambda points: np.clip(value_at(points)[:, 0], 0, 1)


def spread_out(size: Sequence[int], frame: Tensor, count: int) -> Array:
    """Return about `count` voxel centres ``[N, d]`` of a grid, evenly spread.

    In the frame that the homogeneous matrix takes the grid's unit box to.
    """
    step = int(np.ceil((np.prod(size, dtype=float) / count) ** (1 / len(size))))
    axes = [np.arange(min(step // 2, n - 1), n, step) / (n - 1) for n in size]
    mesh = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(size))
    points: Array = apply_affine(frame, torch.from_numpy(mesh)).numpy()
    return points


@dataclass(frozen=True)
class Layer:
    """One thing to show.

    Attributes:
        key, title: of the pictures, and for the choice.
        caption: what is seen, in a sentence.
        legend: palette ("diverging", "sequential") and the words under its ends and
            middle; None for grey pictures.
    """

    key: str
    title: str
    caption: str
    legend: tuple[str, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class Scales:
    """Where the colours end: log2 of the determinant, and two lengths."""

    determinant: float
    consistency: float
    error: float


def layers_of(scene: Scene, scales: Scales) -> list[Layer]:
    """Return what there is to show, in the order of the choice."""
    before = "before registration, where its header puts it"
    if not scene.itk:
        before = "before registration, its box laid on the fixed image's"
    if scene.apart:
        before = "after the affine start only: the headers put the images apart"
    ends = 2**scales.determinant
    seeds = f" and the spread of {len(scene.others) + 1} seeds" if scene.others else ""
    return [
        Layer("fixed", "Fixed", "The fixed image."),
        Layer("warped", "Warped", "The moving image, warped onto the fixed image."),
        Layer("moving", "Moving", f"The moving image {before}."),
        Layer(
            "checkerboard",
            "Checkerboard",
            "Fields of the fixed image between fields of the warped moving image: "
            "edges should run on across the borders.",
        ),
        Layer(
            "difference",
            "Difference",
            "Warped moving image minus fixed image, after scaling of intensities; grey "
            "where the moving image has nothing to compare.",
            ("diverging", ("darker than fixed", "equal", "brighter")),
        ),
        Layer(
            "grid",
            "Deformed grid",
            f"A regular grid of the moving image, lines {grid_step(scene):g} "
            f"{scene.unit} apart, warped with it, over the fixed image.",
        ),
        Layer(
            "jacobian",
            "Jacobian",
            "Determinant of the map from fixed to moving: above 1 the tissue fills "
            "more volume in the moving image. Folds are magenta.",
            ("diverging", (f"{1 / ends:.2g}", "1", f"{ends:.2g} times the volume")),
        ),
        Layer(
            "consistency",
            "Inverse consistency",
            "How far a point ends from where it began: to the moving image and back.",
            ("sequential", ("0", f"{scales.consistency:.2g} {scene.unit} or more")),
        ),
        Layer(
            "error",
            "Expected error",
            f"An estimate without landmarks, from inverse consistency{seeds}: about "
            "half of the true errors are smaller, nine in ten below three times it.",
            ("sequential", ("0", f"{scales.error:.2g} {scene.unit} or more")),
        ),
    ]


def grid_step(scene: Scene) -> float:
    """Return the length between the lines of the deformed grid: a round number."""
    least = max(scene.B.extent) / 25
    power = 10.0 ** np.floor(np.log10(least))
    return float(next(power * f for f in (1, 2, 5, 10) if power * f >= least))


def draw(
    scene: Scene, view: pictures.View, scales: Scales
) -> Iterator[dict[str, bytes]]:
    """Yield for each slice of a view the PNG of every layer, by key.

    The maps are evaluated at coarser pixels and the displacement is read between them;
    images are read at every pixel.
    """
    side = FLAT if view.axis is None else PICTURE
    points = pictures.pixel_grid(view, scene.B, side)
    coarse = pictures.pixel_grid(view, scene.B, MAP)
    d, size, small = points.shape[-1], points.shape[1:3], coarse.shape[1:3]
    down_right = pictures.in_plane(view, scene.B) @ scene.start[:d, :d].numpy().T
    down_right /= np.linalg.norm(down_right, axis=1, keepdims=True)
    step = grid_step(scene)
    for fine, few in zip(points, coarse, strict=True):
        rows, at = fine.reshape(-1, d), few.reshape(-1, d)
        moved = scene.forward(at)
        shift = (moved - scene.before(at)).reshape(1, *small, d)
        begun = scene.before(rows)
        there = begun + pictures.resized(shift, size).reshape(-1, d)
        determinants = scene.forward.determinants(at).reshape(small)
        missed, error = scene.errors(at, moved)
        shown = scene.fixed(rows), scene.moving(there), scene.moving(begun)
        fixed, warped, moving = (values.reshape(size) for values in shown)
        empty = scene.A.outside(there).reshape(size)
        lines = pictures.deformed_grid((there @ down_right.T).reshape(*size, 2), step)
        folds = ~(determinants > 0)
        growth = np.log2(np.where(folds, 1.0, determinants)) / scales.determinant
        yield {
            "fixed": pictures.grey(fixed),
            "warped": pictures.grey(warped),
            "moving": pictures.grey(moving),
            "checkerboard": pictures.grey(pictures.checkerboard(fixed, warped)),
            "difference": pictures.diverging(
                2 * (warped - fixed), empty, pictures.NOTHING
            ),
            "grid": pictures.lines_on_grey(fixed, lines),
            "jacobian": pictures.diverging(growth, folds),
            "consistency": pictures.sequential(
                missed.reshape(small) / scales.consistency
            ),
            "error": pictures.sequential(error.reshape(small) / scales.error),
        }
