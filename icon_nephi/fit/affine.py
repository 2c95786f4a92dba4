"""An affine start: where the images lie on each other before any deformation.

Physical frame throughout: a matrix here is homogeneous ``[d + 1, d + 1]``, float64,
fixed-image millimetres -> moving-image millimetres.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from icon_nephi.fit.adam import Adam
from icon_nephi.fit.content import ImagePair
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.fit.search import POINTS, Rating, identity, search, turned
from icon_nephi.losses import compiled
from icon_nephi.losses.gradient_icon import compare
from icon_nephi.losses.patches import patch_maps
from icon_nephi.losses.similarities import Comparison, MutualInformation, PatchNCC
from icon_nephi.maps.transforms import MatrixTransform
from icon_nephi.space.frames import Geometry, apply_affine
from icon_nephi.space.images import gaussian_blur
from icon_nephi.space.sampling import Patches, draw_points

# An agreement above which no other turn is looked for; how much better one has to be.
# By so much of what is missing to 1, or of what there is (measures other than
# correlation stay far from 1).
SURE, CLOSER, MORE, BETTER = 0.9, 0.67, 1.3, 0.03
# Voxels a side of the images by which all turns are tried.
FEW = {2: 64, 3: 32}


def centre_of_mass(image: Tensor, geometry: Geometry) -> Tensor:
    """``[d]`` float64 millimetres: the centroid of non-negative weights on a grid."""
    weights = image[0, 0].double().cpu()
    total = weights.sum().clamp(min=1e-12)
    centre = []
    for axis, n in enumerate(weights.shape):
        profile = weights.sum(dim=[a for a in range(weights.dim()) if a != axis])
        moment = (profile * torch.arange(n, dtype=profile.dtype)).sum()
        centre.append(moment / total / (n - 1))
    return apply_affine(geometry.unit_to_physical(), torch.stack(centre)[None])[0]


def in_unit_boxes(matrix: Tensor, fixed: Geometry, moving: Geometry) -> Tensor:
    """The same map from the fixed image's unit box to the moving image's."""
    return moving.physical_to_unit() @ matrix @ fixed.unit_to_physical()


def refine(
    image_A: Tensor,
    image_B: Tensor,
    geometry_A: Geometry,
    geometry_B: Geometry,
    start: Tensor,
    *,
    strides: Sequence[float],
    steps: int,
    similarity: Callable[[Tensor, Tensor], Tensor] | None = None,
    mask_A: Tensor | None = None,
    mask_B: Tensor | None = None,
    counts: tuple[Tensor | None, Tensor | None] = (None, None),
    count: int = 200,
    size: int = 3,
    learning_rate: float = 0.01,
    rigid: bool = False,
    generator: torch.Generator | None = None,
    options: FitOptions | None = None,
) -> Tensor:
    """The affine matrix that aligns blocks best, both directions, from a start.

    Adam takes so many steps at each stride (millimetres between the samples of a block,
    coarse to fine); one of 0.01 shears by 0.01 and shifts by 0.01 half extents. A
    ``rigid`` one only turns and shifts what the start does. Once the time of the
    options is over it is what was reached. Of the ``counts`` of both images see
    `GradientICONPoints`.
    """
    d = geometry_B.dimension
    similarity = similarity or PatchNCC()
    half = max(geometry_B.extent) / 2
    centre = identity(d)
    centre[:d, d] = _middle(geometry_B)
    change = torch.zeros(d, d + 1, dtype=torch.float64, requires_grad=True)
    optimizer = Adam([{"params": [change], "lr": learning_rate}], (0.9, 0.95))
    total = steps * len(strides)

    def current() -> Tensor:
        linear, shift = change[:, :d], change[:, d:] * half
        if rigid:
            linear = torch.matrix_exp((linear - linear.mT) / 2)
        else:
            linear = linear + identity(d)[:d, :d]
        delta = torch.cat([torch.cat([linear, shift], 1), identity(d)[d:]])
        moved: Tensor = start @ centre @ delta @ torch.linalg.inv(centre)
        return moved

    on_core = compiled.agreement_of(similarity, image_A, image_B, counts)
    counts_A, counts_B = counts
    for stride in strides:
        for _ in range(steps):
            if options is not None and options.late:
                return current().detach()
            matrix = in_unit_boxes(current(), geometry_B, geometry_A).to(image_B.dtype)
            loss = torch.zeros((), dtype=image_B.dtype)
            back = torch.linalg.inv(matrix)
            forth_counts, back_counts = (counts_A, counts_B), (counts_B, counts_A)
            for fixed, moving, geometry, mask, m, known in (
                (image_B, image_A, geometry_B, mask_B, matrix, forth_counts),
                (image_A, image_B, geometry_A, mask_A, back, back_counts),
            ):
                patches = Patches(count, size, voxel_stride(stride, geometry))
                rows = draw_points(
                    count, 1, d, mask=mask, generator=generator, dtype=fixed.dtype
                )
                if on_core is not None:
                    loss = loss + on_core(m, rows[0], patches, fixed is image_B)
                    continue
                x, moved = patch_maps(
                    MatrixTransform(m[None]), patches, rows, fixed.shape[2:]
                )
                blocks = (count, *x.shape[3:])
                images = moving, fixed, blocks, None, known
                loss = loss + compare(similarity, moved, x, *images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            left = (1 + math.cos(math.pi * optimizer.done / total)) / 2
            optimizer.param_groups[0]["lr"] = learning_rate * (0.05 + 0.95 * left)
    return current().detach()


def voxel_stride(millimetres: float, geometry: Geometry) -> tuple[float, ...]:
    """A stride in voxels of each tensor axis; never below one voxel."""
    return tuple(max(1.0, millimetres / s) for s in geometry.tensor_spacing)


def coincide(geometry_A: Geometry, geometry_B: Geometry) -> bool:
    """Whether the boxes lie on each other, as two scans of one session do."""
    d = geometry_B.dimension
    corners = torch.cartesian_prod(*[torch.linspace(0, 1, 5, dtype=torch.float64)] * d)
    inner = apply_affine(in_unit_boxes(identity(d), geometry_B, geometry_A), corners)
    share = ((inner >= 0) & (inner <= 1)).all(1).double().mean()
    return bool(share > 0.95)


def _between(
    geometry_A: Geometry,
    geometry_B: Geometry,
    weights_A: Tensor | None,
    weights_B: Tensor | None,
) -> Tensor:
    """The translation between the centres of mass (or of the boxes)."""
    centres = [
        _middle(place) if weights is None else centre_of_mass(weights.float(), place)
        for place, weights in ((geometry_A, weights_A), (geometry_B, weights_B))
    ]
    matrix = identity(geometry_B.dimension)
    matrix[:-1, -1] = centres[0] - centres[1]
    return matrix


def _middle(place: Geometry) -> Tensor:
    """``[d]``: the millimetres of the middle of a box."""
    half = torch.full((1, place.dimension), 0.5, dtype=torch.float64)
    return apply_affine(place.unit_to_physical(), half)[0]


def find_affine(
    images: ImagePair,
    choice: Comparison,
    generator: torch.Generator,
    options: FitOptions | None = None,
    said: list[str] | None = None,
    near: Tensor | None = None,
    *,
    rigid: bool = False,
) -> Tensor:
    """The affine map in the physical frame, by search and then by refinement.

    Where one is known to be ``near``, it is looked for around that only. A ``rigid``
    one turns and shifts, and keeps every length. Where the images are each other's
    mirror, ``said`` gets a sentence.
    """
    d = images.geometry_B.dimension
    starts = (
        [near]
        if near is not None
        else [
            identity(d),
            _between(images.geometry_A, images.geometry_B, None, None),
            _between(
                images.geometry_A, images.geometry_B, images.where_A, images.where_B
            ),
        ]
    )
    smooth = images.blurred(2.7)
    score = MutualInformation(16).counted if choice.contrast else None
    mask = images.where_B.cpu() if images.masked else None
    best = search(
        *smooth,
        *images.geometries,
        starts,
        angles=range(-180, 180, 15) if d == 2 else (),
        far=near is None,
        mask_B=mask,
        count=2000,
        score=score,
        generator=generator,
        options=options,
    )
    if near is None:
        best, sentences = _any_turn(images, smooth, best, score, generator, options)
        said = [] if said is None else said
        said += sentences
    return improved(images, best, choice, generator, options, rigid=rigid)


def improved(
    images: ImagePair,
    start: Tensor,
    choice: Comparison,
    generator: torch.Generator,
    options: FitOptions | None = None,
    *,
    rigid: bool = False,
) -> Tensor:
    """The start, refined; where it is to be ``rigid``, the rigid map nearest to it."""
    if rigid:
        start = nearest_rigid(start, images.geometry_B)
    # Nothing follows a rigid map: it is found with more samples, and finer ones.
    strides = (12, 6, 3) if rigid else (12, 6)
    return refine(
        *images.smooth,
        *images.geometries,
        start,
        rigid=rigid,
        strides=[stride * images.unit for stride in strides],
        steps=60 if rigid else 50,
        count=400 if rigid else 200,
        similarity=choice.alone,
        mask_A=images.where_A.cpu(),
        mask_B=images.where_B.cpu(),
        counts=images.counts_on("cpu"),
        generator=generator,
        options=options,
    )


def nearest_rigid(matrix: Tensor, geometry_B: Geometry) -> Tensor:
    """The turn nearest to a matrix's, and the middle of image_B where it takes it."""
    d = geometry_B.dimension
    left, _, right = torch.linalg.svd(matrix[:d, :d])
    middle, result = _middle(geometry_B), identity(d)
    result[:d, :d] = left @ right
    result[:d, d] = matrix[:d, :d] @ middle + matrix[:d, d] - result[:d, :d] @ middle
    return result


def _any_turn(
    images: ImagePair,
    smooth: tuple[Tensor, Tensor],
    near: Tensor,
    score: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    generator: torch.Generator,
    options: FitOptions | None,
) -> tuple[Tensor, list[str]]:
    """The map from which a search went, or one that is clearly better and far from it.

    And sentences, see `find_affine`.
    """
    options = options or FitOptions(progress=False)
    known: dict[str, Any] = {"mask_B": images.where_B.cpu(), "score": score}
    drawn = known | {"generator": generator}
    fine = Rating.of(*smooth, *images.geometries, count=2000, **drawn)
    found = float(fine.rate(near[None]))
    if found > SURE or options.late:
        return near, []
    few_A, few_B = map(_few, smooth)
    coarse = Rating.of(few_A, few_B, *images.geometries, count=POINTS, **drawn)
    geometries = images.geometry_A, images.geometry_B
    wheres = images.where_A.cpu(), images.where_B.cpu()
    bodies = [
        centre_of_mass(where.float(), place)
        for where, place in zip(wheres, geometries, strict=True)
    ]
    boxes = [_middle(place) for place in geometries]
    pairs = [(fixed, moving) for moving, fixed in (bodies, boxes)]
    extent = max(images.geometry_B.extent)

    def best_turn(mirror: bool) -> tuple[float, Tensor]:
        matrix = turned(coarse, pairs, extent, mirror)
        matrix = search(
            *smooth,
            *images.geometries,
            [matrix],
            angles=(),
            far=False,
            count=2000,
            generator=torch.Generator().manual_seed(0),
            **known,
        )
        return float(fine.rate(matrix[None])), matrix

    there, turn = best_turn(False)
    if _is_clear(there, found):
        near, found = turn, there
    if found > SURE or options.late:
        return near, []
    there, mirrored = best_turn(True)
    if not _is_clear(there, found):
        return near, []
    if options.allow_mirror:
        return mirrored, ["image_A is mirrored: the map turns it over"]
    return near, [
        "image_A fits image_B much better as its mirror image "
        f"({there:.2f} against {found:.2f}): check which side is left, or allow it "
        "with --allow_mirror (allow_mirror=True)"
    ]


def _is_clear(there: float, found: float) -> bool:
    """Whether an agreement is clearly better than another."""
    closer = 1 - there < CLOSER * (1 - found) or there > MORE * found
    return closer and there > found + BETTER


def _few(image: Tensor) -> Tensor:
    """The image over the same box with few voxels, smoother by one of them."""
    d = image.dim() - 2
    most = FEW[d]
    size = [min(n, most) for n in image.shape[2:]]
    mode = "bilinear" if d == 2 else "trilinear"
    image = F.interpolate(image, size, mode=mode, align_corners=True)
    return gaussian_blur(image, [1.0] * d)
