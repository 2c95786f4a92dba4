"""Image pairs in folders, with what is needed to score a registration of them.

docs/evaluation.md describes the layout.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icon_nephi.commands.flags import SIDES
from icon_nephi.io.image_files import read_image
from icon_nephi.io.image_input import read_input
from icon_nephi.io.itk_images import (
    array_of,
    check_label_map,
    geometry_of,
    image_of,
)
from icon_nephi.io.points import read_points
from icon_nephi.space.frames import Array, Geometry
from icon_nephi.space.intensities import check_intensities

# Files that hold the data of a header beside them, such as fixed.raw of fixed.mhd.
_DATA = (".raw", ".zraw", ".raw.gz", ".img", ".img.gz")


@dataclass(frozen=True)
class Case:
    """Two images of one pair, and their ground truth.

    A correct map takes ``fixed_points[n]`` to ``moving_points[n]``.
    """

    name: str
    fixed: Any  # float ITK image, 2D or 3D
    moving: Any  # the same type, on any grid
    modality: str | None = None  # "ct", "mri" or None (any other)
    fixed_mask: Any = None  # ITK image, 0 or 1
    moving_mask: Any = None
    fixed_points: Array | None = None  # [N, d], LPS mm
    moving_points: Array | None = None
    fixed_labels: Any = None  # ITK label map
    moving_labels: Any = None
    label_ids: tuple[int, ...] = ()  # to score


def find_cases(folder: Path, names: Iterable[str] | None = None) -> dict[str, Path]:
    """Return the folders of the cases asked for, by name; images are not read.

    Raises:
        ValueError: no case, an unknown name, or a badly formed case folder.
    """
    homes = list_cases(folder)
    if not homes:
        advice = "make one for each pair, with fixed.nii.gz and moving.nii.gz"
        raise ValueError(f"--data: {folder} holds no folder of a pair; {advice}")
    chosen = {name: homes[name] for name in choose(homes, names)}
    for home in chosen.values():
        case_files(home)
    return chosen


def list_cases(folder: Path) -> dict[str, Path]:
    """Return the folders with a fixed image, by name: up to two levels below, or it.

    Raises:
        ValueError: not a folder.
    """
    if not folder.is_dir():
        raise ValueError(f"--data: {folder} is not a folder")
    files = [f for at in ("", "*/", "*/*/") for f in folder.glob(f"{at}fixed.*")]
    return {
        home.resolve().name
        if home == folder
        else home.relative_to(folder).as_posix(): home
        for home in sorted({file.parent for file in files})
    }


def choose(names: Iterable[str], asked: Iterable[str] | None = None) -> list[str]:
    """Return the names of cases asked for, or of all in a group such as ``brains``.

    Raises:
        ValueError: a name that is not there.
    """
    names = list(names)
    if asked is None:
        return names
    chosen: list[str] = []
    for name in (name.rstrip("/") for name in asked):
        members = [n for n in names if n == name or n.startswith(name + "/")]
        if not members:
            raise ValueError(f"--cases: no {name!r} there, only {', '.join(names)}")
        chosen += members
    return list(dict.fromkeys(chosen))


def case_files(folder: Path) -> dict[str, Any]:
    """Return what a case folder holds, by the names of `Case`; images stay paths.

    Raises:
        ValueError: an image or one of two files missing, several files for one thing,
            or a landmark file or case.json that cannot be used.
    """
    parts: dict[str, Any] = {"modality": _modality(folder / "case.json")}
    for side in SIDES:
        for stem in (side, f"{side}_mask", f"{side}_labels"):
            if (path := _image_file(folder, stem)) is not None:
                parts[stem] = path
        if side not in parts:
            raise ValueError(f"{folder} holds no {side} image; name it {side}.nii.gz")
        path = folder / f"{side}_landmarks.csv"
        if path.exists():
            parts[f"{side}_points"] = read_points("landmarks", path).points
    for kind in ("points", "labels"):
        there = [f"{side}_{kind}" for side in SIDES if f"{side}_{kind}" in parts]
        if len(there) == 1:
            raise ValueError(f"{folder} holds {there[0]} for one image only; give both")
    shapes = [
        p.shape for side in SIDES if (p := parts.get(f"{side}_points")) is not None
    ]
    if len(set(shapes)) > 1 or (shapes and not shapes[0][0]):
        counts = " and ".join(f"{n} points in {d}D" for n, d in shapes)
        raise ValueError(
            f"{folder}: the two landmark files must correspond row by row, but hold "
            f"{counts}"
        )
    return parts


def read_case(folder: Path, name: str) -> Case:
    """Return the case in a folder.

    Raises:
        ValueError: a file that is missing, unreadable or does not fit the others.
    """
    parts = case_files(folder)
    for side in SIDES:
        path = parts[side]
        parts[side] = image = read_image(side, path, as_float=True)
        mask, labels = f"{side}_mask", f"{side}_labels"
        if mask in parts:
            parts[mask] = read_mask(mask, parts[mask])
        if labels in parts:
            parts[labels] = check_label_map(labels, read_image(labels, parts[labels]))
        values, _, place = read_input(side, image, parts.get(mask))
        check_intensities(str(path), values)
        if (points := parts.get(f"{side}_points")) is not None:
            _check_points(path, points, place)
    if len({parts[side].GetImageDimension() for side in SIDES}) > 1:
        raise ValueError(f"{folder}: give two 2D or two 3D images")
    if "fixed_labels" in parts:
        parts["label_ids"] = shared_labels(*(parts[f"{s}_labels"] for s in SIDES))
        if not parts["label_ids"]:
            raise ValueError(f"{folder}: the two label maps share no label above 0")
    return Case(name, **parts)


def read_mask(name: str, path: Path) -> Any:
    """Return an ITK image of bytes, 1 where the image in a file is above 0."""
    image = read_image(name, path)
    return image_of((array_of(image) > 0).astype(np.uint8), geometry_of(image))


def shared_labels(fixed: Any, moving: Any, above: int = 0) -> tuple[int, ...]:
    """Return the positive labels with more than ``above`` voxels in both maps."""
    common: list[set[int]] = []
    for image in (fixed, moving):
        ids, counts = np.unique(array_of(image), return_counts=True)
        common.append({int(i) for i in ids[(ids > 0) & (counts > above)]})
    return tuple(sorted(common[0] & common[1]))


def _image_file(folder: Path, stem: str) -> Path | None:
    files = sorted(folder.glob(f"{stem}.*"))
    headers = [f for f in files if not f.name.lower().endswith(_DATA)]
    if len(headers) > 1:
        names = ", ".join(file.name for file in headers)
        raise ValueError(
            f"{folder} holds {len(headers)} files named {stem}, {names}; keep one"
        )
    return next(iter([*headers, *files]), None)


def _modality(path: Path) -> str | None:
    try:
        text = path.read_text("utf-8") if path.exists() else '{"modality": null}'
        return {None: None, "ct": "ct", "mri": "mri"}[json.loads(text)["modality"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = '{"modality": "ct"}, "mri" or null'
        raise ValueError(f"{path} must hold {expected}") from error


def _check_points(path: Path, points: Array, place: Geometry) -> None:
    if points.shape[1] != place.dimension:
        raise ValueError(
            f"{path} is {place.dimension}D, its points are {points.shape[1]}D"
        )
    far = int(place.outside(points).sum())
    if 2 * far > len(points):
        raise ValueError(
            f"{path}: {far} of {len(points)} points lie outside the image; they must "
            "be LPS mm (RAS: change the sign of x and y)"
        )
