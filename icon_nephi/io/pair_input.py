"""Both images of a pair as the fit takes them, from memory or read in parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icon_nephi._check import (
    check_both,
    check_dimension,
    check_grid,
    check_mask,
)
from icon_nephi._memory import plan, to_bytes
from icon_nephi.io.image_input import (
    check_tensor,
    choose_device,
    is_itk,
    read_input,
    read_label_map,
    voxel_geometry,
)
from icon_nephi.io.volumes import WORKING, Volume, open_volume
from icon_nephi.losses.similarities import shared_labels
from icon_nephi.space.chunks import Level
from icon_nephi.space.frames import (
    Geometry,
    apply_affine,
    identity_map,
    points_as_grid,
    to_rows,
)
from icon_nephi.space.images import sample_image
from icon_nephi.space.intensities import (
    PreparedImage,
    check_intensities,
    distance_reach,
    find_scale,
    prepare,
)
from icon_nephi.space.padding import filled, find_padding

#: Voxels from which an image in memory is fitted on coarser levels first, as those on
#: disk are: nothing of its size is then made beside it.
LARGE = 30_000_000


def read_pair(
    image_A: Any,
    image_B: Any,
    mask_A: Any,
    mask_B: Any,
    modalities: Sequence[str | None],
    device: torch.device | str | None,
    memory_limit: int | str | None = None,
    progress: bool = False,
    segmentations: Sequence[Any] = (None, None),
    lesions: Sequence[Any] = (None, None),
) -> tuple[PreparedImage, PreparedImage]:
    """Return both images on one device, None chosen as by `choose_device`.

    Images of `LARGE` size and more, on the CPU, are taken as `Volume`s.

    Raises:
        TypeError: images or masks of another kind, or of two kinds.
        ValueError: those that cannot be registered.
    """
    if in_millimetres(image_A) != in_millimetres(image_B):
        raise TypeError(
            f"image_A is {type(image_A).__name__} but image_B is "
            f"{type(image_B).__name__}; pass two ITK images or two tensors"
        )
    check_both("segmentation", *segmentations)
    where = choose_device(device, None if is_itk(image_A) else image_A)
    images, masks = (image_A, image_B), (mask_A, mask_B)
    if any(is_volume(i) or (where.type == "cpu" and _is_large(i)) for i in images):
        for letter, lesion in zip("AB", lesions, strict=True):
            if lesion is not None:
                raise ValueError(
                    f"lesion_mask_{letter} is for images in memory below {LARGE} "
                    f"voxels; leave the lesion out of mask_{letter}"
                )
        A, B = _read_volumes(images, masks, modalities, where, memory_limit, progress)
    else:
        A = read_alone("A", image_A, mask_A, modalities[0], where, lesions[0])
        B = read_alone("B", image_B, mask_B, modalities[1], where, lesions[1])
    check_dimension("image_A", A.place.dimension, "image_B is", B.place.dimension)
    if A.values.shape[1] != B.values.shape[1]:
        raise ValueError(
            f"image_A has {A.values.shape[1]} channels but image_B has "
            f"{B.values.shape[1]}; pass the same channels of both"
        )
    if segmentations[0] is not None:
        first = _label_map("segmentation_A", segmentations[0], A)
        second = _label_map("segmentation_B", segmentations[1], B)
        shared_labels(first, second)
        A, B = replace(A, labels=first), replace(B, labels=second)
    return A, B


def read_alone(
    letter: str,
    image: Any,
    mask: Any,
    modality: str | None,
    where: torch.device,
    lesion: Any = None,
) -> PreparedImage:
    """Return one image in memory as a fit takes it; see `read_pair`.

    Raises:
        TypeError, ValueError: as `read_pair`, of ``image_`` and the letter.
    """
    placed, (values, inside, place) = is_itk(image), read_input(letter, image, mask)
    counts, notes = what_counts(f"image_{letter}", values[0], inside)
    if lesion is not None:
        name = f"lesion_mask_{letter}"
        matched = read_label_map(name, lesion, place, itk=placed) == 0
        counts = matched if counts is None else matched & counts
        if not bool(counts.any()):
            raise ValueError(f"{name} leaves nothing of image_{letter}")
    check_intensities(f"image_{letter}", values, counts)
    values = values.to(where)
    if counts is not None:
        counts = counts.to(where)
        values = filled(values, counts)
    reach = None if modality else distance_reach(values, place.tensor_spacing)
    if reach is not None:
        values = values.clamp(-reach, reach)
        said = f"image_{letter} is a signed distance: it is compared up to {reach:g}"
        notes = (*notes, f"{said} from zero, where it says where the border is")
    return PreparedImage.of(
        prepare(values, modality, counts),
        place,
        mask=None if inside is None else inside.to(where),
        counts=counts,
        modality=modality,
        placed=placed,
        notes=notes,
    )


def what_counts(
    name: str, planes: Tensor, mask: Tensor | None
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Return which voxels of ``[C, *grid]`` are compared, None for all; sentences.

    Those in the mask, if there is one, that are not padding.
    """
    inside = None if mask is None else mask > 0
    if inside is not None:  # what it leaves out may be no number
        some = planes[inside[0].expand_as(planes)][0]
        planes = torch.where(inside[0] | planes.isfinite(), planes, some)
        inside = None if bool(inside.all()) else inside
    padding = find_padding(planes)
    if padding is None:
        return inside, ()
    counts = ~padding.where if inside is None else inside & ~padding.where
    if not bool(counts.any()):
        return inside, ()
    said = (
        f"{100 * padding.share:.0f} % of {name} is padding ({padding.value:g}): it is "
        "left out"
    )
    return counts, (said,)


def _label_map(name: str, labels: Any, image: PreparedImage) -> Tensor:
    if isinstance(labels, Tensor):
        check_grid(name, labels, image.whole.size)
    on_cpu = read_label_map(name, labels, image.place, itk=image.placed)
    return on_cpu.to(image.values.device)


def is_volume(image: Any) -> bool:
    """Return whether this is a `Volume`, or the path of a Zarr folder."""
    path = str(image) if isinstance(image, str | os.PathLike) else ""
    return isinstance(image, Volume) or path.rstrip("/").lower().endswith(".zarr")


def in_millimetres(image: Any) -> bool:
    """Return whether points of an image are LPS millimetres: all but tensors' are."""
    return is_itk(image) or is_volume(image)


def _is_large(image: Any) -> bool:
    if is_itk(image):
        size = image.GetLargestPossibleRegion().GetSize()
        single = image.GetNumberOfComponentsPerPixel() == 1
        return single and float(np.prod([int(n) for n in size], dtype=float)) >= LARGE
    if not isinstance(image, Tensor) or image.dim() < 4 or image.is_complex():
        return False
    return image.shape[:2] == (1, 1) and image.numel() >= LARGE


def as_volume(name: str, image: Any, memory_limit: int | str | None = None) -> Volume:
    """Return a `Volume`, a path's, or one over the voxels of an image in memory.

    Raises:
        TypeError: another kind of image.
        ValueError: one that cannot be read.
    """
    if isinstance(image, Volume):
        return image
    if is_volume(image):
        return open_volume(image, memory_limit)
    if is_itk(image):
        from icon_nephi.io.itk_images import array_of, check_itk_image, geometry_of

        check_itk_image(name, image)
        return Volume([Level.of(array_of(image), geometry_of(image))], name)
    tensor = check_tensor(name, image).detach().cpu()
    if tensor.shape[1] != 1:
        raise ValueError(f"{name} has {tensor.shape[1]} channels, expected one")
    values = tensor[0, 0]
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    return Volume([Level.of(values.numpy(), voxel_geometry(values.shape))], name)


def _read_volumes(
    images: Sequence[Any],
    masks: Sequence[Any],
    modalities: Sequence[str | None],
    where: torch.device,
    memory_limit: int | str | None,
    progress: bool,
) -> list[PreparedImage]:
    """Return working levels of two images read in parts, and their finer ones."""
    named = zip(("image_A", "image_B"), images, strict=True)
    volumes = [as_volume(name, image, memory_limit) for name, image in named]
    voxels, cache = WORKING, 0
    if memory_limit is not None or any(v.levels[0].array is None for v in volumes):
        limit = min(v.memory_limit for v in volumes)
        limit = limit if memory_limit is None else to_bytes(memory_limit)
        voxels, cache = plan(limit, WORKING)
    levels = []
    both = zip("AB", images, volumes, masks, modalities, strict=True)
    for letter, image, volume, mask, kind in both:
        values, place = volume.whole(volume.working(voxels, progress))
        inside = None
        if mask is not None:
            inside = _mask_on(f"mask_{letter}", mask, place, voxels)
        counts, notes = what_counts(f"image_{letter}", values[0], inside)
        check_intensities(f"image_{letter}", values, counts)
        values = values.to(where)
        if counts is not None:
            counts = counts.to(where)
            values = filled(values, counts)
        scale = find_scale(values, kind, counts)
        level = PreparedImage.of(
            scale(values),
            place,
            whole=volume.geometry,
            finer=volume.finer(voxels, cache, _numbers(scale, counts), where),
            mask=None if inside is None else inside.to(where),
            counts=counts,
            modality=kind,
            placed=in_millimetres(image),
            notes=notes,
        )
        levels.append(level)
    return levels


def _numbers(
    scale: Callable[[Tensor], Tensor], counts: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """Return the scale; where not all voxels count it takes those that are none."""
    return scale if counts is None else lambda values: scale(values.nan_to_num())


def _mask_on(name: str, mask: Any, place: Geometry, voxels: int) -> Tensor:
    """Return a mask, read in parts, on the grid of a working level: 0 or 1."""
    volume = as_volume(name, mask)
    values, own = volume.whole(volume.working(voxels))
    check_dimension(name, own.dimension, "its image is", place.dimension)
    between = own.physical_to_unit() @ place.unit_to_physical()
    rows = apply_affine(between, to_rows(identity_map(place.size).double()))
    at = points_as_grid(rows.float())
    inside = (sample_image(values, at) > 0).float().reshape(1, 1, *place.size)
    check_mask(name, inside, place.size)
    return inside
