"""Image pairs with ground truth: the known benchmark cases and anyone's own folders.

Points are ITK physical coordinates (LPS, mm); a correct fixed-to-moving transform
takes ``fixed_points[n]`` to ``moving_points[n]``. Images are read when a pair is asked
for, not before. docs/evaluation.md describes the folder layout and every known case.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import itk
import numpy as np

from evaluation import Case, array_of, image_from, read_image, read_labels
from icon_nephi.commands.cases import (
    case_files,
    choose,
    list_cases,
    read_case,
    read_mask,
    shared_labels,
)
from icon_nephi.io.points import read_points

# Thirteen structures as groups of FreeSurfer ids, in the order of the moving file.
FREESURFER_STRUCTURES = (
    *((10, 49), (8, 47), (4, 43), (7, 46), (12, 51), (11, 50), (13, 52)),
    *((17, 53), (18, 54), (3, 42), (14,), (15,), (16,)),
)


def load_pairs(
    data_dir: str | Path, cases: Iterable[str] | None = None
) -> Iterator[Case]:
    """Return an iterator that reads one pair at a time: every case, or those named.

    A name may be that of a group, such as ``brain3d_hippocampus``.

    Raises:
        ValueError: At once for a wrong folder, an unknown case or a badly formed
            folder; for an image that cannot be read when its pair is asked for.
    """
    return (read() for read in find_cases(data_dir, cases).values())


def find_cases(
    data_dir: str | Path, cases: Iterable[str] | None = None
) -> dict[str, Callable[[], Case]]:
    """Return the reader of every case asked for, by name, without reading images."""
    root = Path(data_dir)
    groups = {name: name.partition("/")[0] for name in KNOWN}
    own = {
        name: folder
        for name, folder in list_cases(root).items()
        if name.partition("/")[0] not in groups.values()
    }
    readers: dict[str, Callable[[], Case]] = {
        name: partial(reader, root / groups[name], name)
        for name, reader in KNOWN.items()
        if (root / groups[name]).is_dir()
    } | {name: partial(read_case, folder, name) for name, folder in own.items()}
    if not readers:
        raise ValueError(
            f"{root} holds no case: expected folders with a fixed and a moving image, "
            f"or one of {', '.join(sorted(set(groups.values())))}."
        )
    chosen = choose(readers, cases)
    for name in own.keys() & set(chosen):
        case_files(own[name])
    return {name: readers[name] for name in chosen}


def _text_points(path: Path, header_rows: int, separator: str | None) -> np.ndarray:
    try:
        return np.loadtxt(path, skiprows=header_rows, delimiter=separator, ndmin=2)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as points.") from error


# --- the known cases ----------------------------------------------------------------


def _lung_elastix(folder: Path, name: str) -> Case:
    parts: dict[str, Any] = {}
    for side, file in (("fixed", "baseline"), ("moving", "followup")):
        parts[side] = read_image(folder / f"3DCT_lung_{file}.mha")
        voxels = itk.array_view_from_image(parts[side])
        np.maximum(voxels, -1024, out=voxels)  # -2048 marks voxels outside the cone
        parts[f"{side}_mask"] = read_mask("mask", folder / f"3DCT_lung_{file}_mask.mha")
        path = folder / f"CT_3D_lung_{side}_point_set_corrected.txt"
        parts[f"{side}_points"] = _text_points(path, 2, None)
    return Case(name, modality="ct", **parts)


def _lung_semireal(folder: Path, name: str) -> Case:
    folder = folder / name.partition("/")[2]
    points = _text_points(folder / "landmarks_dense500.csv", 1, ",")
    return Case(
        name,
        fixed=read_image(folder / "fixed.nii.gz"),
        moving=read_image(folder / "moving_realistic.nii.gz"),
        modality="ct",
        fixed_mask=read_mask("mask", folder / "fixed_mask.nii.gz"),
        moving_mask=read_mask("mask", folder / "moving_mask.nii.gz"),
        fixed_points=points[:, :3],
        moving_points=points[:, 3:],
    )


def _abdomen(folder: Path, name: str) -> Case:
    cycle = name.partition("/")[2]
    fixed = read_image(folder / "exhMaster_unmasked.force_direction.mha")
    moving = read_image(folder / f"{cycle}.force_direction.mha")
    moving.SetSpacing(fixed.GetSpacing())  # the header of cyc_1_10 says 5 mm for 4
    points = {}
    for side, stem in (("fixed", "exhMaster"), ("moving", cycle)):
        files = [folder / f"{stem}LM{part}.vtk" for part in ("liver", "outside")]
        points[f"{side}_points"] = np.concatenate(
            [read_points("landmarks", f).points for f in files]
        )
    return Case(name, fixed, moving, modality="mri", **points)


def _freesurfer(folder: Path, name: str) -> Case:
    """Return both people on the fixed grid: the supplied affine is applied here."""
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
    return Case(name, modality="mri", label_ids=structures, **parts)


def _people(name: str) -> dict[str, str]:
    """Return who is on which side of the case ``group/A-B``: A moves."""
    return dict(zip(("moving", "fixed"), name.split("/")[1].split("-"), strict=True))


def _hippocampus(folder: Path, name: str) -> Case:
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
    return Case(name, modality="mri", label_ids=(1, 2), **parts)


def _brain_slices(folder: Path, name: str) -> Case:
    parts: dict[str, Any] = {}
    for side, person in _people(name).items():
        stem = f"OASIS-TRT-20-{person}"
        parts[side] = read_image(folder / f"{stem}_slice118.nii.gz")
        labels = read_labels(folder / f"{stem}_DKT31_CMA_labels_slice118.nii.gz")
        parts[f"{side}_labels"] = labels
    ids = shared_labels(parts["fixed_labels"], parts["moving_labels"], above=50)
    return Case(name, modality="mri", label_ids=ids, **parts)


def _people_3d(folder: Path, name: str) -> Case:
    """Return two whole brains where their headers put them."""
    parts: dict[str, Any] = {}
    for side, person in _people(name).items():
        parts[side] = read_image(folder / f"{person}_SS.nii.gz")
        parts[f"{side}_labels"] = read_labels(folder / f"{person}_glm.nii.gz")
    ids = shared_labels(parts["fixed_labels"], parts["moving_labels"], above=50)
    return Case(name, modality="mri", label_ids=ids, **parts)


def _echo(folder: Path, name: str) -> Case:
    """Return two frames of one series, counted from 1; frame 5's labels are drawn."""
    parts: dict[str, Any] = {}
    like = read_image(folder / "seg05.nii.gz")
    try:
        frames, labels = (
            itk.array_from_image(itk.imread(str(folder / f"{stem}.nii.gz")))
            for stem in ("img4d", "seg4d_resliced")
        )
    except RuntimeError as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
    for side, number in _people(name).items():
        at = int(number) - 1
        parts[side] = image_from(frames[at].astype(np.float32), like)
        parts[f"{side}_labels"] = image_from(labels[at].astype(np.int16), like)
    ids = shared_labels(parts["fixed_labels"], parts["moving_labels"])
    return Case(name, label_ids=ids, **parts)


def _histology(folder: Path, name: str) -> Case:
    """Return two stains as grey images of 1 mm pixels at origin 0."""
    parts: dict[str, Any] = {}
    for side, stain in (("fixed", "HE"), ("moving", "proSPC")):
        stem = folder / f"Izd2-29-041-w35_{stain}"
        image = read_image(stem.with_suffix(".jpg"))
        parts[side] = image_from(array_of(image))  # the header's spacing is left out
        parts[f"{side}_points"] = _text_points(stem.with_suffix(".csv"), 1, ",")[:, 1:]
    return Case(name, **parts)


KNOWN: dict[str, Callable[[Path, str], Case]] = {
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
    **{
        f"brain3d_people/{people}": _people_3d
        for people in ("1000-1001", "1002-1003", "1004-1005")
    },
    **{f"series_echo/{frame}-5": _echo for frame in (1, 2, 3, 4, 6, 7)},
}
