"""Files that the flags name, read and checked before any work is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from icon_nephi._check import check_dimension, check_mask_numbers
from icon_nephi.commands.flags import SIDES, RegisterFlags, WarpFlags, is_own
from icon_nephi.io import itk_images
from icon_nephi.io.image_files import read_image
from icon_nephi.io.other_transforms import read_any_transform
from icon_nephi.io.point_file import PointFile
from icon_nephi.io.points import read_points
from icon_nephi.registration.chain import Chain
from icon_nephi.registration.itk_pair import ItkPair
from icon_nephi.registration.result import Registration
from icon_nephi.registration.saved import load
from icon_nephi.registration.series import Series
from icon_nephi.space.frames import Array

PARTS = ("lesion_mask", "moving_lesion_mask", "rigid_mask", "volume_mask")


class Inputs:
    """The files of one registration.

    Attributes:
        images: by flag, clipped to their windows.
        original: the moving image as it is in its file.
        landmarks: ``[N, d]`` fixed and moving, LPS mm, None without.
        labels: ITK label maps, fixed and moving, None without.
        warnings: what is odd about them, a sentence each.
    """

    def __init__(self, flags: RegisterFlags) -> None:
        self.warnings: list[str] = []
        self.images = {
            name: read_image(f"--{name}", path, said=self.warnings)
            for end in ("", "_mask", "_segmentation")
            for name in (f"moving{end}", f"fixed{end}")
            if (path := getattr(flags, name)) is not None
        }
        for name in PARTS:
            if (path := getattr(flags, name)) is not None:
                image = read_image(f"--{name}", path, said=self.warnings)
                self.images[name] = itk_images.check_label_map(f"--{name}", image)
        self.original = self.images["moving"]
        for side in SIDES:
            name = f"{side}_mask"
            if name in self.images:
                values = itk_images.array_of(self.images[name])
                check_mask_numbers(f"--{name}: {getattr(flags, name)}", values)
            name = f"{side}_segmentation"
            if name in self.images:
                image = self.images[name]
                self.images[name] = itk_images.check_label_map(f"--{name}", image)
            self.images[side] = _windowed(flags, side, self.images[side])
        d = self.images["fixed"].GetImageDimension()
        self.landmarks: tuple[Array, Array] | None = None
        self.labels: tuple[Any, Any] | None = None
        if flags.landmarks_fixed is not None:
            self.landmarks = self._read_landmarks(flags, d)
        if flags.labels_fixed is not None:
            fixed, moving = (_read_labels(flags, side, d) for side in SIDES)
            self.labels = fixed, moving

    def _read_landmarks(
        self, flags: RegisterFlags, dimension: int
    ) -> tuple[Array, Array]:
        files = [
            read_points(f"--landmarks_{side}", getattr(flags, f"landmarks_{side}"))
            for side in SIDES
        ]
        if dimension == 2:
            files = [file.flat() for file in files]
        fixed, moving, said = paired(*files)
        self.warnings += said
        for side, points in zip(SIDES, (fixed, moving), strict=True):
            if points.shape[1] != dimension:
                raise ValueError(
                    f"--landmarks_{side} has {points.shape[1]} coordinates a point but "
                    f"the images are {dimension}D"
                )
            place = itk_images.geometry_of(self.images[side])
            far = int(place.outside(points).sum())
            if far:
                self.warnings.append(
                    f"{far} of {len(points)} landmarks lie outside the {side} image; "
                    "they must be LPS mm (RAS: change the sign of x and y)"
                )
        if len(fixed) != len(moving) or not len(fixed):
            raise ValueError(
                f"--landmarks_fixed has {len(fixed)} points and --landmarks_moving "
                f"{len(moving)}: they must correspond row by row"
            )
        return fixed, moving


def paired(first: PointFile, second: PointFile) -> tuple[Array, Array, list[str]]:
    """Return the points of two files that belong together, and what there is to say.

    By their names where each point of both has its own, else row by row.
    """
    names = first.names, second.names
    if names == (None, None) or names[0] == names[1]:
        return first.points, second.points, []
    rows = [dict(zip(n or (), range(len(n or ())), strict=True)) for n in names]
    own = all(n and len(r) == len(n) for n, r in zip(names, rows, strict=True))
    common = [name for name in rows[0] if name in rows[1]]
    if not own or not common:
        why = "no name is in both" if own else "not each has a name of its own"
        return (
            *(first.points, second.points),
            [f"landmarks are paired row by row, because {why}"],
        )
    found = [[r[name] for name in common] for r in rows]
    said = []
    alone = sorted(set(rows[0]) ^ set(rows[1]))
    if alone:
        said.append(
            f"landmarks are paired by name; left out are those of one file only: "
            f"{', '.join(alone[:5])}{', ...' if len(alone) > 5 else ''}"
        )
    return first.points[found[0]], second.points[found[1]], said


def _read_labels(flags: RegisterFlags, side: str, dimension: int) -> Any:
    flag = f"--labels_{side}"
    image = read_image(flag, getattr(flags, f"labels_{side}"))
    check_dimension(flag, image.GetImageDimension(), "the images are", dimension)
    return itk_images.check_label_map(flag, image)


def _windowed(flags: RegisterFlags, side: str, image: Any) -> Any:
    """Return the image clipped to its window or quantiles."""
    flag, ends = f"--{side}_window", getattr(flags, f"{side}_window")
    values = itk_images.array_of(image)
    if ends is None and flags.quantiles is not None:
        flag, ends = "--quantiles", np.quantile(values, flags.quantiles).tolist()
    if ends is None:
        return image
    clipped = np.clip(values.astype(np.float32), *ends)
    if clipped.min() == clipped.max():
        raise ValueError(
            f"{flag} leaves nothing of --{side}: its intensities go from "
            f"{values.min():g} to {values.max():g}"
        )
    return itk_images.image_of(clipped, itk_images.geometry_of(image))


def read_map(
    path: Path, way: str | None, number: int | None = None, **affine: Any
) -> Registration | ItkPair:
    """Return what ``--transform`` holds; of an ITK transform there is one direction.

    ``way`` is what was typed to ask for a direction, if anything; ``number`` of an
    image, of a series or a template; ``affine`` says of plain numbers what
    `read_any_transform` wants to know.

    Raises:
        ValueError: neither, a registration of tensors, or a way of an ITK transform.
    """
    if not is_own("--transform", path):
        if way is not None:
            raise ValueError(
                f"--{'inverse' if way == 'inverse' else 'to'} needs a .nephi file; of "
                "an ITK transform give the file that nephi-register wrote to "
                "--inverse_transform_out, or give it to --inverse_of of nephi-warp"
            )
        return ItkPair(read_any_transform("--transform", path, **affine))
    registration = load(path)
    if isinstance(registration, Series):
        if number is None:
            raise ValueError(
                f"--transform: {path} holds {len(registration)} images; say which one "
                f"with --number, 0 to {len(registration) - 1}"
            )
        registration = registration.from_reference(number)
    if not registration.itk:
        raise ValueError(
            f"--transform: {path} holds a registration of tensors, which have no place "
            "in space; use icon_nephi.load in Python"
        )
    return registration


def read_chain(flags: WarpFlags) -> Registration | ItkPair | Chain:
    """Return what ``--transform`` and ``--inverse_of`` hold together.

    Raises:
        ValueError: see `read_map`; or inverses typed as ``--inverse`` of a chain.
    """
    way = "inverse" if flags.inverse else flags.to
    about: dict[str, Any] = {"affine": flags.affine}
    if flags.affine == "fsl":
        for name, path in (("fixed", flags.reference), ("moving", flags.moving)):
            if path is not None:
                flag = "--reference" if name == "fixed" else "--moving"
                about[name] = itk_images.geometry_of(read_image(flag, path))
    number = flags.number
    steps = [
        (read_map(p, way, number, **about), turned) for p, turned in flags.transform
    ]
    if len(steps) == 1 and not steps[0][1]:
        return steps[0][0]
    return Chain(steps)


def read_reference(path: Path | None, mapping: Any) -> Any:
    """Return the image whose grid a result gets, None: that of the registration.

    Raises:
        ValueError: a file that is no image, or none with an ITK transform.
    """
    if path is not None:
        return read_image("--reference", path)
    lone = isinstance(mapping, ItkPair)
    if lone or (isinstance(mapping, Chain) and mapping.place() is None):
        raise ValueError(
            "--reference is needed with an ITK transform: the image whose grid the "
            "result gets, usually the fixed image"
        )
    return None


def in_words(mapping: Any, direction: str) -> str:
    """Return a direction as people read it; a lone ITK transform does not tell its."""
    if isinstance(mapping, ItkPair):
        return "as the transform says"
    if isinstance(mapping, Chain):
        return f"through {len(mapping.steps)} transforms"
    return direction.replace("_to_", " -> ")
