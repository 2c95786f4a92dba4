"""Keep the maps of one pair free of folds: while they are fitted, and after."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from icon_nephi.blocks import determinants
from icon_nephi.coordinates import points_as_grid
from icon_nephi.losses import from_identity
from icon_nephi.sampling import draw_points
from icon_nephi.transforms import Map, value_and_jacobian

# Determinants below this share of the usual one are pushed up.
GUARD = 0.25
# After the optimisation: points looked at, and what counts as nearly folded.
UNFOLD_POINTS, UNFOLD_BELOW, UNFOLD_KEPT = 100_000, 0.08, 2000
UNFOLD_ROUNDS, UNFOLD_STEPS = 8, 40


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
    total: Tensor = (
        from_identity(both, extent) + consistency * drift + weight * hinge(jacobian)
    )
    return total


def relative_determinant(jacobian: Tensor) -> Tensor:
    """det J of ``[B, d, d, *any]``, flat, over the map's usual one.

    Relative, because the affine part has a volume change (and a sign) of its own.
    """
    determinant = determinants(jacobian).flatten()
    usual = determinant.detach().median()
    result: Tensor = determinant / torch.where(
        usual.abs() < 1e-6, torch.ones_like(usual), usual
    )
    return result


def hinge(jacobian: Tensor, goal: float = GUARD) -> Tensor:
    """Scalar: mean square of what relative determinants lack to a goal."""
    lacking: Tensor = (goal - relative_determinant(jacobian)).clamp(min=0)
    return lacking.square().mean()


def unfold(
    pair: nn.Module,
    codes: Iterable[nn.Parameter],
    image_A: Tensor,
    image_B: Tensor,
    *,
    rate: float,
    generator: torch.Generator,
) -> None:
    """Look for folds at many points, and push up the determinants found.

    Args:
        pair: returns (phi_AB, phi_BA).
        codes: its codes; only they move, and only around the folds.
        image_A: what the pair is called with.
        image_B: the same.
        rate: Adam's learning rate.
        generator: source of the points.
    """
    optimizer = torch.optim.Adam(codes, lr=rate)
    d = image_B.dim() - 2
    folded = [torch.zeros(1, 0, d)] * 2
    for _ in range(UNFOLD_ROUNDS):
        clean = True
        with torch.no_grad():
            for side, phi in enumerate(pair(image_A, image_B)):
                rows = draw_points(UNFOLD_POINTS, 1, d, generator=generator)
                at = points_as_grid(rows.to(image_B))
                margin = relative_determinant(value_and_jacobian(phi, at)[1])
                bad = rows[:, (margin < UNFOLD_BELOW).cpu()]
                clean = clean and bad.shape[1] == 0
                folded[side] = torch.cat([folded[side], bad], 1)[:, -UNFOLD_KEPT:]
        if clean:
            return
        for _ in range(UNFOLD_STEPS):
            total = image_B.new_zeros(())
            for phi, rows in zip(pair(image_A, image_B), folded, strict=True):
                # With others around, which say what a usual determinant is.
                jitter = torch.randn(rows.shape, generator=generator)
                near = (rows + 0.003 * jitter).clamp(0, 1)
                others = draw_points(rows.shape[1] + 50, 1, d, generator=generator)
                at = points_as_grid(torch.cat([near, others], 1).to(total))
                slopes = value_and_jacobian(phi, at)[1]
                total = total + hinge(slopes, 2 * UNFOLD_BELOW)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
