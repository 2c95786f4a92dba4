"""What is in a saved registration or an ITK transform."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from icon_nephi.commands.flags import is_own
from icon_nephi.io.nephi import load_fit, read_contents
from icon_nephi.io.nephi_group import GROUP, load_group
from icon_nephi.io.other_transforms import read_any_transform
from icon_nephi.space.frames import Geometry


def describe(path: Path) -> dict[str, Any]:
    """Return what a file holds, ready for JSON.

    Raises:
        ValueError: neither a .nephi file nor an ITK transform.
    """
    contents = _registration(path) if is_own("FILE", path) else _transform(path)
    return {"file": str(path), "bytes": path.stat().st_size, **contents}


def _group(path: Path) -> dict[str, Any]:
    fit, told = load_group(path)
    code = [fit.code.global_code, *fit.code.local_codes]
    fields = fit.field_AB, fit.field_BA
    images: list[dict[str, Any]] = [{"name": name} for name in told.names]
    for number, entry in enumerate(images):
        if told.times is not None:
            entry["time"] = told.times[number]
        entry["size"] = list(told.places[number].itk_size)
    return {
        "kind": f"{told.kind} by icon_nephi",
        "format": GROUP,
        "coordinates": "ITK images (LPS mm)" if told.itk else "tensors (unit boxes)",
        "reference": "the mean of all"
        if told.reference is None
        else f"image {told.reference}",
        "period": "none" if told.period is None else told.period,
        "frame": _place(fit.place),
        "directions": "between any two images, both ways",
        "parameters": {
            "fields": sum(p.numel() for f in fields for p in f.parameters()),
            "code_of_each_image": sum(part[0].numel() for part in code),
        },
        "images": images,
        "left_out": list(told.left_out),
        "warnings": [text for texts in fit.warnings for text in texts],
    }


def _registration(path: Path) -> dict[str, Any]:
    if read_contents(path, GROUP).header.get("format") == GROUP:
        return _group(path)
    saved = load_fit(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["nephi"])
    fit = saved.fit
    fields = {"fixed -> moving": fit.field_AB, "moving -> fixed": fit.field_BA}
    code = [fit.code.global_code, *fit.code.local_codes]
    return {
        "kind": "registration by icon_nephi",
        "format": header["format"],
        "versions": header["versions"],
        "images": "ITK images (LPS mm)" if saved.itk else "tensors (unit boxes)",
        "fixed": _place(saved.geometry_B),
        "moving": _place(saved.geometry_A),
        "directions": "both: fixed -> moving and moving -> fixed",
        "fields": {way: type(field).__name__ for way, field in fields.items()},
        "parameters": {
            "fields": sum(p.numel() for f in fields.values() for p in f.parameters()),
            "code": sum(part.numel() for part in code),
        },
        "code_grids": [list(grid.shape[1:]) for grid in fit.code.local_codes],
        "interpolation": fit.code.interpolation,
        "affine_between_unit_boxes": fit.matrix.tolist(),
        "steps": len(fit.losses),
        "last_losses": fit.losses[-1] if fit.losses else {},
        "warnings": fit.warnings,
    }


def _place(geometry: Geometry) -> dict[str, Any]:
    return {
        "size": list(geometry.itk_size),
        "spacing": list(geometry.spacing),
        "origin": list(geometry.origin),
        "direction": [list(row) for row in geometry.direction],
    }


def _transform(path: Path) -> dict[str, Any]:
    transform = read_any_transform("FILE", path)
    parts = [transform]
    if hasattr(transform, "GetNumberOfTransforms"):
        count = transform.GetNumberOfTransforms()
        # ITK applies the last one first.
        parts = [transform.GetNthTransform(i) for i in reversed(range(count))]
    return {
        "kind": "ITK transform",
        "type": transform.GetTransformTypeAsString(),
        "dimension": int(transform.GetInputSpaceDimension()),
        "direction": "maps points of the image that stays (LPS mm) to the image that "
        "is resampled: fixed -> moving if nephi-register wrote it to --transform_out, "
        "moving -> fixed if to --inverse_transform_out; the file itself does not say",
        "parameters": int(transform.GetNumberOfParameters()),
        "in_order_of_use": [
            {
                "type": part.GetTransformTypeAsString(),
                "parameters": int(part.GetNumberOfParameters()),
            }
            for part in parts
        ],
    }
