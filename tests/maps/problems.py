"""Small registration problems: every transform we make, and ICON's beside them.

A problem is a registration module, ``module(image_A, image_B)`` -> map or pair of maps,
on images with unequal sides. Its code follows the images, so a batch holds different
maps; its last layers are set to something (``alive``) or left at zero, as at the start.
"""

from collections.abc import Callable
from dataclasses import dataclass

import icon_registration as icon
import torch
import torch.nn.functional as F
from torch import nn

from icon_nephi.fields import LatentMLP, ModulatedSiren
from icon_nephi.fields.codes import LatentCode
from icon_nephi.maps.networks import (
    AffinePair,
    FirstTransform,
    FunctionFromNeuralField,
    NePhi,
    TwoStepPair,
)
from icon_nephi.maps.transforms import Composition, MatrixTransform
from icon_nephi.space.frames import identity_map

SHAPES = {2: (7, 5), 3: (5, 4, 6)}
ONE_GRID = ((3, 4, 5),)
TWO_GRIDS = ((3, 5, 4), (5, 3, 3))
CODE = 6  # values at a point, for each encoder below


def images(dimension, batch=2, dtype=torch.float32, seed=0, shape=None):
    """Two random images ``[B, 1, *shape]``."""
    source = torch.Generator().manual_seed(seed)
    size = (2, batch, 1, *(shape or SHAPES[dimension]))
    image_A, image_B = torch.rand(size, generator=source, dtype=torch.float64).to(dtype)
    return image_A, image_B


def points(dimension, batch=1, count=9, dtype=torch.float64, reach=0.0, seed=1):
    """Random ``[B, d, N, 1(, 1)]``, up to ``reach`` outside the unit box."""
    source = torch.Generator().manual_seed(seed)
    size = (batch, dimension, count, *(1,) * (dimension - 1))
    x = torch.rand(size, generator=source, dtype=torch.float64)
    return ((1 + 2 * reach) * x - reach).to(dtype)


def conv(dimension, inputs, outputs):
    return {2: nn.Conv2d, 3: nn.Conv3d}[dimension](inputs, outputs, 3, padding=1)


def pool(image, size):
    by_dimension = {4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
    return by_dimension[image.dim()](image, size)


class Encoder(nn.Module):
    """Two images -> `LatentCode` by one convolution; any shape, any batch."""

    def __init__(self, dimension, grids=ONE_GRID, interpolation="quadratic"):
        super().__init__()
        self.grids = [grid[:dimension] for grid in grids]
        self.interpolation = interpolation
        self.split = [2, 4] if len(grids) == 1 else [1, 2, 3]
        self.conv = conv(dimension, 2, CODE)

    def forward(self, image_A, image_B):
        features = torch.tanh(4 * self.conv(torch.cat([image_A, image_B], 1)))
        first, *rest = features.split(self.split, dim=1)
        grids = [pool(f, g) for f, g in zip(rest, self.grids, strict=True)]
        return LatentCode(first.flatten(2).mean(2), tuple(grids), self.interpolation)


class Displacements(nn.Module):
    """Two images -> a voxel field ``[B, d, *grid]``, zero at the start."""

    def __init__(self, dimension):
        super().__init__()
        self.last = conv(dimension, 2, dimension)

    def forward(self, image_A, image_B):
        return self.last(torch.cat([image_A, image_B], 1))


class Matrices(nn.Module):
    """Two images -> homogeneous matrices ``[B, d + 1, d + 1]``, identity at first."""

    def __init__(self, dimension):
        super().__init__()
        self.dimension = dimension
        self.last = nn.Linear(2, dimension * (dimension + 1))

    def forward(self, image_A, image_B):
        d = self.dimension
        means = torch.cat([image_A, image_B], 1).flatten(2).mean(2)
        change = 0.3 * torch.tanh(self.last(means)).reshape(-1, d, d + 1)
        identity = torch.eye(d + 1, dtype=change.dtype, device=change.device)
        return F.pad(change, (0, 0, 0, 1)) + identity


class TanhField(nn.Module):
    """Somebody else's field: a module that knows nothing of derivatives."""

    def __init__(self, dimension):
        super().__init__()
        self.first = nn.Linear(dimension + CODE, 7)
        self.last = nn.Linear(7, dimension)

    def forward(self, points, values):
        return self.last(torch.tanh(self.first(torch.cat([points, values], -1))))


def wave(points, values):
    """Somebody else's field: a plain function."""
    return 0.1 * torch.sin(3 * points + values[..., : points.shape[-1]])


class MatrixModule(icon.RegistrationModule):
    def __init__(self, dimension):
        super().__init__()
        self.net = Matrices(dimension)

    def forward(self, image_A, image_B):
        return MatrixTransform(self.net(image_A, image_B))


class Composed(icon.RegistrationModule):
    """Composition of a neural field, a voxel field and a matrix."""

    def __init__(self, dimension):
        super().__init__()
        self.neural = neural(dimension)
        self.voxels = voxels(dimension)
        self.matrix = MatrixModule(dimension)

    def forward(self, *pair):
        inner = Composition(self.voxels(*pair), self.matrix(*pair))
        return Composition(self.neural(*pair), inner)


def siren(dimension, code_size=CODE):
    return ModulatedSiren(dimension, code_size, width=8, frequencies=3, omega=3.0)


def mlp(dimension, code_size=CODE):
    return LatentMLP(dimension, code_size, width=8)


def neural(dimension, field=mlp, grids=ONE_GRID, order="quadratic"):
    encoder = Encoder(dimension, grids, order)
    return FunctionFromNeuralField(encoder, field(dimension))


def voxels(dimension):
    return icon.FunctionFromVectorField(Displacements(dimension))


def icon_matrix(dimension):
    return icon.FunctionFromMatrix(Matrices(dimension))


def nephi(dimension, field=mlp):
    return NePhi(Encoder(dimension), field(dimension), field(dimension))


def affine_pair(dimension):
    matrix = torch.eye(dimension + 1, dtype=torch.float64)
    matrix[0, 1], matrix[1, 1], matrix[0, -1] = 0.2, 0.9, 0.05
    return AffinePair(nephi(dimension), matrix)


def two_neural_steps(dimension):
    coarse = icon.DownsampleRegistration(neural(dimension), dimension)
    return icon.TwoStepRegistration(
        icon.TwoStepRegistration(icon_matrix(dimension), coarse), voxels(dimension)
    )


@dataclass(frozen=True)
class Problem:
    """How to build a module, and which laws hold for its maps.

    Attributes:
        name: of the problem.
        build: dimension -> module.
        bounded: outside the unit box the border's displacement.
        starts: with last layers at zero the map is the identity.
        mixed: coordinates may have another dtype than the weights (ICON's voxel
            fields and matrices may not).
    """

    name: str
    build: Callable[[int], nn.Module]
    bounded: bool = False
    starts: bool = True
    mixed: bool = True

    def make(self, dimension, dtype=torch.float64, *, alive=True, shape=None):
        """The module, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            module = self.build(dimension)
            for layer in last_layers(module):
                nn.init.zeros_(layer.bias)
                nn.init.zeros_(layer.weight)
                if alive:
                    bound = 0.6 / layer.weight[0].numel() ** 0.5
                    nn.init.uniform_(layer.weight, -bound, bound)
                    nn.init.uniform_(layer.bias, -0.05, 0.05)
        if isinstance(module, icon.RegistrationModule):
            module.assign_identity_map([1, 1, *(shape or SHAPES[dimension])])
        module = module.to(dtype)
        for part in module.modules():
            if hasattr(part, "identity_map"):  # ICON's is rounded to float32
                size = part.identity_map.shape[2:]
                part.identity_map = identity_map(size, dtype=dtype)
        return module


def last_layers(module):
    return [m.last for m in module.modules() if isinstance(m, LASTS)]


LASTS = (ModulatedSiren, LatentMLP, TanhField, Displacements, Matrices)
FIELDS = (ModulatedSiren, LatentMLP, TanhField)

PROBLEMS = [
    Problem("siren", lambda d: neural(d, siren), bounded=True),
    Problem(
        "siren_linear_two_grids",
        lambda d: neural(d, siren, TWO_GRIDS, "linear"),
        bounded=True,
    ),
    Problem("mlp_two_grids", lambda d: neural(d, mlp, TWO_GRIDS), bounded=True),
    Problem("mlp_linear", lambda d: neural(d, mlp, ONE_GRID, "linear"), bounded=True),
    Problem("foreign_module", lambda d: neural(d, TanhField), bounded=True),
    Problem(
        "foreign_function",
        lambda d: FunctionFromNeuralField(Encoder(d), wave),
        bounded=True,
        starts=False,
    ),
    Problem("nephi", lambda d: nephi(d, siren), bounded=True),
    Problem("first_transform", lambda d: FirstTransform(nephi(d)), bounded=True),
    Problem("two_step_pair", lambda d: TwoStepPair(nephi(d), nephi(d, siren))),
    Problem("affine_pair", affine_pair, starts=False),
    Problem("matrix", MatrixModule),
    Problem("composition", Composed, mixed=False),
    Problem("icon_voxels", voxels, bounded=True, mixed=False),
    Problem("icon_matrix", icon_matrix, mixed=False),
    Problem(
        "icon_two_step_of_voxels_and_first_transform",
        lambda d: icon.TwoStepRegistration(voxels(d), FirstTransform(nephi(d))),
        mixed=False,
    ),
    Problem("icon_two_step_of_three", two_neural_steps, mixed=False),
]
OURS = [p for p in PROBLEMS if not p.name.startswith("icon_")]
BOUNDED = [p for p in PROBLEMS if p.bounded]
