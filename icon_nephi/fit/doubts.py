"""What is doubtful about a fitted pair: numbers that go with failure, and sentences."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from icon_nephi.fit.affine import voxel_stride
from icon_nephi.losses.patches import as_blocks, patch_maps
from icon_nephi.losses.regularity import relative_determinant
from icon_nephi.losses.similarities import correlations
from icon_nephi.maps.jacobians import fold_fraction
from icon_nephi.maps.networks import AffinePair
from icon_nephi.maps.transforms import Map, MatrixTransform
from icon_nephi.space.frames import Geometry, inside, points_as_grid
from icon_nephi.space.images import sample_image
from icon_nephi.space.intensities import PreparedImage
from icon_nephi.space.sampling import Patches, draw_points

# Points looked at; blocks, samples a side of them, and the stride of these in units of
# 1/160 of the box: blocks large enough that noise does not hide what they show.
POINTS, BLOCKS, SIZE, STRIDE = 5000, 400, 5, 4.0
# Added to the variance of blocks; the images are smooth. Blocks with a smaller standard
# deviation than SEEN count less.
FLOOR = 1e-3
SEEN = 0.1
# Beyond these a sentence says so; measured by `evaluation.accuracy.robustness`.
OUTSIDE = 0.3  # share
RETURN = 1.0  # 1/160 of the box, on average
UNEVEN = 0.6  # log of determinants
ALIKE, LESS = 0.45, 0.05  # correlations
OPPOSED = 0.25  # share
COARSE = 8.0  # 1/160 of the box


def of_images(image_A: PreparedImage, image_B: PreparedImage) -> dict[str, float]:
    """What is doubtful before anything is done.

    ``coarse``: the longest side of a voxel of either, in 1/160 of image_B's box.
    ``gaps``: slices of either that are empty between some that are not.
    """
    spacings = [*image_A.place.spacing, *image_B.place.spacing]
    return {
        "coarse": 160 * max(spacings) / max(image_B.place.extent),
        "gaps": float(image_A.gaps + image_B.gaps),
    }


def evidence(
    pair: AffinePair,
    image_A: Tensor,
    image_B: Tensor,
    geometry_B: Geometry,
    where_B: Tensor,
    generator: torch.Generator,
    counts: tuple[Tensor | None, Tensor | None] = (None, None),
) -> dict[str, float]:
    """What `doubts` judges by; nothing in it needs a ground truth.

    ``outside``: the share of image_B's content that maps outside image_A. ``folded``:
    the share where the determinant is not positive. ``return``: how far a point is, on
    average, from where it started after both maps, in 1/160 of the box, and
    ``return_most``, exceeded by 5 %. ``uneven``: standard deviation of the logarithm
    of the determinants. ``alike``: mean correlation of blocks of the images, which are
    smooth, -1 to 1, ``alike_start`` that of the affine start alone, and ``opposed`` the
    share of blocks whose correlation is clearly negative. Blocks count by how much
    there is to see, in either image; voxels by the ``counts`` of both.
    """
    d = geometry_B.dimension
    image_A, image_B = image_A.to(pair.matrix), image_B.to(pair.matrix)
    phi_AB, phi_BA = pair(image_A, image_B)
    rows = draw_points(
        POINTS, 1, d, mask=where_B, generator=generator, dtype=image_B.dtype
    ).to(image_B)
    x = points_as_grid(rows)
    moved, jacobian = phi_AB.value_and_jacobian(x)
    extent = torch.tensor(geometry_B.extent, dtype=rows.dtype, device=rows.device)
    missed = (phi_BA(moved) - x).flatten(2)[0] * (160 * extent / extent.max())[:, None]
    distance = missed.norm(dim=0).double()
    determinant = relative_determinant(jacobian).double()
    start = MatrixTransform(pair.matrix)
    blocks = rows[:, :BLOCKS]
    alike, alike_start = (
        _correlations(phi, image_A, image_B, geometry_B, blocks, counts)
        for phi in (phi_AB, start)
    )
    return {
        "outside": 1 - float(inside(moved).double().mean()),
        "folded": fold_fraction(determinant),
        "return": float(distance.mean()),
        "return_most": float(distance.quantile(0.95)),
        "uneven": float(determinant.clamp(min=1e-3).log().std()),
        "alike": _mean(*alike),
        "alike_start": _mean(*alike_start),
        "opposed": _mean((alike[0] < -0.3).double(), alike[1]),
    }


def doubts(numbers: dict[str, float], *, contrast: bool = False) -> list[str]:
    """What a user should know of a result, one sentence each.

    By the numbers that `evidence` returns, and `of_images`; where the images may have
    other ``contrast`` than each other, correlations say nothing.
    """
    sentences = []
    if numbers.get("coarse", 0) > COARSE:
        sentences.append(
            f"a voxel is {numbers['coarse']:.0f}/160 of image_B's longest side along "
            "one axis: expect errors of a part of that"
        )
    if numbers.get("gaps", 0):
        sentences.append(
            f"{numbers['gaps']:.0f} slices between others are empty: around them the "
            "map is less exact; mask them if they are many"
        )
    if numbers["outside"] > OUTSIDE:
        sentences.append(
            f"{100 * numbers['outside']:.0f} % of what is registered in image_B maps "
            "outside image_A: it is extrapolated there"
        )
    if numbers["folded"] > 0:
        share = 100 * numbers["folded"]
        sentences.append(f"the map folds at {share:.2g} % of image_B's content")
    if numbers["return"] > RETURN:
        sentences.append(
            "the two maps are not each other's inverse: points miss their start by "
            f"{numbers['return']:.1f}/160 of image_B's longest side on average"
        )
    if numbers["uneven"] > UNEVEN:
        sentences.append(
            "the map is very uneven: it grows and shrinks neighbouring places by "
            f"factors of {math.exp(numbers['uneven']):.1f}"
        )
    if contrast:
        return sentences
    if numbers["opposed"] > OPPOSED:
        sentences.append(
            "bright places of one image lie on dark ones of the other: if contrasts "
            "differ, register with similarity 'lncc2', 'mind' or 'mi'"
        )
    elif numbers["alike"] < ALIKE:
        sentences.append(
            "the images are little alike where they were laid on each other "
            f"(correlation {numbers['alike']:.2f}): it may have failed; if contrasts "
            "differ, register with similarity 'mind'"
        )
    elif numbers["alike"] < numbers["alike_start"] - LESS:
        sentences.append(
            "the images are less alike than after the affine start (correlation "
            f"{numbers['alike']:.2f}, there {numbers['alike_start']:.2f}): it may have "
            "failed"
        )
    return sentences


def _correlations(
    phi: Map,
    image_A: Tensor,
    image_B: Tensor,
    geometry: Geometry,
    rows: Tensor,
    counts: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """``[C, blocks]`` of image_A at where phi takes blocks of image_B, and weights."""
    stride = voxel_stride(STRIDE * max(geometry.extent) / 160, geometry)
    patches = Patches(rows.shape[1], SIZE, stride)
    at, moved = patch_maps(phi, patches, rows, image_B.shape[2:])
    tag = (inside(moved) & inside(at)).to(image_B.dtype)
    for known, place in zip(counts, (moved, at), strict=True):
        if known is not None:
            tag = tag * sample_image(known.to(tag), place, mode="nearest")
    images = [sample_image(image_A, moved), sample_image(image_B, at), tag]
    shape = (rows.shape[1], *at.shape[3:])
    a, b, w = (as_blocks(i, shape).flatten(2) for i in images)
    total = w.sum(2).clamp(min=1)
    spreads = []
    for values in (a, b):
        mean = (values * w).sum(2, keepdim=True) / total[..., None]
        spreads.append(((values - mean).square() * w).sum(2) / total)
    seen = torch.maximum(*spreads).sqrt().clamp(max=SEEN) / SEEN
    return correlations(a, b, w, FLOOR).T, (seen * w.mean(2)).T


def _mean(values: Tensor, weights: Tensor) -> float:
    return float((values * weights).sum() / weights.sum().clamp(min=1e-6))
