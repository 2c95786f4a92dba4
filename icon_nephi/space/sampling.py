"""Where to look: random points and small blocks, inside an optional mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icon_nephi._check import check_mask

# Masks are drawn from by rejection; below this acceptance their voxels are listed.
_ROUNDS = 50


@dataclass(frozen=True)
class Points:
    """``count`` random points, uniform in the unit box or in the mask's voxels."""

    count: int

    def __post_init__(self) -> None:
        """Refuse a count below one."""
        _check_count(self.count)


@dataclass(frozen=True)
class Patches:
    """``count`` random blocks of ``size`` samples a side, ``stride`` voxels apart.

    Attributes:
        count: blocks per image and step.
        size: samples a side.
        stride: voxels between samples, one number or one for each tensor axis.
        corners: evaluate the map at each block's 2^d corners and carry it linearly
            between them: s^d / 2^d times fewer network evaluations, exact where the
            map is affine across a block.
    """

    count: int
    size: int = 3
    stride: float | tuple[float, ...] = 3.0
    corners: bool = False

    def __post_init__(self) -> None:
        """Refuse a count below one and blocks without neighbours."""
        _check_count(self.count)
        if self.size < 2:
            raise ValueError(f"Patches: size must be at least 2, got {self.size}")

    def offsets(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """``[d, *size]``: samples relative to the block's centre, unit box."""
        d = len(shape)
        strides = self.stride if isinstance(self.stride, tuple) else (self.stride,) * d
        if len(strides) != d:
            raise ValueError(f"Patches: stride {strides} does not have {d} numbers")
        steps = torch.arange(self.size, dtype=like.dtype, device=like.device)
        steps = steps - (self.size - 1) / 2
        axes = [steps * s / (n - 1) for s, n in zip(strides, shape, strict=True)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")


def draw_points(
    count: int,
    batch: int,
    dimension: int,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random rows ``[B, N, d]`` in the unit box (or in the mask), ICON frame.

    Args:
        count: N.
        batch: B; every item gets its own points.
        dimension: d.
        mask: ``[B or 1, 1, *grid]``; points are uniform over the voxels above zero,
            and within each over its cell.
        generator: the source of randomness (its device decides where numbers are
            drawn; they are then moved).
        dtype: of the points.
        device: of the points.

    Raises:
        ValueError: a mask without a voxel above zero.
    """
    source = generator.device if generator is not None else device
    if mask is None:
        shape = (batch, count, dimension)
        return torch.rand(shape, generator=generator, device=source, dtype=dtype).to(
            device
        )
    drawn = [
        _draw_in_mask(mask[min(b, mask.shape[0] - 1), 0], count, generator, source)
        for b in range(batch)
    ]
    size = torch.tensor(mask.shape[2:], device=source, dtype=torch.float64)
    rows = (
        torch.stack(drawn) if drawn else torch.zeros(0, count, dimension, device=source)
    )
    return (rows / (size - 1)).clamp(0, 1).to(device=device, dtype=dtype)


def _draw_in_mask(
    mask: Tensor,
    count: int,
    generator: torch.Generator | None,
    source: torch.device | str | None,
) -> Tensor:
    """Voxel coordinates ``[N, d]`` of uniform draws where a grid is above zero."""
    size = torch.tensor(mask.shape, device=source, dtype=torch.float64)
    kept: list[Tensor] = []
    missing = count
    for _ in range(_ROUNDS):
        shape = (2 * count, mask.dim())
        x = torch.rand(shape, generator=generator, device=source, dtype=torch.float64)
        x = x * size - 0.5
        voxel = x.round().clamp(min=0).minimum(size - 1).long().to(mask.device)
        good = x[(mask[tuple(voxel.unbind(1))] > 0).to(x.device)][:missing]
        kept.append(good)
        missing -= len(good)
        if missing == 0:
            return torch.cat(kept)
    check_mask("mask", mask[None, None], mask.shape)
    voxels = (mask > 0).nonzero().to(device=source, dtype=torch.float64)
    chosen = torch.randint(len(voxels), (missing,), generator=generator, device=source)
    shape = (missing, mask.dim())
    jitter = torch.rand(shape, generator=generator, device=source, dtype=torch.float64)
    return torch.cat([*kept, voxels[chosen] + jitter - 0.5])
