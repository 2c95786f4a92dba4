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
from torch import Tensor

from icon_nephi import metrics
from icon_nephi.cases import Case
from icon_nephi.coordinates import apply_affine
from icon_nephi.inputs import choose_device, read_input
from icon_nephi.methods import Method, Options, now, peak_gib
from icon_nephi.physical import FramedMap, over_grid

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
    frame_A, frame_B = (p.unit_to_physical() for p in (found.place_A, found.place_B))
    forward = FramedMap(found.phi_AB, frame_B, frame_A, device)
    backward = FramedMap(found.phi_BA, frame_A, frame_B, device)
    fixed = read_input("B", case.fixed, None)[2]
    d, box = fixed.dimension, fixed.unit_to_physical()
    places = over_grid(lambda _, at: at, fixed.size, box, d, mapped=forward)
    moved = torch.from_numpy(places).double()
    row["inference_ms"] = 1000 * (now(device) - began)
    row |= {"peak_gib": peak_gib(device), "steps": found.steps}
    row["step_ms"] = found.step_seconds and 1000 * found.step_seconds
    row |= {f"{n}_m": getattr(found, n) / 1e6 for n in NUMBERS}
    row["grid"], row["warnings"] = found.place_B.size, "; ".join(found.warnings)
    index = apply_affine(torch.linalg.inv(box), moved.flatten(0, -2))
    index = (index * (torch.tensor(fixed.size) - 1)).reshape(*fixed.size, d)
    row["folds_voxels_percent"] = metrics.flips_percentage(index.movedim(-1, 0)[None])
    spread = torch.from_numpy(np.random.default_rng(0).uniform(size=(POINTS, d)))
    points = apply_affine(box, spread).numpy()
    there = forward(points)
    signs = np.concatenate([forward.determinants(points), backward.determinants(there)])
    row["folds_points_percent"] = 100 * metrics.fold_fraction(signs)
    missed = np.linalg.norm(backward(there) - points, axis=1)
    row["inverse_consistency_mm"] = float(missed.mean())
    if case.fixed_points is not None and case.moving_points is not None:
        for name, at in (("before_tre_mm", lambda p: p), ("tre_mm", forward)):
            moved_points = at(case.fixed_points)
            tre = metrics.target_registration_error(moved_points, case.moving_points)
            row[name] = float(tre.mean())
    if case.fixed_labels is not None:
        still = torch.from_numpy(over_grid(lambda p: p, fixed.size, box, d)).double()
        row["before_dice"], row["dice"] = (mean_dice(case, at) for at in (still, moved))
    return row


def mean_dice(case: Case, moved: Tensor) -> float:
    """The mean over labels, moving ones read at ``[*grid, d]`` mm, 0 outside."""
    from icon_nephi import itk_images

    fixed = itk_images.array_of(itk_images.resample_to(case.fixed_labels, case.fixed))
    moving = itk_images.array_of(case.moving_labels).astype(np.int64)
    place = itk_images.geometry_of(case.moving_labels)
    unit = apply_affine(place.physical_to_unit(), moved.flatten(0, -2))
    at = (unit * (torch.tensor(place.size) - 1)).round().long().numpy() + 1
    inside = tuple(at.clip(0, np.array(place.size) + 1).T)
    warped = np.pad(moving, 1)[inside].reshape(fixed.shape)
    overlap = metrics.dice(fixed.astype(np.int64), warped, case.label_ids)
    return float(np.mean(list(overlap.values())))


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
