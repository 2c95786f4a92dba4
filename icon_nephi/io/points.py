"""Points and meshes from files, LPS mm, and back with everything else in the file.

Only coordinates change, and normals, which turn with them: the columns of a table, the
triangles and the data of a mesh stay as they are, byte for byte where the format is
text (GIFTI is written anew, and STL's normals, which follow from its corners, too).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from icon_nephi.io.meshes import read_obj, read_ply, read_stl, read_vtk
from icon_nephi.io.point_file import Bad, PointFile
from icon_nephi.io.surfaces import read_gifti, read_vtp
from icon_nephi.io.tables import read_csv, read_fcsv, read_markups


def read_points(name: str, path: Path, *, some: bool = False) -> PointFile:
    """Return the points of a table, of markups, or of a mesh.

    Args:
        name: of the argument, for errors.
        path: the file; its ending, one of `FORMATS`, says what it is.
        some: whether a file without points is refused.

    Raises:
        ValueError: missing or broken file, unknown ending, points that are not finite,
            or GIFTI without nibabel.
    """
    name_in_lower = path.name.lower()
    parse = next((p for end, p in FORMATS.items() if name_in_lower.endswith(end)), None)
    if parse is None:
        raise ValueError(f"{name}: {path} must end in {', '.join(FORMATS)}")
    if not path.is_file():
        raise ValueError(f"{name}: {path} does not exist or is not a file")
    try:
        file = parse(path.read_bytes())
        if file.points.ndim != 2 or file.points.shape[1] not in (2, 3):
            raise Bad("holds no points")
        if some and not len(file.points):
            raise Bad("holds no points; is it the right file?")
        if not all(np.isfinite(rows).all() for rows in (file.points, file.beside)):
            raise Bad("must hold finite numbers")
    except Bad as error:
        raise ValueError(f"{name}: {path} {error}") from error
    except (
        *(ValueError, KeyError, IndexError, TypeError, AttributeError),
        *(OverflowError, RecursionError, struct.error, zlib.error),
    ) as error:
        raise ValueError(
            f"{name}: {path} is not a complete {path.suffix} file; write it again"
        ) from error
    return file


#: Endings, and who reads such a file.
FORMATS: dict[str, Callable[[bytes], PointFile]] = {
    ".csv": read_csv,
    ".fcsv": read_fcsv,
    ".mrk.json": read_markups,
    ".vtk": read_vtk,
    ".vtp": read_vtp,
    ".ply": read_ply,
    ".stl": read_stl,
    ".obj": read_obj,
    ".gii": read_gifti,
}
