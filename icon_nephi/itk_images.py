"""ITK images in, ITK images and transforms out; the only room that knows ITK."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import itk
import numpy as np
import torch
from torch import Tensor

from icon_nephi._check import check_labels
from icon_nephi.coordinates import Geometry, apply_affine, other_order
from icon_nephi.memory import machine_memory
from icon_nephi.physical import Array, FramedMap, linear_part, over_grid
from icon_nephi.splines import spline_nodes, spline_solver
from icon_nephi.transforms import Map

#: Nodes of an exported field, each three doubles: where an axis has steps finer than
#: the voxels at most the first number (70 MB as a file), else the second (200 MB).
FINE_NODES, MOST_NODES = 6_000_000, 2**24
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


def read_image(name: str, path: str | os.PathLike[str], kind: Any = None) -> Any:
    """Return a scalar 2D or 3D image from a file.

    Args:
        name: of the argument, for errors.
        path: of the file.
        kind: of the voxels, such as ``itk.F``: colours of a 2D image become grey.
            Default: as they are stored.

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
                kind = None  # of vectors ITK would read nonsense
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


def read_transform(name: str, path: str | os.PathLike[str]) -> Any:
    """The one transform in an ITK transform file.

    Raises:
        ValueError: missing or unreadable file, or not exactly one transform.
    """
    if not Path(path).is_file():
        raise ValueError(f"{name}: {path} does not exist")
    try:
        with _no_stderr():
            transforms = list(itk.transformread(str(path)))
    except Exception as error:
        raise ValueError(f"{name}: {path} cannot be read as a transform") from error
    if len(transforms) != 1:
        raise ValueError(
            f"{name}: {path} holds {len(transforms)} transforms, expected one"
        )
    return transforms[0]


def composite_transform(
    phi: Map,
    source: Geometry,
    target: Geometry,
    matrix: Tensor | None = None,
    *,
    tolerance: float = 1e-3,
    volume_tolerance: float = 1e-3,
    margin: float = 0.05,
    device: torch.device | str = "cpu",
    said: list[str] | None = None,
) -> Any:
    """``TransformPoint(source point)`` is the target point, LPS millimetres.

    An ``itk.CompositeTransform``: a cubic B-spline field along the source image's
    axes, then the exact affine map. On each axis the steps are as long as the errors of
    points and of Jacobian determinants allow (`icon_nephi.splines.spline_nodes`): up
    to 8 voxels, or a voxel or a part of one, and then the field is the map at voxel
    centres. Points take at most `FINE_NODES`; determinants twice what points took, or a
    quarter of a million. A rough map of a large image misses the tolerances then: of a
    CT with fine codes 99 in 100 determinants lie within 0.01. (A displacement field is
    read linearly: at 2 mm steps and 12 mm of motion 0.03 mm off between voxels.)

    The map has a kink where the fixed image ends. Where that lies inside the moving
    image, the backward transform is up to a few hundredths of a millimetre off between
    voxels. In the margin around the image the field continues the displacement, within
    two steps of the border up to a few tenths off; beyond the margin only the affine
    map is left.

    Args:
        phi: from the source's unit box to the target's.
        source: the image whose points go in (for phi_AB the fixed one).
        target: the image whose points come out.
        matrix: the affine part, homogeneous ``[d + 1, d + 1]`` between the unit boxes.
            Default: both images lie where their headers say.
        tolerance: millimetres.
        volume_tolerance: of Jacobian determinants.
        margin: share of the image added on every side.
        device: where phi is evaluated.
        said: takes a sentence if the nodes do not suffice for the tolerances.
    """
    d = source.dimension
    into, out = source.unit_to_physical(), target.unit_to_physical()
    if matrix is None:
        matrix = torch.linalg.inv(out) @ into
    linear, shift = linear_part(matrix, source, target)
    mapped = FramedMap(phi, into, out, device)
    back = np.linalg.inv(linear)

    def beside(points: Array, moved: Array) -> Array:
        result: Array = (moved - shift) @ back.T - points
        return result

    def smooth(unit: Array) -> Array:
        there = apply_affine(matrix.cpu(), torch.from_numpy(unit)).numpy()
        inside: Array = np.all((there > 0) & (there < 1), axis=1)
        return inside

    finest = min(FINE_NODES, max(10**6, 4**d * int(np.prod(source.size))))
    limits = max(MOST_NODES, finest), finest
    asked = tolerance, volume_tolerance
    nodes, *off = spline_nodes(mapped, into, source.size, smooth, asked, limits)
    if said is not None and any(x > most for x, most in zip(off, asked, strict=True)):
        said.append(
            f"the ITK transform has no room for more nodes: between voxels it is up to "
            f"{off[0]:.1g} mm off, and its Jacobian determinants up to {off[1]:.1g} "
            "(those of the saved registration are exact)"
        )
    pads = [int(np.ceil(margin * n)) + 2 for n in nodes]  # 2: a cubic's reach
    grid = _padded(source, nodes, pads)
    frame = grid.unit_to_physical()
    field = over_grid(beside, grid.size, frame, d, np.float64, mapped=mapped)
    solvers = [_coefficients(n, p) for n, p in zip(nodes, pads, strict=True)]
    quantum = 2.0 ** np.floor(np.log2(tolerance / 200))  # so that files compress
    for component in range(d):
        values = field[..., component]
        for axis, solve in enumerate(solvers):
            values = np.moveaxis(np.tensordot(solve, values, (1, axis)), 0, axis)
        field[..., component] = np.round(values / quantum) * quantum
    spline = itk.BSplineTransform[itk.D, d, 3].New()
    numbers = [*grid.itk_size, *grid.origin, *grid.spacing]
    numbers += np.array(grid.direction).ravel().tolist()
    parameters = itk.OptimizerParameters[itk.D]
    spline.SetFixedParameters(parameters([float(x) for x in numbers]))
    values = parameters(field.size)
    # Copied as a block: from a sequence, ITK makes a Python object of every number.
    values.update(itk.vnl_vector_from_array(np.moveaxis(field, -1, 0).ravel()), 0)
    spline.SetParameters(values)
    affine = itk.AffineTransform[itk.D, d].New()
    affine.SetMatrix(itk.matrix_from_array(linear))
    affine.SetTranslation(shift.tolist())
    composite = itk.CompositeTransform[itk.D, d].New()
    composite.AddTransform(affine)  # ITK applies the one added last first
    composite.AddTransform(spline)
    return composite


def _padded(source: Geometry, nodes: Sequence[int], pads: list[int]) -> Geometry:
    """The grid of nodes: over the image's box and ``pads`` steps beyond each end."""
    steps = other_order(e / (n - 1) for e, n in zip(source.extent, nodes, strict=True))
    direction = np.array(source.direction)
    beyond = np.array(steps) * np.array(other_order(pads))
    return Geometry(
        size=tuple(n + 2 * p for n, p in zip(nodes, pads, strict=True)),
        spacing=steps,
        origin=tuple((np.array(source.origin) - direction @ beyond).tolist()),
        direction=source.direction,
    )


def _coefficients(nodes: int, pad: int) -> Array:
    """``[nodes + 2 pad, nodes + 2 pad]``: values at nodes -> B-spline coefficients.

    Inside the box the spline interpolates and its ends are free (not-a-knot), because
    the map has a kink at the border that would ring inwards; outside a coefficient is
    the value at its node, which is exact where the displacement is constant.
    """
    solve = np.eye(nodes + 2 * pad)
    inner = slice(pad - 1, pad + nodes + 1)
    solve[inner] = 0
    solve[inner, pad : pad + nodes] = spline_solver(nodes)
    return solve
