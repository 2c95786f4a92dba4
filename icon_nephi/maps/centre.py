"""The middle of many maps from one frame."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from icon_nephi.maps.inverse import Inverse
from icon_nephi.maps.transforms import Composition, Map, MatrixTransform
from icon_nephi.space.frames import Geometry, apply_affine


class Centre:
    """The way from the mean frame of many maps to the frame that they start from.

    With ``back`` the mean of the affine parts and then of the deformations is undone:
    from the mean frame the maps have about no displacement on average.

    Args:
        matrices: affine parts ``[K, d + 1, d + 1]``, frame millimetres -> images.
        middle: about the mean of all deformations, frame unit box -> itself.
        inverse: about its inverse.
        place: the grid of the frame.

    Attributes:
        place: the grid of the mean frame.
        matrix: mean frame unit box -> frame unit box, the affine part.
        into: the map from the mean frame to the frame, unit boxes.
        out: its inverse.
    """

    def __init__(
        self, matrices: Tensor, middle: Map, inverse: Map, place: Geometry
    ) -> None:
        half = torch.full((1, place.dimension), 0.5, dtype=torch.float64)
        centre = apply_affine(place.unit_to_physical(), half)[0]
        mean, there = affine_mean(matrices, centre)
        origin = torch.tensor(place.origin, dtype=torch.float64) + there - centre
        self.place = replace(place, origin=tuple(origin.tolist()))
        unit = place.physical_to_unit() @ torch.linalg.inv(mean)
        self.matrix = unit @ self.place.unit_to_physical()
        back = torch.linalg.inv(self.matrix)
        with torch.no_grad():
            affine, undone = MatrixTransform(self.matrix[None]), back[None]
            self.into = Composition(Inverse(middle, inverse), affine)
            self.out = Composition(MatrixTransform(undone), middle)


def affine_mean(matrices: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """``[d + 1, d + 1]`` their mean, and where it takes the centre ``[d]``.

    Of affine maps ``[K, d + 1, d + 1]``: linear parts have the mean of rotations and
    scales (log-Euclidean), shifts that of where the centre is taken.
    """
    import scipy.linalg  # slow to import

    d = len(centre)
    move = torch.eye(d + 1, dtype=torch.float64)
    move[:d, d] = centre
    about = matrices @ move
    linear = about[:, :d, :d].numpy()
    middle = np.eye(d)
    for _ in range(5):
        logs = [scipy.linalg.logm(np.linalg.solve(middle, m)).real for m in linear]
        middle = middle @ scipy.linalg.expm(np.mean(logs, 0))
    mean = torch.eye(d + 1, dtype=torch.float64)
    mean[:d, :d] = torch.from_numpy(middle)
    mean[:d, d] = about[:, :d, d].mean(0)
    whole: Tensor = mean @ torch.linalg.inv(move)
    return whole, mean[:d, d]
