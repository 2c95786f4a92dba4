"""The commands: nephi-register, -warp, -jacobian, -info and -compare."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import numpy as np

from icon_nephi._memory import memory_for
from icon_nephi.commands.flags import (
    IMAGES,
    MODALITIES,
    POINTS,
    TRANSFORMS,
    VECTORS,
    check_output,
    compare_parser,
    info_parser,
    is_own,
    jacobian_parser,
    register_parser,
    warp_parser,
)


def _one_sentence(prog: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn errors of input and memory, and Ctrl-C, into a line on stderr and a code."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(argv: Sequence[str] | None = None) -> None:
            try:
                with memory_for("this"):
                    command(argv)
            except (ValueError, TypeError, OSError, MemoryError) as error:
                said = " ".join(str(error).split())
                print(f"{prog}: {said}", file=sys.stderr)
                raise SystemExit(2) from None
            except KeyboardInterrupt as stop:
                said = str(stop) or "what was not finished is not written"
                print(f"{prog}: stopped by the user; {said}", file=sys.stderr)
                raise SystemExit(130) from None

        return run

    return decorate


@_one_sentence("nephi-register")
def register(argv: Sequence[str] | None = None) -> None:
    """Nothing; registers two image files, or the pairs of a table."""
    typed = list(sys.argv[1:] if argv is None else argv)
    given = register_parser().parse_args(typed)
    command = ["nephi-register", *typed]
    if given.pairs is not None or given.out_dir is not None:
        _register_pairs(given, command)
        return

    from icon_nephi.commands import register as runs
    from icon_nephi.commands.info import summary_lines

    runs.check_flags(given)
    found = runs.run(given, command)
    for warning in found["warnings"]:
        print(f"nephi-register: warning: {warning}", file=sys.stderr)
    if str(given.json) == "-":
        print(json.dumps(found, indent=2))
    elif not given.quiet:
        print("\n".join(summary_lines(found)))


def _register_pairs(given: argparse.Namespace, command: list[str]) -> None:
    from icon_nephi.commands import batch
    from icon_nephi.commands import register as runs

    if given.pairs is None or given.out_dir is None:
        raise ValueError("--pairs and --out_dir belong together: give both")
    names = (*runs.OUTPUTS, "json", *batch.FILES)
    both = [f"--{name}" for name in names if getattr(given, name) is not None]
    if both:
        raise ValueError(
            f"{both[0]} is for one pair; with --pairs inputs are columns of the table "
            "and outputs lie in --out_dir"
        )
    if given.keep_on_interrupt:
        raise ValueError(
            "--keep_on_interrupt is for one pair; of --pairs the finished ones are "
            "kept in any case, and the one that was stopped is done again next time"
        )
    if not given.out_dir.is_dir() or not os.access(given.out_dir, os.W_OK):
        what = "cannot be written to" if given.out_dir.is_dir() else "is not a folder"
        raise ValueError(f"--out_dir: {given.out_dir} {what}")
    rows = batch.read_pairs(given.pairs, MODALITIES)

    def run(pair: argparse.Namespace) -> dict[str, Any]:
        runs.check_flags(pair)
        return runs.run(pair, command)

    from tqdm import tqdm

    found = batch.run_pairs(rows, given, run)
    rank, world = batch.place()
    count = len(rows[rank::world])
    bar = tqdm(found, "registering", count, disable=given.quiet, leave=False)
    results: list[dict[str, Any]] = []
    try:
        for row in bar:
            results.append(row)
    except KeyboardInterrupt:
        bar.close()
        raise KeyboardInterrupt(
            f"{len(results)} of {count} pairs are done, and the same command goes on "
            "with the others"
        ) from None
    if not given.quiet:
        print(batch.aligned(results, batch.HEADS))
        print(f"summary: {batch.summary_in(given.out_dir)}")
    failed = sum(row["status"] == "failed" for row in results)
    if failed:
        print(f"nephi-register: {failed} of {count} pairs failed", file=sys.stderr)
        raise SystemExit(1)


@_one_sentence("nephi-warp")
def warp(argv: Sequence[str] | None = None) -> None:
    """Write an image, a label map, points or a mesh, moved by a registration."""
    given = warp_parser().parse_args(argv)
    kind = "points" if given.points else "labels" if given.labels else "image"
    ending = given.points and next(
        (e for e in POINTS if given.points.name.lower().endswith(e)), None
    )
    out = check_output(
        "out", given.out, ((ending,) if ending else POINTS) if given.points else IMAGES
    )
    assert out is not None  # argparse requires it
    allowed = {"image": ("linear", "cubic"), "labels": ("nearest", "onehot")}
    if given.interpolation not in (None, *allowed.get(kind, ())):
        raise ValueError(
            f"--interpolation {given.interpolation} is not for --{kind}; of --image "
            "linear or cubic, of --labels nearest or onehot"
        )
    own = is_own(given.transform)
    # An image comes from where its points are looked up, so it goes the other way.
    home = "moving" if kind == "points" else "fixed"
    inverse = given.inverse if given.to is None else given.to != home
    if (given.inverse or given.to) and not own:
        raise ValueError(
            f"--{'inverse' if given.inverse else 'to'} needs a .nephi file; of an ITK "
            "transform give the file that nephi-register wrote to "
            "--inverse_transform_out"
        )

    if given.errors and not (own and ending == ".csv"):
        raise ValueError("--errors needs a .nephi file and --points in a .csv")

    from icon_nephi.commands import warp as warps
    from icon_nephi.io.atomic import written_whole
    from icon_nephi.maps.two_way import direction_of, opposite

    mapping, direction = warps.read_map(given.transform), direction_of(inverse=inverse)
    if given.points:
        way, odd = warps.move_points(
            mapping,
            given.points,
            out,
            direction=direction,
            reference=given.reference,
            errors=given.errors,
        )
        for warning in odd:
            print(f"nephi-warp: warning: {warning}", file=sys.stderr)
    else:
        from icon_nephi.io.itk_images import write_image

        result = warps.warp_image(
            mapping,
            getattr(given, kind),
            labels=kind == "labels",
            mode=given.interpolation,
            reference=given.reference,
            inverse=inverse,
        )
        with written_whole(out) as (part,):
            write_image(result, part)
        way = warps.in_words(opposite(direction))
        way = way if own else "to the reference's grid, as the transform says"
    if not given.quiet:
        print(f"{kind}: {way}\nout: {out}")


@_one_sentence("nephi-jacobian")
def jacobian(argv: Sequence[str] | None = None) -> None:
    """Write determinants, their logarithm or the matrices, and sum them up."""
    given = jacobian_parser().parse_args(argv)
    out = check_output("out", given.out, VECTORS if given.tensor else IMAGES)
    assert out is not None  # argparse requires it
    own = is_own(given.transform)
    if given.inverse and not own:
        raise ValueError(
            "--inverse needs a .nephi file; of an ITK transform give the file that "
            "nephi-register wrote to --inverse_transform_out"
        )

    from icon_nephi.commands import warp as warps
    from icon_nephi.io.atomic import written_whole
    from icon_nephi.io.itk_images import array_of, geometry_of, image_of, write_image
    from icon_nephi.maps.jacobians import count_folds
    from icon_nephi.maps.two_way import direction_of
    from icon_nephi.report.measure import spread_of

    mapping = warps.read_map(given.transform)
    direction = direction_of(inverse=given.inverse)
    reference = warps.read_reference(given.reference, mapping)
    if given.tensor:
        result = mapping.jacobian(reference, direction)
        numbers = array_of(result).astype(float)
        d = result.GetImageDimension()
        values = np.linalg.det(numbers.reshape(*numbers.shape[:-1], d, d))
    else:
        result = mapping.jacobian_determinant(reference, direction)
        values = array_of(result)
    folds = count_folds(values)
    if given.log:
        logs = np.log(np.where(values > 0, values, np.nan)).astype(np.float32)
        result = image_of(logs, geometry_of(result))
    with written_whole(out) as (part,):
        write_image(result, part)
    if given.log and folds:
        print(
            f"nephi-jacobian: warning: {folds} voxels have no logarithm (determinant "
            "not positive): they are NaN",
            file=sys.stderr,
        )
    if not given.quiet:
        said = warps.in_words(direction) if own else "as the transform says"
        ends = ", ".join(f"{k} {v:.4f}" for k, v in spread_of(values).items())
        print(
            f"jacobian: {said}, mm by mm\ndeterminant: {ends}\n"
            f"folds: {folds} of {values.size} voxels\nout: {out}"
        )


@_one_sentence("nephi-info")
def info(argv: Sequence[str] | None = None) -> None:
    """Nothing; says what is in a saved registration or an ITK transform."""
    given = info_parser().parse_args(argv)
    endings = (".nephi", *TRANSFORMS)
    if not str(given.file).lower().endswith(endings):
        raise ValueError(f"{given.file} must end in one of {', '.join(endings)}")

    from icon_nephi.commands.info import describe, lines

    found = describe(given.file)
    print(json.dumps(found, indent=2) if given.json else "\n".join(lines(found)))


@_one_sentence("nephi-compare")
def compare(argv: Sequence[str] | None = None) -> None:
    """Nothing; NePhi and a voxel network on the pairs of a folder, as a table."""
    given = compare_parser().parse_args(argv)
    out = check_output("out", given.out, (".csv",))
    for flag, least in (("seconds", 0.01), ("side", 17), ("threads", 1)):
        value = getattr(given, flag)
        if value is not None and not value >= least:
            raise ValueError(f"--{flag} must be at least {least}, got {value}")

    from tqdm import tqdm

    from icon_nephi.commands import compare as tools
    from icon_nephi.commands.cases import find_cases, read_case
    from icon_nephi.commands.methods import METHODS, Options
    from icon_nephi.io.atomic import write_csv
    from icon_nephi.io.image_input import choose_device

    choose_device(given.device, None)
    folders = find_cases(given.data, given.cases)
    readers = {n: partial(read_case, home, n) for n, home in folders.items()}
    for read in readers.values():
        read()  # complains now, not after an hour
    names = ("seconds", "seed", "device", "threads", "side")
    options = Options(**{name: getattr(given, name) for name in names})
    rows: list[dict[str, Any]] = []
    total = len(readers) * len(METHODS)
    found = tools.compare_cases(readers, METHODS, options)
    for row in tqdm(found, "registering", total, disable=given.quiet, leave=False):
        rows.append(row)
        if out is not None:
            write_csv(out, tools.COLUMNS, rows)
    if not given.quiet:
        print(comparison_table(rows))
    failed = sum("error" in row for row in rows)
    if failed:
        print(f"nephi-compare: {failed} of {total} failed", file=sys.stderr)
        raise SystemExit(1)


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of a comparison as aligned columns; empty ones are left out."""
    heads = {
        "case": ("case", "s"),
        "method": ("method", "s"),
        **{"before_tre_mm": ("before mm", ".2f"), "tre_mm": ("TRE mm", ".2f")},
        **{"before_dice": ("before", ".3f"), "dice": ("Dice", ".3f")},
        "folds_voxels_percent": ("folds % voxels", ".2g"),
        "folds_points_percent": ("% points", ".2g"),
        "inverse_consistency_mm": ("inverse mm", ".3f"),
        **{"representation_m": ("map M", ".2f"), "encoder_m": ("encoder M", ".2f")},
        **{"inference_ms": ("inference ms", ".0f"), "step_ms": ("step ms", ".0f")},
        **{"steps": ("steps", "d"), "peak_gib": ("peak GiB", ".2f")},
    }
    from icon_nephi.commands.batch import aligned

    return aligned(rows, heads)
