"""Two scans, what ICON makes of them, and maps by way of its ITK transforms."""

import numpy as np
import pytest
import torch

from icon_nephi.fields.codes import LatentCodeTable
from icon_nephi.maps.networks import NePhi
from icon_nephi.space.frames import identity_map
from tests.maps.problems import mlp

GRID = (7, 8, 6)  # of the network
MILLIMETRES = 1e-3  # an ITK transform and the map in memory may differ by this


def coded(dimension, field=mlp):
    """A pair with a learned code, as for one pair without an encoder."""
    table = LatentCodeTable(grids=[(3,) * dimension], channels=[4], global_size=2)
    return NePhi(table, field(dimension), field(dimension))


def itk_image(itk, seed, size, spacing, origin):
    values = np.random.default_rng(seed).random(size).astype(np.float32)
    image = itk.image_from_array(values)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    return image


def make_scans():
    """itk, a moving and a fixed image with nothing in common but their content."""
    itk = pytest.importorskip("itk")
    image_A = itk_image(itk, 0, (9, 11, 8), (1.5, 0.8, 2.0), (3.0, -7.0, 11.0))
    image_B = itk_image(itk, 1, (8, 10, 9), (1.1, 1.9, 1.3), (-4.0, 2.0, 5.0))
    return itk, image_A, image_B


def as_icon_reads(*scans):
    """The tensors that ICON's register_pair hands to the model."""
    return [
        torch.nn.functional.interpolate(
            torch.tensor(np.asarray(scan))[None, None], size=GRID, mode="trilinear"
        )
        for scan in scans
    ]


def through_itk(transform, fixed, moving):
    """The map on the network's grid, by way of millimetres, ICON frame."""

    def index(unit, size):  # continuous voxel index along tensor axes
        n, m = np.array(size), np.array(GRID)
        return (unit * (m - 1) + 0.5) * n / m - 0.5

    def unit(index, size):
        n, m = np.array(size), np.array(GRID)
        return ((index + 0.5) * m / n - 0.5) / (m - 1)

    x = identity_map(GRID, dtype=torch.float64)[0].flatten(1).T.numpy()
    fixed_size, moving_size = np.asarray(fixed).shape, np.asarray(moving).shape
    moved = []
    for point in index(x, fixed_size):
        millimetres = point[::-1] * fixed.GetSpacing() + fixed.GetOrigin()
        there = np.array(transform.TransformPoint(millimetres.tolist()))
        back = (there - moving.GetOrigin()) / moving.GetSpacing()
        moved.append(unit(back[::-1], moving_size))
    return torch.tensor(np.array(moved)).T.reshape(1, 3, *GRID)


def millimetres_apart(found, expected, moving):
    """Largest difference of two maps; what a unit is depends on the moving image."""
    sizes = np.array(np.asarray(moving).shape) * np.array(moving.GetSpacing())[::-1]
    unit = torch.tensor(sizes * (np.array(GRID) - 1) / np.array(GRID))
    difference = (found - expected).abs().amax((0, 2, 3, 4))
    return float((difference * unit).max())
