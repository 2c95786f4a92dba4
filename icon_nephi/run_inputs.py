"""The files of one registration, read and checked before any work is done."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from icon_nephi import itk_images
from icon_nephi.inputs import check_label_map
from icon_nephi.physical import Array


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
                _check_mask(f"--{side}_mask: {getattr(given, f'{side}_mask')}", mask)
            name = f"{side}_segmentation"
            if name in self.images:
                image = self.images[name]
                self.images[name] = check_label_map(f"--{name}", image)
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
                if image.GetImageDimension() != d:
                    raise ValueError(
                        f"--{flag} is {image.GetImageDimension()}D but the images are "
                        f"{d}D"
                    )
                maps.append(check_label_map(f"--{flag}", image))
            self.labels = (maps[0], maps[1])

    def _read_landmarks(self, given: argparse.Namespace, d: int) -> tuple[Array, Array]:
        from icon_nephi.point_files import read_points

        found = []
        for side in ("fixed", "moving"):
            flag = f"--landmarks_{side}"
            points = read_points(flag, getattr(given, f"landmarks_{side}")).points
            found.append(points)
        _check_landmarks(found[0], found[1], d)
        for side, points in zip(("fixed", "moving"), found, strict=True):
            far = outside(points, itk_images.geometry_of(self.images[side]))
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


def outside(points: Array, place: Any) -> int:
    """How many points lie more than half a voxel beyond a grid."""
    matrix = place.physical_to_unit().numpy()
    d = place.dimension
    index = (points @ matrix[:d, :d].T + matrix[:d, d]) * (np.array(place.size) - 1.0)
    far = (index < -0.5 - 1e-6) | (index > np.array(place.size) - 0.5 + 1e-6)
    return int(far.any(1).sum())


def _check_mask(name: str, mask: Any) -> None:
    values = itk_images.array_of(mask)
    odd = ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(1, bool)
    if odd.any() or values.min() < 0 or (values[values > 1] % 1).any():
        raise ValueError(
            f"{name} does not look like a mask: it holds negative numbers or fractions "
            "above 1; were image and mask swapped?"
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
