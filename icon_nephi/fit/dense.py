"""A pair fitted on lattices, coarse to fine: every voxel counts, nothing is drawn.

The two maps are one spline code (see `icon_nephi.losses.dense`), which gets twice the
intervals at each level without a change of the maps; the coarser parts stay free, so
that large motions need few steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from icon_nephi.fields import make_field
from icon_nephi.fields.codes import LatentCodeTable
from icon_nephi.fit.adam import Adam
from icon_nephi.fit.affine import in_unit_boxes
from icon_nephi.fit.content import ImagePair
from icon_nephi.fit.optimize import Course, FitOptions, not_finite, stopped
from icon_nephi.fit.settings import Lattices
from icon_nephi.losses.dense import DensePair, Side, coarsened, refined
from icon_nephi.losses.similarities import Comparison, PatchNCC
from icon_nephi.maps.jacobians import determinants
from icon_nephi.maps.networks import NePhi
from icon_nephi.maps.transforms import MatrixTransform
from icon_nephi.space.frames import identity_map, inside
from icon_nephi.space.images import gaussian_blur, sample_image
from icon_nephi.space.interpolation import along_axes, axis_matrix

# Of the learning rate, what is left at the end of a level.
LEFT = 0.1
BETAS = (0.9, 0.99)
# Lattices with fewer places than this part of the voxels are not needed.
SIXTH = 6
# Determinants below it are mended, in that many rounds at most, at so many places.
NEAR, ROUNDS = 0.1, 40
LOOKED_AT = 1_500_000
# What windows without content count: enough to keep things calm there.
ELSEWHERE = 1e-3


@dataclass(frozen=True)
class Level:
    """One lattice over the fixed image's box.

    Attributes:
        apart: millimetres between its places, about.
        size: places a side.
        intervals: of the code, a side.
        steps: to take.
    """

    apart: float
    size: tuple[int, ...]
    intervals: tuple[int, ...]
    steps: int


def plan(
    size: Sequence[int], extent: Sequence[float], settings: Lattices
) -> list[Level]:
    """The levels for an image of that grid and extent (millimetres), coarse to fine."""
    d = len(size)
    voxel = min(e / (n - 1) for e, n in zip(extent, size, strict=True))

    def lattice(apart: float) -> tuple[int, ...]:
        return tuple(
            max(4, min(n, round(e / apart) + 1))
            for e, n in zip(extent, size, strict=True)
        )

    finest = voxel * settings.finest
    while math.prod(lattice(finest)) > settings.places[d - 2]:
        finest *= 1.05
    least = min(settings.coarsest, max(size) // SIXTH)
    count = 1
    while count < len(settings.steps) and max(lattice(finest * 2**count)) > least:
        count += 1
    levels: list[Level] = []
    for number in range(count - 1, -1, -1):
        apart = finest * 2**number
        places = lattice(apart)
        if not levels:
            intervals = tuple(
                max(2, round(e / (apart * settings.apart[d - 2]))) for e in extent
            )
        else:  # along a short axis there are no more than places allow
            intervals = tuple(
                2 * n if 2 * n * settings.apart[d - 2] <= 1.5 * (p - 1) + 4 else n
                for n, p in zip(levels[-1].intervals, places, strict=True)
            )
        levels.append(Level(apart, places, intervals, settings.steps[-1 - number]))
    return levels


def suits(images: ImagePair, choice: Comparison) -> bool:
    """Whether a pair can be fitted on lattices: plain images, by local correlation."""
    return (
        type(choice.similarity) is PatchNCC
        and not choice.points
        and choice.features != "only"
        and not images.segmentations
        and not images.densities
        and all(
            i.device.type == "cpu" and i.dtype == torch.float32
            for i in (images.image_A, images.image_B)
        )
    )


def fit_dense(
    images: ImagePair,
    start: Tensor,
    similarity: PatchNCC,
    settings: Lattices,
    options: FitOptions,
    *,
    coarse: bool = False,
) -> tuple[Tensor, Course]:
    """The code ``[1, 2 d, *nodes]`` of both maps, and how the optimisation went.

    Args:
        images: as they are fitted; see `suits`.
        start: ``[d + 1, d + 1]``, fixed millimetres -> moving millimetres.
        similarity: local correlation; its floor and whether it is squared count.
        settings: how.
        options: limit of time, interrupts, progress; nothing is random.
        coarse: only the coarsest level.
    """
    place = images.geometry_B
    matrix = in_unit_boxes(start, place, images.geometry_A)
    levels = plan(images.image_B.shape[2:], place.extent, settings)
    levels = levels[:1] if coarse else levels
    d, history = len(place.extent), list[dict[str, float]]()
    parts: list[Tensor] = []
    warnings: list[str] = []
    extent = torch.tensor(place.extent, dtype=torch.float32)
    steps = sum(level.steps for level in levels)
    silent = not options.progress
    with tqdm(total=steps, disable=silent, desc="registering", leave=False) as bar:
        try:
            for level, sides in zip(
                levels, _views(images, matrix, levels), strict=True
            ):
                nodes = [n + 2 for n in level.intervals]
                parts.append(torch.zeros(1, 2 * d, *nodes))
                pair = DensePair(
                    sides,
                    tuple(max(4, -(-n // (1 if d == 2 else 2))) for n in level.size),
                    extent,
                    radius=settings.radius,
                    squared=similarity.squared,
                    floor=similarity.floor,
                    shared=similarity.shared,
                    lmbda=settings.lmbda,
                    drift=settings.drift,
                    hinge=settings.hinge,
                    tension=settings.tension,
                )
                rate = settings.rate * level.apart / max(place.extent)
                if not _descend(pair, parts, rate, level.steps, options, bar, history):
                    warnings.append(not_finite(len(history)))
                    break
                if options.late:
                    break
        except KeyboardInterrupt:
            if not (options.keep_on_interrupt and history):
                raise
            warnings.append(stopped(len(history), steps))
    whole = together(parts)
    if coarse:
        return whole, Course(history, warnings)
    scale = extent.max() / extent
    # Between places, too, where they are few.
    size, twice = levels[-1].size, tuple(2 * n - 1 for n in levels[-1].size)
    size = twice if math.prod(twice) <= LOOKED_AT else size
    return mended(whole, size, scale), Course(history, warnings)


def _descend(
    pair: DensePair,
    parts: Sequence[Tensor],
    rate: float,
    steps: int,
    options: FitOptions,
    bar: tqdm,
    history: list[dict[str, float]],
) -> bool:
    """Adam on all parts of a code, with a cosine decay; adds what each step cost.

    False where that is no longer a finite number.
    """
    optimizer = Adam([{"params": parts, "lr": rate}], betas=BETAS)
    # By hand: torch's own way imports its compiler.
    for step in range(steps):
        loss, gradient = pair.derive(together(parts))
        if not math.isfinite(loss.total):
            return False
        optimizer.zero_grad()
        for part in parts[::-1]:
            gradient = coarsened(gradient, part.shape[2:])
            part.grad = gradient.clone()
        share = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * (LEFT + (1 - LEFT) * share)
        optimizer.step()
        history.append(loss.entry())
        bar.update()
        if options.late:
            break
    return True


def mended(code: Tensor, size: Sequence[int], scale: Tensor) -> Tensor:
    """The code, smoothed around the places of a lattice where its maps nearly fold.

    Args:
        code: ``[1, 2 d, *nodes]``.
        size: places of the lattice a side.
        scale: ``[d]``, see `DensePair.scale`.
    """
    d = len(size)
    nodes = code.shape[2:]
    ends = [torch.linspace(0, 1, n) for n in size]
    reads = [axis_matrix(x, n) for x, n in zip(ends, nodes, strict=True)]
    slopes = [
        axis_matrix(x, n, gradient=True) for x, n in zip(ends, nodes, strict=True)
    ]
    pool = F.max_pool2d if d == 2 else F.max_pool3d
    for _ in range(ROUNDS):
        clean = True
        for first in (0, d):
            part = code[:, first : first + d]
            columns = [
                along_axes(part, [*reads[:a], slopes[a], *reads[a + 1 :]])
                for a in range(d)
            ]
            jacobians = torch.stack(columns, -1)[0].movedim(0, -2)
            jacobians = jacobians * scale[:, None] + torch.eye(d)
            bad = _folding(jacobians)
            if not bad.any():
                continue
            clean = False
            near = along_axes(bad[None, None].float(), [read.T for read in reads])
            near = pool((near > 0).float(), 3, stride=1, padding=1) > 0
            code = code.clone()
            code[:, first : first + d] = torch.where(near, _smoother(part), part)
        if clean:
            break
    return code


def _folding(jacobians: Tensor) -> Tensor:
    """``[*size]``: where determinants of ``[*size, d, d]`` are too low.

    On the border, those beyond it too: there nothing changes across it.
    """
    size, d = jacobians.shape[:-2], jacobians.shape[-1]
    bad = (determinants(jacobians.flatten(0, d - 1)) < NEAR).reshape(size)
    ends = []
    for axis, n in enumerate(size):
        end = torch.zeros(n, dtype=torch.bool)
        end[[0, -1]] = True
        ends.append(end.reshape(-1, *(1,) * (d - 1 - axis)).expand(size))
    for count in range(1, d):
        for axes in itertools.combinations(range(d), count):
            border = torch.stack([ends[a] for a in axes]).all(0)
            beyond = jacobians[border]
            beyond[..., axes] = torch.eye(d)[:, axes]
            bad[border] |= (determinants(beyond) < NEAR).flatten()
    return bad


def _smoother(code: Tensor) -> Tensor:
    """Each node averaged with its neighbours along every axis."""
    for axis in range(2, code.dim()):
        n = code.shape[axis]
        before = code.index_select(axis, torch.arange(-1, n - 1).clamp(min=0))
        after = code.index_select(axis, torch.arange(1, n + 1).clamp(max=n - 1))
        code = 0.5 * code + 0.25 * (before + after)
    return code


def spline_pair(code: Tensor, extent: Sequence[float]) -> NePhi:
    """The two maps of a code ``[1, 2 d, *nodes]``: linear fields that pick channels.

    A field is a network without hidden layers on the code's channels, which are in the
    largest of the extents.
    """
    d = len(extent)
    scale = torch.tensor([max(extent) / e for e in extent])
    table = LatentCodeTable(
        1, grids=[tuple(code.shape[2:])], channels=(2 * d,), global_size=0
    )
    arguments = {"dimension": d, "code_size": 2 * d, "hidden_layers": 0}
    field_AB, field_BA = (make_field("LatentMLP", arguments) for _ in "AB")
    with torch.no_grad():
        table.local_codes[0].copy_(code)
        for first, field in ((d, field_AB), (2 * d, field_BA)):
            last = cast(nn.Linear, field.last)
            last.weight[:, first : first + d] = torch.diag(scale)
    return NePhi(table, field_AB, field_BA)


def together(parts: Sequence[Tensor]) -> Tensor:
    """The sum of codes, coarse to fine, as one of the finest's nodes; see `refined`."""
    whole = parts[0]
    for part in parts[1:]:
        whole = refined(whole, part.shape[2:]) + part
    return whole


def _views(
    images: ImagePair, matrix: Tensor, levels: Sequence[Level]
) -> list[tuple[Side, Side]]:
    """What is compared at every level, of images smoothed as its lattice needs it."""
    d = len(levels[0].size)
    to_moving = matrix[:d].float()
    found: list[tuple[Side, Side]] = []
    A, B = images.image_A.float(), images.image_B.float()
    where_A, where_B = images.where_A.float(), images.where_B.float()
    counts_A, counts_B = (
        None if count is None else count.float() for count in images.counts
    )
    for level in reversed(levels):
        size_A = [
            max(4, min(n, round(e / level.apart) + 1))
            for n, e in zip(A.shape[2:], images.geometry_A.extent, strict=True)
        ]
        A, B = _resized(A, size_A), _resized(B, level.size)
        here = identity_map(level.size)
        there = MatrixTransform(to_moving[None])(here)
        reached_A, reached_B = (
            None if count is None else _nearest(count, size)
            for count, size in ((counts_A, size_A), (counts_B, level.size))
        )
        seen = inside(there).float()
        if reached_A is not None:
            seen = seen * sample_image(reached_A, there, mode="nearest")
        outline_B = _nearest(where_B, level.size)
        outline_A = sample_image(where_A, there, mode="nearest") * seen
        forth = Side(A, to_moving, B, outline_B + ELSEWHERE, reached_B, reached_A)
        target = sample_image(A, there)
        back = Side(
            B, torch.eye(d, d + 1), target, outline_A + ELSEWHERE, seen, reached_B
        )
        found.insert(0, (forth, back))
    return found


def _nearest(mask: Tensor, size: Sequence[int]) -> Tensor:
    return sample_image(mask, identity_map(size), mode="nearest")


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """The image on fewer voxels of its box, smoothed before where they are fewer."""
    if tuple(image.shape[2:]) == tuple(size):
        return image
    d = len(size)
    ratios = [(n - 1) / (m - 1) for n, m in zip(image.shape[2:], size, strict=True)]
    image = gaussian_blur(image, [0.5 * r if r > 1.2 else 0.0 for r in ratios])
    mode = "bilinear" if d == 2 else "trilinear"
    return F.interpolate(image, tuple(size), mode=mode, align_corners=True)
