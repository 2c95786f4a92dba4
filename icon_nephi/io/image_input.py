"""What people hand over, checked: ITK images or tensors, masks, devices.

ITK is imported only where an ITK image came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icon_nephi._check import check_dimension, check_image, check_labels, check_mask
from icon_nephi.io.resampling import reader
from icon_nephi.maps.framed import Array, over_grid
from icon_nephi.space.frames import Geometry


def is_itk(image: Any) -> bool:
    """Whether this is an ITK image, asked without importing ITK."""
    return hasattr(image, "GetLargestPossibleRegion")


def check_kind(name: str, image: Any, other: str, expected: Any) -> None:
    """Raise a TypeError unless both are ITK images, or neither is."""
    if is_itk(image) != is_itk(expected):
        raise TypeError(
            f"{name} is {type(image).__name__} but {other} is "
            f"{type(expected).__name__}; pass the same kind"
        )


def choose_device(
    device: torch.device | str | None, tensor: Tensor | None
) -> torch.device:
    """The device asked for, else the tensor's, else a GPU if there is one.

    Raises:
        ValueError: a device that is not here.
    """
    if device is None:
        if isinstance(tensor, Tensor):
            return tensor.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {str(device)!r} is not available here; try 'cpu'"
        ) from error
    return where


def place_of(name: str, image: Any, *, itk: bool, dimension: int) -> Geometry:
    """Where a checked image lies: an ITK image (``itk``) or a tensor.

    Raises:
        TypeError: the other kind of image.
        ValueError: another dimension, or an image that `read_input` would refuse.
    """
    if itk:
        from icon_nephi.io.itk_images import check_itk_image, geometry_of

        check_itk_image(name, image)
        place = geometry_of(image)
    else:
        place = voxel_geometry(check_tensor(name, image).shape[2:])
    others, advice = "the registered images are", "pass an image of their space"
    check_dimension(name, place.dimension, others, dimension, advice)
    return place


def voxels_of(image: Any) -> Array:
    """The values ``[*grid, C]`` of a checked image, in their own type."""
    if is_itk(image):
        from icon_nephi.io.itk_images import array_of

        return array_of(image)[..., None]
    values: Array = image[0].movedim(0, -1).detach().cpu().numpy()
    return values


def voxel_geometry(size: Sequence[int]) -> Geometry:
    """Tensors have no millimetres: a voxel is one long on every axis."""
    unit = Geometry.unit(size)
    return Geometry(unit.size, (1.0,) * len(unit.size), unit.origin, unit.direction)


def check_tensor(name: str, image: Any) -> Tensor:
    """The tensor, if it is one image ``[1, C, *grid]`` of any number type.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape.
    """
    if not isinstance(image, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor [1, C, *grid] or (then all of them) an ITK "
            f"image, got {type(image).__name__}; read a file with itk.imread, wrap an "
            "array with torch.from_numpy(array)[None, None]"
        )
    if image.is_complex():
        raise TypeError(f"{name} is complex; pass its magnitude, image.abs()")
    check_image(name, image if image.is_floating_point() else image.float())
    if image.shape[0] != 1 or not image.numel():
        raise ValueError(
            f"{name} must hold one image [1, C, *grid], got {tuple(image.shape)}; "
            "register one pair at a time, a plain [*grid] as image[None, None]"
        )
    return image


def read_input(
    letter: str, image: Any, mask: Any
) -> tuple[Tensor, Tensor | None, Geometry]:
    """Image ``[1, C, *grid]`` and mask ``[1, 1, *grid]`` (0 or 1), float32; its place.

    Args:
        letter: A or B, for the errors.
        image: ITK image or tensor ``[1, C, *grid]``.
        mask: of the same kind: an ITK mask on any grid is read at the image's voxels.

    Raises:
        TypeError: another kind of image or mask.
        ValueError: one that cannot be used.
    """
    name, mask_name = f"image_{letter}", f"mask_{letter}"
    if mask is not None:
        check_kind(mask_name, mask, name, image)
    if is_itk(image):
        return _from_itk(name, image, mask_name, mask)
    values = check_tensor(name, image).detach().float()
    if mask is not None:
        mask = check_tensor(mask_name, mask).detach()
        check_mask(mask_name, mask, values.shape[2:])
        mask = (mask > 0).any(1, keepdim=True).float()
    return values, mask, voxel_geometry(values.shape[2:])


def read_label_map(name: str, labels: Any, place: Geometry, *, itk: bool) -> Tensor:
    """A label map at the voxels of a place, ``[1, 1, *grid]`` int64: 0 beyond it.

    Args:
        name: for the errors.
        labels: ITK image (``itk``), on any grid, or tensor ``[1, 1, *grid]`` over the
            same box as its image: whole numbers.
        place: of its image, or of a coarser level of that.
        itk: which kind is expected.

    Raises:
        TypeError: the other kind.
        ValueError: one that is no label map.
    """
    if is_itk(labels) != itk:
        raise TypeError(
            f"{name} is {type(labels).__name__}; pass "
            + ("an ITK label map" if itk else "a tensor [1, 1, *grid], as its image is")
        )
    own = place_of(name, labels, itk=itk, dimension=place.dimension)
    values = voxels_of(labels)
    if values.shape[-1] != 1:
        raise ValueError(f"{name} has {values.shape[-1]} channels, expected one")
    values = check_labels(name, values, least=0)
    if not _same_place(own, place):
        read = reader(values, own.physical_to_unit(), "nearest", 0)
        values = over_grid(read, place.size, place.unit_to_physical(), 1, values.dtype)
    return torch.from_numpy(values[..., 0].astype(np.int64))[None, None]


def check_points(name: str, points: Any, dimension: int) -> Array:
    """The points as ``[N, d]`` float64.

    Raises:
        ValueError: another shape, or numbers that are not finite.
    """
    rows = np.asarray(points.detach().cpu() if isinstance(points, Tensor) else points)
    if rows.ndim != 2 or rows.shape[1] != dimension:
        raise ValueError(
            f"{name} must be [N, {dimension}], a row for each point, got shape "
            f"{rows.shape}"
        )
    if not np.isfinite(rows.astype(np.float64)).all():
        raise ValueError(f"{name} must be finite; leave out those that are not")
    return rows.astype(np.float64)


def _from_itk(
    name: str, image: Any, mask_name: str, mask: Any
) -> tuple[Tensor, Tensor | None, Geometry]:
    from icon_nephi.io import itk_images

    itk_images.check_itk_image(name, image)
    geometry, inside = itk_images.geometry_of(image), None
    if mask is not None:
        itk_images.check_itk_image(mask_name, mask)
        check_dimension(
            mask_name, mask.GetImageDimension(), f"{name} is", geometry.dimension
        )
        own = itk_images.tensor_of(mask)
        check_mask(mask_name, own, own.shape[2:])
        if not _same_place(itk_images.geometry_of(mask), geometry):
            own = itk_images.tensor_of(itk_images.resample_to(mask, image))
            if not bool((own > 0).any()):
                raise ValueError(
                    f"{mask_name} and {name} do not overlap: no voxel above zero lies "
                    "in the image; check that they belong together"
                )
        inside = (own > 0).float()
    return itk_images.tensor_of(image), inside, geometry


def _same_place(first: Geometry, second: Geometry) -> bool:
    """Equal up to the rounding of file headers."""
    return first.size == second.size and np.allclose(
        first.unit_to_physical(), second.unit_to_physical(), rtol=0, atol=1e-4
    )
