"""Refuse wrong input at the door, in one sentence a user can act on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def check_shape(name: str, shape: torch.Size) -> None:
    """Raise a ValueError unless a shape is ``[B, C, *grid]`` with 2 or 3 axes.

    Every axis needs two voxels, because the unit box puts voxel i at i / (n - 1).
    """
    if len(shape) not in (4, 5):
        raise ValueError(
            f"{name} must be [B, C, H, W] or [B, C, D, H, W], got shape "
            f"{tuple(shape)}; add the missing axes with image[None, None]"
        )
    if shape.numel() and min(shape[2:]) < 2:
        raise ValueError(
            f"{name} has shape {tuple(shape)}: an axis with one voxel has no extent; "
            "drop that axis and register in 2D"
        )


def check_image(name: str, image: Tensor) -> None:
    """Raise unless an image is floating point of a shape as in `check_shape`."""
    if not isinstance(image, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor [B, C, *grid], got {type(image).__name__}"
        )
    check_shape(name, image.shape)
    if not image.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {image.dtype}; call {name}.float()"
        )


def check_grid(name: str, values: Tensor, shape: Sequence[int]) -> None:
    """Raise a ValueError unless ``[B, C, *grid]`` is on its image's grid."""
    if tuple(values.shape[2:]) != tuple(shape):
        raise ValueError(
            f"{name} has grid {tuple(values.shape[2:])} but its image has "
            f"{tuple(shape)}; resample it to the image"
        )


def check_mask(name: str, mask: Tensor, shape: Sequence[int]) -> None:
    """Raise a ValueError unless a mask is on its image's grid with a voxel inside."""
    check_grid(name, mask, shape)
    if not bool((mask > 0).any()):
        raise ValueError(
            f"{name} is empty: no voxel is above zero in its image; leave it out to "
            "use all of the image"
        )


def check_mask_numbers(name: str, values: npt.NDArray[Any]) -> None:
    """Raise a ValueError unless an array may be a mask: 0, 1, shares, label numbers."""
    if (
        not np.isfinite(values).all()
        or values.min() < 0
        or (values[values > 1] % 1).any()
    ):
        raise ValueError(
            f"{name} does not look like a mask: it holds negative numbers or fractions "
            "above 1; were image and mask swapped?"
        )


def check_labels(
    name: str, values: npt.NDArray[Any], least: float = -np.inf
) -> npt.NDArray[Any]:
    """Return label numbers as they are, or as integers if they were floats.

    Raises:
        ValueError: numbers that are not whole or below the least.
    """
    odd = values[
        ~(np.isfinite(values) & (values == np.round(values)) & (values >= least))
    ]
    if odd.size:
        below = f" or below {least:g}" if np.isfinite(least) else ""
        raise ValueError(
            f"{name} holds {odd.size} numbers that are not whole{below}, such as "
            f"{odd.flat[0]:g}: it is not a label map; give the segmentation"
        )
    if values.dtype.kind in "iub":
        return values
    largest = np.abs(values).max(initial=0)
    if largest > 2**53:
        raise ValueError(
            f"{name} holds labels up to {largest:g}, which its numbers cannot tell "
            "apart; number them anew, below 2^53"
        )
    kinds = (np.int16, np.int32, np.int64)
    return values.astype(next(k for k in kinds if largest <= np.iinfo(k).max))


def check_dimension(
    name: str,
    dimension: int,
    other: str,
    expected: int,
    advice: str = "pass two 2D or two 3D ones",
) -> None:
    """Raise a ValueError unless something has as many axes as what ``other`` names."""
    if dimension != expected:
        raise ValueError(f"{name} is {dimension}D but {other} {expected}D; {advice}")


def check_both(name: str, of_A: object, of_B: object) -> None:
    """Raise a ValueError if one of two that only serve together is missing."""
    if (of_A is None) != (of_B is None):
        there, missing = "AB" if of_B is None else "BA"
        raise ValueError(
            f"{name}_{missing} is missing but {name}_{there} was given; pass both or "
            "neither"
        )


def check_coordinates(name: str, coordinates: Tensor, dimension: int) -> None:
    """Raise a ValueError unless coordinates are ``[B, d, *any]`` in the ICON frame."""
    if coordinates.dim() < 3 or coordinates.shape[1] != dimension:
        raise ValueError(
            f"{name} must be [B, {dimension}, *any] in the unit box, got shape "
            f"{tuple(coordinates.shape)}"
        )
