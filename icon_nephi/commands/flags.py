"""The flags of the commands, and which paths they may be."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

IMAGES = (".nii.gz", ".nii", ".nrrd", ".mha", ".tif", ".tiff")
TRANSFORMS = (".h5", ".hdf5", ".tfm", ".txt")
VECTORS = (".nii.gz", ".nii", ".nrrd", ".mha")
POINTS = (".csv", ".fcsv", ".mrk.json", ".vtk", ".ply", ".stl", ".gii")
MODALITIES = ("ct", "mri", "none")
MODELS = ("lung", "brain", "knee", "unigradicon", "multigradicon", "none")


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line, which names the flags that were meant."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """All of the arguments, or the complaint."""
        given, others = self.parse_known_args(args, namespace)
        if others:
            flags = [f for f in self._option_string_actions if f.startswith("--")]
            near = [flag for flag in flags if others[0].lstrip("-") in flag]
            near = near or get_close_matches(others[0], flags)
            meant = f" (did you mean {' or '.join(near[:4])}?)" if near else ""
            self.error(f"unrecognized arguments: {' '.join(others)}{meant}")
        return given

    def error(self, message: str) -> NoReturn:
        """Raise what the commands turn into exit code 2."""
        raise ValueError(f"{message}; see {self.prog} --help")


def check_output(name: str, path: Path | None, endings: Sequence[str]) -> Path | None:
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


def is_own(path: Path) -> bool:
    """Whether --transform is a .nephi file; else an ITK transform.

    Raises:
        ValueError: another ending.
    """
    endings = (".nephi", *TRANSFORMS)
    if not str(path).lower().endswith(endings):
        raise ValueError(f"--transform: {path} must end in one of {', '.join(endings)}")
    return str(path).lower().endswith(".nephi")


def _iterations(text: str) -> int | None:
    """A count, or None for "none"; argparse names it in its complaint."""
    if text.lower() == "none":
        return None
    count = int(text)
    if count < 0:
        raise ValueError
    return count


def _parser(prog: str, description: str, epilog: str) -> Parser:
    return Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def register_parser() -> Parser:
    """The flags of nephi-register."""
    parser = _parser(
        "nephi-register",
        "Register two 2D or 3D images with a neural deformation field, optimised for "
        "this pair from scratch or after a pretrained network.",
        """examples:
  nephi-register --fixed exhale.nii.gz --moving inhale.nii.gz \\
      --fixed_modality ct --moving_modality ct \\
      --transform_out transform.hdf5 --warped_moving_out warped.nii.gz
  nephi-register --fixed a.nrrd --moving b.nrrd --save a_b.nephi --quiet
  nephi-register --fixed t1.nii.gz --moving t2.nii.gz --similarity mind \\
      --save pair.nephi --report report.html --json summary.json
  nephi-register --model unigradicon --fixed a.nrrd --moving b.nrrd \\
      --fixed_modality mri --moving_modality mri --transform_out transform.hdf5
  nephi-register --pairs pairs.csv --out_dir results --preset fast

The transform maps points of the fixed image to the moving image (LPS mm), which is
what ITK and 3D Slicer need to resample the moving image onto the fixed one.

pairs.csv has the columns fixed and moving and may have name and those of other inputs
(fixed_mask, moving_modality, landmarks_fixed, ...); relative paths start where the CSV
lies. Each pair gets a folder in --out_dir; a finished one is skipped next time.

exit codes: 0 done, 1 some pairs of --pairs failed, 2 wrong input or out of memory,
130 stopped by Ctrl-C.""",
    )
    inputs = parser.add_argument_group("inputs")
    add = inputs.add_argument
    add("--fixed", type=Path, help="image that stays")
    add("--moving", type=Path, help="image that is aligned to it")
    for image in ("fixed", "moving"):
        add(
            f"--{image}_modality",
            choices=MODALITIES,
            default="none",
            help="how to scale intensities: ct takes Hounsfield units (default: none)",
        )
    window: dict[str, Any] = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    for image in ("fixed", "moving"):
        add(f"--{image}_window", **window, help="clip its intensities to these")
    add("--quantiles", **window, help="clip both to these shares, such as 0.01 0.99")
    for image in ("fixed", "moving"):
        add(f"--{image}_mask", type=Path, help="look only where this is above zero")
    for image in ("fixed", "moving"):
        add(f"--{image}_segmentation", type=Path, help="label map to lay on the other")
    outputs = parser.add_argument_group("outputs")
    add = outputs.add_argument
    formats = f"({', '.join(TRANSFORMS)})"
    add("--transform_out", type=Path, help=f"ITK transform, fixed -> moving {formats}")
    add("--inverse_transform_out", type=Path, help="the same, moving -> fixed")
    add("--warped_moving_out", type=Path, help="moving image on the fixed grid")
    add(
        "--displacement_out",
        type=Path,
        help="fixed -> moving as LPS mm vectors on the fixed grid, which ANTs and "
        f"3D Slicer read as a transform ({', '.join(VECTORS)})",
    )
    add(
        "--inverse_displacement_out",
        type=Path,
        help="the same, moving -> fixed on the moving grid",
    )
    add("--jacobian_out", type=Path, help="determinant, fixed -> moving, fixed grid")
    add("--error_out", type=Path, help="the error to expect in mm, on the fixed grid")
    add("--save", type=Path, help="everything in one small .nephi file for nephi-warp")
    add("--report", type=Path, help="a page to look at (.html)")
    add("--json", type=Path, metavar="FILE", help="all numbers; - for standard output")
    scores = parser.add_argument_group("scores")
    add = scores.add_argument
    for image in ("fixed", "moving"):
        add(
            f"--landmarks_{image}",
            type=Path,
            help="points, row by row the same in both (.csv with x,y,z in LPS mm, "
            ".fcsv, .mrk.json): their distance before and after",
        )
    for image in ("fixed", "moving"):
        add(f"--labels_{image}", type=Path, help="label map: Dice before and after")
    how = parser.add_argument_group("how")
    add = how.add_argument
    add(
        "--preset",
        choices=("fast", "default", "accurate"),
        default="default",
        help="how long to work at a pair",
    )
    add(
        "--similarity",
        choices=("ncc", "lncc", "lncc2", "mind", "mi"),
        help="mind or mi for other modalities, lncc2 where contrasts may be inverted "
        "(default: lncc)",
    )
    add("--model", choices=MODELS, default="none", help="start from this network's map")
    add("--network_weights", type=Path, help="its weights (default: downloaded once)")
    add(
        "--io_iterations",
        type=_iterations,
        default=50,
        metavar="N",
        help="refine a model's map in N steps, none: not at all (default: 50)",
    )
    add(
        "--io_sim",
        choices=("lncc", "lncc2"),
        default="lncc",
        help="similarity of those steps (default: lncc)",
    )
    add(
        "--mass_preserving",
        action="store_true",
        help="CT: what is stretched gets thinner, intensities times the determinant",
    )
    add("--no_affine", action="store_true", help="trust the headers, no affine start")
    add("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    add(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="register N times; how far the results lie apart sharpens the expected "
        "error, the first is the result (default: 1)",
    )
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    add("--time_limit", type=float, help="seconds after which to stop early")
    add(
        "--keep_on_interrupt",
        action="store_true",
        help="Ctrl-C stops the optimisation early, too, and what it has reached is "
        "written; a second one discards it (default: the first does)",
    )
    add("--quiet", action="store_true", help="no progress bar, no summary")
    many = parser.add_argument_group("many pairs")
    many.add_argument("--pairs", type=Path, help="CSV with a pair a row, see below")
    many.add_argument("--out_dir", type=Path, help="existing folder for its results")
    return parser


def warp_parser() -> Parser:
    """The flags of nephi-warp."""
    parser = _parser(
        "nephi-warp",
        "Apply a registration to an image, a label map, points or a mesh.",
        """examples:
  nephi-warp --transform a_b.nephi --image moving.nii.gz --out warped.nii.gz
  nephi-warp --transform a_b.nephi --labels moving_seg.nii.gz --out warped_seg.nii.gz
  nephi-warp --transform T.hdf5 --image moving.nrrd --reference fixed.nrrd --out w.nrrd
  nephi-warp --transform a_b.nephi --points fixed_points.csv --out in_moving.csv
  nephi-warp --transform a_b.nephi --points moving.vtk --to fixed --out in_fixed.vtk

Images and label maps go from the moving image's space to the fixed image's grid;
points go from the fixed image to the moving image. --inverse turns both around, or
say --to fixed, --to moving: the image in whose space the result lies. Where there is
no image the result has the image's least value (air in CT); beside label maps 0.

Coordinates are LPS mm, unless the file says RAS: .fcsv and .mrk.json name their frame,
.vtk may (SPACE=RAS), .gii is RAS. Other columns, triangles and data are kept.""",
    )
    add = parser.add_argument
    formats = f".nephi, {', '.join(TRANSFORMS)}"
    add("--transform", type=Path, required=True, help=f"of nephi-register ({formats})")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", type=Path, help="image to warp")
    what.add_argument("--labels", type=Path, help="label map to warp")
    what.add_argument(
        "--points",
        type=Path,
        help="points or mesh: .csv with columns x,y,z (2D: x,y), .fcsv, .mrk.json, "
        ".vtk, .ply, .stl, .gii",
    )
    add("--reference", type=Path, help="image whose grid the result gets")
    add(
        "--interpolation",
        choices=("linear", "cubic", "nearest", "onehot"),
        help="of an image linear (default) or cubic (B-splines); of labels nearest "
        "(default) or onehot (each label read linearly, the largest share wins)",
    )
    add("--out", type=Path, required=True, help="image; points: ending as they have")
    add(
        "--errors",
        action="store_true",
        help="add a column with the error to expect in mm (.csv of a .nephi only)",
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--inverse",
        action="store_true",
        help="images from fixed to moving, points from moving to fixed (.nephi only)",
    )
    way.add_argument(
        "--to", choices=("fixed", "moving"), help="where to take it (.nephi only)"
    )
    add("--quiet", action="store_true", help="print nothing but warnings")
    return parser


def jacobian_parser() -> Parser:
    """The flags of nephi-jacobian."""
    parser = _parser(
        "nephi-jacobian",
        "The Jacobian of a registration in physical units (mm by mm), fixed -> moving.",
        """examples:
  nephi-jacobian --transform a_b.nephi --out determinant.nii.gz
  nephi-jacobian --transform a_b.nephi --inverse --log --out log_determinant.nrrd
  nephi-jacobian --transform T.hdf5 --reference fixed.nrrd --tensor --out tensor.nrrd

The determinant is volume in the moving image over volume in the fixed image; at or
below 0 the map folds. The tensor has d * d numbers a voxel, row by row: number d i + j
is d (mapped coordinate i) / d (coordinate j), LPS axes. Of a .nephi file derivatives
are exact, of an ITK transform central differences a twentieth of a voxel to each side.
In Python a tensor is itk.imread(path, itk.VariableLengthVector[itk.F]).""",
    )
    add = parser.add_argument
    formats = f".nephi, {', '.join(TRANSFORMS)}"
    add("--transform", type=Path, required=True, help=f"of nephi-register ({formats})")
    add("--out", type=Path, required=True, help="image, fixed grid or the reference's")
    add(
        "--reference",
        type=Path,
        help="image whose grid the result gets (default: the fixed image's)",
    )
    add(
        "--inverse",
        action="store_true",
        help="moving -> fixed, on the moving image's grid (.nephi only)",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--log",
        action="store_true",
        help="logarithm of the determinant; NaN where it folds, and a warning",
    )
    kind.add_argument("--tensor", action="store_true", help="the whole matrix")
    add("--quiet", action="store_true", help="print nothing but warnings")
    return parser


def info_parser() -> Parser:
    """The flags of nephi-info."""
    parser = _parser(
        "nephi-info",
        "What is in a saved registration or an ITK transform.",
        """examples:
  nephi-info a_b.nephi
  nephi-info transform.hdf5 --json

A .nephi file holds both directions, fixed image -> moving image and back.""",
    )
    formats = f".nephi, {', '.join(TRANSFORMS)}"
    parser.add_argument("file", type=Path, metavar="FILE", help=formats)
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def compare_parser() -> Parser:
    """The flags of nephi-compare."""
    parser = _parser(
        "nephi-compare",
        "Register your own pairs with NePhi and with a voxel network (GradICON), both "
        "optimised for each pair from scratch in the same time.",
        """examples:
  nephi-compare --data pairs --out compare.csv
  nephi-compare --data pairs --cases patient_1 patient_2 --seconds 120

A folder for each pair holds fixed.nii.gz and moving.nii.gz and, where there are, masks
(fixed_mask.nii.gz ...), label maps (fixed_labels.nii.gz ...), landmarks in LPS mm
(fixed_landmarks.csv ... with the header x,y,z) and case.json ({"modality": "ct"}).
Both map points of the fixed image to the moving image.""",
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of pairs")
    add("--cases", nargs="+", metavar="NAME", help="pairs (default: all)")
    add(
        "--seconds",
        type=float,
        default=60.0,
        help="NePhi stops then; the voxel network gets the time NePhi took, in seconds "
        "of the processor, on a GPU of the clock (default: 60)",
    )
    add("--out", type=Path, help="every number, as CSV")
    add(
        "--side", type=int, default=175, help="longest side of the voxel network's grid"
    )
    add("--threads", type=int, help="of the processor (default: torch's)")
    add("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--quiet", action="store_true", help="no progress bar, no table")
    return parser
