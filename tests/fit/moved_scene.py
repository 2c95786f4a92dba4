"""A smooth scene in the physical frame, twice, with a known movement between."""

import math

import torch

from icon_nephi.space.frames import Geometry, apply_affine, identity_map, to_rows

GRID = {2: (40, 34), 3: (20, 18, 22)}
OTHER = {2: (36, 44), 3: (22, 20, 18)}


def geometry(size, spacing, origin, degrees=0.0):
    d = len(size)
    direction = torch.eye(d, dtype=torch.float64)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    direction[:2, :2] = torch.tensor([[c, -s], [s, c]])
    rows = tuple(map(tuple, direction.tolist()))
    return Geometry(size, spacing[:d], origin[:d], rows)


def physical_points(of):
    rows = to_rows(identity_map(of.size, dtype=torch.float64))[0]
    return apply_affine(of.unit_to_physical(), rows)


def scene(points):
    """A smooth image of the physical frame: blobs of differing size, no symmetry."""
    source = torch.Generator().manual_seed(1)
    d = points.shape[-1]
    total = torch.zeros(len(points), dtype=torch.float64)
    for _ in range(10 * d):
        centre = 70 * torch.rand(d, generator=source, dtype=torch.float64) - 5
        width = 5 + 4 * float(torch.rand((), generator=source))
        height = 0.3 + float(torch.rand((), generator=source))
        distance = (points - centre).square().sum(-1)
        total = total + height * torch.exp(-0.5 * distance / width**2)
    return total


def pair(dimension):
    """Two images of the scene, and the matrix fixed -> moving millimetres."""
    of_A = geometry(OTHER[dimension], (1.7, 1.5, 3.0), (-5.0, 4.0, 2.0), 3.0)
    of_B = geometry(GRID[dimension], (1.8, 1.6, 2.8), (0.0, 0.0, 0.0))
    if dimension == 3:
        of_A = geometry(of_A.size, (3.3, 3.1, 3.0), (-5.0, -3.0, -6.0), 3.0)
        of_B = geometry(of_B.size, (2.9, 3.4, 3.1), (0.0, 0.0, -4.0))
    c, s = math.cos(math.radians(8)), math.sin(math.radians(8))
    matrix = torch.eye(dimension + 1, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[c, -s], [s, c]])
    matrix[:dimension, dimension] = torch.tensor([4.0, -6.0, 3.0])[:dimension]
    image_B = scene(physical_points(of_B)).reshape(1, 1, *of_B.size)
    back = apply_affine(torch.linalg.inv(matrix), physical_points(of_A))
    image_A = scene(back).reshape(1, 1, *of_A.size)
    return image_A.float(), image_B.float(), of_A, of_B, matrix


def error(found, expected, of_B):
    """Largest distance in millimetres over the fixed image."""
    x = physical_points(of_B)
    return float((apply_affine(found, x) - apply_affine(expected, x)).norm(dim=1).max())
