"""A pair compared at every node of a lattice, and what holds its two maps together.

Both maps are x + u(x) over the fixed image's unit box, u a quadratic spline whose
coefficients are the code: of a code ``[1, 2 d, *nodes]`` the first d channels are the
first map's, the others the second's. The first takes the fixed image's places to the
moving image's, behind an affine map; the second goes back. `DensePair.derive` runs on
the compiled core, where that is there, or else by autograd.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from icon_nephi.core import arrays, loading, threads
from icon_nephi.core.arrays import address
from icon_nephi.losses.regularity import GUARD
from icon_nephi.maps.transforms import MatrixTransform
from icon_nephi.space.frames import identity_map
from icon_nephi.space.images import sample_image
from icon_nephi.space.interpolation import along_axes, axis_matrix

# Strains, roughly, from which total variation counts as it is and not by its square.
_SMALL = 1e-2


class DenseLoss(NamedTuple):
    """What a code costs.

    Attributes:
        total: similarity + lmbda * regularity + tension * variation.
        similarity: 1 - local correlation, of both directions together.
        regularity: gradient inverse consistency, inverse consistency, guard.
        variation: of the displacements, total and isotropic.
        magnitude: mean squared displacement of the second map, unit box.
        folded: share of the places where a map folds, by differences.
    """

    total: float
    similarity: float
    regularity: float
    variation: float
    magnitude: float
    folded: float

    def entry(self) -> dict[str, float]:
        """The numbers, by the names that ICON's losses have."""
        return {
            "all_loss": self.total,
            "inverse_consistency_loss": self.regularity,
            "similarity_loss": self.similarity,
            "transform_magnitude": self.magnitude,
            "flips": self.folded,
        }


@dataclass(frozen=True)
class Side:
    """One direction: a moving image, and what its places are compared with.

    Attributes:
        moving: ``[1, C, *grid]``.
        to_moving: ``[d, d + 1]``, from the lattice's unit box to the moving image's.
        fixed: ``[1, C, *size]``, on the lattice.
        centres: ``[1, 1, *size]``: what the window around each place counts.
        samples: ``[1, 1, *size]``: what each place counts in windows; None: 1.
        reachable: ``[1, 1, *grid]``, 0 where the moving image is to be left out.
    """

    moving: Tensor
    to_moving: Tensor
    fixed: Tensor
    centres: Tensor
    samples: Tensor | None = None
    reachable: Tensor | None = None


@dataclass(frozen=True)
class DensePair:
    """Two images on a lattice over the fixed image's box.

    Attributes:
        sides: of both directions, on lattices of one size.
        between: places a side of the lattice where the maps are held together.
        extent: ``[d]`` millimetres of the box.
        radius: of the windows of local correlation, in places.
        squared: correlations are squared, for contrasts that may be inverted.
        floor: added to variances, see `PatchNCC`.
        shared: and to covariances.
        lmbda: weight of the regularity.
        drift: weight of inverse consistency, inside.
        hinge: weight of the guard, inside.
        tension: weight of the total variation.
    """

    sides: tuple[Side, Side]
    between: Sequence[int]
    extent: Tensor
    radius: int = 2
    squared: bool = False
    floor: float = 1e-3
    shared: bool = False
    lmbda: float = 1.0
    drift: float = 300.0
    hinge: float = 1.0
    tension: float = 0.0
    _memory: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def size(self) -> tuple[int, ...]:
        """Places a side of the lattice that is compared."""
        return tuple(self.sides[0].fixed.shape[2:])

    @property
    def scale(self) -> Tensor:
        """``[d]``: the code is in largest extents, this makes the unit box's of it."""
        return self.extent.amax() / self.extent

    def derive(self, code: Tensor) -> tuple[DenseLoss, Tensor]:
        """The loss of a code ``[1, 2 d, *nodes]``, and its gradient by it."""
        if not bool(code.isfinite().all()):  # no places to look at
            nothing = DenseLoss(*[math.nan] * 6)
            return nothing, torch.full_like(code, math.nan)
        images = [i for s in self.sides for i in (s.moving, s.fixed)]
        if arrays.suit(code.detach(), *images):
            return self._on_core(code.detach().contiguous())
        with torch.enable_grad():
            code = code.detach().requires_grad_()
            total, numbers = self.loss(code)
            (gradient,) = torch.autograd.grad(total, code)
        return DenseLoss(float(total.detach()), *numbers), gradient

    def loss(self, code: Tensor) -> tuple[Tensor, list[float]]:
        """The loss, differentiable by the code, and its parts: the reference."""
        size, d = self.size, len(self.size)
        moves = self.on_lattice(code, size)
        unlike = code.new_zeros(())
        for side, move in zip(self.sides, moves, strict=True):
            unlike = unlike + self._unlike(side, move)
        first, second = self.on_lattice(code, self.between)
        held = [self._held(first, second), self._held(second, first)]
        slopes, drift, hinge, variation, folded = (
            sum(parts) / 2 for parts in zip(*held, strict=True)
        )
        regular = slopes + self.drift * drift + self.hinge * hinge
        total = unlike + self.lmbda * regular + self.tension * variation
        magnitude = second.square().mean() * d
        parts = unlike, regular, variation, magnitude, folded
        return total, [float(x.detach()) for x in parts]

    def on_lattice(self, code: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``[1, d, *size]`` of both maps: their displacements, unit box."""
        d = len(size)
        reads = []
        for n, nodes in zip(size, code.shape[2:], strict=True):
            places = torch.linspace(0, 1, n, dtype=code.dtype, device=code.device)
            reads.append(axis_matrix(places, nodes))
        moves = along_axes(code, reads)
        scale = self.scale.to(moves).reshape(-1, *(1,) * d)
        return moves[:, :d] * scale, moves[:, d:] * scale

    def _unlike(self, side: Side, move: Tensor) -> Tensor:
        d = move.shape[1]
        at = identity_map(move.shape[2:], dtype=move.dtype, device=move.device) + move
        place = MatrixTransform(side.to_moving.to(move)[None])(at)
        inside = ((place >= -1e-6) & (place <= 1 + 1e-6)).all(1, keepdim=True)
        weight = inside.to(move)
        if side.reachable is not None:
            reachable = side.reachable.to(move)
            weight = weight * sample_image(reachable, place.detach(), mode="nearest")
        if side.samples is not None:
            weight = weight * side.samples.to(move)
        a, b = sample_image(side.moving.to(move), place), side.fixed.to(move)
        n = self._box(weight)
        count = n.clamp(min=1)
        means = [self._box(weight * i) / count for i in (a, b)]
        spread = [
            (self._box(weight * i * i) / count - m * m).clamp(min=0) + self.floor
            for i, m in zip((a, b), means, strict=True)
        ]
        both = self._box(weight * a * b) / count - means[0] * means[1]
        both = both + self.floor if self.shared else both
        found = both * (spread[0] * spread[1]).rsqrt()
        share = side.centres.to(move) * n / (2 * self.radius + 1) ** d
        share = share.expand_as(found)
        found = found.square() if self.squared else found
        agreement: Tensor = (share * found).sum() / share.sum().clamp(min=1)
        return 1 - agreement

    def _box(self, image: Tensor) -> Tensor:
        for axis in range(2, image.dim()):
            moved = image.movedim(axis, -1)
            ahead = F.pad(moved, (self.radius, self.radius))
            image = ahead.unfold(-1, 2 * self.radius + 1, 1).sum(-1).movedim(-1, axis)
        return image

    def _held(self, first: Tensor, then: Tensor) -> tuple[Tensor, ...]:
        d = first.shape[1]
        extent = self.extent.to(first)
        at = identity_map(first.shape[2:], dtype=first.dtype, device=first.device)
        miss = first + sample_image(then, at + first)
        shares = (extent / extent.max()).reshape(-1, *(1,) * d)
        count = first[0, 0].numel()
        drift = (miss * shares).square().sum() / count
        slopes = miss.new_zeros(())
        for axis in range(d):
            units = (first.shape[2 + axis] - 1) * extent / extent[axis]
            change = miss.diff(dim=2 + axis) * units.reshape(-1, *(1,) * d)
            slopes = slopes + change.square().sum() / count / d
        jacobian = torch.stack(
            [
                _cells(first.diff(dim=2 + axis), axis) * (first.shape[2 + axis] - 1)
                for axis in range(d)
            ],
            dim=2,
        )[0]  # [component, axis, *cells]
        physical = jacobian * (extent[:, None] / extent).reshape(d, d, *(1,) * d)
        length = (physical.square().sum((0, 1)) + _SMALL**2).sqrt()
        variation = (length - _SMALL).sum() / count
        matrices = jacobian.flatten(2).movedim(2, 0) + torch.eye(d).to(jacobian)
        determinant = torch.linalg.det(matrices)
        hinge = (GUARD - determinant).clamp(min=0).square().sum() / count
        return slopes, drift, hinge, variation, (determinant <= 0).sum() / count

    def _on_core(self, code: Tensor) -> tuple[DenseLoss, Tensor]:
        d = len(self.size)
        kept: list[Tensor] = []

        def raw(tensor: Tensor | None) -> int | None:
            if tensor is None:
                return None
            kept.append(tensor.detach().float().contiguous())
            return address(kept[-1])

        sides = (loading.Side * 2)()
        for side, to in zip(self.sides, sides, strict=True):
            to.moving, to.reachable = raw(side.moving), raw(side.reachable)
            to.grid[:d] = side.moving.shape[2:]
            to.to_moving[: d * (d + 1)] = side.to_moving.flatten().tolist()
            to.fixed, to.samples = raw(side.fixed), raw(side.samples)
            to.centres = raw(side.centres)
        spec = loading.Dense(
            bytes=ctypes.sizeof(loading.Dense),
            dimension=d,
            channels=self.sides[0].fixed.shape[1],
            radius=self.radius,
            squared=self.squared,
            shared=self.shared,
            order=3,
            code=address(code),
            sides=sides,
            floor=self.floor,
            lmbda=self.lmbda,
            drift=self.drift,
            hinge=self.hinge,
            goal=GUARD,
            tension=self.tension,
        )
        spec.size[:d], spec.between[:d] = self.size, tuple(self.between)
        spec.nodes[:d] = tuple(code.shape[2:])
        spec.scale[:d], spec.extent[:d] = self.scale.tolist(), self.extent.tolist()
        floats = ctypes.c_int64()
        loading.call("nephi_dense_memory", ctypes.byref(spec), ctypes.byref(floats))
        if not self._memory or self._memory[0].numel() < floats.value:
            self._memory[:] = [torch.empty(floats.value)]
        gradient, found = torch.empty_like(code), (ctypes.c_double * 8)()
        loading.call(
            "nephi_dense",
            ctypes.byref(spec),
            threads.count(),
            address(self._memory[0]),
            address(gradient),
            found,
        )
        forth, back, slopes, drift, hinge, variation, magnitude, folded = found
        regular = slopes + self.drift * drift + self.hinge * hinge
        total = forth + back + self.lmbda * regular + self.tension * variation
        parts = forth + back, regular, variation, magnitude, folded
        return DenseLoss(total, *parts), gradient


def _cells(differences: Tensor, axis: int) -> Tensor:
    """Differences along one axis, cut to where all axes have one."""
    d = differences.dim() - 2
    cut = [slice(None)] * 2 + [
        slice(None) if a == axis else slice(0, -1) for a in range(d)
    ]
    return differences[tuple(cut)]


def coarsened(gradient: Tensor, nodes: Sequence[int]) -> Tensor:
    """The gradient by a code of so many nodes a side, of that by it `refined`."""
    for axis, n in enumerate(nodes, 2):
        if gradient.shape[axis] == n:
            continue
        even, odd = gradient.movedim(axis, -1).unflatten(-1, (n - 1, 2)).unbind(-1)
        found = even.new_zeros(*even.shape[:-1], n)
        found[..., :-1] += 0.75 * even + 0.25 * odd
        found[..., 1:] += 0.25 * even + 0.75 * odd
        gradient = found.movedim(-1, axis)
    return gradient


def refined(code: Tensor, nodes: Sequence[int]) -> Tensor:
    """The same maps with so many nodes a side: exact knot insertion.

    Of ``[1, C, *nodes]``: an axis of n nodes, n - 2 intervals, gets 2 n - 2, or stays.

    Raises:
        ValueError: other numbers of nodes.
    """
    for axis, n in enumerate(nodes, 2):
        if code.shape[axis] == n:
            continue
        if 2 * code.shape[axis] - 2 != n:
            raise ValueError(f"{code.shape[axis]} nodes become as many or twice less 2")
        moved = code.movedim(axis, -1)
        low, high = moved[..., :-1], moved[..., 1:]
        pairs = torch.stack([0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high], -1)
        code = pairs.flatten(-2).movedim(-1, axis)
    return code
