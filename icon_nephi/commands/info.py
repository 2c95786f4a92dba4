"""What is in a saved registration or ITK transform, and what a run gave, as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from torch import nn

from icon_nephi.io.itk_transforms import read_transform
from icon_nephi.io.nephi import load_fit
from icon_nephi.space.frames import Geometry

OWN = ".nephi"


def describe(path: Path) -> dict[str, Any]:
    """What the file holds, ready for JSON.

    Raises:
        ValueError: neither a .nephi file nor an ITK transform.
    """
    own = str(path).lower().endswith(OWN)
    found = _registration(path) if own else _transform(path)
    return {"file": str(path), "bytes": path.stat().st_size, **found}


def _registration(path: Path) -> dict[str, Any]:
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
            "fields": sum(_count(field) for field in fields.values()),
            "code": sum(part.numel() for part in code),
        },
        "code_grids": [list(grid.shape[1:]) for grid in fit.code.local_codes],
        "interpolation": fit.code.interpolation,
        "affine_between_unit_boxes": fit.matrix.tolist(),
        "steps": len(fit.losses),
        "last_losses": fit.losses[-1] if fit.losses else {},
        "warnings": fit.warnings,
    }


def _count(field: nn.Module) -> int:
    return sum(parameter.numel() for parameter in field.parameters())


def _place(geometry: Geometry) -> dict[str, Any]:
    return {
        "size": list(geometry.itk_size),
        "spacing": list(geometry.spacing),
        "origin": list(geometry.origin),
        "direction": [list(row) for row in geometry.direction],
    }


def _transform(path: Path) -> dict[str, Any]:
    transform = read_transform("FILE", path)
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


def lines(found: dict[str, Any], indent: str = "") -> list[str]:
    """The dictionary as text for people, one entry a line."""
    text = []
    for key, value in found.items():
        name = f"{indent}{key.replace('_', ' ')}:"
        if isinstance(value, dict):
            text += [name, *lines(value, indent + "  ")]
        elif value and isinstance(value, list) and isinstance(value[0], dict):
            text.append(name)
            text += [f"{indent}  " + _inline(one) for one in value]
        else:
            text.append(f"{name} {_inline(value)}")
    return text


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(one)}" for key, one in value.items())
    if isinstance(value, list):
        if not value:
            return "none"
        if isinstance(value[0], str | list):
            return "; ".join(map(_inline, value))
        inner = " x " if all(isinstance(one, int) for one in value) else " "
        return inner.join(_inline(one) for one in value)
    if isinstance(value, float):
        return np.format_float_positional(value, 6, fractional=False, trim="-")
    return "unknown" if value is None else str(value)


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Return what nephi-register found, a line each for people."""
    text = [f"registered in {summary['seconds']:.1f} s"]
    if "folds_percent" in summary:
        errors, lengths = summary["inverse_consistency_mm"], summary["displacement_mm"]
        text += [
            f"folds: {summary['folds_percent']:.3g} % of {summary['voxels_measured']} "
            "voxels, both directions",
            f"inverse consistency: mean {errors['mean']:.3f} mm, "
            f"95th percentile {errors['p95']:.3f} mm",
            f"displacement, fixed -> moving: mean {lengths['mean']:.2f} mm, "
            f"largest {lengths['max']:.2f} mm",
        ]
    if "expected_error_mm" in summary:
        errors = summary["expected_error_mm"]
        text.append(
            f"expected error: median {errors['median']:.2f} mm, 95th percentile "
            f"{errors['p95']:.2f} mm"
        )
    if "landmarks_mm" in summary:
        for when in ("before", "after"):
            numbers = summary["landmarks_mm"][when]
            text.append(
                f"landmark error {when}: mean {numbers['mean']:.2f} mm, median "
                f"{numbers['median']:.2f} mm, 95th percentile {numbers['p95']:.2f} mm"
            )
    if "dice" in summary:
        for when in ("before", "after"):
            numbers = summary["dice"][when]
            each = ", ".join(f"{k}: {v:.3f}" for k, v in numbers["labels"].items())
            text.append(f"Dice {when}: mean {numbers['mean']:.3f} ({each})")
    return text + [f"{name}: {path}" for name, path in summary["outputs"].items()]
