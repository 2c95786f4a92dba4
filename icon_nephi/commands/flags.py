"""The flags of each command, with their help; which endings paths may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from icon_nephi.commands.parsing import Chained, Flags, flag

IMAGES = (".nii.gz", ".nii", ".nrrd", ".mha", ".tif", ".tiff", ".png")
TRANSFORMS = (".h5", ".hdf5", ".tfm", ".txt")
VECTORS = (".nii.gz", ".nii", ".nrrd", ".mha")
#: What is read as a transform beside .nephi: of ANTs, greedy, FSL, and fields.
MAPS = (*TRANSFORMS, ".mat", *VECTORS, ".mhd")
POINTS = (
    *(".csv", ".fcsv", ".mrk.json", ".vtk", ".vtp", ".ply", ".stl", ".obj", ".gii"),
)
SIDES = ("fixed", "moving")
MODALITIES = ("ct", "mri", "none")
MODELS = ("lung", "brain", "knee", "unigradicon", "multigradicon", "none")


def is_own(name: str, path: Path) -> bool:
    """Return whether a path is that of a .nephi file; else of another transform.

    Raises:
        ValueError: another ending, or no file.
    """
    endings = (".nephi", *MAPS)
    if not str(path).lower().endswith(endings):
        raise ValueError(f"{name}: {path} must end in one of {', '.join(endings)}")
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ValueError(f"{name}: {path} {what}")
    return str(path).lower().endswith(".nephi")


def _iterations(text: str) -> int | None:
    """Return a count, or None for "none"; argparse names it in its complaint."""
    if text.lower() == "none":
        return None
    count = int(text)
    if count < 0:
        raise ValueError
    return count


_NUMBER = (
    "of nephi-series and nephi-template: which image moves, the first is 0; the fixed "
    "image is the reference"
)
_FORMATS = f".nephi, {', '.join(MAPS)}"
_SCALE = "how to scale intensities: ct takes Hounsfield units (default: none)"
_CLIP = "clip its intensities to these"
_LOOK = "look only where this is above zero"
_SEGMENTATION = "label map to lay on the other"
_LANDMARKS = (
    "points, row by row the same in both (.csv with x,y,z in LPS mm, .fcsv, "
    ".mrk.json): their distance before and after"
)
_LABELS = "label map: Dice before and after"
_SEED = "of the random numbers (default: 0)"
_WARNINGS = "print nothing but warnings"

_input = partial(flag, group="inputs")
_output = partial(flag, group="outputs")
_score = partial(flag, group="scores")
_how = partial(flag, group="how")
_many = partial(flag, group="many pairs")
_files = partial(flag, group="what", type=Path, nargs="+", metavar="FILE")
_way = partial(flag, group="way", alone=True)
_kind = partial(flag, group="kind", alone=True)
_ends = partial(_input, type=float, nargs=2, metavar=("LOW", "HIGH"))


@dataclass(frozen=True)
class RegisterFlags(Flags):
    """The flags of nephi-register."""

    PROG = "nephi-register"
    ABOUT = (
        "Register two 2D or 3D images with a neural deformation field, optimised for "
        "this pair from scratch or after a pretrained network."
    )
    EXAMPLES = """examples:
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
130 stopped by Ctrl-C."""

    fixed: Path | None = _input("image that stays")
    moving: Path | None = _input("image that is aligned to it")
    fixed_modality: str = _input(_SCALE, "none", choices=MODALITIES)
    moving_modality: str = _input(_SCALE, "none", choices=MODALITIES)
    fixed_window: Sequence[float] | None = _ends(_CLIP)
    moving_window: Sequence[float] | None = _ends(_CLIP)
    quantiles: Sequence[float] | None = _ends(
        "clip both to these shares, such as 0.01 0.99"
    )
    fixed_mask: Path | None = _input(_LOOK)
    moving_mask: Path | None = _input(_LOOK)
    lesion_mask: Path | None = _input(
        "where the fixed image has what the moving one has not (a lesion, a "
        "resection): not matched, the map goes on smoothly there"
    )
    moving_lesion_mask: Path | None = _input("the same of the moving image")
    rigid_mask: Path | None = _input(
        "where the fixed image is only shifted and turned (bones, an implant): each "
        "label as one body, or each piece of a mask"
    )
    volume_mask: Path | None = _input("where the fixed image keeps its volume")
    fixed_segmentation: Path | None = _input(_SEGMENTATION)
    moving_segmentation: Path | None = _input(_SEGMENTATION)

    transform_out: Path | None = _output(
        f"ITK transform, fixed -> moving ({', '.join(TRANSFORMS)})"
    )
    inverse_transform_out: Path | None = _output("the same, moving -> fixed")
    warped_moving_out: Path | None = _output("moving image on the fixed grid")
    displacement_out: Path | None = _output(
        "fixed -> moving as LPS mm vectors on the fixed grid, which ANTs and 3D Slicer "
        f"read as a transform ({', '.join(VECTORS)})"
    )
    inverse_displacement_out: Path | None = _output(
        "the same, moving -> fixed on the moving grid"
    )
    jacobian_out: Path | None = _output("determinant, fixed -> moving, fixed grid")
    error_out: Path | None = _output("the error to expect in mm, on the fixed grid")
    save: Path | None = _output("everything in one small .nephi file for nephi-warp")
    report: Path | None = _output("a page to look at (.html)")
    json: Path | None = _output("all numbers; - for standard output", metavar="FILE")

    landmarks_fixed: Path | None = _score(_LANDMARKS)
    landmarks_moving: Path | None = _score(_LANDMARKS)
    labels_fixed: Path | None = _score(_LABELS)
    labels_moving: Path | None = _score(_LABELS)

    preset: str = _how(
        "how long to work at a pair",
        "default",
        choices=("fast", "default", "accurate"),
    )
    similarity: str | None = _how(
        "mind or mi for other modalities, lncc2 where contrasts may be inverted "
        "(default: auto, lncc unless the images show another contrast)",
        choices=("auto", "ncc", "lncc", "lncc2", "mind", "mi"),
    )
    transform: str = _how(
        "rigid or affine: no deformation (one person's T1 onto the T2)",
        "deformable",
        choices=("rigid", "affine", "deformable"),
    )
    model: str = _how("start from this network's map", "none", choices=MODELS)
    network_weights: Path | None = _how("its weights (default: downloaded once)")
    io_iterations: int | None = _how(
        "refine a model's map in N steps, none: not at all (default: 50)",
        50,
        type=_iterations,
        metavar="N",
    )
    io_sim: str = _how(
        "similarity of those steps (default: lncc)", "lncc", choices=("lncc", "lncc2")
    )
    mass_preserving: bool = _how(
        "CT: what is stretched gets thinner, intensities times the determinant", False
    )
    initial: Path | None = _how(
        "start from this affine transform, fixed -> moving "
        f"({', '.join(TRANSFORMS)}), or from the landmarks: write landmarks"
    )
    use_landmarks: bool = _how("lay the landmarks on each other, too", False)
    landmark_error: float = _how("of the landmarks, in mm", 1.0)
    restrict: Sequence[int] | None = _how(
        "0 or 1 for each axis i j (k) of the fixed image: along which things move",
        type=int,
        nargs="+",
        metavar="01",
    )
    stiffness: float = _how("2: the map bends half as quickly (default: 1)", 1.0)
    start: str = _how(
        "of the deformation: the general network's prediction, nothing, or what fits "
        "better (default: auto)",
        "auto",
        choices=("auto", "scratch", "learned"),
    )
    no_affine: bool = _how("trust the headers, no affine start", False)
    allow_mirror: bool = _how(
        "the moving image may be turned over, as a section on its slide", False
    )
    seed: int = _how(_SEED, 0)
    seeds: int = _how(
        "register N times; how far the results lie apart sharpens the expected error, "
        "the first is the result (default: 1)",
        1,
        metavar="N",
    )
    device: str | None = _how("cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    time_limit: float | None = _how("seconds after which to stop early")
    keep_on_interrupt: bool = _how(
        "Ctrl-C stops the optimisation early, too, and what it has reached is written; "
        "a second one discards it (default: the first does)",
        False,
    )
    quiet: bool = _how("no progress bar, no summary", False)

    pairs: Path | None = _many("CSV with a pair a row, see below")
    out_dir: Path | None = _many("existing folder for its results")


@dataclass(frozen=True)
class WarpFlags(Flags):
    """The flags of nephi-warp."""

    PROG = "nephi-warp"
    ABOUT = "Apply registrations to images, label maps, points and meshes."
    EXAMPLES = """examples:
  nephi-warp --transform a_b.nephi --image moving.nii.gz --out warped.nii.gz
  nephi-warp --transform a_b.nephi --labels moving_seg.nii.gz --out warped_seg.nii.gz
  nephi-warp --transform T.hdf5 --image moving.nrrd --reference fixed.nrrd --out w.nrrd
  nephi-warp --transform a_b.nephi --points fixed_points.csv --out in_moving.csv
  nephi-warp --transform a_b.nephi --points moving.vtk --to fixed --out in_fixed.vtk
  nephi-warp --transform a_b.nephi --image t1.nii.gz t2.nii.gz --labels seg.nii.gz \\
      --to fixed --out_dir warped
  nephi-warp --transform a_b.nephi b_c.nephi --inverse_of d_c.nephi --image d.nrrd \\
      --out d_on_a.nrrd

Images and label maps go from the moving image's space to the fixed image's grid;
points go from the fixed image to the moving image. --inverse turns both around, or
say --to fixed, --to moving: the image in whose space the result lies. Where there is
no image the result has the image's least value (air in CT), beside label maps 0, or
what --outside says.

Several files are moved in one call: --out has a name for each, images first, then
labels, then points; with --out_dir each keeps its own. Several transforms are a chain:
points of the fixed image go through the first, then the second, ..., as in
antsApplyTransforms; --inverse_of adds inverses, in the order typed.

Coordinates are LPS mm, unless the file says RAS: .fcsv and .mrk.json name their frame,
.vtk, .vtp, .ply, .stl and .obj may (SPACE=RAS), .gii is RAS. Other columns, triangles
and data are kept."""

    transform: Sequence[tuple[Path, bool]] = flag(
        f"of nephi-register or other programs ({_FORMATS}), one or a chain",
        (),
        action=Chained,
        type=Path,
        nargs="+",
        metavar="FILE",
    )
    inverse_of: Sequence[tuple[Path, bool]] = flag(
        "a chain goes on with the inverse of these",
        (),
        action=Chained,
        type=Path,
        nargs="+",
        dest="transform",
        metavar="FILE",
    )
    number: int | None = flag(_NUMBER)
    affine: str | None = flag(
        "whose the plain numbers of a .mat or .txt are: ras (greedy, c3d) or fsl "
        "(flirt's, with --reference and --moving)",
        choices=("ras", "fsl"),
    )
    moving: Path | None = flag("flirt's -in, with --affine fsl")
    image: Sequence[Path] | None = _files("images to warp")
    labels: Sequence[Path] | None = _files("label maps to warp")
    points: Sequence[Path] | None = _files(
        f"points or meshes ({', '.join(POINTS)}; .csv with columns x,y,z, 2D: x,y)"
    )
    reference: Path | None = flag("image whose grid the result gets")
    interpolation: str | None = flag(
        "of an image linear (default) or cubic (B-splines); of labels nearest "
        "(default) or onehot (each label read linearly, the largest share wins)",
        choices=("linear", "cubic", "nearest", "onehot"),
    )
    outside: float | None = flag(
        "value where there is no image (default: the image's least, of labels 0)"
    )
    out: Sequence[Path] | None = flag(
        "a name for each; points: ending as they have", type=Path, nargs="+"
    )
    out_dir: Path | None = flag("existing folder, in which each keeps its name")
    errors: bool = flag(
        "add a column with the error to expect in mm (.csv of a .nephi only)", False
    )
    inverse: bool = _way(
        "images from fixed to moving, points from moving to fixed (.nephi only)", False
    )
    to: str | None = _way("where to take it (.nephi only)", choices=("fixed", "moving"))
    quiet: bool = flag(_WARNINGS, False)


@dataclass(frozen=True)
class JacobianFlags(Flags):
    """The flags of nephi-jacobian."""

    PROG = "nephi-jacobian"
    ABOUT = (
        "The Jacobian of a registration in physical units (mm by mm), fixed -> moving."
    )
    EXAMPLES = """examples:
  nephi-jacobian --transform a_b.nephi --out determinant.nii.gz
  nephi-jacobian --transform a_b.nephi --inverse --log --out log_determinant.nrrd
  nephi-jacobian --transform T.hdf5 --reference fixed.nrrd --tensor --out tensor.nrrd

The determinant is volume in the moving image over volume in the fixed image; at or
below 0 the map folds. The tensor has d * d numbers a voxel, row by row: number d i + j
is d (mapped coordinate i) / d (coordinate j), LPS axes. Of a .nephi file derivatives
are exact, of an ITK transform central differences a twentieth of a voxel to each side.
In Python a tensor is itk.imread(path, itk.VariableLengthVector[itk.F])."""

    transform: Path = flag(f"of nephi-register ({_FORMATS})", required=True)
    number: int | None = flag(_NUMBER)
    out: Path = flag("image, fixed grid or the reference's", required=True)
    reference: Path | None = flag(
        "image whose grid the result gets (default: the fixed image's)"
    )
    inverse: bool = flag(
        "moving -> fixed, on the moving image's grid (.nephi only)", False
    )
    log: bool = _kind(
        "logarithm of the determinant; NaN where it folds, and a warning", False
    )
    tensor: bool = _kind("the whole matrix", False)
    quiet: bool = flag(_WARNINGS, False)


@dataclass(frozen=True)
class InfoFlags(Flags):
    """The flags of nephi-info."""

    PROG = "nephi-info"
    ABOUT = "What is in a saved registration or an ITK transform."
    EXAMPLES = """examples:
  nephi-info a_b.nephi
  nephi-info transform.hdf5 --json

A .nephi file holds both directions, fixed image -> moving image and back."""

    file: Path = flag(_FORMATS, name="file", metavar="FILE")
    json: bool = flag("for machines", False)


@dataclass(frozen=True)
class CompareFlags(Flags):
    """The flags of nephi-compare."""

    PROG = "nephi-compare"
    ABOUT = (
        "Register your own pairs with NePhi and with a voxel network (GradICON), both "
        "optimised for each pair from scratch in the same time."
    )
    EXAMPLES = """examples:
  nephi-compare --data pairs --out compare.csv
  nephi-compare --data pairs --cases patient_1 patient_2 --seconds 120

A folder for each pair holds fixed.nii.gz and moving.nii.gz and, where there are, masks
(fixed_mask.nii.gz ...), label maps (fixed_labels.nii.gz ...), landmarks in LPS mm
(fixed_landmarks.csv ... with the header x,y,z) and case.json ({"modality": "ct"}).
Both map points of the fixed image to the moving image."""

    data: Path = flag("folder of pairs", required=True)
    cases: Sequence[str] | None = flag(
        "pairs (default: all)", type=str, nargs="+", metavar="NAME"
    )
    seconds: float = flag(
        "NePhi stops then; the voxel network gets the time NePhi took, in seconds of "
        "the processor, on a GPU of the clock (default: 60)",
        60.0,
    )
    out: Path | None = flag("every number, as CSV")
    side: int = flag("longest side of the voxel network's grid", 175)
    threads: int | None = flag("of the processor (default: torch's)")
    seed: int = flag(_SEED, 0)
    device: str | None = flag("cpu, cuda, cuda:1 (default: cuda if there is one)")
    quiet: bool = flag("no progress bar, no table", False)
