"""Functions of plain float32 tensors on the compiled core; they know no other room.

Each has its reference in torch: `affine.search`, `features.with_features`,
`maps.jacobians.determinants`, torch's Adam.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from icon_nephi.core import loading, threads


def suit(*images: Tensor) -> bool:
    """Whether the core reads images ``[1, C, *grid]``: float32, in this memory.

    Neither derived nor traced: what comes of them has no graph to them.
    """
    return loading.library() is not None and all(
        type(image) is Tensor
        and image.dtype == torch.float32
        and image.device.type == "cpu"
        and image.layout == torch.strided
        and image.dim() in (4, 5)
        and len(image) == 1
        and image.shape[1] > 0
        and min(image.shape[2:]) > 1
        and not image.requires_grad
        for image in images
    )


def pointers(tensors: Sequence[Tensor]) -> Any:
    """An array of the addresses of tensors, which must outlive it."""
    return (ctypes.c_void_p * max(1, len(tensors)))(*[t.data_ptr() for t in tensors])


def address(tensor: Tensor | None) -> int | None:
    """Where a contiguous tensor's numbers begin."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def rate(matrices: Tensor, points: Tensor, target: Tensor, image: Tensor) -> Tensor:
    """``[K]``: agreement of an image with values at points under affine maps.

    Correlation over the points inside, the mean over channels, times the root of the
    share that is inside.

    Args:
        matrices: ``[K, d, d + 1]``, from the frame of the points to the unit box.
        points: ``[N, d]``, N at least 1; centred, so that float32 places them well.
        target: ``[C, N]``.
        image: ``[1, C, *grid]``.
    """
    matrices, points, target, planes = (
        t.float().contiguous() for t in (matrices, points, target, image[0])
    )
    scores = torch.empty(len(matrices))
    d = points.shape[1]
    loading.call(
        "nephi_rate",
        d,
        len(target),
        len(points),
        len(matrices),
        *map(address, (matrices, points, target, planes)),
        (ctypes.c_int64 * d)(*planes.shape[1:]),
        threads.count(),
        address(scores),
    )
    return scores


def determine(jacobians: Tensor) -> bool:
    """Whether the core takes the determinants of such a tensor's matrices."""
    return (
        loading.library() is not None
        and type(jacobians) is Tensor
        and jacobians.dtype == torch.float32
        and jacobians.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(jacobians)
    )


def determinants(jacobians: Tensor) -> Tensor:
    """``[N]`` of float32 matrices ``[N, d, d]``."""
    jacobians = jacobians.contiguous()
    found = jacobians.new_empty(len(jacobians))
    loading.call(
        "nephi_determinants",
        jacobians.shape[-1],
        len(jacobians),
        address(jacobians),
        address(found),
    )
    return found


def adam(
    number: int,
    rate: float,
    betas: tuple[float, float],
    decay: float,
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    before: Tensor,
) -> float:
    """Step ``number`` (from 1) of Adam; the sum of the new weights' squares.

    Args:
        number: of the step.
        rate: learning rate.
        betas: of Adam.
        decay: a prior's weight; it adds decay times the sum of squares to the loss.
        weight: changed.
        gradient: cleared.
        mean: Adam's own, changed.
        square: Adam's own, changed.
        before: takes the weight as it was.
    """
    squares = ctypes.c_double()
    loading.call(
        "nephi_adam",
        weight.numel(),
        number,
        rate,
        *betas,
        decay,
        threads.count(),
        *map(address, (weight, gradient, mean, square, before)),
        ctypes.byref(squares),
    )
    return squares.value


def with_features(image: Tensor) -> Tensor:
    """`icon_nephi.features.with_features` of a float32 image ``[1, C, *grid]``."""
    d, channels = image.dim() - 2, image.shape[1]
    count = 2 * d * (d - 1)
    layout = torch.channels_last if d == 2 else torch.channels_last_3d
    shape = 1, channels + count, *image.shape[2:]
    out = torch.empty(shape, dtype=torch.float32, memory_format=layout)
    planes = image[0].contiguous()
    loading.call(
        "nephi_features",
        d,
        channels,
        (ctypes.c_int64 * d)(*image.shape[2:]),
        address(planes),
        threads.count(),
        out.data_ptr(),
    )
    return out


def pack(features: Tensor, to: Tensor) -> None:
    """Features ``[F, *grid]`` between 0 and 1 in 16 bits to ``[*grid, stored]``."""
    rows = features.movedim(0, -1).flatten(0, -2)  # a view of most layouts
    if min(rows.stride()) < 0:
        rows = rows.contiguous()
    loading.call(
        "nephi_pack",
        *rows.shape,
        *rows.stride(),
        rows.data_ptr(),
        to.shape[-1],
        address(to),
    )
