"""The files of one registration, read and checked before any work is done."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from icon_nephi._check import check_dimension, check_mask_numbers
from icon_nephi.io import itk_images
from icon_nephi.maps.framed import Array


class Inputs:
    """What the flags name, read.

    Attributes:
        images: by flag, clipped to their windows.
        original: the moving image as it is in its file.
        landmarks: ``[N, d]`` fixed and moving, LPS mm, None without.
        labels: ITK label maps, fixed and moving, None without.
        warnings: what is odd about them, a sentence each.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.images = {
            name: itk_images.read_image(f"--{name}", path)
            for name in (
                *("moving", "fixed", "moving_mask", "fixed_mask"),
                *("moving_segmentation", "fixed_segmentation"),
            )
            if (path := getattr(given, name)) is not None
        }
        self.original = self.images["moving"]
        self.warnings: list[str] = []
        for side in ("moving", "fixed"):
            mask = self.images.get(f"{side}_mask")
            if mask is not None:
                flag = f"--{side}_mask: {getattr(given, f'{side}_mask')}"
                check_mask_numbers(flag, itk_images.array_of(mask))
            name = f"{side}_segmentation"
            if name in self.images:
                image = self.images[name]
                self.images[name] = itk_images.check_label_map(f"--{name}", image)
            self.images[side] = _windowed(given, side, self.images[side])
        d = self.images["fixed"].GetImageDimension()
        self.landmarks: tuple[Array, Array] | None = None
        self.labels: tuple[Any, Any] | None = None
        if given.landmarks_fixed is not None:
            self.landmarks = self._read_landmarks(given, d)
        if given.labels_fixed is not None:
            maps = []
            for flag in ("labels_fixed", "labels_moving"):
                image = itk_images.read_image(f"--{flag}", getattr(given, flag))
                found = image.GetImageDimension()
                check_dimension(f"--{flag}", found, "the images are", d)
                maps.append(itk_images.check_label_map(f"--{flag}", image))
            self.labels = (maps[0], maps[1])

    def _read_landmarks(self, given: argparse.Namespace, d: int) -> tuple[Array, Array]:
        from icon_nephi.io.points import read_points

        found = []
        for side in ("fixed", "moving"):
            flag = f"--landmarks_{side}"
            points = read_points(flag, getattr(given, f"landmarks_{side}")).points
            found.append(points)
        _check_landmarks(found[0], found[1], d)
        for side, points in zip(("fixed", "moving"), found, strict=True):
            place = itk_images.geometry_of(self.images[side])
            far = int(place.outside(points).sum())
            if far:
                self.warnings.append(
                    f"{far} of {len(points)} landmarks lie outside the {side} image; "
                    "they must be LPS mm (RAS: change the sign of x and y)"
                )
        return found[0], found[1]


def _check_landmarks(fixed: Array, moving: Array, dimension: int) -> None:
    """Refuse landmarks of another dimension, or not a row to each in both."""
    for name, points in (("fixed", fixed), ("moving", moving)):
        if points.shape[1] != dimension:
            raise ValueError(
                f"--landmarks_{name} has {points.shape[1]} coordinates a point but the "
                f"images are {dimension}D"
            )
    if len(fixed) != len(moving) or not len(fixed):
        raise ValueError(
            f"--landmarks_fixed has {len(fixed)} points and --landmarks_moving "
            f"{len(moving)}: they must correspond row by row"
        )


def _windowed(given: argparse.Namespace, side: str, image: Any) -> Any:
    """The image clipped to its window or quantiles."""
    ends, values = getattr(given, f"{side}_window"), itk_images.array_of(image)
    flag = f"--{side}_window"
    if ends is None and given.quantiles is not None:
        flag, ends = "--quantiles", np.quantile(values, given.quantiles).tolist()
    if ends is None:
        return image
    clipped = np.clip(values.astype(np.float32), *ends)
    if clipped.min() == clipped.max():
        raise ValueError(
            f"{flag} leaves nothing of --{side}: its intensities go from "
            f"{values.min():g} to {values.max():g}"
        )
    return itk_images.image_of(clipped, itk_images.geometry_of(image))
