"""Prove that a registration has no folds: at every point, not only where one looks.

Boxes that cover the region are proven, refuted by a point, or split; how is told in
`icon_nephi.proofs.search`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from icon_nephi._check import check_mask
from icon_nephi.io.image_input import is_itk, place_of, voxels_of
from icon_nephi.maps.two_way import DIRECTIONS, FIXED_TO_MOVING, MOVING_TO_FIXED, TwoWay
from icon_nephi.proofs.regions import Region
from icon_nephi.proofs.search import Search
from icon_nephi.registration.result import Registration
from icon_nephi.space.frames import Array, apply_affine

BOTH = "both"


@dataclass(frozen=True)
class Certificate:
    """What is proven about the sign of a map's Jacobian determinants.

    Attributes:
        proven: share of the volume, 0 to 1, where the determinant is proven positive
            (over that of the affine part, which may be a reflection).
        refuted: share of the volume in boxes that hold a counterexample.
        undecided: share of the volume that is neither.
        smallest: what no determinant in the proven volume falls below, volume there
            over volume here, as `Registration.jacobian_determinant` (its magnitude,
            behind a reflection); nan where nothing is proven.
        counterexamples: points ``[N, d]`` where it is not positive, the worst 1000 of
            each direction: LPS millimetres for ITK images, else ICON frame; in the
            fixed image for ``"fixed_to_moving"``, in the moving image for the other.
        determinants: the determinants there ``[N]``.
        directions: of each counterexample.
        seconds: taken.
    """

    proven: float
    refuted: float
    undecided: float
    smallest: float
    counterexamples: Array
    determinants: Array
    directions: tuple[str, ...]
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether all of the volume is proven."""
        return self.refuted == 0 and self.undecided == 0

    def __str__(self) -> str:
        """Return what is proven, in one sentence."""
        text = "No folds: proven "
        text += "at every point" if self.holds else f"for {_share(self.proven)}"
        if self.proven:
            text += f" (determinants of at least {self.smallest:.3g})"
        if self.refuted:
            text += (
                f"; refuted by {len(self.counterexamples)} points in boxes that are "
                f"{_share(self.refuted)}"
            )
        if self.undecided:
            text += f"; undecided for {_share(self.undecided)}"
        return f"{text}, after {self.seconds:.0f} s."


def _share(part: float) -> str:
    """Return a share in words: never 100 % for less than all, nor 0 % for some."""
    percent = math.floor(part * 1e4) / 100
    return f"{percent:.2f} % of the volume" if percent else "under 0.01 % of the volume"


def certify(
    registration: Registration,
    region: Any = None,
    *,
    direction: str | None = None,
    time_limit: float | None = 300.0,
    progress: bool = True,
) -> Certificate:
    """Prove of a registration that det J > 0 on the continuum, or where not.

    The maps are taken as their formulas, in exact arithmetic, with the weights they
    have; evaluating them in float32 adds its own rounding. The neural part's
    determinant is bounded: the whole map's is a constant times it, the determinant of
    the affine part. (With codes read linearly the Jacobian jumps at the codes' nodes;
    then what holds on either side is proven.)

    It works on as many threads as torch does.

    Args:
        registration: from `register` or `load`.
        region: where to prove it. None: the image the direction starts from, between
            its outermost voxel centres. A mask of that image (above zero; ITK: on any
            grid). A box: two opposite corners ``[2, d]``, LPS millimetres for ITK
            images, else ICON frame. What counts as the volume is that of the boxes
            that cover the region.
        direction: ``"fixed_to_moving"``, ``"moving_to_fixed"`` or ``"both"``; default:
            both, of a region fixed_to_moving.
        time_limit: seconds after which the rest stays undecided; None: as long as it
            takes.
        progress: show a bar.

    Raises:
        TypeError: not a registration, or another kind of region than its images.
        ValueError: unknown direction, both with a region, or a region of another
            shape, or empty.
    """
    if not isinstance(registration, Registration):
        raise TypeError(
            "registration must be what register or load returns, got "
            f"{type(registration).__name__}"
        )
    if direction is None:
        direction = BOTH if region is None else FIXED_TO_MOVING
    if direction not in (*DIRECTIONS, BOTH):
        raise ValueError(
            f"direction must be one of {(*DIRECTIONS, BOTH)}, got {direction!r}"
        )
    if direction == BOTH and region is not None:
        raise ValueError(
            "direction 'both' has no single region: a region lies in the image that "
            "one direction starts from; certify each direction with its own"
        )
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit must be positive seconds, got {time_limit}")
    chosen = DIRECTIONS if direction == BOTH else (direction,)
    begin = time.monotonic()
    searches = [_search(registration, d, region) for d in chosen]
    with tqdm(
        total=100.0,
        disable=not progress,
        desc="proving",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}",
        leave=False,
    ) as bar:
        for number, search in enumerate(searches):
            ends, now = None, time.monotonic()
            if time_limit is not None:
                ends = now + (begin + time_limit - now) / (len(searches) - number)
            search.run(ends, lambda part: bar.update(100 * part / len(searches)))
    total = sum(s.total for s in searches)
    left = sum(boxes.volume() for s in searches for boxes in s.left) / total
    refuted = sum(s.refuted for s in searches) / total
    two_way = registration.two_way
    scales = [_scale(two_way, d) for d in chosen]
    ways = list(zip(searches, chosen, scales, strict=True))
    least = min(s.smallest * abs(scale) for s, _, scale in ways)
    return Certificate(
        proven=max(0.0, 1 - left - refuted),
        refuted=refuted,
        undecided=left,
        smallest=least if math.isfinite(least) else math.nan,
        counterexamples=np.concatenate(
            [apply_affine(_start(two_way, d), s.points) for s, d, _ in ways]
        ),
        determinants=np.concatenate([s.determinants * c for s, _, c in ways]),
        directions=tuple(d for s, d, _ in ways for _ in s.points),
        seconds=time.monotonic() - begin,
    )


def _start(two_way: TwoWay, direction: str) -> Tensor:
    """Return psi's unit box (the fixed image's) -> the frame a direction starts in.

    phi_AB = affine o psi_AB, and phi_BA = psi_BA o affine^-1.
    """
    _, frame = two_way.grid(direction)
    return frame @ two_way.from_fixed(direction)


def _scale(two_way: TwoWay, direction: str) -> float:
    """Return the determinant of phi over that of psi, in the frames of points."""
    fixed, moving = (two_way.grid(d)[1] for d in DIRECTIONS)
    affine = two_way.from_fixed(MOVING_TO_FIXED)
    volumes = [float(torch.linalg.det(m[:-1, :-1])) for m in (moving, affine, fixed)]
    ratio = volumes[0] * volumes[1] / volumes[2]
    return ratio if direction == FIXED_TO_MOVING else 1 / ratio


def _search(registration: Registration, direction: str, region: Any) -> Search:
    if not registration.proper:
        raise ValueError(
            "this map of a series is made of several; certify those it is made of, "
            "series.fitted(number)"
        )
    fit = registration.fit
    field = fit.field_AB if direction == FIXED_TO_MOVING else fit.field_BA
    where = _region(registration, direction, region)
    low, high = where.span()
    image = Region(registration.two_way.from_fixed(direction))
    if not bool(image.meets(low[None], high[None])):
        raise ValueError(
            f"region lies outside the image that {direction} starts from; "
            "give a part of that image, in its frame"
        )
    return Search(field, fit.code, where)


def _region(registration: Registration, direction: str, region: Any) -> Region:
    """Return the region in psi's frame; see `certify`."""
    two_way = registration.two_way
    before = two_way.from_fixed(direction)
    if region is None:
        return Region(before)
    d = len(before) - 1
    if is_itk(region) or (isinstance(region, Tensor) and region.dim() > 2):
        place = place_of("region", region, itk=registration.itk, dimension=d)
        voxels = torch.from_numpy(voxels_of(region)).permute(d, *range(d))[None]
        check_mask("region", voxels, place.size)
        if registration.itk:
            before = place.physical_to_unit() @ _start(two_way, direction)
        else:
            check_mask("region", voxels, two_way.place(direction).size)
        return Region(before, (voxels[0] > 0).any(0))
    try:
        corners = np.asarray(region, dtype=np.float64)
    except (TypeError, ValueError):
        corners = np.empty(0)
    if corners.shape != (2, d):
        kind = "an ITK image" if registration.itk else "a tensor [1, 1, *grid]"
        raise ValueError(
            f"region must be None, a mask as {kind}, or two corners [2, {d}] of a box, "
            f"got {type(region).__name__}"
        )
    low, high = torch.from_numpy(np.sort(corners, axis=0))
    if not bool(torch.isfinite(low + high).all() and (high > low).all()):
        raise ValueError(f"region must be a box with a volume, got {corners.tolist()}")
    into = torch.eye(d + 1, dtype=torch.float64)
    into[:d, :d] = torch.diag(1 / (high - low))
    into[:d, d] = -low / (high - low)
    return Region(into @ _start(two_way, direction))
