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
from icon_nephi.maps.framed import Array
from icon_nephi.space.frames import Geometry, other_order

_HEADER = 348  # bytes of the smallest NIfTI header


def check_itk_image(name: str, image: Any) -> None:
    """Nothing, or an error: a scalar 2D or 3D image with an extent on every axis.

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
    """Where a 2D or 3D ITK image lies; size in tensor order, the rest in ITK's."""
    region = image.GetLargestPossibleRegion()
    return Geometry(
        size=other_order(int(n) for n in region.GetSize()),
        spacing=tuple(float(s) for s in image.GetSpacing()),
        # The first voxel there is: after cropping its index need not be zero.
        origin=tuple(
            float(x) for x in image.TransformIndexToPhysicalPoint(region.GetIndex())
        ),
        direction=tuple(
            map(tuple, itk.array_from_matrix(image.GetDirection()).tolist())
        ),
    )


def array_of(image: Any) -> Array:
    """A copy of the voxels ``[*grid]``, tensor order, the image's own pixel type."""
    values: Array = itk.array_from_image(image)
    return values


def tensor_of(image: Any) -> Tensor:
    """The voxels as ``[1, 1, *grid]`` float32."""
    return torch.from_numpy(array_of(image).astype(np.float32))[None, None]


def image_of(array: Array, geometry: Geometry) -> Any:
    """An ITK image of ``[*grid]``, or of numbers ``[*grid, c]`` (float32), placed."""
    d = geometry.dimension
    if array.ndim == d:
        kinds = {"bool": np.uint8, "float16": np.float32}
        values = array.astype(kinds.get(array.dtype.name, array.dtype))
        image = itk.image_from_array(np.ascontiguousarray(values))
    else:
        values = np.ascontiguousarray(array, dtype=np.float32)
        kind = (
            {"ttype": (itk.Image[itk.Vector[itk.F, d], d],)}
            if values.shape[-1] == d  # what readers of displacements expect
            else {"is_vector": True}
        )
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
        with _no_stderr():
            mode = itk.CommonEnums.IOFileMode_ReadMode
            header = itk.ImageIOFactory.CreateImageIO(str(path), mode)
            header.SetFileName(str(path))
            header.ReadImageInformation()
            least = int(header.GetImageSizeInBytes())
            whole = least <= machine_memory() and _is_whole(path, least)
            parts = header.GetNumberOfComponents()
            if parts > 1 and not (header.GetNumberOfDimensions() == 2 < parts < 5):
                as_float = False  # of vectors ITK would read nonsense
            image = (
                itk.imread(str(path), itk.F if as_float else None) if whole else None
            )
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


def _is_whole(path: Path, least: int) -> bool:
    """Whether a NIfTI file holds its voxels: ITK reads the missing ones as zeros."""
    lower = path.name.lower()
    if lower.endswith(".nii"):
        return path.stat().st_size >= least + _HEADER
    if lower.endswith(".nii.gz"):
        count = 0
        try:
            with gzip.open(path) as file:
                while count < least + _HEADER and (part := file.read(2**20)):
                    count += len(part)
        except (EOFError, OSError, zlib.error):
            return False
        return count >= least + _HEADER
    return True


@contextmanager
def _no_stderr() -> Iterator[None]:
    """ITK's readers write complaints to the process's stderr; the error says enough."""
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
    """A mask or label map on another image's grid, by nearest neighbour, else 0."""
    return resample(image, reference, None, "nearest")


def resample(
    image: Any, reference: Any, transform: Any, mode: str, outside: float = 0
) -> Any:
    """An image through an ITK transform on a reference grid, by ITK.

    Args:
        image: of the space that the transform maps to.
        reference: its grid is the result's.
        transform: reference points -> image points, None for the identity.
        mode: ``"linear"`` (float32 comes out) or ``"nearest"`` (the pixel type stays).
        outside: the value where there is no image.

    Raises:
        ValueError: image, reference and transform of different dimensions.
    """
    d = image.GetImageDimension()
    others = [reference.GetImageDimension()]
    others += [] if transform is None else [transform.GetInputSpaceDimension()]
    if set(others) != {d}:
        raise ValueError(
            f"the image is {d}D but the reference or the transform is not; pass those "
            "of the same registration"
        )
    # ITK's Python interpolates few pixel types; these two hold all the others.
    kind = np.float32 if mode == "linear" else np.float64
    values = array_of(image)
    moving = image_of(values.astype(kind), geometry_of(image))
    interpolate = (
        itk.LinearInterpolateImageFunction
        if mode == "linear"
        else itk.NearestNeighborInterpolateImageFunction
    )
    result = itk.resample_image_filter(
        moving,
        interpolator=interpolate.New(moving),
        use_reference_image=True,
        reference_image=reference,
        default_pixel_value=float(outside),
        **({} if transform is None else {"transform": transform}),
    )
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
