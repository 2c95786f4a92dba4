"""Transforms of other programs: displacement fields, and affines as plain numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import itk
import numpy as np

from icon_nephi.io.image_files import read_image
from icon_nephi.io.itk_images import array_of, geometry_of
from icon_nephi.io.itk_modules import itk_class
from icon_nephi.io.itk_transforms import affine_transform, read_transform
from icon_nephi.space.frames import Array, Geometry

#: Endings of displacement fields, and of affines that ITK may not read.
FIELDS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
AFFINES = (".mat", ".txt")
#: Who writes an affine as plain numbers, which do not say whose they are.
AFFINE_KINDS = ("ras", "fsl")

_MOST = 2**16  # bytes of a file of plain numbers


def read_any_transform(
    name: str,
    path: Path,
    *,
    affine: str | None = None,
    fixed: Geometry | None = None,
    moving: Geometry | None = None,
) -> Any:
    """Return an ITK transform of fixed points (LPS mm) to moving points.

    Args:
        name: of the argument, for errors.
        path: of an ITK transform (also those of ANTs), of a displacement field (an
            image of vectors in LPS mm: ANTs, greedy, elastix, 3D Slicer), or of an
            affine as plain numbers, 4 rows of 4 (in 2D 3 of 3).
        affine: whose plain numbers are: ``"ras"``, fixed to moving in RAS mm (greedy,
            c3d); ``"fsl"``, flirt's, from the moving image (-in) to the fixed (-ref).
        fixed: where the fixed image lies, which flirt's numbers depend on.
        moving: where the moving image lies, likewise.

    Raises:
        ValueError: none of these, or plain numbers that do not say whose they are.
    """
    lower = path.name.lower()
    if lower.endswith(FIELDS):
        return _field(name, path)
    numbers = _plain_numbers(path) if lower.endswith(AFFINES) else None
    if numbers is None:
        return read_transform(name, path)
    d = len(numbers) - 1
    if affine is None:
        raise ValueError(
            f"{name}: {path} holds plain numbers, which do not say whose they are: add "
            "--affine ras (greedy, c3d: fixed to moving, RAS mm) or --affine fsl "
            "(flirt: with --reference its -ref and --moving its -in)"
        )
    if affine == "ras":
        turn = np.diag([-1.0, -1.0, 1.0, 1.0] if d == 3 else [-1.0, -1.0, 1.0])
        matrix = turn @ numbers @ turn
    else:
        if fixed is None or moving is None or d != 3:
            raise ValueError(
                f"{name}: {path}: flirt's numbers depend on both images, in 3D: give "
                "--reference (its -ref) and --moving (its -in)"
            )
        # flirt takes scaled voxels of -in to those of -ref.
        matrix = (
            _scaled(moving) @ np.linalg.inv(numbers) @ np.linalg.inv(_scaled(fixed))
        )
    return affine_transform(matrix[:d, :d], matrix[:d, d])


def _scaled(place: Geometry) -> Array:
    """Return FSL's millimetres -> LPS mm: voxels times spacing, x from the other side.

    From the other side where the axes are right-handed in RAS.
    """
    d = place.dimension
    steps = np.array(place.direction) * np.array(place.spacing)
    voxels = np.eye(d + 1)
    voxels[:d, :d], voxels[:d, d] = steps, place.origin
    scale = np.diag([*(1 / s for s in place.spacing), 1.0])
    if np.linalg.det(steps) > 0:  # LPS to RAS turns two axes: the sign stays
        flip = np.diag([-1.0, 1.0, 1.0, 1.0])
        flip[0, 3] = place.itk_size[0] - 1
        scale = flip @ scale
    whole: Array = voxels @ scale
    return whole


def _plain_numbers(path: Path) -> Array | None:
    """Return the matrix of 4 rows of 4 numbers (or 3 of 3), None of other files."""
    if not path.is_file() or path.stat().st_size > _MOST:
        return None
    try:
        lines = path.read_text("ascii").splitlines()
        rows = [[float(w) for w in x.split()] for x in lines if x.strip()]
    except (ValueError, OSError):
        return None
    if len(rows) not in (3, 4) or any(len(row) != len(rows) for row in rows):
        return None
    matrix = np.array(rows)
    last = [0.0] * (len(rows) - 1) + [1.0]
    good = np.isfinite(matrix).all() and np.allclose(matrix[-1], last, atol=1e-9)
    return matrix if good and abs(np.linalg.det(matrix)) > 1e-12 else None


def _field(name: str, path: Path) -> Any:
    image = read_image(name, path, components=True)
    d, place = image.GetImageDimension(), geometry_of(image)
    values = array_of(image)
    if values.ndim != d + 1 or values.shape[-1] != d:
        count = 1 if values.ndim == d else values.shape[-1]
        raise ValueError(
            f"{name}: {path} has {count} numbers a voxel: it is no displacement field, "
            f"which has {d}, a vector in LPS mm"
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name}: {path} has displacements that are not finite; set them to 0"
        )
    transform = itk_class("DisplacementFieldTransform", f"D{d}").New()
    numbers = [*place.itk_size, *place.origin, *place.spacing]
    numbers += np.array(place.direction).ravel().tolist()
    parameters = itk_class("OptimizerParameters", "D")
    transform.SetFixedParameters(parameters([float(x) for x in numbers]))
    vectors = parameters(values.size)
    doubles = np.ascontiguousarray(values, dtype=np.float64).ravel()
    vectors.update(itk.vnl_vector_from_array(doubles), 0)
    transform.SetParameters(vectors)
    return transform
