"""One pair worked on by several processes: each evaluates the maps at its points.

Every process (torchrun, `torch.distributed`) draws the same samples and holds the same
images and weights. A map is evaluated at a share of the points in each, and all get
all results: any similarity and regularity see what they see in one process. What is
left of the work, reading the images at the points, is done by each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from icon_registration import RegistrationModule
from torch import Tensor, nn

from icon_nephi.transforms import Composed, Map, value_and_jacobian


class SplitPair(RegistrationModule):
    """A pair network whose maps are evaluated by all processes together.

    ``GradientICONPoints(SplitPair(network), ...)`` then has the loss and the gradients
    of one process with the same samples, up to the rounding of sums. Give all
    processes the same images, weights and ``generator`` seed, and no limit of time:
    they have to make the same steps.

    Args:
        net: returns (phi_AB, phi_BA).

    Raises:
        ValueError: the processes have not been joined.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "SplitPair: the processes are not joined; start them with torchrun and "
                "call torch.distributed.init_process_group first"
            )
        self.net = net
        for weight in net.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(_average)

    def forward(self, image_A: Tensor, image_B: Tensor) -> tuple[Map, Map]:
        """(phi_AB, phi_BA), ICON frame; to be called by all processes."""
        phi_AB, phi_BA = self.net(image_A, image_B)
        return SplitMap(phi_AB), SplitMap(phi_BA)


class SplitMap(Composed):
    """A map that every process evaluates at its share of the points."""

    def __init__(self, phi: Map) -> None:
        self.phi = phi

    def __call__(self, coordinates: Tensor) -> Tensor:
        """The map at ICON-frame coordinates ``[B, d, *any]``, the same in all."""
        (moved,) = self._shared(lambda x: (self.phi(x),), coordinates)
        return moved

    def value_and_jacobian(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Both; see `icon_nephi.transforms.value_and_jacobian`."""
        moved, jacobian = self._shared(
            lambda x: value_and_jacobian(self.phi, x), coordinates
        )
        return moved, jacobian

    def _shared(
        self, work: Callable[[Tensor], tuple[Tensor, ...]], coordinates: Tensor
    ) -> list[Tensor]:
        d, shape = coordinates.shape[1], coordinates.shape[2:]
        points = coordinates.flatten(2)
        count, world = points.shape[2], dist.get_world_size()
        # Equal shares: the last point fills up those that are short.
        share = -(-count // world)
        fill = points[..., -1:].expand(-1, -1, share * world - count)
        mine = _own_share(torch.cat([points, fill], 2))
        results = work(mine[(..., *[None] * (d - 1))])
        found = [_of_all(r.flatten(-d).contiguous()) for r in results]
        return [r[..., :count].unflatten(-1, shape) for r in found]


class _OwnShare(torch.autograd.Function):
    """This process's part of the last axis; its gradients come from all processes."""

    @staticmethod
    def forward(ctx: Any, points: Tensor) -> Tensor:
        return _part(points)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _gathered(grad) / dist.get_world_size()


class _OfAll(torch.autograd.Function):
    """The parts of all processes along the last axis.

    Between `_OwnShare` and here gradients are those of this part times the number of
    processes, for the mean over processes is what a weight gets: so it is right too
    for what all of them compute alike, such as the prior.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return _gathered(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _part(grad) * dist.get_world_size()


def _part(values: Tensor) -> Tensor:
    parts = values.chunk(dist.get_world_size(), -1)
    return parts[dist.get_rank()].contiguous()


def _gathered(part: Tensor) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, -1)


def _average(weight: Tensor) -> None:
    dist.all_reduce(weight.grad)
    cast(Tensor, weight.grad).div_(dist.get_world_size())


_own_share = cast(Callable[[Tensor], Tensor], _OwnShare.apply)
_of_all = cast(Callable[[Tensor], Tensor], _OfAll.apply)
