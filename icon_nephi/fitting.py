"""Register one pair from scratch: affine start, coarse to fine, no folds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from icon_nephi._check import check_both
from icon_nephi.affine import in_unit_boxes, voxel_stride
from icon_nephi.chunks import Image
from icon_nephi.coordinates import Geometry
from icon_nephi.doubts import doubts, evidence, of_images
from icon_nephi.features import FeatureDifference, FeaturesAlone, coarser
from icon_nephi.finer import fit_levels
from icon_nephi.folds import guarded_term, unfold
from icon_nephi.losses import GradientICONPoints
from icon_nephi.memory import memory_for
from icon_nephi.models import Fit, Settings, find_settings, make_pair
from icon_nephi.optimize import Stage, optimize
from icon_nephi.preprocess import fill_missing, noise
from icon_nephi.sampling import Patches, Points
from icon_nephi.similarities import Comparison, find_similarity
from icon_nephi.starts import Images, coincide, find_affine, identity
from icon_nephi.transforms import AffinePair

# Steps of the short fits that choose between starts, and the advantage the first has.
TRIAL_STEPS = 40
DRAW = 0.07
# Where single points are compared: how many for each block there would be, and the
# blur of the images, in strides that the samples of a block would have.
POINTS, BLUR = 8, 0.5
# Noise above which features fade out, and above which larger blocks are compared; real
# scans have 0.002 to 0.04.
CLEAN, NOISY = 0.01, 0.06
# Weight of the label maps' overlap, where there are label maps.
DICE = 1.0


@memory_for("the registration")
def fit_pair(
    image_A: Tensor,
    image_B: Tensor,
    geometry_A: Geometry,
    geometry_B: Geometry,
    *,
    mask_A: Tensor | None = None,
    mask_B: Tensor | None = None,
    similarity: str | Callable[[Tensor, Tensor], Tensor] | None = None,
    field: str | Settings = "auto",
    modality: str | None = None,
    affine: bool = True,
    seed: int = 0,
    progress: bool = True,
    time_limit: float | None = None,
    levels: Sequence[tuple[Image, Image]] = (),
    segmentation_A: Tensor | None = None,
    segmentation_B: Tensor | None = None,
    mass_preserving: bool = False,
    keep_on_interrupt: bool = False,
) -> Fit:
    """Register one pair from scratch.

    Args:
        image_A: moving ``[1, C, *grid]``, about [0, 1] (see `icon_nephi.preprocess`);
            slices that were lost are filled in, see `fill_missing`.
        image_B: fixed ``[1, C, *grid]``, on any grid.
        geometry_A: where image_A lies.
        geometry_B: where image_B lies.
        mask_A: ``[1, 1, *grid]``, where image_A is to be matched.
        mask_B: the same of image_B.
        similarity: a name (see `find_similarity`), or a similarity of blocks.
        field: "auto", a name in `icon_nephi.models.PRESETS`, or `Settings`.
        modality: of both images, for "auto" (see `find_settings`).
        affine: look for an affine start; else start from the physical frames.
        seed: of everything random.
        progress: show a bar.
        time_limit: seconds after which the deformable part stops early.
        levels: finer (moving, fixed) for the last stages, see `fit_levels`.
        segmentation_A: label map ``[1, 1, *any]`` over image_A's box; the labels that
            both maps hold are laid on each other, too: `DICE` times `dice_loss`.
        segmentation_B: the same of image_B; both or neither.
        mass_preserving: intensities are densities, of modality "ct": image_A's are
            multiplied by det J before they are compared, and so the other way. "lncc"
            sees only how det J changes within a block, "ncc" sees all of it.
        keep_on_interrupt: Ctrl-C during the deformable part ends that part, and the
            fit's warnings say so; folds are still looked for.

    Raises:
        ValueError: unknown field or similarity; label maps without a common label.
        MemoryError: smaller parts did not help either.
    """
    check_both("segmentation", segmentation_A, segmentation_B)
    size = levels[-1][1].shape[2:] if levels else geometry_B.size
    settings = find_settings(field, size, modality)
    if levels:  # what the corners of the blocks miss is found on the finer ones
        settings = replace(settings, exact=(False,) * len(settings.exact))
    choice = find_similarity(similarity, settings.floor)
    if choice.features != "beside":
        settings = replace(settings, features=0.0)
    image_A, image_B = fill_missing(image_A), fill_missing(image_B)
    if not choice.points:
        settings = _suited(settings, max(noise(image_A), noise(image_B)))
    seen = of_images(image_A, image_B, geometry_A, geometry_B)
    if settings.features or choice.features == "only":
        image_A, mask_A, geometry_A = coarser(image_A, mask_A, geometry_A)
        image_B, mask_B, geometry_B = coarser(image_B, mask_B, geometry_B)
    generator = torch.Generator().manual_seed(seed)
    labels = segmentation_A, segmentation_B
    images = Images(image_A, image_B, geometry_A, geometry_B, mask_A, mask_B, labels)
    if mass_preserving and (modality != "ct" or choice.contrast):
        raise ValueError(
            "mass_preserving takes intensities for densities: both images must be of "
            "modality ct, and similarity 'lncc', 'ncc' or a callable"
        )
    images.densities = image_A.shape[1] if mass_preserving else 0
    start = identity(geometry_B.dimension)
    if affine:
        found = find_affine(images, choice, generator)
        starts = [start, found] if coincide(geometry_A, geometry_B) else [found]
        start = _better_start(images, starts, choice, settings, seed)
    said: list[str] = []
    pair, losses = _fit(
        images,
        start,
        choice,
        settings,
        generator,
        said,
        progress=progress,
        time_limit=time_limit,
        final=True,
        levels=levels,
        keep_on_interrupt=keep_on_interrupt,
    )
    net: Any = pair.net
    with torch.no_grad():
        code = net.net(image_A, image_B).detached()
        numbers = evidence(
            pair, *images.blurred(2.0), geometry_B, images.where_B.cpu(), generator
        )
        numbers |= seen
    return Fit(
        matrix=in_unit_boxes(start, geometry_B, geometry_A),
        code=code,
        field_AB=net.field_AB.requires_grad_(False),
        field_BA=net.field_BA.requires_grad_(False),
        losses=losses,
        warnings=said + doubts(numbers, contrast=choice.contrast),
        evidence=numbers,
    )


def _suited(settings: Settings, level: float) -> Settings:
    """The settings for images with noise of that standard deviation."""
    if level > CLEAN:
        settings = replace(settings, kept=0.0)
    if level > NOISY:
        half = max(1, settings.patches // 2)
        settings = replace(settings, size=settings.noisy, patches=half)
    return settings


def _better_start(
    images: Images,
    starts: Sequence[Tensor],
    choice: Comparison,
    settings: Settings,
    seed: int,
) -> Tensor:
    """The start from which a short coarse fit gets furthest; or the first, if near.

    An affine map fitted to a body of which only a part moves can be a worse start
    than none, and its own similarity does not show it.
    """
    if len(starts) == 1:
        return starts[0]
    trial = replace(
        settings,
        steps=TRIAL_STEPS,
        strides=settings.strides[:1],
        shares=(1.0,),
        exact=settings.exact[:1],
        features=0.0,
        consistency=settings.consistency / 10,  # free to go far in few steps
        patches=settings.patches // 3,
        regularity_points=settings.regularity_points // 3,
    )
    results = []
    for start in starts:
        generator = torch.Generator().manual_seed(seed)
        _, losses = _fit(images, start, choice, trial, generator, [], progress=False)
        last = losses[-10:]
        results.append(2 - sum(x["similarity_loss"] for x in last) / len(last))
    # Of losses 1 - correlation in both directions, these are the correlations.
    if results[0] >= (1 - DRAW) * max(results):
        return starts[0]
    return starts[results.index(max(results))]


def _fit(
    images: Images,
    start: Tensor,
    choice: Comparison,
    settings: Settings,
    generator: torch.Generator,
    said: list[str],
    *,
    progress: bool,
    time_limit: float | None = None,
    final: bool = False,
    levels: Sequence[tuple[Image, Image]] = (),
    keep_on_interrupt: bool = False,
) -> tuple[AffinePair, list[dict[str, float]]]:
    """The deformable part behind an affine start, coarse to fine."""
    geometry = images.geometry_B
    dtype, device = images.image_B.dtype, images.image_B.device
    net = make_pair(settings, geometry.extent, generator)
    matrix = in_unit_boxes(start, geometry, images.geometry_A)
    pair = AffinePair(net, matrix.to(dtype)).to(device)
    image_A, image_B = images.image_A, images.image_B
    similarity, fade, only = choice.similarity, None, choice.features == "only"
    if settings.features or only:
        image_A, image_B = images.featured
    if only:
        similarity = FeaturesAlone(similarity, images.image_A.shape[1])
    elif settings.features:
        both = FeatureDifference(similarity, images.image_A.shape[1], settings.features)
        similarity = both

        def fade(step: int, _: Any) -> None:
            faded = (1 - settings.kept) * step / settings.steps
            both.weight = settings.features * (1 - faded)

    loss = GradientICONPoints(
        pair,
        similarity,
        settings.lmbda,
        prior_lmbda=settings.prior_lmbda,
        regularity_sampler=Points(settings.regularity_points),
        regularity=partial(
            guarded_term, consistency=settings.consistency, weight=settings.hinge
        ),
        extent=torch.tensor(geometry.extent, device=device),
        densities=images.densities,
        volumes=images.volumes,
        dice_loss_weight=DICE if images.extras else 0.0,
        generator=generator,
    )
    stages = [
        Stage(
            round(settings.steps * share),
            Points(POINTS * settings.patches)
            if choice.points
            else Patches(
                settings.patches,
                settings.size,
                voxel_stride(stride * images.unit, geometry),
                corners=not exact,
            ),
            blur=BLUR * stride * images.unit if choice.points else 0.0,
        )
        for stride, share, exact in zip(
            settings.strides, settings.shares, settings.exact, strict=True
        )
    ]
    fields = [*net.field_AB.parameters(), *net.field_BA.parameters()]
    losses = optimize(
        loss,
        image_A,
        image_B,
        stages,
        [
            {"params": list(net.net.parameters()), "lr": settings.code_rate},
            {"params": fields, "lr": settings.field_rate},
        ],
        mask_A=images.where_A,
        mask_B=images.where_B,
        extras=images.extras,
        spacing_A=images.spacing_A,
        spacing_B=images.spacing_B,
        progress=progress,
        time_limit=time_limit,
        callback=fade,
        said=said,
        keep_on_interrupt=keep_on_interrupt,
    )
    if levels and not said and choice.features != "only":  # those on disk have none
        loss.similarity = choice.similarity
        losses += fit_levels(
            loss,
            levels,
            net.net,
            settings,
            (images.where_A, images.where_B),
            extras=images.extras,
            said=said,
            points=POINTS if choice.points else None,
            progress=progress,
            time_limit=time_limit,
            keep_on_interrupt=keep_on_interrupt,
        )
    if final:
        unfold(
            pair,
            net.net.parameters(),
            images.image_A,
            images.image_B,
            rate=0.04 * settings.code_rate,
            generator=generator,
        )
    return pair, losses
