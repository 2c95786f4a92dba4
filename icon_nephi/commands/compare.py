"""nephi-compare: the same pairs by several methods, in the same time, one machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from tqdm import tqdm

from icon_nephi.commands import cases, methods
from icon_nephi.commands.cases import Case
from icon_nephi.commands.early import check_compare
from icon_nephi.commands.flags import CompareFlags
from icon_nephi.commands.methods import (
    MapPair,
    Method,
    Options,
    alone,
    now,
    peak_gib,
)
from icon_nephi.io.atomic import write_csv
from icon_nephi.io.image_input import choose_device, read_input
from icon_nephi.io.itk_images import resample_to
from icon_nephi.maps.framed import over_grid
from icon_nephi.maps.two_way import TwoWay
from icon_nephi.report.expected_error import inverse_consistency
from icon_nephi.report.measure import flips_on_grid, mean_dice_at
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


def compare_folder(flags: CompareFlags) -> list[Row]:
    """Return a row of `COLUMNS` for each case and method; write them as they come.

    Raises:
        ValueError: flags or cases that cannot be used.
    """
    check_compare(flags)
    out = flags.out
    choose_device(flags.device, None)
    homes = cases.find_cases(flags.data, flags.cases)
    readers = {n: partial(cases.read_case, home, n) for n, home in homes.items()}
    for read in readers.values():
        read()  # complains now, not after an hour
    names = ("seconds", "seed", "device", "threads", "side")
    options = Options(**{name: getattr(flags, name) for name in names})
    rows: list[Row] = []
    each = compare_cases(readers, methods.METHODS, options)
    total = len(readers) * len(methods.METHODS)
    for row in tqdm(each, "registering", total, disable=flags.quiet, leave=False):
        rows.append(row)
        if out is not None:
            write_csv(out, COLUMNS, rows)
    return rows


def measure(case: Case, method: Method, options: Options) -> Row:
    """Return a row of `COLUMNS`: one registration, its cost, and its errors.

    ``inference_ms`` goes from the images to the displacement at every voxel of the
    fixed image, ``peak_gib`` up to there.
    """
    torch.set_num_threads(options.threads or torch.get_num_threads())
    began = now(device := choose_device(options.device, None))
    pair = method(case, options)
    row: Row = {"seconds": now(device) - began}
    maps = maps_of(pair, options.device)
    fixed = read_input("B", case.fixed, None)[2]
    size, box = fixed.size, fixed.unit_to_physical()
    moved = over_grid(lambda _, at: at, size, box, fixed.dimension, mapped=maps.forward)
    row["inference_ms"] = 1000 * (now(device) - began)
    row |= {"peak_gib": peak_gib(device), "steps": pair.steps}
    row["step_ms"] = pair.step_seconds and 1000 * pair.step_seconds
    row |= {f"{n}_m": getattr(pair, n) / 1e6 for n in NUMBERS}
    row["grid"], row["warnings"] = pair.place_B.size, "; ".join(pair.warnings)
    row["folds_voxels_percent"] = flips_on_grid(moved, fixed)
    spread = np.random.default_rng(0).uniform(size=(POINTS, fixed.dimension))
    points = apply_affine(box, torch.from_numpy(spread)).numpy()
    row["folds_points_percent"] = 100 * maps.fold_fraction(points)
    row["inverse_consistency_mm"] = float(inverse_consistency(maps, points).mean())
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


def maps_of(pair: MapPair, device: str | None) -> TwoWay:
    """Return a method's maps as maps of millimetres, on a device."""
    places = pair.place_A, pair.place_B
    return TwoWay(pair.phi_AB, pair.phi_BA, *places, choose_device(device, None))


def compare_cases(
    readers: Mapping[str, Callable[[], Any]],
    ways: Mapping[str, Method],
    options: Options,
) -> Iterator[Row]:
    """Yield a row for each case and method; all are functions that can be pickled.

    Each has its own process; others get the time that the first took for a case.
    """
    for name, read in readers.items():
        told = options
        for label, method in ways.items():
            row = alone(_read_and_measure, read, method, told)
            if told is options and "seconds" in row:
                told = replace(options, seconds=row["seconds"])
            yield {"case": name, "method": label} | row


def _read_and_measure(read: Callable[[], Any], method: Method, options: Options) -> Row:
    return measure(read(), method, options)
