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

    N is the count, and every item of the batch gets its own points. In a mask
    ``[B or 1, 1, *grid]`` they are uniform over the voxels above zero, and within each
    over its cell. Numbers are drawn on the generator's device, then moved to the other.

    Raises:
        ValueError: a mask without a voxel above zero.
    """
    source = generator.device if generator is not None else device
    shape = (batch, count, dimension)
    if mask is None:
        rows = torch.rand(shape, generator=generator, device=source, dtype=dtype)
        return rows.to(device)
    rows = torch.zeros(shape, device=source, dtype=torch.float64)
    for number, item in enumerate(rows):
        grid = mask[min(number, len(mask) - 1), 0]
        item.copy_(_draw_in_mask(grid, count, generator, source))
    size = torch.tensor(mask.shape[2:], device=source, dtype=torch.float64)
    return (rows / (size - 1)).clamp(0, 1).to(device=device, dtype=dtype)


def _draw_in_mask(
    mask: Tensor,
    count: int,
    generator: torch.Generator | None,
    source: torch.device | str | None,
) -> Tensor:
    """Voxel coordinates ``[N, d]`` of uniform draws where a grid is above zero."""
    size = torch.tensor(mask.shape, device=source, dtype=torch.float64)
    hits: list[Tensor] = []
    missing = count

    def uniform(number: int) -> Tensor:
        shape = (number, mask.dim())
        return torch.rand(shape, generator=generator, device=source, dtype=size.dtype)

    for _ in range(_ROUNDS):
        x = uniform(2 * count) * size - 0.5
        voxel = x.round().clamp(min=0).minimum(size - 1).long().to(mask.device)
        hits.append(x[(mask[tuple(voxel.unbind(1))] > 0).to(x.device)][:missing])
        missing -= len(hits[-1])
        if missing == 0:
            return torch.cat(hits)
    check_mask("mask", mask[None, None], mask.shape)
    voxels = (mask > 0).nonzero().to(size)
    chosen = torch.randint(len(voxels), (missing,), generator=generator, device=source)
    return torch.cat([*hits, voxels[chosen] + uniform(missing) - 0.5])
