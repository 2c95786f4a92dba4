"""The map as grids for other libraries: torch's `grid_sample` and MONAI's `Warp`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from icon_nephi.io.image_input import place_of
from icon_nephi.maps.framed import over_grid
from icon_nephi.maps.two_way import FIXED_TO_MOVING, opposite
from icon_nephi.registration.result import Registration
from icon_nephi.space.frames import Geometry, apply_affine


def sampling_grid(
    result: Registration,
    image: Any = None,
    reference: Any = None,
    direction: str = FIXED_TO_MOVING,
    *,
    align_corners: bool = True,
) -> Tensor:
    """Return ``[1, *grid, d]`` float32: where `grid_sample` reads a moving-space image.

    The last axis is x, y(, z), the reverse of the tensor axes. With corners aligned -1
    and 1 are the centres of the first and the last voxel of the image that is read,
    else the outer edges of these voxels; tell `grid_sample` the same.

    Args:
        result: of `icon_nephi.register`.
        image: what is read, ITK image or tensor as registered; only where it lies
            counts. Default: on the registered moving image's grid.
        reference: whose grid the result has, default: the fixed image.
        direction: ``"moving_to_fixed"`` exchanges moving and fixed in all of this.
        align_corners: as of `torch.nn.functional.grid_sample`.

    Raises:
        TypeError: an image or reference of another kind than was registered.
        ValueError: of another dimension, or an unknown direction.
    """
    target = _place("image", image, result, opposite(direction))
    edge = [1.0 if align_corners else 1 - 1 / n for n in target.itk_size]
    steps = zip(edge, target.itk_size, strict=True)
    square = replace(  # grid_sample's frame is a place like any other
        Geometry.unit(target.size),
        spacing=tuple(2 * e / (n - 1) for e, n in steps),
        origin=tuple(-e for e in edge),
    )
    return _mapped(result, target, square.unit_to_physical(), reference, direction)


def monai_ddf(
    result: Registration,
    image: Any = None,
    reference: Any = None,
    direction: str = FIXED_TO_MOVING,
) -> Tensor:
    """Return ``[1, d, *grid]`` float32 for `monai.networks.blocks.Warp`.

    Displacements: channel c belongs to tensor axis c; the unit is a voxel. Voxel i of
    the result is read from the image at voxel i + ddf. Arguments as of `sampling_grid`;
    MONAI wants the image to have the result's shape.

    Raises:
        TypeError: as `sampling_grid`.
        ValueError: as `sampling_grid`, or image and result differ in shape.
    """
    target = _place("image", image, result, opposite(direction))
    source = _place("reference", reference, result, direction)
    if source.size != target.size:
        raise ValueError(
            f"MONAI's Warp needs images of one shape, but the result's is {source.size}"
            f" and the image's {target.size}; resample one of them onto the other's "
            "grid and pass it as image or reference"
        )
    steps = torch.tensor([n - 1.0 for n in target.size] + [1.0]).double().diag()
    there = _mapped(result, target, steps, reference, direction).movedim(-1, 1)
    axes = [torch.arange(n, dtype=there.dtype) for n in source.size]
    here = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return (there - here).float().contiguous()


def _place(name: str, image: Any, result: Registration, direction: str) -> Geometry:
    """Return where an image lies, by default the one in which a direction starts."""
    own = result.two_way.place(direction)
    if image is None:
        return own
    return place_of(name, image, itk=result.itk, dimension=own.dimension)


def _mapped(
    result: Registration, target: Geometry, out: Tensor, reference: Any, direction: str
) -> Tensor:
    """Return ``[1, *grid, d]``: mapped voxel centres, by ``out`` from the unit box."""
    two_way, source = result.two_way, _place("reference", reference, result, direction)
    matrix = out @ torch.linalg.inv(two_way.frame_of(target))
    mapped = two_way.framed(direction)
    places = over_grid(
        lambda p: apply_affine(matrix, torch.from_numpy(mapped(p))).numpy(),
        *two_way.grid(direction, source),
        source.dimension,
    )
    return torch.from_numpy(places)[None]
