"""An affine start: where the images lie on each other before any deformation.

Physical frame throughout: a matrix here is homogeneous ``[d + 1, d + 1]``, float64,
fixed-image millimetres -> moving-image millimetres.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from icon_nephi.core import arrays
from icon_nephi.fit.adam import Adam
from icon_nephi.fit.content import ImagePair
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.losses import compiled
from icon_nephi.losses.gradient_icon import compare
from icon_nephi.losses.patches import patch_maps
from icon_nephi.losses.similarities import Comparison, MutualInformation, PatchNCC
from icon_nephi.maps.transforms import MatrixTransform
from icon_nephi.space.frames import Geometry, apply_affine, inside, points_as_grid
from icon_nephi.space.images import sample_image
from icon_nephi.space.sampling import Patches, draw_points


def centre_of_mass(image: Tensor, geometry: Geometry) -> Tensor:
    """``[d]`` float64 millimetres: the centroid of non-negative weights on a grid."""
    weights = image[0, 0].double()
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


def search(
    image_A: Tensor,
    image_B: Tensor,
    geometry_A: Geometry,
    geometry_B: Geometry,
    starts: Sequence[Tensor],
    *,
    angles: Sequence[float],
    mask_B: Tensor | None = None,
    count: int = 3000,
    score: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    options: FitOptions | None = None,
) -> Tensor:
    """The best of many rigid maps of smooth images, by correlation at random points.

    Tries rotations by the angles (degrees, about every axis) about every start's centre
    with translations on a lattice, refined twice around the best; samples outside the
    moving image count against a map by the share that is missing. Once the time of the
    options is over it is the best of the starts and of what was tried.

    In place of correlation a ``score`` may be taken of moved values ``[C, K, N]`` under
    K maps, fixed values ``[C, 1, N]`` and in-bounds tags ``[K, N]``: ``[C, K]``.
    """
    d = geometry_B.dimension
    rows = draw_points(
        count, 1, d, mask=mask_B, generator=generator, dtype=image_B.dtype
    )
    target = sample_image(image_B, points_as_grid(rows))[0].flatten(1)
    points = apply_affine(geometry_B.unit_to_physical(), rows[0].double())
    to_unit = geometry_A.physical_to_unit()
    centre = points.mean(0)
    agreement = score or _weighted_ncc
    on_core = score is None and arrays.suit(image_A, image_B)

    def rate(matrices: Tensor) -> Tensor:
        if on_core:
            to_centre = identity(d)
            to_centre[:d, d] = centre
            maps = (to_unit @ matrices @ to_centre)[:, :d]
            return arrays.rate(maps, points - centre, target, image_A)
        linear = matrices[:, :d, :d]
        moved = points @ linear.mT + matrices[:, None, :d, d]
        x = apply_affine(to_unit, moved).to(rows.dtype)
        at = points_as_grid(x.reshape(1, -1, d))
        values = sample_image(image_A, at)[0].unflatten(1, (len(matrices), -1))
        values = values.flatten(2)
        weight = inside(at)[0, 0].reshape(len(matrices), -1).to(values.dtype)
        agreed = agreement(values, target[:, None], weight).mean(0)
        return agreed * weight.mean(1).sqrt()

    extent, around = max(geometry_B.extent), [*starts]
    for reach, steps, turns in (
        (0.25, 3, angles),
        (0.06, 2, (-6.0, 0.0, 6.0)),
        (0.02, 2, (-2.0, 0.0, 2.0)),
    ):
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
    count: int = 200,
    size: int = 3,
    learning_rate: float = 0.01,
    generator: torch.Generator | None = None,
    options: FitOptions | None = None,
) -> Tensor:
    """The affine matrix that aligns blocks best, both directions, from a start.

    Adam takes so many steps at each stride (millimetres between the samples of a block,
    coarse to fine); one of 0.01 shears by 0.01 and shifts by 0.01 half extents. Once
    the time of the options is over it is what was reached.
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
        scaled = torch.cat([change[:, :d], change[:, d:] * half], 1)
        delta = torch.cat([scaled, scaled.new_zeros(1, d + 1)]) + identity(d)
        moved: Tensor = start @ centre @ delta @ torch.linalg.inv(centre)
        return moved

    on_core = compiled.agreement_of(similarity, image_A, image_B)
    for stride in strides:
        for _ in range(steps):
            if options is not None and options.late:
                return current().detach()
            matrix = in_unit_boxes(current(), geometry_B, geometry_A).to(image_B.dtype)
            loss = torch.zeros((), dtype=image_B.dtype)
            for fixed, moving, geometry, mask, m in (
                (image_B, image_A, geometry_B, mask_B, matrix),
                (image_A, image_B, geometry_A, mask_A, torch.linalg.inv(matrix)),
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
                loss = loss + compare(similarity, moved, x, moving, fixed, blocks)
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


def identity(d: int) -> Tensor:
    """The affine map that moves nothing, homogeneous."""
    return torch.eye(d + 1, dtype=torch.float64)


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
) -> Tensor:
    """The affine map in the physical frame, by search and then by refinement."""
    d = images.geometry_B.dimension
    starts = [
        identity(d),
        _between(images.geometry_A, images.geometry_B, None, None),
        _between(images.geometry_A, images.geometry_B, images.where_A, images.where_B),
    ]
    best = search(
        *images.blurred(2.7),
        *images.geometries,
        starts,
        angles=range(-180, 180, 15) if d == 2 else (),
        mask_B=images.where_B.cpu() if images.masked else None,
        count=2000,
        score=MutualInformation(16).counted if choice.contrast else None,
        generator=generator,
        options=options,
    )
    return refine(
        *images.blurred(2.0),
        *images.geometries,
        best,
        strides=(12 * images.unit, 6 * images.unit),
        steps=50,
        similarity=choice.alone,
        mask_A=images.where_A.cpu(),
        mask_B=images.where_B.cpu(),
        generator=generator,
        options=options,
    )
