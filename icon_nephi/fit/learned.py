"""The general network: what it predicts of a pair, without any optimisation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icon_nephi._check import check_both
from icon_nephi.fields.codes import LatentCode, LatentCodeTable
from icon_nephi.fields.pyramid import (
    WORKING,
    PyramidEncoder,
    as_code,
    coarser_code,
    reading_fields,
)
from icon_nephi.fit.affine import coincide, find_affine, in_unit_boxes
from icon_nephi.fit.content import ImagePair
from icon_nephi.fit.doubts import doubts, evidence, of_images
from icon_nephi.fit.likeness import Likeness
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.fit.search import identity
from icon_nephi.fit.settings import GRID, Fit, Settings
from icon_nephi.fit.unfold import unfold
from icon_nephi.losses.regularity import relative_determinant
from icon_nephi.losses.similarities import find_similarity
from icon_nephi.maps.networks import AffinePair, NePhi
from icon_nephi.maps.transforms import (
    Map,
    MatrixTransform,
    NeuralTransform,
    value_and_jacobian,
)
from icon_nephi.space.frames import Geometry, identity_map, inside, points_as_grid
from icon_nephi.space.images import gaussian_blur, sample_image
from icon_nephi.space.intensities import PreparedImage
from icon_nephi.space.sampling import draw_points

#: Where the weights lie that are shipped, one file for 2D and one for 3D.
WEIGHTS = Path(__file__).parents[1] / "weights"
# How often its grid can be halved.
HALVINGS = {2: 5, 3: 4}
# How often the network looks, again at what its own map left: more did not help.
PASSES = 1
# How often its two maps are brought nearer to each other's inverse.
AGREEING = 6
# Voxels a side (their mean) from which "auto" asks it, by dimension: in 3D it has not
# been shown to pay (docs/general_network.md).
PAYS = {2: 96, 3: math.inf}
# By how much that has to be better for a fit to begin with it.
BETTER = 0.02
# Adam's learning rate where folds are repaired.
UNFOLD_RATE = 1e-3
# What does not help is made smaller, until no determinant is below this share of the
# usual one at so many places.
LEAST, LOOKED_AT = 0.05, 50_000


class MissingWeights(FileNotFoundError):
    """The weights of the general network are not there."""


def general_encoder(dimension: int, path: Path | None = None) -> PyramidEncoder:
    """The general network's encoder with its weights, in ``eval()``.

    Args:
        dimension: 2 or 3.
        path: other weights, as `training.train_general` writes them.

    Raises:
        MissingWeights: there is no such file.
    """
    from safetensors import safe_open

    path = path or WEIGHTS / f"general{dimension}d.safetensors"
    if not path.exists():
        raise MissingWeights(
            f"the general network's weights {path} are missing: install a wheel of "
            "icon_nephi that has them, or register with start='scratch'"
        )
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        names = list(file.keys())
        weights = {name: file.get_tensor(name).float() for name in names}
    arguments = {**json.loads(about["network"]), "dimension": dimension}
    encoder = PyramidEncoder(**arguments)
    encoder.load_state_dict(weights)
    return encoder.eval().requires_grad_(False)


def save_encoder(encoder: PyramidEncoder, path: Path, **about: Any) -> None:
    """Write an encoder's weights as `general_encoder` reads them, float16."""
    from safetensors.torch import save_file

    weights = {k: v.half().cpu().contiguous() for k, v in encoder.state_dict().items()}
    network = json.dumps(encoder.arguments)
    save_file(
        weights, path, {"network": network} | {k: str(v) for k, v in about.items()}
    )


def has_weights(dimension: int) -> bool:
    """Whether the general network can be asked."""
    return (WEIGHTS / f"general{dimension}d.safetensors").exists()


def predict_pair(
    image_A: PreparedImage,
    image_B: PreparedImage,
    *,
    affine: bool = True,
    encoder: nn.Module | None = None,
    options: FitOptions | None = None,
) -> Fit:
    """What the network predicts behind an affine start; nothing is optimised for it.

    Where the images agree less than with the affine start alone, or with none where
    their boxes lie on each other, that is what comes back. Folds are repaired.

    Args:
        image_A: moving.
        image_B: fixed, on any grid.
        affine: look for an affine start.
        encoder: default: `general_encoder`.
        options: seed, limit of time.

    Raises:
        MissingWeights: no encoder is given, and the weights are missing.
    """
    options = options or FitOptions(progress=False)
    check_both("segmentation", image_A.labels, image_B.labels)
    net = general_encoder(image_B.place.dimension) if encoder is None else encoder
    images, choice = ImagePair(image_A, image_B), find_similarity(None)
    generator = torch.Generator().manual_seed(options.seed)
    likeness = Likeness(images, choice, options.seed)
    starts, said = [identity(image_B.place.dimension)], [*image_A.notes, *image_B.notes]
    if affine:
        aligned = find_affine(images, choice, generator, options, said)
        starts = [aligned, *starts] if coincide(*images.geometries) else [aligned]
    alone = [likeness.judge(likeness.start(start)) for start in starts]
    start = starts[alone.index(max(alone))]
    matrix = in_unit_boxes(start, images.geometry_B, images.geometry_A)
    pair = predicted_pair(predict_code(images, matrix, net), matrix)
    both = images.image_A, images.image_B
    table: Any = pair.net.net
    unfold(pair, table.parameters(), *both, rate=UNFOLD_RATE, generator=generator)
    with torch.no_grad():
        while _least_determinant(pair, both, generator) < LEAST:
            table.local_codes[0].mul_(0.7)
        if likeness.judge(pair(*both)) < max(alone):
            table.local_codes[0].zero_()
        where, counts = images.where_B.cpu(), images.counts_on("cpu")
        place = images.geometry_B
        numbers = evidence(pair, *images.smooth, place, where, generator, counts)
    numbers |= of_images(image_A, image_B)
    reading: Any = pair.net
    return Fit(
        matrix=matrix,
        code=table(*both).detached(),
        field_AB=reading.field_AB.requires_grad_(False),
        field_BA=reading.field_BA.requires_grad_(False),
        losses=[],
        warnings=[*said, *doubts(numbers, contrast=True)],
        evidence=numbers,
    )


def _least_determinant(
    pair: AffinePair, both: tuple[Tensor, Tensor], generator: torch.Generator
) -> float:
    """Of both maps, at random points, as a share of the usual one."""
    rows = draw_points(LOOKED_AT, 1, both[1].dim() - 2, generator=generator)
    at = points_as_grid(rows.to(both[1]))
    found = [value_and_jacobian(phi, at)[1] for phi in pair(*both)]
    return min(float(relative_determinant(slopes).min()) for slopes in found)


#: Where the deformation of a fit may begin.
STARTS = ("auto", "scratch", "learned")


def can_begin(settings: Settings) -> bool:
    """Whether a fit with these settings can begin with a predicted code."""
    return settings.field == "LatentMLP"


def beginning(settings: Settings) -> Settings:
    """Settings like these that can: the small field, where large motions are known."""
    most = max(settings.grids)
    grids = tuple(sorted({min(n, most) for n in GRID.grids}))
    return replace(
        GRID,
        steps=settings.steps,
        patches=settings.patches,
        size=settings.size,
        kept=settings.kept,
        grids=grids,
        channels=GRID.channels[: len(grids)],
    )


def begin_with(
    begin: str,
    likeness: Likeness,
    start: Tensor,
    settings: Settings,
    field: str | Settings,
) -> tuple[Settings, LatentCode | None]:
    """The settings of a fit and the code that it begins with, None for nothing.

    "auto" takes what the general network predicts in 2D (`PAYS`), where its weights
    are there, the settings can begin with it, and the images agree more with it than
    with the affine start alone by `BETTER`, at places and by a measure that no fit goes
    by. Settings that cannot are changed where they were nobody's choice.

    Args:
        begin: one of `STARTS`.
        likeness: of the pair.
        start: the affine start, millimetres.
        settings: of the fit.
        field: how they were asked for.

    Raises:
        ValueError: an unknown start, or settings that cannot begin with it.
        MissingWeights: "learned", and the weights are missing.
    """
    if begin not in STARTS:
        raise ValueError(f"start must be one of {STARTS}, got {begin!r}")
    images = likeness.images
    able = settings
    if field == "auto" and not can_begin(settings):
        able = beginning(settings)
    place = images.geometry_B
    possible = has_weights(place.dimension) and can_begin(able)
    possible = possible and sum(place.size) >= place.dimension * PAYS[place.dimension]
    if begin == "scratch" or (begin == "auto" and not possible):
        return settings, None
    matrix = in_unit_boxes(start, place, images.geometry_A)
    code = coarser_code(predict_code(images, matrix), max(able.grids))
    if begin == "auto":
        maps = predicted_pair(code, matrix)(images.image_A, images.image_B)
        if likeness.judge(maps) < likeness.judge(likeness.start(start)) + BETTER:
            return settings, None
    return able, code


@torch.no_grad()
def predict_code(
    images: ImagePair, matrix: Tensor, encoder: nn.Module | None = None
) -> LatentCode:
    """The code that the network finds for a pair behind an affine start.

    Args:
        images: the pair.
        matrix: ``[d + 1, d + 1]``, fixed unit box -> moving unit box.
        encoder: default: `general_encoder`.

    Raises:
        MissingWeights: no encoder is given, and the weights are missing.
    """
    d = images.geometry_B.dimension
    net: Any = general_encoder(d) if encoder is None else encoder
    net = net.to(images.image_B.device)
    look = Looker(images, matrix, working_size(images.geometry_B))
    fixed = look.fixed
    code = LatentCode(fixed.new_zeros(1, 0), (fixed.new_zeros(1, 2 * d, *(4,) * d),))
    fields = reading_fields(d)
    for field in fields:
        field.to(fixed).requires_grad_(False)
    for number in range(PASSES):
        there, back = _maps(fields, code)
        step = net(look.moving(there), fixed)
        if number:
            onward, homeward = _maps(fields, step)
            nodes = identity_map(step.local_codes[0].shape[2:], device=fixed.device)
            step = as_code(there(onward(nodes)) - nodes, homeward(back(nodes)) - nodes)
        code = step
    return _agreed(fields, code)


def _agreed(fields: tuple[Any, Any], code: LatentCode) -> LatentCode:
    """The code whose maps are more nearly each other's inverse.

    What a point misses its start by after both maps, each map takes back half of.
    """
    nodes = identity_map(code.local_codes[0].shape[2:])
    nodes = nodes.to(code.local_codes[0])
    for _ in range(AGREEING):
        there, back = _maps(fields, code)
        moved, returned = there(nodes), back(nodes)
        code = as_code(
            moved - (back(moved) - nodes) / 2 - nodes,
            returned - (there(returned) - nodes) / 2 - nodes,
        )
    return code


def _maps(fields: tuple[Any, Any], code: LatentCode) -> tuple[Map, Map]:
    return NeuralTransform(fields[0], code), NeuralTransform(fields[1], code)


def predicted_pair(code: LatentCode, matrix: Tensor) -> AffinePair:
    """The maps of a predicted code behind an affine start, with a `LatentCodeTable`."""
    (grid,) = code.local_codes
    d = grid.dim() - 2
    table = LatentCodeTable(
        1, grids=[tuple(grid.shape[2:])], channels=(2 * d,), global_size=0
    )
    with torch.no_grad():
        table.local_codes[0].copy_(grid)
    pair = AffinePair(NePhi(table, *reading_fields(d)), matrix.to(grid.dtype))
    pair.to(grid.device)
    return pair


class Looker:
    """Both images as the network sees them: one channel on a grid of the fixed box.

    Args:
        images: the pair.
        matrix: ``[d + 1, d + 1]``, fixed unit box -> moving unit box.
        size: of the grid.
    """

    def __init__(
        self, images: ImagePair, matrix: Tensor, size: tuple[int, ...]
    ) -> None:
        place = images.geometry_B
        self.lattice = identity_map(size, device=images.image_B.device)
        self.start = MatrixTransform(matrix[None].to(images.image_B))
        self.image = _antialiased(images.image_A, images.geometry_A, place, size)
        fixed = _antialiased(images.image_B, place, place, size)
        #: ``[1, 1, *size]``.
        self.fixed = sample_image(fixed, self.lattice)

    def moving(self, phi: Map | None = None) -> Tensor:
        """``[1, 1, *size]`` of the moving image behind the start and a map before it.

        Nothing where that leads outside.
        """
        at = self.lattice if phi is None else phi(self.lattice)
        at = self.start(at)
        return sample_image(self.image, at) * inside(at).to(self.image)


def working_size(place: Geometry) -> tuple[int, ...]:
    """The grid that the network looks at: cubic voxels, sides it can halve."""
    step = 2 ** HALVINGS[place.dimension]
    most, longest = WORKING[place.dimension]
    extent = place.extent
    apart = (math.prod(extent) / most) ** (1 / len(extent))
    # No more voxels than there are.
    apart = max(apart, max(extent) / longest, min(place.spacing))
    return tuple(max(2, round(length / apart / step)) * step for length in extent)


def _antialiased(
    image: Tensor, own: Geometry, place: Geometry, size: tuple[int, ...]
) -> Tensor:
    """One channel of an image, blurred as a grid of that size over a box asks for."""
    image = image.mean(1, keepdim=True)
    apart = max(length / (n - 1) for length, n in zip(place.extent, size, strict=True))
    return gaussian_blur(image, [0.4 * apart / s for s in own.tensor_spacing])
