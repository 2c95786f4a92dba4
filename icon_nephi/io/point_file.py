"""What every file of points is read as, and what its formats share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from icon_nephi.space.frames import Array

RAS = np.array([-1.0, -1.0, 1.0])
# Of the size of a mesh: how far from a point its tangents are looked up.
_NEAR = 1e-4


class PointFile(NamedTuple):
    """The points of a file, and how to make such a file of other points.

    Attributes:
        points: ``[N, d]`` float64, LPS mm.
        content: moved points, LPS mm, same shape, and what ``beside`` became (default:
            as it was) -> the bytes of the new file.
        frame: what the file's own coordinates are, ``"LPS"`` or ``"RAS"``.
        beside: ``[M, d]``, LPS mm: other places that have to be moved along, of which
            the file's normals and centres are made.
        names: of the points, where all have one.
        notes: what is left as it is, a sentence each.
    """

    points: Array
    content: Callable[..., bytes]
    frame: str = "LPS"
    beside: Array = np.empty((0, 3))
    names: Sequence[str] | None = None
    notes: Sequence[str] = ()

    def moved(self, through: Callable[[Array], Array]) -> bytes:
        """Return the bytes of the file when all its places went through a map."""
        count = len(self.points)
        beside = self.beside.reshape(-1, self.points.shape[1])
        rows = through(np.concatenate([self.points, beside]))
        return self.content(rows[:count], rows[count:])

    def flat(self) -> PointFile:
        """Return the file of a plane: of points whose z is 0, as ANTs has them in 2D.

        Points with another z, or of two coordinates, are returned as they are.
        """
        if self.points.shape[1] != 3 or len(self.beside) or np.any(self.points[:, 2]):
            return self

        def content(moved: Array, beside: Array | None = None) -> bytes:
            return self.content(np.pad(moved, ((0, 0), (0, 1))))

        return self._replace(points=self.points[:, :2], content=content)


class Bad(ValueError):
    """What is wrong with a file, without its name."""


def text_of(data: bytes) -> str:
    """Return bytes as text."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Bad("cannot be read as text") from error


def number(value: float) -> str:
    """Return a coordinate as text."""
    return f"{value:.6f}"


def sign_of(frame: Any) -> Array:
    """Return the signs ``[3]`` between a frame, by name or Slicer's number, and LPS."""
    known = {"0": "RAS", "1": "LPS", "2": "IJK"}
    name = known.get(str(frame), str(frame)).upper()
    if name not in ("LPS", "RAS"):
        raise Bad(f"has coordinates in {name}; save it in LPS or RAS")
    return RAS if name == "RAS" else np.ones(3)


def frame_of(sign: Array) -> str:
    """Return the name of the frame of a sign."""
    return "RAS" if sign[0] < 0 else "LPS"


def tangents(points: Array, normals: Array) -> Array:
    """Return places ``[2 N, 3]`` near points ``[N, 3]``, along their surface."""
    first, second = _across(normals)
    h = _NEAR * max(float(np.ptp(points, axis=0).max(initial=0)), 1.0)
    return np.concatenate([points + h * first, points + h * second])


def turned(normals: Array, moved: Array, beside: Array) -> Array:
    """Return the normals ``[N, 3]`` of moved points, from what `tangents` became."""
    first, second = (beside - np.concatenate([moved, moved])).reshape(2, -1, 3)
    new = np.cross(first, second)
    length = np.linalg.norm(new, axis=1, keepdims=True)
    old = np.linalg.norm(normals, axis=1, keepdims=True)
    unit = new / np.where(length > 0, length, 1)
    return np.where((length > 0) & (old > 0), unit * old, normals)


def _across(normals: Array) -> tuple[Array, Array]:
    """Return two unit vectors a normal, across it and each other, right-handed."""
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    n = np.where(length > 0, normals / np.where(length > 0, length, 1), [0.0, 0, 1])
    other = np.where(np.abs(n[:, :1]) < 0.8, [1.0, 0, 0], [0.0, 1, 0])
    first = np.cross(other, n)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return first, np.cross(n, first)
