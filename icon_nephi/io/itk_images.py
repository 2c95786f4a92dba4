"""ITK images: checked, read and written, as arrays and back, on another grid."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import itk
import numpy as np
import torch
from torch import Tensor

from icon_nephi._check import check_labels
from icon_nephi._memory import machine_memory
from icon_nephi.io.itk_modules import itk_class
from icon_nephi.space.frames import Array, Geometry, other_order

_HEADER = 348  # bytes of the smallest NIfTI header


def check_itk_image(name: str, image: Any) -> None:
    """Raise unless it is a scalar 2D or 3D image with an extent on every axis.

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
    if image.GetNumberOfComponentsPerPixel() != 1:
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
    """Return an ITK image of ``[*grid]``, or of ``[*grid, c]`` (float32), placed."""
    d = geometry.dimension
    if array.ndim == d:
        kinds = {"bool": np.uint8, "float16": np.float32}
        values = array.astype(kinds.get(array.dtype.name, array.dtype))
        image = itk.image_from_array(np.ascontiguousarray(values))
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


def check_label_map(name: str, image: Any) -> Any:
    """Return the image, in an integer type if its whole numbers were floats.

    Raises:
        TypeError, ValueError: see `check_itk_image` and `check_labels`.
    """
    check_itk_image(name, image)
    values = array_of(image)
    labels = check_labels(name, values)
    return image if labels is values else image_of(labels, geometry_of(image))


def read_image(
    name: str, path: str | os.PathLike[str], *, as_float: bool = False
) -> Any:
    """Return a scalar 2D or 3D image from a file.

    Args:
        name: of the argument, for errors.
        path: of the file.
        as_float: voxels as float32, and colours of a 2D image as grey; else as they
            are stored.

    Raises:
        ValueError: missing, unreadable or truncated file, or one that
            `check_itk_image` refuses; the sentence names the argument and the path.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ValueError(f"{name}: {path} {what}")
    try:
        with no_stderr():
            header = read_header(path)
            least = int(header.GetImageSizeInBytes())
            whole = least <= machine_memory() and _is_whole(path, least)
            parts = header.GetNumberOfComponents()
            if parts > 1 and not (header.GetNumberOfDimensions() == 2 < parts < 5):
                as_float = False  # of vectors ITK would read nonsense
            kind = itk.F if as_float else None
            image = itk.imread(str(path), kind) if whole else None
    except Exception as error:  # ITK raises RuntimeError, AttributeError, KeyError...
        raise ValueError(f"{name}: {path} cannot be read as an image") from error
    if image is None:
        what = "is truncated; copy or download it again"
        if least > machine_memory():
            what = (
                f"is said to hold {least / 2**30:.0f} GiB, more than this machine's "
                "memory; is its header damaged? (icon_nephi.volumes reads in parts)"
            )
        raise ValueError(f"{name}: {path} {what}")
    check_itk_image(f"{name}: {path}", image)
    return image


def read_header(path: Path) -> Any:
    """Return ITK's reader of an image file, which has read its header."""
    mode = itk.CommonEnums.IOFileMode_ReadMode
    header = itk.ImageIOFactory.CreateImageIO(str(path), mode)
    header.SetFileName(str(path))
    header.ReadImageInformation()
    return header


def _is_whole(path: Path, least: int) -> bool:
    """Return whether a NIfTI file holds its voxels: ITK reads missing ones as zeros."""
    lower = path.name.lower()
    if lower.endswith(".nii"):
        return path.stat().st_size >= least + _HEADER
    if not lower.endswith(".nii.gz"):
        return True
    count = 0
    try:
        with gzip.open(path) as file:
            while count < least + _HEADER and (part := file.read(2**20)):
                count += len(part)
    except (EOFError, OSError, zlib.error):
        return False
    return count >= least + _HEADER


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


def write_image(image: Any, path: Path) -> None:
    """Write an ITK image, compressed.

    Raises:
        ValueError: its format cannot hold it.
    """
    try:
        itk.imwrite(image, str(path), compression=True)
    except RuntimeError as error:
        raise ValueError(
            f"a {path.suffix} file could not be written: it cannot hold such an image, "
            "or the disk is full"
        ) from error
