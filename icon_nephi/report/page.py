"""One HTML page that shows and measures a registration, without network access."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from icon_nephi._memory import peak_memory
from icon_nephi.io.atomic import written_whole
from icon_nephi.io.versions import versions
from icon_nephi.report import pictures
from icon_nephi.report.measure import Measured, measure_scene
from icon_nephi.report.metrics import summarize
from icon_nephi.report.scene import SLICES, Registered, Scales, Scene, draw, layers_of
from icon_nephi.space.frames import Array

_TERMS = {
    "all_loss": "Loss",
    "similarity_loss": "Dissimilarity of the images",
    "inverse_consistency_loss": "Gradient inverse consistency",
}


def write_report(
    path: str | os.PathLike[str],
    result: Registered,
    *,
    landmarks_fixed: Any = None,
    landmarks_moving: Any = None,
    labels_fixed: Any = None,
    labels_moving: Any = None,
    others: Sequence[Registered] = (),
    command: str | None = None,
    seconds: float | None = None,
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: ends in .html or .htm.
        result: an `icon_nephi.Registration` with its images: `icon_nephi.load` has
            none.
        landmarks_fixed: ``[N, d]`` in the fixed image, LPS mm (tensors: ICON frame).
        landmarks_moving: the same landmarks in the moving image, row by row.
        labels_fixed: label map of the fixed image, of the images' kind.
        labels_moving: label map of the moving image.
        others: registrations of the same pair with other seeds (`icon_nephi.ensemble`).
        command: what to run to get this again; default: the call of
            `icon_nephi.register`.
        seconds: what it took; default: what `icon_nephi.register` took.

    Raises:
        TypeError: label maps of another kind.
        ValueError: no images; another ending; one of two landmark sets or label maps,
            or bad ones.
        OSError: the file cannot be written.
    """
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"path must end in .html, got {str(path)!r}")
    if result.images is None:
        raise ValueError(
            "a report needs the images, which a loaded registration does not have; "
            "write it from what icon_nephi.register returned"
        )
    scene = Scene(result, others)
    landmarks = (landmarks_fixed, landmarks_moving)
    measured = measure_scene(scene, landmarks, (labels_fixed, labels_moving))
    scales = scales_of(measured)
    stacks = pictures.views_of(scene.B, physical=scene.itk, slices=SLICES)
    heads = {
        "title": "Registration report: moving → fixed",
        "about": "The moving image is laid on the fixed image. Images go moving → "
        "fixed; the map takes points fixed → moving.",
        "thing": "slice",
        "tiles": _tiles(scene, measured, result, seconds),
        "warnings": _warnings(scene, measured, result),
        "layers": layers_of(scene, scales),
        "views": [_view(scene, v, scales) for v in stacks],
        "notes": _notes(scene, measured),
        "tables": _tables(scene, measured),
        "curves": curves_of(result.losses),
        "command": command or _call(result),
        "seed": result.made_with.get("seed"),
    }
    write_page(path, page_of(heads))


def page_of(heads: dict[str, Any]) -> dict[str, Any]:
    """Return what a page holds, with what every page says at its end."""
    return heads | {
        "palettes": pictures.PALETTES,
        "versions": [
            ("Python", platform.python_version()),
            *((name, number) for name, number in versions().items() if number),
            ("System", f"{platform.system()} {platform.machine()}"),
        ],
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write_page(path: str | os.PathLike[str], page: dict[str, Any]) -> None:
    """Write a page, whole or not at all."""
    html = _render(page)
    with written_whole(path) as (part,):
        part.write_text(html, encoding="utf-8")


def scales_of(measured: Measured) -> Scales:
    """Return where the colours end: hardly any voxel is beyond."""
    good = measured.determinants[measured.determinants > 0]
    growth = np.abs(np.log2(good)) if len(good) else np.ones(1)
    missed, expected = measured.inverse_consistency, measured.expected_error
    return Scales(
        determinant=max(0.25, float(np.quantile(growth, 0.99))),
        consistency=max(1e-6, float(np.quantile(missed, 0.99))),
        error=max(1e-6, float(np.quantile(expected, 0.99))),
    )


def _warnings(scene: Scene, measured: Measured, result: Registered) -> list[str]:
    """Return what a reader should doubt, a sentence each."""
    doubts = []
    for warning in result.warnings:
        named = str(warning).replace("image_B", "the fixed image")
        doubts.append(named.replace("image_A", "the moving one"))
    if measured.outside > 0.05 and not any("extrapolated" in w for w in doubts):
        doubts.append(
            f"{100 * measured.outside:.0f} % of what lies {measured.where} maps "
            "outside the moving image: it is extrapolated there"
        )
    if measured.folds_percent and not any("folds" in w for w in doubts):
        doubts.append(f"the map folds at {measured.folds_percent:.2g} % of the voxels")
    limit = 2 * max(scene.B.spacing)
    if np.quantile(measured.inverse_consistency, 0.95) > limit:
        doubts.append(
            "the way there and back misses by more than two voxels at one point in "
            "twenty: do not trust the map there (see the layer Inverse consistency)"
        )
    landmarks, overlap = measured.landmarks, measured.overlap
    if landmarks is not None and landmarks[1].mean() > landmarks[0].mean():
        doubts.append("the landmarks lie farther apart than before registration")
    worse = [str(label) for label, before, after in overlap if after < before - 0.01]
    if worse:
        doubts.append(f"labels that overlap less than before: {', '.join(worse)}")
    if scene.apart:
        doubts.append(
            "the headers put the images beside each other: 'before' is after the "
            "affine start, and displacements are measured from there"
        )
    return [w[0].upper() + w[1:].rstrip(".") + "." for w in doubts]


def _tiles(
    scene: Scene, measured: Measured, result: Registered, seconds: float | None
) -> list[dict[str, str]]:
    """Return the numbers at the top: name, value, what it means."""
    unit, tiles = scene.unit, []
    landmarks, overlap = measured.landmarks, measured.overlap
    if landmarks is not None:
        before, after, _ = (e.mean() for e in landmarks)
        note = f"mean of {len(landmarks[0])} landmarks; before {before:.2f} {unit}"
        tiles.append(("Landmark error", f"{after:.2f} {unit}", note))
    if overlap:
        before, after = np.mean([row[1:] for row in overlap], axis=0)
        which = f"mean of {len(overlap)} labels" if len(overlap) > 1 else "one label"
        note = f"{which}; before {before:.3f}"
        tiles.append(("Dice", f"{after:.3f}", note))
    percent = f"{measured.folds_percent:.2g} %" if measured.folds_percent else "none"
    note = f"at {measured.count:,} voxels, both directions, analytic determinant"
    tiles.append(("Folds", percent, note))
    missed = summarize(measured.inverse_consistency)
    error, shift = summarize(measured.expected_error), summarize(measured.displacement)
    note = f"95th percentile {measured.where}; median {missed['median']:.2f} {unit}"
    tiles.append(("Inverse consistency", f"{missed['p95']:.2f} {unit}", note))
    note = f"median {measured.where}, estimated without landmarks"
    tiles.append(("Expected error", f"{error['median']:.2f} {unit}", note))
    note = f"mean {measured.where}; at most {shift['max']:.1f} {unit}"
    tiles.append(("Displacement", f"{shift['mean']:.1f} {unit}", note))
    took = result.made_with.get("seconds") if seconds is None else seconds
    if took is not None:
        tiles.append(("Time", f"{took:.0f} s", f"on {result.device}"))
    peak = result.made_with.get("peak_memory") or peak_memory()
    note = "peak of the whole process"
    tiles.append(("Memory", f"{peak / 2**30:.1f} GiB", note))
    return [{"name": n, "value": v, "note": t} for n, v, t in tiles]


def _notes(scene: Scene, measured: Measured) -> list[str]:
    """Return how to read the pictures and the tables."""
    notes = []
    if scene.itk and scene.B.dimension == 3:
        notes.append(
            "Letters are the patient's sides: R right, L left, A anterior, "
            "P posterior, S superior, I inferior."
        )
        tilted = pictures.tilt(scene.B)
        if tilted > 1:
            notes.append(
                "Slices follow the fixed image's own axes, which are tilted by up to "
                f"{tilted:.0f}° against the body's."
            )
    notes.append(
        f"Maps are measured at {len(measured.displacement):,} voxel centres, evenly "
        f"spread {measured.where}."
    )
    return notes


def _tables(scene: Scene, measured: Measured) -> list[dict[str, Any]]:
    """Return caption, header and rows of text of each."""
    lengths = {
        "Displacement": measured.displacement,
        "Inverse consistency error": measured.inverse_consistency,
        "Expected error": measured.expected_error,
    }
    if measured.landmarks is not None:
        kinds = "Landmark error before", "Landmark error", "Expected error at landmarks"
        lengths |= dict(zip(kinds, measured.landmarks, strict=True))
    rows = []
    for name, values in lengths.items():  # `summarize` gives them in this order
        rows.append([name, *(f"{value:.2f}" for value in summarize(values).values())])
    header = ["mean", "median", "95 %", "largest"]
    tables = [(f"Lengths in {scene.unit}", header, rows)]
    quantiles = np.quantile(measured.determinants, (0, 0.01, 0.5, 0.99, 1))
    rows = [["Determinant", *(f"{q:.2f}" for q in quantiles)]]
    header = ["least", "1 %", "median", "99 %", "largest"]
    tables.append(("Jacobian determinant, fixed to moving", header, rows))
    if measured.overlap:
        rows = [[f"Label {k}", f"{a:.3f}", f"{b:.3f}"] for k, a, b in measured.overlap]
        tables.append(("Dice overlap", ["before", "after"], rows))
    rows = []
    for name, place in (("Moving", scene.A), ("Fixed", scene.B)):
        size = " × ".join(str(n) for n in place.itk_size)
        spacing = " × ".join(f"{s:.4g}" for s in place.spacing)
        rows.append([name, size, f"{spacing} mm" if scene.itk else "a tensor"])
    tables.append(("Images, x first", ["voxels", "spacing"], rows))
    return [{"caption": c, "header": ["", *h], "rows": r} for c, h, r in tables]


def _view(scene: Scene, view: pictures.View, scales: Scales) -> dict[str, Any]:
    """Return a view for the page; pictures are base64 text by layer, over slices."""
    by_layer: dict[str, list[str]] = {}
    for slice_pictures in draw(scene, view, scales):
        for key, picture in slice_pictures.items():
            by_layer.setdefault(key, []).append(pictures.data_uri(picture))
    return {
        "name": view.name,
        "edges": view.edges,
        "places": view.places,
        "middle": len(view.numbers) // 2,
        "aspect": pictures.aspect(view, scene.B),
        "pictures": by_layer,
    }


def curves_of(losses: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Return for each term of the loss a name, points of an SVG line, its two ends."""
    curves = []
    for key, name in _TERMS.items():
        values = np.array([step[key] for step in losses if key in step], float)
        values = values[np.isfinite(values)]
        if len(values) < 2:
            continue
        smooth = _running_median(values, max(1, len(values) // 40))
        low, high = float(values.min()), float(values.max())
        lines = []
        for series in (values, smooth):
            x = np.linspace(0, 320, len(series))
            y = 110 - 100 * (series - low) / max(high - low, 1e-12)
            points = (f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
            lines.append(" ".join(points))
        ends = {"first": values[0], "last": smooth[-1], "low": low, "high": high}
        said: dict[str, Any] = {k: f"{value:.3g}" for k, value in ends.items()}
        curves.append({"name": name, "lines": lines, "steps": len(values), **said})
    return curves


def _running_median(values: Array, width: int) -> Array:
    padded = np.pad(values, width, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * width + 1)
    middle: Array = np.median(windows, axis=1)
    return middle


def _call(result: Registered) -> str:
    """Return the Python call, with the choices that are not the defaults."""
    defaults = {"modality": None, "similarity": None, "field": "auto", "affine": True}
    defaults |= {"time_limit": None, "memory_limit": None, "mass_preserving": False}
    arguments = ["moving", "fixed"]
    for name, value in result.made_with.items():
        if name in defaults and value != defaults[name]:
            plain = isinstance(value, str | int | float | bool | tuple)
            arguments.append(f"{name}={value!r}" if plain else f"{name}={value}")
    assert result.images is not None  # `write_report` has looked
    masks = zip(("mask_A", "mask_B"), result.images[2:], strict=True)
    arguments += [f"{name}={name}" for name, mask in masks if mask is not None]
    if result.made_with.get("segmentations"):
        arguments += [f"{name}={name}" for name in ("segmentation_A", "segmentation_B")]
    arguments.append(f"seed={result.made_with.get('seed', 0)}")
    lines = "".join(f"    {argument},\n" for argument in arguments)
    return f"icon_nephi.register(\n{lines})"


def _render(page: dict[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    text = resources.files("icon_nephi.report").joinpath("page.html").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text).render(page)
