"""The last stages of a large pair: on finer levels, in one neighbourhood after another.

Only codes move here, without their prior, and regularity is looked at where similarity
is. So what is not looked at for a while stays as it was: Adam would take steps of full
size by the prior alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from icon_nephi.fit.content import ImagePair
from icon_nephi.fit.optimize import Course, FitOptions, Stage, optimize
from icon_nephi.fit.settings import Settings
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.maps.transforms import Map
from icon_nephi.space.chunks import ChunkedImage
from icon_nephi.space.frames import points_as_grid, to_rows
from icon_nephi.space.intensities import PreparedImage
from icon_nephi.space.sampling import Patches, Points

# Of the settings' steps and code rate, what each level gets.
SHARE, RATE = 0.6, 0.3
# Between the samples of a block, in voxels of the level.
STRIDES = 2.0, 1.2
# Voxels a side of a neighbourhood at least; how many at a time; new ones a step.
SIDE, MOST, NEW = 48, 32, 2
# Chunks that a neighbourhood takes of each image, its surroundings included.
_CHUNKS = 16
_CELLS = 1_000_000  # mask voxels that are kept as places to draw samples


def levels_of(
    image_A: PreparedImage, image_B: PreparedImage
) -> list[tuple[ChunkedImage, ChunkedImage]]:
    """(moving, fixed) of every finer level, coarse to fine; none of images in memory.

    The one with fewer levels stays at its coarsest for a while.
    """
    count = max(len(image_A.finer), len(image_B.finer))
    sides = [
        [ChunkedImage.of(i.values)] * (count - len(i.finer)) + [*i.finer]
        for i in (image_A, image_B)
        if count
    ]
    return list(zip(*sides, strict=True))


def fit_levels(
    loss: GradientICONPoints,
    levels: Sequence[tuple[ChunkedImage, ChunkedImage]],
    images: ImagePair,
    codes: nn.Module,
    settings: Settings,
    points: int | None,
    options: FitOptions,
) -> Course:
    """The `Course` of all; the codes are left at their optimum for the last level.

    After a level with a warning none follows. Masks and label maps are those of the
    images, on coarser grids; where ``points`` are told, so many take the place of each
    block, for a similarity of points.
    The network of the loss is near already; its prior is left out. Levels are
    (moving, fixed), coarse to fine, all over the same unit boxes.
    """
    history: list[dict[str, float]] = []
    loss = loss.changed(prior_lmbda=0.0)
    steps = max(2, round(settings.steps * SHARE))
    stages = [
        Stage(
            steps // len(STRIDES),
            Points(points * settings.patches)
            if points
            # A block is a few voxels wide: any map is affine across it.
            else Patches(settings.patches, settings.size, stride, corners=True),
        )
        for stride in STRIDES
    ]
    for number, (image_A, image_B) in enumerate(levels, 1):
        if options.late:
            break
        near = _neighbourhoods(loss, image_A, image_B, images)
        advance = None if near is None else lambda *_, n=near: n.advance(loss.phi_AB)
        try:
            course = optimize(
                loss,
                image_A,
                image_B,
                stages,
                [{"params": list(codes.parameters()), "lr": RATE * settings.code_rate}],
                mask_A=images.where_A,
                mask_B=images.where_B,
                extras=images.segmentations,
                callback=advance,
                options=options,
            )
        finally:
            image_A.close()
            image_B.close()
        history += course.losses
        if course.warnings:
            place = f"on level {number} of {len(levels)}"
            return Course(history, [f"{place}, {text}" for text in course.warnings])
    return Course(history, [])


def _neighbourhoods(
    loss: GradientICONPoints,
    image_A: ChunkedImage,
    image_B: ChunkedImage,
    images: ImagePair,
) -> Neighbourhoods | None:
    """None where everything can be held: then samples lie everywhere at once."""
    if image_A.cache.whole and image_B.cache.whole:
        return None
    near = Neighbourhoods(
        image_A, image_B, images.where_A, images.where_B, loss.generator
    )
    with torch.no_grad():
        phi = loss.regis_net(image_A, image_B)[0]
    for _ in range(-(-near.count // NEW) + 1):
        near.advance(phi)
    return near


class Neighbourhoods:
    """Where samples are drawn for some steps: boxes of whole chunks with content.

    Every box of the fixed image is visited once, in random order, before any again.
    In the moving image samples lie where the map takes the box, so both directions
    read the same chunks. The next boxes are read ahead. Of the images the content is
    told, ``[1, 1, *grid]`` over their unit boxes.
    """

    def __init__(
        self,
        image_A: ChunkedImage,
        image_B: ChunkedImage,
        where_A: Tensor,
        where_B: Tensor,
        generator: torch.Generator | None,
    ) -> None:
        self.image_A, self.image_B, self.generator = image_A, image_B, generator
        self.cells_A, image_A.cell = _cells(where_A)
        cells_B, image_B.cell = _cells(where_B)
        cache = image_B.cache
        side = [
            min(n, c * -(-SIDE // c))
            for c, n in zip(cache.chunk, cache.shape, strict=True)
        ]
        shape = torch.tensor(cache.shape)
        index = cells_B.double() * image_B.scale + image_B.shift
        index = index.clamp(min=0).minimum(shape - 1).long() // torch.tensor(side)
        number = index[:, 0]
        for axis in range(1, len(side)):
            number = number * -(-cache.shape[axis] // side[axis]) + index[:, axis]
        counts = torch.unique(number, return_counts=True)[1]
        self._boxes = cells_B[number.argsort(stable=True)].split(counts.tolist())
        slots = min(image_A.cache.slots, cache.slots)
        self.count = min(MOST, max(4, slots // _CHUNKS), len(self._boxes))
        self._order: list[int] = []
        self._active: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.count)
        self._next: list[tuple[Tensor, Tensor]] = []

    def advance(self, phi_AB: Map) -> None:
        """Leave the oldest boxes for the next ones, and read ahead."""
        self._active.extend(self._next)
        images = self.image_B, self.image_A
        for image, rows in zip(images, zip(*self._active, strict=True), strict=False):
            image.focus = torch.cat(rows)
        self._next, boxes_A, boxes_B = [], [], []
        for _ in range(min(NEW, self.count)):
            cells = self._boxes[self._draw()]
            low, high = cells.amin(0), cells.amax(0)
            boxes_B.append(self.image_B.box(low, high))
            low, high = self._moved(phi_AB, low, high)
            boxes_A.append(self.image_A.box(low, high))
            there = ((self.cells_A >= low) & (self.cells_A <= high)).all(1)
            self._next.append((cells, self.cells_A[there]))
        self.image_B.cache.ahead(boxes_B)
        self.image_A.cache.ahead(boxes_A)

    def _draw(self) -> int:
        if not self._order:
            order = torch.randperm(len(self._boxes), generator=self.generator)
            self._order = order.tolist()
        return self._order.pop()

    def _moved(self, phi: Map, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The box around where a map takes a box."""
        d = len(low)
        share = torch.cartesian_prod(*[torch.linspace(0, 1, 3)] * d).reshape(-1, d)
        rows = low + share * (high - low)
        with torch.no_grad():
            at = points_as_grid(rows[None].to(self.image_B.device))
            moved = to_rows(phi(at))[0].to(low)
        return moved.amin(0), moved.amax(0)


def _cells(where: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[V, d]`` of cells with content, not too many, and a cell's size."""
    shape = where.shape[2:]
    d = len(shape)
    every = max(1, math.ceil((shape.numel() / _CELLS) ** (1 / d)))
    steps = torch.tensor(shape) - 1
    thinned = where[0, 0]
    for axis, n in enumerate(shape):
        thinned = thinned.index_select(axis, torch.arange(0, n, every).to(where.device))
    rows = (thinned > 0).cpu().nonzero() * every / steps
    return rows, every / steps
