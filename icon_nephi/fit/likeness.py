"""How much two images have in common under maps, at places where no fit looks.

What a fit has optimised is not what it can be judged by: a map that runs away raises
its own similarity, too. Places are drawn once: maps are compared at the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from icon_nephi.fit.affine import in_unit_boxes, voxel_stride
from icon_nephi.fit.content import ImagePair
from icon_nephi.losses.patches import as_blocks, patch_maps
from icon_nephi.losses.similarities import Comparison, MutualInformation, correlations
from icon_nephi.maps.transforms import Map, MatrixTransform
from icon_nephi.space.frames import inside, points_as_grid
from icon_nephi.space.images import gaussian_blur, sample_image
from icon_nephi.space.sampling import Patches, draw_points

# Points and blocks a direction; samples a side of a block, their stride in units of
# 1/160 of the box; bins of each image.
POINTS, BLOCKS, SIZE, STRIDE, BINS = 8000, 300, 5, 2.0, 16
# Added to the variance of blocks; the images are smooth.
FLOOR = 1e-3
# Its own numbers: an offset to the seed of the fit.
HELD_OUT = 7919
# Blocks without which nothing is said; ends of the histograms of prepared images.
LEAST, LOW, HIGH = 10, -0.2, 1.2


class Likeness:
    """Of one pair, whose places are drawn once.

    Args:
        images: as they are fitted.
        choice: by what they are compared.
        seed: of the fit.
    """

    def __init__(self, images: ImagePair, choice: Comparison, seed: int) -> None:
        self.images, self.choice, self.seed = images, choice, seed

    @cached_property
    def places(self) -> list[tuple[Tensor, Tensor]]:
        """Of each direction rows ``[1, POINTS, d]``, and blocks in another order."""
        generator = torch.Generator().manual_seed(HELD_OUT + self.seed)
        d, drawn = self.images.geometry_B.dimension, []
        for where in (self.images.where_B, self.images.where_A):
            rows = draw_points(POINTS, 1, d, mask=where.cpu(), generator=generator)
            drawn.append((rows.float(), torch.randperm(BLOCKS, generator=generator)))
        return drawn

    def start(self, matrix: Tensor) -> tuple[Map, Map]:
        """Both maps of a matrix in the physical frame."""
        unit = in_unit_boxes(matrix, self.images.geometry_B, self.images.geometry_A)
        there, back = (
            MatrixTransform(m[None].to(self.images.image_B))
            for m in (unit, torch.linalg.inv(unit))
        )
        return there, back

    def judge(self, maps: Sequence[Map]) -> float:
        """How well maps lay the images on each other, by what was not compared.

        That is `information`; where it was compared, squared correlation of blocks.
        """
        if isinstance(self.choice.similarity, MutualInformation):
            return self.distinct(maps).get("lncc2", 0.0)
        return self.information(maps)

    @torch.no_grad()
    def information(self, maps: Sequence[Map]) -> float:
        """The share of information in common, 0 to 1, whatever the contrasts.

        Mean over both directions, times the root of the share that lies in both.
        """
        score, common = MutualInformation(BINS), []
        for number, phi in enumerate(maps):
            moving, fixed = self._towards(self.images.smooth, number)
            x = points_as_grid(self.places[number][0])
            moved = self._moved(phi, x)
            there = self._in_both(moved, x, number).flatten()
            values = sample_image(moving, moved)[0].flatten(1)
            shared = score.counted(values, sample_image(fixed, x)[0].flatten(1), there)
            common.append(float(shared.mean() * there.mean().sqrt()))
        return sum(common) / len(common)

    @torch.no_grad()
    def distinct(
        self, maps: Sequence[Map], features: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, float]:
        """By how much blocks that lie on each other are more alike than others.

        In standard deviations of the others', mean over both directions, by name of the
        similarity: "lncc", "lncc2", "mi" and, of features ``[1, F, *grid]``, "mind".
        ``signed``: mean correlation over the mean of its absolute. Nothing where the
        images hardly lie on each other.
        """
        found = [self._distinct(phi, n, features) for n, phi in enumerate(maps)]
        return {
            name: sum(one[name] for one in found) / len(found)
            for name in found[0]
            if all(name in one for one in found)
        }

    def _distinct(
        self, phi: Map, number: int, features: tuple[Tensor, Tensor] | None
    ) -> dict[str, float]:
        """The same, of one direction."""
        mixed = self.places[number][1]
        a, b, weight = self._blocks(phi, self.images.smooth, number)
        other = weight * weight[mixed]
        here, there = (w.mean((1, 2)) > 0.5 for w in (weight, other))
        if min(int(here.sum()), int(there.sum())) < LEAST:
            return {}

        def ends(measure: Callable[..., Tensor], a: Tensor, b: Tensor) -> list[Tensor]:
            return [measure(a, b, weight)[here], measure(a[mixed], b, other)[there]]

        alike = ends(_correlation, a, b)
        found = {
            "lncc": _apart(*alike),
            "lncc2": _apart(*(values.square() for values in alike)),
            "signed": float(alike[0].mean() / alike[0].abs().mean().clamp(min=1e-6)),
            "mi": _apart(*ends(_pointwise_information(a, b, weight), a, b)),
        }
        if features is not None:
            a, b, _ = self._blocks(phi, features, number)
            found["mind"] = _apart(*ends(_correlation, a, b))
        return found

    def _moved(self, phi: Map, x: Tensor) -> Tensor:
        """Where a map, on the images' device, takes points of the CPU."""
        return phi(x.to(self.images.image_B)).float().cpu()

    def _in_both(self, moved: Tensor, x: Tensor, number: int) -> Tensor:
        """1 where both images are, and count, else 0: ``[1, 1, *any]``."""
        tag = (inside(moved) & inside(x)).float()
        moving, fixed = self.images.counts_on("cpu")[:: -1 if number else 1]
        for known, place in ((moving, moved), (fixed, x)):
            if known is not None:
                tag = tag * sample_image(known.to(tag), place, mode="nearest")
        return tag

    def _towards(self, pair: tuple[Tensor, Tensor], number: int) -> tuple[Tensor, ...]:
        """(moving, fixed) of the map of that number, on the CPU."""
        A, B = (image.cpu() for image in pair)
        return (B, A) if number else (A, B)

    def _blocks(
        self, phi: Map, pair: tuple[Tensor, Tensor], number: int
    ) -> list[Tensor]:
        """Moving and fixed blocks ``[BLOCKS, C, samples]``, and which are in both."""
        moving, fixed = self._towards(pair, number)
        place = self.images.geometries[1 - number]
        stride = voxel_stride(STRIDE * self.images.unit, place)
        patches = Patches(BLOCKS, SIZE, stride)
        rows = self.places[number][0][:, :BLOCKS]
        x, moved = patch_maps(partial(self._moved, phi), patches, rows, fixed.shape[2:])
        tag = self._in_both(moved, x, number)
        shape = (BLOCKS, *x.shape[3:])
        values = sample_image(moving, moved), sample_image(fixed, x), tag
        return [as_blocks(v, shape).flatten(2) for v in values]


def _correlation(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """``[N]``, mean over channels."""
    return correlations(a, b, weight, FLOOR).mean(1)


def _pointwise_information(
    a: Tensor, b: Tensor, weight: Tensor
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """How much each block tells, ``[N]``, by the joint histogram of these."""

    def bins(values: Tensor) -> Tensor:
        share = (values[:, 0].clamp(LOW, HIGH) - LOW) / (HIGH - LOW)
        return (share * (BINS - 1)).round().long()

    cells = (bins(a) * BINS + bins(b)).flatten()
    joint = torch.bincount(cells, weight[:, 0].flatten(), minlength=BINS**2)
    joint = gaussian_blur(joint.reshape(1, 1, BINS, BINS).float(), (0.7, 0.7))[0, 0]
    joint = (joint + 1e-3) / (joint + 1e-3).sum()
    told = (joint / (joint.sum(0) * joint.sum(1, keepdim=True))).log()

    def tell(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        counted = (told[bins(a), bins(b)] * weight[:, 0]).sum(1)
        return counted / weight[:, 0].sum(1).clamp(min=1)

    return tell


def _apart(real: Tensor, others: Tensor) -> float:
    """How far the mean lies from the others', in their standard deviations."""
    return float((real.mean() - others.mean()) / (others.std() + 1e-3))
