"""4D ITK images as frames in time, and back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import itk
import numpy as np

from icon_nephi.io.atomic import written_whole
from icon_nephi.io.image_files import write_image
from icon_nephi.io.itk_images import geometry_of, image_of, no_stderr
from icon_nephi.space.frames import Array, Geometry


def read_frames(name: str, path: Path) -> tuple[list[Any], float]:
    """Return the 3D images of a 4D file, and the time from one to the next.

    Raises:
        ValueError: missing or unreadable, not 4D, or with one frame.
    """
    if not path.is_file():
        raise ValueError(f"{name}: {path} does not exist or is not a file")
    try:
        with no_stderr():
            image = itk.imread(str(path))
    except Exception as error:  # ITK raises RuntimeError, AttributeError, KeyError...
        raise ValueError(f"{name}: {path} cannot be read as an image") from error
    return frames_of(f"{name}: {path}", image)


def frames_of(name: str, image: Any) -> tuple[list[Any], float]:
    """Return the 3D images of a 4D one, and the time from one to the next.

    Raises:
        ValueError: not 4D, vectors, or one frame.
    """
    if image.GetImageDimension() != 4 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(
            f"{name} is one {image.GetImageDimension()}D image; give a 4D image, or "
            "two or more images"
        )
    values = itk.array_from_image(image)
    if len(values) < 2:
        raise ValueError(f"{name} is 4D but holds one volume; give one with more")
    direction = itk.array_from_matrix(image.GetDirection())[:3, :3]
    if not abs(np.linalg.det(direction)) > 1e-6:
        direction = np.eye(3)
    place = Geometry(
        size=values.shape[1:],
        spacing=tuple(float(s) for s in image.GetSpacing())[:3],
        origin=tuple(float(x) for x in image.GetOrigin())[:3],
        direction=tuple(map(tuple, direction.tolist())),
    )
    step = float(image.GetSpacing()[3])
    return [image_of(frame, place) for frame in values], step if step > 0 else 1.0


def write_frames(images: Iterable[Any], path: Path, step: float = 1.0) -> None:
    """Write images of one grid as one file with an axis more, whole or not at all.

    Vectors of an image, and 2D images, go to a 4D file too: 2D frames as slices.
    """
    frames: list[Array] = []
    place: Geometry | None = None
    for image in images:
        frames.append(itk.array_from_image(image))
        place = place or geometry_of(image)
    assert place is not None
    d = place.dimension
    values = np.ascontiguousarray(np.stack(frames))
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    vectors = values.ndim > d + 1
    whole = itk.image_from_array(values, is_vector=vectors)
    whole.SetSpacing([*place.spacing, step])
    whole.SetOrigin([*place.origin, 0.0])
    direction = np.eye(d + 1)
    direction[:d, :d] = place.direction
    whole.SetDirection(itk.matrix_from_array(direction))
    with written_whole(path) as (part,):
        write_image(whole, part)
