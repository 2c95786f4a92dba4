"""What else a person knows of a pair, or asks of its map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from icon_nephi.fit.search import identity
from icon_nephi.fit.settings import Settings
from icon_nephi.losses.parts import Parts
from icon_nephi.space.frames import Geometry, apply_affine, other_order

# Places looked at in each part; parts of fewer voxels are parts of something.
PLACES, SMALLEST = 400, 8


@dataclass(frozen=True)
class Wishes:
    """What else a fit goes by; the physical frame is that of the images.

    Attributes:
        initial: ``[d + 1, d + 1]``, fixed -> moving millimetres: where it starts.
        landmarks: fixed and moving ``[N, d]`` float64 millimetres, laid on each other.
        landmark_error: of those, in millimetres.
        rigid: labels ``[1, 1, *grid]`` of image_B: each is moved as one rigid body;
            of one label each piece is.
        volume: above zero where image_B keeps its volume.
        restrict: along which of image_B's axes i, j(, k) anything moves; None: all.
        stiffness: 2: the map bends half as quickly from place to place.
        notes: what was done with them, in words.
        begin: with what the deformation begins, see `icon_nephi.fit.learned`.
    """

    initial: Tensor | None = None
    landmarks: tuple[Tensor, Tensor] | None = None
    landmark_error: float = 1.0
    rigid: Tensor | None = None
    volume: Tensor | None = None
    restrict: Sequence[bool] | None = None
    stiffness: float = 1.0
    notes: tuple[str, ...] = ()
    begin: str = "scratch"

    @property
    def beginning(self) -> str:
        """That, from scratch where "auto" cannot see what else is asked for.

        Raises:
            ValueError: "learned", and nothing may move along an axis.
        """
        if self.begin == "learned" and self.still:
            raise ValueError(
                "start='learned' moves things along every axis: with restrict pass "
                "start='scratch'"
            )
        asked = self.binding or self.stiffness != 1
        return "scratch" if self.begin == "auto" and asked else self.begin

    @property
    def start(self) -> Tensor | None:
        """The initial transform, or what landmarks say: a rigid map, or a shift."""
        if self.initial is not None or self.landmarks is None:
            return self.initial
        fixed, moving = self.landmarks
        d = fixed.shape[1]
        turn = torch.eye(d, dtype=torch.float64)
        if len(fixed) >= d:
            turn = _turn(fixed, moving)
        matrix = identity(d)
        matrix[:d, :d] = turn
        matrix[:d, d] = moving.mean(0) - turn @ fixed.mean(0)
        return matrix

    @property
    def binding(self) -> bool:
        """Whether anything is asked for that images do not show."""
        asked = self.initial, self.landmarks, self.rigid, self.volume, self.restrict
        return any(wish is not None for wish in asked)

    @property
    def plain(self) -> bool:
        """Whether nothing is asked for within the fit itself."""
        asked = self.landmarks, self.rigid, self.volume, self.restrict
        return all(wish is None for wish in asked)

    @property
    def still(self) -> tuple[int, ...]:
        """Tensor axes along which nothing moves."""
        if self.restrict is None:
            return ()
        return tuple(
            a for a, moves in enumerate(other_order(self.restrict)) if not moves
        )

    def suited(self, settings: Settings) -> Settings:
        """The settings with as many nodes as the stiffness leaves."""
        if self.stiffness == 1:
            return settings
        grids = tuple(max(4, round(n / self.stiffness)) for n in settings.grids)
        how = settings.lattices
        if how is not None:
            flat, solid = (self.stiffness * apart for apart in how.apart)
            how = replace(how, apart=(flat, solid))
        return replace(settings, grids=grids, lattices=how)

    def parts(
        self,
        place_A: Geometry,
        place_B: Geometry,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> Parts | None:
        """The term of the loss that these make, if any does."""
        generator = torch.Generator().manual_seed(seed)
        d, unit = place_B.dimension, max(place_B.extent) / 160
        if self.landmarks is None and self.rigid is None and self.volume is None:
            return None
        fixed = moving = torch.zeros(0, d, dtype=torch.float64)
        if self.landmarks is not None:
            fixed, moving = self.landmarks
        sides = torch.tensor([place_A.extent, place_B.extent]) / unit
        parts = Parts(
            apply_affine(place_B.physical_to_unit(), fixed).float(),
            apply_affine(place_A.physical_to_unit(), moving).float(),
            self.landmark_error / unit,
            [] if self.rigid is None else _bodies(self.rigid, generator),
            torch.zeros(0, d)
            if self.volume is None
            else _places(self.volume[0, 0] > 0, generator),
            sides,
        )
        return parts.on(device)

    def hold(self, net: Any) -> None:
        """See that the fields of a `NePhi` move nothing along `still`."""
        for last in (net.field_AB.last, net.field_BA.last) if self.still else ():
            for weight in last.parameters():
                weight.register_hook(partial(_without, axes=self.still))


def _turn(fixed: Tensor, moving: Tensor) -> Tensor:
    """The best rotation that is no mirror."""
    a, b = fixed - fixed.mean(0), moving - moving.mean(0)
    left, _, right = torch.linalg.svd(a.mT @ b)
    sign = torch.ones(len(left), dtype=left.dtype)
    sign[-1] = torch.linalg.det(left @ right).sign()
    turn: Tensor = (left * sign @ right).mT
    return turn


def _bodies(labels: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Places in each label, or in each piece of the only one."""
    grid = labels[0, 0].cpu()
    if len(grid[grid > 0].unique()) == 1:
        from scipy import ndimage  # slow to import

        grid = torch.from_numpy(ndimage.label(grid.numpy() > 0)[0])
    parts = [grid == number for number in grid[grid > 0].unique().tolist()]
    return [_places(p, generator) for p in parts if int(p.sum()) >= SMALLEST]


def _places(where: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of some of the voxels, all of them where there are few."""
    voxels = where.cpu().nonzero()
    chosen = torch.randperm(len(voxels), generator=generator)[:PLACES]
    return voxels[chosen] / (torch.tensor(where.shape) - 1)


def _without(gradient: Tensor, axes: Sequence[int]) -> Tensor:
    """The gradient of a field's last layer by all but these axes."""
    at = torch.tensor(axes, device=gradient.device)
    return gradient.index_fill(0, at, 0.0)
