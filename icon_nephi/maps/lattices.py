"""Maps at all points of a lattice.

Along each axis the code is read by a matrix, so a lattice takes a few products of
matrices where scattered points would each read their 27 nodes: exact, and cheaper.
On the compiled core they do so all the same, and are cheaper still.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from icon_nephi.fields import compiled, displacement_on_lines
from icon_nephi.maps.transforms import (
    Composition,
    Map,
    MatrixTransform,
    NeuralTransform,
)
from icon_nephi.space.frames import points_as_grid, to_rows

# Points whose lines are prepared together: whole planes of the lattice. A GPU has the
# memory for more, and takes as long for few.
_PREPARED, _PREPARED_ON_GPU = 2**18, 2**21
# Points that the compiled core is handed together.
_AT_ONCE = 2**16


@torch.no_grad()
def on_lattice(phi: Map, axes: Sequence[Tensor]) -> Iterator[Tensor]:
    """Where a map of a single pair takes a lattice, in parts of rows ``[N, d]``.

    The axes are ICON-frame positions, ``[n_a]`` each. Lines of the last axis follow
    each other as in a C-contiguous grid. No gradients.
    """
    if isinstance(phi, Composition):
        inner = _straight(phi.psi, axes)
        if inner is not None:
            yield from on_lattice(phi.phi, inner)
        else:
            for rows in on_lattice(phi.psi, axes):
                yield to_rows(phi.phi(points_as_grid(rows[None])))[0]
        return
    size = math.prod(len(x) for x in axes[1:])
    most = _PREPARED if axes[0].device.type == "cpu" else _PREPARED_ON_GPU
    for first in axes[0].split(max(1, most // size)):
        part = [first, *axes[1:]]
        if isinstance(phi, NeuralTransform):
            yield from _on_lines(phi, part)
        else:
            rows = torch.cartesian_prod(*part)
            yield to_rows(phi(points_as_grid(rows[None])))[0]


def _straight(phi: Map, axes: Sequence[Tensor]) -> list[Tensor] | None:
    """The axes of the lattice where a map takes a lattice, if it is one still."""
    if not isinstance(phi, MatrixTransform) or len(phi.matrix) != 1:
        return None
    d, matrix = len(axes), phi.matrix[0].to(axes[0])
    scale = matrix.diagonal()[:d]
    if not bool((matrix[:d, :d] == torch.diag(scale)).all()):
        return None
    return [x * scale[a] + matrix[a, d] for a, x in enumerate(axes)]


def _on_lines(phi: NeuralTransform, axes: Sequence[Tensor]) -> Iterator[Tensor]:
    *first, last = axes
    starts = torch.stack(torch.meshgrid(*first, indexing="ij"), -1).flatten(0, -2)
    probe = last.new_zeros(1, 1, len(axes), dtype=phi.code.global_code.dtype)
    if compiled.suits(phi.field, phi.code, probe):  # its points cost less than lines
        for some in starts.split(max(1, _AT_ONCE // len(last))):
            rows = last.new_empty(len(some), len(last), len(axes))
            rows[..., :-1], rows[..., -1] = some[:, None], last
            at, field = rows.flatten(0, 1), cast(nn.Module, phi.field)
            single = at.to(probe)[None]
            yield at + compiled.displacements(field, phi.code, False, single)[0][0]
        return
    weights, nodes = phi.code.on_lines([x.clamp(0, 1) for x in axes])
    at_once = max(1, phi.at_once(graph=False) // len(last))
    for lines, start in zip(
        nodes.split(at_once, 1), starts.split(at_once), strict=True
    ):
        moved = displacement_on_lines(phi.field, weights, lines, len(axes))
        rows = moved.transpose(0, 1).to(last).contiguous()  # [L, n, d]
        rows[..., :-1] += start[:, None]
        rows[..., -1] += last
        yield rows.flatten(0, 1)
