"""What people hand over, checked: ITK images or tensors, masks, devices.

ITK is imported only where an ITK image came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icon_nephi._check import check_dimension, check_labels, check_mask, check_shape
from icon_nephi.io.resampling import reader
from icon_nephi.maps.framed import over_grid
from icon_nephi.space.frames import Array, Geometry

# Of a voxel: what two grids may lie apart and be one; headers hold float32.
_SAME = 1e-3


def is_itk(image: Any) -> bool:
    """Return whether this is an ITK image, asked without importing ITK."""
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
    """Return the device asked for, else the tensor's, else a GPU if there is one.

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


def place_of(
    name: str, image: Any, *, itk: bool, dimension: int, components: bool = False
) -> Geometry:
    """Return where a checked image lies: an ITK image (``itk``) or a tensor.

    Several numbers a voxel are refused in ITK images, unless ``components``.

    Raises:
        TypeError: the other kind of image.
        ValueError: another dimension, or an image that `read_input` would refuse.
    """
    if itk:
        from icon_nephi.io.itk_images import check_itk_image, geometry_of

        check_itk_image(name, image, components=components)
        place = geometry_of(image)
    else:
        place = voxel_geometry(check_tensor(name, image).shape[2:])
    others, advice = "the registered images are", "pass an image of their space"
    check_dimension(name, place.dimension, others, dimension, advice)
    return place


def voxels_of(image: Any) -> Array:
    """Return the values ``[*grid, C]`` of a checked image, in their own type."""
    if is_itk(image):
        from icon_nephi.io.itk_images import array_of

        values = array_of(image)
        several = image.GetNumberOfComponentsPerPixel() > 1
        return values if several else values[..., None]
    return np.asarray(image[0].movedim(0, -1).detach().cpu().numpy())


def voxel_geometry(size: Sequence[int]) -> Geometry:
    """Return the place of a tensor, whose voxels are one long on every axis."""
    unit = Geometry.unit(size)
    return Geometry(unit.size, (1.0,) * len(unit.size), unit.origin, unit.direction)


def check_tensor(name: str, image: Any) -> Tensor:
    """Return the tensor, if it is one image ``[1, C, *grid]`` of any number type.

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
    check_shape(name, image.shape)
    if image.shape[0] != 1 or not image.numel():
        raise ValueError(
            f"{name} must hold one image [1, C, *grid], got {tuple(image.shape)}; "
            "register one pair at a time, a plain [*grid] as image[None, None]"
        )
    return image


def read_input(
    letter: str, image: Any, mask: Any
) -> tuple[Tensor, Tensor | None, Geometry]:
    """Return image ``[1, C, *grid]``, mask ``[1, 1, *grid]`` (0 or 1), float32; place.

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
    if not is_itk(image):
        values = check_tensor(name, image).detach().float()
        if mask is not None:
            mask = check_tensor(mask_name, mask).detach()
            check_mask(mask_name, mask, values.shape[2:])
            mask = (mask > 0).any(1, keepdim=True).float()
        return values, mask, voxel_geometry(values.shape[2:])

    from icon_nephi.io import itk_images

    itk_images.check_itk_image(name, image)
    place = itk_images.geometry_of(image)
    if mask is None:
        return itk_images.tensor_of(image), None, place
    itk_images.check_itk_image(mask_name, mask)
    own, inside = itk_images.geometry_of(mask), itk_images.tensor_of(mask)
    check_dimension(mask_name, own.dimension, f"{name} is", place.dimension)
    check_mask(mask_name, inside, inside.shape[2:])
    if not _same_place(own, place):
        inside = itk_images.tensor_of(itk_images.resample_to(mask, image))
        if not bool((inside > 0).any()):
            raise ValueError(
                f"{mask_name} and {name} do not overlap: no voxel above zero lies in "
                "the image; check that they belong together"
            )
    return itk_images.tensor_of(image), (inside > 0).float(), place


def read_label_map(name: str, labels: Any, place: Geometry, *, itk: bool) -> Tensor:
    """Return a label map at the voxels of a place, ``[1, 1, *grid]`` int64, else 0.

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
        label_at = reader(values, own.physical_to_unit(), "nearest", 0)
        grid = place.size, place.unit_to_physical()
        values = over_grid(label_at, *grid, 1, values.dtype)
    return torch.from_numpy(values[..., 0].astype(np.int64))[None, None]


def check_points(name: str, points: Any, dimension: int) -> Array:
    """Return the points as ``[N, d]`` float64.

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


def _same_place(first: Geometry, second: Geometry) -> bool:
    """Return whether they are equal up to the rounding of file headers, in voxels."""
    if first.size != second.size:
        return False
    apart = first.unit_to_physical() - second.unit_to_physical()
    return bool(apart.abs().max() < _SAME * min(*first.spacing, *second.spacing))
