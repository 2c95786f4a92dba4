"""What a displacement can do inside a box: expansions of codes and fields.

Inside a box that no knot of the code's grids crosses (see `knots`) the code is a
polynomial, kept exactly up to the degree of the `Expansion`; the field's layers follow.
"""

from __future__ import annotations

import itertools
from typing import cast

import torch
from torch import Tensor

from icon_nephi.fields import Field
from icon_nephi.fields.codes import LatentCode
from icon_nephi.fields.expansions import Expansion, beside, monomials, unit

# Boxes are taken a little larger than they are, so that the rounding of their edges is
# inside: every polynomial piece is bounded a bit beyond its knots.
WIDER = 1e-12


def knots(code: LatentCode, axis: int) -> Tensor:
    """Return the sorted places in (0, 1) where an axis's polynomials change."""
    places: set[float] = set()
    for grid in code.local_codes:
        steps = _steps(grid.shape[2 + axis], code.interpolation)
        # The same place of two grids may differ in its last bit; `WIDER` covers that.
        places |= {round(k / steps, 13) for k in range(1, steps)}
    return torch.tensor(sorted(places), dtype=torch.float64)


def expand_displacement(
    field: Field,
    code: LatentCode,
    centre: Tensor,
    half: Tensor,
    degree: int,
    dtype: torch.dtype = torch.float64,
) -> Expansion:
    """Return the `Expansion` of the displacement a field makes of a code, C = d.

    Args:
        field: float64.
        code: of batch 1, float64.
        centre: of the boxes ``[N, d]``, in the unit box, float64.
        half: half their sides, 0 along axes where nothing changes.
        degree: of the polynomials.
        dtype: what the layers work in; float32 takes half the time, and bounds by the
            more that it rounds.

    Raises:
        TypeError: the field has no ``expand``.
    """
    expand = getattr(field, "expand", None)
    if expand is None:
        raise TypeError(
            f"a map of the field {type(field).__name__} cannot be certified: bounds "
            "need its method expand(points, values), described in icon_nephi.fields"
        )
    values = _read(code, centre, half, degree, dtype)
    return cast(Expansion, expand(_place(centre, half), values))


def _place(centre: Tensor, half: Tensor) -> Expansion:
    """Return x, of degree 1, float64."""
    rows = torch.cat([centre[None], torch.diag_embed(half).transpose(0, 1)])
    return Expansion.of(rows, torch.zeros_like(rows), centre.shape[1], 1)


def _steps(nodes: int, order: str) -> int:
    return nodes - 1 if order == "linear" else nodes - 2


def _read(
    code: LatentCode, centre: Tensor, half: Tensor, degree: int, dtype: torch.dtype
) -> Expansion:
    """Return z(x): each grid's polynomial piece around the boxes' centres."""
    count, d = centre.shape
    powers = 2 if code.interpolation == "linear" else 3
    known = monomials(d, degree)
    spot = {p: n for n, p in enumerate(itertools.product(range(powers), repeat=d))}
    whole = centre.new_zeros(len(known), count, code.global_code.shape[1])
    whole[0] = code.global_code
    stray = whole.new_zeros(1 + d, *whole.shape[1:])
    parts = [Expansion.of(whole, stray, d, degree).rounded(dtype)]
    for grid in code.local_codes:
        polynomial, rounding = _piece(grid, centre, half, code.interpolation)
        rows = polynomial.new_zeros(len(known), *polynomial.shape[1:])
        for n, powers_of in enumerate(known):
            if powers_of in spot:
                rows[n] = polynomial[spot[powers_of]]
        stray = polynomial.new_zeros(1 + d, *polynomial.shape[1:])
        for power, place in spot.items():
            if sum(power) > degree:
                for axis in range(d):
                    stray[1 + axis] += power[axis] * polynomial[place].abs()
        stray += rounding[:, :, None]
        parts.append(Expansion.of(rows, stray, d, degree).rounded(dtype))
    return beside(*parts)


def _piece(
    grid: Tensor, centre: Tensor, half: Tensor, order: str
) -> tuple[Tensor, Tensor]:
    """Return ``[powers^d, N, C]``, ordered as by product, and ``[1 + d, N]`` rounding.

    The same pieces as `icon_nephi.space.interpolation` reads.
    """
    count, d = centre.shape
    shape, channels = grid.shape[2:], grid.shape[1]
    steps = torch.tensor([_steps(n, order) for n in shape], dtype=centre.dtype)
    cells = centre * steps
    base = cells.floor().clamp(min=0).minimum(steps - 1)
    f, h = cells - base, half * steps
    nodes = 2 if order == "linear" else 3
    if order == "linear":
        table = [[1 - f, f], [-h, h]]
    else:
        f = f - 0.5
        low, high = 0.5 - f, 0.5 + f
        table = [
            [0.5 * low.square(), 0.75 - f.square(), 0.5 * high.square()],
            [-low * h, -2 * f * h, high * h],
            [0.5 * h * h, -h * h, 0.5 * h * h],
        ]
    weights = torch.stack([torch.stack(row, -1) for row in table], -2)
    strides = [shape[axis + 1 :].numel() for axis in range(d)]
    near = torch.tensor(
        [
            sum(o * s for o, s in zip(at, strides, strict=True))
            for at in itertools.product(range(nodes), repeat=d)
        ]
    )
    number = (base.long() * torch.tensor(strides)).sum(1, keepdim=True) + near
    numbers = grid[0].flatten(1).index_select(1, number.flatten())
    size = float(numbers.abs().max()) if numbers.numel() else 0.0
    numbers = numbers.T.contiguous()
    for axis in range(d):
        # The first axis of the nodes becomes the last of the powers.
        numbers = weights[:, axis] @ numbers.view(count, nodes, -1)
        numbers = numbers.view(count, nodes, -1, channels).transpose(1, 2).contiguous()
    # Magnitudes: the weights' values add up to 1, their slopes by x to 2 steps, and so
    # do the second ones times half a box. The place in a cell has lost steps * u.
    lost = 64 * unit(numbers) * (1 + float(steps.max())) * size
    slopes = lost * (1 + 2 * h.T) * 2 * h.T
    return numbers.view(count, -1, channels).transpose(0, 1), torch.cat(
        [torch.full_like(slopes[:1], lost), slopes * (1 + 4 * h.T).prod(0)]
    )
