"""Self-similarity of an image with itself (MIND-SSC), to compare beside intensities.

Heinrich et al. 2013: around every voxel, how alike the places beside it are. What
stays where contrast and noise differ is the structure.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from icon_nephi.core import arrays

# Voxels between a place and those beside it, and of the blocks compared around them.
REACH, RADIUS = 2, 1


def with_features(image: Tensor) -> Tensor:
    """``[B, C + F, *grid]``: the image and F = 12 features (2D: 4) between 0 and 1.

    Channels lie beside each other in memory: reading them all at a point is then
    three times faster.
    """
    if arrays.suit(image):
        return arrays.with_features(image)
    d = image.dim() - 2
    features = image.new_empty(image.shape[0], 2 * d * (d - 1), *image.shape[2:])
    around = _padded(image, REACH)
    for channel, sides in enumerate(_sides(d)):
        first, second = ((axis, sign * REACH) for axis, sign in sides)
        different = _moved(around, *first) - _moved(around, *second)
        different.square_()
        features[:, channel : channel + 1] = _box(different.sum(1, keepdim=True))
    features -= features.amin(1, keepdim=True)
    spread = features.mean(1, keepdim=True)
    features /= -spread.clamp(min=1e-3 * float(spread.mean()) + 1e-12)
    layout = torch.channels_last if d == 2 else torch.channels_last_3d
    return torch.cat([image, features.exp_()], 1).contiguous(memory_format=layout)


def turned(image: Tensor, matrix: Tensor) -> Tensor:
    """The image with its features in the order of another's whose axes lie elsewhere.

    A feature compares the places on two sides of a voxel, sides of its own tensor axes.
    The matrix ``[d, d]`` takes the other's axes to the image's; each of them is taken
    for the one nearest to it. Without a turn by about 90 degrees or more, or a mirror,
    nothing changes.

    Args:
        image: ``[B, C + F, *grid]`` of `with_features`.
        matrix: in lengths that are the same along all axes.
    """
    d = len(matrix)
    orders = permutations(range(d))
    axes = max(
        orders,
        key=lambda order: sum(abs(float(matrix[a, j])) for j, a in enumerate(order)),
    )
    own = {frozenset(sides): channel for channel, sides in enumerate(_sides(d))}
    signs = [1 if matrix[a, j] >= 0 else -1 for j, a in enumerate(axes)]
    channels = [
        own[frozenset((axes[axis], sign * signs[axis]) for axis, sign in sides)]
        for sides in _sides(d)
    ]
    if channels == sorted(channels):
        return image
    count = image.shape[1] - len(channels)
    layout = torch.channels_last if d == 2 else torch.channels_last_3d
    wanted = torch.tensor([*range(count), *(count + c for c in channels)])
    moved = image.index_select(1, wanted.to(image.device))
    return moved.contiguous(memory_format=layout)


class FeatureDifference:
    """A similarity of intensities, and the mean squared difference of features.

    Of so many first channels, which are intensities; the rest, which are features, have
    the weight. With ``isInterpolated`` the similarity gets the tag.
    """

    isInterpolated = True

    def __init__(
        self,
        similarity: Callable[[Tensor, Tensor], Tensor],
        channels: int,
        weight: float,
    ) -> None:
        self.similarity, self.channels, self.weight = similarity, channels, weight

    def __call__(self, warped: Tensor, fixed: Tensor) -> Tensor:
        """Scalar; warped has the in-bounds tag (0 or 1) as its last channel."""
        tag, own = warped[:, -1:], warped[:, : self.channels]
        if getattr(self.similarity, "isInterpolated", False):
            own = torch.cat([own, tag], 1)
        error = (warped[:, self.channels : -1] - fixed[:, self.channels :]).square()
        mean = (error * tag).mean() / tag.mean().clamp(min=1e-3)
        return self.similarity(own, fixed[:, : self.channels]) + self.weight * mean


class FeaturesAlone:
    """A similarity of the features, whatever the intensities: for other modalities.

    So many first channels are intensities. `PatchNCC` is such a similarity: it gets the
    features and the in-bounds tag.
    """

    isInterpolated = True

    def __init__(
        self, similarity: Callable[[Tensor, Tensor], Tensor], channels: int
    ) -> None:
        self.similarity, self.channels = similarity, channels

    def __call__(self, warped: Tensor, fixed: Tensor) -> Tensor:
        """Scalar; warped has the in-bounds tag (0 or 1) as its last channel."""
        return self.similarity(warped[:, self.channels :], fixed[:, self.channels :])


def _sides(d: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """For every feature the two sides, (axis, sign), that it compares."""
    sides = [(axis, sign) for axis in range(d) for sign in (1, -1)]
    return [p for p in combinations(sides, 2) if p[0][0] != p[1][0]]


def _padded(image: Tensor, by: int) -> Tensor:
    """The image with its border repeated."""
    return F.pad(image, (by,) * 2 * (image.dim() - 2), mode="replicate")


def _moved(around: Tensor, axis: int, by: int) -> Tensor:
    """The image a few voxels further along an axis, a view of the padded one."""
    for a in range(around.dim() - 2):
        start = REACH + (by if a == axis else 0)
        around = around.narrow(2 + a, start, around.shape[2 + a] - 2 * REACH)
    return around


def _box(image: Tensor) -> Tensor:
    """Means of the blocks around every voxel, borders repeated."""
    around = _padded(image, RADIUS)
    for axis in range(2, image.dim()):
        count = image.shape[axis]
        total = around.narrow(axis, 0, count).clone()
        for by in range(1, 2 * RADIUS + 1):
            total += around.narrow(axis, by, count)
        around = total
    return around.div_((2 * RADIUS + 1) ** (image.dim() - 2))
