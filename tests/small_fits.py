"""Fits made by hand, small enough for a test: random fields, a random affine part."""

import numpy as np
import torch

from icon_nephi.fields import LatentMLP, ModulatedSiren
from icon_nephi.fields.codes import LatentCode
from icon_nephi.fit.from_scratch import fit_pair
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.fit.settings import Fit
from icon_nephi.space.frames import Geometry
from icon_nephi.space.intensities import PreparedImage

KINDS = {"LatentMLP": {"width": 16}, "ModulatedSiren": {"width": 16, "frequencies": 8}}


def rotation(dimension, generator):
    """A proper rotation matrix, any angle."""
    matrix = np.linalg.qr(generator.normal(size=(dimension, dimension)))[0]
    matrix[:, 0] *= np.linalg.det(matrix)
    return matrix


def geometry(size, seed=0, flipped=False):
    """An oblique, anisotropic place for a grid of that size, tensor order."""
    generator = np.random.default_rng(seed)
    d = len(size)
    direction = rotation(d, generator)
    direction[:, 0] *= -1 if flipped else 1
    return Geometry(
        size=tuple(size),
        spacing=tuple(generator.uniform(1.0, 3.0, d).tolist()),
        origin=tuple(generator.uniform(-200, 200, d).tolist()),
        direction=tuple(map(tuple, direction.tolist())),
    )


def small_field(kind, dimension, code_size, generator, strength):
    arguments = dict(KINDS[kind])
    if kind == "ModulatedSiren":
        arguments["omega"] = 5.0
    maker = {"LatentMLP": LatentMLP, "ModulatedSiren": ModulatedSiren}[kind]
    field = maker(dimension, code_size, **arguments, generator=generator)
    with torch.no_grad():
        field.last.weight.normal_(generator=generator).mul_(strength)
    return field


def small_fit(dimension, matrix, *, kind="LatentMLP", seed=0, strength=0.01):
    """A fit whose displacements are a few hundredths of the box."""
    generator = torch.Generator().manual_seed(seed)
    grids = [
        0.5 * torch.randn(1, 4, *(n,) * dimension, generator=generator) for n in (4, 5)
    ]
    code = LatentCode(torch.randn(1, 3, generator=generator), tuple(grids))
    fields = [
        small_field(kind, dimension, code.size, generator, strength) for _ in range(2)
    ]
    return Fit(
        matrix=matrix,
        code=code,
        field_AB=fields[0],
        field_BA=fields[1],
        losses=[
            {"all_loss": 1.0, "similarity_loss": 0.5},
            {"all_loss": 0.25, "similarity_loss": 0.125},
        ],
        warnings=["the affine start is doubtful"],
    )


def unit_matrix(dimension):
    """Fixed unit box -> moving unit box: middle on middle, a little sheared."""
    d = dimension
    generator = np.random.default_rng(7)
    matrix = torch.eye(d + 1, dtype=torch.float64)
    matrix[:d, :d] += torch.from_numpy(0.05 * generator.normal(size=(d, d)))
    matrix[:d, d] = 0.5 - matrix[:d, :d] @ torch.full((d,), 0.5, dtype=torch.float64)
    return matrix


def rows_in(place, count, generator, low=0.0, high=1.0):
    """Random points ``[N, d]`` in millimetres in the box of a geometry."""
    d = place.dimension
    frame = place.unit_to_physical().numpy()
    unit = generator.uniform(low, high, (count, d))
    return unit @ frame[:d, :d].T + frame[:d, d]


def voxels_in(place, count, generator):
    """Random voxel centres ``[N, d]`` in millimetres."""
    d = place.dimension
    frame = place.unit_to_physical().numpy()
    sizes = np.array(place.size)
    unit = generator.integers(0, sizes, (count, d)) / (sizes - 1)
    return unit @ frame[:d, :d].T + frame[:d, d]


def fit_tensors(image_A, image_B, place_A, place_B, *, of_A=None, of_B=None, **choices):
    """`fit_pair` of tensors ``[1, C, *grid]`` as they are, without a bar.

    What else is known of an image, of `PreparedImage`, is in ``of_A`` and ``of_B``.
    """
    prepared = (
        PreparedImage.of(image_A, place_A, **(of_A or {})),
        PreparedImage.of(image_B, place_B, **(of_B or {})),
    )
    names = ("seed", "time_limit", "keep_on_interrupt")
    options = {name: choices.pop(name) for name in names if name in choices}
    return fit_pair(*prepared, **choices, options=FitOptions(progress=False, **options))
