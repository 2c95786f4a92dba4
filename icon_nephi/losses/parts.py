"""What a map has to do at some places, beside images: landmarks, parts that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icon_nephi.maps.jacobians import determinants
from icon_nephi.maps.transforms import Map, value_and_jacobian
from icon_nephi.space.frames import points_as_grid, to_rows

# Weights of the mean squares of: landmarks' distances in expected errors, what differs
# from a rigid map in 1/160 of the box, and relative changes of volume.
LANDMARKS, RIGID, VOLUME = 0.3, 30.0, 300.0


@dataclass(frozen=True)
class Parts:
    """Places of one pair, and what is asked of its maps there; a term of the loss.

    Attributes:
        landmarks_B: rows ``[N, d]`` in the fixed unit box.
        landmarks_A: where phi_AB should take them, in the moving one.
        error: of landmarks, in 1/160 of the fixed image's longest side.
        rigid: rows ``[M, d]`` of each part that phi_AB only shifts and turns.
        volume: rows ``[V, d]`` where it keeps volumes.
        sides: ``[2, d]``: of the boxes of A and of B, in the unit of the error.
    """

    landmarks_B: Tensor
    landmarks_A: Tensor
    error: float
    rigid: Sequence[Tensor]
    volume: Tensor
    sides: Tensor

    def on(self, device: torch.device | str) -> Parts:
        """The same on a device."""
        return Parts(
            self.landmarks_B.to(device),
            self.landmarks_A.to(device),
            self.error,
            [rows.to(device) for rows in self.rigid],
            self.volume.to(device),
            self.sides.to(device),
        )

    def places(self, side: int) -> Tensor:
        """Rows where phi_AB (0) or phi_BA (1) is looked at."""
        if side == 1:
            return self.landmarks_A
        return torch.cat([self.landmarks_B, *self.rigid, self.volume])

    def of_map(self, side: int, moved: Tensor, jacobian: Tensor) -> Tensor:
        """Scalar, of rows ``[P, d]`` and Jacobians ``[P, d, d]`` at `places`."""
        count = len(self.landmarks_B)
        there, here = self.sides[side], self.sides[1 - side]
        total = moved.new_zeros(())
        if count:
            ends = self.landmarks_A if side == 0 else self.landmarks_B
            away = (moved[:count] - ends) * there / self.error
            total = total + LANDMARKS * away.square().sum(1).mean()
        if side == 1:
            return total
        for rows in self.rigid:
            ends = moved[count : count + len(rows)]
            total = total + RIGID * unlike_rigid(rows * here, ends * there)
            count += len(rows)
        if len(self.volume):
            grid = jacobian[count:].permute(1, 2, 0)[None]
            change = determinants(grid).abs() * (there / here).prod()
            total = total + VOLUME * (change - 1).square().mean()
        return total

    def __call__(self, phi_AB: Map, phi_BA: Map) -> Tensor:
        """Scalar, of both maps."""
        total = self.sides.new_zeros(())
        for side, phi in enumerate((phi_AB, phi_BA)):
            rows = self.places(side)
            if len(rows):
                moved, jacobian = value_and_jacobian(phi, points_as_grid(rows[None]))
                slopes = jacobian.flatten(3)[0].permute(2, 0, 1)
                total = total + self.of_map(side, to_rows(moved)[0], slopes)
        return total


def unlike_rigid(points: Tensor, moved: Tensor) -> Tensor:
    """Mean square of what is left after the best turn and shift of ``[M, d]``."""
    turned = points @ best_turn(points, moved.detach())
    away = moved - moved.mean(0) - (turned - turned.mean(0))
    return away.square().sum(1).mean()


def best_turn(points: Tensor, moved: Tensor) -> Tensor:
    """``[d, d]``, from the right: of points onto others, about their means (Kabsch)."""
    a, b = points - points.mean(0), moved - moved.mean(0)
    left, _, right = torch.linalg.svd((a.mT @ b).double())
    turn: Tensor = (left @ right).to(points)
    return turn
