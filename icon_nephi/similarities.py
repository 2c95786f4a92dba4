"""Measures of how well samples of two images, or of two label maps, agree."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from icon_nephi.coordinates import to_rows


class PatchNCC:
    """1 - mean correlation of blocks, ``[B, C, *block]``; a similarity for `Patches`.

    Differs from ICON's NCC in a variance floor, so constant blocks (background) count
    as uncorrelated instead of dividing by zero, and in leaving out samples that the
    map takes outside the moving image (ICON's ``isInterpolated`` tag).

    Args:
        floor: added to each block's variance; images are about [0, 1].
        squared: 1 - mean squared correlation, for contrasts that may be inverted.
    """

    isInterpolated = True

    def __init__(self, floor: float = 1e-4, squared: bool = False) -> None:
        self.floor, self.squared = floor, squared

    def __call__(self, warped: Tensor, fixed: Tensor) -> Tensor:
        """Scalar; warped has the in-bounds tag (0 or 1) as its last channel."""
        weight = warped[:, -1:].flatten(2)
        a, b = warped[:, :-1].flatten(2), fixed.flatten(2)
        total = weight.sum(2, keepdim=True).clamp(min=1)
        a = (a - (a * weight).sum(2, keepdim=True) / total) * weight
        b = (b - (b * weight).sum(2, keepdim=True) / total) * weight
        covariance = (a * b).sum(2) / total[..., 0]
        variance_a = a.square().sum(2) / total[..., 0] + self.floor
        variance_b = b.square().sum(2) / total[..., 0] + self.floor
        correlation = covariance * (variance_a * variance_b).rsqrt()
        if self.squared:
            correlation = correlation.square()
        share = weight.mean(2)
        return 1 - (correlation * share).sum() / share.expand_as(
            correlation
        ).sum().clamp(min=1)


def dice_loss(
    moving: Tensor, fixed: Tensor, moved: Tensor, at: Tensor, labels: Tensor
) -> Tensor:
    """Scalar: mean over labels of 1 - soft Dice of two label maps at samples.

    A label's Dice is 2 sum(p q) / (sum(p^2) + sum(q^2)) for its shares p and q (see
    `read_labels`). Differs from uniGradICON's in the squares, with which equal shares
    score 0 between voxels too. Labels that no sample meets are left out.

    Args:
        moving: whole numbers ``[B, 1, *grid]``.
        fixed: whole numbers ``[B, 1, *grid]``.
        moved: samples in the moving image, ``[B, d, *any]``, ICON frame.
        at: the same samples in the fixed image.
        labels: ``[L]``, see `shared_labels`.
    """
    p = read_labels(moving, moved, labels)
    q = read_labels(fixed, at, labels)
    total = p.square().sum(2) + q.square().sum(2)
    met = (total > 0).to(total.dtype)
    loss = met - 2 * (p * q).sum(2) / (total + (1 - met))
    return loss.sum() / met.sum().clamp(min=1)


def read_labels(segmentation: Tensor, coordinates: Tensor, labels: Tensor) -> Tensor:
    """The share of each label at points, ``[B, L, N]``: one-hot, read multilinearly.

    Differentiable by the coordinates; no one-hot image is made. Outside the unit box
    the nearest border is read.

    Args:
        segmentation: whole numbers ``[B, 1, *grid]``.
        coordinates: ``[B, d, *any]`` with N points, ICON frame.
        labels: ``[L]``.
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
        found = flat.gather(1, ((base + side).long() * step).sum(2))
        here = found[:, None] == labels[:, None].to(found.dtype)
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
            "both maps the same numbers, or set dice_loss_weight to 0"
        )
    return labels
