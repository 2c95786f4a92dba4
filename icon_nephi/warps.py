"""What nephi-warp and nephi-jacobian do with files: maps, images and points."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from icon_nephi import itk_images
from icon_nephi.atomic import written_whole
from icon_nephi.itk_maps import ItkMap
from icon_nephi.parsers import is_own
from icon_nephi.point_files import read_points, with_column
from icon_nephi.registration import load


def read_map(path: Path) -> Any:
    """A `Registration` or an `ItkMap`.

    Raises:
        ValueError: neither, or a registration of tensors.
    """
    if not is_own(path):
        return ItkMap(itk_images.read_transform("--transform", path))
    transform = load(path)
    if not transform.itk:
        raise ValueError(
            f"--transform: {path} holds a registration of tensors, which have no place "
            "in space; use icon_nephi.load in Python"
        )
    return transform


def reference_of(given: argparse.Namespace, *, needed: bool) -> Any:
    """The image of --reference, or None.

    Raises:
        ValueError: a file that is none, or none where one is needed.
    """
    if given.reference is not None:
        return itk_images.read_image("--reference", given.reference)
    if needed:
        raise ValueError(
            "--reference is needed with an ITK transform: the image whose grid the "
            "result gets, usually the fixed image"
        )
    return None


def warp_image(
    given: argparse.Namespace, transform: Any, kind: str, *, own: bool, inverse: bool
) -> Any:
    """The image or label map of the flags through a map, an ITK image.

    Args:
        given: the flags.
        transform: see `read_map`.
        kind: "image" or "labels".
        own: whether it is a `Registration`.
        inverse: take it from the fixed image to the moving one.
    """
    path = getattr(given, kind)
    image = itk_images.read_image(f"--{kind}", path)
    if kind == "labels":
        image = itk_images.check_label_map(f"--labels: {path}", image)
    reference = reference_of(given, needed=not own)
    mode = given.interpolation or ("nearest" if kind == "labels" else "linear")
    beyond = 0 if kind == "labels" else None
    if own:
        return transform.warp(image, mode, reference, inverse=inverse, outside=beyond)
    least = float(itk_images.array_of(image).min()) if beyond is None else beyond
    return transform.warp(image, reference, mode, least)


def move_points(
    given: argparse.Namespace, transform: Any, out: Path, *, own: bool, inverse: bool
) -> tuple[str, list[str]]:
    """Which way they went, in words, and what is odd about them; writes them.

    Args:
        given: the flags.
        transform: see `read_map`.
        out: where the points go.
        own: whether it is a `Registration`.
        inverse: take them from the moving image to the fixed one.
    """
    found = read_points("--points", given.points)
    points = found.points
    place, side = None, "reference"
    if own:
        side = "moving" if inverse else "fixed"
        place = transform.geometry_A if inverse else transform.geometry_B
        d = place.dimension
    else:
        reference = reference_of(given, needed=False)
        d = transform.dimension
        if reference is not None:
            place = itk_images.geometry_of(reference)
            d = d if place.dimension == d else -1
    if points.shape[1] != d:
        raise ValueError(
            f"points must be {d}D as the transform, but --points has "
            f"{points.shape[1]} coordinates a point"
            if d > 0
            else "--reference and --transform have different dimensions"
        )
    direction = "moving_to_fixed" if inverse else "fixed_to_moving"
    moved = transform.transform_points(points, direction) if own else transform(points)
    content = found.content(moved)
    if given.errors:
        errors = transform.error_estimate(points, (), direction)
        content = with_column(content, "expected_error_mm", errors)
    with written_whole(out) as (part,):
        part.write_bytes(content)
    far = 0 if place is None else int(place.outside(points).sum())
    odd = (
        f"{far} of {len(points)} points lie outside the {side} image, where nothing "
        "was registered; they must be LPS mm"
    )
    way = "moving -> fixed" if inverse else "fixed -> moving"
    way = way if own else "as the transform says (of --transform_out fixed -> moving)"
    return f"{way} ({len(points)} points, {found.frame} mm)", [odd] if far else []
