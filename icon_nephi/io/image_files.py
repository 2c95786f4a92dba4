"""Image files and ITK: read whole or refused, written where a format can hold them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import itk
import numpy as np
import numpy.typing as npt

from icon_nephi._memory import machine_memory
from icon_nephi.io import itk_modules
from icon_nephi.io.atomic import ending_of
from icon_nephi.io.complete import check_complete
from icon_nephi.io.dicom import read_series
from icon_nephi.io.itk_images import (
    EXACT,
    array_of,
    check_itk_image,
    geometry_of,
    image_of,
    no_stderr,
    read_header,
)
from icon_nephi.io.itk_modules import PIXELS, itk_class, read_voxels, write_voxels
from icon_nephi.io.nifti import ENDINGS, NiftiFile, find_nifti
from icon_nephi.space.frames import Array, Geometry

# Of a voxel: what a header may place its last voxel off without a word, and what is
# straightened; a header that is farther from straight axes is taken as it is.
_QUIET, _STRAIGHTENED = 0.01, 0.5
# What a format may place the last voxel off, in voxels: rounding of its numbers.
_HELD = 0.05
_PICTURES = (".tif", ".tiff", ".png")
# Of ITK's types of whole numbers those of which its Python has no images, and those
# that may be too large for float64.
_UNKNOWN = ("char", "long", "long_long")
_WIDE = (*_UNKNOWN, "unsigned_long", "unsigned_long_long")


def read_image(
    name: str,
    path: str | os.PathLike[str],
    *,
    as_float: bool = False,
    components: bool = False,
    said: list[str] | None = None,
) -> Any:
    """Return a 2D or 3D image from a file, or from a folder with a DICOM series.

    Args:
        name: of the argument, for errors.
        path: of the file; no other is read, whatever lies beside it.
        as_float: voxels as float32, and colours of a 2D image as grey; else as they
            are stored, or in a type that holds their numbers.
        components: several numbers a voxel are welcome (``[*grid, C]``).
        said: takes a sentence where the header is not taken as it is.

    Raises:
        ValueError: missing, unreadable or truncated file, or one that
            `check_itk_image` refuses; the sentence names the argument and the path.
    """
    path = Path(path)
    where = f"{name}: {path}"
    if not path.exists():
        raise ValueError(f"{where} does not exist")
    notes: list[str] = []
    try:
        with no_stderr():
            if path.is_dir():
                image = read_series(path)
            else:
                image = _read_file(
                    path, as_float=as_float, components=components, notes=notes
                )
    except (ValueError, MemoryError) as error:
        raise ValueError(f"{where} {error}") from error
    except Exception as error:  # ITK raises RuntimeError, AttributeError, KeyError...
        reason = _reason_of(error)
        raise ValueError(f"{where} cannot be read as an image{reason}") from error
    check_itk_image(where, image, components=components)
    if said is not None:
        said += [f"{where} {note}" for note in notes]
    return image


def _read_file(
    path: Path, *, as_float: bool, components: bool, notes: list[str]
) -> Any:
    """Return the image of a file, whatever it holds; nothing is missing in it."""
    with plain_name(path) as named:
        nifti = find_nifti(path) if _ends(path, ENDINGS) else None
        if nifti is not None:
            _check_memory(nifti.bytes_of_voxels)
            values = nifti.read()
            place = _place_of_nifti(nifti, notes)
            return image_of(values.astype(np.float32) if as_float else values, place)
        header = read_header(named)
        d, parts = header.GetNumberOfDimensions(), header.GetNumberOfComponents()
        if d not in (2, 3):
            raise ValueError(
                f"is {d}D, expected one 2D or 3D image; take one frame of a series "
                "(of a segmentation in layers: export its segments to one label map)"
            )
        _check_memory(int(header.GetImageSizeInBytes()))
        check_complete(path, header)
        grey = as_float and d == 2 < parts < 5  # of vectors ITK reads nonsense
        if parts > 1 and not (grey or components):
            raise ValueError(
                f"has {parts} numbers per voxel, expected one; take one component, or "
                "convert colours to grey (a segmentation in layers: export its "
                "segments to one label map)"
            )
        kind = header.GetComponentTypeAsString(header.GetComponentType())
        wanted = "float" if as_float else "double" if kind in _UNKNOWN else kind
        if parts == 1 and wanted in PIXELS and kind not in _WIDE:
            return read_voxels(named, header, wanted, d)
        if as_float and (grey or parts == 1):
            return itk.imread(str(named), itk.F)
        if parts > 1:
            return _read_components(named, kind)
        image = itk.imread(str(named), itk.D if kind in _UNKNOWN else None)
        if kind not in _WIDE:
            return image
        values = array_of(image)
        if np.abs(values.astype(np.float64)).max(initial=0) >= EXACT:
            raise ValueError(
                "holds whole numbers of 2^53 and more, which cannot be told apart; "
                "number its labels anew, below 2^53"
            )
        return image_of(values.astype(np.int64), geometry_of(image))


def _read_components(path: Path, kind: str) -> Any:
    """Return an image of several numbers a voxel, in the nearest type there is."""
    try:
        return itk.imread(str(path))
    except (KeyError, RuntimeError, AttributeError, TypeError):
        types = {"unsigned_char": itk.UC, "short": itk.SS, "unsigned_short": itk.US}
        types |= {"float": itk.F}
        return itk.imread(str(path), itk.VariableLengthVector[types.get(kind, itk.D)])


def _check_memory(least: int) -> None:
    if least > machine_memory():
        raise ValueError(
            f"is said to hold {least / 2**30:.0f} GiB, more than this machine's "
            "memory; is its header damaged? (icon_nephi.volumes reads in parts)"
        )


def _reason_of(error: Exception) -> str:
    """Return what a reader complained of, in brackets, or nothing."""
    if not isinstance(error, RuntimeError):
        return ""
    lines = [line for line in str(error).splitlines() if line.strip()]
    said = re.sub(
        r"^.*ERROR:\s*(\w+\(0x[0-9a-f]+\):)?\s*", "", lines[-1] if lines else ""
    )
    return f" ({said.strip()[:200]})" if said.strip() else ""


def _place_of_nifti(nifti: NiftiFile, notes: list[str]) -> Geometry:
    """Return where a NIfTI image lies: what ITK makes of its header, if it can.

    Axes that are almost at right angles are straightened, as everybody's are; those
    that are not stay as the header says (ITK would turn them to where no voxel lies).
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "place.nii"
        path.write_bytes(nifti.placing())
        try:
            place, straight = _told_place(path, nifti.size), True
        except RuntimeError:
            try:
                place, straight = _told_place(path, nifti.size, permissive=True), False
            except RuntimeError:
                if len(nifti.size) == 2:
                    notes.append(
                        "lies in no plane of x and y: its coordinates are millimetres "
                        "along its own axes"
                    )
                    return _own_plane(nifti)
                raise
    rows = nifti.rows
    if rows is None or len(nifti.size) == 2:
        return place
    told = _place_of_rows(rows, nifti)
    if told is None:
        return place
    off = _farthest(place, told)
    if not straight and off > _STRAIGHTENED:
        notes.append(
            "has axes that are not at right angles (a tilted gantry?); they are kept, "
            "and only .nrrd and .mha hold them"
        )
        return told
    if off > _STRAIGHTENED:
        notes.append(
            f"has two places in its header, up to {off:.3g} voxels apart (qform and "
            "sform); the one that ITK takes is used"
        )
    elif not straight and off > _QUIET:
        notes.append(
            "has axes that are not quite at right angles; they were straightened, by "
            f"up to {off:.2g} voxels"
        )
    return place


def _told_place(
    path: Path, size: tuple[int, ...], *, permissive: bool = False
) -> Geometry:
    """Return where ITK reads that a NIfTI file lies."""
    header = itk_class("NiftiImageIO", "").New()
    header.SetSFORM_Permissive(permissive)
    header.SetFileName(str(path))
    header.ReadImageInformation()
    axes = range(len(size))
    columns = [[float(header.GetDirection(a)[b]) for b in axes] for a in axes]
    if abs(np.linalg.det(columns)) < 1e-6:
        raise RuntimeError("its axes lie in one plane")
    return Geometry(
        size=size,
        spacing=tuple(float(header.GetSpacing(a)) for a in axes),
        origin=tuple(float(header.GetOrigin(a)) for a in axes),
        direction=tuple(zip(*columns, strict=True)),
    )


def _place_of_rows(rows: Array, nifti: NiftiFile) -> Geometry | None:
    """Return the place that the rows of a header say, LPS mm; None: no place."""
    unit = {1: 1000.0, 3: 0.001}.get(int(nifti.fields["units"][0]) & 7, 1.0)
    matrix = np.diag([-unit, -unit, unit]) @ rows
    spacing = np.linalg.norm(matrix[:, :3], axis=0)
    if not (np.isfinite(matrix).all() and (spacing > 0).all()):
        return None
    direction = matrix[:, :3] / spacing
    frame = tuple(spacing.tolist()), tuple(matrix[:, 3].tolist())
    return Geometry(nifti.size, *frame, tuple(map(tuple, direction.tolist())))


def _own_plane(nifti: NiftiFile) -> Geometry:
    """Return the place of a 2D image whose plane is not that of x and y: its own."""
    unit = {1: 1000.0, 3: 0.001}.get(int(nifti.fields["units"][0]) & 7, 1.0)
    rows, steps = nifti.rows, np.abs(np.array(nifti.fields["pixdim"][1:3])) * unit
    start = np.zeros(2)
    if rows is not None and np.isfinite(rows).all():
        lengths = np.linalg.norm(rows[:, :2], axis=0)
        if (lengths > 0).all():
            steps, start = lengths * unit, (rows[:, :2] / lengths).T @ rows[:, 3] * unit
    frame = tuple(steps.tolist()), tuple(start.tolist())
    return Geometry(nifti.size, *frame, ((1.0, 0.0), (0.0, 1.0)))


def _farthest(place: Geometry, other: Geometry) -> float:
    """Return how far apart two places put a corner of one grid, in voxels."""
    d = place.dimension
    corners = np.array(list(product((0.0, 1.0), repeat=d)))
    frames = (p.unit_to_physical().numpy() for p in (place, other))
    first, second = (corners @ f[:d, :d].T + f[:d, d] for f in frames)
    apart = np.linalg.norm(first - second, axis=1).max()
    return float(apart / min(place.spacing))


def _ends(path: Path, endings: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(endings)


@contextmanager
def plain_name(path: Path) -> Iterator[Path]:
    """Give a path to the same file by which ITK knows its format.

    Its readers take capitals for another format and ``x.img.nii.gz`` for two files. A
    header with a file of voxels beside it keeps its name, which these refer to.
    """
    ending = ending_of(path)
    linked = path.name.endswith(ending) and not re.search(r"\.(img|hdr)\.", path.name)
    if linked or ending in (".hdr", ".img", ".mhd", ".nhdr") or not ending:
        yield path
        return
    with TemporaryDirectory() as folder:
        link = Path(folder) / f"image{ending}"
        try:
            link.symlink_to(path.resolve())
        except OSError:  # of a system without links
            shutil.copyfile(path, link)
        yield link


def write_image(image: Any, path: Path) -> None:
    """Write an ITK image, compressed.

    Raises:
        ValueError: its format cannot hold it.
    """
    try:
        itk_modules.write_voxels(image, path)
    except RuntimeError as error:
        raise ValueError(
            f"a {path.suffix} file could not be written: it cannot hold such an image, "
            "or the disk is full"
        ) from error


def check_holds(
    name: str,
    path: Path,
    place: Geometry,
    kind: npt.DTypeLike = np.float32,
    components: int | None = None,
    said: list[str] | None = None,
) -> None:
    """Raise unless the format of a path can hold an image: tried with a tiny one.

    Of plain pictures in 2D only pixels are expected.

    Args:
        name: of the argument, for errors.
        path: what is to be written.
        place: of the image.
        kind: of its numbers.
        components: numbers a voxel, None: one.
        said: takes a sentence where a picture loses its origin or spacing.

    Raises:
        ValueError: its voxels would lie elsewhere, or it has no such numbers.
    """
    d, ending = place.dimension, ending_of(path)
    small = replace(place, size=(2,) * d)
    shape = small.size if components is None else (*small.size, components)
    advice = "choose " + (".nrrd, .mha or .nii.gz" if d == 3 else ".nrrd or .mha")
    with TemporaryDirectory() as folder, no_stderr():
        tried = Path(folder) / f"tried{ending}"
        try:
            write_voxels(image_of(np.zeros(shape, kind), small), tried)
            read = read_header(tried)
        except Exception as error:  # ITK raises RuntimeError, AttributeError, ...
            what = np.dtype(kind).name
            several = "" if components is None else f"{components} x "
            raise ValueError(
                f"{name}: {path}: a {ending} file cannot hold a {d}D image of {several}"
                f"{what}; {advice}"
            ) from error
        axes = range(min(d, int(read.GetNumberOfDimensions())))
        columns = [[float(read.GetDirection(a)[b]) for b in axes] for a in axes]
        held = replace(
            place,
            spacing=tuple(float(read.GetSpacing(a)) for a in axes),
            origin=tuple(float(read.GetOrigin(a)) for a in axes),
            direction=tuple(zip(*columns, strict=True)),
        )
    if len(axes) < d or _farthest(place, held) > _HELD:
        tilted = np.array(place.direction)
        picture = d == 2 and ending in _PICTURES
        if picture and np.allclose(tilted, np.eye(2), rtol=0, atol=1e-6):
            if said is not None:
                said.append(
                    f"{name}: {path}: a {ending} file holds pixels, not where they lie "
                    f"(origin, spacing); {advice} to keep that"
                )
            return
        why = "origin and direction"
        if np.abs(tilted.T @ tilted - np.eye(d)).max() > 1e-6:
            why, advice = "axes that are not at right angles", "choose .nrrd or .mha"
        raise ValueError(
            f"{name}: {path}: a {ending} file cannot hold where it lies ({why}): "
            f"its voxels would be elsewhere; {advice}"
        )
