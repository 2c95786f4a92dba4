"""The commands: nephi-register, nephi-warp and nephi-compare."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from icon_nephi.parsers import (
    IMAGES,
    TRANSFORMS,
    check_output,
    compare_parser,
    register_parser,
    warp_parser,
)


def _one_sentence(prog: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn what bad input raises into one line on stderr and exit code 2."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(argv: Sequence[str] | None = None) -> None:
            try:
                command(argv)
            except (ValueError, TypeError, OSError) as error:
                print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
                raise SystemExit(2) from None

        return run

    return decorate


@_one_sentence("nephi-register")
def register(argv: Sequence[str] | None = None) -> None:
    """Nothing; registers two image files and writes what was asked for."""
    given = register_parser().parse_args(argv)
    outputs = {
        name: path
        for name, endings in (
            ("transform_out", TRANSFORMS),
            ("inverse_transform_out", TRANSFORMS),
            ("warped_moving_out", IMAGES),
            ("save", (".nephi",)),
        )
        if (path := check_output(name, getattr(given, name), endings)) is not None
    }
    if not outputs:
        raise ValueError("nothing to write: give --transform_out or --save")
    if len({path.absolute() for path in outputs.values()}) < len(outputs):
        raise ValueError("two outputs have the same path; give each its own")
    if given.model == "none" and given.network_weights is not None:
        raise ValueError("--network_weights needs --model: which network are they of?")
    if given.model != "none" and given.save is not None:
        raise ValueError(
            "--save holds what is registered from scratch; with --model give "
            "--transform_out"
        )

    from icon_nephi import itk_images

    images = {
        name: itk_images.read_image(f"--{name}", path)
        for name in ("moving", "fixed", "moving_mask", "fixed_mask")
        if (path := getattr(given, name)) is not None
    }
    start = time.perf_counter()
    run = _from_scratch if given.model == "none" else _through_model
    try:
        result = run(given, images)
    except (ValueError, TypeError) as error:
        raise type(error)(_in_flags(str(error))) from error
    seconds = time.perf_counter() - start
    _write(outputs, result, images["moving"])
    for warning in result.warnings:
        print(f"nephi-register: warning: {warning}", file=sys.stderr)
    if not given.quiet:
        _summarize(result, seconds, outputs)


def _from_scratch(given: argparse.Namespace, images: dict[str, Any]) -> Any:
    from icon_nephi.registration import register as run

    kinds = [
        None if kind == "none" else kind
        for kind in (given.moving_modality, given.fixed_modality)
    ]
    return run(
        images["moving"],
        images["fixed"],
        modality=(kinds[0], kinds[1]),
        mask_A=images.get("moving_mask"),
        mask_B=images.get("fixed_mask"),
        similarity=_similarity(given.io_sim),
        affine=not given.no_affine,
        seed=given.seed,
        device=given.device,
        progress=not given.quiet,
        time_limit=given.time_limit,
    )


def _through_model(given: argparse.Namespace, images: dict[str, Any]) -> Any:
    """What `_write` asks for, from a pretrained network and instance optimisation."""
    from icon_nephi import itk_images, pretrained_models
    from icon_nephi.inputs import choose_device
    from icon_nephi.itk_wrapper import register_pair_with_mask

    device = choose_device(given.device, None)
    weights = given.network_weights
    if weights is not None and not weights.is_file():
        raise ValueError(f"--network_weights: {weights} does not exist")
    model = pretrained_models.init_network(
        given.model, neural="residual", weights=weights
    ).to(device)
    model.similarity = _similarity(given.io_sim) or model.similarity
    moving, fixed = (_for_model(given, images, side) for side in ("moving", "fixed"))
    phi_AB, phi_BA = register_pair_with_mask(
        model,
        moving,
        fixed,
        images.get("moving_mask"),
        images.get("fixed_mask"),
        given.io_iterations,
        progress=not given.quiet,
        seed=given.seed,
    )

    def warp(moving: Any) -> Any:
        return itk_images.resample(moving, images["fixed"], phi_AB, "linear")

    return SimpleNamespace(phi_AB=phi_AB, phi_BA=phi_BA, warp=warp, warnings=[])


def _for_model(given: argparse.Namespace, images: dict[str, Any], side: str) -> Any:
    """An image with the intensities its network was trained with."""
    from icon_nephi import pretrained_models as models

    image, mask = images[side], images.get(f"{side}_mask")
    if given.model == "lung":
        return models.lung_network_preprocess(image, mask)
    if given.model == "brain":
        return models.brain_network_preprocess(image)
    kind = "mri" if given.model == "knee" else getattr(given, f"{side}_modality")
    if kind == "none":
        raise ValueError(f"--model {given.model} needs --{side}_modality ct or mri")
    return models.unigradicon_network_preprocess(image, kind, mask)


def _similarity(name: str) -> Any:
    """None (the default, lncc) or the one of that name."""
    from icon_nephi.losses import PatchNCC

    return PatchNCC(1e-3, squared=True) if name == "lncc2" else None


def _write(outputs: dict[str, Path], result: Any, moving: Any) -> None:
    import itk

    from icon_nephi.files import written_whole

    with written_whole(*outputs.values()) as parts:
        for name, part in zip(outputs, parts, strict=True):
            if name == "transform_out":
                itk.transformwrite(result.phi_AB, str(part))
            elif name == "inverse_transform_out":
                itk.transformwrite(result.phi_BA, str(part))
            elif name == "warped_moving_out":
                _write_image(result.warp(moving), part)
            else:
                result.save(part)


def _summarize(result: Any, seconds: float, outputs: dict[str, Path]) -> None:
    print(f"registered in {seconds:.1f} s")
    if hasattr(result, "fold_fraction"):
        folds = 100 * result.fold_fraction()
        errors = np.asarray(result.inverse_consistency_error())
        print(f"folds: {folds:.3g} % of voxels, both directions, analytic determinant")
        print(
            f"inverse consistency: mean {errors.mean():.3f} mm, "
            f"95th percentile {np.percentile(errors, 95):.3f} mm"
        )
    for name, path in outputs.items():
        print(f"{name}: {path}")


@_one_sentence("nephi-warp")
def warp(argv: Sequence[str] | None = None) -> None:
    """Nothing; moves an image, a label map or points and writes the result."""
    given = warp_parser().parse_args(argv)
    kind = "points" if given.points else "labels" if given.labels else "image"
    out = check_output("out", given.out, (".csv",) if kind == "points" else IMAGES)
    assert out is not None  # argparse requires it
    endings = (".nephi", *TRANSFORMS)
    if not str(given.transform).lower().endswith(endings):
        raise ValueError(
            f"--transform: {given.transform} must end in one of {', '.join(endings)}"
        )
    own = str(given.transform).lower().endswith(".nephi")
    if given.inverse and not own:
        raise ValueError(
            "--inverse needs a .nephi file; of an ITK transform give the file that "
            "nephi-register wrote to --inverse_transform_out"
        )

    from icon_nephi import itk_images
    from icon_nephi.files import written_whole

    if own:
        from icon_nephi.registration import load

        transform = load(given.transform)
        if not transform.itk:
            raise ValueError(
                f"--transform: {given.transform} holds a registration of tensors, "
                "which have no place in space; use icon_nephi.load in Python"
            )
    else:
        transform = itk_images.read_transform("--transform", given.transform)
    if kind == "points":
        header, points = _read_points(given.points)
        moved = _move_points(transform, points, own, given.inverse)
        text = [[f"{x:.6f}" for x in row] for row in moved]
        with (
            written_whole(out) as (part,),
            part.open("w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file).writerows([header, *text])
    else:
        image = itk_images.read_image(f"--{kind}", getattr(given, kind))
        reference = None
        if given.reference is not None:
            reference = itk_images.read_image("--reference", given.reference)
        elif not own:
            raise ValueError(
                "--reference is needed with an ITK transform: the image whose grid the "
                "result gets, usually the fixed image"
            )
        mode = "nearest" if kind == "labels" else "linear"
        if own:
            outside = 0 if kind == "labels" else None
            result = transform.warp(
                image, mode, reference, inverse=given.inverse, outside=outside
            )
        else:
            result = itk_images.resample(image, reference, transform, mode)
        with written_whole(out) as (part,):
            _write_image(result, part)
    print(f"out: {out}")


def _move_points(
    transform: Any, points: np.ndarray[Any, Any], own: bool, inverse: bool
) -> Any:
    if own:
        direction = "moving_to_fixed" if inverse else "fixed_to_moving"
        return transform.transform_points(points, direction)
    dimension = transform.GetInputSpaceDimension()
    if dimension != points.shape[1]:
        raise ValueError(
            f"--points has {points.shape[1]} columns but the transform is {dimension}D"
        )
    return [tuple(transform.TransformPoint(row)) for row in points.tolist()]


def _read_points(path: Path) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Header and rows ``[N, d]`` of a CSV file with the columns x, y(, z)."""
    if not path.is_file():
        raise ValueError(f"--points: {path} does not exist")
    try:
        rows = list(csv.reader(path.read_text("utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--points: {path} cannot be read as text") from error
    header = [column.strip().lower() for column in rows[0]] if rows else []
    if header not in (["x", "y"], ["x", "y", "z"]):
        raise ValueError(
            f"--points: {path} must begin with the line x,y,z (in 2D x,y), got "
            f"{','.join(header)[:60]!r}"
        )
    try:
        values = [[float(v) for v in row] for row in rows[1:] if "".join(row).strip()]
    except ValueError:
        values = [[]]
    if any(len(row) != len(header) or not np.isfinite(row).all() for row in values):
        raise ValueError(
            f"--points: {path} must hold rows of {len(header)} finite numbers"
        )
    return header, np.array(values, dtype=float).reshape(-1, len(header))


def _write_image(image: Any, path: Path) -> None:
    import itk

    try:
        itk.imwrite(image, str(path), compression=True)
    except RuntimeError as error:
        raise ValueError(f"{path.suffix} cannot hold this image") from error


def _in_flags(message: str) -> str:
    """The same complaint with the command's names for things."""
    for name, flag in (
        *(("image_A", "--moving"), ("image_B", "--fixed")),
        *(("mask_A", "--moving_mask"), ("mask_B", "--fixed_mask")),
        *(("device ", "--device: "), ("time_limit ", "--time_limit ")),
        ("weights: ", "--network_weights: "),
    ):
        message = message.replace(name, flag)
    return message


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

    from icon_nephi import compare as tools
    from icon_nephi.inputs import choose_device

    choose_device(given.device, None)
    folders = tools.find_cases(given.data, given.cases)
    readers = {n: partial(tools.read_case, home, n) for n, home in folders.items()}
    for read in readers.values():
        read()  # complains now, not after an hour
    names = ("seconds", "seed", "device", "threads", "side")
    options = tools.Options(**{name: getattr(given, name) for name in names})
    rows: list[dict[str, Any]] = []
    total = len(readers) * len(tools.METHODS)
    found = tools.compare_cases(readers, tools.METHODS, options)
    for row in tqdm(found, "registering", total, disable=given.quiet, leave=False):
        rows.append(row)
        if out is not None:
            _write_rows(out, tools.COLUMNS, rows)
    if not given.quiet:
        print(comparison_table(rows))
    failed = sum("error" in row for row in rows)
    if failed:
        print(f"nephi-compare: {failed} of {total} failed", file=sys.stderr)
        raise SystemExit(1)


def _write_rows(path: Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    from icon_nephi.files import written_whole

    with (
        written_whole(path) as (part,),
        part.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `icon_nephi.compare` as aligned columns; empty ones are left out."""
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
    used = [key for key in heads if any(row.get(key) is not None for row in rows)]
    lines = [[heads[key][0] for key in used]]
    for row in rows:
        cells = ((row.get(key), heads[key][1]) for key in used)
        lines.append(["-" if v is None else format(v, form) for v, form in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    errors = ["", *(f"  {row['error']}" if "error" in row else "" for row in rows)]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + error
        for line, error in zip(lines, errors, strict=True)
    )
