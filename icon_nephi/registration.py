"""Register two images in one call, and everything a person asks of the result.

ITK images (then all points are LPS millimetres) or tensors (then points are rows in
the ICON frame: tensor axes, unit box). ITK is imported only where ITK images come.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icon_nephi._check import check_intensities
from icon_nephi.coordinates import Geometry, apply_affine, points_as_grid, sample_image
from icon_nephi.files import load_fit, save_fit
from icon_nephi.fitting import fit_pair
from icon_nephi.inputs import choose_device, is_itk, place_of, read_input, voxels_of
from icon_nephi.metrics import fold_fraction
from icon_nephi.models import Fit, Settings
from icon_nephi.physical import Array, FramedMap, over_grid, slabs
from icon_nephi.preprocess import prepare
from icon_nephi.transforms import Composition, MatrixTransform, NeuralTransform

DIRECTIONS = ("fixed_to_moving", "moving_to_fixed")


def register(
    image_A: Any,
    image_B: Any,
    *,
    modality: str | tuple[str | None, str | None] | None = None,
    mask_A: Any = None,
    mask_B: Any = None,
    similarity: Any = None,
    field: str | Settings = "auto",
    affine: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    time_limit: float | None = None,
) -> Registration:
    """The `Registration` that lays image_A on image_B, optimised from scratch.

    Args:
        image_A: moving: an ITK image (2D or 3D, one number per voxel, any pixel type)
            or a tensor ``[1, C, *grid]``.
        image_B: fixed: the same kind; its grid may differ.
        modality: ``"ct"``, ``"mri"`` or None; a tuple of two for (A, B).
        mask_A: where image_A is looked at (above zero). ITK: on any grid; tensor:
            ``[1, 1, *grid]`` on image_A's.
        mask_B: the same of image_B.
        similarity: an ICON similarity in place of the default.
        field: ``"siren"`` (the modulated sine field), ``"grid"`` (a smaller one,
            about twice as fast, less exact on large motion), ``"detail"`` (the small
            one with finer codes), ``"ct"`` (the small one, comparing self-similarity
            features too), ``"auto"`` (3D CT: ct, else large 3D images: detail, else
            siren), or `icon_nephi.models.Settings`.
        affine: start from an affine map. Without, from where the headers (tensors:
            the unit boxes) put the images.
        seed: of every random number.
        device: default: the tensors' own; for ITK images a GPU if there is one.
        progress: show a bar.
        time_limit: seconds after which the optimisation stops early.

    Raises:
        TypeError: an argument of another kind than this.
        ValueError: images or masks that cannot be registered; one sentence says why.
    """
    itk = is_itk(image_A)
    if itk != is_itk(image_B):
        raise TypeError(
            f"image_A is {type(image_A).__name__} but image_B is "
            f"{type(image_B).__name__}; pass two ITK images or two tensors"
        )
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit must be positive seconds, got {time_limit}")
    modalities = modality if isinstance(modality, tuple) else (modality, modality)
    where = choose_device(device, None if itk else image_A)
    prepared, masks, geometries = [], [], []
    for letter, image, mask, kind in zip(
        "AB", (image_A, image_B), (mask_A, mask_B), modalities, strict=True
    ):
        values, inside, geometry = read_input(letter, image, mask)
        check_intensities(f"image_{letter}", values)
        prepared.append(prepare(values.to(where), kind))
        masks.append(None if inside is None else inside.to(where))
        geometries.append(geometry)
    if geometries[0].dimension != geometries[1].dimension:
        raise ValueError(
            f"image_A is {geometries[0].dimension}D but image_B is "
            f"{geometries[1].dimension}D; pass two 2D or two 3D images"
        )
    if prepared[0].shape[1] != prepared[1].shape[1]:
        raise ValueError(
            f"image_A has {prepared[0].shape[1]} channels but image_B has "
            f"{prepared[1].shape[1]}; pass the same channels of both"
        )
    with torch.enable_grad():
        fit = fit_pair(
            prepared[0],
            prepared[1],
            geometries[0],
            geometries[1],
            mask_A=masks[0],
            mask_B=masks[1],
            similarity=similarity,
            field=field,
            modality=modalities[0] if modalities[0] == modalities[1] else None,
            affine=affine,
            seed=seed,
            progress=progress,
            time_limit=time_limit,
        )
    return Registration(fit, geometries[0], geometries[1], itk=itk)


def load(path: str | os.PathLike[str]) -> Registration:
    """The `Registration` that ``Registration.save`` wrote, on the CPU.

    Raises:
        ValueError: not such a file, truncated, or of a newer version.
    """
    saved = load_fit(path)
    return Registration(saved.fit, saved.geometry_A, saved.geometry_B, itk=saved.itk)


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

    Attributes:
        map_AB: the map in ICON frames, fixed unit box -> moving unit box.
        map_BA: its counterpart, moving -> fixed.
    """

    def __init__(
        self, fit: Fit, geometry_A: Geometry, geometry_B: Geometry, *, itk: bool
    ) -> None:
        self.fit, self.geometry_A, self.geometry_B = fit, geometry_A, geometry_B
        self.itk = itk
        self.device = fit.code.global_code.device
        self._inverse = torch.linalg.inv(fit.matrix)
        with torch.no_grad():
            forward, backward = (
                NeuralTransform(f, fit.code) for f in (fit.field_AB, fit.field_BA)
            )
            self.map_AB = Composition(MatrixTransform(fit.matrix[None]), forward)
            self.map_BA = Composition(backward, MatrixTransform(self._inverse[None]))

    @property
    def losses(self) -> list[dict[str, float]]:
        """The loss and its terms at every step."""
        return self.fit.losses

    @property
    def warnings(self) -> list[str]:
        """What the optimisation found doubtful, one sentence each."""
        return self.fit.warnings

    @cached_property
    def phi_AB(self) -> Any:
        """Fixed points to moving points: itk.CompositeTransform, or the tensor map."""
        return self._exported("fixed_to_moving") if self.itk else self.map_AB

    @cached_property
    def phi_BA(self) -> Any:
        """Moving points to fixed points; see `phi_AB`."""
        return self._exported("moving_to_fixed") if self.itk else self.map_BA

    def warp(
        self,
        image: Any,
        mode: str = "linear",
        reference: Any = None,
        *,
        inverse: bool = False,
        outside: float | None = None,
    ) -> Any:
        """A moving-space image on the fixed image's grid.

        Args:
            image: ITK image on any grid in the moving image's space, or a tensor
                ``[1, C, *grid]`` over its unit box.
            mode: ``"linear"`` (float32 comes out) or ``"nearest"`` (same pixel type).
            reference: another grid to warp to: an ITK image, or a tensor.
            inverse: take a fixed-space image to the moving image's grid instead.
            outside: the value where there is no image; default: the nearest border's.

        Raises:
            ValueError: unknown mode, or an image that `register` would refuse.
        """
        if mode not in ("linear", "nearest"):
            raise ValueError(f"mode must be 'linear' or 'nearest', got {mode!r}")
        direction = DIRECTIONS[1 if inverse else 0]
        mapped = self._map(direction)
        size, frame = self._grid(reference, direction)
        place, values = self._place_of("image", image), voxels_of(image)
        into = torch.linalg.inv(self._frame(place))
        limits = np.array(place.size) - 1.0
        channels = values.shape[-1]
        # Nearest keeps any pixel type to the last bit, which no float tensor would.
        tensor = None
        if mode == "linear":
            tensor = torch.from_numpy(values.astype(np.float32)).movedim(-1, 0)[None]

        def sample(points: Array) -> Array:
            unit = apply_affine(into, torch.from_numpy(mapped(points)))
            index = unit.numpy() * limits
            if tensor is None:
                near = np.clip(np.floor(index + 0.5), 0, limits).astype(np.int64)
                read: Array = values[tuple(near.T)]
            else:
                at = points_as_grid(unit[None].float())
                read = sample_image(tensor, at)[0].flatten(1).T.numpy()
            if outside is not None:
                far = np.any((index < -0.5) | (index > limits + 0.5), axis=1)
                read = np.where(
                    far[:, np.newaxis], np.asarray(outside, read.dtype), read
                )
            return read

        kind = np.float32 if tensor is not None else values.dtype
        result = over_grid(sample, size, frame, channels, kind)
        if self.itk:
            return self._as_image(result[..., 0], reference, direction)
        moved = torch.from_numpy(result).movedim(-1, 0)[None]
        return moved.contiguous().to(image.device)

    def warp_labels(
        self, labels: Any, reference: Any = None, *, inverse: bool = False
    ) -> Any:
        """A moving-space label map on the fixed grid: nearest, 0 outside (`warp`)."""
        return self.warp(labels, "nearest", reference, inverse=inverse, outside=0)

    def transform_points(self, points: Any, direction: str = DIRECTIONS[0]) -> Array:
        """The mapped points, numpy ``[N, d]`` float64.

        Args:
            points: ``[N, d]``, LPS millimetres for ITK images, else ICON frame.
            direction: ``"fixed_to_moving"`` or ``"moving_to_fixed"``.

        Raises:
            ValueError: another shape or direction, or numbers that are not finite.
        """
        return self._map(direction)(self._points(points))

    def displacement_field(
        self, reference: Any = None, direction: str = DIRECTIONS[0]
    ) -> Any:
        """Mapped minus own place at every voxel, from the exact map.

        An ITK image of vectors in LPS millimetres; for tensors ``[1, d, *grid]`` in
        the ICON frame. The grid is the fixed image's (``"moving_to_fixed"``: the
        moving image's), or the reference's.
        """
        mapped, d = self._map(direction), self.geometry_B.dimension
        size, frame = self._grid(reference, direction)
        field = over_grid(lambda p: mapped(p) - p, size, frame, d)
        if self.itk:
            return self._as_image(field, reference, direction)
        return torch.from_numpy(field).movedim(-1, 0)[None].contiguous()

    def jacobian_determinant(
        self, reference: Any = None, direction: str = DIRECTIONS[0]
    ) -> Any:
        """Analytic determinant at every voxel: volume there over volume here.

        In physical units (mm by mm) for ITK images, whatever their directions; for
        tensors ``[1, 1, *grid]`` by unit boxes. Grids as in `displacement_field`.
        """
        mapped = self._map(direction)
        size, frame = self._grid(reference, direction)
        values = over_grid(mapped.determinants, size, frame)
        return self._as_image(values, reference, direction)

    def fold_fraction(self, points: Any = None) -> float:
        """The share of places, 0 to 1, where an analytic determinant is not positive.

        Both directions are counted together: at every voxel centre of the fixed image
        (backward: of the moving image), or at fixed-space points ``[N, d]`` and where
        they are mapped to.
        """
        forward, backward = (self._map(direction) for direction in DIRECTIONS)
        if points is not None:
            rows = self._points(points)
            values = [forward.determinants(rows), backward.determinants(forward(rows))]
            return fold_fraction(np.concatenate(values))
        folds = total = 0.0
        for mapped, direction in zip((forward, backward), DIRECTIONS, strict=True):
            for _, rows in slabs(*self._grid(None, direction)):
                folds += fold_fraction(mapped.determinants(rows)) * len(rows)
                total += len(rows)
        return folds / total

    def inverse_consistency_error(self, reference: Any = None) -> Any:
        """|phi_BA(phi_AB(x)) - x| at every voxel of the fixed grid or the reference.

        Millimetres for ITK images; for tensors ``[1, 1, *grid]`` in the fixed image's
        voxels.
        """
        forward, backward = (self._map(direction) for direction in DIRECTIONS)
        unit = 1.0 if self.itk else np.array(self.geometry_B.size) - 1.0

        def error(points: Array) -> Array:
            missed = (backward(forward(points)) - points) * unit
            length: Array = np.linalg.norm(missed, axis=1)
            return length

        size, frame = self._grid(reference, DIRECTIONS[0])
        return self._as_image(over_grid(error, size, frame), reference, DIRECTIONS[0])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Nothing; writes one file that `load` reads, whole or not at all."""
        save_fit(path, self.fit, self.geometry_A, self.geometry_B, itk=self.itk)

    def _exported(self, direction: str) -> Any:
        from icon_nephi.itk_images import composite_transform

        A, B, device = self.geometry_A, self.geometry_B, self.device
        if direction == "fixed_to_moving":
            return composite_transform(
                self.map_AB, B, A, self.fit.matrix, device=device
            )
        return composite_transform(self.map_BA, A, B, self._inverse, device=device)

    def _frame(self, geometry: Geometry) -> Tensor:
        """The unit box -> the frame that points are given in."""
        unit = torch.eye(geometry.dimension + 1, dtype=torch.float64)
        return geometry.unit_to_physical() if self.itk else unit

    def _map(self, direction: str) -> FramedMap:
        if direction not in DIRECTIONS:
            raise ValueError(
                f"direction must be one of {DIRECTIONS}, got {direction!r}"
            )
        A, B = self._frame(self.geometry_A), self._frame(self.geometry_B)
        if direction == "fixed_to_moving":
            return FramedMap(self.map_AB, B, A, self.device)
        return FramedMap(self.map_BA, A, B, self.device)

    def _points(self, points: Any) -> Array:
        rows = np.asarray(
            points.detach().cpu() if isinstance(points, Tensor) else points
        )
        d = self.geometry_B.dimension
        if rows.ndim != 2 or rows.shape[1] != d:
            raise ValueError(
                f"points must be [N, {d}], a row for each point, got shape {rows.shape}"
            )
        if not np.isfinite(rows.astype(np.float64)).all():
            raise ValueError("points must be finite; leave out those that are not")
        return rows.astype(np.float64)

    def _place_of(self, name: str, image: Any) -> Geometry:
        return place_of(name, image, itk=self.itk, dimension=self.geometry_B.dimension)

    def _place(self, reference: Any, direction: str) -> Geometry:
        """The grid results are on: the reference's, else where the map starts."""
        if reference is not None:
            return self._place_of("reference", reference)
        return self.geometry_B if direction == DIRECTIONS[0] else self.geometry_A

    def _grid(self, reference: Any, direction: str) -> tuple[tuple[int, ...], Tensor]:
        place = self._place(reference, direction)
        return place.size, self._frame(place)

    def _as_image(self, values: Array, reference: Any, direction: str) -> Any:
        """One number a voxel as an ITK image, or as a tensor ``[1, 1, *grid]``."""
        if not self.itk:
            return torch.from_numpy(values)[None, None]
        from icon_nephi.itk_images import image_of

        return image_of(values, self._place(reference, direction))
