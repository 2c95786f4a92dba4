"""What keeps maps regular: terms of a loss, from the values and Jacobians of maps."""

from __future__ import annotations

import torch
from torch import Tensor

from icon_nephi.losses.similarities import PatchNCC as PatchNCC
from icon_nephi.maps.jacobians import determinants
from icon_nephi.maps.transforms import Map, value_and_jacobian


def inverse_consistency_term(
    then: Map,
    points: Tensor,
    moved: Tensor,
    jacobian: Tensor,
    extent: Tensor | None = None,
) -> Tensor:
    """Gradient inverse consistency of a map, and ``then`` another.

    The first took points ``[B, d, *any]``, ICON frame, to where they moved, with that
    Jacobian ``[B, d, d, *any]``. With an extent, ``[d]`` millimetres per unit along
    each axis, Jacobians are physical ones, so anisotropic boxes are treated alike on
    every axis.
    """
    _, outer = value_and_jacobian(then, moved)
    return from_identity(torch.einsum("bij...,bjk...->bik...", outer, jacobian), extent)


def diffusion_term(
    then: Map,
    points: Tensor,
    moved: Tensor,
    jacobian: Tensor,
    extent: Tensor | None = None,
) -> Tensor:
    """Mean of |D phi - I|_F^2 / d of the first map alone (the paper's baseline)."""
    return from_identity(jacobian, extent)


def no_term(
    then: Map,
    points: Tensor,
    moved: Tensor,
    jacobian: Tensor,
    extent: Tensor | None = None,
) -> Tensor:
    """Zero: registration by similarity and prior alone (the paper's baseline)."""
    return moved.new_zeros(())


def from_identity(jacobian: Tensor, extent: Tensor | None) -> Tensor:
    """Mean of |J - I|_F^2 / d of Jacobians ``[B, d, d, *any]``."""
    d = jacobian.shape[1]
    identity = torch.eye(d, dtype=jacobian.dtype, device=jacobian.device)
    error = jacobian.flatten(3) - identity[:, :, None]
    if extent is not None:
        error = error * (extent[:, None] / extent)[:, :, None].to(error)
    return error.square().sum((1, 2)).mean() / d


# Determinants below this share of the usual one are pushed up.
GUARD = 0.25


def guarded_term(
    then: Map,
    points: Tensor,
    moved: Tensor,
    jacobian: Tensor,
    extent: Tensor,
    consistency: float = 300.0,
    weight: float = 1.0,
) -> Tensor:
    """Gradient inverse consistency, and two small terms that one pair needs.

    Where the images show nothing, gradients leave a constant shift between the two
    maps free: the weak inverse consistency of the values (squared, in largest extents
    of the box) holds it. The hinge pushes up determinants near folding.
    """
    values, outer = value_and_jacobian(then, moved)
    both = torch.einsum("bij...,bjk...->bik...", outer, jacobian)
    scale = (extent / extent.max()).to(points).reshape(-1, *(1,) * (points.dim() - 2))
    drift = ((values - points) * scale).square().sum(1).mean()
    return from_identity(both, extent) + consistency * drift + weight * hinge(jacobian)


def relative_determinant(jacobian: Tensor) -> Tensor:
    """det J of ``[B, d, d, *any]``, flat, over the map's usual one.

    Relative, because the affine part has a volume change (and a sign) of its own.
    """
    determinant = determinants(jacobian).flatten()
    usual = determinant.detach().median()
    flat = usual.abs() < 1e-6
    return determinant / torch.where(flat, torch.ones_like(usual), usual)


def hinge(jacobian: Tensor, goal: float = GUARD) -> Tensor:
    """Scalar: mean square of what relative determinants lack to a goal."""
    return (goal - relative_determinant(jacobian)).clamp(min=0).square().mean()
