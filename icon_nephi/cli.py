"""The commands: nephi-register and nephi-warp."""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

IMAGES = (".nii.gz", ".nii", ".nrrd", ".mha", ".tif", ".tiff")
TRANSFORMS = (".h5", ".hdf5", ".tfm", ".txt")
MODALITIES = ("ct", "mri", "none")


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


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
    given = _register_parser().parse_args(argv)
    outputs = {
        name: path
        for name, endings in (
            ("transform_out", TRANSFORMS),
            ("inverse_transform_out", TRANSFORMS),
            ("warped_moving_out", IMAGES),
            ("save", (".nephi",)),
        )
        if (path := _output(name, getattr(given, name), endings)) is not None
    }
    if not outputs:
        raise ValueError("nothing to write: give --transform_out or --save")
    if len({path.absolute() for path in outputs.values()}) < len(outputs):
        raise ValueError("two outputs have the same path; give each its own")

    from icon_nephi import itk_images
    from icon_nephi.registration import register as run

    images = {
        name: itk_images.read_image(f"--{name}", path)
        for name in ("moving", "fixed", "moving_mask", "fixed_mask")
        if (path := getattr(given, name)) is not None
    }
    kinds = [
        None if kind == "none" else kind
        for kind in (given.moving_modality, given.fixed_modality)
    ]
    start = time.perf_counter()
    try:
        result = run(
            images["moving"],
            images["fixed"],
            modality=(kinds[0], kinds[1]),
            mask_A=images.get("moving_mask"),
            mask_B=images.get("fixed_mask"),
            affine=not given.no_affine,
            seed=given.seed,
            device=given.device,
            progress=not given.quiet,
            time_limit=given.time_limit,
        )
    except (ValueError, TypeError) as error:
        raise type(error)(_in_flags(str(error))) from error
    seconds = time.perf_counter() - start
    _write(outputs, result, images["moving"])
    for warning in result.warnings:
        print(f"nephi-register: warning: {warning}", file=sys.stderr)
    if not given.quiet:
        _summarize(result, seconds, outputs)


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
    folds = 100 * result.fold_fraction()
    errors = np.asarray(result.inverse_consistency_error())
    print(f"registered in {seconds:.1f} s")
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
    given = _warp_parser().parse_args(argv)
    kind = "points" if given.points else "labels" if given.labels else "image"
    out = _output("out", given.out, (".csv",) if kind == "points" else IMAGES)
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


def _output(name: str, path: Path | None, endings: Sequence[str]) -> Path | None:
    """The path if it can be written to, so that no work is done in vain."""
    if path is None:
        return None
    if not path.name.lower().endswith(tuple(endings)):
        raise ValueError(f"--{name}: {path} must end in {', '.join(endings)}")
    if path.is_dir():
        raise ValueError(f"--{name}: {path} is a folder; give a file name in it")
    if not path.parent.is_dir():
        raise ValueError(f"--{name}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--{name}: the folder {path.parent} cannot be written to")
    return path


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
    ):
        message = message.replace(name, flag)
    return message


def _register_parser() -> _Parser:
    parser = _Parser(
        prog="nephi-register",
        description="Register two 2D or 3D images with a neural deformation field, "
        "optimised for this pair.",
        epilog="""examples:
  nephi-register --fixed exhale.nii.gz --moving inhale.nii.gz \\
      --fixed_modality ct --moving_modality ct \\
      --transform_out transform.hdf5 --warped_moving_out warped.nii.gz
  nephi-register --fixed a.nrrd --moving b.nrrd --save a_b.nephi --quiet

The transform maps points of the fixed image to the moving image (LPS mm), which is
what ITK and 3D Slicer need to resample the moving image onto the fixed one.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--fixed", type=Path, required=True, help="image that stays")
    add("--moving", type=Path, required=True, help="image that is aligned to it")
    for image in ("fixed", "moving"):
        add(
            f"--{image}_modality",
            choices=MODALITIES,
            default="none",
            help="how to scale intensities: ct takes Hounsfield units (default: none)",
        )
    for image in ("fixed", "moving"):
        add(f"--{image}_mask", type=Path, help="look only where this is above zero")
    formats = f"({', '.join(TRANSFORMS)})"
    add("--transform_out", type=Path, help=f"ITK transform, fixed to moving {formats}")
    add("--inverse_transform_out", type=Path, help="the same, moving to fixed")
    add("--warped_moving_out", type=Path, help="moving image on the fixed grid")
    add("--save", type=Path, help="everything in one small .nephi file for nephi-warp")
    add("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    add("--no_affine", action="store_true", help="trust the headers, no affine start")
    add("--time_limit", type=float, help="seconds after which to stop early")
    add("--quiet", action="store_true", help="no progress bar, no summary")
    return parser


def _warp_parser() -> _Parser:
    parser = _Parser(
        prog="nephi-warp",
        description="Apply a registration to an image, a label map or points.",
        epilog="""examples:
  nephi-warp --transform a_b.nephi --image moving.nii.gz --out warped.nii.gz
  nephi-warp --transform a_b.nephi --labels moving_seg.nii.gz --out warped_seg.nii.gz
  nephi-warp --transform T.hdf5 --image moving.nrrd --reference fixed.nrrd --out w.nrrd
  nephi-warp --transform a_b.nephi --points fixed_points.csv --out in_moving.csv

Images and label maps go from the moving image's space to the fixed image's grid;
points go from the fixed image to the moving image. --inverse turns both around.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    formats = f".nephi, {', '.join(TRANSFORMS)}"
    add("--transform", type=Path, required=True, help=f"of nephi-register ({formats})")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", type=Path, help="image to warp, read linearly")
    what.add_argument("--labels", type=Path, help="label map to warp, nearest voxel")
    what.add_argument(
        "--points", type=Path, help="CSV with the header x,y,z (2D: x,y), LPS mm"
    )
    add("--reference", type=Path, help="image whose grid the result gets")
    add("--out", type=Path, required=True, help="image, or CSV for points")
    add(
        "--inverse",
        action="store_true",
        help="images from fixed to moving, points from moving to fixed (.nephi only)",
    )
    return parser
