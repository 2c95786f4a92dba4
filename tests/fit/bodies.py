"""Bodies that are functions of the place, and motions of them known everywhere."""

import math

import torch

from icon_nephi.fit.settings import find_effort
from icon_nephi.registration.register import register
from icon_nephi.space.frames import identity_map, to_rows

FAST = find_effort("fast", (64, 64))


class Body:
    """A soft ellipsoid with blobs: values ``[N]`` of places ``[N, d]``, half side 1."""

    def __init__(self, d=2, blobs=60, seed=3, size=(0.07, 0.2), edge=0.05):
        g = torch.Generator().manual_seed(seed)
        self.d, self.edge = d, edge
        self.radii = 0.75 * torch.tensor([1.0, 0.8, 0.9])[:d].double()
        at = 2 * torch.rand(20 * blobs, d, generator=g).double() - 1
        self.at = at[at.square().sum(1) < 0.8][:blobs] * self.radii
        share = torch.rand(blobs, generator=g).double()
        self.size = size[0] + (size[1] - size[0]) * share
        sign = (torch.rand(blobs, generator=g) < 0.5).double() * 2 - 1
        self.height = sign * (0.2 + 0.6 * torch.rand(blobs, generator=g).double())

    def inside(self, x):
        r = (x / self.radii).norm(dim=1)
        return torch.sigmoid((1 - r) * 2 * 0.75 / self.edge)

    def __call__(self, x):
        value = torch.full((len(x),), 0.4, dtype=torch.float64)
        for at, size, height in zip(self.at, self.size, self.height, strict=True):
            away = (x - at).square().sum(1)
            value += height * torch.exp(-away / (2 * size**2))
        return value.clamp(0.05, 1.5) * self.inside(x)


class Motion:
    """Fixed to moving places: a turn, then Gaussian bumps."""

    def __init__(self, d=2, reach=0.09, bumps=6, spread=0.35, seed=7, turn=None):
        g = torch.Generator().manual_seed(seed)
        self.at = (2 * torch.rand(bumps, d, generator=g).double() - 1) * 0.55
        push = torch.randn(bumps, d, generator=g).double()
        self.push = push / push.norm(dim=1, keepdim=True) * reach
        self.spread = spread
        self.turn = torch.eye(d).double() if turn is None else turn

    def __call__(self, y):
        y = y @ self.turn.T
        moved = y.clone()
        for at, push in zip(self.at, self.push, strict=True):
            away = (y - at).square().sum(1, keepdim=True)
            moved += torch.exp(-away / (2 * self.spread**2)) * push
        return moved


def rotation(degrees, d=2, plane=(0, 1)):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix, (i, j) = torch.eye(d).double(), plane
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


def places(size):
    """``[N, d]`` of the voxels of a grid, from -1 to 1."""
    return 2 * to_rows(identity_map(size, dtype=torch.float64))[0] - 1


def drawn(values, size):
    """An image ``[1, 1, *grid]`` of the values of its voxels."""
    return values.reshape(1, 1, *size).float()


def inner(body, motion, count=400, seed=5, reach=0.85):
    """Fixed places whose true ends lie in the body."""
    g = torch.Generator().manual_seed(seed)
    y = 2.4 * torch.rand(20 * count, body.d, generator=g).double() - 1.2
    kept = (motion(y) / body.radii).norm(dim=1) < reach
    return y[kept][:count]


def found(result, y):
    """Where a registration of tensors takes places."""
    moved = result.transform_points(((y + 1) / 2).numpy())
    return 2 * torch.from_numpy(moved) - 1


def error_of(result, motion, y, size):
    """``[N]`` in voxels of the longest side."""
    away = found(result, y) - motion(y)
    return away.norm(dim=1) * (max(size) - 1) / 2


def go(image_A, image_B, **choices):
    """Registered quickly, without a bar."""
    return register(image_A, image_B, **{"field": FAST, "progress": False} | choices)
