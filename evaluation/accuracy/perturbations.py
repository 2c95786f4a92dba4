"""Ways to spoil the moving image of a pair, its landmarks and labels going along.

Each takes a case and a random generator and returns a `Change`; the case stays.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evaluation import Case, array_of, geometry, image_from, to_physical


@dataclass(frozen=True)
class Change:
    """A perturbed pair, and what whoever registers it says beside."""

    pair: Case
    options: dict[str, Any]
    cut: bool = False  # what is outside the moving image is not scored


def shifted(pair: Case, g: np.random.Generator) -> Change:
    """Shift by 20 to 60 mm in any direction."""
    return _placed(pair, np.eye(pair.moving.GetImageDimension()), _shift(pair, g))


def turned(pair: Case, g: np.random.Generator) -> Change:
    """Turn by 10 to 30 degrees, either way, about any axis."""
    return _placed(pair, _turn(pair, g), np.zeros(pair.moving.GetImageDimension()))


def noisy(pair: Case, g: np.random.Generator) -> Change:
    """Add Gaussian noise of a tenth of the span of intensities."""
    values = _values(pair)
    low, high = _span(values)
    return _changed(pair, values + 0.1 * (high - low) * g.normal(size=values.shape))


def biased(pair: Case, g: np.random.Generator) -> Change:
    """Multiply by a smooth factor from about 0.6 to 1.6."""
    values = _values(pair)
    wave = np.zeros(values.shape)
    for axis, n in enumerate(values.shape):
        phase = np.linspace(0, np.pi, n) + g.uniform(0, np.pi)
        shape = [-1 if a == axis else 1 for a in range(values.ndim)]
        wave = wave + np.cos(phase).reshape(shape)
    low = _span(values)[0]
    factor = np.exp(0.45 * wave / np.abs(wave).max())
    return _changed(pair, low + (values - low) * factor)


def cropped(pair: Case, g: np.random.Generator) -> Change:
    """Cut a fifth of the field of view off on one side."""
    values = _values(pair)
    axis, rest = int(g.integers(values.ndim)), [slice(None)] * values.ndim
    gone = round(0.2 * values.shape[axis])
    first = bool(g.integers(2))
    rest[axis] = slice(gone, None) if first else slice(None, -gone)
    start = np.zeros(values.ndim)
    start[values.ndim - 1 - axis] = gone if first else 0
    return replace(_changed(pair, values[tuple(rest)], start), cut=True)


def missing(pair: Case, g: np.random.Generator) -> Change:
    """Empty a tenth of the slices."""
    values = _values(pair)
    count = max(1, round(0.1 * len(values)))
    values[g.choice(len(values), count, replace=False)] = values.min()
    return _changed(pair, values)


def inverted(pair: Case, g: np.random.Generator) -> Change:
    """Make dark bright, and the user says so: similarity="lncc2"."""
    return replace(inverted_unsaid(pair, g), options={"similarity": "lncc2"})


def inverted_unsaid(pair: Case, g: np.random.Generator) -> Change:
    """Make dark bright, and the user does not know."""
    values = _values(pair)
    return _changed(pair, sum(_span(values)) - values)


def thick(pair: Case, g: np.random.Generator) -> Change:
    """Average slices, six to one, along one axis."""
    values = _values(pair)
    axis, d = int(g.integers(values.ndim)), values.ndim
    pads = [(0, -n % 6 if a == axis else 0) for a, n in enumerate(values.shape)]
    values = np.moveaxis(np.pad(values, pads, mode="edge"), axis, 0)
    values = values.reshape(-1, 6, *values.shape[1:]).mean(1)
    start, times = np.zeros(d), np.ones(d)
    start[d - 1 - axis], times[d - 1 - axis] = 2.5, 6
    return _changed(pair, np.moveaxis(values, 0, axis), start, times)


def empty(pair: Case, g: np.random.Generator) -> Change:
    """Add empty borders, a quarter of the image wide."""
    values = _values(pair)
    wide = [round(n / 4) for n in values.shape]
    padded = np.pad(values, [(w, w) for w in wide], constant_values=values.min())
    return _changed(pair, padded, -np.array(wide[::-1], float))


def metal(pair: Case, g: np.random.Generator) -> Change:
    """Put in three balls four times as bright as anything, with dark streaks."""
    values = _values(pair)
    low, high = _span(values)
    axes = np.meshgrid(*(np.linspace(0, 1, n) for n in values.shape), indexing="ij")
    for _ in range(3):
        centre = g.uniform(0.25, 0.75, values.ndim)
        away = np.sqrt(sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)))
        streak = (np.abs(axes[-1] - centre[-1]) < 0.015) & (away < 0.25)
        values[streak] = low
        values[away < 0.035] = low + 4 * (high - low)
    return _changed(pair, values)


def together(pair: Case, g: np.random.Generator) -> Change:
    """Shift and turn, with noise and a bias."""
    spoiled = noisy(biased(pair, g).pair, g).pair
    return _placed(spoiled, _turn(pair, g), _shift(pair, g))


PERTURBATIONS: dict[str, Callable[[Case, np.random.Generator], Change]] = {
    f.__name__: f
    for f in (
        *(shifted, turned, noisy, biased, cropped, missing, inverted, thick, empty),
        *(metal, together, inverted_unsaid),
    )
}
#: Not counted among the failures: nobody promises that these work, only that the
#: failure is told.
UNPROMISED = ("inverted_unsaid",)


# --- what they are made of ----------------------------------------------------------


def _values(pair: Case) -> np.ndarray:
    """Return a copy of the moving image's voxels."""
    return array_of(pair.moving).astype(np.float32)


def _span(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.01, 0.99])
    return float(low), float(high)


def _changed(
    pair: Case, values: np.ndarray, start: Any = None, times: Any = None
) -> Change:
    """Return the pair with other voxels in its moving image.

    Args:
        pair: The pair.
        values: The voxels.
        start: Index ``[d]`` (x first) of the old grid where the first of them lies.
        times: Their spacing over the old one, ``[d]`` (x first).
    """
    image = image_from(values.astype(np.float32), pair.moving)
    if start is not None:
        image.SetOrigin(to_physical(pair.moving, start).tolist())
    if times is not None:
        image.SetSpacing((np.array(image.GetSpacing()) * times).tolist())
    return Change(replace(pair, moving=image), {})


def _placed(pair: Case, turn: np.ndarray, shift: np.ndarray) -> Change:
    """Return the pair with all of the moving image turned about its middle and shifted.

    Its header says so, no voxel changes.
    """
    import itk

    middle = to_physical(pair.moving, (geometry(pair.moving)[2] - 1) / 2)

    def moved(points: Any) -> Any:
        return None if points is None else (points - middle) @ turn.T + middle + shift

    def image(old: Any) -> Any:
        if old is None:
            return None
        new = image_from(array_of(old), old)
        direction = turn @ itk.array_from_matrix(old.GetDirection())
        new.SetDirection(itk.matrix_from_array(np.ascontiguousarray(direction)))
        new.SetOrigin(moved(np.array(itk.origin(old))).tolist())
        return new

    names = ("moving", "moving_mask", "moving_labels")
    changed = {name: image(getattr(pair, name)) for name in names}
    changed["moving_points"] = moved(pair.moving_points)
    return Change(replace(pair, **changed), {})


def _turn(pair: Case, g: np.random.Generator) -> np.ndarray:
    """Return a rotation by 10 to 30 degrees, either way, about any axis."""
    angle = np.radians(g.uniform(10, 30)) * g.choice([-1, 1])
    c, s = np.cos(angle), np.sin(angle)
    if pair.moving.GetImageDimension() == 2:
        return np.array([[c, -s], [s, c]])
    x, y, z = (axis := g.normal(size=3)) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + s * cross + (1 - c) * cross @ cross


def _shift(pair: Case, g: np.random.Generator) -> np.ndarray:
    """Return 20 to 60 mm in any direction."""
    way = g.normal(size=pair.moving.GetImageDimension())
    return way / np.linalg.norm(way) * g.uniform(20, 60)
