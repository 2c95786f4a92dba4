"""Scripts that answer one question each; here what they share: images and scores.

Points are LPS mm; arrays of images have x last, indices and points have x first.
Nothing here is installed with the package; itk is imported when it is needed.
"""

import csv
import platform
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from icon_nephi.atomic import written_whole

DIRECTIONS = ("fixed_to_moving", "moving_to_fixed")
STATISTICS = ("mean", "median", "p95")  # of landmark errors
RANDOM_POINTS = 100_000

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


def array_of(image: Any) -> np.ndarray:
    """Return a view of the voxels, the last axis x."""
    import itk

    return itk.array_view_from_image(image)


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
    import itk

    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    try:
        mode = itk.CommonEnums.IOFileMode_ReadMode
        header = itk.ImageIOFactory.CreateImageIO(str(path), mode)
        header.SetFileName(str(path))
        header.ReadImageInformation()
        kind = (header.GetNumberOfDimensions(), header.GetNumberOfComponents())
        if kind in ((2, 1), (3, 1), (2, 3), (2, 4)):
            return itk.imread(str(path), itk.F)
    except Exception as error:  # ITK raises RuntimeError, AttributeError and others
        raise ValueError(f"{path} cannot be read as an image.") from error
    raise ValueError(
        f"{path} must be a 2D or 3D image of one value per voxel (2D: or of colours), "
        f"not {kind[0]}D with {kind[1]} per voxel."
    )


def read_mask(path: Path) -> Any:
    image = read_image(path)
    return image_from((array_of(image) > 0).astype(np.uint8), image)


def read_labels(path: Path) -> Any:
    image = read_image(path)
    values = array_of(image)
    labels = np.clip(np.nan_to_num(values), -32768, 32767).astype(np.int16)
    if not np.array_equal(labels, values):
        raise ValueError(f"{path} must hold whole numbers between -32768 and 32767.")
    return image_from(labels, image)


def read_landmarks(path: Path) -> np.ndarray:
    """Return ``[N, d]`` points of a CSV file with the header row x,y or x,y,z."""
    try:
        rows = list(csv.reader(path.read_text("utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as text.") from error
    header = [column.strip().lower() for column in rows[0]] if rows else []
    if header not in (["x", "y"], ["x", "y", "z"]):
        raise ValueError(
            f"{path} must begin with the header row x,y,z (x,y in 2D), "
            f"not {','.join(header)!r}."
        )
    rows = [row for row in rows[1:] if any(value.strip() for value in row)]
    try:
        points = np.array([[float(value) for value in row] for row in rows])
    except ValueError:
        points = np.empty(0)
    if points.ndim != 2 or points.shape[1] != len(header):
        raise ValueError(f"{path} must hold rows of {len(header)} numbers.")
    if not np.isfinite(points).all():
        raise ValueError(f"{path} holds numbers that are not finite.")
    return points


# --- scores -------------------------------------------------------------------------
# A pair is an evaluation.pairs.Pair. icon_nephi.metrics (and torch with it) is loaded
# only here, so that it does not count in the memory of other methods.


def before(pair: Any) -> dict[str, Any]:
    """Return the errors of the identity."""
    row: dict[str, Any] = {}
    if pair.fixed_points is not None:
        errors = landmark_errors(pair.fixed_points, pair.moving_points)
        row["before_tre_mm"] = errors["mean"]
    if pair.fixed_labels is not None:
        import itk

        nearest = itk.NearestNeighborInterpolateImageFunction.New(pair.moving_labels)
        same = itk.resample_image_filter(
            pair.moving_labels,
            interpolator=nearest,
            use_reference_image=True,
            reference_image=pair.fixed_labels,
        )
        row["before_dice"] = mean_dice(pair, same)
    return row


def score(pair: Any, result: Any) -> dict[str, Any]:
    """Return the errors of a registration and the faults of its transform."""
    row: dict[str, Any] = {}
    points = [pair.fixed_points, pair.moving_points]
    for direction in DIRECTIONS if points[0] is not None else ():
        moved = _ask(result, "transform_points", points[0], direction=direction)
        if moved is not None:
            errors = landmark_errors(moved, points[1])
            row |= {f"tre_{direction}_{s}_mm": errors[s] for s in STATISTICS}
        points.reverse()
    if pair.fixed_labels is not None:
        warped = _ask(result, "warp_labels", pair.moving_labels)
        if warped is not None:
            row["dice"] = mean_dice(pair, warped)
            row["labels"] = len(pair.label_ids)
    voxels = _ask(result, "fold_fraction")
    inside = _ask(result, "fold_fraction", points=random_points(pair.fixed))
    for key, folds in (("voxels", voxels), ("points", inside)):
        if folds is not None:
            row[f"folds_{key}_percent"] = 100 * float(folds)
    errors = _ask(result, "inverse_consistency_error")
    if errors is not None:
        from icon_nephi.metrics import summarize

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


def _ask(result: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Return what a method of the result answers, None where it has no answer."""
    method = getattr(result, name, None)
    try:
        return None if method is None else method(*args, **kwargs)
    except NotImplementedError:
        return None


def landmark_errors(points: Any, goals: np.ndarray) -> dict[str, float]:
    """Return the STATISTICS of the distances in mm."""
    from icon_nephi.metrics import summarize, target_registration_error

    return summarize(target_registration_error(points, goals))


def mean_dice(pair: Any, warped: Any) -> float:
    """Return the mean over the pair's labels of the Dice on the fixed grid."""
    from icon_nephi.metrics import dice

    values = dice(array_of(pair.fixed_labels), array_of(warped), list(pair.label_ids))
    return float(np.mean(list(values.values())))


def random_points(image: Any, count: int = RANDOM_POINTS, seed: int = 0) -> np.ndarray:
    """Return LPS mm of uniform points between the centres of the outermost voxels."""
    size = geometry(image)[2]
    uniform = np.random.default_rng(seed).uniform(size=(count, len(size)))
    return to_physical(image, uniform * (size - 1))


# --- the report ---------------------------------------------------------------------


def machine() -> str:
    """Return the processor's name and the system."""
    name, information = platform.processor(), Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name or platform.machine()}, {platform.system()}"


def write_csv(path: Path, columns: Iterable[str], rows: list[dict[str, Any]]) -> None:
    """Write all rows, or leave the file as it was."""
    with (
        written_whole(path) as (part,),
        part.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
