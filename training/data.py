"""What is trained on: images, which of them make pairs, batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from icon_nephi.io.atomic import written_whole
from icon_nephi.space.frames import Geometry, identity_map
from icon_nephi.space.images import sample_image

Load = Callable[[int], tuple[Tensor, Tensor | None]]


@dataclass
class Images:
    """Images, and which of them are registered to each other.

    Attributes:
        load: number -> image ``[C, *grid]`` and its mask ``[1, *grid]`` or None; all
            have one shape.
        count: of images.
        pairs: numbers (moving, fixed) ``[M, 2]``; None: any two, drawn anew each epoch.
        masks: hand the masks to the network (ICON's own losses take none).
    """

    load: Load
    count: int
    pairs: Tensor | None = None
    masks: bool = False
    _order: tuple[object, Tensor] = field(default=(None, torch.empty(0)), repr=False)

    def rows(self, position: int, count: int, seed: int) -> Tensor:
        """Pairs ``[count, 2]`` from that position on of an endless list of epochs."""
        length = self.count if self.pairs is None else len(self.pairs)
        found = []
        while count:
            epoch, first = divmod(position, length)
            rows = self._epoch(epoch, seed)[first : first + count]
            found.append(rows)
            position += len(rows)
            count -= len(rows)
        return torch.cat(found)

    def _epoch(self, epoch: int, seed: int) -> Tensor:
        """All pairs, shuffled; a function of the epoch's number and the seed."""
        if self._order[0] != (epoch, seed):
            digest = hashlib.sha256(f"epoch {epoch} {seed}".encode()).digest()
            generator = torch.Generator().manual_seed(
                int.from_bytes(digest[:4], "little")
            )
            if self.pairs is None:
                # A round trip through all images: none is paired with itself.
                order = torch.randperm(self.count, generator=generator)
                rows = torch.stack([order, order.roll(1)], 1)
            else:
                order = torch.randperm(len(self.pairs), generator=generator)
                rows = self.pairs[order]
            self._order = (epoch, seed), rows
        return self._order[1]

    def batch(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Moving, fixed ``[B, C, *grid]`` and, with masks, their masks."""
        sides = [[self.load(int(i)) for i in column] for column in rows.T]
        images = tuple(torch.stack([image for image, _ in side]) for side in sides)
        if not self.masks:
            return images
        return images + tuple(torch.stack([m for _, m in side]) for side in sides)


def in_memory(images: Tensor, masks: Tensor | None = None) -> Load:
    """A loader of images ``[N, C, *grid]`` that are already there."""
    return lambda i: (images[i], None if masks is None else masks[i])


def all_ordered_pairs(count: int) -> Tensor:
    """(i, j) for all i and j that differ, ``[M, 2]``."""
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    return pairs[pairs[:, 0] != pairs[:, 1]]


def both_ways(pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Each pair and its reverse, ``[2 M, 2]``."""
    one = torch.tensor(pairs).reshape(-1, 2)
    return torch.cat([one, one.flip(1)])


def augment(
    batch: tuple[Tensor, ...],
    strength: float,
    generator: torch.Generator,
    flip: bool = False,
) -> tuple[Tensor, ...]:
    """Each image under its own random affine map.

    Args:
        batch: moving, fixed and perhaps their masks, ``[B, C, *grid]``.
        strength: standard deviation of the entries of (matrix - identity).
        generator: source of the maps.
        flip: mirror both of a pair alike, at random along each axis.
    """
    count, dimension = batch[0].shape[0], batch[0].dim() - 2
    grid = identity_map(batch[0].shape[2:])
    flips = torch.ones(count, dimension)
    if flip:
        flips -= 2 * torch.randint(2, (count, dimension), generator=generator)
    result = list(batch)
    for side in range(2):
        noise = torch.randn(count, dimension, dimension + 1, generator=generator)
        matrix = torch.eye(dimension) + strength * noise[..., :-1]
        shift = 0.5 + 0.5 * strength * noise[..., -1]
        matrix = matrix * flips[:, None]
        moved = torch.einsum(
            "bij,bj...->bi...", matrix, grid.expand(count, *grid.shape[1:]) - 0.5
        )
        moved = moved + shift.reshape(count, dimension, *(1,) * dimension)
        for i in range(side, len(batch), 2):
            mode = "bilinear" if i < 2 else "nearest"
            image = batch[i].float().to(moved)
            result[i] = sample_image(image, moved, mode).to(batch[i].dtype)
    return tuple(result)


# --- images from files --------------------------------------------------------------


def read(path: Path) -> tuple[Tensor, Geometry]:
    """An image file as ``[1, *grid]`` float32, and where it lies."""
    import itk

    image = itk.imread(str(path), itk.F)
    geometry = Geometry(
        size=tuple(reversed([int(n) for n in itk.size(image)])),
        spacing=tuple(float(s) for s in itk.spacing(image)),
        origin=tuple(float(o) for o in itk.origin(image)),
        direction=tuple(
            tuple(float(v) for v in row)
            for row in itk.array_from_matrix(image.GetDirection())
        ),
    )
    return torch.from_numpy(np.array(itk.array_view_from_image(image)))[None], geometry


def resample(image: Tensor, spacing: Sequence[float], mm: float, mode: str) -> Tensor:
    """``[C, *grid]`` at ``mm`` millimetres a voxel, voxel edges kept."""
    size = [
        max(2, round(n * s / mm)) for n, s in zip(image.shape[1:], spacing, strict=True)
    ]
    if mode == "nearest":
        return F.interpolate(image[None], size=size, mode="nearest-exact")[0]
    # Averaged before it is made smaller, so that detail does not turn into noise.
    while any(n >= 2 * m for n, m in zip(image.shape[1:], size, strict=True)):
        steps = [
            2 if n >= 2 * m else 1 for n, m in zip(image.shape[1:], size, strict=True)
        ]
        pool = F.avg_pool2d if len(steps) == 2 else F.avg_pool3d
        image = pool(image[None], steps, ceil_mode=True)[0]
    linear = "bilinear" if len(size) == 2 else "trilinear"
    return F.interpolate(image[None], size=size, mode=linear)[0]


def box(image: Tensor, shape: Sequence[int], value: float | None = None) -> Tensor:
    """``[C, *grid]`` cut or padded around its middle to a shape.

    Args:
        image: to be cut or padded.
        shape: the new grid.
        value: of what is added; None: the border continues.
    """
    cuts, pads = [slice(None)], []
    for n, m in zip(image.shape[1:], shape, strict=True):
        before = (m - n) // 2
        cuts.append(slice(max(0, -before), max(0, -before) + min(n, m)))
        pads = [max(0, before), max(0, m - n - before), *pads]
    image = image[tuple(cuts)]
    if value is None:
        return F.pad(image[None], pads, mode="replicate")[0]
    return F.pad(image, pads, value=value)


def middle(
    points: Tensor, geometry: Geometry, mm: float, shape: Sequence[int]
) -> Tensor:
    """Rows in a file's unit box, after `resample` and `box`, in the new unit box."""
    moved = []
    spacing = list(reversed(geometry.spacing))
    for axis, (n, s, m) in enumerate(zip(geometry.size, spacing, shape, strict=True)):
        count = max(2, round(n * s / mm))
        # Edges are kept: half a voxel before the first centre in both grids.
        voxel = (points[:, axis] * (n - 1) + 0.5) * count / n - 0.5
        moved.append((voxel + (m - count) // 2) / (m - 1))
    return torch.stack(moved, 1)


def kept(make: Load, folder: Path | None) -> Load:
    """The same loader, with what it made kept in a folder (or in memory)."""
    memory: dict[int, tuple[Tensor, Tensor | None]] = {}

    def load(i: int) -> tuple[Tensor, Tensor | None]:
        if folder is None:
            if i not in memory:
                memory[i] = make(i)
            return memory[i]
        path = folder / f"{i:05d}.pt"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as (part,):
                torch.save(make(i), part)
        image, mask = torch.load(path, weights_only=True)
        return image, mask

    return load
