"""Blocks of samples, and the regularity, on the compiled core.

The references are `icon_nephi.blocks` with `icon_nephi.similarities` and
`icon_nephi.features`, and `icon_nephi.folds`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from icon_nephi.core import arrays, loading, threads
from icon_nephi.core.arrays import address, pack
from icon_nephi.losses.features import FeatureDifference, FeaturesAlone
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.space.sampling import Patches

_STORED = 16  # channels of features are padded to a multiple of these


@dataclass(frozen=True)
class Measure:
    """What a similarity compares, as the core does.

    Attributes:
        correlation: of the channels from ``first`` to ``last``.
        first: see correlation.
        last: see correlation.
        weight: of the squared difference of the channels after ``last``; None: none.
    """

    correlation: PatchNCC
    first: int
    last: int
    weight: float | None


def find_measure(similarity: object, channels: int) -> Measure | None:
    """A similarity of images with so many channels; None where torch has to do it."""
    if type(similarity) is PatchNCC:
        return Measure(similarity, 0, channels, None)
    inner = getattr(similarity, "similarity", None)
    if type(inner) is not PatchNCC:
        return None
    if type(similarity) is FeaturesAlone and similarity.channels < channels:
        return Measure(inner, similarity.channels, channels, None)
    if type(similarity) is FeatureDifference and similarity.channels < channels:
        return Measure(inner, 0, similarity.channels, similarity.weight)
    return None


class Channels:
    """An image as the core reads it.

    Args:
        image: ``[1, C, *grid]``.
        measure: which channels are intensities, and which features.
        bits: of a feature, 32 or 16; 16 are for numbers from 0 to 1.
        counts: ``[1, 1, *grid]``: samples at voxels of 0 are left out; None: none is.
    """

    def __init__(
        self,
        image: Tensor,
        measure: Measure,
        bits: int = 32,
        counts: Tensor | None = None,
    ) -> None:
        self.size = tuple(image.shape[2:])
        self.counts: Tensor | None = None
        if counts is not None:
            assert counts.shape[2:] == image.shape[2:]
            self.counts = (counts[0, 0] > 0).to(torch.uint8).contiguous()
        self.intensities = image[0, measure.first : measure.last].contiguous()
        self.features: Tensor | None = None
        self.bits, self.count = bits, 0
        if measure.weight is None:
            return
        features = image[0, measure.last :]
        self.count = len(features)
        stored = self.count + -self.count % _STORED
        dtype = torch.float32 if self.bits == 32 else torch.int16
        # int16 stands for the uint16 that is meant.
        self.features = torch.zeros(*self.size, stored, dtype=dtype)
        if self.bits == 32:
            self.features[..., : self.count] = features.movedim(0, -1)
        else:
            pack(features, self.features)

    @staticmethod
    def of(
        images: Sequence[Tensor],
        measure: Measure,
        counts: Sequence[Tensor | None] = (None, None),
    ) -> list[Channels]:
        """Images that are compared; features in 16 bits where that suits them all.

        What is read waits for memory, of which that is half.
        """
        bits = 16
        if measure.weight is not None:
            for image in images:
                low, high = torch.aminmax(image[0, measure.last :])
                bits = bits if low >= 0 and high <= 1 else 32
        both = zip(images, counts, strict=False)
        return [Channels(image, measure, bits, known) for image, known in both]

    def raw(self) -> loading.Image:
        """The struct; its memory is this object's."""
        size = (*self.size, 1)[:3]
        return loading.Image(
            address(self.intensities),
            address(self.features),
            address(self.counts),
            (ctypes.c_int64 * 3)(*size),
        )


def _kind(channels: Channels) -> tuple[int, int, int, int]:
    """What two images that are compared have in common."""
    return len(channels.size), len(channels.intensities), channels.count, channels.bits


class Layout:
    """Where the samples of blocks lie around their centres, and the map's places.

    Args:
        patches: the blocks.
        shape: grid that the stride counts voxels of.
    """

    def __init__(self, patches: Patches, shape: torch.Size) -> None:
        d, size, like = len(shape), patches.size, torch.empty(0)
        offsets = patches.offsets(shape, like)
        self.offsets = offsets.flatten(1).contiguous()
        self.samples = self.places = size**d
        self.corners: Tensor | None = None
        self.shares: Tensor | None = None
        if not patches.corners:
            return
        for axis in range(1, d + 1):
            ends = torch.tensor([0, size - 1])
            offsets = offsets.index_select(axis, ends)
        self.corners, self.places = offsets.flatten(1).contiguous(), 2**d
        share = torch.linspace(0, 1, size)
        weights = torch.stack([1 - share, share])
        shares = torch.ones(1, 1)
        for _ in range(d):
            shares = torch.kron(shares, weights)
        self.shares = shares.contiguous()

    def at(self, centres: Tensor) -> Tensor:
        """``[P * places, d]``: where the map is evaluated, of centres ``[P, d]``."""
        around = self.offsets if self.corners is None else self.corners
        return (centres[:, None] + around.T).flatten(0, 1).contiguous()


def compare(
    layout: Layout,
    measure: Measure,
    centres: Tensor,
    post: Tensor,
    moving: Channels,
    fixed: Channels,
    at: Tensor,
    moves: Tensor,
    by_moves: Tensor,
) -> float:
    """Similarity of the blocks at centres under x -> post(at + moves).

    Args:
        layout: of the blocks.
        measure: what is compared.
        centres: ``[P, d]`` in the fixed image's unit box.
        post: ``[d, d + 1]``.
        moving: image.
        fixed: image.
        at: ``[P * places, d]``, where the map was evaluated.
        moves: what its field found there.
        by_moves: the gradient by moves, written.
    """
    d, weight = centres.shape[1], measure.weight
    assert _kind(moving) == _kind(fixed)
    raw = loading.Blocks(
        ctypes.sizeof(loading.Blocks),
        d,
        len(centres),
        layout.samples,
        layout.places,
        len(moving.intensities),
        moving.count,
        0 if moving.features is None else moving.features.shape[-1],
        moving.bits,
        measure.correlation.form,
        address(centres),
        address(layout.offsets),
        address(layout.corners),
        address(layout.shares),
        address(post),
        moving.raw(),
        fixed.raw(),
        measure.correlation.floor,
        weight or 0.0,
    )
    sums = (ctypes.c_double * 2)()
    loading.call(
        "nephi_compare",
        ctypes.byref(raw),
        address(at),
        address(moves),
        threads.count(),
        sums,
        address(by_moves),
    )
    return sums[0] + (weight or 0.0) * sums[1]


@dataclass(frozen=True)
class Consistency:
    """What `consistency` finds.

    Attributes:
        term: of `guarded_term`.
        folded: share of the points where the first map folds.
        by_1: gradient of the weighted term by the first Jacobian, ``[N, d, d]``.
        by_2: by the second.
        by_values: by where both maps take the points.
    """

    term: float
    folded: float
    by_1: Tensor
    by_2: Tensor
    by_values: Tensor


def consistency(
    points: Tensor,
    values: Tensor,
    jacobians: tuple[Tensor, Tensor],
    matrices: tuple[Tensor, Tensor, Tensor, Tensor],
    extent: Tensor,
    drift: float,
    hinge: float,
    goal: float,
    weight: float,
) -> Consistency:
    """`guarded_term` of two maps x -> post(y + u(y)), y = pre x, and its gradients.

    Args:
        points: ``[N, d]``.
        values: where both maps take them.
        jacobians: ``[N, d, d]`` of the first's u, and of the second's.
        matrices: the first's pre and post ``[d, d + 1]``, and the second's.
        extent: ``[d]``.
        drift: weight of inverse consistency, inside.
        hinge: weight of the guard, inside.
        goal: relative determinants below it are pushed up.
        weight: of all that, in the gradients only.
    """
    count, d = points.shape
    raw = loading.Consistency(
        ctypes.sizeof(loading.Consistency),
        d,
        count,
        *map(address, (points, values, *jacobians, *matrices, extent)),
        drift,
        hinge,
        goal,
        weight,
    )
    sums = (ctypes.c_double * 4)()
    by_1, by_2 = (torch.empty_like(j) for j in jacobians)
    by_values = torch.empty_like(values)
    loading.call(
        "nephi_consistency",
        ctypes.byref(raw),
        sums,
        *map(address, (by_1, by_2, by_values)),
    )
    term = sums[0] + drift * sums[1] + hinge * sums[2]
    return Consistency(term, sums[3], by_1, by_2, by_values)


class _Agreement(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        matrix: Tensor,
        centres: Tensor,
        layout: Layout,
        measure: Measure,
        moving: Channels,
        fixed: Channels,
    ) -> Tensor:
        d = centres.shape[1]
        at = layout.at(centres)
        rows = matrix[:d].detach().float()
        moved = (at @ rows[:, :d].T + rows[:, d]).contiguous()
        by_moves, identity = torch.empty_like(moved), torch.eye(d, d + 1)
        found = compare(
            layout,
            measure,
            centres,
            identity,
            moving,
            fixed,
            moved,
            torch.zeros_like(moved),
            by_moves,
        )
        ones = at.new_ones(len(at), 1)
        gradient = torch.zeros_like(matrix)
        gradient[:d] = by_moves.T @ torch.cat([at, ones], 1)
        ctx.save_for_backward(gradient)
        return matrix.new_tensor(found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad * ctx.saved_tensors[0], None, None, None, None, None


_agreement = cast(Callable[..., Tensor], _Agreement.apply)


def agreement_of(
    similarity: object,
    image_A: Tensor,
    image_B: Tensor,
    counts: Sequence[Tensor | None] = (None, None),
) -> Callable[[Tensor, Tensor, Patches, bool], Tensor] | None:
    """The similarity of blocks under affine maps; None where torch has to do it.

    Args:
        similarity: of blocks.
        image_A: moving ``[1, C, *grid]``.
        image_B: fixed.
        counts: of both, where samples count, see `Channels`.

    Returns:
        A function, differentiable by its matrix: of a matrix ``[d + 1, d + 1]`` from
        one unit box to the other, centres ``[P, d]`` of blocks in the first, the
        blocks, and whether the first is image_B's.
    """
    measure = find_measure(similarity, image_A.shape[1])
    if measure is None or not arrays.suit(image_A, image_B):
        return None
    A, B = Channels.of((image_A, image_B), measure, counts)

    def agreement(
        matrix: Tensor, centres: Tensor, patches: Patches, forth: bool
    ) -> Tensor:
        moving, fixed = (A, B) if forth else (B, A)
        layout = Layout(patches, torch.Size(fixed.size))
        return _agreement(matrix, centres.contiguous(), layout, measure, moving, fixed)

    return agreement
