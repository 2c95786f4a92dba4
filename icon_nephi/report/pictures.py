"""Slices of images and maps as small pictures, oriented as anatomy is drawn.

A view is a stack of slices of the fixed image along one of its own axes: the one
nearest to the body axis that gives the view its name. Pixels are square in
millimetres, whatever the voxels are.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch

from icon_nephi.space.frames import Array, Geometry, apply_affine
from icon_nephi.space.images import resize_image

#: Letters at the low and the high end of the LPS axes x, y, z.
LETTERS = (("R", "L"), ("A", "P"), ("I", "S"))
GREYS = 64  # shades: a scan's noise below that only makes the files larger
#: Anchors that colour-blind people read: blue to red, and dark to light.
PALETTES = {
    "diverging": ("#214f94", "#78a8d6", "#f4f4f2", "#e49460", "#9e291e"),
    "sequential": ("#181434", "#56206e", "#b23666", "#f0783e", "#fce896"),
}
FOLD, NOTHING = (255, 0, 255), (96, 100, 106)
LINE = (255, 193, 46)


@dataclass(frozen=True)
class View:
    """A stack of parallel slices, in the order of the slider.

    Attributes:
        name: such as "Axial".
        axis: tensor axis across the slices, None for a 2D image.
        rows, columns: tensor axes shown downwards and to the right.
        flipped: whether rows, columns run against the voxel numbers.
        edges: what is at the left, right, top and bottom.
        numbers, places: of the slices: voxel along the axis, and where, in words.
    """

    name: str
    axis: int | None
    rows: int
    columns: int
    flipped: tuple[bool, bool]
    edges: tuple[str, str, str, str]
    numbers: tuple[int, ...]
    places: tuple[str, ...]


def views_of(geometry: Geometry, *, physical: bool, slices: int = 20) -> list[View]:
    """Return axial, coronal, sagittal; of tensors one along each axis; in 2D one view.

    At most so many slices each, evenly spread. If the geometry is not physical, tensor
    axes are named.
    """
    if not physical:
        return _tensor_views(geometry, slices)
    d = geometry.dimension
    axes, signs = _nearest_axes(geometry)
    names = LETTERS if d == 3 else (("", "+x"), ("", "+y"))
    if d == 2:
        against = (signs[1] < 0, signs[0] < 0)
        edges = (*names[0], *names[1])
        return [View("Image", None, axes[1], axes[0], against, edges, (0,), ("",))]
    views = []
    # Name; the LPS axes across, downwards and to the right; up is superior.
    for name, across, down, right in (
        ("Axial", 2, 1, 0),
        ("Coronal", 1, 2, 0),
        ("Sagittal", 0, 2, 1),
    ):
        upside = down == 2
        top, bottom = names[down][::-1] if upside else names[down]
        axis, flipped = axes[across], ((signs[down] < 0) != upside, signs[right] < 0)
        numbers = _spread(geometry.size[axis], slices)
        numbers = numbers if signs[across] > 0 else numbers[::-1]
        plane, edges = (axes[down], axes[right]), (*names[right], top, bottom)
        places = _places(geometry, axis, across, numbers)
        views.append(View(name, axis, *plane, flipped, edges, numbers, places))
    return views


def tilt(geometry: Geometry) -> float:
    """Return the most degrees between an image axis and the LPS axis of its name."""
    columns = [geometry.dimension - 1 - axis for axis in _nearest_axes(geometry)[0]]
    cosines = np.abs(np.diag(np.array(geometry.direction)[:, columns]))
    return float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))


def pixel_grid(view: View, geometry: Geometry, side: int) -> Array:
    """Return centres ``[slices, h, w, d]`` of square pixels, in the geometry's frame.

    Rows and columns cover the box of the image from edge to edge, at most `side`
    pixels and not much finer than its voxels.
    """
    d = geometry.dimension
    steps = np.array(geometry.tensor_spacing)
    lengths = steps * geometry.size
    plane = [view.rows, view.columns]
    pixel = max(max(lengths[plane]) / side, min(steps[plane]) / 2)
    counts = [max(2, round(lengths[a] / pixel)) for a in plane]
    unit: list[Array] = [np.empty(0)] * d
    for axis, count, flipped in zip(plane, counts, view.flipped, strict=True):
        n = geometry.size[axis]
        unit[axis] = ((np.arange(count) + 0.5) * n / count - 0.5) / (n - 1)
        if flipped:
            unit[axis] = unit[axis][::-1]
    order = plane
    if view.axis is not None:
        unit[view.axis] = np.array(view.numbers) / (geometry.size[view.axis] - 1)
        order = [view.axis, *plane]
    mesh = np.meshgrid(*(unit[a] for a in order), indexing="ij")
    stacked = np.empty((*mesh[0].shape, d))
    for axis, values in zip(order, mesh, strict=True):
        stacked[..., axis] = values
    rows = torch.from_numpy(stacked.reshape(-1, d))
    points = apply_affine(geometry.unit_to_physical(), rows).numpy()
    return points.reshape(len(view.numbers), *stacked.shape[-3:])


def in_plane(view: View, geometry: Geometry) -> Array:
    """Return unit vectors ``[2, d]`` of the frame: a pixel down, one to the right."""
    matrix = geometry.unit_to_physical().numpy()
    signs = np.where(view.flipped, -1, 1)
    vectors = (matrix[:-1, [view.rows, view.columns]] * signs).T
    return np.stack([v / np.linalg.norm(v) for v in vectors])


def resized(values: Array, size: Sequence[int]) -> Array:
    """Return slices ``[slices, h, w, C]`` with other pixels in the same box."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).movedim(-1, 1)
    result: Array = resize_image(tensor, size).movedim(1, -1).numpy()
    return result


def aspect(view: View, geometry: Geometry) -> float:
    """Return width over height of a slice, from edge to edge."""
    lengths = np.array(geometry.tensor_spacing) * geometry.size
    return float(lengths[view.columns] / lengths[view.rows])


# --- pictures -----------------------------------------------------------------------


def grey(values: Array) -> bytes:
    """Return a picture of ``[h, w]`` numbers, 0 black to 1 white."""
    ramp = np.linspace(0, 255, GREYS)[:, None].repeat(3, 1)
    return png(_shades(values, GREYS), ramp)


def lines_on_grey(values: Array, lines: Array) -> bytes:
    """Return the picture of `grey`, darker, under lines of strength 0 to 1."""
    ramp = np.linspace(0, 150, 32)[:, None, None]
    strength = np.linspace(0, 1, 7)[None, :, None]
    palette = (1 - strength) * ramp + strength * np.array(LINE)
    return png(7 * _shades(values, 32) + _shades(lines, 7), palette.reshape(-1, 3))


def diverging(values: Array, marked: Array, mark: tuple[int, int, int] = FOLD) -> bytes:
    """Return a picture of ``[h, w]`` numbers, -1 blue over 0 white to 1 red.

    Marked pixels ``[h, w]`` get the colour `mark` instead.
    """
    return _coloured((values + 1) / 2, "diverging", marked, mark)


def sequential(values: Array) -> bytes:
    """Return a picture of ``[h, w]`` numbers, 0 dark to 1 light."""
    return _coloured(values, "sequential", np.zeros(values.shape, bool), FOLD)


def data_uri(picture: bytes) -> str:
    """Return the picture as text that a page can hold."""
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


def png(index: Array, palette: Array) -> bytes:
    """Return a PNG file of numbers ``[h, w]`` of a palette ``[n, 3]``, 0 to 255."""
    height, width = index.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with its filter
    rows[:, 1:] = index
    colour = np.clip(np.round(palette), 0, 255).astype(np.uint8)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", colour.tobytes()),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    ]
    picture = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        length, check = len(data), zlib.crc32(kind + data)
        picture += struct.pack(">I", length) + kind + data + struct.pack(">I", check)
    return picture


def deformed_grid(places: Array, step: float) -> Array:
    """Return how much of each pixel is a line, 0 to 1, ``[h, w]``.

    Pixels are mapped to places ``[h, w, 2]``, in millimetres as the step from line to
    line of the grid that lies there.
    """
    strength = np.zeros(places.shape[:2])
    for component in np.moveaxis(places, -1, 0):
        down, right = np.gradient(component)
        slope = np.maximum(np.hypot(down, right), 1e-9)
        away = np.abs(component / step - np.round(component / step)) * step / slope
        strength = np.maximum(strength, np.clip(1.1 - away, 0, 1))
    return strength


def checkerboard(first: Array, second: Array, tiles: int = 8) -> Array:
    """Return ``[h, w]``: fields of one picture between fields of another."""
    size = max(first.shape) / tiles
    rows, columns = (np.floor(np.arange(n) / size) for n in first.shape)
    odd = (rows[:, None] + columns) % 2 == 1
    return np.where(odd, second, first)


def _shades(values: Array, count: int) -> Array:
    scaled = np.round(np.nan_to_num(values) * (count - 1))
    return np.clip(scaled, 0, count - 1).astype(np.uint8)


def _coloured(
    values: Array, palette: str, marked: Array, mark: tuple[int, int, int]
) -> bytes:
    anchors = np.array([[*bytes.fromhex(c[1:])] for c in PALETTES[palette]], float)
    where, shades = np.linspace(0, 1, len(anchors)), np.linspace(0, 1, 127)
    ramp = [np.interp(shades, where, column) for column in anchors.T]
    colours = np.vstack([np.stack(ramp, 1), mark])
    return png(np.where(marked, np.uint8(127), _shades(values, 127)), colours)


def _spread(count: int, most: int) -> tuple[int, ...]:
    if count <= most:
        return tuple(range(count))
    return tuple(int(i) for i in np.floor((np.arange(most) + 0.5) * count / most))


def _nearest_axes(geometry: Geometry) -> tuple[list[int], list[int]]:
    """Return of each LPS axis the nearest tensor axis, and its sign along it."""
    direction, d = np.array(geometry.direction), geometry.dimension
    best = max(
        permutations(range(d)),
        key=lambda order: sum(abs(direction[p, i]) for p, i in enumerate(order)),
    )
    signs = [1 if direction[p, i] >= 0 else -1 for p, i in enumerate(best)]
    return [d - 1 - i for i in best], signs


def _places(
    geometry: Geometry, axis: int, across: int, numbers: Sequence[int]
) -> tuple[str, ...]:
    """Return such as "S 34 mm": of the middle of each slice."""
    middle = torch.full((len(numbers), 3), 0.5, dtype=torch.float64)
    middle[:, axis] = torch.tensor(numbers) / (geometry.size[axis] - 1)
    values = apply_affine(geometry.unit_to_physical(), middle)[:, across]
    letters = LETTERS[across]
    return tuple(f"{letters[v >= 0]} {abs(v):.0f} mm" for v in values.tolist())


def _tensor_views(geometry: Geometry, slices: int) -> list[View]:
    d, flipped = geometry.dimension, (False, False)
    if d == 2:
        edges = ("", "axis 1", "", "axis 0")
        return [View("Image", None, 0, 1, flipped, edges, (0,), ("",))]
    views = []
    for axis in range(d):
        rows, columns = (a for a in range(d) if a != axis)
        numbers = _spread(geometry.size[axis], slices)
        edges = ("", f"axis {columns}", "", f"axis {rows}")
        places = tuple(f"voxel {n}" for n in numbers)
        name = f"Axis {axis}"
        views.append(View(name, axis, rows, columns, flipped, edges, numbers, places))
    return views
