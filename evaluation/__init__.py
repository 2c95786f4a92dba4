"""Scripts that answer one question each; here what they share: images and scores.

What most of them need of the package's inner rooms comes by way of this file.

Points are LPS mm; arrays of images have x last, indices and points have x first.
Nothing here is installed with the package. ITK is imported by what needs it, so that
what only times tensors runs where there is no ITK.
"""

import argparse
import platform
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from icon_nephi._memory import held_memory as held_memory
from icon_nephi._memory import peak_memory as peak_memory
from icon_nephi.io.atomic import write_csv as write_csv
from icon_nephi.io.atomic import written_whole as written_whole
from icon_nephi.io.versions import version as version
from icon_nephi.maps.two_way import DIRECTIONS as DIRECTIONS
from icon_nephi.report.metrics import landmark_summary, mean_dice, summarize

if TYPE_CHECKING:
    from icon_nephi.commands.cases import Case
    from icon_nephi.io.itk_images import array_of as array_of
    from icon_nephi.io.itk_images import geometry_of as geometry_of
    from icon_nephi.io.itk_transforms import write_transform as write_transform

STATISTICS = ("mean", "median", "p95")  # of landmark errors
RANDOM_POINTS = 100_000


def __getattr__(name: str) -> Any:
    """What comes with ITK, when it is asked for."""
    if name == "Case":
        from icon_nephi.commands.cases import Case as found
    elif name == "write_transform":
        from icon_nephi.io.itk_transforms import write_transform as found
    elif name in ("array_of", "geometry_of"):
        found = getattr(_itk_images(), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


def _itk_images() -> Any:
    from icon_nephi.io import itk_images

    return itk_images


def _image_files() -> Any:
    from icon_nephi.io import image_files

    return image_files


# --- images -------------------------------------------------------------------------


def geometry(image: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return origin ``[d]``, index-to-mm matrix ``[d, d]``, size ``[d]``, x first."""
    import itk

    matrix = itk.array_from_matrix(image.GetDirection()) * np.array(itk.spacing(image))
    return np.array(itk.origin(image)), matrix, np.array(itk.size(image))


def to_physical(image: Any, index: np.ndarray) -> np.ndarray:
    """Return LPS mm of continuous voxel indices ``[..., d]`` (x first)."""
    origin, matrix, _ = geometry(image)
    return index @ matrix.T + origin


def to_index(image: Any, points: np.ndarray) -> np.ndarray:
    """Return continuous voxel indices ``[..., d]`` (x first) of points in LPS mm."""
    origin, matrix, _ = geometry(image)
    return (points - origin) @ np.linalg.inv(matrix).T


def image_from(array: np.ndarray, like: Any = None) -> Any:
    """Return an ITK image of an array (last axis x), with the geometry of another."""
    import itk

    image = itk.image_from_array(np.ascontiguousarray(array))
    if like is not None:
        image.SetOrigin(like.GetOrigin())
        image.SetSpacing(like.GetSpacing())
        image.SetDirection(like.GetDirection())
    return image


def read_image(path: Path) -> Any:
    """Return a float image; colours become grey (ITK's luminance weights)."""
    return _image_files().read_image("image", path, as_float=True)


def read_labels(path: Path) -> Any:
    """Return a label map in an integer type."""
    maps = _image_files().read_image("labels", path)
    return _itk_images().check_label_map("labels", maps)


# --- scores -------------------------------------------------------------------------


def before(pair: "Case") -> dict[str, Any]:
    """Return the errors of the identity."""
    row: dict[str, Any] = {}
    if pair.fixed_points is not None:
        errors = landmark_summary(pair.fixed_points, pair.moving_points)
        row["before_tre_mm"] = errors["mean"]
    if pair.fixed_labels is not None:
        same = _itk_images().resample_to(pair.moving_labels, pair.fixed_labels)
        row["before_dice"] = _mean_dice(pair, same)
    return row


def score(pair: "Case", result: Any) -> dict[str, Any]:
    """Return the errors of a registration and the faults of its transform."""
    row: dict[str, Any] = {}
    points = [pair.fixed_points, pair.moving_points]
    for direction in DIRECTIONS if points[0] is not None else ():
        moved = _ask(result, "transform_points", points[0], direction=direction)
        if moved is not None:
            errors = landmark_summary(moved, points[1])
            row |= {f"tre_{direction}_{s}_mm": errors[s] for s in STATISTICS}
        points.reverse()
    if pair.fixed_labels is not None:
        warped = _ask(result, "warp_labels", pair.moving_labels)
        if warped is not None:
            row["dice"] = _mean_dice(pair, warped)
            row["labels"] = len(pair.label_ids)
    voxels = _ask(result, "fold_fraction")
    inside = _ask(result, "fold_fraction", points=random_points(pair.fixed))
    for key, folds in (("voxels", voxels), ("points", inside)):
        if folds is not None:
            row[f"folds_{key}_percent"] = 100 * float(folds)
    errors = _ask(result, "inverse_consistency_error")
    if errors is not None:
        numbers = summarize(np.asarray(errors))
        row["inverse_consistency_mean_mm"] = numbers["mean"]
        row["inverse_consistency_p95_mm"] = numbers["p95"]
    with tempfile.TemporaryDirectory() as folder:
        _ask(result, "save", Path(folder) / "transform.nephi")
        sizes = [f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()]
    size = sum(sizes) if sizes else getattr(result, "file_size", None)
    row["file_kb"] = None if size is None else size / 1000
    row["warnings"] = "; ".join(str(w) for w in getattr(result, "warnings", None) or ())
    return row


def _mean_dice(pair: "Case", warped: Any) -> float:
    labels = [_itk_images().array_of(image) for image in (pair.fixed_labels, warped)]
    return mean_dice(*labels, pair.label_ids)


def _ask(result: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Return what a method of the result answers, None where it has no answer."""
    method = getattr(result, name, None)
    try:
        return None if method is None else method(*args, **kwargs)
    except NotImplementedError:
        return None


def random_points(image: Any, count: int = RANDOM_POINTS, seed: int = 0) -> np.ndarray:
    """Return LPS mm of uniform points between the centres of the outermost voxels."""
    size = geometry(image)[2]
    uniform = np.random.default_rng(seed).uniform(size=(count, len(size)))
    return to_physical(image, uniform * (size - 1))


# --- what scripts share -----------------------------------------------------------


def register(case: "Case", *, masks: bool = True, **options: Any) -> Any:
    """Return icon_nephi's `Registration` of a case; masks may be left out."""
    import icon_nephi

    defaults = {
        "modality": case.modality,
        "mask_A": case.moving_mask if masks else None,
        "mask_B": case.fixed_mask if masks else None,
        "progress": False,
    }
    return icon_nephi.register(case.moving, case.fixed, **defaults | options)


def csv_file(text: str) -> Path:
    """Return the path of a file that can be written: a type for argparse."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no file in an existing folder")
    return path


# --- the report ---------------------------------------------------------------------


def machine() -> str:
    """Return the processor's name and the system."""
    information = Path("/proc/cpuinfo")
    text = information.read_text("utf-8", "replace") if information.exists() else ""
    model = re.search("^model name.*?:(.*)", text, re.MULTILINE)
    name = model[1].strip() if model else platform.processor()
    return f"{name or platform.machine()}, {platform.system()}"
