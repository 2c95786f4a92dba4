"""One image ready to be fitted: intensities by modality, noise, lost slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from icon_nephi.space.chunks import ChunkedImage
from icon_nephi.space.frames import Geometry

MODALITIES = (None, "ct", "mri")
# Lung detail to soft tissue on one scale: a thousandth is one Hounsfield unit.
_HOUNSFIELD = (-1000.0, 500.0)
# Share of a slice that has to differ from its middle value to show something.
FEW = 0.002
# A distance map's slope is this even, over such a share; looked at in the middle.
EVEN, MOSTLY, _SIDE = 0.15, 0.8, {2: 400, 3: 64}
# Quantiles are read from at most this many voxels.
_VOXELS = 500_000


# Values further from the middle nine tenths of an image than so many times their range
# are metal, electrodes or defects; a range of less than so much noise is none.
FAR, FLAT = 3.0, 10.0
_TAILS = 0.001, 0.003, 0.01, 0.02, 0.03, 0.05


def prepare(
    image: Tensor, modality: str | None = None, counts: Tensor | None = None
) -> Tensor:
    """An image ``[B, C, *grid]`` scaled to about [0, 1], float32.

    ``"ct"``: Hounsfield units clipped to [-1000, 500], a thousand to one. ``"mri"``
    and None: the 1st and 99th percentile (None: 0.1th and 99.9th) of each channel go
    to 0 and 1, a fifth beyond is kept; up to a twentieth at either end is left out of
    that where it is far off all other values. Voxels count where ``counts``
    ``[B, 1, *grid]`` is above zero.

    Raises:
        ValueError: unknown modality.
    """
    return find_scale(image, modality, counts)(image.float())


def find_scale(
    image: Tensor, modality: str | None = None, counts: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """What `prepare` does to an image, as a function of any of its float32 voxels.

    Its argument is ``[B, C, *any]`` with as many axes as the image.

    Raises:
        ValueError: unknown modality.
    """
    if modality not in MODALITIES:
        raise ValueError(
            f"modality must be one of {MODALITIES}, got {modality!r}; None scales by "
            "quantiles"
        )
    image = image.float()
    if modality == "ct":
        low, high = _HOUNSFIELD
        return lambda values: (values.clamp(low, high) - low) / 1000
    share = 0.01 if modality == "mri" else 0.001
    flat = image.transpose(0, 1).flatten(1)
    if counts is not None:
        flat = flat[:, (counts > 0).transpose(0, 1).flatten()]
    flat = flat[:, :: max(1, flat.shape[1] // _VOXELS)]
    tails = [tail for tail in _TAILS if tail >= share]
    lows, highs = (
        torch.quantile(flat, torch.tensor(at, device=image.device), dim=1)
        for at in (tails, [1 - tail for tail in tails])
    )
    shape = (1, -1, *(1,) * (image.dim() - 2))
    bottom, top = (end.reshape(shape) for end in (lows[0], highs[0]))
    width = highs[-1] - lows[-1]
    if bool((highs[0] - highs[-1] > FAR * width).any()) or bool(
        (lows[-1] - lows[0] > FAR * width).any()
    ):  # where what is left shows something, the ends do not count
        left = image.clamp(lows[-1].reshape(shape), highs[-1].reshape(shape))
        shown = width > FLAT * noise(left)
        bottom, top = (
            torch.where(shown, _nearest(ends, width), ends[0]).reshape(shape)
            for ends in (lows, highs)
        )
    # A mostly empty image can have equal quantiles; its extremes always differ.
    flatness = (top <= bottom).to(image.dtype)
    lowest, highest = (x.reshape(shape) for x in (flat.amin(1), flat.amax(1)))
    bottom = bottom + flatness * (lowest - bottom)
    top = top + flatness * (highest - top)
    width = (top - bottom).clamp(min=1e-12)
    return lambda values: ((values - bottom) / width).clamp(-0.2, 1.2)


def _nearest(ends: Tensor, width: Tensor) -> Tensor:
    """``[C]``: of quantiles ``[T, C]`` the first that is not far from the last."""
    near = (ends - ends[-1]).abs() <= FAR * width
    return ends.gather(0, near.int().argmax(0, keepdim=True))[0]


def noise(image: Tensor) -> float:
    """The standard deviation of the noise of ``[B, C, *grid]``, its noisiest channel.

    From differences that smooth structures do not have: second ones along every axis
    (Immerkaer 1996), the median at up to half a million voxels. An image of which more
    than half is constant has none.
    """
    size = image.shape[2:]
    if min(size) < 3:
        return 0.0
    apart = math.ceil((size.numel() / _VOXELS) ** (1 / len(size)))
    rough = image
    for axis in range(2, image.dim()):
        rough = rough.unfold(axis, 3, apart)
    for _ in size:
        rough = rough @ image.new_tensor([1.0, -2.0, 1.0])
    middle = rough.abs().transpose(0, 1).flatten(1).median(1).values.amax()
    # 0.6745: the median of |x|, x standard normal; 6: the squares of 1, -2, 1.
    return float(middle) / 0.6745 / 6 ** (len(size) / 2)


def missing_slices(image: Tensor, axis: int) -> Tensor:
    """Numbers of the slices that are constant between some of ``[B, C, *grid]`` not.

    A slice with a few voxels that differ from its middle one is neither.
    """
    others = [a for a in range(image.dim()) if a != axis]
    empty = image.amax(others) - image.amin(others) <= 1e-6
    if not bool(empty.any()):
        return empty.nonzero().flatten()
    slices = image.movedim(axis, 0).flatten(1)
    differ = (slices - slices.median(1, keepdim=True).values).abs() > 1e-6
    full = (differ.sum(1) >= max(4, FEW * slices.shape[1])).nonzero().flatten()
    if len(full) == 0:
        return full
    between = torch.arange(len(empty), device=image.device)
    return between[empty & (between > full[0]) & (between < full[-1])]


def fill_missing(image: Tensor) -> Tensor:
    """The image, its missing slices interpolated between their neighbours.

    Where these show the same thing (they correlate by more than a half) a slice was
    lost; otherwise it is taken for space between objects and left empty.
    """
    for axis in range(2, image.dim()):
        gone = missing_slices(image, axis)
        if len(gone) == 0:
            continue
        slices = image.movedim(axis, 0).clone()
        there = torch.ones(len(slices), dtype=torch.bool, device=image.device)
        there[gone] = False
        full = there.nonzero().flatten()
        after = torch.searchsorted(full, gone)
        low, high = full[after - 1], full[after]
        pairs = torch.stack([slices[low], slices[high]]).flatten(2)
        pairs = F.normalize(pairs - pairs.mean(2, keepdim=True), dim=2)
        alike = pairs.prod(0).sum(1) > 0.5
        share = ((gone - low) / (high - low)).to(image)
        share = share.view(-1, *(1,) * (image.dim() - 1))
        slices[gone[alike]] = torch.lerp(slices[low], slices[high], share)[alike]
        image = slices.movedim(0, axis).contiguous()
    return image


def distance_reach(image: Tensor, spacing: Sequence[float]) -> float | None:
    """How far from zero the values of a signed distance map say where its border is.

    Four voxels; None where ``[1, 1, *grid]``, whose voxels are ``spacing`` long along
    each axis, is no such map: values of both signs that change everywhere alike.
    """
    if image.shape[1] > 1 or min(image.shape[2:]) < 3:
        return None
    if not float(image.min()) < 0 < float(image.max()):
        return None
    inner = image
    for axis, n in enumerate(image.shape[2:], 2):
        most = min(n, _SIDE[len(spacing)])
        inner = inner.narrow(axis, (n - most) // 2, most)
    slopes = torch.gradient(inner[0, 0], spacing=list(spacing))
    steep = torch.stack(slopes).square().sum(0).sqrt()
    usual = steep.median()
    alike = ((steep - usual).abs() < EVEN * usual).double().mean()
    if not usual > 0 or alike < MOSTLY:
        return None
    return 4 * float(usual) * max(spacing)


def check_intensities(name: str, image: Tensor, counts: Tensor | None = None) -> None:
    """Raise a ValueError unless intensities are finite and not all the same.

    Of those that count, ``[1, 1, *grid]``; that is all by default.
    """
    if counts is not None:
        image = image[(counts > 0).expand_as(image)]
    bad = int((~image.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name} has {bad} NaN or infinite voxels; replace them before registering"
        )
    if image.numel() and bool(image.max() == image.min()):
        raise ValueError(
            f"{name} is constant ({float(image.flatten()[0]):g} everywhere): there is "
            "nothing to align; check that the right file was read"
        )


@dataclass(frozen=True)
class PreparedImage:
    """One image as a fit takes it, with all that is known of it; see `of`.

    Attributes:
        values: ``[1, C, *grid]``, about [0, 1]: `prepare`, then `fill_missing`.
        place: where that grid lies.
        noise: standard deviation of the noise, see `noise`.
        gaps: slices between others that stayed empty.
        whole: where the finest level lies; ``place`` unless it is read in parts.
        finer: levels finer than ``values``, coarse to fine, over the same unit box.
        mask: ``[1, 1, *grid]``, where it is to be matched; None: wherever it can be.
        counts: boolean ``[1, 1, *grid]``, what is compared at all, elsewhere
            ``values`` only go on from there; None: all is.
        labels: label map ``[1, 1, *any]`` over its box, int64.
        modality: one of `MODALITIES`.
        placed: points are LPS millimetres, as they are of all but tensors.
        notes: what was found and done, in words.
    """

    values: Tensor
    place: Geometry
    noise: float
    gaps: int
    whole: Geometry
    finer: Sequence[ChunkedImage] = ()
    mask: Tensor | None = None
    counts: Tensor | None = None
    labels: Tensor | None = None
    modality: str | None = None
    placed: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, values: Tensor, place: Geometry, whole: Geometry | None = None, **rest: Any
    ) -> PreparedImage:
        """The image of scaled intensities, see `prepare`; lost slices are filled in.

        ``whole`` is ``place`` unless it is told; the rest are the attributes after it.
        """
        values = fill_missing(values)
        axes = range(2, values.dim())
        gaps = sum(len(missing_slices(values, axis)) for axis in axes)
        return cls(values, place, noise(values), gaps, whole or place, **rest)
