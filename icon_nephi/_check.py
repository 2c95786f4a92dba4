"""Refuse wrong input at the door, in one sentence a user can act on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_image(name: str, image: Tensor) -> None:
    """Nothing, or a ValueError: an image is ``[B, C, *grid]`` with 2 or 3 axes.

    Every axis needs two voxels, because the unit box puts voxel i at i / (n - 1).
    """
    if not isinstance(image, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor [B, C, *grid], got {type(image).__name__}"
        )
    if image.dim() not in (4, 5):
        raise ValueError(
            f"{name} must be [B, C, H, W] or [B, C, D, H, W], got shape "
            f"{tuple(image.shape)}; add the missing axes with image[None, None]"
        )
    if image.numel() and min(image.shape[2:]) < 2:
        raise ValueError(
            f"{name} has shape {tuple(image.shape)}: an axis with one voxel has no "
            "extent; drop that axis and register in 2D"
        )
    if not image.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {image.dtype}; call {name}.float()"
        )


def check_intensities(name: str, image: Tensor) -> None:
    """Nothing, or a ValueError: finite intensities that are not all the same."""
    bad = int((~image.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name} has {bad} NaN or infinite voxels; replace them before registering"
        )
    if image.numel() and bool(image.max() == image.min()):
        raise ValueError(
            f"{name} is constant ({float(image.flatten()[0]):g} everywhere): there is "
            "nothing to align; check that the right file was read"
        )


def check_mask(name: str, mask: Tensor, shape: Sequence[int]) -> None:
    """Nothing, or a ValueError: a mask on its image's grid with a voxel inside."""
    if tuple(mask.shape[2:]) != tuple(shape):
        raise ValueError(
            f"{name} has grid {tuple(mask.shape[2:])} but its image has "
            f"{tuple(shape)}; resample the mask to the image"
        )
    if not bool((mask > 0).any()):
        raise ValueError(
            f"{name} is empty: no voxel is above zero; leave it out to use all of "
            "the image"
        )


def check_both(name: str, of_A: object, of_B: object) -> None:
    """Nothing, or a ValueError: one of two that only serve together is missing."""
    if (of_A is None) != (of_B is None):
        given, missing = "AB" if of_B is None else "BA"
        raise ValueError(
            f"{name}_{missing} is missing but {name}_{given} was given; pass both or "
            "neither"
        )


def check_coordinates(name: str, coordinates: Tensor, dimension: int) -> None:
    """Nothing, or a ValueError: coordinates are ``[B, d, *any]`` in the ICON frame."""
    if coordinates.dim() < 3 or coordinates.shape[1] != dimension:
        raise ValueError(
            f"{name} must be [B, {dimension}, *any] in the unit box, got shape "
            f"{tuple(coordinates.shape)}"
        )
