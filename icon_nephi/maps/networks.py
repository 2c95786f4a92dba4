"""Networks that return maps, for ICON and its losses; what such maps are made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from icon_registration import RegistrationModule
from torch import Tensor, nn

from icon_nephi.maps.transforms import (
    Composition,
    Map,
    MatrixTransform,
    NeuralTransform,
)

_Pair = tuple[Composition, Composition]


def neural_parts(maps: Sequence[Map]) -> list[NeuralTransform]:
    """The neural transforms that maps are made of, each once, in their order.

    Maps show what they close over in ``__closure__``, ours as ICON's functions do.
    """
    parts: list[NeuralTransform] = []
    seen: set[int] = set()
    waiting: list[Any] = list(reversed(maps))
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, NeuralTransform):
            parts.append(item)
            continue
        cells = getattr(item, "__closure__", None) or ()
        inner = [cell.cell_contents for cell in cells]
        waiting += reversed([*item] if isinstance(item, list | tuple) else inner)
    return parts


class FunctionFromNeuralField(RegistrationModule):
    """A neural field where ICON's ``FunctionFromVectorField`` goes.

    ``forward(image_A, image_B)`` returns phi_AB. ICON's losses call it twice with the
    images swapped, which is right when ``net`` is an encoder that sees the images;
    with a learned code use `NePhi`, whose two directions have a field each.

    Those losses evaluate every voxel, ten times a step in 3D: 1.3 kB a voxel, 40 s at
    64^3 on one core. Use `GradientICONPoints` (0.6 s): see
    `evaluation.speed.bench_dense_losses`.

    Args:
        net: ``net(image_A, image_B)`` -> `LatentCode`.
        field: see `icon_nephi.fields`.
        chunk_size: see `NeuralTransform`.
    """

    def __init__(
        self, net: nn.Module, field: nn.Module, chunk_size: int | None = None
    ) -> None:
        super().__init__()
        self.net, self.field, self.chunk_size = net, field, chunk_size

    def forward(self, image_A: Tensor, image_B: Tensor) -> NeuralTransform:
        """phi_AB, fixed-space to moving-space coordinates, ICON frame."""
        code = self.net(image_A, image_B)
        return NeuralTransform(self.field, code, chunk_size=self.chunk_size)


class NePhi(RegistrationModule):
    """The paper's model: one code, two fields, ``forward`` -> (phi_AB, phi_BA).

    Args:
        net: ``net(image_A, image_B)`` -> `LatentCode`.
        field_AB: field of the forward map.
        field_BA: field of the backward map.
        chunk_size: see `NeuralTransform`.
    """

    def __init__(
        self,
        net: nn.Module,
        field_AB: nn.Module,
        field_BA: nn.Module,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.net, self.field_AB, self.field_BA = net, field_AB, field_BA
        self.chunk_size = chunk_size

    def forward(
        self, image_A: Tensor, image_B: Tensor
    ) -> tuple[NeuralTransform, NeuralTransform]:
        """(phi_AB, phi_BA) from one code, ICON frame."""
        code = self.net(image_A, image_B)
        make = partial(NeuralTransform, code=code, chunk_size=self.chunk_size)
        phi_AB, phi_BA = make(self.field_AB), make(self.field_BA)
        phi_BA.code = phi_AB.code  # where they own it, too, it is one
        return phi_AB, phi_BA


class TwoStepPair(RegistrationModule):
    """ICON's TwoStepRegistration for networks that return (phi_AB, phi_BA).

    The second network sees A warped by the first, so phi_AB = phi_AB o psi_AB and
    phi_BA = psi_BA o phi_BA: each is the other's counterpart.

    Args:
        netPhi: first network, returns a pair.
        netPsi: second network, returns a pair.
    """

    def __init__(self, netPhi: nn.Module, netPsi: nn.Module) -> None:
        super().__init__()
        self.netPhi, self.netPsi = netPhi, netPsi

    def forward(self, image_A: Tensor, image_B: Tensor) -> _Pair:
        """(phi_AB, phi_BA), ICON frame."""
        self.identity_map.isIdentity = True
        phi_AB, phi_BA = self.netPhi(image_A, image_B)
        warped = self.as_function(image_A)(phi_AB(self.identity_map))
        psi_AB, psi_BA = self.netPsi(warped, image_B)
        return Composition(phi_AB, psi_AB), Composition(psi_BA, phi_BA)


class AffinePair(RegistrationModule):
    """A pair network behind a known affine map: T o psi_AB and psi_BA o T^-1.

    The images may have different grids: T takes the fixed image's unit box to the
    moving image's, and the network's maps live in the fixed image's.

    Args:
        net: returns (psi_AB, psi_BA); it is handed the images as they are.
        matrix: T, homogeneous ``[d + 1, d + 1]``, fixed unit box -> moving unit box.
    """

    matrix: Tensor
    inverse: Tensor

    def __init__(self, net: nn.Module, matrix: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("matrix", matrix[None].clone())
        self.register_buffer("inverse", torch.linalg.inv(matrix)[None])

    def forward(self, image_A: Tensor, image_B: Tensor) -> _Pair:
        """(phi_AB, phi_BA); each in its own image's ICON frame."""
        psi_AB, psi_BA = self.net(image_A, image_B)
        there, back = MatrixTransform(self.matrix), MatrixTransform(self.inverse)
        return Composition(there, psi_AB), Composition(psi_BA, back)


class FirstTransform(RegistrationModule):
    """phi_AB of a network that returns (phi_AB, phi_BA), for ICON's wrappers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image_A: Tensor, image_B: Tensor) -> Map:
        """The first of the pair."""
        return cast(Map, self.net(image_A, image_B)[0])
