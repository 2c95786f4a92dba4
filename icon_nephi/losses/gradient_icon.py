"""Similarity on sampled points or patches, gradient inverse consistency, prior."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from icon_registration import RegistrationModule
from icon_registration.losses import ICONLoss
from torch import Tensor, nn

from icon_nephi._check import check_grid, check_image
from icon_nephi.losses.parts import Parts
from icon_nephi.losses.patches import as_blocks, block_determinants, patch_maps
from icon_nephi.losses.regularity import inverse_consistency_term
from icon_nephi.losses.similarities import PatchNCC as PatchNCC
from icon_nephi.losses.similarities import dice_loss, shared_labels
from icon_nephi.maps.jacobians import determinants
from icon_nephi.maps.networks import neural_parts
from icon_nephi.maps.transforms import Map, value_and_jacobian
from icon_nephi.space.frames import inside, points_as_grid
from icon_nephi.space.images import Image, readable, sample_image
from icon_nephi.space.sampling import Patches, Points


def gradient_inverse_consistency(phi_AB: Map, phi_BA: Map, points: Tensor) -> Tensor:
    """Scalar: mean of ``|D(phi_AB o phi_BA) - I|_F^2 / d`` over the points.

    Any ICON maps; exact Jacobians, carried forward. Normalised as ICON's GradientICON,
    so ``lmbda`` means the same there and here. The paper's Eq. 5 has no 1 / d: its
    lambda is ours / d; the official code divides by d^2 and averages both orders: its
    lambda is ours * d.

    Args:
        phi_AB: second map.
        phi_BA: first map.
        points: ``[B, d, *any]``, ICON frame.
    """
    between, inner = value_and_jacobian(phi_BA, points)
    return inverse_consistency_term(phi_AB, points, between, inner)


class GradientICONPoints(RegistrationModule):
    """GradICON on sampled points: memory does not follow the number of voxels.

    ``all_loss = similarity(A o phi_AB, B) + similarity(B o phi_BA, A)
    + lmbda * gradient_inverse_consistency + prior_lmbda * prior`` (Eq. 8 and 9).

    Takes networks that return a pair (called once) and ICON's single networks (called
    twice, images swapped). In ``train()`` no dense grid is made;
    ``phi_AB_vectorfield``, ``warped_image_A`` etc. are computed when asked for.
    ``transform_magnitude`` and ``flips`` of the returned ICONLoss are estimates from
    the regularity points, scaled to ICON's meaning (mean squared displacement, folded
    voxels an image).

    Differs from the paper: similarity is ICON's (the text has 1 - NCC^2), both orders
    of the composition are averaged, and the prior is Eq. 7, squared.

    Args:
        network: returns phi_AB or (phi_AB, phi_BA).
        similarity: any ICON similarity. On `Points` it sees ``[B, C, N, 1(, 1)]``
            (NCC, SSD), on `Patches` ``[B * P, C, s, s(, s)]`` (LNCC, `PatchNCC`).
        lmbda: weight of the regularity.
        prior_lmbda: weight of the prior on the latent code.
        similarity_sampler: `Points` or `Patches`.
        regularity_sampler: `Points`.
        regularity: `inverse_consistency_term`, `diffusion_term` or `no_term`.
        sigma: standard deviation of the codes in the prior.
        extent: see `inverse_consistency_term`.
        dice_loss_weight: of `dice_loss`, both directions added, as uniGradICON's; above
            zero every step needs both segmentations, and leaves the term in ``dice``.
        densities: how many channels, from the first, hold densities whose mass the maps
            keep: the moving image's are multiplied by det J before they are compared.
        volumes: of the box of A over that of B, for that determinant.
        counts: of A and of B ``[1, 1, *grid]``: samples that lie, at either end of a
            map, where one is 0 are left out of a similarity with ``isInterpolated``;
            None: all count.
        parts: what else is asked of both maps, a term with a weight of its own.
        still: axes along which the fields of the pair do not move anything; who
            optimises sees to that.
        generator: source of the sample positions.
    """

    def __init__(
        self,
        network: nn.Module,
        similarity: Callable[..., Tensor],
        lmbda: float,
        *,
        prior_lmbda: float = 0.01,
        similarity_sampler: Points | Patches | None = None,
        regularity_sampler: Points | None = None,
        regularity: Callable[..., Tensor] = inverse_consistency_term,
        sigma: float = 1.0,
        extent: Tensor | None = None,
        dice_loss_weight: float = 0.0,
        densities: int = 0,
        volumes: float = 1.0,
        counts: tuple[Tensor | None, Tensor | None] = (None, None),
        parts: Parts | None = None,
        still: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.regis_net = network
        self.similarity, self.lmbda, self.prior_lmbda = similarity, lmbda, prior_lmbda
        self.similarity_sampler = similarity_sampler or Points(10_000)
        self.regularity_sampler = regularity_sampler or Points(500)
        self.regularity, self.sigma, self.extent = regularity, sigma, extent
        self.dice_loss_weight, self.generator = dice_loss_weight, generator
        self.densities, self.volumes, self.counts = densities, volumes, counts
        self.parts, self.still = parts, still
        self.image_A: Any = None
        self.image_B: Any = None
        self.phi_AB: Any = None
        self.phi_BA: Any = None

    def forward(
        self,
        image_A: Image,
        image_B: Image,
        mask_A: Tensor | None = None,
        mask_B: Tensor | None = None,
        *,
        label_A: Tensor | None = None,
        label_B: Tensor | None = None,
        segmentation_A: Tensor | None = None,
        segmentation_B: Tensor | None = None,
        sampler: Points | Patches | None = None,
        similarity: Callable[..., Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> ICONLoss:
        """The loss of a batch of pairs ``[B, C, *grid]``, A moving, B fixed.

        Beside the images, what uniGradICON's loss takes: masks ``[B, 1, *grid]`` say
        where the samples of their image may lie; ``label_*`` are images (of another
        modality, say) that the similarity compares in the place of ``image_*``, which
        the network sees; segmentations are label maps for the Dice term. An image may
        be a `Readable` as well: then only what the samples need is read, and masks are
        on any grid. ``sampler``, ``similarity`` and ``generator`` take the place of the
        loss's own.
        """
        sampler = sampler or self.similarity_sampler
        agreement = similarity or self.similarity
        source = generator or self.generator
        seen_A = image_A if label_A is None else label_A
        seen_B = image_B if label_B is None else label_B
        self._check(image_A, image_B, seen_A, seen_B)
        self._check_maps("A", image_A, mask_A, segmentation_A)
        self._check_maps("B", image_B, mask_B, segmentation_B)
        self.image_A, self.image_B = image_A, image_B
        maps = self.regis_net(image_A, image_B)
        if not isinstance(maps, tuple):
            maps = maps, self.regis_net(image_B, image_A)
        self.phi_AB, self.phi_BA = maps
        samples = partial(self._samples, sampler, source)
        to_A = samples(self.phi_AB, image_B, mask_B, self.volumes)
        to_B = samples(self.phi_BA, image_A, mask_A, 1 / self.volumes)
        counts_A, counts_B = self.counts
        forth, back = (counts_A, counts_B), (counts_B, counts_A)
        unlike = compare(agreement, *to_A[:2], seen_A, seen_B, *to_A[2:], forth)
        back_unlike = compare(agreement, *to_B[:2], seen_B, seen_A, *to_B[2:], back)
        unlike = unlike + back_unlike
        regularity, magnitude, flips = self._regularity(image_A, image_B, source)
        loss = unlike + self.lmbda * regularity
        if self.dice_loss_weight:
            a, b = cast(tuple[Tensor, Tensor], (segmentation_A, segmentation_B))
            labels = shared_labels(a, b)
            self.dice = dice_loss(a, b, *to_A[:2], labels)
            self.dice = self.dice + dice_loss(b, a, *to_B[:2], labels)
            loss = loss + self.dice_loss_weight * self.dice
        if self.parts is not None:
            loss = loss + self.parts(self.phi_AB, self.phi_BA)
        if self.prior_lmbda:
            self.prior = unlike.new_zeros(())
            codes = {id(part.code): part.code for part in neural_parts(maps)}
            for code in codes.values():  # Eq. 7 of every code the maps are made of
                self.prior = self.prior + code.prior(self.sigma)
            loss = loss + self.prior_lmbda * self.prior
        return ICONLoss(loss, regularity, unlike, magnitude, flips)

    def changed(self, **changes: Any) -> GradientICONPoints:
        """The same loss with other values of some attributes; this one stays."""
        loss = copy.copy(self)
        loss._modules = dict(self._modules)
        for name, value in changes.items():
            setattr(loss, name, value)
        return loss

    def _check(
        self, image_A: Image, image_B: Image, seen_A: Image, seen_B: Image
    ) -> None:
        for name, image in (("image_A", image_A), ("image_B", image_B)):
            if isinstance(image, Tensor):
                check_image(name, image)
        pairs = ("image", image_A, image_B), ("label", seen_A, seen_B)
        for name, first, second in pairs:
            if first.shape[:2] != second.shape[:2]:
                raise ValueError(
                    f"{name}_A is {tuple(first.shape)}, {name}_B "
                    f"{tuple(second.shape)}: batch and channels must be the same"
                )

    def _check_maps(
        self, side: str, image: Image, mask: Tensor | None, labels: Tensor | None
    ) -> None:
        """What comes with an image lies on its grid."""
        for name, extra in (("mask", mask), ("segmentation", labels)):
            if isinstance(image, Tensor) and extra is not None:
                check_grid(f"{name}_{side}", extra, image.shape[2:])
        if self.dice_loss_weight and labels is None:
            raise ValueError(
                f"segmentation_{side} is missing: dice_loss_weight is "
                f"{self.dice_loss_weight}, so pass both, or make the loss without it"
            )

    def _samples(
        self,
        sampler: Points | Patches,
        source: torch.Generator | None,
        phi: Map,
        fixed: Image,
        mask: Tensor | None,
        volumes: float,
    ) -> tuple[Tensor, Tensor, tuple[int, ...] | None, Tensor | None]:
        """Where phi takes fresh samples, they, their blocks, and `compare`'s gain."""
        rows = readable(fixed).draw(sampler.count, mask, source)
        if isinstance(sampler, Points):
            at = points_as_grid(rows)
            if not self.densities:
                return phi(at), at, None, None
            moved, jacobian = value_and_jacobian(phi, at)
            return moved, at, None, self._gain(determinants(jacobian), volumes)
        at, moved = patch_maps(phi, sampler, rows, fixed.shape[2:])
        blocks, gain = (at.shape[2] // sampler.size, *at.shape[3:]), None
        if self.densities:
            parts = as_blocks(moved, blocks), as_blocks(at, blocks)
            gain = self._gain(block_determinants(*parts), volumes)
        return moved, at, blocks, gain

    def _gain(self, determinant: Tensor, volumes: float) -> Tensor:
        return volumes * determinant.expand(-1, self.densities, *determinant.shape[2:])

    def _regularity(
        self, image_A: Image, image_B: Image, source: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both orders averaged; mean squared displacement; folded voxels."""
        terms = []
        # phi_BA first, so that what is left after the loop is phi_AB's.
        for first, then, image in (
            (self.phi_BA, self.phi_AB, image_A),
            (self.phi_AB, self.phi_BA, image_B),
        ):
            count = self.regularity_sampler.count
            x = points_as_grid(readable(image).draw(count, None, source))
            moved, jacobian = value_and_jacobian(first, x)
            terms.append(self.regularity(then, x, moved, jacobian, self.extent))
        with torch.no_grad():
            magnitude = (moved - x).square().mean()
            voxels = image_B.shape[2:].numel()
            flips = (determinants(jacobian) <= 0).to(magnitude.dtype).mean() * voxels
        return (terms[0] + terms[1]) / 2, magnitude, flips

    @property
    def phi_AB_vectorfield(self) -> Tensor:
        """phi_AB on the identity map, ``[B, d, *grid]``; computed when asked for."""
        return cast(Tensor, self.phi_AB(self.identity_map))

    @property
    def phi_BA_vectorfield(self) -> Tensor:
        """phi_BA on the identity map, ``[B, d, *grid]``; computed when asked for."""
        return cast(Tensor, self.phi_BA(self.identity_map))

    @property
    def warped_image_A(self) -> Tensor:
        """A on B's grid; computed when asked for."""
        return sample_image(self.image_A, self.phi_AB_vectorfield)

    @property
    def warped_image_B(self) -> Tensor:
        """B on A's grid; computed when asked for."""
        return sample_image(self.image_B, self.phi_BA_vectorfield)

    def clean(self) -> None:
        """Let go of the last images and maps."""
        self.image_A = self.image_B = self.phi_AB = self.phi_BA = None


def compare(
    similarity: Callable[..., Tensor],
    moved: Tensor,
    at: Tensor,
    moving: Image,
    fixed: Image,
    blocks: tuple[int, ...] | None = None,
    gain: Tensor | None = None,
    counts: Sequence[Tensor | None] = (None, None),
) -> Tensor:
    """Similarity of the moving image at moved points and the fixed image at points.

    Both ``[B, d, *any]``, each in its image's ICON frame. ICON's similarities with
    ``isInterpolated`` get the in-bounds tag, which is 0 as well where the nearest voxel
    of ``counts``, of the moving and of the fixed image ``[1, 1, *grid]``, is. Of
    samples of blocks their shape is told, see `as_blocks`; a gain ``[B or blocks, k,
    *any]`` is that of the first k channels of the moving image.
    """
    warped, target = readable(moving).sample(moved), readable(fixed).sample(at)
    if getattr(similarity, "isInterpolated", False):
        # Beyond either image there is only its repeated border.
        tag = (inside(moved) & inside(at)).to(warped.dtype)
        for known, place in zip(counts, (moved, at), strict=True):
            if known is not None:
                tag = tag * sample_image(known.to(tag), place.detach(), mode="nearest")
        warped = torch.cat([warped, tag], 1)
    if blocks is not None:
        warped, target = (as_blocks(i, blocks) for i in (warped, target))
    if gain is not None:
        k = gain.shape[1]
        warped = torch.cat([warped[:, :k] * gain, warped[:, k:]], 1)
    return similarity(warped, target)
