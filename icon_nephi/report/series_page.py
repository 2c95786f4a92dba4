"""The page of many images: that of a pair, with a slider for time or person."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from icon_nephi.report import pictures
from icon_nephi.report.measure import Measured, measure_scene
from icon_nephi.report.metrics import summarize
from icon_nephi.report.page import curves_of, page_of, scales_of, write_page
from icon_nephi.report.scene import Registered, Scales, Scene, draw, layers_of

# Points measured in each image, of those of a page of one pair.
_LAYERS = ("fixed", "warped", "moving", "difference", "grid", "jacobian", "consistency")


class Group(Protocol):
    """What a page of many images shows: an `icon_nephi.Series`."""

    made_with: dict[str, Any]

    def __len__(self) -> int:
        """How many images there are."""

    @property
    def names(self) -> Sequence[str]:
        """The images' names."""

    @property
    def labels(self) -> Sequence[str]:
        """What the slider says of each: its time, or its name."""

    @property
    def warnings(self) -> list[str]:
        """What is doubtful, one sentence each."""

    @property
    def losses(self) -> list[dict[str, float]]:
        """The losses of all steps, of one image after the other."""

    def shown(self, number: int) -> Registered:
        """The mean image (fixed) and an image (moving), with both images."""


def write_series_report(
    path: str | os.PathLike[str],
    group: Group,
    *,
    command: str | None = None,
    seconds: float | None = None,
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: ends in .html or .htm.
        group: an `icon_nephi.Series` with its images: a loaded one has none.
        command: what to run to get this again.
        seconds: what it took; default: what `icon_nephi.register_series` took.

    Raises:
        ValueError: no images, or another ending.
        OSError: the file cannot be written.
    """
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"path must end in .html, got {str(path)!r}")
    numbers, views, scales = [], list[dict[str, Any]](), None
    for k in range(len(group)):
        scene = Scene(group.shown(k))
        measured = measure_scene(scene)
        numbers.append(measured)
        scales = scales or _wider(scales_of(measured))
        stacks = pictures.views_of(scene.B, physical=scene.itk, slices=3)
        for n, stack in enumerate(stacks):
            _add(views, n, scene, _middle(stack), scales)
    assert scales is not None
    for view in views:
        view["places"] = list(group.labels)
    layers = [layer for layer in layers_of(scene, scales) if layer.key in _LAYERS]
    heads = {
        "title": f"Registration report: {len(group)} images on their mean",
        "about": "Every image (moving) is laid on the mean of all (fixed). Images go "
        "moving → fixed; maps take points fixed → moving. The sliders go from image to "
        "image.",
        "thing": "image",
        "tiles": _tiles(scene, numbers, group, seconds),
        "warnings": [w[0].upper() + w[1:].rstrip(".") + "." for w in group.warnings],
        "layers": layers,
        "views": views,
        "notes": ["The slices go through the middle of the mean image."],
        "tables": _tables(scene, numbers, group),
        "curves": curves_of(group.losses),
        "command": command or "icon_nephi.register_series(images)",
        "seed": group.made_with.get("seed"),
    }
    write_page(path, page_of(heads))


def _wider(scales: Scales) -> Scales:
    """Return scales that serve other images, too."""
    return replace(scales, determinant=max(0.5, scales.determinant))


def _middle(stack: pictures.View) -> pictures.View:
    middle = len(stack.numbers) // 2
    one = slice(middle, middle + 1)
    return replace(stack, numbers=stack.numbers[one], places=stack.places[one])


def _add(
    views: list[dict[str, Any]],
    number: int,
    scene: Scene,
    view: pictures.View,
    scales: Scales,
) -> None:
    """Draw the slice of an image, behind those of the images before."""
    if number == len(views):
        aspect = pictures.aspect(view, scene.B)
        entry: dict[str, Any] = {"name": view.name, "edges": view.edges, "middle": 0}
        views.append({**entry, "aspect": aspect, "pictures": {}})
    drawn = next(iter(draw(scene, view, scales)))
    for key in _LAYERS:
        uri = pictures.data_uri(drawn[key])
        views[number]["pictures"].setdefault(key, []).append(uri)


def _tiles(
    scene: Scene, numbers: Sequence[Measured], group: Group, seconds: float | None
) -> list[dict[str, str]]:
    folds = max(m.folds_percent for m in numbers)
    missed = max(summarize(m.inverse_consistency)["p95"] for m in numbers)
    shift = [summarize(m.displacement) for m in numbers]
    count = sum(m.count for m in numbers)
    unit = scene.unit
    tiles = [
        ("Images", f"{len(group)}", "all laid on their mean"),
        (
            "Folds",
            f"{folds:.2g} %" if folds else "none",
            f"worst image; at {count:,} voxels, both directions",
        ),
        (
            "Inverse consistency",
            f"{missed:.2f} {unit}",
            "95th percentile of the worst image",
        ),
        (
            "Displacement",
            f"{np.mean([s['mean'] for s in shift]):.1f} {unit}",
            f"mean of all; at most {max(s['max'] for s in shift):.1f} {unit}",
        ),
    ]
    took = group.made_with.get("seconds") if seconds is None else seconds
    if took is not None:
        tiles.append(("Time", f"{took:.0f} s", "for all images"))
    return [{"name": n, "value": v, "note": t} for n, v, t in tiles]


def _tables(
    scene: Scene, numbers: Sequence[Measured], group: Group
) -> list[dict[str, Any]]:
    rows = []
    for label, measured in zip(group.labels, numbers, strict=True):
        shift = summarize(measured.displacement)
        missed = summarize(measured.inverse_consistency)["p95"]
        least = f"{measured.determinants.min():.2f}"
        lengths = f"{shift['mean']:.2f}", f"{shift['max']:.2f}", f"{missed:.3f}"
        rows.append([label, *lengths, least, f"{measured.folds_percent:.2g}"])
    header = [
        "",
        "moves, mean",
        "largest",
        "there and back, 95 %",
        "least det",
        "folds %",
    ]
    caption = f"Each image; lengths in {scene.unit}"
    return [{"caption": caption, "header": header, "rows": rows}]
