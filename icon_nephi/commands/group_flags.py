"""The flags of nephi-series and nephi-template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from icon_nephi.commands.flags import MODALITIES
from icon_nephi.commands.parsing import Flags, flag

_input = partial(flag, group="inputs")
_output = partial(flag, group="outputs")
_how = partial(flag, group="how")
_SIMILARITIES = ("ncc", "lncc", "lncc2", "mind", "mi")
_SAVED = (
    "everything in one small .nephi file; while a run lasts FILE.begun holds what is "
    "done, and the same command goes on from there"
)


@dataclass(frozen=True)
class SeriesFlags(Flags):
    """The flags of nephi-series."""

    PROG = "nephi-series"
    ABOUT = (
        "Register all images of a series (a breath, a heartbeat, visits over years) at "
        "once: consistent maps between any two, both ways, at any time."
    )
    EXAMPLES = """examples:
  nephi-series --images 4d.nii.gz --periodic --save s.nephi --report s.html
  nephi-series --images visit1.nii.gz visit2.nii.gz visit3.nii.gz --times 0 1.5 4 \\
      --save visits.nephi --jacobians_out growth.nii.gz
  nephi-series --images 4d.nii.gz --modality ct --reference 0 --transforms_out maps \\
      --points tumour.csv --points_image 0 --points_out path.csv

No image is special: all are laid on their mean. --reference N (the first is 0) says in
whose space results are. An image that cannot be used is named and left out."""

    images: Sequence[Path] = _input(
        "one 4D file, or two or more images", type=Path, nargs="+", required=True
    )
    times: Sequence[float] | None = _input(
        "of each image, increasing", type=float, nargs="+", metavar="T"
    )
    periodic: bool = _input("the first image follows the last again", False)
    period: float | None = _input("the time after which it does")
    masks: Sequence[Path] | None = _input(
        "where each image counts, above zero", type=Path, nargs="+"
    )
    modality: str = _input(
        "how to scale intensities: ct takes Hounsfield units (default: none)",
        "none",
        choices=MODALITIES,
    )
    points: Path | None = _input("points or mesh to follow (.csv, .vtk, ...)")
    points_image: int | None = _input(
        "the image they are points of (default: the reference)", metavar="N"
    )

    save: Path | None = _output(_SAVED)
    report: Path | None = _output("a page to look at, with a slider for time (.html)")
    json: Path | None = _output("all numbers; - for standard output", metavar="FILE")
    transforms_out: Path | None = _output(
        "folder for ITK transforms, reference -> image N: N.h5, and back: N_inverse.h5",
        metavar="DIR",
    )
    displacements_out: Path | None = _output(
        "folder for them as LPS mm vectors, reference -> image N: N.nii.gz",
        metavar="DIR",
    )
    jacobians_out: Path | None = _output("their determinants as one 4D file")
    warped_out: Path | None = _output("all images on the reference as one 4D file")
    mean_out: Path | None = _output("the mean of these: sharp, without motion")
    points_out: Path | None = _output(
        ".csv: a row for each time and point; else a file of the kind of --points for "
        "each time, numbered, and for .vtk a .series file that ParaView opens"
    )

    reference: str = _how("mean, or the number of an image", "mean")
    preset: str = _how(
        "how long to work", "default", choices=("fast", "default", "accurate")
    )
    similarity: str | None = _how("as of nephi-register", choices=_SIMILARITIES)
    affine: bool = _how(
        "look for an affine map of each first (default: where headers do not lay the "
        "images on each other)",
        False,
    )
    seed: int = _how("of the random numbers (default: 0)", 0)
    device: str | None = _how("cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    time_limit: float | None = _how("seconds after which to stop early")
    keep_on_interrupt: bool = _how("Ctrl-C stops early, what is reached counts", False)
    quiet: bool = _how("no progress bar, no summary", False)


@dataclass(frozen=True)
class TemplateFlags(Flags):
    """The flags of nephi-template."""

    PROG = "nephi-template"
    ABOUT = "Build a group's template: its mean image, in the middle of all shapes."
    EXAMPLES = """examples:
  nephi-template --images people/*.nii.gz --out template.nii.gz --save t.nephi
  nephi-template --images a.nii.gz b.nii.gz c.nii.gz --modality mri \\
      --labels a_seg.nii.gz b_seg.nii.gz c_seg.nii.gz \\
      --out template.nii.gz --labels_out template_seg.nii.gz --report t.html

A new image is registered to a template as to any other:
  nephi-register --fixed template.nii.gz --moving new.nii.gz --save new.nephi"""

    images: Sequence[Path] = _input("of a group", type=Path, nargs="+", required=True)
    masks: Sequence[Path] | None = _input(
        "where each image counts, above zero", type=Path, nargs="+"
    )
    labels: Sequence[Path] | None = _input(
        "label map of each image, to fuse", type=Path, nargs="+"
    )
    modality: str = _input(
        "how to scale intensities: ct takes Hounsfield units (default: none)",
        "none",
        choices=MODALITIES,
    )

    out: Path | None = _output("the template")
    labels_out: Path | None = _output("at each voxel the label of most images")
    save: Path | None = _output(_SAVED)
    report: Path | None = _output("a page to look at, with a slider for people (.html)")
    json: Path | None = _output("all numbers; - for standard output", metavar="FILE")

    preset: str = _how(
        "how long to work", "default", choices=("fast", "default", "accurate")
    )
    similarity: str | None = _how("as of nephi-register", choices=_SIMILARITIES)
    no_affine: bool = _how("trust the headers, no affine start", False)
    seed: int = _how("of the random numbers (default: 0)", 0)
    device: str | None = _how("cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    time_limit: float | None = _how("seconds after which to stop early")
    keep_on_interrupt: bool = _how("Ctrl-C stops early, what is reached counts", False)
    quiet: bool = _how("no progress bar, no summary", False)
