"""What laying many images on one frame gives: maps between any two, at any time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icon_nephi.fields.codes import shares_at
from icon_nephi.fit.group import GroupFit
from icon_nephi.io.image_input import check_points
from icon_nephi.io.nephi_group import Told, save_group
from icon_nephi.maps.centre import Centre
from icon_nephi.maps.inverse import Inverse
from icon_nephi.maps.transforms import Composition, Map, NeuralTransform
from icon_nephi.registration.result import Registration
from icon_nephi.space.frames import Array, Geometry


class Composed(Registration):
    """Maps that are made of several: between two images, or from the mean of all.

    As a `Registration`: the fixed image is where points come from. There and back
    points come to where they were but for what Newton's method leaves.

    Args:
        moving: of the frame (fixed) and the moving image.
        into: from the fixed image to the frame, unit boxes.
        out: its inverse.
        matrix: the affine part of ``into``.
        place: the grid of the fixed image.
        images: (moving, fixed, None, None), if they are there.
    """

    proper = False

    def __init__(
        self,
        moving: Registration,
        into: Map,
        out: Map,
        matrix: Tensor,
        place: Geometry,
        images: tuple[Any, ...] | None = None,
    ) -> None:
        fit = replace(moving.fit, matrix=moving.fit.matrix @ matrix)
        super().__init__(fit, moving.geometry_A, place, itk=moving.itk, images=images)
        self.map_AB = Composition(moving.map_AB, into)
        self.map_BA = Composition(out, inverse_of(moving))
        self.two_way = replace(self.two_way, map_AB=self.map_AB, map_BA=self.map_BA)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Refuse: the series is what is saved.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "maps of a series are not saved alone; save the series, or export phi_AB"
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
        return self._centre.place if number is None else self.told.places[number]

    def image(self, number: int) -> Any:
        """Return an image as it was given.

        Raises:
            ValueError: a loaded series, which has none.
        """
        if self._read is None:
            raise ValueError("a loaded series has no images; pass them")
        return self._read(self._number(number))

    def fitted(self, number: int) -> Registration:
        """Return the `Registration` that was fitted of an image (moving).

        The fixed image is that on whose grid all was fitted: what else there is, is
        made of these.
        """
        k = self._number(number)
        fit, place = self.fit.pair(k), self.told.places[k]
        return Registration(fit, place, self.fit.place, itk=self.told.itk)

    def from_mean(self, number: int) -> Registration:
        """Return the maps of the mean of all images (fixed) and an image (moving)."""
        return self._centred(self.fitted(number))

    def at(self, time: float) -> Registration:
        """Return the maps of the reference (fixed) and a moment (moving).

        Codes are interpolated by a cubic spline in time. The moving grid is that of the
        image before.

        Raises:
            ValueError: images without times, or a time outside of them.
        """
        moment, reference = self._fitted_at(time), self.told.reference
        if reference is None:
            return self._centred(moment)
        return self._between(self.fitted(reference), moment, None)

    def map(self, start: int, end: int) -> Registration:
        """Return the maps between two images: ``start`` is fixed, ``end`` moves.

        Its `transform_points` takes points of ``start`` to ``end``; its `warp` an image
        of ``end`` onto the grid of ``start``.
        """
        images = None
        if self._read is not None:
            images = self.image(end), self.image(start), None, None
        return self._between(self.fitted(start), self.fitted(end), images)

    def from_reference(self, number: int) -> Registration:
        """Return the maps between the reference (fixed) and an image (moving)."""
        reference = self.told.reference
        if reference is None:
            return self.from_mean(number)
        return self.map(reference, number)

    def _between(
        self, fixed: Registration, moving: Registration, images: Any
    ) -> Registration:
        ways = inverse_of(fixed), fixed.map_AB, torch.linalg.inv(fixed.fit.matrix)
        return Composed(moving, *ways, fixed.geometry_A, images)

    def _centred(self, moving: Registration) -> Registration:
        centre = self._centre
        ways = centre.into, centre.out, centre.matrix, centre.place
        return Composed(moving, *ways)

    @cached_property
    def _centre(self) -> Centre:
        """The way from the mean of all images: that of the mean of their codes."""
        once = self._once
        code = self.fit.code.mixed([(k in once) / len(once) for k in range(len(self))])
        into = self.fit.place.physical_to_unit()
        boxes = [place.unit_to_physical() for place in self.told.places]
        matrices = (torch.stack(boxes) @ self.fit.matrices @ into)[once]
        with torch.no_grad():
            fields = self.fit.field_AB, self.fit.field_BA
            middle, inverse = (NeuralTransform(field, code) for field in fields)
        return Centre(matrices, middle, inverse, self.fit.place)

    @cached_property
    def _once(self) -> list[int]:
        """The numbers of the images without those that came before: see `fit_group`."""
        code = self.fit.code
        parts = [code.global_code, *(g.flatten(1) for g in code.local_codes)]
        rows = torch.cat([part.double() for part in parts], 1)
        return [
            k
            for k, row in enumerate(rows)
            if not any(torch.equal(row, other) for other in rows[:k])
        ]

    def _fitted_at(self, time: float) -> Registration:
        shares, k = self._shares(time)
        boxes = torch.stack([p.unit_to_physical() for p in self.told.places])
        weights = torch.tensor(shares, dtype=torch.float64)
        physical = torch.tensordot(weights, boxes @ self.fit.matrices, 1)
        code, matrix = (
            self.fit.code.mixed(shares),
            torch.linalg.inv(boxes[k]) @ physical,
        )
        pair = replace(self.fit.pair(k), code=code, matrix=matrix, warnings=[])
        place = self.told.places[k]
        return Registration(pair, place, self.fit.place, itk=self.told.itk)

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
        into: Map = self._centre.into
        place = self._centre.place
        if start is not None:
            own = self.fitted(start)
            into, place = inverse_of(own), own.geometry_A
        if times is None:
            ways = [self.fitted(k) for k in range(len(self))]
        else:
            ways = [self._fitted_at(time) for time in times]
        first = ways[0].two_way
        way = replace(first, map_AB=into, geometry_A=self.fit.place, geometry_B=place)
        on_frame = way.transform_points(rows)
        return np.stack([way.transform_points(on_frame) for way in ways])

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

        Of the deformations from the mean frame, in voxels, at random places.
        """
        generator, centre = np.random.default_rng(0), self._centre
        d = self.fit.place.dimension
        at = torch.from_numpy(generator.uniform(0, 1, (1, d, count, *(1,) * (d - 1))))
        with torch.no_grad():
            start = centre.into.phi(at)  # the deformations alone
            moves = [self._psi(k)(start) - at for k in self._once]
        steps = torch.tensor(self.fit.place.size).double() - 1
        mean = torch.stack(moves).mean(0).flatten(2)[0] * steps[:, None]
        return float(mean.square().sum(0).mean().sqrt())

    def _psi(self, number: int) -> Map:
        return NeuralTransform(self.fit.field_AB, self.fit.code.item(number))

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
        way = self.from_mean(number)
        way.images = self.image(number), self._mean_of_all, None, None
        way.made_with = self.made_with
        return way

    @cached_property
    def _mean_of_all(self) -> Any:
        ways = ((self.from_mean(k), self.image(k)) for k in range(len(self)))
        return self._mean((way.warp(image) for way, image in ways), self._centre.place)

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
