"""What nephi-warp and nephi-jacobian do with files: maps, images and points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icon_nephi.commands.flags import is_own
from icon_nephi.io import itk_images
from icon_nephi.io.atomic import written_whole
from icon_nephi.io.itk_transforms import read_transform
from icon_nephi.io.points import read_points, with_column
from icon_nephi.maps.two_way import Mapping, check_direction
from icon_nephi.registration.itk_pair import ItkPair
from icon_nephi.registration.result import Registration, load
from icon_nephi.report.expected_error import error_estimate


def in_words(direction: str) -> str:
    """Return a direction as people read it, such as ``"fixed -> moving"``."""
    return check_direction(direction).replace("_to_", " -> ")


def read_map(path: Path) -> Registration | ItkPair:
    """Return what a file holds; of an ITK transform there is only one direction.

    Raises:
        ValueError: neither, or a registration of tensors.
    """
    if not is_own(path):
        return ItkPair(read_transform("--transform", path))
    registration = load(path)
    if not registration.itk:
        raise ValueError(
            f"--transform: {path} holds a registration of tensors, which have no place "
            "in space; use icon_nephi.load in Python"
        )
    return registration


def read_reference(path: Path | None, mapping: Mapping) -> Any:
    """Return the image whose grid a result gets, None: that of the registration.

    Raises:
        ValueError: a file that is no image, or none with an ITK transform.
    """
    if path is not None:
        return itk_images.read_image("--reference", path)
    if not isinstance(mapping, Registration):
        raise ValueError(
            "--reference is needed with an ITK transform: the image whose grid the "
            "result gets, usually the fixed image"
        )
    return None


def warp_image(
    mapping: Mapping,
    path: Path,
    *,
    labels: bool,
    mode: str | None,
    reference: Path | None,
    inverse: bool,
) -> Any:
    """Return the image or label map of a file through a map, an ITK image.

    Args:
        mapping: see `read_map`.
        path: of the image.
        labels: it is a label map: 0 comes out where there is none.
        mode: see `icon_nephi.io.resampling`; None: linear, of labels nearest.
        reference: see `read_reference`.
        inverse: take it from the fixed image to the moving one.

    Raises:
        ValueError: a file that cannot be used.
    """
    flag = "--labels" if labels else "--image"
    image = itk_images.read_image(flag, path)
    if labels:
        image = itk_images.check_label_map(f"{flag}: {path}", image)
    return mapping.warp(
        image,
        mode or ("nearest" if labels else "linear"),
        read_reference(reference, mapping),
        inverse=inverse,
        outside=0 if labels else None,
    )


def move_points(
    mapping: Registration | ItkPair,
    path: Path,
    out: Path,
    *,
    direction: str,
    reference: Path | None,
    errors: bool,
) -> tuple[str, list[str]]:
    """Write mapped points; return which way they went, in words, and what is odd.

    Args:
        mapping: see `read_map`.
        path: of the points.
        out: where the mapped points go.
        direction: which way.
        reference: an image in whose space the points of an ITK transform must lie.
        errors: add a column with the error to expect.

    Raises:
        ValueError: files that cannot be used, or of another dimension than the map's.
    """
    file = read_points("--points", path)
    points, way = file.points, in_words(direction)
    if isinstance(mapping, Registration):
        place, side = mapping.two_way.place(direction), way.split(" -> ")[0]
        dimension = place.dimension
    else:
        way = "as the transform says (of --transform_out fixed -> moving)"
        place, side, dimension = None, "reference", mapping.dimension
        if reference is not None:
            image = itk_images.read_image("--reference", reference)
            place = itk_images.geometry_of(image)
            if place.dimension != dimension:
                raise ValueError(
                    "--reference and --transform have different dimensions"
                )
    if points.shape[1] != dimension:
        raise ValueError(
            f"points must be {dimension}D as the transform, but --points has "
            f"{points.shape[1]} coordinates a point"
        )
    content = file.content(mapping.transform_points(points, direction))
    if errors:
        expected = error_estimate(mapping, points, (), direction)
        content = with_column(content, "expected_error_mm", expected)
    with written_whole(out) as (part,):
        part.write_bytes(content)
    far = 0 if place is None else int(place.outside(points).sum())
    odd = (
        f"{far} of {len(points)} points lie outside the {side} image, where nothing "
        "was registered; they must be LPS mm"
    )
    return f"{way} ({len(points)} points, {file.frame} mm)", [odd] if far else []
