"""Many images laid on one frame: the fit of a pair, of many in turn, in rounds.

The frame is the grid of one image, like which the others are most. In the first round
that image stands in it, then the mean of all as they lie on it. The two fields are
shared and learn from all images, an image is a code. No image is special in the end:
what is asked for goes from image to image, or has the mean of all taken out of it (see
`Centre`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from icon_nephi._memory import memory_for
from icon_nephi.fields.codes import LatentCode, shares_at
from icon_nephi.fit.affine import find_affine, in_unit_boxes
from icon_nephi.fit.content import ImagePair
from icon_nephi.fit.doubts import doubts, evidence, of_images
from icon_nephi.fit.from_scratch import Work
from icon_nephi.fit.group_work import code_of, fit_code, fit_in_turn, loss_with
from icon_nephi.fit.mean_image import (
    content,
    mean_image,
    most_like_the_others,
)
from icon_nephi.fit.optimize import Course, FitOptions
from icon_nephi.fit.search import identity
from icon_nephi.fit.settings import Fit, Settings, find_settings, make_pair
from icon_nephi.losses.similarities import find_similarity
from icon_nephi.maps.networks import AffinePair
from icon_nephi.maps.transforms import NeuralTransform
from icon_nephi.space.frames import Geometry
from icon_nephi.space.intensities import PreparedImage

# Of the steps of a pair, what an image gets in each round; times the rate of a pair's
# codes: there are fewer steps to get as far.
SHARES, RATES = (0.18, 0.18), (2.0, 1.0)
# In a step so many times fewer blocks and points are looked at than for a pair, and so
# many times more steps are taken: fields learn from all images.
FEWER = 2
# Weight of a code's own value beside those of its neighbours in time, before the last
# round.
OWN = 0.8

# Images that fields are learned from, at most.
MOST = 10

#: Reads an image, whenever it is needed.
Source = Callable[[], PreparedImage]


@dataclass(frozen=True)
class GroupFit:
    """What laying many images on one frame gives; image k is the moving one of a pair.

    Attributes:
        place: the grid of the frame.
        matrices: ``[K, d + 1, d + 1]`` float64, frame unit box -> image unit box.
        code: of all images, batch K.
        field_AB: of every psi_AB, frame to image; phi_AB = matrix o psi_AB.
        field_BA: of every psi_BA, back; phi_BA = psi_BA o matrix^-1.
        losses: of each image, one entry a step.
        warnings: of each image, in words.
        evidence: of each image, see `icon_nephi.fit.doubts`.
        rounds: how many are done.
    """

    place: Geometry
    matrices: Tensor
    code: LatentCode
    field_AB: nn.Module
    field_BA: nn.Module
    losses: list[list[dict[str, float]]]
    warnings: list[list[str]]
    evidence: list[dict[str, float]] = field(default_factory=list)
    rounds: int = 0

    def __len__(self) -> int:
        return len(self.matrices)

    def taken(self, numbers: Sequence[int]) -> GroupFit:
        """The same of images by their numbers, some more than once."""
        rows = [self.code.item(k) for k in numbers]
        return replace(
            self,
            matrices=self.matrices[list(numbers)],
            code=LatentCode.of(rows),
            losses=[self.losses[k] for k in numbers],
            warnings=[self.warnings[k] for k in numbers],
            evidence=[self.evidence[k] for k in numbers if self.evidence],
        )

    def pair(self, k: int) -> Fit:
        """The frame (fixed) and image k (moving)."""
        evidence = self.evidence[k] if self.evidence else {}
        own = self.matrices[k], self.code.item(k), self.field_AB, self.field_BA
        return Fit(*own, self.losses[k], self.warnings[k], evidence)


@dataclass(frozen=True)
class Moments:
    """When the images were taken.

    Attributes:
        times: one for each, increasing; None: they have no order.
        period: after which the first comes again; None: never.
    """

    times: Sequence[float] | None = None
    period: float | None = None


@memory_for("the registration")
def fit_group(
    sources: Sequence[Source],
    *,
    moments: Moments | None = None,
    affine: bool = True,
    similarity: Any = None,
    field: str | Settings = "auto",
    options: FitOptions | None = None,
    begun: GroupFit | None = None,
    keep: Callable[[GroupFit], None] | None = None,
) -> GroupFit:
    """Lay images on their mean.

    Args:
        sources: of the images.
        moments: of a series: each image begins where its neighbour in time is.
        affine: look for the affine maps to the frame; else headers put the images
            there.
        similarity: as of `fit_pair`.
        field: as of `fit_pair`.
        options: seed, bar, limit of time for all.
        begun: what ``keep`` was given by a fit of the same that did not end.
        keep: is given what there is after every round.

    Raises:
        ValueError: unknown field or similarity.
        MemoryError: smaller parts did not help either.
    """
    options, moments = options or FitOptions(), moments or Moments()
    group = _Group(sources, moments, (similarity, field), options)
    fit = begun or group.start(affine)
    rounds = group.rounds
    silent = not options.progress
    total = (len(rounds) - fit.rounds) * len(sources)
    with tqdm(total=total, disable=silent, desc="registering", leave=False) as bar:
        for number in range(fit.rounds, len(rounds)):
            fit = group.round(fit, number, bar)
            if keep is not None:
                keep(fit)
            if options.late or any(fit.warnings):
                break
    return group.end(fit)


class _Group:
    """Images, and by what they are laid on their mean."""

    def __init__(
        self,
        sources: Sequence[Source],
        moments: Moments,
        choices: tuple[Any, Any],
        options: FitOptions,
    ) -> None:
        self.sources, self.moments = sources, moments
        self.options = replace(options, progress=False)
        self.choices = choices
        self.model = most_like_the_others(sources)
        first = sources[self.model]()
        blank = replace(first, values=torch.zeros_like(first.values), mask=None)
        self.frame = replace(
            blank, labels=None, finer=(), whole=first.place, counts=None, notes=()
        )
        work = self._of(first, self.frame)
        self.settings = work.settings
        count = len(work.settings.strides)
        half = max(1, count // 2)
        #: The strides of each round, of the settings'; the second begins with one that
        #: the first had.
        self.rounds = [slice(0, half), slice(half - 1 if count > 2 else 0, count)]
        # The images that fields are learned from, which are held in memory together.
        apart = max(1.0, len(sources) / MOST)
        self.learning = sorted({int(n * apart) for n in range(min(MOST, len(sources)))})

    def start(self, affine: bool) -> GroupFit:
        """Untrained fields and codes, behind the affine maps."""
        place, count = self.frame.place, len(self.sources)
        generator = torch.Generator().manual_seed(self.options.seed)
        net: Any = make_pair(self.settings, place.extent, generator)
        code = net.net(None, None).detached()
        matrices = [identity(place.dimension)] * count
        if affine:
            matrices = self._affine()
        boxes = [
            in_unit_boxes(m, place, source().place)
            for m, source in zip(matrices, self.sources, strict=True)
        ]
        fields = net.field_AB, net.field_BA
        codes = LatentCode.of([code] * count)
        none: list[Any] = [[] for _ in self.sources]
        return GroupFit(place, torch.stack(boxes), codes, *fields, none, none)

    def _affine(self) -> list[Tensor]:
        """``[d + 1, d + 1]`` of each: frame -> image, millimetres."""
        reference, found = self.sources[self.model](), []
        for number, source in enumerate(self.sources):
            if number == self.model:
                found.append(identity(reference.place.dimension))
                continue
            generator = torch.Generator().manual_seed(self.options.seed)
            work = self._of(source(), reference)
            ways = work.images, work.choice, generator, self.options
            found.append(find_affine(*ways))
        return found

    def mean(self, fit: GroupFit) -> PreparedImage:
        """The mean of all images as they lie on the frame."""
        maps = [
            NeuralTransform(fit.field_AB, fit.code.item(k), owned=False)
            for k in range(len(fit))
        ]
        with torch.no_grad():
            values = mean_image(fit.place.size, self.sources, maps, fit.matrices)
        frame = replace(self.frame, values=values)
        return replace(frame, mask=content(frame))

    def round(self, fit: GroupFit, number: int, bar: Any) -> GroupFit:
        """Every image fitted to the mean of all once."""
        last = number == len(self.rounds) - 1
        times = self.moments.times
        # A blurred mean of what is not aligned yet is like all of them as they are.
        frame = self.mean(fit) if number else self.sources[self.model]()
        rows = [fit.code.item(k) for k in range(len(fit))]
        if times is not None and last and len(fit) > 2:
            rows = _smoothed(rows, self.moments)
        losses, warnings = [list(x) for x in fit.losses], list(fit.warnings)
        together = self.learning
        works = [self._work(self.sources[k](), frame, number) for k in together]
        course, learned = self._learn(works, fit, together, rows)
        for n, k in enumerate(together):
            rows[k] = learned[n]
            losses[k] += course.losses[n :: len(together)]
            warnings[k] = warnings[k] + course.warnings
        bar.update(len(together))
        for k, source in enumerate(self.sources):
            if k in together:
                continue
            if self.options.late or any(warnings):
                break
            if number == 0:
                near = [abs(n - k) for n in together]
                rows[k] = rows[together[near.index(min(near))]]
            work = self._work(source(), frame, number)
            loss = self._loss(work, fit, k, rows[k])
            course = fit_code(work, loss)
            rows[k] = code_of(loss)
            losses[k] += course.losses
            warnings[k] = warnings[k] + course.warnings
            bar.update()
        codes = LatentCode.of(rows)
        known: dict[str, Any] = {"losses": losses, "warnings": warnings}
        return replace(fit, code=codes, rounds=number + 1, **known)

    def _learn(
        self,
        works: Sequence[Work],
        fit: GroupFit,
        numbers: Sequence[int],
        rows: Sequence[LatentCode],
    ) -> tuple[Course, list[LatentCode]]:
        """Fields and codes of several images moved in one optimisation."""
        both = zip(works, numbers, strict=True)
        losses = [self._loss(work, fit, k, rows[k]) for work, k in both]
        course = fit_in_turn(works, losses)
        return course, [code_of(loss) for loss in losses]

    def _of(self, image: PreparedImage, frame: PreparedImage) -> Work:
        """The work at an image with the settings of a pair."""
        similarity, field = self.choices
        settings = find_settings(field, frame.place.size, frame.modality)
        choice = find_similarity(similarity, settings.floor)
        return Work.of(image, frame, choice, settings, self.options)

    def _work(self, image: PreparedImage, frame: PreparedImage, number: int) -> Work:
        work = self._of(image, frame)
        settings, part = work.settings, self.rounds[number]
        count = max(4, round(SHARES[number] * FEWER * settings.steps))
        shares = settings.shares[part]
        settings = replace(
            settings,
            steps=count,
            strides=settings.strides[part],
            shares=tuple(share / sum(shares) for share in shares),
            patches=max(1, settings.patches // FEWER),
            regularity_points=max(1, settings.regularity_points // FEWER),
            exact=settings.exact[part],
            code_rate=RATES[number] * settings.code_rate,
        )
        return replace(work, settings=settings)

    def _loss(self, work: Work, fit: GroupFit, k: int, code: LatentCode) -> Any:
        """What is minimised for an image, by the fields that all share."""
        out = work.images.geometry_A.unit_to_physical()
        start = out @ fit.matrices[k] @ fit.place.physical_to_unit()
        return loss_with(work, start, (fit.field_AB, fit.field_BA), code)

    def end(self, fit: GroupFit) -> GroupFit:
        """Folds repaired, and what is doubtful."""
        frame = self.mean(fit)
        rows, warnings, numbers = [], [], []
        for k, source in enumerate(self.sources):
            image = source()
            work = self._of(image, frame)
            loss = self._loss(work, fit, k, fit.code.item(k))
            pair: Any = loss.regis_net
            generator = torch.Generator().manual_seed(self.options.seed)
            work.unfold(loss, generator)
            rows.append(code_of(loss))
            evident = self._evidence(pair, work.images, generator)
            evident |= of_images(image, frame)
            numbers.append(evident)
            doubtful = doubts(evident, contrast=work.choice.contrast)
            warnings.append([*image.notes, *fit.warnings[k], *doubtful])
        fields = (f.requires_grad_(False) for f in (fit.field_AB, fit.field_BA))
        known: dict[str, Any] = dict(zip(("field_AB", "field_BA"), fields, strict=True))
        known |= {"code": LatentCode.of(rows), "warnings": warnings}
        return replace(fit, evidence=numbers, **known)

    def _evidence(
        self, pair: AffinePair, images: ImagePair, generator: torch.Generator
    ) -> dict[str, float]:
        with torch.no_grad():
            where, counts = images.where_B.cpu(), images.counts_on("cpu")
            place = images.geometry_B
            return evidence(pair, *images.smooth, place, where, generator, counts)


def _smoothed(rows: Sequence[LatentCode], moments: Moments) -> list[LatentCode]:
    """Each code, and beside it what its neighbours in time say of it."""
    assert moments.times is not None
    result, table = [], LatentCode.of(rows)
    for k, row in enumerate(rows):
        if moments.period is None and k in (0, len(rows) - 1):
            result.append(row)
            continue
        rest = [n for n in range(len(rows)) if n != k]
        times = [moments.times[n] for n in rest]
        shares = [OWN] * len(rows)
        said = shares_at(moments.times[k], times, moments.period)
        for n, share in zip(rest, said, strict=True):
            shares[n] = (1 - OWN) * share
        result.append(table.mixed(shares))
    return result
