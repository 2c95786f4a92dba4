"""The best of many rigid maps: near a start, and turned any way.

Physical frame throughout, as in `icon_nephi.fit.affine`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icon_nephi.core import arrays
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.space.frames import Geometry, apply_affine, inside, points_as_grid
from icon_nephi.space.images import sample_image
from icon_nephi.space.sampling import draw_points

# Turns that are tried, points they are compared at, and how many are followed.
TURNS, POINTS, FOLLOWED = {2: 72, 3: 4000}, 800, 24
# Degrees and shares of the extent by which those are moved, in turns.
AROUND = (10.0, 0.05), (5.0, 0.025), (2.5, 0.0125)


def identity(d: int) -> Tensor:
    """The affine map that moves nothing, homogeneous."""
    return torch.eye(d + 1, dtype=torch.float64)


@dataclass(frozen=True)
class Rating:
    """How well an image agrees with another at random points, under affine maps.

    Attributes:
        points: ``[N, d]`` float64 fixed-image millimetres.
        target: ``[C, N]``, the fixed image there.
        image_A: moving.
        geometry_A: where it lies.
        score: see `search`.
    """

    points: Tensor
    target: Tensor
    image_A: Tensor
    geometry_A: Geometry
    score: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    @classmethod
    def of(
        cls,
        image_A: Tensor,
        image_B: Tensor,
        geometry_A: Geometry,
        geometry_B: Geometry,
        *,
        mask_B: Tensor | None,
        count: int,
        score: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
        generator: torch.Generator | None,
    ) -> Rating:
        """At so many points of the mask, or of the box."""
        d = geometry_B.dimension
        rows = draw_points(
            count, 1, d, mask=mask_B, generator=generator, dtype=image_B.dtype
        )
        target = sample_image(image_B, points_as_grid(rows))[0].flatten(1)
        points = apply_affine(geometry_B.unit_to_physical(), rows[0].double())
        return cls(points, target, image_A, geometry_A, score)

    @property
    def centre(self) -> Tensor:
        """``[d]``: of the points."""
        return self.points.mean(0)

    def rate(self, matrices: Tensor) -> Tensor:
        """``[K]`` of matrices ``[K, d + 1, d + 1]`` between the physical frames."""
        d, to_unit = self.points.shape[1], self.geometry_A.physical_to_unit()
        single = self.target.dtype == torch.float32
        if self.score is None and single and arrays.suit(self.image_A):
            to_centre = identity(d)
            to_centre[:d, d] = self.centre
            maps = (to_unit @ matrices @ to_centre)[:, :d]
            points = self.points - self.centre
            return arrays.rate(maps, points, self.target, self.image_A)
        linear = matrices[:, :d, :d]
        moved = self.points @ linear.mT + matrices[:, None, :d, d]
        x = apply_affine(to_unit, moved).to(self.target.dtype)
        at = points_as_grid(x.reshape(1, -1, d))
        values = sample_image(self.image_A, at)[0].unflatten(1, (len(matrices), -1))
        values = values.flatten(2)
        weight = inside(at)[0, 0].reshape(len(matrices), -1).to(values.dtype)
        agreement = self.score or _weighted_ncc
        agreed = agreement(values, self.target[:, None], weight).mean(0)
        return agreed * weight.mean(1).sqrt()


def search(
    image_A: Tensor,
    image_B: Tensor,
    geometry_A: Geometry,
    geometry_B: Geometry,
    starts: Sequence[Tensor],
    *,
    angles: Sequence[float],
    far: bool = True,
    mask_B: Tensor | None = None,
    count: int = 3000,
    score: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    options: FitOptions | None = None,
) -> Tensor:
    """The best of many rigid maps of smooth images, by correlation at random points.

    Tries rotations by the angles (degrees, about every axis) about every start's centre
    with translations on a lattice (unless not ``far``), refined twice around the best;
    samples outside the moving image count against a map by the share that is missing.
    Once the time of the options is over it is the best of the starts and of what was
    tried.

    In place of correlation a ``score`` may be taken of moved values ``[C, K, N]`` under
    K maps, fixed values ``[C, 1, N]`` and in-bounds tags ``[K, N]``: ``[C, K]``.
    """
    d = geometry_B.dimension
    rating = Rating.of(
        *(image_A, image_B, geometry_A, geometry_B),
        mask_B=mask_B,
        count=count,
        score=score,
        generator=generator,
    )
    rate, centre = rating.rate, rating.centre
    extent, around = max(geometry_B.extent), [*starts]
    rounds: list[tuple[float, int, Sequence[float]]] = [
        (0.25, 3, angles),
        (0.06, 2, (-6.0, 0.0, 6.0)),
        (0.02, 2, (-2.0, 0.0, 2.0)),
    ]
    for reach, steps, turns in rounds[0 if far else 1 :]:
        candidates = []
        for start in around:
            for rotation in _rotations(d, turns, centre):
                candidates += _shifted(start @ rotation, reach * extent, steps)
        tried = torch.stack(candidates).split(50)
        scores: list[Tensor] = []
        for matrices in tried:
            if (
                options is not None and options.late
            ):  # the starts are rated all the same
                tried = (*tried[: len(scores)], torch.stack(around))
                scores.append(rate(tried[-1]))
                break
            scores.append(rate(matrices))
        around = [torch.cat(tried)[torch.cat(scores).argmax()]]
    return around[0]


def _weighted_ncc(values: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """``[C, K]``: correlation over the weighted points."""
    total = weight.sum(1).clamp(min=1)
    mean_a = (values * weight).sum(2) / total
    mean_b = (target * weight).sum(2) / total
    a = (values - mean_a[..., None]) * weight
    b = (target - mean_b[..., None]) * weight
    return (a * b).sum(2) / (a.square().sum(2) * b.square().sum(2) + 1e-12).sqrt()


def _rotations(d: int, angles: Sequence[float], centre: Tensor) -> list[Tensor]:
    """Rotations about a centre: one angle in 2D, about one of three axes in 3D."""
    planes = [(0, 1)] if d == 2 else [(0, 1), (0, 2), (1, 2)]
    result = [identity(d)]
    for (i, j), degrees in itertools.product(planes, angles):
        if degrees == 0:
            continue
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        matrix = identity(d)
        matrix[i, i] = matrix[j, j] = c
        matrix[i, j], matrix[j, i] = -s, s
        matrix[:d, d] = centre - matrix[:d, :d] @ centre
        result.append(matrix)
    return result


def _shifted(matrix: Tensor, reach: float, steps: int) -> list[Tensor]:
    """The matrix moved by every vector of a lattice of +- reach millimetres."""
    d = matrix.shape[0] - 1
    result = []
    shifts = torch.linspace(-reach, reach, 2 * steps + 1).tolist()
    for shift in itertools.product(shifts, repeat=d):
        moved = matrix.clone()
        moved[:d, d] += torch.tensor(shift, dtype=matrix.dtype)
        result.append(moved)
    return result


def turned(
    rating: Rating,
    pairs: Sequence[tuple[Tensor, Tensor]],
    extent: float,
    mirror: bool = False,
) -> Tensor:
    """The best rigid map of any turn, followed by a mirror if that is asked for.

    Every pair is a centre in the fixed image, and where in the moving image it lies,
    in millimetres; the extent is that of the fixed image.
    """
    d, slow = len(pairs[0][0]), rating.score is not None
    followed = FOLLOWED // 3 if slow else FOLLOWED
    rotations = all_rotations(d, TURNS[d] // 5 if slow and d == 3 else TURNS[d])
    if mirror:
        rotations = rotations.clone()
        rotations[:, :, 0] *= -1
    maps = torch.cat([_about(rotations, *pair) for pair in pairs])
    best = _best(rating, maps, followed)
    for degrees, share in AROUND:
        small = torch.stack(_rotations(d, (-degrees, degrees), torch.zeros(d).double()))
        best = _best(rating, _turned_about(best, small, rating.centre), followed)
        moved = [m for one in best for m in _shifted(one, share * extent, 1)]
        best = _best(rating, torch.stack(moved), followed)
    return best[0]


def all_rotations(d: int, count: int) -> Tensor:
    """``[count, d, d]`` float64: rotations that are spread evenly (Alexa 2022)."""
    at = torch.arange(count, dtype=torch.float64)
    if d == 2:
        angle = 2 * math.pi / count * at
        c, s = angle.cos(), angle.sin()
        return torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1)
    at = at + 0.5
    low, high = (at / count).sqrt(), (1 - at / count).sqrt()
    first, second = 2 * math.pi * at / 2**0.5, 2 * math.pi * at / 1.533751168755204288
    x, y = low * first.sin(), low * first.cos()
    z, w = high * second.sin(), high * second.cos()
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def _about(rotations: Tensor, fixed: Tensor, moving: Tensor) -> Tensor:
    """Homogeneous: turned about a centre, which goes to another."""
    d = len(fixed)
    maps = identity(d).repeat(len(rotations), 1, 1)
    maps[:, :d, :d] = rotations
    maps[:, :d, d] = moving - rotations @ fixed
    return maps


def _turned_about(maps: Tensor, turns: Tensor, centre: Tensor) -> Tensor:
    """Every map after every turn about a centre."""
    to, back = identity(len(centre)), identity(len(centre))
    to[:-1, -1], back[:-1, -1] = centre, -centre
    return (maps[:, None] @ (to @ turns @ back)).flatten(0, 1)


def _best(rating: Rating, maps: Tensor, count: int) -> Tensor:
    scores = torch.cat([rating.rate(part) for part in maps.split(500)])
    return maps[scores.argsort(descending=True, stable=True)[:count]]
