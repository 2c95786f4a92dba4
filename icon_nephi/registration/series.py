"""What laying many images on one frame gives: maps between any two, at any time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from icon_nephi.fields.codes import LatentCode, shares_at
from icon_nephi.fit.group import GroupFit
from icon_nephi.fit.settings import Fit
from icon_nephi.io.image_input import check_points
from icon_nephi.io.nephi_group import Told, save_group
from icon_nephi.maps.inverse import Inverse
from icon_nephi.maps.transforms import Composition, Map
from icon_nephi.maps.two_way import MOVING_TO_FIXED
from icon_nephi.registration.result import Registration
from icon_nephi.space.frames import Array, Geometry


class Between(Registration):
    """The maps between two images of a group, through its frame; both directions.

    As a `Registration`: the fixed image is where points come from. It is exactly
    consistent: i -> j -> k is i -> k but for what Newton's method leaves.
    """

    proper = False

    def __init__(
        self,
        fixed: Registration,
        moving: Registration,
        images: tuple[Any, ...] | None,
    ) -> None:
        matrix = moving.fit.matrix @ torch.linalg.inv(fixed.fit.matrix)
        both = [*fixed.warnings, *moving.warnings]
        fit = replace(moving.fit, matrix=matrix, warnings=both)
        places = moving.geometry_A, fixed.geometry_A
        super().__init__(fit, *places, itk=fixed.itk, images=images)
        self.map_AB = Composition(moving.map_AB, inverse_of(fixed))
        self.map_BA = Composition(fixed.map_AB, inverse_of(moving))
        self.two_way = replace(self.two_way, map_AB=self.map_AB, map_BA=self.map_BA)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Refuse: the series is what is saved.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a map between two images of a series is not saved alone; save the series, "
            "or export its phi_AB"
        )


def inverse_of(registration: Registration) -> Map:
    """Return the inverse of its map_AB, near its map_BA."""
    return Inverse(registration.map_AB, registration.map_BA)


class Series:
    """Maps of many images: between a frame and each, both ways, and between any two.

    Images are told by their number, from 0. The reference is the mean of all images,
    which belongs to none, or one of them; points are LPS millimetres (of tensors ICON
    frame).

    Args:
        fit: of all.
        told: what is known of the images.
        images: read them as they were given, if they are kept: a function of a number.
        made_with: the choices of `register_series` and the seconds it took.
    """

    def __init__(
        self,
        fit: GroupFit,
        told: Told,
        images: Any = None,
        made_with: dict[str, Any] | None = None,
    ) -> None:
        self.fit, self.told, self.made_with = fit, told, made_with or {}
        self._read = images

    def __len__(self) -> int:
        return len(self.fit)

    @property
    def names(self) -> tuple[str, ...]:
        """The images' names."""
        return self.told.names

    @property
    def times(self) -> tuple[float, ...]:
        """When they were taken; without times their numbers."""
        return self.told.times or tuple(map(float, range(len(self))))

    @property
    def warnings(self) -> list[str]:
        """What was left out, and what is doubtful of which image."""
        named = zip(self.names, self.fit.warnings, strict=True)
        doubts = [
            f"{name}: {_renamed(text)}" for name, texts in named for text in texts
        ]
        return [*self.told.left_out, *doubts]

    @property
    def place(self) -> Geometry:
        """The grid of the reference."""
        number = self.told.reference
        return self.fit.place if number is None else self.told.places[number]

    def image(self, number: int) -> Any:
        """Return an image as it was given.

        Raises:
            ValueError: a loaded series, which has none.
        """
        if self._read is None:
            raise ValueError("a loaded series has no images; pass them")
        return self._read(self._number(number))

    def on_frame(self, number: int) -> Registration:
        """Return the `Registration` of the mean frame (fixed) and an image (moving)."""
        k = self._number(number)
        return self._registration(self.fit.pair(k), self.told.places[k])

    def at(self, time: float) -> Registration:
        """Return the maps of the mean frame (fixed) and a moment (moving).

        Codes are interpolated by a cubic spline in time. The moving grid is that of the
        image before.

        Raises:
            ValueError: images without times, or a time outside of them.
        """
        shares, k = self._shares(time)
        code: LatentCode = self.fit.code.mixed(shares)
        weights = torch.tensor(shares, dtype=torch.float64)
        boxes = [p.unit_to_physical() for p in self.told.places]
        out = torch.stack(boxes) @ self.fit.matrices
        matrix = boxes[k].inverse() @ torch.tensordot(weights, out, 1)
        pair = replace(self.fit.pair(k), code=code, matrix=matrix, warnings=[])
        return self._registration(pair, self.told.places[k])

    def map(self, start: int, end: int) -> Registration:
        """Return the maps between two images: ``start`` is fixed, ``end`` moves.

        Its `transform_points` takes points of ``start`` to ``end``; its `warp` an image
        of ``end`` onto the grid of ``start``.
        """
        i, j = self._number(start), self._number(end)
        images = None
        if self._read is not None:
            images = self._read(j), self._read(i), None, None
        return Between(self.on_frame(i), self.on_frame(j), images)

    def from_reference(self, number: int) -> Registration:
        """Return the maps between the reference (fixed) and an image (moving)."""
        reference = self.told.reference
        return (
            self.on_frame(number) if reference is None else self.map(reference, number)
        )

    def follow(
        self,
        points: Any,
        start: int | None = None,
        times: Sequence[float] | None = None,
    ) -> Array:
        """Return where points are at all times, ``[T, N, d]`` float64.

        Args:
            points: ``[N, d]`` of an image.
            start: its number; None: of the reference.
            times: any within the series; None: those of its images.

        Raises:
            ValueError: no points, or times outside of the series.
        """
        rows = check_points("points", points, self.fit.place.dimension)
        start = self.told.reference if start is None else start
        if start is not None:
            rows = self._to_frame(self._number(start), rows)
        if times is None:
            ways = [self.on_frame(k) for k in range(len(self))]
        else:
            ways = [self.at(time) for time in times]
        return np.stack([way.transform_points(rows) for way in ways])

    def _to_frame(self, number: int, rows: Array) -> Array:
        """Return the places on the mean frame of points of an image."""
        way = self.on_frame(number)
        exact = replace(way.two_way, map_BA=inverse_of(way))
        return exact.transform_points(rows, MOVING_TO_FIXED)

    def warped(self) -> Iterator[Any]:
        """Yield every image on the grid of the reference: the series without motion.

        Raises:
            ValueError: a loaded series, which has no images.
        """
        for k in range(len(self)):
            yield self.from_reference(k).warp(self.image(k), reference=self._grid)

    def mean_image(self) -> Any:
        """Return the mean of `warped`, float32: the series as one image, not blurred.

        Raises:
            ValueError: a loaded series, which has no images.
        """
        return self._mean(self.warped(), self.place)

    def _mean(self, images: Iterator[Any], place: Geometry) -> Any:
        total: Any = 0.0
        for image in images:
            values = image if isinstance(image, torch.Tensor) else _array(image)
            total = total + values / len(self)
        if not self.told.itk:
            return total
        from icon_nephi.io.itk_images import image_of

        return image_of(total.astype(np.float32), place)

    def displacement_fields(self) -> Iterator[Any]:
        """Yield for every image mapped minus own place on the grid of the reference."""
        for k in range(len(self)):
            yield self.from_reference(k).displacement_field(self._grid)

    def jacobian_determinants(self) -> Iterator[Any]:
        """Yield for every image the determinants on the grid of the reference."""
        for k in range(len(self)):
            yield self.from_reference(k).jacobian_determinant(self._grid)

    @cached_property
    def _grid(self) -> Any:
        """An image without contents on the reference's grid."""
        if not self.told.itk:
            return torch.zeros(1, 1, *self.place.size)
        from icon_nephi.io.itk_images import image_of

        return image_of(np.zeros(self.place.size, np.uint8), self.place)

    def mean_displacement(self, count: int = 2000) -> float:
        """Return how far the mean of all displacements is from zero, root mean square.

        Of the fields alone, in voxels of the frame, at random places.
        """
        generator = np.random.default_rng(0)
        d = self.fit.place.dimension
        rows = torch.from_numpy(generator.uniform(0, 1, (1, d, count, *(1,) * (d - 1))))
        with torch.no_grad():
            moves = [
                self.on_frame(k).map_AB.psi(rows.float()) - rows
                for k in range(len(self))
            ]
        steps = torch.tensor(self.fit.place.size).double() - 1
        mean = torch.stack(moves).mean(0).flatten(2)[0] * steps[:, None]
        return float(mean.square().sum(0).mean().sqrt())

    @property
    def labels(self) -> tuple[str, ...]:
        """What a slider says of each image: its time, or its name."""
        if self.told.times is None:
            return tuple(os.path.basename(name) for name in self.names)
        return tuple(f"time {time:g}" for time in self.told.times)

    @property
    def losses(self) -> list[dict[str, float]]:
        """The losses of all steps, of one image after the other."""
        return [step for losses in self.fit.losses for step in losses]

    def shown(self, number: int) -> Registration:
        """Return the maps of the mean and an image, with both images, for a page."""
        way = self.on_frame(number)
        way.images = self.image(number), self._mean_on_frame, None, None
        way.made_with = self.made_with
        return way

    @cached_property
    def _mean_on_frame(self) -> Any:
        ways = ((self.on_frame(k), self.image(k)) for k in range(len(self)))
        return self._mean((way.warp(image) for way, image in ways), self.fit.place)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .nephi file that `icon_nephi.load` reads, whole or not at all."""
        save_group(path, self.fit, self.told)

    def report(self, path: str | os.PathLike[str], **extras: Any) -> None:
        """Write one HTML page with a slider: see `write_series_report`.

        Raises:
            ValueError: a loaded series, which has no images.
        """
        from icon_nephi.report.series_page import write_series_report

        write_series_report(path, self, **extras)

    def _registration(self, pair: Fit, place: Geometry) -> Registration:
        return Registration(pair, place, self.fit.place, itk=self.told.itk)

    def _number(self, number: int) -> int:
        if not 0 <= number < len(self):
            raise ValueError(
                f"image {number} is not in the series, which has {len(self)}, numbers "
                f"0 to {len(self) - 1}"
            )
        return number

    def _shares(self, time: float) -> tuple[list[float], int]:
        """Return a share of each code, and the number of the image before."""
        times, period = self.told.times, self.told.period
        if times is None:
            raise ValueError("these images have no times to interpolate between")
        if period is not None:
            time = times[0] + (time - times[0]) % period
        elif not times[0] <= time <= times[-1]:
            raise ValueError(
                f"time {time:g} is outside of the series, {times[0]:g} to "
                f"{times[-1]:g}; extrapolation would be a guess"
            )
        before = int(np.searchsorted(times, time, side="right")) - 1
        return shares_at(time, times, period), before


def _array(image: Any) -> Array:
    from icon_nephi.io.itk_images import array_of

    return array_of(image)


def _renamed(text: str) -> str:
    """Return a warning of a pair in the words of a group."""
    return text.replace("image_B", "the mean").replace("image_A", "the image")
