"""Methods side by side: the same pairs, for the same time, on one machine."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch

from icon_nephi.commands.cases import Case
from icon_nephi.commands.methods import Found, Method, Options, now, peak_gib
from icon_nephi.io.image_input import choose_device, read_input
from icon_nephi.io.itk_images import resample_to
from icon_nephi.maps.framed import over_grid
from icon_nephi.maps.two_way import TwoWay
from icon_nephi.report.measure import flips_on_grid, mean_dice_at, measure_points
from icon_nephi.report.metrics import target_registration_error
from icon_nephi.space.frames import apply_affine

COLUMNS = (
    *("case", "method", "error", "before_tre_mm", "tre_mm", "before_dice", "dice"),
    *("folds_voxels_percent", "folds_points_percent", "inverse_consistency_mm"),
    *("representation_m", "code_m", "encoder_m", "inference_ms", "step_ms", "steps"),
    *("seconds", "peak_gib", "grid", "warnings"),
)
NUMBERS = ("representation", "code", "encoder")
POINTS = 100_000  # where folds and inverse consistency are measured

Row: TypeAlias = dict[str, Any]


def measure(case: Case, method: Method, options: Options) -> Row:
    """A row of `COLUMNS`: one registration, its cost, and its errors.

    ``inference_ms`` goes from the images to the displacement at every voxel of the
    fixed image, ``peak_gib`` up to there.
    """
    torch.set_num_threads(options.threads or torch.get_num_threads())
    began = now(device := choose_device(options.device, None))
    found = method(case, options)
    row: Row = {"seconds": now(device) - began}
    maps = maps_of(found, options.device)
    fixed = read_input("B", case.fixed, None)[2]
    size, box = fixed.size, fixed.unit_to_physical()
    moved = over_grid(lambda _, at: at, size, box, fixed.dimension, mapped=maps.forward)
    row["inference_ms"] = 1000 * (now(device) - began)
    row |= {"peak_gib": peak_gib(device), "steps": found.steps}
    row["step_ms"] = found.step_seconds and 1000 * found.step_seconds
    row |= {f"{n}_m": getattr(found, n) / 1e6 for n in NUMBERS}
    row["grid"], row["warnings"] = found.place_B.size, "; ".join(found.warnings)
    row["folds_voxels_percent"] = flips_on_grid(moved, fixed)
    spread = np.random.default_rng(0).uniform(size=(POINTS, fixed.dimension))
    points = apply_affine(box, torch.from_numpy(spread)).numpy()
    measured = measure_points(maps, points)
    row["folds_points_percent"] = 100 * measured.fold_fraction
    row["inverse_consistency_mm"] = float(measured.inverse_consistency.mean())
    goals = case.moving_points
    if case.fixed_points is not None and goals is not None:
        for name, at in (
            ("before_tre_mm", case.fixed_points),
            ("tre_mm", maps.forward(case.fixed_points)),
        ):
            row[name] = float(target_registration_error(at, goals).mean())
    if case.fixed_labels is not None:
        still = over_grid(lambda p: p, size, box, fixed.dimension)
        truth = resample_to(case.fixed_labels, case.fixed)
        row["before_dice"], row["dice"] = (
            mean_dice_at(truth, case.moving_labels, at.astype(float), case.label_ids)
            for at in (still, moved)
        )
    return row


def maps_of(found: Found, device: str | None) -> TwoWay:
    """Return what a method found as maps of millimetres, on a device."""
    places = found.place_A, found.place_B
    return TwoWay(found.phi_AB, found.phi_BA, *places, choose_device(device, None))


def compare_cases(
    cases: Mapping[str, Callable[[], Any]],
    methods: Mapping[str, Method],
    options: Options,
) -> Iterator[Row]:
    """A row for each case and method, which are functions that can be pickled.

    Each has its own process; others get the time that the first took for a case.
    """
    for name, read in cases.items():
        given = options
        for label, method in methods.items():
            row = alone(_read_and_measure, read, method, given)
            if given is options and "seconds" in row:
                given = replace(options, seconds=row["seconds"])
            yield {"case": name, "method": label} | row


def alone(function: Callable[..., Row], *arguments: Any) -> Row:
    """What a function returns in a fresh process, or ``{"error": sentence}``."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, warnings.simplefilter, ("ignore",)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return {"error": "the process was ended (out of memory?)"}
        except Exception as error:  # the other rows go on
            return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def _read_and_measure(read: Callable[[], Any], method: Method, options: Options) -> Row:
    return measure(read(), method, options)
