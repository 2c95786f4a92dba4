"""The flags of the commands, and which paths they may be."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

IMAGES = (".nii.gz", ".nii", ".nrrd", ".mha", ".tif", ".tiff")
TRANSFORMS = (".h5", ".hdf5", ".tfm", ".txt")
MODALITIES = ("ct", "mri", "none")
MODELS = ("lung", "brain", "knee", "unigradicon", "multigradicon", "none")


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

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


def _iterations(text: str) -> int | None:
    """A count, or None for "none"; argparse names it in its complaint."""
    if text.lower() == "none":
        return None
    count = int(text)
    if count < 0:
        raise ValueError
    return count


def register_parser() -> Parser:
    """The flags of nephi-register."""
    parser = Parser(
        prog="nephi-register",
        description="Register two 2D or 3D images with a neural deformation field, "
        "optimised for this pair from scratch or after a pretrained network.",
        epilog="""examples:
  nephi-register --fixed exhale.nii.gz --moving inhale.nii.gz \\
      --fixed_modality ct --moving_modality ct \\
      --transform_out transform.hdf5 --warped_moving_out warped.nii.gz
  nephi-register --fixed a.nrrd --moving b.nrrd --save a_b.nephi --quiet
  nephi-register --model unigradicon --fixed a.nrrd --moving b.nrrd \\
      --fixed_modality mri --moving_modality mri --transform_out transform.hdf5

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
        help="similarity; lncc2 where contrasts may be inverted (default: lncc)",
    )
    add("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    add("--no_affine", action="store_true", help="trust the headers, no affine start")
    add("--time_limit", type=float, help="seconds after which to stop early")
    add("--quiet", action="store_true", help="no progress bar, no summary")
    return parser


def warp_parser() -> Parser:
    """The flags of nephi-warp."""
    parser = Parser(
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


def compare_parser() -> Parser:
    """The flags of nephi-compare."""
    parser = Parser(
        prog="nephi-compare",
        description="Register your own pairs with NePhi and with a voxel network "
        "(GradICON), both optimised for each pair from scratch in the same time.",
        epilog="""examples:
  nephi-compare --data pairs --out compare.csv
  nephi-compare --data pairs --cases patient_1 patient_2 --seconds 120

A folder for each pair holds fixed.nii.gz and moving.nii.gz and, where there are, masks
(fixed_mask.nii.gz ...), label maps (fixed_labels.nii.gz ...), landmarks in LPS mm
(fixed_landmarks.csv ... with the header x,y,z) and case.json ({"modality": "ct"}).""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
