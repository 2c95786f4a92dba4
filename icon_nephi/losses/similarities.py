"""Measures of how well samples of two images, or of two label maps, agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from icon_nephi.space.frames import to_rows


class PatchNCC:
    """1 - mean correlation of blocks, ``[B, C, *block]``; a similarity for `Patches`.

    Differs from ICON's NCC in a variance floor, so constant blocks (background) count
    as uncorrelated instead of dividing by zero, and in leaving out samples that the
    map takes outside the moving image (ICON's ``isInterpolated`` tag).

    Args:
        floor: added to each block's variance; images are about [0, 1].
        squared: 1 - mean squared correlation, for contrasts that may be inverted.
        shared: add the floor to the covariance, too, so that two constant blocks are
            alike. Without, the best map of an image to itself is not the identity, but
            one that shows more contrast at faint edges: determinants are 1 % off.
    """

    isInterpolated = True

    def __init__(
        self, floor: float = 1e-4, squared: bool = False, shared: bool = False
    ) -> None:
        self.floor, self.squared, self.shared = floor, squared, shared and not squared

    @property
    def form(self) -> int:
        """0: plain, 1: squared, 2: the floor is shared."""
        return 1 if self.squared else 2 * self.shared

    def __call__(self, warped: Tensor, fixed: Tensor) -> Tensor:
        """Scalar; warped has the in-bounds tag (0 or 1) as its last channel."""
        weight = warped[:, -1:].flatten(2)
        a, b = warped[:, :-1].flatten(2), fixed.flatten(2)
        shared = self.floor if self.shared else 0.0
        correlation = correlations(a, b, weight, self.floor, shared)
        if self.squared:
            correlation = correlation.square()
        share = weight.mean(2)
        total = share.expand_as(correlation).sum().clamp(min=1)
        return 1 - (correlation * share).sum() / total


def correlations(
    a: Tensor, b: Tensor, weight: Tensor, floor: float, shared: float = 0.0
) -> Tensor:
    """``[N, C]``: of samples ``[N, C, S]`` with weights ``[N, 1, S]``.

    The floor is added to both variances, what is ``shared`` to the covariance.
    """
    total = weight.sum(2, keepdim=True).clamp(min=1)
    a, b = ((i - (i * weight).sum(2, keepdim=True) / total) * weight for i in (a, b))
    total = total[..., 0]
    spread = [i.square().sum(2) / total + floor for i in (a, b)]
    together = (a * b).sum(2) / total + shared
    return together * (spread[0] * spread[1]).rsqrt()


class MutualInformation:
    """1 - the share of information that two images have in common, for any contrasts.

    Of scattered samples, `Points` ``[B, C, N, 1(, 1)]``, every item and channel has
    its own joint histogram (Parzen windows, so it is differentiable); the blocks of
    `Patches` are one set of samples, for a few samples have no histogram. The mean
    over channels counts. Samples outside the moving image are left out, as in
    `PatchNCC`.

    Args:
        bins: of each image, between low and high.
        low: intensities below count as this; the default is the least that
            `icon_nephi.space.intensities.prepare` gives.
        high: intensities above count as this; the default is the most it gives.
    """

    isInterpolated = True

    def __init__(self, bins: int = 32, low: float = -0.2, high: float = 1.5) -> None:
        if bins < 2 or not low < high:
            raise ValueError(
                "MutualInformation needs at least 2 bins and low below high, got bins="
                f"{bins}, low={low}, high={high}"
            )
        self.bins, self.low, self.high = bins, low, high

    def __call__(self, warped: Tensor, fixed: Tensor) -> Tensor:
        """Scalar; warped has the in-bounds tag (0 or 1) as its last channel."""
        if math.prod(warped.shape[3:]) > 1:
            warped, fixed = (x.transpose(0, 1)[None] for x in (warped, fixed))
        warped, fixed = warped.flatten(2), fixed.flatten(2)
        return 1 - self.shared(warped[:, :-1], fixed, warped[:, -1:]).mean()

    def shared(self, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
        """``[...]``: 2 I / (H_first + H_second) of samples ``[..., N]``, 0 to 1.

        The shapes may differ where they broadcast.
        """
        windows = self._windows(first) * weight[..., None]
        return _common(windows.mT @ self._windows(second))

    def counted(self, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
        """As `shared`, of plain histograms: no gradient, and thirty times quicker."""
        first, second, weight = torch.broadcast_tensors(
            self._bin(first).round(), self._bin(second).round(), weight
        )
        bins, shape = self.bins, first.shape[:-1]
        cell = (first * bins + second).long().flatten(0, -2)
        cell = cell + bins**2 * torch.arange(len(cell), device=cell.device)[:, None]
        count = len(cell) * bins**2
        joint = torch.bincount(cell.flatten(), weight.flatten(), minlength=count)
        return _common(joint.reshape(*shape, bins, bins))

    def _bin(self, values: Tensor) -> Tensor:
        """Where values lie among the bins, 0 to bins - 1, between them too."""
        inner = values.clamp(self.low, self.high) - self.low
        return inner * ((self.bins - 1) / (self.high - self.low))

    def _windows(self, values: Tensor) -> Tensor:
        """``[..., N, bins]``: the share of each sample in each bin, Gaussian."""
        bins = torch.arange(self.bins, dtype=values.dtype, device=values.device)
        away = (self._bin(values)[..., None] - bins) / _WINDOW
        return torch.softmax(-0.5 * away.square(), -1)


# Width of the windows, in bins.
_WINDOW = 1.0


def _common(joint: Tensor) -> Tensor:
    """``[...]``: 2 I / (H_first + H_second) of joint histograms ``[..., K, K]``."""
    joint = joint / joint.sum((-2, -1), keepdim=True).clamp(min=1e-6)
    apart = _entropy(joint.sum(-1), 1) + _entropy(joint.sum(-2), 1)
    return 2 * (apart - _entropy(joint, 2)) / apart.clamp(min=1e-6)


def _entropy(shares: Tensor, axes: int) -> Tensor:
    """In nats, over the last axes."""
    return -(shares * (shares + 1e-12).log()).flatten(-axes).sum(-1)


@dataclass(frozen=True)
class Comparison:
    """What a registration compares, and on what.

    Attributes:
        similarity: of samples.
        points: on single points of blurred images, not on blocks.
        features: the similarity is of self-similarity features "only"; or these are
            compared "beside" where the settings have a weight for them; or "never".
        contrast: the images may have different contrasts, so that the search for an
            affine start must not go by correlation.
        name: by which it was found.
    """

    similarity: Callable[[Tensor, Tensor], Tensor]
    points: bool = False
    features: Literal["only", "beside", "never"] = "never"
    contrast: bool = False
    name: str = ""

    @property
    def alone(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What compares the intensities, where there are no features."""
        return MutualInformation() if self.features == "only" else self.similarity


NAMES = ("ncc", "lncc", "lncc2", "mind", "mi")
#: What stands for the one of them that suits the images, see `find_contrast`.
AUTO = "auto"


def find_similarity(similarity: Any, floor: float = 1e-3) -> Comparison:
    """What a name in `NAMES` means; a callable is taken for blocks.

    None and "auto" are "lncc", with which a fit begins to look for what suits.

    Args:
        similarity: "lncc": correlation of blocks; "lncc2": its square, for contrasts
            that may be inverted; "ncc": correlation of all samples; "mind": lncc of
            self-similarity features, "mi": mutual information, for other modalities.
        floor: see `PatchNCC`.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor callable.
    """
    if callable(similarity) and not isinstance(similarity, type):
        return Comparison(similarity)
    similarity = "lncc" if similarity in (None, AUTO) else similarity
    names = ", ".join(map(repr, NAMES))
    named = f"a name of {names} or an ICON similarity object, or {AUTO!r}"
    if not isinstance(similarity, str):
        raise TypeError(f"similarity must be {named}, got {similarity!r}")
    ncc = PatchNCC(floor, shared=True)
    comparisons = {
        "lncc": Comparison(ncc, features="beside"),
        "lncc2": Comparison(PatchNCC(floor, squared=True), contrast=True),
        "ncc": Comparison(ncc, points=True),
        "mind": Comparison(ncc, features="only", contrast=True),
        "mi": Comparison(MutualInformation(), points=True, contrast=True),
    }
    if similarity not in comparisons:
        raise ValueError(f"similarity must be {named}, got {similarity!r}")
    return replace(comparisons[similarity], name=similarity)


def dice_loss(
    moving: Tensor, fixed: Tensor, moved: Tensor, at: Tensor, labels: Tensor
) -> Tensor:
    """Scalar: mean over labels of 1 - soft Dice of two label maps at samples.

    A label's Dice is 2 sum(p q) / (sum(p^2) + sum(q^2)) for its shares p and q (see
    `read_labels`). Differs from uniGradICON's in the squares, with which equal shares
    score 0 between voxels too. Labels that no sample meets are left out.

    Both maps hold whole numbers ``[B, 1, *grid]`` and are read at the same samples
    ``[B, d, *any]``, each in its own ICON frame; labels as of `shared_labels`.
    """
    p = read_labels(moving, moved, labels)
    q = read_labels(fixed, at, labels)
    total = p.square().sum(2) + q.square().sum(2)
    met = (total > 0).to(total.dtype)
    loss = met - 2 * (p * q).sum(2) / (total + (1 - met))
    return loss.sum() / met.sum().clamp(min=1)


def read_labels(segmentation: Tensor, coordinates: Tensor, labels: Tensor) -> Tensor:
    """The share of each label at points, ``[B, L, N]``: one-hot, read multilinearly.

    Of whole numbers ``[B, 1, *grid]`` at ICON-frame coordinates ``[B, d, *any]`` with N
    points, by which it is differentiable; no one-hot image is made. Outside the unit
    box the nearest border is read.
    """
    shape = segmentation.shape[2:]
    rows = to_rows(coordinates)
    last = torch.tensor(shape, dtype=rows.dtype, device=rows.device) - 1
    x = rows.clamp(0, 1) * last
    base = x.detach().floor().minimum(last - 1)
    part = x - base
    strides = [shape[axis + 1 :].numel() for axis in range(len(shape))]
    step = torch.tensor(strides, device=rows.device)
    flat = segmentation.flatten(1).expand(rows.shape[0], -1)
    shares = rows.new_zeros(rows.shape[0], len(labels), rows.shape[1])
    for corner in product((0.0, 1.0), repeat=len(shape)):
        side = torch.tensor(corner, dtype=rows.dtype, device=rows.device)
        weight = (side * part + (1 - side) * (1 - part)).prod(2)
        numbers = flat.gather(1, ((base + side).long() * step).sum(2))
        here = numbers[:, None] == labels[:, None].to(numbers.dtype)
        shares = shares + weight[:, None] * here
    return shares


def shared_labels(first: Tensor, second: Tensor) -> Tensor:
    """``[L]``: the labels above zero that both label maps hold.

    Raises:
        ValueError: none, or a negative label.
    """
    if not first.numel():
        return torch.empty(0, dtype=torch.long, device=first.device)
    if min(first.min(), second.min()) < 0:
        raise ValueError("labels must be 0 (background) or above, got a negative one")
    held = [image.long().flatten().bincount() > 0 for image in (first, second)]
    length = min(map(len, held))
    labels = (held[0][:length] & held[1][:length])[1:].nonzero()[:, 0] + 1
    if not len(labels):
        raise ValueError(
            "segmentation_A and segmentation_B have no label above 0 in common; give "
            "both maps the same numbers, or leave the Dice term out"
        )
    return labels
