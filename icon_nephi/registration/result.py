"""Everything a person asks of a registration: maps, warps, fields, determinants.

ITK images (then all points are LPS millimetres) or tensors (then points are rows in
the ICON frame: tensor axes, unit box). ITK is imported only where ITK images come.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from icon_nephi.fit.settings import Fit
from icon_nephi.io.image_input import check_points, place_of, voxels_of
from icon_nephi.io.nephi import load_fit, save_fit
from icon_nephi.io.resampling import (
    MODES,
    check_outside,
    least_value,
    reader,
    type_of_result,
)
from icon_nephi.maps.framed import FramedMap, over_grid
from icon_nephi.maps.transforms import Composition, MatrixTransform, NeuralTransform
from icon_nephi.maps.two_way import (
    FIXED_TO_MOVING,
    MOVING_TO_FIXED,
    TwoWay,
    direction_of,
)
from icon_nephi.report.expected_error import (
    error_estimate,
    how_sharp,
    inverse_consistency,
)
from icon_nephi.report.page import write_report
from icon_nephi.space.frames import Array, Geometry, apply_affine


def load(path: str | os.PathLike[str]) -> Registration:
    """Return the `Registration` that ``Registration.save`` wrote, on the CPU.

    Raises:
        ValueError: not such a file, truncated, or of a newer version.
    """
    fit, geometry_A, geometry_B, itk = load_fit(path)
    return Registration(fit, geometry_A, geometry_B, itk=itk)


class Registration:
    """Two maps between two images, in both directions.

    The default direction ``"fixed_to_moving"`` takes points of the fixed image (B) to
    the moving image (A); images go the other way, moving to fixed. Results are ITK
    images where the registered images were ITK images, else tensors.

    Args:
        fit: see `icon_nephi.models`.
        geometry_A: where the moving image lies.
        geometry_B: where the fixed image lies.
        itk: whether the images were ITK images.
        images: what was registered, (moving, fixed, moving mask, fixed mask), if kept.
        made_with: the choices of `register` and the seconds it took.

    Attributes:
        map_AB: the map in ICON frames, fixed unit box -> moving unit box.
        map_BA: its counterpart, moving -> fixed.
        two_way: both with their grids, in the frame of the registration's points.
    """

    #: Whether its maps are those of its fit, and no compositions.
    proper = True

    def __init__(
        self,
        fit: Fit,
        geometry_A: Geometry,
        geometry_B: Geometry,
        *,
        itk: bool,
        images: tuple[Any, ...] | None = None,
        made_with: dict[str, Any] | None = None,
    ) -> None:
        self.fit, self.geometry_A, self.geometry_B = fit, geometry_A, geometry_B
        self.itk, self.images, self.made_with = itk, images, made_with or {}
        self.device = fit.code.global_code.device
        self._inverse = torch.linalg.inv(fit.matrix)
        self._of_exports: list[str] = []
        with torch.no_grad():
            fields = fit.field_AB, fit.field_BA
            forward, backward = (NeuralTransform(f, fit.code) for f in fields)
            self.map_AB = Composition(MatrixTransform(fit.matrix[None]), forward)
            self.map_BA = Composition(backward, MatrixTransform(self._inverse[None]))
        ways = (self.map_AB, self.map_BA, geometry_A, geometry_B, self.device)
        self.two_way = TwoWay(*ways, "physical" if itk else "unit", fit.matrix)

    @property
    def dimension(self) -> int:
        """The number of axes."""
        return self.geometry_B.dimension

    @property
    def losses(self) -> list[dict[str, float]]:
        """The loss and its terms at every step."""
        return self.fit.losses

    @property
    def warnings(self) -> list[str]:
        """What the optimisation found doubtful, one sentence each.

        And of an ITK transform, once it was asked for, if it is off by much.
        """
        return [*self.fit.warnings, *self._of_exports]

    @cached_property
    def phi_AB(self) -> Any:
        """Fixed points to moving points: itk.CompositeTransform, or the tensor map."""
        return self._exported(FIXED_TO_MOVING) if self.itk else self.map_AB

    @cached_property
    def phi_BA(self) -> Any:
        """Moving points to fixed points; see `phi_AB`."""
        return self._exported(MOVING_TO_FIXED) if self.itk else self.map_BA

    def warp(
        self,
        image: Any,
        mode: str = "linear",
        reference: Any = None,
        *,
        inverse: bool = False,
        outside: float | None = None,
    ) -> Any:
        """Return a moving-space image on the fixed image's grid.

        Args:
            image: ITK image on any grid in the moving image's space, of one or several
                numbers a voxel, or a tensor ``[1, C, *grid]`` over its unit box.
            mode: ``"linear"`` or ``"cubic"`` (float32 comes out), ``"nearest"`` or
                ``"onehot"`` (same pixel type): see `icon_nephi.io.resampling`. Colours
                stay colours.
            reference: another grid to warp to: an ITK image, or a tensor.
            inverse: take a fixed-space image to the moving image's grid instead.
            outside: the value where there is no image; default: the image's least (0
                is what label maps need, see `warp_labels`).

        Raises:
            ValueError: unknown mode, or an image that `register` would refuse.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        direction = direction_of(inverse=inverse)
        place = self._place_of("image", image, components=True)
        values = voxels_of(image)
        into = torch.linalg.inv(self.two_way.frame_of(place))
        if outside is not None:
            check_outside(outside, values, mode)
        beyond = least_value(values) if outside is None else outside
        value_at = reader(values, into, mode, beyond)
        single = self.itk and values.shape[-1] == 1
        warped = self._on_grid(
            lambda _, moved: value_at(moved)[:, 0] if single else value_at(moved),
            reference,
            direction,
            None if single else values.shape[-1],
            dtype=type_of_result(values, mode),
            mapped=self.two_way.framed(direction),
        )
        return warped if self.itk else warped.to(image.device)

    def warp_labels(
        self, labels: Any, reference: Any = None, *, inverse: bool = False
    ) -> Any:
        """Return a moving-space label map on the fixed grid: nearest, 0 outside."""
        return self.warp(labels, "nearest", reference, inverse=inverse, outside=0)

    def transform_points(self, points: Any, direction: str = FIXED_TO_MOVING) -> Array:
        """Return the mapped points, numpy ``[N, d]`` float64.

        Args:
            points: ``[N, d]``, LPS millimetres for ITK images, else ICON frame.
            direction: ``"fixed_to_moving"`` or ``"moving_to_fixed"``.

        Raises:
            ValueError: another shape or direction, or numbers that are not finite.
        """
        return self.two_way.transform_points(self._points(points), direction)

    def lengths(self, direction: str) -> Array:
        """Return the points' units in mm (tensors: voxels), ``[d]``: see `TwoWay`."""
        return self.two_way.lengths(direction)

    def displacement_field(
        self, reference: Any = None, direction: str = FIXED_TO_MOVING
    ) -> Any:
        """Return mapped minus own place at every voxel, from the exact map.

        An ITK image of vectors in LPS millimetres; for tensors ``[1, d, *grid]`` in
        the ICON frame. The grid is the fixed image's (``"moving_to_fixed"``: the
        moving image's), or the reference's.
        """
        mapped, d = self.two_way.framed(direction), self.geometry_B.dimension
        return self._on_grid(
            lambda here, there: there - here, reference, direction, d, mapped=mapped
        )

    def jacobian_determinant(
        self, reference: Any = None, direction: str = FIXED_TO_MOVING
    ) -> Any:
        """Return analytic determinants at every voxel: volume there over volume here.

        In physical units (mm by mm) for ITK images, whatever their directions; for
        tensors ``[1, 1, *grid]`` by unit boxes. Grids as in `displacement_field`.
        """
        mapped = self.two_way.framed(direction)
        return self._on_grid(mapped.determinants, reference, direction)

    def jacobian(self, reference: Any = None, direction: str = FIXED_TO_MOVING) -> Any:
        """Return analytic d mapped_i / d place_j at every voxel, as its number d i + j.

        For ITK images ``d * d`` numbers a voxel, millimetres by millimetres, LPS axes;
        for tensors ``[1, d, d, *grid]``, ICON frame. Grids as in `displacement_field`.
        """
        mapped, d = self.two_way.framed(direction), self.geometry_B.dimension
        matrices = self._on_grid(
            lambda p: mapped.jacobians(p).reshape(-1, d**2), reference, direction, d**2
        )
        return matrices if self.itk else matrices.unflatten(1, (d, d))

    def fold_fraction(self, points: Any = None) -> float:
        """Return the share of places, 0 to 1, where a determinant is not positive.

        Analytic ones of both directions together: at every voxel centre of the fixed
        image (backward: of the moving image), or at fixed-space points ``[N, d]`` and
        where they are mapped to.
        """
        rows = None if points is None else self._points(points)
        return self.two_way.fold_fraction(rows)

    def inverse_consistency_error(self, reference: Any = None) -> Any:
        """Return ``|phi_BA(phi_AB(x)) - x|`` at every voxel, fixed grid or reference.

        Millimetres for ITK images; for tensors ``[1, 1, *grid]`` in the fixed image's
        voxels.
        """
        return self._on_grid(lambda p: inverse_consistency(self.two_way, p), reference)

    def error_estimate(
        self,
        points: Any,
        others: Sequence[Registration] = (),
        direction: str = FIXED_TO_MOVING,
    ) -> Array:
        """Return about how far off each mapped point is, ``[N]``: see `estimate`.

        Args:
            points: as of `transform_points`.
            others: registrations of the same pair with other seeds (`ensemble`).
            direction: where the points go.
        """
        return error_estimate(self, self._points(points), others, direction)

    def sharp_at(self, points: Any, direction: str = FIXED_TO_MOVING) -> Array | None:
        """Return `how_sharp` the images are at points, ``[N]``, if that is known."""
        rows = self._points(points)
        if direction != FIXED_TO_MOVING:
            rows = self.two_way.transform_points(rows, direction)
        if self.itk:
            frame = torch.linalg.inv(self.geometry_B.unit_to_physical())
            rows = apply_affine(frame, torch.from_numpy(rows)).numpy()
        return how_sharp(self.fit.sharp, rows)

    def error_image(
        self, reference: Any = None, others: Sequence[Registration] = ()
    ) -> Any:
        """Return `error_estimate` at every voxel of the fixed grid or the reference."""
        return self._on_grid(lambda p: error_estimate(self, p, others), reference)

    def report(self, path: str | os.PathLike[str], **extras: Any) -> None:
        """Write one HTML page that shows and measures this registration.

        Args:
            path: of the page.
            extras: landmarks and label maps of both images to score with, others of an
                ensemble, the command, ...: see `icon_nephi.report.page.write_report`.

        Raises:
            ValueError: a loaded registration, which has no images, or bad extras.
        """
        write_report(path, self, **extras)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file that `load` reads, whole or not at all."""
        save_fit(path, self.fit, self.geometry_A, self.geometry_B, itk=self.itk)

    def _exported(self, direction: str) -> Any:
        from icon_nephi.io.itk_transforms import composite_transform

        A, B = self.geometry_A, self.geometry_B
        way = (self.map_AB, B, A, self.fit.matrix)
        if direction == MOVING_TO_FIXED:
            way = (self.map_BA, A, B, self._inverse)
        said: list[str] = []
        transform = composite_transform(*way, device=self.device, said=said)
        side = direction.replace("_to_", " -> ")
        self._of_exports += [f"{side}: {sentence}" for sentence in said]
        return transform

    def _points(self, points: Any) -> Array:
        return check_points("points", points, self.geometry_B.dimension)

    def _place_of(self, name: str, image: Any, **allowed: bool) -> Geometry:
        d = self.geometry_B.dimension
        return place_of(name, image, itk=self.itk, dimension=d, **allowed)

    def _on_grid(
        self,
        function: Callable[..., Array],
        reference: Any,
        direction: str = FIXED_TO_MOVING,
        channels: int | None = None,
        *,
        dtype: npt.DTypeLike = np.float32,
        mapped: FramedMap | None = None,
    ) -> Any:
        """Return `over_grid` of a function as an ITK image, or ``[1, C, *grid]``.

        On the grid of the reference, default: of the image the direction starts in.
        """
        place = self.two_way.place(direction)
        if reference is not None:
            place = self._place_of("reference", reference)
        size, frame = self.two_way.grid(direction, place)
        values = over_grid(function, size, frame, channels, dtype, mapped=mapped)
        if self.itk:
            from icon_nephi.io.itk_images import image_of

            return image_of(values, place)
        if channels is None:
            return torch.from_numpy(values)[None, None]
        return torch.from_numpy(values).movedim(-1, 0)[None].contiguous()
