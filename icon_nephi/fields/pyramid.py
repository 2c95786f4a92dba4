"""Two images -> `LatentCode` by matching: displacements found coarse to fine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icon_nephi._check import check_image
from icon_nephi.fields.codes import LatentCode
from icon_nephi.fields.layers import arguments_of
from icon_nephi.fields.mlp import LatentMLP
from icon_nephi.space.frames import identity_map
from icon_nephi.space.images import sample_image
from icon_nephi.space.interpolation import axis_matrix

_CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_SLOPE = 0.1
# What a code value z says: a displacement of SPAN sin(RATE z). Codes are then about as
# large as those of other fields, and what moves them moves maps about as much.
SPAN, RATE = 0.5, 0.1
# Voxels of the working grid, in all and at most on one side.
WORKING = {2: (192**2, 320), 3: (96**3, 160)}


class PyramidEncoder(nn.Module):
    """Predicts a pair's code by comparing features of both images, coarse to fine.

    Both images go through the same convolutions. At each level features of the one are
    laid on the other's by what coarser levels found, compared with those around, and a
    correction is added: a grid of displacement vectors, one for every ``2^level``
    voxels. Both directions are found alike, so swapping the images swaps them, exactly.
    The code is one grid, as fine as the finest level: d channels of phi_AB and d of
    phi_BA, see `as_code`; `reading_fields` read them.

    Every image is normalised on its own, so scale and offset of the intensities do not
    matter. Sides are resampled to multiples of ``2^levels`` if they are not; several
    channels are averaged.

    Args:
        dimension: d.
        widths: channels of the features, fine to coarse; level i halves i + 1 times.
        hidden: channels of what decides at each level, fine to coarse; 0: nothing is
            found at that level.
        reach: how many cells around are compared, fine to coarse.
        squeezed: channels that comparisons are reduced to.
        generator: source of the initial weights.
    """

    def __init__(
        self,
        dimension: int,
        *,
        widths: Sequence[int] = (16, 32, 48, 48),
        hidden: Sequence[int] = (16, 32, 48, 48),
        reach: Sequence[int] = (1, 1, 2, 2),
        squeezed: int = 32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.arguments = arguments_of(locals())
        self.dimension, self.reach = d, reach = dimension, tuple(reach)
        self.hidden, count = tuple(hidden), len(widths)
        #: Convolutions in bfloat16: for training on a GPU.
        self.reduced = False
        #: The number of code values at a point.
        self.code_size = 2 * d
        before = [1, *widths[:-1]]
        self.down = nn.ModuleList(
            nn.Sequential(_block(d, inputs, outputs, 2), _block(d, outputs, outputs))
            for inputs, outputs in zip(before, widths, strict=True)
        )
        self.up = nn.ModuleList(
            _block(d, widths[i] + widths[i + 1], widths[i]) for i in range(count - 1)
        )
        self.squeeze, self.decide, self.heads = (nn.ModuleList() for _ in range(3))
        coarser = 0
        #: How sharply each level's comparisons are told apart.
        self.sharpness = nn.Parameter(torch.full((count,), 10.0))
        for i in reversed(range(count)):
            if not hidden[i]:
                continue
            offsets = (2 * reach[i] + 1) ** d
            few = min(squeezed, offsets)
            inputs = few + 2 * widths[i] + coarser + 2 * d + 1
            self.squeeze.append(_CONV[d](offsets, few, 1))
            self.decide.append(
                nn.Sequential(
                    _block(d, inputs, hidden[i]), _block(d, hidden[i], hidden[i])
                )
            )
            self.heads.append(_CONV[d](hidden[i], d + 1, 3, padding=1))
            coarser = hidden[i]
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Conv3d):
                _initialise(layer, generator)
        with torch.no_grad():
            for head in self.heads:
                cast(nn.Conv3d, head).weight.mul_(0.1)

    def forward(self, image_A: Tensor, image_B: Tensor) -> LatentCode:
        """The code of each pair of a batch ``[B, C, *grid]``, A moving, B fixed."""
        for name, image in (("image_A", image_A), ("image_B", image_B)):
            check_image(name, image)
            if image.dim() != self.dimension + 2:
                raise ValueError(
                    f"{name} must be [B, C, *grid] with {self.dimension} axes, got "
                    f"{tuple(image.shape)}"
                )
        if image_A.shape != image_B.shape:
            raise ValueError(
                f"image_A is {tuple(image_A.shape)}, image_B {tuple(image_B.shape)}: "
                "the encoder needs both on one grid; resample one to the other"
            )
        size = self.working_size(image_B.shape[2:])
        images = torch.cat([image_A, image_B]).mean(1, keepdim=True)
        if tuple(images.shape[2:]) != size:
            images = _on_lattice(images, size)
        grids = self.displacements(images)
        last = images.new_tensor([n - 1.0 for n in size])
        nodes = [torch.linspace(0, 1, n).to(images) for n in grids[-1].shape[2:]]
        u = sum((read_lattice(grid, nodes) for grid in grids[:-1]), 0 * grids[-1])
        u = u + read_lattice(grids[-1], nodes)
        u = u / last.view(1, -1, *(1,) * self.dimension)
        return as_code(*u.chunk(2))

    def working_size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The grid that images of a shape are looked at on; voxels stay as they are."""
        most, longest = WORKING[self.dimension]
        factor = min((most / math.prod(shape)) ** (1 / len(shape)), 1.0)
        factor = min(factor, longest / max(shape))
        step = 2 ** len(self.down)
        return tuple(max(2, round(n * factor / step)) * step for n in shape)

    def displacements(self, images: Tensor) -> list[Tensor]:
        """Grids ``[2 B, d, *nodes]``, coarse to fine, of images ``[2 B, 1, *grid]``.

        Voxels; the images are all A and then all B, sides multiples of 2^levels. First
        come those of phi_AB, on B's box, then those of phi_BA.
        """
        size = images.shape[2:]
        axes = tuple(range(1, images.dim()))
        spread, mean = torch.std_mean(images, axes, keepdim=True)
        pyramid = self._features((images - mean) / (spread + 1e-5))
        found: list[Tensor] = []
        context: Tensor | None = None
        modules = zip(self.squeeze, self.decide, self.heads, strict=True)
        for level in reversed(range(len(pyramid))):
            if not self.hidden[level]:
                continue
            squeeze, decide, head = next(modules)
            cells, moving = 2.0 ** (level + 1), pyramid[level]
            fixed = swapped(moving)
            at = cell_middles(size, level + 1, images.device)
            u = sum(
                (read_lattice(grid, at) for grid in found),
                moving.new_zeros(len(moving), len(size), *moving.shape[2:]).float(),
            )
            warped, there = _warp(moving, u / cells)
            cost = _compare(fixed, warped, self.reach[level])
            nearest = _expected(cost * self.sharpness[level], self.reach[level])
            with self._precision(images):
                parts = [squeeze(cost), fixed, warped, there, u / cells, nearest]
                if context is not None:
                    parts.append(_doubled(context))
                context = decide(torch.cat([p.to(cost) for p in parts], 1))
                answer = head(context).float()
            step = answer[:, :-1] + torch.sigmoid(answer[:, -1:]) * nearest
            found.append(_on_nodes(step * cells, size, level + 1))
        return found

    def _features(self, images: Tensor) -> list[Tensor]:
        """Features of images, fine to coarse, each knowing the coarser ones."""
        maps = []
        with self._precision(images):
            for block in self.down:
                images = block(images)
                maps.append(images)
            for level in reversed(range(len(self.up))):
                both = torch.cat([maps[level], _doubled(maps[level + 1])], 1)
                maps[level] = self.up[level](both)
        return maps

    def _precision(self, images: Tensor) -> torch.autocast:
        kind = images.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.reduced)


def as_code(u_AB: Tensor, u_BA: Tensor) -> LatentCode:
    """The code that `reading_fields` read as these displacements, at once exactly.

    Both ``[B, d, *nodes]``, unit box, on a lattice of it from border to border; the
    code has as many nodes.
    """
    u = torch.cat([u_AB, u_BA], 1)
    for axis, n in enumerate(u.shape[2:], 2):
        at = torch.linspace(0, 1, n, dtype=torch.float64)
        inverse = torch.linalg.inv(axis_matrix(at, n)).to(u)
        u = torch.tensordot(u, inverse, ([axis], [1])).movedim(-1, axis)
    values = torch.asin((u / SPAN).clamp(-0.95, 0.95)) / RATE
    return LatentCode(u.new_zeros(len(u), 0), (values.contiguous(),))


def coarser_code(code: LatentCode, most: int) -> LatentCode:
    """An `as_code` with at most so many nodes a side, about equally far apart."""
    (grid,) = code.local_codes
    longest = max(grid.shape[2:])
    if longest <= most:
        return code
    fewer = [max(4, round(n * most / longest)) for n in grid.shape[2:]]
    u = SPAN * torch.sin(RATE * grid)
    at = [torch.linspace(0, 1, n).to(grid) for n in fewer]
    return as_code(*read_lattice(u, at).chunk(2, 1))


def reading_fields(dimension: int) -> tuple[LatentMLP, LatentMLP]:
    """The fields of phi_AB and phi_BA that read an `as_code`.

    They are `LatentMLP` as any: trained on, saved and evaluated on the compiled core.
    """
    fields = []
    for side in range(2):
        field = LatentMLP(dimension, 2 * dimension, width=dimension)
        for parameter in field.parameters():
            nn.init.zeros_(parameter)
        teach_to_read(field, side, 0)
        fields.append(field)
    return fields[0], fields[1]


def reads_codes(field: object) -> bool:
    """Whether `teach_to_read` can teach a field."""
    if not isinstance(field, LatentMLP) or len(field.hidden) != 1:
        return False
    return field.last.in_features >= field.last.out_features


def teach_to_read(field: LatentMLP, side: int, first: int) -> None:
    """Let the first d hidden units read an `as_code`, and nothing else.

    Args:
        field: with one hidden layer; what its other units say is added.
        side: 0 for phi_AB, 1 for phi_BA.
        first: number of the code value at which that code begins.
    """
    d = field.last.out_features
    hidden = cast(nn.Linear, field.hidden[0])
    with torch.no_grad():
        hidden.weight[:d], hidden.bias[:d] = 0, 0
        field.last.weight[:, :d] = 0
        for axis in range(d):
            # Behind the coordinates come the code's values.
            hidden.weight[axis, d + first + side * d + axis] = RATE / field.omega
            field.last.weight[axis, axis] = SPAN


# --- where things lie ---------------------------------------------------------------
# A cell of level l is 2^l voxels a side; nodes of its grid are those of a quadratic
# spline with one more interval than there are cells less two, see `LatentCode`.


def swapped(both: Tensor) -> Tensor:
    """A batch of which the second half comes first."""
    first, second = both.chunk(2)
    return torch.cat([second, first])


def cell_middles(size: Sequence[int], level: int, device: torch.device) -> list[Tensor]:
    """``[n]`` for each axis: middles of the cells of a level in the unit box."""
    step = 2**level
    return [
        (step * (torch.arange(n // step, device=device) + 0.5) - 0.5) / (n - 1)
        for n in size
    ]


def read_lattice(grid: Tensor, at: Sequence[Tensor]) -> Tensor:
    """A spline's grid ``[B, C, *nodes]`` at a lattice of the unit box."""
    for axis, places in enumerate(at, 2):
        matrix = axis_matrix(places, grid.shape[axis]).to(grid)
        grid = torch.tensordot(grid, matrix, ([axis], [1])).movedim(-1, axis)
    return grid


def _on_nodes(step: Tensor, size: Sequence[int], level: int) -> Tensor:
    """Vectors at the cells of a level, linearly at the nodes of a grid of as many."""
    for axis, n in enumerate(size, 2):
        cells = step.shape[axis]
        nodes = max(4, cells + 2)
        node = torch.arange(nodes, device=step.device)
        voxel = (node - 0.5) / (nodes - 2) * (n - 1)
        cell = ((voxel + 0.5) / 2**level - 0.5).clamp(0, cells - 1)
        near = (cell[:, None] - torch.arange(cells, device=step.device)).abs()
        weights = (1 - near).clamp(min=0).to(step)
        step = torch.tensordot(step, weights, ([axis], [1])).movedim(-1, axis)
    return step


def _on_lattice(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images over the unit box at other voxels, averaged where these are fewer."""
    for axis, n in enumerate(size, 2):
        m = images.shape[axis]
        where = torch.linspace(0, m - 1, n, device=images.device)
        wide = max(1.0, (m - 1) / (n - 1))
        near = (where[:, None] - torch.arange(m, device=images.device)).abs() / wide
        weights = (1 - near).clamp(min=0)
        weights = (weights / weights.sum(1, keepdim=True)).to(images)
        images = torch.tensordot(images, weights, ([axis], [1])).movedim(-1, axis)
    return images.contiguous()


# --- comparing ----------------------------------------------------------------------


def _warp(features: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Features ``[B, C, *cells]`` at x + u (cells), and where that is inside."""
    size = features.shape[2:]
    last = u.new_tensor([max(1.0, n - 1.0) for n in size])
    last = last.view(1, -1, *(1,) * len(size))
    x = identity_map(size, device=u.device) + u / last
    there = ((x - 0.5).abs() <= 0.5 + 0.5 / last).all(1, keepdim=True)
    return sample_image(features.float(), x), there.to(u)


def _compare(fixed: Tensor, warped: Tensor, reach: int) -> Tensor:
    """``[B, K, *cells]``: cosines of features with those of all cells around."""
    fixed = F.normalize(fixed.float(), dim=1)
    warped = F.normalize(warped, dim=1)
    d, size = fixed.dim() - 2, fixed.shape[2:]
    padded = F.pad(warped, (reach,) * (2 * d))
    costs = []
    for offset in itertools.product(range(2 * reach + 1), repeat=d):
        view = padded
        for axis, first in enumerate(offset):
            view = view.narrow(2 + axis, first, size[axis])
        costs.append((fixed * view).sum(1))
    return torch.stack(costs, 1)


def _expected(cost: Tensor, reach: int) -> Tensor:
    """``[B, d, *cells]``: the mean offset (cells), by the softmax of the costs."""
    d = cost.dim() - 2
    steps = torch.arange(-reach, reach + 1, device=cost.device, dtype=cost.dtype)
    offsets = torch.cartesian_prod(*[steps] * d).reshape(-1, d)
    mean: Tensor = torch.tensordot(cost.softmax(1), offsets, ([1], [0]))
    return mean.movedim(-1, 1)


def _doubled(features: Tensor) -> Tensor:
    mode = "bilinear" if features.dim() == 4 else "trilinear"
    size = [2 * n for n in features.shape[2:]]
    return F.interpolate(features, size, mode=mode, align_corners=False)


def _block(d: int, inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    # Kernels of even size keep the middles of cells where they are.
    size, padding = (3, 1) if stride == 1 else (4, 1) if inputs == 1 else (2, 0)
    convolution = _CONV[d](inputs, outputs, size, stride, padding)
    groups = max(1, math.gcd(8, outputs // 2))
    return nn.Sequential(
        convolution, nn.GroupNorm(groups, outputs), nn.LeakyReLU(_SLOPE)
    )


def _initialise(layer: nn.Module, generator: torch.Generator | None) -> None:
    known = cast(nn.Conv3d, layer)
    bound = (3 / known.weight[0].numel()) ** 0.5
    nn.init.uniform_(known.weight, -bound, bound, generator=generator)
    if known.bias is not None:
        nn.init.zeros_(known.bias)
