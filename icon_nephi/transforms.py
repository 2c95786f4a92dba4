"""Code + field -> phi, a callable in ICON's frame; networks that return such maps.

A map is any callable ``coordinates [B, d, *any] -> [B, d, *any]`` in the unit box,
as ICON's. Ours also know their Jacobian: ``.jacobian(coordinates)`` is
``[B, d, d, *any]``, entry (i, j) the derivative of component i by coordinate j.
`value_and_jacobian` finds both for any map, ours and ICON's.

Ownership: a map made with gradients on shares the live weights; one made with
gradients off owns a copy, so later training (or ICON's restoring of the weights after
fine-tuning) does not change it, and it can be called outside ``no_grad``.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable

import torch
from icon_registration import RegistrationModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from icon_nephi._check import check_coordinates
from icon_nephi.codes import LatentCode
from icon_nephi.coordinates import from_rows, to_rows
from icon_nephi.fields import Field, displacement_and_jacobian

Map = Callable[[Tensor], Tensor]
CHUNK_SIZE = 2**14
# What ICON's TwoStepRegistration returns.
_TWO_STEPS = "TwoStepRegistration.forward.<locals>.<lambda>"


class NeuralTransform:
    """phi(x) = x + u(x, z(x)), callable on ICON-frame coordinates ``[B, d, *any]``.

    Coordinates of batch 1 are evaluated for every item of the code's batch. Outside
    the unit box the field sees the nearest border point, so the displacement there is
    that of the border. More than ``chunk_size`` points are evaluated in chunks, which
    are recomputed in the backward pass, so memory does not follow their number.

    Args:
        field: see `icon_nephi.fields`.
        code: what the field reads.
        chunk_size: points evaluated at once.
        owned: take a copy of the weights (default: when gradients are off).
    """

    def __init__(
        self,
        field: Field,
        code: LatentCode,
        *,
        chunk_size: int = CHUNK_SIZE,
        owned: bool | None = None,
    ) -> None:
        if owned is None:
            owned = not torch.is_grad_enabled()
        if owned:
            code = code.detached()
            if isinstance(field, nn.Module):
                field = copy.deepcopy(field).requires_grad_(False)
        self.field, self.code, self.chunk_size = field, code, chunk_size

    @property
    def __closure__(self) -> tuple[types.CellType, ...]:
        """What the map closes over: ICON's tools walk the closures of maps."""
        return (types.CellType((self.field, self.code)),)

    def __call__(self, coordinates: Tensor) -> Tensor:
        """phi of ICON-frame coordinates ``[B, d, *any]``."""
        coordinates = self._expand(coordinates)
        (moved,) = self._in_chunks(self._displace, coordinates)
        return coordinates + from_rows(moved, coordinates).to(coordinates.dtype)

    def jacobian(self, coordinates: Tensor) -> Tensor:
        """Exact derivatives ``[B, d, d, *any]``; see `value_and_jacobian`."""
        return self.value_and_jacobian(coordinates)[1]

    def value_and_jacobian(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """phi and its Jacobian at ICON-frame coordinates, in one forward pass."""
        coordinates = self._expand(coordinates)
        dimension = coordinates.shape[1]
        moved, slopes = self._in_chunks(self._displace_and_derive, coordinates)
        identity = torch.eye(dimension, dtype=slopes.dtype, device=slopes.device)
        jacobian = from_rows((slopes + identity).flatten(2), coordinates)
        jacobian = jacobian.unflatten(1, (dimension, dimension))
        values = coordinates + from_rows(moved, coordinates).to(coordinates.dtype)
        return values, jacobian.to(coordinates.dtype)

    def _expand(self, coordinates: Tensor) -> Tensor:
        """Batch 1 takes the code's batch, which may be 0."""
        dimension = (
            self.code.local_codes[0].dim() - 2
            if self.code.local_codes
            else coordinates.shape[1]
        )
        check_coordinates("coordinates", coordinates, dimension)
        batch = self.code.batch
        if coordinates.shape[0] == 1:
            return coordinates.expand(batch, *coordinates.shape[1:])
        if batch not in (1, coordinates.shape[0]):
            raise ValueError(
                f"coordinates have batch {coordinates.shape[0]} but the code describes "
                f"{batch} pairs; give coordinates of batch 1 or {batch}"
            )
        return coordinates

    def _in_chunks(
        self, evaluate: Callable[[Tensor], tuple[Tensor, ...]], coordinates: Tensor
    ) -> tuple[Tensor, ...]:
        """Evaluate rows, at most ``chunk_size`` points at once, in the code's dtype."""
        rows = to_rows(coordinates).to(self.code.global_code.dtype)
        with torch.autocast(coordinates.device.type, enabled=False):
            size = max(1, self.chunk_size // max(1, rows.shape[0]))
            if rows.shape[1] <= size:
                return evaluate(rows)
            chunks = rows.split(size, dim=1)
            if torch.is_grad_enabled():
                parts = [checkpoint(evaluate, c, use_reentrant=False) for c in chunks]
            else:
                parts = [evaluate(c) for c in chunks]
        return tuple(torch.cat(p, dim=1) for p in zip(*parts, strict=True))

    def _displace(self, rows: Tensor) -> tuple[Tensor, ...]:
        rows = rows.clamp(0, 1)
        return (self.field(rows, self.code.at(rows)[0]),)

    def _displace_and_derive(self, rows: Tensor) -> tuple[Tensor, ...]:
        inside = ((rows >= 0) & (rows <= 1)).to(rows.dtype)
        # The derivatives of the clamped point; read_grid knows its own border.
        values = self.code.at(rows, gradient=True)
        moved, slopes = displacement_and_jacobian(self.field, rows.clamp(0, 1), values)
        return moved, slopes * inside[:, :, None, :]


class MatrixTransform:
    """An affine map of the unit box: homogeneous ``[B or 1, d + 1, d + 1]``."""

    def __init__(self, matrix: Tensor) -> None:
        owned = not torch.is_grad_enabled()
        self.matrix = matrix.detach().clone() if owned else matrix

    @property
    def __closure__(self) -> tuple[types.CellType, ...]:
        """As `NeuralTransform`."""
        return (types.CellType(self.matrix),)

    def __call__(self, coordinates: Tensor) -> Tensor:
        """The map of ICON-frame coordinates ``[B, d, *any]``."""
        d = coordinates.shape[1]
        matrix = self.matrix.to(coordinates)
        rows = to_rows(coordinates) @ matrix[:, :d, :d].mT + matrix[:, None, :d, d]
        return from_rows(rows, coordinates)

    def jacobian(self, coordinates: Tensor) -> Tensor:
        """The matrix's linear part at every point, ``[B, d, d, *any]``."""
        d, ones = coordinates.shape[1], (1,) * (coordinates.dim() - 2)
        linear = self.matrix[:, :d, :d].to(coordinates)
        batch = coordinates.shape[0] if len(linear) == 1 else len(linear)
        return linear.reshape(len(linear), d, d, *ones).expand(
            batch, d, d, *coordinates.shape[2:]
        )

    def value_and_jacobian(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Both; see `value_and_jacobian`."""
        return self(coordinates), self.jacobian(coordinates)


class Composition:
    """phi o psi: psi first, then phi; Jacobians by the chain rule."""

    def __init__(self, phi: Map, psi: Map) -> None:
        self.phi, self.psi = phi, psi

    @property
    def __closure__(self) -> tuple[types.CellType, ...]:
        """As `NeuralTransform`."""
        return (types.CellType(self.phi), types.CellType(self.psi))

    def __call__(self, coordinates: Tensor) -> Tensor:
        """phi(psi(coordinates)), ICON frame."""
        return self.phi(self.psi(coordinates))

    def jacobian(self, coordinates: Tensor) -> Tensor:
        """Derivatives ``[B, d, d, *any]`` of the composition."""
        return self.value_and_jacobian(coordinates)[1]

    def value_and_jacobian(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Both; see `value_and_jacobian`."""
        between, inner = value_and_jacobian(self.psi, coordinates)
        values, outer = value_and_jacobian(self.phi, between)
        return values, torch.einsum("bij...,bjk...->bik...", outer, inner)


def value_and_jacobian(phi: Map, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """phi and its exact Jacobian ``[B, d, d, *any]`` at ICON-frame coordinates.

    Ours carry both forward. ICON's TwoStepRegistration closes over its two maps by
    name, so its Jacobian is their chain rule. Any other pointwise map (ICON's voxel
    fields and matrices among them) is derived by autograd, one pass per component;
    differentiable where gradients are on.
    """
    known = getattr(phi, "value_and_jacobian", None)
    if known is not None:
        result: tuple[Tensor, Tensor] = known(coordinates)
        return result
    if getattr(phi, "__qualname__", "") == _TWO_STEPS:
        cells = getattr(phi, "__closure__", ())
        outer, inner = (cell.cell_contents for cell in cells)
        return Composition(outer, inner).value_and_jacobian(coordinates)
    live = torch.is_grad_enabled()
    with torch.enable_grad():
        x = coordinates
        if x.shape[0] == 1:
            x = x.expand(phi(x[..., :1]).shape[0], *x.shape[1:])
        if not (live and x.requires_grad):
            x = x.detach().requires_grad_()
        values = phi(x)
        rows = [
            torch.autograd.grad(
                values[:, i].sum(), x, create_graph=live, retain_graph=True
            )[0]
            for i in range(x.shape[1])
        ]
    jacobian = torch.stack(rows, dim=1)
    return (values, jacobian) if live else (values.detach(), jacobian.detach())


class FunctionFromNeuralField(RegistrationModule):
    """A neural field where ICON's ``FunctionFromVectorField`` goes.

    ``forward(image_A, image_B)`` returns phi_AB. ICON's losses call it twice with the
    images swapped, which is right when ``net`` is an encoder that sees the images;
    with a learned code use `NePhi`, whose two directions have a field each.

    Args:
        net: ``net(image_A, image_B)`` -> `LatentCode`.
        field: see `icon_nephi.fields`.
        chunk_size: see `NeuralTransform`.
    """

    def __init__(
        self, net: nn.Module, field: nn.Module, chunk_size: int = CHUNK_SIZE
    ) -> None:
        super().__init__()
        self.net, self.field, self.chunk_size = net, field, chunk_size

    def forward(self, image_A: Tensor, image_B: Tensor) -> NeuralTransform:
        """phi_AB, fixed-space to moving-space coordinates, ICON frame."""
        code = self.net(image_A, image_B)
        self.code = code
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
        chunk_size: int = CHUNK_SIZE,
    ) -> None:
        super().__init__()
        self.net, self.field_AB, self.field_BA = net, field_AB, field_BA
        self.chunk_size = chunk_size

    def forward(
        self, image_A: Tensor, image_B: Tensor
    ) -> tuple[NeuralTransform, NeuralTransform]:
        """(phi_AB, phi_BA) from one code, ICON frame."""
        code = self.net(image_A, image_B)
        self.code = code
        return (
            NeuralTransform(self.field_AB, code, chunk_size=self.chunk_size),
            NeuralTransform(self.field_BA, code, chunk_size=self.chunk_size),
        )


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

    def forward(
        self, image_A: Tensor, image_B: Tensor
    ) -> tuple[Composition, Composition]:
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

    def forward(
        self, image_A: Tensor, image_B: Tensor
    ) -> tuple[Composition, Composition]:
        """(phi_AB, phi_BA); each in its own image's ICON frame."""
        psi_AB, psi_BA = self.net(image_A, image_B)
        return (
            Composition(MatrixTransform(self.matrix), psi_AB),
            Composition(psi_BA, MatrixTransform(self.inverse)),
        )


class FirstTransform(RegistrationModule):
    """phi_AB of a network that returns (phi_AB, phi_BA), for ICON's wrappers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image_A: Tensor, image_B: Tensor) -> Map:
        """The first of the pair."""
        first: Map = self.net(image_A, image_B)[0]
        return first
