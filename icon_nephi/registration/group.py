"""Register many images in one call: a series in time, or a group to its template."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from icon_nephi._memory import peak_memory
from icon_nephi.fit.affine import coincide
from icon_nephi.fit.group import GroupFit, Moments, fit_group
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.fit.settings import Settings
from icon_nephi.io.group_input import GroupImages, read_group
from icon_nephi.io.nephi_group import Told, load_group, save_group
from icon_nephi.registration.series import Series
from icon_nephi.registration.template import Template


def register_series(
    images: Any,
    reference: str | int = "mean",
    *,
    times: Sequence[float] | None = None,
    periodic: bool | float = False,
    masks: Sequence[Any] | None = None,
    modality: str | None = None,
    similarity: Any = None,
    field: str | Settings = "auto",
    affine: bool | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    time_limit: float | None = None,
    keep_on_interrupt: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Series:
    """Return the `Series` that lays all images on one frame, both ways.

    All share two fields; an image is a code. They are laid on their mean, which belongs
    to none of them, so none is special. An image that cannot be used is left out, and
    the warnings name it.

    Args:
        images: a list of ITK images (2D or 3D), of their paths, or of tensors
            ``[1, C, *grid]``, whose grids may differ; or one 4D ITK image or its path.
        reference: ``"mean"``, or the number of an image: whose grid and points results
            have.
        times: when each was taken, increasing; default: one after the other, as a 4D
            file says.
        periodic: the first comes again after the last, one step later, or after that
            period: a heart, a breath.
        masks: above zero where an image counts; one for each, or None.
        modality: ``"ct"``, ``"mri"`` or None, of all.
        similarity: as of `icon_nephi.register`.
        field: as of `icon_nephi.register`.
        affine: look for an affine map of each first; default: where headers do not lay
            the images on each other.
        seed: of every random number.
        device: default: the tensors' own; else a GPU if there is one.
        progress: show a bar.
        time_limit: seconds after which to stop early.
        keep_on_interrupt: Ctrl-C stops early; `warnings` say so.
        checkpoint: a file that is written after each round and read where a run of the
            same was ended; it is removed in the end.

    Raises:
        TypeError: an argument of another kind than this.
        ValueError: images or times that cannot be used; one sentence says why.
    """
    options = FitOptions(seed, progress, time_limit, keep_on_interrupt)
    group = read_group(images, masks, modality, device)
    known = _times(times, group)
    told = Told(
        names=group.names,
        places=group.places,
        itk=group.itk,
        times=known,
        period=_period(periodic, known),
        reference=_reference(reference, group),
        left_out=group.left_out,
    )
    if affine is None:
        first = group.places[0]
        affine = not all(coincide(place, first) for place in group.places[1:])
    moments = Moments(told.times, told.period)
    choices: dict[str, Any] = {"similarity": similarity, "field": field}
    choices |= {"affine": affine, "moments": moments}
    fit = _fitted(group, told, choices, options, checkpoint)
    made = {"modality": modality, "seed": seed, "seconds": options.seconds}
    made |= {"similarity": similarity, "peak_memory": peak_memory(), "affine": affine}
    return Series(fit, told, _images(group), made)


def build_template(
    images: Any,
    *,
    masks: Sequence[Any] | None = None,
    modality: str | None = None,
    similarity: Any = None,
    field: str | Settings = "auto",
    affine: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    time_limit: float | None = None,
    keep_on_interrupt: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Template:
    """Return the `Template` of a group: its mean image, in the middle of all shapes.

    Arguments and errors as of `register_series`; images have no order.
    """
    options = FitOptions(seed, progress, time_limit, keep_on_interrupt)
    group = read_group(images, masks, modality, device)
    told = Told(
        names=group.names,
        places=group.places,
        itk=group.itk,
        left_out=group.left_out,
        kind="template",
    )
    choices: dict[str, Any] = {"similarity": similarity, "field": field}
    choices |= {"affine": affine, "moments": Moments()}
    fit = _fitted(group, told, choices, options, checkpoint)
    made = {"modality": modality, "seed": seed, "seconds": options.seconds}
    made |= {"similarity": similarity, "peak_memory": peak_memory(), "affine": affine}
    template = Template(fit, told, _images(group), made)
    template.sources = group.sources
    return template


def _fitted(
    group: GroupImages,
    told: Told,
    choices: dict[str, Any],
    options: FitOptions,
    checkpoint: str | os.PathLike[str] | None,
) -> GroupFit:
    """Return the fit of a group, gone on with from a checkpoint of the same.

    Images that came twice are fitted, and count in the mean, once.
    """
    begun, keep = None, None
    first = [group.digests.index(digest) for digest in group.digests]
    once = sorted(set(first))
    if len(once) < 2:
        raise ValueError("images are all the same; were the right files read?")
    moments = choices["moments"]
    if moments.times is not None:
        times = [moments.times[k] for k in once]
        choices = choices | {"moments": replace(moments, times=times)}
    told = replace(
        told,
        names=tuple(told.names[k] for k in once),
        places=tuple(told.places[k] for k in once),
        times=None,
        reference=None,
    )
    sources = [group.sources[k] for k in once]
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        same = f"{group.digests} {options.seed} {choices}"
        noted = replace(told, left_out=(*told.left_out, same))
        begun = _begun(path, noted)
        keep = _keeper(path, noted)
    with torch.enable_grad():
        known: dict[str, Any] = {"options": options, "begun": begun, "keep": keep}
        fit = fit_group(sources, **choices, **known)
    if path is not None:
        path.unlink(missing_ok=True)
    return fit.taken([once.index(k) for k in first])


def _keeper(path: Path, told: Told) -> Callable[[GroupFit], None]:
    return lambda fit: save_group(path, fit, told)


def _begun(path: Path, told: Told) -> GroupFit | None:
    """Return what a run of the same has reached, if there is one."""
    if not path.exists():
        return None
    with suppress(ValueError):  # of another version: begin anew
        fit, noted = load_group(path)
        if noted == told:
            for field in (fit.field_AB, fit.field_BA):
                field.requires_grad_(True)
            return fit
    return None


def _images(group: GroupImages) -> Callable[[int], Any]:
    return lambda number: group.originals[number]()


def _times(times: Sequence[float] | None, group: GroupImages) -> tuple[float, ...]:
    """Return the times of the images that are used."""
    if times is None:
        return tuple(group.step * number for number in group.numbers)
    count = len(group.numbers) + len(group.left_out)
    values = [float(time) for time in times]
    if len(values) != count:
        raise ValueError(f"times are {len(values)} and images {count}: give one each")
    if not all(map(isfinite, values)) or sorted(set(values)) != values:
        raise ValueError(
            f"times must increase from image to image, got {', '.join(map(str, times))}"
            "; sort the images by their times"
        )
    return tuple(values[number] for number in group.numbers)


def _period(periodic: bool | float, times: tuple[float, ...]) -> float | None:
    if periodic is False:
        return None
    length = times[-1] - times[0]
    if periodic is True:
        return length * len(times) / (len(times) - 1)
    if not length < periodic < float("inf"):
        raise ValueError(
            f"periodic must be True or a period longer than all times together, "
            f"{length:g}, got {periodic:g}"
        )
    return float(periodic)


def _reference(reference: str | int, group: GroupImages) -> int | None:
    if reference == "mean":
        return None
    count = len(group.numbers) + len(group.left_out)
    if isinstance(reference, str) or not 0 <= reference < count:
        raise ValueError(
            f"reference must be 'mean' or the number of an image, 0 to {count - 1}, "
            f"got {reference!r}"
        )
    if reference not in group.numbers:
        raise ValueError(f"reference: image {reference} was {group.left_out[0]}")
    return group.numbers.index(reference)
