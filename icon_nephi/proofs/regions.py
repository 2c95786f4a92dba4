"""Where a proof is asked for: a box, or the voxels of a mask."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from icon_nephi.space.frames import apply_affine


class Region:
    """A part of space: a box in some frame, or the voxels of a mask there.

    Args:
        frame: homogeneous ``[d + 1, d + 1]`` float64: the unit box of psi -> the frame
            in which the region is the unit box.
        mask: boolean ``[*grid]`` over that unit box, or None: all of it.
    """

    def __init__(self, frame: Tensor, mask: Tensor | None = None) -> None:
        self.frame, self.mask = frame, mask
        if mask is not None:
            # Voxels below every corner of the grid: boxes of voxels are counted by it.
            self.below = torch.zeros([n + 1 for n in mask.shape], dtype=torch.int64)
            self.below[tuple(slice(1, None) for _ in mask.shape)] = mask.long()
            for axis in range(mask.dim()):
                self.below = self.below.cumsum(axis)

    def span(self) -> tuple[Tensor, Tensor]:
        """Return the lowest and highest coordinates ``[d]`` in psi's frame."""
        d = len(self.frame) - 1
        ends = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * d)
        placed = apply_affine(torch.linalg.inv(self.frame), ends)
        # The unit box itself has exact ends; others are rounded outwards.
        own = torch.equal(self.frame, torch.eye(d + 1, dtype=torch.float64))
        slack = 0.0 if own else 1e-9
        return placed.amin(0) - slack, placed.amax(0) + slack

    def holds(self, points: Tensor) -> Tensor:
        """Return which points ``[N, d]`` lie in the region."""
        places = apply_affine(self.frame, points)
        inside = ((places >= 0) & (places <= 1)).all(1)
        if self.mask is None:
            return inside
        last = torch.tensor(self.mask.shape) - 1
        voxel = (places.clamp(0, 1) * last).round().long()
        return inside & self.mask[tuple(voxel.T)]

    def meets(self, low: Tensor, high: Tensor) -> Tensor:
        """Return which boxes ``[N]`` may meet the region, all that do among them."""
        d = low.shape[1]
        centre = apply_affine(self.frame, (low + high) / 2)
        half = (high - low) / 2 @ self.frame[:d, :d].abs().T + 1e-9
        first, final = centre - half, centre + half
        inside = ((final >= 0) & (first <= 1)).all(1)
        if self.mask is None:
            return inside
        size = torch.tensor(self.mask.shape)
        # A voxel's cell reaches half a voxel to either side.
        ends = (first.clamp(0, 1), final.clamp(0, 1))
        start, stop = ((e * (size - 1) + 0.5).floor().long() for e in ends)
        start, stop = start.minimum(size - 1), (stop + 1).minimum(size)
        voxels = torch.zeros(len(low), dtype=torch.int64)
        for corner in itertools.product((0, 1), repeat=d):
            at = tuple((start, stop)[end][:, a] for a, end in enumerate(corner))
            voxels += (-1) ** (d - sum(corner)) * self.below[at]
        return inside & (voxels > 0)
