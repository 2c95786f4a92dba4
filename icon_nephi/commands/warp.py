"""Images, label maps, points and meshes through registrations, as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from icon_nephi.commands.flags import WarpFlags
from icon_nephi.commands.inputs import in_words, read_chain, read_reference
from icon_nephi.commands.tasks import MODES, Task
from icon_nephi.io.atomic import written_whole
from icon_nephi.io.image_files import check_holds, read_image, write_image
from icon_nephi.io.image_input import voxels_of
from icon_nephi.io.itk_images import check_label_map, geometry_of
from icon_nephi.io.points import read_points
from icon_nephi.io.resampling import check_outside, type_of_result
from icon_nephi.io.tables import with_column
from icon_nephi.maps.two_way import direction_of, opposite
from icon_nephi.registration.chain import Chain
from icon_nephi.registration.itk_pair import ItkPair
from icon_nephi.registration.result import Registration
from icon_nephi.report.expected_error import error_estimate
from icon_nephi.space.frames import Geometry

# What a task's reading returns: writes its result, and says what it did.
_Write = Callable[[Path], str]


def warp_files(flags: WarpFlags, tasks: Sequence[Task]) -> tuple[str, list[str]]:
    """Write what is moved; return a text that says what was done, and warnings.

    Everything is read and checked before anything is moved, and all files appear
    together, or none.

    Raises:
        ValueError: files that cannot be used, or flags that do not go together.
    """
    mapping = read_chain(flags)
    if flags.errors and not isinstance(mapping, Registration):
        raise ValueError("--errors needs one .nephi file and --points in a .csv")
    warnings: list[str] = []
    reference = None
    if any(task.kind != "points" for task in tasks) or flags.reference is not None:
        reference = read_reference(flags.reference, mapping)
    ready = [_read(task, flags, mapping, reference, warnings) for task in tasks]
    text = []
    with written_whole(*(task.out for task in tasks)) as parts:
        each = list(zip(ready, parts, tasks, strict=True))
        quiet = flags.quiet or len(each) < 2
        for write, part, task in tqdm(each, "warping", disable=quiet, leave=False):
            text.append(f"{task.kind}: {write(part)}\nout: {task.out}")
    return "\n".join(text), warnings


def _read(
    task: Task,
    flags: WarpFlags,
    mapping: Registration | ItkPair | Chain,
    reference: Any,
    warnings: list[str],
) -> _Write:
    """Return what writes the result of a file that was read and can be written."""
    # An image comes from where its points are looked up, so it goes the other way.
    home = "moving" if task.kind == "points" else "fixed"
    inverse = flags.inverse if flags.to is None else flags.to != home
    direction = direction_of(inverse=inverse)
    if task.kind == "points":
        return _read_points(task, flags, mapping, reference, direction, warnings)
    name = f"--{task.kind}"
    colours = task.kind == "image"
    image = read_image(name, task.path, components=colours, said=warnings)
    if task.kind == "labels":
        image = check_label_map(f"{name}: {task.path}", image)
    modes = MODES[task.kind]
    mode = flags.interpolation if flags.interpolation in modes else modes[0]
    outside = 0.0 if task.kind == "labels" and flags.outside is None else flags.outside
    voxels = voxels_of(image)
    if outside is not None:
        check_outside(outside, voxels, mode)
    channels = voxels.shape[-1]
    place = _place_of(reference, mapping, direction)
    if place is not None and place.dimension == image.GetImageDimension():
        kind = type_of_result(voxels, mode)
        several = None if channels == 1 else channels
        check_holds("--out", task.out, place, kind, several, warnings)

    def write(part: Path) -> str:
        warped = mapping.warp(image, mode, reference, inverse=inverse, outside=outside)
        write_image(warped, part)
        return in_words(mapping, opposite(direction))

    return write


def _place_of(reference: Any, mapping: Any, direction: str) -> Geometry | None:
    """Return where the first image of a direction lies, or the reference."""
    if reference is not None:
        return geometry_of(reference)
    if isinstance(mapping, Registration):
        return mapping.two_way.place(direction)
    return mapping.place(direction) if isinstance(mapping, Chain) else None


def _read_points(
    task: Task,
    flags: WarpFlags,
    mapping: Registration | ItkPair | Chain,
    reference: Any,
    direction: str,
    warnings: list[str],
) -> _Write:
    file, dimension = read_points("--points", task.path, some=True), mapping.dimension
    file = file.flat() if dimension == 2 else file
    points = file.points
    if points.shape[1] != dimension:
        raise ValueError(
            f"points must be {dimension}D as the transform, but --points {task.path} "
            f"has {points.shape[1]} coordinates a point"
        )
    own = isinstance(mapping, Registration)
    side = direction.split("_")[0] if own else "reference"
    place = _place_of(None if own else reference, mapping, direction)
    if place is not None and place.dimension != dimension:
        raise ValueError("--reference and --transform have different dimensions")
    far = 0 if place is None else int(place.outside(points).sum())
    if far:
        warnings.append(
            f"{far} of {len(points)} points lie outside the {side} image, where "
            "nothing was registered; they must be LPS mm"
        )
    warnings += [f"{task.path}: {note}" for note in file.notes]

    def write(part: Path) -> str:
        content = file.moved(lambda p: mapping.transform_points(p, direction))
        if isinstance(mapping, Registration) and flags.errors:
            expected = error_estimate(mapping, points, (), direction)
            content = with_column(content, "expected_error_mm", expected)
        part.write_bytes(content)
        way = in_words(mapping, direction)
        return f"{way} ({len(points)} points, {file.frame} mm)"

    return write
