"""Register one pair from scratch: affine start, coarse to fine, no folds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor

from icon_nephi._check import check_both
from icon_nephi._memory import memory_for
from icon_nephi.fields.codes import LatentCode
from icon_nephi.fit.affine import coincide, find_affine, in_unit_boxes
from icon_nephi.fit.content import ImagePair, check_densities
from icon_nephi.fit.contrast import find_contrast
from icon_nephi.fit.dense import fit_dense, spline_pair, suits
from icon_nephi.fit.doubts import doubts, evidence, of_images
from icon_nephi.fit.learned import begin_with
from icon_nephi.fit.levels import fit_levels, levels_of
from icon_nephi.fit.likeness import Likeness
from icon_nephi.fit.optimize import Course, FitOptions, Stage, optimize
from icon_nephi.fit.search import identity
from icon_nephi.fit.settings import (
    STILL,
    Fit,
    Settings,
    find_settings,
    make_pair,
    suited,
    trial_of,
)
from icon_nephi.fit.sharpness import sharpness
from icon_nephi.fit.simpler import Simpler, Watch, check_transform, headers_or, simpler
from icon_nephi.fit.stages import POINTS, compared, stages_of
from icon_nephi.fit.unfold import unfold
from icon_nephi.fit.wishes import Wishes
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.losses.regularity import guarded_term
from icon_nephi.losses.similarities import AUTO, Comparison, PatchNCC, find_similarity
from icon_nephi.maps.networks import AffinePair, NePhi
from icon_nephi.space.intensities import PreparedImage
from icon_nephi.space.sampling import Points

# Of short fits that choose between starts, the advantage the first has: those by drawn
# blocks differ by so much from seed to seed, those on lattices by nothing.
DRAW, SURE = 0.15, 0.07
# Part of the rates with which a fit goes on that ran away.
SLOWER = 0.3
# Weight of the label maps' overlap, where there are label maps.
DICE = 1.0


@memory_for("the registration")
def fit_pair(
    image_A: PreparedImage,
    image_B: PreparedImage,
    *,
    similarity: str | Callable[[Tensor, Tensor], Tensor] | None = None,
    field: str | Settings = "auto",
    affine: bool = True,
    transform: str = "deformable",
    mass_preserving: bool = False,
    wishes: Wishes | None = None,
    options: FitOptions | None = None,
) -> Fit:
    """Register one pair from scratch.

    Label maps, where both images have one, are laid on each other, too: `DICE` times
    `dice_loss` of the labels that both hold.

    Args:
        image_A: moving.
        image_B: fixed, on any grid.
        similarity: a name (see `find_similarity`), or a similarity of blocks; None:
            "auto", see `find_contrast` (where mass is preserved: "lncc").
        field: "auto", a name in `icon_nephi.models.PRESETS`, or `Settings`.
        affine: look for an affine start; else start from the physical frames.
        transform: "deformable"; "affine" or "rigid": without a deformation.
        mass_preserving: intensities are densities, of modality "ct": image_A's are
            multiplied by det J before they are compared, and so the other way. "lncc"
            sees only how det J changes within a block, "ncc" sees all of it.
        wishes: what else is known or asked for.
        options: seed, limit of time, and what else all parts go by; of an interrupt
            that is kept the fit's warnings say so, and folds are still looked for.

    Raises:
        ValueError: unknown field, transform or similarity; label maps without a common
            label.
        MemoryError: smaller parts did not help either.
    """
    options, wishes = options or FitOptions(), wishes or Wishes()
    check_both("segmentation", image_A.labels, image_B.labels)
    modality = image_A.modality if image_A.modality == image_B.modality else None
    finest = image_B.finer[-1].shape[2:] if image_B.finer else image_B.place.size
    settings = wishes.suited(find_settings(field, finest, modality))
    deformable = transform == "deformable"
    in_parts = bool(image_A.finer or image_B.finer)
    if in_parts:  # what the corners of the blocks miss is found on the finer levels
        settings = replace(settings, exact=(False,) * len(settings.exact))
    choice = find_similarity(similarity, settings.floor)
    if mass_preserving:
        check_densities(modality, choice)
    check_transform(transform, affine=affine)
    both = image_A, image_B
    asked: dict[str, Any] = {"mass_preserving": mass_preserving, "wishes": wishes}
    work = Work.of(*both, choice, settings, options, **asked)
    generator = torch.Generator().manual_seed(options.seed)
    rigid, said = transform == "rigid", [*image_A.notes, *image_B.notes, *wishes.notes]
    aligned, affine = wishes.start, affine and not wishes.still
    if affine:
        how = work.images, choice, generator, options, said
        aligned = find_affine(*how, aligned, rigid=rigid)
    elif aligned is None:
        aligned = identity(image_B.place.dimension)
    if similarity in (None, AUTO) and not mass_preserving:
        name, aligned = find_contrast(
            work.likeness, aligned, options, search=affine, rigid=rigid
        )
        if name != choice.name:
            choice = find_similarity(name, settings.floor)
            work = Work.of(*both, choice, settings, options, wishes=wishes)
    start, warnings = work.better_start(aligned, deformable=deformable)
    if not deformable:
        course, loss = Course([], []), work.still(start)
    else:
        begin = wishes.beginning
        latticed = work.latticed and not in_parts and begin != "learned"
        if latticed:
            course, loss = work.on_lattices(start)
        else:
            known = work.likeness, start, work.settings, field
            settings, code = begin_with(begin, *known)
            work = replace(work, settings=settings)
            loss = work.loss_from(start, generator, code)
            course = work.watched_fit(loss)
        # Those on disk have no features, and after a warning nothing follows.
        if in_parts and not course.warnings and choice.features != "only":
            points = POINTS if choice.points else None
            levels = levels_of(image_A, image_B)
            fitted: Any = loss.regis_net
            rest = fitted.net.net, work.settings, points, options
            last = fit_levels(loss, levels, work.images, *rest)
            course = Course(course.losses + last.losses, last.warnings)
        if not latticed:  # there it is done
            work.unfold(loss, generator)
        if (kept := work.simpler(loss, start)) is not None:
            start, sentence = kept
            warnings.append(sentence)
            loss = work.still(start)
    pair: Any = loss.regis_net
    net, images = pair.net, work.images
    with torch.no_grad():
        code = net.net(images.image_A, images.image_B).detached()
        where, place = images.shown_B.cpu(), images.geometry_B
        counts = images.counts_on("cpu")
        numbers = evidence(pair, *images.smooth, place, where, generator, counts)
        phi_AB = pair(*images.smooth)[0]
        sharp = sharpness(images, phi_AB, generator, contrast=choice.contrast)
    numbers |= of_images(image_A, image_B)
    return Fit(
        matrix=in_unit_boxes(start, place, images.geometry_A),
        code=code,
        field_AB=net.field_AB.requires_grad_(False),
        field_BA=net.field_BA.requires_grad_(False),
        losses=course.losses,
        warnings=[
            *said,
            *course.warnings,
            *warnings,
            *doubts(numbers, contrast=choice.contrast),
        ],
        evidence=numbers,
        similarity=choice.name,
        sharp=sharp,
    )


@dataclass(frozen=True)
class Work:
    """The deformable part of one pair, and by what it is done."""

    images: ImagePair
    choice: Comparison
    settings: Settings
    options: FitOptions
    wishes: Wishes

    @classmethod
    def of(
        cls,
        image_A: PreparedImage,
        image_B: PreparedImage,
        choice: Comparison,
        settings: Settings,
        options: FitOptions,
        *,
        mass_preserving: bool = False,
        wishes: Wishes | None = None,
    ) -> Work:
        """The work at two images that are compared like that."""
        if choice.features != "beside":
            settings = replace(settings, features=0.0)
        if not choice.points:
            settings = suited(settings, max(image_A.noise, image_B.noise))
        featured = bool(settings.features) or choice.features == "only"
        both = image_A, image_B
        images = ImagePair(*both, featured=featured, mass_preserving=mass_preserving)
        return cls(images, choice, settings, options, wishes or Wishes())

    @cached_property
    def likeness(self) -> Likeness:
        """What maps are judged by."""
        return Likeness(self.images, self.choice, self.options.seed)

    def better_start(
        self, aligned: Tensor, *, deformable: bool
    ) -> tuple[Tensor, list[str]]:
        """The affine map that was found, or none where that is no worse, and why."""
        start, none = aligned, identity(self.images.geometry_B.dimension)
        if torch.equal(aligned, none):
            return aligned, []
        if (known := self.wishes.start) is not None:
            return self._furthest([known, aligned]) if deformable else aligned, []
        if deformable and coincide(*self.images.geometries):
            start = self._furthest([none, aligned])
        return (start, []) if start is none else headers_or(start, self.likeness)

    def simpler(self, loss: GradientICONPoints, start: Tensor) -> Simpler | None:
        """See there; labels and wishes say what images do not show."""
        if self.images.segmentations or self.wishes.binding:
            return None
        with torch.no_grad():
            maps = loss.regis_net(*self.images.smooth)
        return simpler(maps, start, self.likeness)

    def still(self, start: Tensor) -> GradientICONPoints:
        """What `loss_from` gives, of maps without a deformation."""
        generator = torch.Generator().manual_seed(self.options.seed)
        return replace(self, settings=STILL).loss_from(start, generator)

    def unfold(self, loss: GradientICONPoints, generator: torch.Generator) -> None:
        """Push up what determinants are not positive yet."""
        both = self.images.image_A, self.images.image_B
        pair: Any = loss.regis_net
        codes = pair.net.net.parameters()
        rate = 0.04 * self.settings.code_rate
        how: dict[str, Any] = {"rate": rate, "generator": generator}
        unfold(pair, codes, *both, **how, options=self.options)

    def _furthest(self, starts: Sequence[Tensor]) -> Tensor:
        """The start from which a short coarse fit gets furthest; the first, if near.

        An affine map fitted to a body of which only a part moves can be a worse start
        than none, and its own similarity does not show it. Where the time is over, one
        step of each decides.
        """
        options = replace(self.options, progress=False, keep_on_interrupt=False)
        if self.latticed:
            trials = [self._dense(s, options, coarse=True)[1] for s in starts]
            costs = [course.losses[-1]["all_loss"] for course in trials]
            near = costs[0] * (1 - SURE) <= min(costs)
            return starts[0 if near else costs.index(min(costs))]
        trial = replace(self, settings=trial_of(self.settings), options=options)
        courses = []
        for start in starts:
            generator = torch.Generator().manual_seed(options.seed)
            courses.append(trial.fit(trial.loss_from(start, generator)).losses)
        # Of those cut short as many steps are compared.
        steps = min(map(len, courses)) if options.late else None
        ends = [losses[:steps][-10:] for losses in courses]
        # Of losses 1 - correlation in both directions, these are the correlations.
        results = [2 - sum(x["similarity_loss"] for x in e) / len(e) for e in ends]
        if results[0] >= (1 - DRAW) * max(results):
            return starts[0]
        return starts[results.index(max(results))]

    @property
    def latticed(self) -> bool:
        """Whether it is fitted on lattices."""
        asked = self.settings.lattices is not None and self.wishes.plain
        return asked and suits(self.images, self.choice)

    def on_lattices(self, start: Tensor) -> tuple[Course, GradientICONPoints]:
        """How a fit on lattices went, and a loss with the pair that it made."""
        code, course = self._dense(start, self.options)
        pair = spline_pair(code, self.images.geometry_B.extent)
        return course, self.loss_from(start, torch.Generator(), net=pair)

    def _dense(
        self, start: Tensor, options: FitOptions, *, coarse: bool = False
    ) -> tuple[Tensor, Course]:
        how: Any = self.settings.lattices
        plain = cast(PatchNCC, self.choice.similarity)
        return fit_dense(self.images, start, plain, how, options, coarse=coarse)

    def loss_from(
        self,
        start: Tensor,
        generator: torch.Generator,
        known: LatentCode | None = None,
        net: NePhi | None = None,
    ) -> GradientICONPoints:
        """What is minimised, of intensities; its pair is untrained, behind a start."""
        images, settings = self.images, self.settings
        extent = images.geometry_B.extent
        net = net or make_pair(settings, extent, generator, known)
        self.wishes.hold(net)
        matrix = in_unit_boxes(start, images.geometry_B, images.geometry_A)
        pair = AffinePair(net, matrix.to(images.image_B.dtype))
        device = images.image_B.device
        return GradientICONPoints(
            pair.to(device),
            self.choice.similarity,
            settings.lmbda,
            prior_lmbda=settings.prior_lmbda,
            regularity_sampler=Points(settings.regularity_points),
            regularity=partial(
                guarded_term, consistency=settings.consistency, weight=settings.hinge
            ),
            extent=torch.tensor(images.geometry_B.extent, device=device),
            densities=images.densities,
            volumes=images.volumes,
            counts=images.counts,
            parts=self.wishes.parts(*images.geometries, self.options.seed, device),
            still=self.wishes.still,
            dice_loss_weight=DICE if images.segmentations else 0.0,
            generator=generator,
        )

    def watched_fit(self, loss: GradientICONPoints) -> Course:
        """As `fit`; from a level where it ran away back, and on with smaller rates."""
        if self.images.segmentations:  # they say what images do not show
            return self.fit(loss)
        watch = Watch(loss.regis_net, self.likeness)
        course = self.fit(loss, ended=watch.look)
        if not course.closer:  # by its own measure, too, nothing was to be gained
            return course
        good = watch.back()
        if good is None or course.warnings or self.options.late:
            return course
        again = self.fit(loss, after=good, rate=SLOWER, ended=watch.look)
        reached = "it went back and on with smaller rates"
        if watch.back() is not None:
            reached = "the rest of it was left out"
        begun = f"after level {good}" if good else "from its start on"
        sentence = f"{begun} the fit ran away: {reached}"
        losses = [*course.losses, *again.losses]
        return Course(losses, [sentence, *again.warnings])

    def fit(
        self,
        loss: GradientICONPoints,
        *,
        after: int = 0,
        rate: float = 1.0,
        ended: Callable[[], None] | None = None,
    ) -> Course:
        """Codes and fields moved to where the loss is least, coarse to fine.

        After so many levels, and with that part of the rates.
        """
        images, settings, stages = self.images, self.settings, self.stages()
        before = sum(stage.steps for stage in stages[:after])
        pair: Any = loss.regis_net
        net = pair.net
        fields = [*net.field_AB.parameters(), *net.field_BA.parameters()]
        featured = settings.features or self.choice.features == "only"
        both = images.image_A, images.image_B
        if featured:
            both = images.featured(pair.matrix[0])
        return optimize(
            loss,
            *both,
            stages[after:],
            [
                {"params": list(net.net.parameters()), "lr": rate * settings.code_rate},
                {"params": fields, "lr": rate * settings.field_rate},
            ],
            mask_A=images.where_A,
            mask_B=images.where_B,
            extras=images.segmentations,
            similarity=lambda step: self.similarity(before + step),
            spacing_A=images.geometry_A.tensor_spacing,
            spacing_B=images.geometry_B.tensor_spacing,
            ended=ended,
            options=self.options,
        )

    def similarity(self, step: int) -> Callable[..., Tensor]:
        """What is compared after so many steps."""
        channels = self.images.image_A.shape[1]
        return compared(self.choice, self.settings, channels, step)

    def stages(self) -> list[Stage]:
        """Where it is compared, coarse to fine."""
        place, unit = self.images.geometry_B, self.images.unit
        return stages_of(self.choice, self.settings, place, unit)
