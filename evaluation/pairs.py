"""Image pairs with ground truth: the known benchmark cases and anyone's own folders.

Points are ITK physical coordinates (LPS, mm); a correct fixed-to-moving transform
takes ``fixed_points[n]`` to ``moving_points[n]``. Images are read when a pair is asked
for, not before. docs/evaluation.md describes the folder layout and every known case.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import (
    array_of,
    geometry,
    image_from,
    read_image,
    read_labels,
    read_landmarks,
    read_mask,
    to_index,
)

SIDES = ("fixed", "moving")
# Files that hold the data of a header beside them, such as fixed.raw of fixed.mhd.
DATA_FILES = (".raw", ".zraw", ".raw.gz", ".img", ".img.gz")
# Thirteen structures as groups of FreeSurfer ids, in the order of the moving file.
FREESURFER_STRUCTURES = (
    *((10, 49), (8, 47), (4, 43), (7, 46), (12, 51), (11, 50), (13, 52)),
    *((17, 53), (18, 54), (3, 42), (14,), (15,), (16,)),
)


@dataclass(frozen=True)
class Pair:
    """Two images of one case with what is needed to score a registration of them."""

    name: str
    fixed: Any  # itk.Image[itk.F, d], d = 2 or 3
    moving: Any  # the same type, on any grid
    modality: str | None = None  # "ct", "mri" or None (any other)
    fixed_mask: Any = None  # itk.UC, 0 or 1, on the fixed grid
    moving_mask: Any = None
    fixed_points: np.ndarray | None = None  # [N, d], LPS mm
    moving_points: np.ndarray | None = None  # row n belongs to row n of fixed_points
    fixed_labels: Any = None  # itk.SS on the fixed grid
    moving_labels: Any = None
    label_ids: tuple[int, ...] = ()  # the labels to score


def load_pairs(
    data_dir: str | Path, cases: Iterable[str] | None = None
) -> Iterator[Pair]:
    """Return an iterator that reads one pair at a time.

    Args:
        data_dir: Folder of cases.
        cases: Names of cases, or of groups such as ``brain3d_hippocampus``; None means
            every case found.

    Raises:
        ValueError: At once for a wrong folder, an unknown case or a badly formed
            folder; for an image that cannot be read when its pair is asked for.
    """
    return (read() for read in find_cases(data_dir, cases).values())


def find_cases(
    data_dir: str | Path, cases: Iterable[str] | None = None
) -> dict[str, Callable[[], Pair]]:
    """Return the reader of every case asked for, by name, without reading images."""
    root = Path(data_dir)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder.")
    groups = sorted({name.partition("/")[0] for name in KNOWN})
    found: dict[str, Callable[[], Pair]] = {
        name: partial(reader, root / name.partition("/")[0], name)
        for name, reader in KNOWN.items()
        if (root / name.partition("/")[0]).is_dir()
    }
    own = {
        file.parent.relative_to(root).as_posix(): file.parent
        for pattern in ("*/fixed.*", "*/*/fixed.*")
        for file in sorted(root.glob(pattern))
        if file.relative_to(root).parts[0] not in groups
    }
    names = [*found, *own]
    if not names:
        hint = " Give the folder above it." if any(root.glob("fixed.*")) else ""
        raise ValueError(
            f"{root} holds no case: expected folders with a fixed and a moving image, "
            f"or one of {', '.join(groups)}.{hint}"
        )
    if cases is not None:
        chosen = []
        for case in (case.rstrip("/") for case in cases):
            members = [n for n in names if n == case or n.startswith(case + "/")]
            if not members:
                raise ValueError(f"no case {case!r}: there are {', '.join(names)}.")
            chosen += members
        names = list(dict.fromkeys(chosen))
    for name in set(names) & set(own):
        found[name] = partial(_read_folder, name, _scan_folder(own[name]))
    return {name: found[name] for name in names}


# --- anyone's own pairs -------------------------------------------------------------


def _scan_folder(folder: Path) -> dict[str, Any]:
    """Return what a case folder holds, by the names of Pair; images stay paths."""
    found: dict[str, Any] = {"modality": None}
    for stem in ("fixed", "moving", *(f"{s}_{k}" for s in SIDES for k in IMAGES)):
        files = sorted(folder.glob(f"{stem}.*"))
        headers = [f for f in files if not f.name.lower().endswith(DATA_FILES)]
        if len(headers) > 1:
            names = ", ".join(file.name for file in headers)
            raise ValueError(f"{folder} holds several files for {stem}: {names}.")
        if stem in SIDES and not files:
            raise ValueError(f"{folder} holds no {stem} image ({stem}.nii.gz, say).")
        if files:
            found[stem] = [*headers, files[0]][0]
    for side in SIDES:
        if (path := folder / f"{side}_landmarks.csv").exists():
            found[f"{side}_points"] = read_landmarks(path)
    for kind in ("points", "labels"):
        present = [f"{side}_{kind}" for side in SIDES if f"{side}_{kind}" in found]
        if len(present) == 1:
            raise ValueError(f"{folder} holds {present[0]} for one image only.")
    if "fixed_points" in found:
        shapes = [found[f"{side}_points"].shape for side in SIDES]
        if shapes[0] != shapes[1]:
            counts = " and ".join(f"{n} points in {d}D" for n, d in shapes)
            raise ValueError(
                f"{folder}: fixed_landmarks.csv and moving_landmarks.csv must "
                f"correspond row by row, but hold {counts}."
            )
    if (path := folder / "case.json").exists():
        try:
            found["modality"] = json.loads(path.read_text("utf-8"))["modality"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} must be like {{"modality": "ct"}}.') from error
        if found["modality"] not in ("ct", "mri", None):
            raise ValueError(f'{path}: modality must be "ct", "mri" or null.')
    return found


IMAGES = {"mask": read_mask, "labels": read_labels}


def _read_folder(name: str, found: dict[str, Any]) -> Pair:
    parts = dict(found)
    for side in SIDES:
        path = found[side]
        parts[side] = image = read_image(path)
        for kind, read in IMAGES.items():
            if f"{side}_{kind}" in found:
                parts[f"{side}_{kind}"] = read(found[f"{side}_{kind}"])
        points, dimension = found.get(f"{side}_points"), image.GetImageDimension()
        if points is None:
            continue
        if points.shape[1] != dimension:
            raise ValueError(f"{path} is {dimension}D, its points {points.shape[1]}D.")
        index = to_index(image, points)
        inside = ((index >= -0.5) & (index <= geometry(image)[2] - 0.5)).all(axis=1)
        if inside.mean() < 0.5:
            raise ValueError(
                f"{np.sum(~inside)} of {len(points)} points lie outside {path}: they "
                "must be LPS mm as ITK gives them (RAS: change the sign of x and y)."
            )
    if "fixed_labels" in found:
        ids = _labels_in_both(parts["fixed_labels"], parts["moving_labels"])
        if not ids:
            raise ValueError(f"{name}: the two label maps share no positive label.")
        parts["label_ids"] = ids
    return Pair(name, **parts)


def _labels_in_both(fixed: Any, moving: Any, above: int = 0) -> tuple[int, ...]:
    """Return the positive labels with more than ``above`` voxels in both maps."""
    found = []
    for image in (fixed, moving):
        ids, counts = np.unique(array_of(image), return_counts=True)
        found.append({int(i) for i in ids[(ids > 0) & (counts > above)]})
    return tuple(sorted(found[0] & found[1]))


def _text_points(path: Path, header_rows: int, separator: str | None) -> np.ndarray:
    try:
        return np.loadtxt(path, skiprows=header_rows, delimiter=separator, ndmin=2)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as points.") from error


# --- the known cases ----------------------------------------------------------------


def _lung_elastix(folder: Path, name: str) -> Pair:
    parts: dict[str, Any] = {}
    for side, file in (("fixed", "baseline"), ("moving", "followup")):
        parts[side] = read_image(folder / f"3DCT_lung_{file}.mha")
        voxels = array_of(parts[side])
        np.maximum(voxels, -1024, out=voxels)  # -2048 marks voxels outside the cone
        parts[f"{side}_mask"] = read_mask(folder / f"3DCT_lung_{file}_mask.mha")
        path = folder / f"CT_3D_lung_{side}_point_set_corrected.txt"
        parts[f"{side}_points"] = _text_points(path, 2, None)
    return Pair(name, modality="ct", **parts)


def _lung_semireal(folder: Path, name: str) -> Pair:
    folder = folder / name.partition("/")[2]
    points = _text_points(folder / "landmarks_dense500.csv", 1, ",")
    return Pair(
        name,
        fixed=read_image(folder / "fixed.nii.gz"),
        moving=read_image(folder / "moving_realistic.nii.gz"),
        modality="ct",
        fixed_mask=read_mask(folder / "fixed_mask.nii.gz"),
        moving_mask=read_mask(folder / "moving_mask.nii.gz"),
        fixed_points=points[:, :3],
        moving_points=points[:, 3:],
    )


def _abdomen(folder: Path, name: str) -> Pair:
    cycle = name.partition("/")[2]
    fixed = read_image(folder / "exhMaster_unmasked.force_direction.mha")
    moving = read_image(folder / f"{cycle}.force_direction.mha")
    moving.SetSpacing(fixed.GetSpacing())  # the header of cyc_1_10 says 5 mm for 4
    points = {}
    for side, stem in (("fixed", "exhMaster"), ("moving", cycle)):
        files = [folder / f"{stem}LM{part}.vtk" for part in ("liver", "outside")]
        points[f"{side}_points"] = np.concatenate([_vtk_points(f) for f in files])
    return Pair(name, fixed, moving, modality="mri", **points)


def _vtk_points(path: Path) -> np.ndarray:
    text = path.read_text("utf-8") if path.is_file() else ""
    match = re.search(r"^POINTS (\d+) \w+$", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"{path} is not a VTK file of points.")
    values = text[match.end() :].split()[: 3 * int(match[1])]
    return np.array(values, dtype=float).reshape(-1, 3)


def _freesurfer(folder: Path, name: str) -> Pair:
    """Return both people on the fixed grid: the supplied affine is applied here."""
    import itk

    parts: dict[str, Any] = {}
    try:
        with np.load(folder / "test_scan.npz") as scan:  # arrays with x first
            parts["fixed"] = image_from(scan["vol"].T.astype(np.float32))
            ids = scan["seg"].T
        one_hot = array_of(itk.imread(str(folder / "image_A_seg35_onehot.nii.gz")))
        affine = np.loadtxt(folder / "prealign_affine.txt")  # fixed to moving voxels
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
    labels = np.zeros(ids.shape, np.int16)
    moving_labels = np.zeros(one_hot.shape[1:], np.int16)
    for number, members in enumerate(FREESURFER_STRUCTURES, start=1):
        labels[np.isin(ids, members)] = number
        moving_labels[one_hot[number - 1] > 0] = number
    parts["fixed_labels"] = image_from(labels)
    moving = array_of(read_image(folder / "image_A.nii.gz"))  # the header is left out
    transform = itk.AffineTransform[itk.D, 3].New()
    transform.SetMatrix(itk.matrix_from_array(affine[:, :3].copy()))
    transform.SetTranslation(affine[:, 3].tolist())
    for key, array, scheme in (
        ("moving", moving, itk.LinearInterpolateImageFunction),
        ("moving_labels", moving_labels, itk.NearestNeighborInterpolateImageFunction),
    ):
        image = image_from(array)
        parts[key] = itk.resample_image_filter(
            image,
            transform=transform,
            interpolator=scheme.New(image),
            use_reference_image=True,
            reference_image=parts["fixed"],
        )
    structures = tuple(range(1, len(FREESURFER_STRUCTURES) + 1))
    return Pair(name, modality="mri", label_ids=structures, **parts)


def _people(name: str) -> dict[str, str]:
    """Return who is on which side of the case ``group/A-B``: A moves."""
    return dict(zip(("moving", "fixed"), name.split("/")[1].split("-"), strict=True))


def _hippocampus(folder: Path, name: str) -> Pair:
    """Return two crops centred in boxes of 64 voxels: their origins mean nothing."""

    def box(image: Any) -> Any:
        array = array_of(image)
        filled = np.zeros((64, 64, 64), array.dtype)
        filled[tuple(slice((64 - n) // 2, (64 + n) // 2) for n in array.shape)] = array
        return image_from(filled)

    parts: dict[str, Any] = {}
    for side, person in _people(name).items():
        file = f"hippocampus_{person}.nii.gz"
        parts[side] = box(read_image(folder / "images" / file))
        parts[f"{side}_labels"] = box(read_labels(folder / "labels" / file))
    return Pair(name, modality="mri", label_ids=(1, 2), **parts)


def _brain_slices(folder: Path, name: str) -> Pair:
    parts: dict[str, Any] = {}
    for side, person in _people(name).items():
        stem = f"OASIS-TRT-20-{person}"
        parts[side] = read_image(folder / f"{stem}_slice118.nii.gz")
        labels = read_labels(folder / f"{stem}_DKT31_CMA_labels_slice118.nii.gz")
        parts[f"{side}_labels"] = labels
    ids = _labels_in_both(parts["fixed_labels"], parts["moving_labels"], above=50)
    return Pair(name, modality="mri", label_ids=ids, **parts)


def _histology(folder: Path, name: str) -> Pair:
    """Return two stains as grey images of 1 mm pixels at origin 0."""
    parts: dict[str, Any] = {}
    for side, stain in (("fixed", "HE"), ("moving", "proSPC")):
        stem = folder / f"Izd2-29-041-w35_{stain}"
        image = read_image(stem.with_suffix(".jpg"))
        parts[side] = image_from(array_of(image))  # the header's spacing is left out
        parts[f"{side}_points"] = _text_points(stem.with_suffix(".csv"), 1, ",")[:, 1:]
    return Pair(name, **parts)


KNOWN: dict[str, Callable[[Path, str], Pair]] = {
    "lung3d_elastix": _lung_elastix,
    "lung3d_semireal/deep": _lung_semireal,
    "lung3d_semireal/followup": _lung_semireal,
    "abdomen3d_eth4dmri_18/cyc_1_10": _abdomen,
    "abdomen3d_eth4dmri_18/cyc_3_10": _abdomen,
    "brain3d_freesurfer13": _freesurfer,
    **{
        f"brain3d_hippocampus/{people}": _hippocampus
        for people in ("003-004", "006-007", "008-011")
    },
    **{
        f"brain2d_oasistrt/{people}": _brain_slices
        for people in ("1-2", "3-4", "5-6", "7-8", "9-10")
    },
    "histology2d_lesions": _histology,
}
