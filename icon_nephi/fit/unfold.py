"""Repair the maps of one pair where they fold, after they were fitted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from icon_nephi.fit.adam import Adam
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.losses.regularity import hinge, relative_determinant
from icon_nephi.maps.transforms import value_and_jacobian
from icon_nephi.space.frames import points_as_grid
from icon_nephi.space.sampling import draw_points

# After the optimisation: points looked at, and what counts as nearly folded.
UNFOLD_POINTS, UNFOLD_BELOW, UNFOLD_KEPT = 100_000, 0.08, 2000
UNFOLD_ROUNDS, UNFOLD_STEPS = 8, 40


def unfold(
    pair: nn.Module,
    codes: Iterable[nn.Parameter],
    image_A: Tensor,
    image_B: Tensor,
    *,
    rate: float,
    generator: torch.Generator,
    options: FitOptions | None = None,
) -> None:
    """Look for folds at many points, and push up the determinants found.

    Only the codes of the pair move, by Adam at that rate, and only around the folds.
    Once the time of the options is over, no further round is begun.
    """
    optimizer = Adam([{"params": codes, "lr": rate}])
    d = image_B.dim() - 2
    folded = [torch.zeros(1, 0, d)] * 2
    for round_ in range(UNFOLD_ROUNDS):
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
        if options is not None and options.late and round_:
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
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
