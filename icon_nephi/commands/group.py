"""Many images at once, as nephi-series and nephi-template ask for it."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from icon_nephi.commands.flags import IMAGES, POINTS, VECTORS
from icon_nephi.commands.group_flags import SeriesFlags, TemplateFlags
from icon_nephi.commands.outputs import check_outputs
from icon_nephi.fit.settings import EFFORTS, find_effort
from icon_nephi.io import itk_images
from icon_nephi.io.atomic import written_whole
from icon_nephi.io.image_files import read_image, write_image
from icon_nephi.io.itk_frames import write_frames
from icon_nephi.io.itk_transforms import write_transform
from icon_nephi.io.points import read_points
from icon_nephi.io.versions import versions
from icon_nephi.registration.group import build_template, register_series
from icon_nephi.registration.series import Series
from icon_nephi.registration.template import Template

OUTPUTS = {
    "save": (".nephi",),
    "report": (".html", ".htm"),
    "json": (".json",),
    "jacobians_out": VECTORS,
    "warped_out": VECTORS,
    "mean_out": IMAGES,
    "points_out": POINTS,
    "out": IMAGES,
    "labels_out": IMAGES,
}
FOLDERS = "transforms_out", "displacements_out"


def run_series(flags: SeriesFlags, command: str) -> dict[str, Any]:
    """Register a series, write every output, and return the summary.

    Raises:
        ValueError: what cannot be registered.
        OSError: what cannot be written.
    """
    outputs = _outputs(flags)
    if flags.periodic and flags.period is not None:
        raise ValueError("--periodic and --period do not go together: give one")
    if (flags.points is None) != (flags.points_out is None):
        raise ValueError("--points and --points_out belong together: give both")
    moving = None if flags.points is None else read_points("--points", flags.points)
    reference: str | int = flags.reference
    if flags.reference.isdecimal():
        reference = int(flags.reference)
    series = register_series(
        list(flags.images),
        reference,
        times=flags.times,
        periodic=flags.periodic if flags.period is None else flags.period,
        affine=True if flags.affine else None,
        **_choices(flags),
    )
    summary = _summary(series, command, outputs)
    step = float(np.diff(series.times).mean())
    writers: dict[str, Callable[[Path], Any]] = {
        "transforms_out": lambda folder: _write_transforms(series, folder),
        "displacements_out": lambda folder: _write_displacements(series, folder),
        "jacobians_out": lambda path: write_frames(
            series.jacobian_determinants(), path, step
        ),
        "warped_out": lambda path: write_frames(series.warped(), path, step),
        "mean_out": lambda path: _write(series.mean_image(), path),
        "points_out": lambda path: _write_points(series, moving, flags, path),
    }
    return _finish(series, summary, outputs, writers)


def run_template(flags: TemplateFlags, command: str) -> dict[str, Any]:
    """Build a template, write every output, and return the summary.

    Raises:
        ValueError: what cannot be registered.
        OSError: what cannot be written.
    """
    outputs = _outputs(flags)
    if (flags.labels is None) != (flags.labels_out is None):
        raise ValueError("--labels and --labels_out belong together: give both")
    if flags.labels is not None and len(flags.labels) != len(flags.images):
        raise ValueError(
            f"--labels are {len(flags.labels)} and --images {len(flags.images)}: give "
            "one for each, in the same order"
        )
    choices = _choices(flags) | {"affine": not flags.no_affine}
    template = build_template(list(flags.images), **choices)
    summary = _summary(template, command, outputs)
    writers: dict[str, Callable[[Path], Any]] = {
        "out": lambda path: _write(template.template, path),
        "labels_out": lambda path: _write(_fused(template, flags), path),
    }
    return _finish(template, summary, outputs, writers)


def _fused(template: Template, flags: TemplateFlags) -> Any:
    by_image = dict(zip(map(str, flags.images), flags.labels or (), strict=True))
    maps = []
    for name in template.names:
        image = read_image("--labels", by_image[name])
        maps.append(itk_images.check_label_map(f"--labels: {by_image[name]}", image))
    return template.fuse(maps)


def _choices(flags: SeriesFlags | TemplateFlags) -> dict[str, Any]:
    """Return what both functions take by the names that they have for it."""
    modality = None if flags.modality == "none" else flags.modality
    choices: dict[str, Any] = {
        name: getattr(flags, name)
        for name in (
            *("masks", "similarity", "seed", "device", "time_limit"),
            "keep_on_interrupt",
        )
    }
    choices |= {"modality": modality, "progress": not flags.quiet}
    if flags.save is not None:
        choices["checkpoint"] = flags.save.with_name(f"{flags.save.name}.begun")
    if flags.preset != "default" and flags.preset in EFFORTS:
        size = _size(flags.images[0])
        choices["field"] = find_effort(flags.preset, size, modality)
    return choices


def _size(path: Path) -> tuple[int, ...]:
    """Return the voxels of an image, of a 4D file those of a frame."""
    if not path.is_file():
        raise ValueError(f"--images: {path} does not exist or is not a file")
    header = itk_images.read_header(path)
    count = min(3, int(header.GetNumberOfDimensions()))
    return tuple(int(header.GetDimensions(axis)) for axis in range(count))


def _outputs(flags: SeriesFlags | TemplateFlags) -> dict[str, Path]:
    """Return the outputs asked for, each of which can be written.

    Raises:
        ValueError: one that cannot, none at all, or one over another or an input.
    """
    paths = {k: v for k, v in vars(flags).items() if isinstance(v, Path)}
    inputs = [*flags.images, *(flags.masks or ())]
    inputs += [*(getattr(flags, "labels", None) or ())]
    inputs += [p for p in (getattr(flags, "points", None),) if p is not None]
    named = {
        name: (paths[name], endings)
        for name, endings in OUTPUTS.items()
        if name in paths and (name, str(paths[name])) != ("json", "-")
    }
    asked = check_outputs(named, inputs)
    for name in FOLDERS:
        if name in paths:
            folder = paths[name]
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"--{name}: {folder} is not a folder")
            if not folder.is_dir() and not folder.parent.is_dir():
                raise ValueError(f"--{name}: {folder.parent} does not exist")
            if folder.is_dir() and any(
                p.parent.samefile(folder) for p in inputs if p.exists()
            ):
                raise ValueError(
                    f"--{name}: {folder} holds inputs; give another folder"
                )
            asked[name] = folder
    if not set(asked) - {"json"} and flags.json is None:
        raise ValueError("nothing to write: give --save, --report or another output")
    return asked


def _summary(series: Series, command: str, outputs: dict[str, Path]) -> dict[str, Any]:
    """Return what is said of a group: its images, folds, consistency, warnings."""
    images = []
    for number, (name, evidence) in enumerate(
        zip(series.names, series.fit.evidence, strict=True)
    ):
        images.append(
            {
                "name": name,
                "time": series.times[number],
                "folds_percent": 100 * evidence["folded"],
                "alike": evidence["alike"],
                "alike_before": evidence["alike_start"],
                "steps": len(series.fit.losses[number]),
            }
        )
    return {
        "command": command,
        "seconds": series.made_with["seconds"],
        "peak_memory": series.made_with["peak_memory"],
        "images": images,
        "left_out": list(series.told.left_out),
        "mean_displacement_voxels": series.mean_displacement(),
        "warnings": series.warnings,
        "outputs": {name: str(path) for name, path in outputs.items()},
        "versions": versions(),
    }


def _finish(
    series: Series,
    summary: dict[str, Any],
    outputs: dict[str, Path],
    writers: dict[str, Callable[[Path], Any]],
) -> dict[str, Any]:
    """Write all outputs; return the summary."""
    everywhere: dict[str, Callable[[Path], Any]] = {
        "save": series.save,
        "report": lambda path: series.report(path, command=summary["command"]),
        "json": lambda path: _write_text(json.dumps(summary, indent=2) + "\n", path),
    }
    for name, path in outputs.items():
        (writers | everywhere)[name](path)
    return summary


def _write(image: Any, path: Path) -> None:
    with written_whole(path) as (part,):
        write_image(image, part)


def _write_text(text: str, path: Path) -> None:
    with written_whole(path) as (part,):
        part.write_text(text, "utf-8")


def _numbered(series: Series, number: int) -> str:
    return f"{number:0{len(str(len(series) - 1))}d}"


def _write_transforms(series: Series, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for k in range(len(series)):
        pair, name = series.from_reference(k), _numbered(series, k)
        files = folder / f"{name}.h5", folder / f"{name}_inverse.h5"
        with written_whole(*files) as parts:
            write_transform(pair.phi_AB, parts[0])
            write_transform(pair.phi_BA, parts[1])


def _write_displacements(series: Series, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for k, image in enumerate(series.displacement_fields()):
        _write(image, folder / f"{_numbered(series, k)}.nii.gz")


def _write_points(series: Series, file: Any, flags: SeriesFlags, path: Path) -> None:
    """Write followed points: a table, or a file for each time."""
    places = series.follow(file.points, flags.points_image)
    if path.name.lower().endswith(".csv"):
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["time", "point", *"xyz"[: places.shape[2]]])
        for time, rows in zip(series.times, places.tolist(), strict=True):
            for number, row in enumerate(rows):
                writer.writerow([f"{time:g}", number, *(f"{x:.6f}" for x in row)])
        return _write_text(text.getvalue(), path)
    ending = next(e for e in POINTS if path.name.lower().endswith(e))
    stem = path.name[: -len(ending)]
    parts = [
        path.with_name(f"{stem}_{_numbered(series, k)}{path.name[len(stem) :]}")
        for k in range(len(series))
    ]
    with written_whole(*parts) as files:
        for part, rows in zip(files, places, strict=True):
            part.write_bytes(file.content(rows))
    if ending == ".vtk":
        entries = _entries(parts, series.times)
        content = {"file-series-version": "1.0", "files": entries}
        _write_text(json.dumps(content, indent=1) + "\n", Path(f"{path}.series"))
    return None


def _entries(parts: Sequence[Path], times: Sequence[float]) -> list[dict[str, Any]]:
    both = zip(parts, times, strict=True)
    return [{"name": os.fspath(p.name), "time": t} for p, t in both]
