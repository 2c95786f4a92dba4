"""The inverse of a map, to as many digits as one wants: Newton's method."""

from __future__ import annotations

import torch
from torch import Tensor

from icon_nephi.maps.transforms import Composed, Map, value_and_jacobian

# Steps of Newton's method. From a guess that is off by e one leaves about e^2: from a
# tenth of a voxel three leave nothing.
STEPS = 3


class Inverse(Composed):
    """phi^-1, near a map that is about that.

    Args:
        phi: a map with Jacobians, ICON frame.
        guess: about its inverse.
        steps: of Newton's method. A step that does not come nearer is not taken, so it
            is never farther off than the guess.
    """

    def __init__(self, phi: Map, guess: Map, steps: int = STEPS) -> None:
        self.phi, self.guess, self.steps = phi, guess, steps

    def __call__(self, coordinates: Tensor) -> Tensor:
        """phi^-1 of ICON-frame coordinates ``[B, d, *any]``; no gradients."""
        return self._solved(coordinates)[0]

    def value_and_jacobian(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Both; the Jacobian is the inverse of phi's, there."""
        place, jacobian = self._solved(coordinates)
        matrices = jacobian.movedim((1, 2), (-2, -1))
        inverse = torch.linalg.inv_ex(matrices).inverse
        return place, inverse.movedim((-2, -1), (1, 2))

    @torch.no_grad()
    def _solved(self, goal: Tensor) -> tuple[Tensor, Tensor]:
        """x with phi(x) = goal, and phi's Jacobian there."""
        x = self.guess(goal)
        value, jacobian = value_and_jacobian(self.phi, x)
        for _ in range(self.steps):
            missed = (value - goal).movedim(1, -1)[..., None]
            matrices = jacobian.movedim((1, 2), (-2, -1))
            step = torch.linalg.solve_ex(matrices, missed).result[..., 0]
            tried = x - step.movedim(-1, 1)
            there, slopes = value_and_jacobian(self.phi, tried)
            near = (there - goal).square().sum(1, keepdim=True)
            better = near < (value - goal).square().sum(1, keepdim=True)
            x, value = torch.where(better, tried, x), torch.where(better, there, value)
            jacobian = torch.where(better[:, None], slopes, jacobian)
        return x, jacobian
