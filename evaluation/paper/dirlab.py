"""Readers of DIR-Lab's lungs and of folders of label maps, and DIR-Lab's protocol.

COPDgene and 4DCT come as raw volumes (int16, little endian, x fastest) and text files
of 300 landmarks in voxels that count from 1. Their places here are (voxel - 1) *
spacing in LPS mm with identity directions: a frame of its own, equal for both images.
No data come with this project.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import (
    Case,
    geometry,
    image_from,
    read_image,
    read_labels,
    to_index,
    to_physical,
)
from icon_nephi.commands.cases import shared_labels
from icon_nephi.io.itk_transforms import read_transform
from icon_nephi.registration.itk_pair import ItkPair
from icon_nephi.report.metrics import landmark_summary

# Voxels (x, y, z) and the spacing in x and y; in z it is 2.5 mm everywhere.
THICKNESS = 2.5
COPD = {
    number: ((512, 512, slices), spacing)
    for number, (slices, spacing) in enumerate(
        (
            *((121, 0.625), (102, 0.645), (126, 0.652), (126, 0.590), (131, 0.647)),
            *((119, 0.633), (112, 0.625), (115, 0.586), (116, 0.664), (135, 0.742)),
        ),
        start=1,
    )
}
FOURD = {
    number: ((side, side, slices), spacing)
    for number, (side, slices, spacing) in enumerate(
        (
            *((256, 94, 0.97), (256, 112, 1.16), (256, 104, 1.15), (256, 99, 1.13)),
            *((256, 106, 1.10), (512, 128, 0.97), (512, 136, 0.97), (512, 128, 0.97)),
            *((512, 128, 0.97), (512, 120, 0.97)),
        ),
        start=1,
    )
}
# File names below a case's folder, wherever it lies, in any case of letters; the
# first that is found counts.
COPD_FILES = {
    "exhale": ("copd{n}_eBHCT.img",),
    "inhale": ("copd{n}_iBHCT.img",),
    "exhale points": ("copd{n}_300_eBH_xyz_r1.txt",),
    "inhale points": ("copd{n}_300_iBH_xyz_r1.txt",),
}
FOURD_FILES = {
    "inhale": ("case{n}_T00_s.img", "case{n}_T00-ssm.img", "case{n}_T00.img"),
    "exhale": ("case{n}_T50_s.img", "case{n}_T50-ssm.img", "case{n}_T50.img"),
    "inhale points": ("case{n}_300_T00_xyz.txt", "case{n}_dirLab300_T00_xyz.txt"),
    "exhale points": ("case{n}_300_T50_xyz.txt", "case{n}_dirLab300_T50_xyz.txt"),
}
SETS = {"copd": (COPD, COPD_FILES), "4dct": (FOURD, FOURD_FILES)}
LANDMARKS = 300
OFFSET = 1024  # stored value - OFFSET = Hounsfield units, where none is below it


def read_raw(path: Path, size: tuple[int, int, int], spacing: float) -> Any:
    """Return an ITK image in Hounsfield units of a raw volume.

    Values from 0 on are taken as Hounsfield units + 1024; with values far below 0 (as
    outside the scanner's circle in some cases) the 0.1th percentile of the rest counts.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    expected, there = 2 * int(np.prod(size)), path.stat().st_size
    if there != expected:
        shape = " x ".join(map(str, size))
        raise ValueError(f"{path} has {there} bytes; {shape} of int16 are {expected}.")
    values = np.fromfile(path, "<i2").reshape(size[::-1]).astype(np.float32)
    usual = values[values > -1500]
    if usual.size and np.percentile(usual[:: max(1, usual.size // 10**6)], 0.1) > -500:
        values -= OFFSET
    np.maximum(values, -1024, out=values)
    image = image_from(values)
    image.SetSpacing([spacing, spacing, THICKNESS])
    return image


def read_points(path: Path, image: Any, count: int | None = LANDMARKS) -> np.ndarray:
    """Return ``[N, 3]`` LPS mm of a text file of voxels that count from 1."""
    try:
        voxels = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as rows of x, y and z.") from error
    if voxels.shape[1] != 3 or (count is not None and len(voxels) != count):
        raise ValueError(f"{path} must hold {count or 'some'} rows of x, y and z.")
    origin, matrix, size = geometry(image)
    if (voxels < 1).any() or (voxels > size).any():
        raise ValueError(
            f"{path} has voxels outside 1 to {' x '.join(str(n) for n in size)}."
        )
    return (voxels - 1) @ matrix.T + origin


def find_file(root: Path, names: Iterable[str], number: int) -> Path:
    """Return the first file below a folder that has one of the names."""
    wanted = [name.format(n=number).lower() for name in names]
    there = {path.name.lower(): path for path in sorted(root.rglob("*"))}
    for name in wanted:
        if name in there:
            return there[name]
    raise ValueError(f"{root} holds no {' or '.join(wanted)}, at any depth.")


def find_dirlab(
    root: Path, kind: str, numbers: Iterable[int] | None = None, fixed: str = "exhale"
) -> dict[str, Callable[[], Case]]:
    """Return the reader of each case by name; ValueError where files are missing.

    Args:
        root: Folder with the unpacked archives.
        kind: "copd" or "4dct".
        numbers: Cases, 1 to 10; None means those whose fixed image is there.
        fixed: "exhale" (the default) or "inhale".
    """
    sizes, files = SETS[kind]
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder.")
    found, moving = {}, "inhale" if fixed == "exhale" else "exhale"
    for number in numbers or sizes:
        if number not in sizes:
            raise ValueError(f"there is no case {number} of {kind}: 1 to 10.")
        try:
            paths = {key: find_file(root, n, number) for key, n in files.items()}
        except ValueError:
            if numbers:
                raise
            continue
        name = f"{kind}{number}"
        found[name] = partial(read_dirlab, paths, name, *sizes[number], fixed, moving)
    if not found:
        raise ValueError(f"{root} holds no whole case of {kind}.")
    return found


def read_dirlab(
    paths: dict[str, Path],
    name: str,
    size: tuple[int, int, int],
    spacing: float,
    fixed: str,
    moving: str,
) -> Case:
    images = {phase: read_raw(paths[phase], size, spacing) for phase in (fixed, moving)}
    points = {p: read_points(paths[f"{p} points"], i) for p, i in images.items()}
    return Case(
        name,
        images[fixed],
        images[moving],
        modality="ct",
        fixed_points=points[fixed],
        moving_points=points[moving],
    )


# --- people with label maps ---------------------------------------------------------


def find_people(
    root: Path, pairs: int | None = None, labels: Iterable[int] | None = None
) -> dict[str, Callable[[], Case]]:
    """Return readers of pairs of people: each with the next, the last with the first.

    The folder has ``images/NAME.nii.gz`` and ``labels/NAME.nii.gz`` (HCP and OASIS as
    they are commonly passed on: aligned affinely, one grid), or a folder for each
    person with ``image.nii.gz`` (OASIS: ``aligned_norm.nii.gz``) and
    ``labels.nii.gz`` (``aligned_seg35.nii.gz``).

    Args:
        root: See above.
        pairs: At most as many.
        labels: Those to score; None means all that both have.
    """
    people = {
        path.name: (path, root / "labels" / path.name)
        for path in sorted((root / "images").glob("[!.]*.nii.gz"))
    }
    for image, label in (("image", "labels"), ("aligned_norm", "aligned_seg35")):
        for path in sorted(root.glob(f"*/{image}.nii.gz")):
            people[path.parent.name] = path, path.with_name(f"{label}.nii.gz")
    if len(people) < 2:
        raise ValueError(f"{root} holds no two people with images and label maps.")
    for _, label in people.values():
        if not label.is_file():
            raise ValueError(f"{label} does not exist.")
    names = list(people)
    order = list(zip(names, [*names[1:], names[0]], strict=True))[:pairs]
    wanted = None if labels is None else tuple(labels)
    return {
        f"{a.removesuffix('.nii.gz')}-{b.removesuffix('.nii.gz')}": partial(
            read_people, f"{a}-{b}", people[a], people[b], wanted
        )
        for a, b in order
    }


def read_people(
    name: str,
    moving: tuple[Path, Path],
    fixed: tuple[Path, Path],
    labels: tuple[int, ...] | None,
) -> Case:
    maps = {s: read_labels(p[1]) for s, p in (("moving", moving), ("fixed", fixed))}
    ids = shared_labels(**maps)
    return Case(
        name,
        read_image(fixed[0]),
        read_image(moving[0]),
        modality="mri",
        fixed_labels=maps["fixed"],
        moving_labels=maps["moving"],
        label_ids=ids if labels is None else tuple(i for i in labels if i in ids),
    )


# --- the protocol, and transforms of other programs ---------------------------------


def landmark_errors(pair: Any, moved: np.ndarray) -> dict[str, float]:
    """Return the mean errors in mm: interpolated, and snapped to the moving voxels.

    DIR-Lab's own figures move each point to the nearest voxel centre first.
    """
    snapped = to_physical(pair.moving, np.rint(to_index(pair.moving, moved)))
    return {
        key: landmark_summary(points, pair.moving_points)["mean"]
        for key, points in (("tre_mm", moved), ("tre_snapped_mm", snapped))
    }


def read_mover(path: Path, dimension: int = 3) -> Callable[[np.ndarray], np.ndarray]:
    """Return the map ``[N, d]`` -> ``[N, d]`` (LPS mm, fixed to moving) of a file.

    An ITK transform (.h5, .hdf5, .tfm, .txt, .mat) or a displacement field
    (.nii.gz, .nii, .mha, .nrrd) in the convention of ITK: vectors in LPS mm at the
    voxels of the fixed image. Outside the field nothing moves.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    if not path.name.lower().endswith((".h5", ".hdf5", ".tfm", ".txt", ".mat")):
        return _read_field(path, dimension)
    transform = read_transform("transform", path)
    if transform.GetInputSpaceDimension() != dimension:
        raise ValueError(f"{path} is not {dimension}D.")

    return ItkPair(transform).transform_points


def _read_field(path: Path, dimension: int) -> Callable[[np.ndarray], np.ndarray]:
    import itk
    from scipy.ndimage import map_coordinates

    try:
        field = itk.imread(str(path))
    except Exception as error:  # ITK raises RuntimeError, AttributeError and others
        raise ValueError(f"{path} cannot be read as a field.") from error
    vectors = np.asarray(field)  # [z, y, x, components]
    if vectors.shape[dimension:] != (dimension,):
        raise ValueError(
            f"{path} must hold {dimension}D vectors at {dimension}D voxels."
        )
    last = geometry(field)[2] - 1

    def move(points: np.ndarray) -> np.ndarray:
        index = to_index(field, np.asarray(points, float))
        inside = ((index >= -0.5) & (index <= last + 0.5)).all(1)
        at = index[:, ::-1].T
        read = [
            map_coordinates(vectors[..., c], at, float, order=1, mode="nearest")
            for c in range(dimension)
        ]
        return points + np.stack(read, 1) * inside[:, None]

    return move


def find_external(folder: Path, case: str) -> Path:
    """Return the file of a case in a folder of another program's results."""
    files = sorted(f for f in folder.glob(f"{case}.*") if f.is_file())
    if len(files) != 1:
        raise ValueError(f"{folder} must hold one file {case}.*, not {len(files)}.")
    return files[0]
