"""ITK images: checked, as arrays and back, on another grid."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import itk
import numpy as np
import torch
from torch import Tensor

from icon_nephi._check import check_labels
from icon_nephi.io.itk_modules import image_io, itk_class
from icon_nephi.space.frames import Array, Geometry, other_order

#: Whole numbers that float64 holds.
EXACT = 2**53


def check_itk_image(name: str, image: Any, *, components: bool = False) -> None:
    """Raise unless it is a 2D or 3D image with an extent on every axis.

    And with one number a voxel, unless several ``components`` are welcome.

    Raises:
        TypeError: not an ITK image.
        ValueError: 4D, vectors or colours, one voxel on an axis, or a spacing, origin
            or direction that places no voxel.
    """
    if not isinstance(image, itk.ImageBase[2] | itk.ImageBase[3] | itk.ImageBase[4]):
        raise TypeError(f"{name} must be an itk.Image, got {type(image).__name__}")
    d = image.GetImageDimension()
    if d not in (2, 3):
        raise ValueError(
            f"{name} is {d}D, expected one 2D or 3D image; take one frame of a series"
        )
    if image.GetNumberOfComponentsPerPixel() != 1 and not components:
        raise ValueError(
            f"{name} has {image.GetNumberOfComponentsPerPixel()} numbers per voxel, "
            "expected one; take one component, or convert colours to grey"
        )
    size = tuple(image.GetLargestPossibleRegion().GetSize())
    if min(size) < 2:
        raise ValueError(
            f"{name} has size {size}: an axis with one voxel has no extent; drop that "
            "axis and register in 2D"
        )
    spacing, origin = tuple(image.GetSpacing()), tuple(image.GetOrigin())
    direction = itk.array_from_matrix(image.GetDirection())
    if not all(0 < s < np.inf for s in spacing):
        raise ValueError(f"{name} has spacing {spacing}; it must be positive, set it")
    finite = np.isfinite([*origin, *direction.ravel()]).all()
    if not (finite and abs(np.linalg.det(direction)) > 1e-6):
        raise ValueError(
            f"{name} has origin {origin} and direction {direction.tolist()}, which "
            "place no voxel; correct its header"
        )


def geometry_of(image: Any) -> Geometry:
    """Return where a 2D or 3D ITK image lies."""
    region = image.GetLargestPossibleRegion()
    # Of the first voxel there is: after cropping its index need not be zero.
    origin = image.TransformIndexToPhysicalPoint(region.GetIndex())
    direction = itk.array_from_matrix(image.GetDirection())
    return Geometry(
        size=other_order(int(n) for n in region.GetSize()),
        spacing=tuple(float(s) for s in image.GetSpacing()),
        origin=tuple(float(x) for x in origin),
        direction=tuple(map(tuple, direction.tolist())),
    )


def array_of(image: Any) -> Array:
    """Return a copy of the voxels ``[*grid]``, tensor order, their own pixel type."""
    values: Array = itk.array_from_image(image)
    return values


def tensor_of(image: Any) -> Tensor:
    """Return the voxels as ``[1, 1, *grid]`` float32."""
    return torch.from_numpy(array_of(image).astype(np.float32))[None, None]


def image_of(array: Array, geometry: Geometry) -> Any:
    """Return an ITK image of ``[*grid]``, or of ``[*grid, c]`` (float32), placed.

    ITK's Python has no images of int8 and int64; their numbers are kept, in a type that
    holds them. Three or four uint8 a voxel are colours, and stay uint8.

    Raises:
        ValueError: whole numbers that no type of ITK's Python holds.
    """
    d = geometry.dimension
    if array.ndim == d:
        image = itk.image_from_array(np.ascontiguousarray(_in_known_type(array)))
    elif array.dtype == np.uint8 and array.shape[-1] in (3, 4):
        pixel = (itk.RGBPixel, itk.RGBAPixel)[array.shape[-1] - 3]
        colours = itk.Image[pixel[itk.UC], d]
        image = itk.image_from_array(np.ascontiguousarray(array), ttype=(colours,))
    else:
        values = np.ascontiguousarray(array, dtype=np.float32)
        kind: dict[str, Any] = {"is_vector": True}
        if values.shape[-1] == d:  # what readers of displacements expect
            kind = {"ttype": (itk.Image[itk.Vector[itk.F, d], d],)}
        image = itk.image_from_array(values, **kind)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(itk.matrix_from_array(np.array(geometry.direction)))
    return image


def _in_known_type(array: Array) -> Array:
    """Return the same numbers in a type that ITK's Python has images of."""
    name = array.dtype.name
    if name in ("bool", "int8", "float16"):
        kind = {"bool": np.uint8, "int8": np.int16, "float16": np.float32}[name]
        return array.astype(kind)
    if name not in ("int64", "uint64"):
        return array
    least, most = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for known in (np.int32, np.uint32):
        if np.iinfo(known).min <= least and most <= np.iinfo(known).max:
            return array.astype(known)
    if least >= -EXACT and most <= EXACT:
        return array.astype(np.float64)
    raise ValueError(
        f"whole numbers from {least} to {most} are in no type of ITK's Python; give "
        "the labels numbers below 2^53"
    )


def check_label_map(name: str, image: Any) -> Any:
    """Return the image, in an integer type if its whole numbers were floats.

    Raises:
        TypeError, ValueError: see `check_itk_image` and `check_labels`.
    """
    check_itk_image(name, image)
    values = array_of(image)
    labels = check_labels(name, values)
    return image if labels is values else image_of(labels, geometry_of(image))


def read_header(path: Path) -> Any:
    """Return ITK's reader of an image file, which has read its header."""
    header = image_io(path)
    if header is None or not header.CanReadFile(str(path)):
        mode = itk.CommonEnums.IOFileMode_ReadMode
        header = itk.ImageIOFactory.CreateImageIO(str(path), mode)
    header.SetFileName(str(path))
    header.ReadImageInformation()
    return header


@contextmanager
def no_stderr() -> Iterator[None]:
    """Silence ITK's readers, which complain on stderr; the error says enough."""
    saved = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def resample_to(image: Any, reference: Any) -> Any:
    """Return a mask or label map on another image's grid, nearest, 0 outside."""
    return resample(image, reference, None, "nearest")


def resample(
    image: Any, reference: Any, transform: Any, mode: str, outside: float = 0
) -> Any:
    """Return an image through an ITK transform on a reference grid, by ITK.

    Args:
        image: of the space that the transform maps to.
        reference: its grid is the result's.
        transform: reference points -> image points, None for the identity.
        mode: ``"linear"`` (float32 comes out) or ``"nearest"`` (the pixel type stays).
        outside: the value where there is no image.

    Raises:
        ValueError: image, reference and transform of different dimensions.
    """
    d, *others = image.GetImageDimension(), reference.GetImageDimension()
    if transform is not None:
        others.append(transform.GetInputSpaceDimension())
    if set(others) != {d}:
        raise ValueError(
            f"the image is {d}D but the reference or the transform is not; pass those "
            "of the same registration"
        )
    # ITK's Python interpolates few pixel types; these two hold all the others.
    linear = mode == "linear"
    kind = np.float32 if linear else np.float64
    letter, way = ("F", "Linear") if linear else ("D", "NearestNeighbor")
    values = array_of(image)
    moving = image_of(values.astype(kind), geometry_of(image))
    resampled = itk_class("ResampleImageFilter", f"I{letter}{d}I{letter}{d}").New()
    resampled.SetInput(moving)
    interpolate = itk_class(f"{way}InterpolateImageFunction", f"I{letter}{d}D")
    resampled.SetInterpolator(interpolate.New())
    resampled.UseReferenceImageOn()
    resampled.SetReferenceImage(reference)
    resampled.SetDefaultPixelValue(float(outside))
    if transform is not None:
        resampled.SetTransform(transform)
    resampled.Update()
    result = resampled.GetOutput()
    if mode == "linear":
        return result
    return image_of(array_of(result).astype(values.dtype), geometry_of(result))
