"""What a deformation is described by: a global vector and local grids of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from icon_nephi.space.interpolation import axis_matrix, read_grids


@dataclass(frozen=True)
class LatentCode:
    """A global vector and local grids; plain tensors, so codes stack, save and load.

    Attributes:
        global_code: ``[B, C]``.
        local_codes: one or several ``[B, C_l, *grid_l]`` over the unit box (a single
            tensor is taken as one).
        interpolation: how the grids are read: ``"quadratic"`` (B-spline, continuous
            Jacobians) or ``"linear"`` (the paper's).
    """

    global_code: Tensor
    local_codes: tuple[Tensor, ...]
    interpolation: str = "quadratic"

    def __post_init__(self) -> None:
        """Take a single grid as a tuple of one; refuse differing batches."""
        if isinstance(self.local_codes, Tensor):
            object.__setattr__(self, "local_codes", (self.local_codes,))
        object.__setattr__(self, "local_codes", tuple(self.local_codes))
        for grid in self.local_codes:
            if grid.shape[0] != self.global_code.shape[0]:
                raise ValueError(
                    f"LatentCode: global code has batch {self.global_code.shape[0]}, a "
                    f"local grid has {grid.shape[0]}; both describe the same pairs"
                )

    @property
    def batch(self) -> int:
        """How many pairs the code describes."""
        return self.global_code.shape[0]

    @property
    def size(self) -> int:
        """The number of code values at a point."""
        return self.global_code.shape[1] + sum(g.shape[1] for g in self.local_codes)

    def at(self, points: Tensor, *, gradient: bool = False) -> Tensor:
        """``[R, B, N, C]``: z(x) = [z_g, z_l1(x), ...] (Eq. 6) and its derivatives.

        Args:
            points: ``[B, N, d]`` rows in the unit box.
            gradient: R = 1 + d, with the derivative by coordinate a in row 1 + a;
                else R = 1.
        """
        batch, count, dimension = points.shape
        rows = 1 + (dimension if gradient else 0)
        parts = []
        if self.global_code.shape[1]:
            value = self.global_code[None, :, None, :].expand(1, batch, count, -1)
            if gradient:
                slopes = value.new_zeros(1, 1, 1, 1).expand(dimension, *value.shape[1:])
                value = torch.cat([value, slopes])
            parts.append(value)
        if self.local_codes:
            grids, order = self.local_codes, self.interpolation
            parts.append(read_grids(grids, points, order=order, gradient=gradient))
        if not parts:
            return points.new_zeros(rows, batch, count, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def on_lines(self, axes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Places and code values on a lattice, in factors: ``weights @ nodes``.

        On line l, along the last axis, ``[x, z(x)]`` is ``weights [n, K]`` times
        ``nodes [K, L, d + C][:, l]``, lines in the order of the axes: a few products of
        matrices in place of a read of every point. Of a single pair, at positions
        ``[n_a]`` in the unit box along each axis.
        """
        d, last, like = len(axes), axes[-1], self.global_code
        first = torch.stack(torch.meshgrid(*axes[:-1], indexing="ij"), -1)
        first = first.flatten(0, -2)
        total = 2 + sum(grid.shape[-1] for grid in self.local_codes)
        nodes = like.new_zeros(total, len(first), d + self.size)
        nodes[0, :, : d - 1] = first
        nodes[1, :, d - 1] = 1
        row, column = 2, d + like.shape[1]
        nodes[0, :, d:column] = like[0]
        weights = [torch.stack([torch.ones_like(last), last], 1).to(like)]
        for grid in self.local_codes:
            table, channels, count = grid[0], grid.shape[1], grid.shape[-1]
            *across, along = (
                axis_matrix(x, n, self.interpolation).to(like)
                for x, n in zip(axes, table.shape[1:], strict=True)
            )
            for axis, matrix in enumerate(across, 1):
                table = torch.tensordot(matrix, table, ([1], [axis])).movedim(0, axis)
            vectors = table.reshape(channels, -1, count).permute(2, 1, 0)
            nodes[row : row + count, :, column : column + channels] = vectors
            weights.append(along)
            row, column = row + count, column + channels
        return torch.cat(weights, 1), nodes

    def prior(self, sigma: float = 1.0) -> Tensor:
        """Scalar: ``|z_g|^2 / sigma^2`` + grid points' mean of ``|z_l|^2 / sigma^2``.

        Eq. 7, averaged over the batch; several grids add up. Differs from the official
        code, which averages unsquared norms and has no sigma.
        """
        total = self.global_code.square().sum(1)
        for grid in self.local_codes:
            total = total + grid.square().sum(1).flatten(1).mean(1)
        return total.mean() / sigma**2

    @staticmethod
    def of(codes: Sequence[LatentCode]) -> LatentCode:
        """One code of the batches of several, one after the other."""
        local = zip(*(code.local_codes for code in codes), strict=True)
        return replace(
            codes[0],
            global_code=torch.cat([code.global_code for code in codes]),
            local_codes=tuple(torch.cat(grids) for grids in local),
        )

    def item(self, number: int) -> LatentCode:
        """One of the batch, a view: batch 1."""
        return replace(
            self,
            global_code=self.global_code[number : number + 1],
            local_codes=tuple(g[number : number + 1] for g in self.local_codes),
        )

    def mixed(self, shares: Sequence[float]) -> LatentCode:
        """The weighted sum over the batch, with a share for each: batch 1."""

        def summed(values: Tensor) -> Tensor:
            weights = torch.tensor(shares, dtype=values.dtype, device=values.device)
            total: Tensor = torch.tensordot(weights, values, 1)
            return total[None]

        return replace(
            self,
            global_code=summed(self.global_code),
            local_codes=tuple(map(summed, self.local_codes)),
        )

    def detached(self) -> LatentCode:
        """An own copy of the numbers, cut from the graph."""
        return replace(
            self,
            global_code=self.global_code.detach().clone(),
            local_codes=tuple(g.detach().clone() for g in self.local_codes),
        )


def shares_at(
    time: float, times: Sequence[float], period: float | None = None
) -> list[float]:
    """Shares of codes at increasing times for the code at another: a cubic spline.

    Of two a line. With a period, which is longer than the times, it closes; without one
    a time before the first or after the last is taken for that.
    """
    from scipy.interpolate import CubicSpline  # slow to import

    values, knots = np.eye(len(times)), np.asarray(times, float)
    if period is not None and len(times) > 2:
        time = knots[0] + (time - knots[0]) % period
        knots = np.append(knots, knots[0] + period)
        spline = CubicSpline(knots, [*values, values[0]], bc_type="periodic")
    else:
        time = min(max(time, knots[0]), knots[-1])
        spline = CubicSpline(knots, values)
    shares: list[float] = spline(time).tolist()
    return shares


class LatentCodeTable(nn.Module):
    """One learned code per pair (auto-decoder), N(0, sigma^2) at the start.

    As an ICON ``net``: ``forward(image_A, image_B)`` returns the codes of the pairs
    chosen by ``index`` (default: all of them, which for a table of one is the pair's).

    Args:
        count: number of pairs.
        grids: nodes of each local grid, e.g. ``[(8, 8, 8), (16, 16, 16)]``.
        channels: channels of each local grid.
        global_size: size of the global vector.
        sigma: standard deviation at the start, and in the prior.
        interpolation: see `LatentCode`.
        generator: source of the initial numbers.
    """

    def __init__(
        self,
        count: int = 1,
        *,
        grids: Sequence[Sequence[int]] = ((16, 16, 16),),
        channels: Sequence[int] = (32,),
        global_size: int = 32,
        sigma: float = 0.1,
        interpolation: str = "quadratic",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if len(grids) != len(channels):
            raise ValueError(
                f"LatentCodeTable: {len(grids)} grids, {len(channels)} channel counts"
            )
        self.interpolation = interpolation

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(sigma * torch.randn(shape, generator=generator))

        self.global_codes = normal(count, global_size)
        self.local_codes = nn.ParameterList(
            normal(count, c, *grid) for c, grid in zip(channels, grids, strict=True)
        )

    def forward(
        self, image_A: Tensor, image_B: Tensor, index: Tensor | None = None
    ) -> LatentCode:
        """The `LatentCode` of the pairs in ``index`` ``[B]``; images are ignored."""
        chosen = slice(None) if index is None else index
        return LatentCode(
            self.global_codes[chosen],
            tuple(grid[chosen] for grid in self.local_codes),
            self.interpolation,
        )
