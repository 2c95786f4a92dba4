"""What the commands say of their numbers: lines and tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def lines(contents: dict[str, Any], indent: str = "") -> list[str]:
    """Return a dictionary as text, one entry a line."""
    text = []
    for key, value in contents.items():
        name = f"{indent}{key.replace('_', ' ')}:"
        if isinstance(value, dict):
            text += [name, *lines(value, indent + "  ")]
        elif value and isinstance(value, list) and isinstance(value[0], dict):
            text += [name, *(f"{indent}  {_inline(entry)}" for entry in value)]
        else:
            text.append(f"{name} {_inline(value)}")
    return text


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        if not value:
            return "none"
        if isinstance(value[0], str | list):
            return "; ".join(map(_inline, value))
        between = " x " if all(isinstance(number, int) for number in value) else " "
        return between.join(map(_inline, value))
    if isinstance(value, float):
        return np.format_float_positional(value, 6, fractional=False, trim="-")
    return "unknown" if value is None else str(value)


def summary_text(summary: dict[str, Any]) -> str:
    """Return the summary of nephi-register, a line each."""
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
    for when, errors in summary.get("landmarks_mm", {}).items():
        if when != "count":
            text.append(
                f"landmark error {when}: mean {errors['mean']:.2f} mm, median "
                f"{errors['median']:.2f} mm, 95th percentile {errors['p95']:.2f} mm"
            )
    for when, scores in summary.get("dice", {}).items():
        each = ", ".join(f"{k}: {v:.3f}" for k, v in scores["labels"].items())
        text.append(f"Dice {when}: mean {scores['mean']:.3f} ({each})")
    text += [f"{name}: {path}" for name, path in summary["outputs"].items()]
    return "\n".join(text)


def group_text(summary: dict[str, Any]) -> str:
    """Return the summary of nephi-series and nephi-template, a line each."""
    heads = {
        **{"name": ("image", "s"), "time": ("time", "g")},
        **{"alike_before": ("alike before", ".3f"), "alike": ("alike", ".3f")},
        "folds_percent": ("folds %", ".2g"),
    }
    rest = summary["mean_displacement_voxels"]
    text = [
        f"registered {len(summary['images'])} images in {summary['seconds']:.1f} s",
        aligned(summary["images"], heads),
        f"mean of all displacements: {rest:.3f} voxels",
    ]
    text += [f"{name}: {path}" for name, path in summary["outputs"].items()]
    return "\n".join(text)


def pairs_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of summary.csv as aligned columns."""
    heads = {
        **{"name": ("name", "s"), "status": ("status", "s"), "seconds": ("s", ".1f")},
        "folds_percent": ("folds %", ".2g"),
        "inverse_consistency_p95_mm": ("inverse p95 mm", ".3f"),
        "displacement_mean_mm": ("motion mm", ".2f"),
        **{"tre_before_mm": ("before mm", ".2f"), "tre_mm": ("TRE mm", ".2f")},
        **{"dice_before": ("before", ".3f"), "dice": ("Dice", ".3f")},
    }
    return aligned(rows, heads)


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of a comparison as aligned columns."""
    heads = {
        **{"case": ("case", "s"), "method": ("method", "s")},
        **{"before_tre_mm": ("before mm", ".2f"), "tre_mm": ("TRE mm", ".2f")},
        **{"before_dice": ("before", ".3f"), "dice": ("Dice", ".3f")},
        "folds_voxels_percent": ("folds % voxels", ".2g"),
        "folds_points_percent": ("% points", ".2g"),
        "inverse_consistency_mm": ("inverse mm", ".3f"),
        **{"representation_m": ("map M", ".2f"), "encoder_m": ("encoder M", ".2f")},
        **{"inference_ms": ("inference ms", ".0f"), "step_ms": ("step ms", ".0f")},
        **{"steps": ("steps", "d"), "peak_gib": ("peak GiB", ".2f")},
    }
    return aligned(rows, heads)


def aligned(rows: Sequence[dict[str, Any]], heads: dict[str, tuple[str, str]]) -> str:
    """Return rows as columns; errors stand behind their rows.

    Args:
        rows: of numbers and words by key.
        heads: of each key how its column is headed and written; columns in which
            nothing stands are left out.
    """
    used = [key for key in heads if any(row.get(key) is not None for row in rows)]
    table = [[heads[key][0] for key in used]]
    for row in rows:
        cells = ((row.get(key), heads[key][1]) for key in used)
        table.append(["-" if v is None else format(v, form) for v, form in cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    errors = ["", *(f"  {row['error']}" if "error" in row else "" for row in rows)]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + error
        for line, error in zip(table, errors, strict=True)
    )
