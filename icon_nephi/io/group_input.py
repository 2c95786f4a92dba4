"""Many images as people hand them over: a list, files, or one 4D image; checked.

An image that cannot be used is left out, and a sentence names it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icon_nephi.io.image_input import choose_device, is_itk, place_of
from icon_nephi.io.pair_input import read_alone
from icon_nephi.space.frames import Geometry
from icon_nephi.space.intensities import PreparedImage

# Voxels in all above which files are read again whenever they are needed.
HELD = 200_000_000


@dataclass(frozen=True)
class GroupImages:
    """Images that can be used.

    Attributes:
        numbers: which they are of those that came.
        names: of each.
        originals: read an image as it was given.
        sources: read an image as a fit takes it.
        places: where each lies.
        itk: whether points are LPS millimetres.
        left_out: a sentence for each that cannot be used.
        step: the time from one to the next that a 4D file tells, else 1.
        digests: of the contents of each: equal images have equal ones.
    """

    numbers: tuple[int, ...]
    names: tuple[str, ...]
    originals: tuple[Callable[[], Any], ...]
    sources: tuple[Callable[[], PreparedImage], ...]
    places: tuple[Geometry, ...]
    itk: bool
    left_out: tuple[str, ...]
    step: float
    digests: tuple[str, ...]


def read_group(
    images: Any,
    masks: Sequence[Any] | None,
    modality: str | None,
    device: torch.device | str | None,
) -> GroupImages:
    """Return the images that can be used, two at least.

    Args:
        images: a sequence of paths, ITK images or tensors ``[1, C, *grid]``; or a path
            or ITK image of a 4D image.
        masks: of the same kinds, one for each image or None.
        modality: see `prepare`.
        device: see `choose_device`.

    Raises:
        TypeError: images of other kinds, or of two kinds.
        ValueError: fewer than two that can be used; masks that are not as many.
    """
    names, readers, step = _given(images)
    if masks is not None and len(masks) != len(readers):
        raise ValueError(
            f"masks are {len(masks)} and images {len(readers)}: give one for each"
        )
    tensors = [i for i in _members(images) if isinstance(i, Tensor)]
    if tensors and len(tensors) < len(readers):
        raise TypeError("images are tensors and others; pass the same kind")
    where = choose_device(device, tensors[0] if tensors else None)
    left_out: list[str] = []
    kept: list[tuple[int, PreparedImage]] = []
    digests: list[str] = []
    voxels = 0
    for number, (name, reader) in enumerate(zip(names, readers, strict=True)):
        mask = None if masks is None else masks[number]
        try:
            image = _prepared(name, reader, mask, modality, where)
            if kept:
                _check_alike(name, image, kept[0][1])
        except (ValueError, TypeError) as error:
            left_out.append(f"left out: {error}")
            continue
        voxels += image.values.numel()
        digests.append(_digest(image))
        held = not _is_path(reader) or voxels <= HELD
        kept.append((number, image if held else _without(image)))
    if len(kept) < 2:
        reasons = "; ".join(left_out) or "one came"
        raise ValueError(
            f"images must be two at least that can be used, got {len(kept)} ({reasons})"
        )
    numbers = tuple(number for number, _ in kept)
    sources: list[Callable[[], PreparedImage]] = []
    for number, image in kept:
        mask = None if masks is None else masks[number]
        again = partial(
            _prepared, names[number], readers[number], mask, modality, where
        )
        sources.append(again if not image.values.numel() else partial(_same, image))
    return GroupImages(
        numbers,
        tuple(names[n] for n in numbers),
        tuple(readers[n] for n in numbers),
        tuple(sources),
        tuple(image.place for _, image in kept),
        kept[0][1].placed,
        tuple(left_out),
        step,
        tuple(digests),
    )


def _digest(image: PreparedImage) -> str:
    digest = hashlib.sha256(str(image.place).encode())
    for part in (image.values, image.mask):
        if part is not None:
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _same(image: Any) -> Any:
    return image


def _without(image: PreparedImage) -> PreparedImage:
    from dataclasses import replace

    return replace(image, values=image.values[..., :0], mask=None)


def _members(images: Any) -> list[Any]:
    alone = isinstance(images, str | os.PathLike | Tensor) or is_itk(images)
    return [] if alone else list(images)


def _is_path(reader: Any) -> bool:
    return isinstance(reader, partial) and reader.func is _read_file


def _given(images: Any) -> tuple[list[str], list[Callable[[], Any]], float]:
    """Return names and readers of images, and the time between them."""
    if isinstance(images, str | os.PathLike) or is_itk(images):
        return _frames(images)
    if isinstance(images, Tensor):
        raise TypeError(
            "images must be a list of tensors [1, C, *grid], got one tensor; pass "
            "list(images[:, None]) for frames [T, *grid]"
        )
    members = list(images)
    if len(members) == 1 and (
        isinstance(members[0], str | os.PathLike) or is_itk(members[0])
    ):
        return _frames(members[0])
    names: list[str] = []
    readers: list[Callable[[], Any]] = []
    for number, image in enumerate(members):
        if isinstance(image, str | os.PathLike):
            names.append(str(image))
            readers.append(partial(_read_file, Path(image)))
        else:
            names.append(f"images[{number}]")
            readers.append(partial(_same, image))
    return names, readers, 1.0


def _read_file(path: Path) -> Any:
    from icon_nephi.io.image_files import read_image

    return read_image("images", path)


def _frames(image: Any) -> tuple[list[str], list[Callable[[], Any]], float]:
    """Return names and readers of the frames of a 4D image, and the time between."""
    from icon_nephi.io.itk_frames import frames_of, read_frames

    if is_itk(image):
        frames, step = frames_of("images", image)
    else:
        frames, step = read_frames("images", Path(image))
    names = [f"frame {number}" for number in range(len(frames))]
    return names, [partial(_same, frame) for frame in frames], step


def _prepared(
    name: str,
    reader: Callable[[], Any],
    mask: Any,
    modality: str | None,
    where: torch.device,
) -> PreparedImage:
    """Return an image as a fit takes it; errors name it."""
    image = reader()
    if isinstance(mask, str | os.PathLike):
        mask = _read_file(Path(mask))
    try:
        place_of(name, image, itk=is_itk(image), dimension=_dimension(image))
        return read_alone("A", image, mask, modality, where)
    except (ValueError, TypeError) as error:
        text = str(error).replace("mask_A", f"the mask of {name}")
        raise type(error)(text.replace("image_A", name)) from error


def _dimension(image: Any) -> int:
    if is_itk(image):
        return int(image.GetImageDimension())
    return image.dim() - 2 if isinstance(image, Tensor) else 3


def _check_alike(name: str, image: PreparedImage, first: PreparedImage) -> None:
    for what, own, others in (
        ("axes", image.place.dimension, first.place.dimension),
        ("channels", image.values.shape[1], first.values.shape[1]),
    ):
        if own != others:
            raise ValueError(f"{name} has {own} {what}, the images before {others}")
    if image.placed != first.placed:
        raise TypeError(f"{name} is a {'file' if image.placed else 'tensor'}")
