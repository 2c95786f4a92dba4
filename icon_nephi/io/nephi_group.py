"""Many images in a .nephi file: as one pair, with a code and a matrix for each."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from icon_nephi.fit.group import GroupFit
from icon_nephi.io.nephi import (
    Contents,
    check_parts,
    code_from,
    described,
    geometry_from,
    module_from,
    read_contents,
    rebuilt,
    write_contents,
)
from icon_nephi.space.frames import Geometry

#: What files of many images are, beside those of pairs.
GROUP = 2


@dataclass(frozen=True)
class Told:
    """What is known of a group of images beside their maps.

    Attributes:
        names: of the images, for messages and files.
        places: where they lie.
        itk: whether they were ITK images (or files): points are LPS mm.
        times: when they were taken, increasing; None: they have no order.
        period: after which the first comes again, None: never.
        reference: the number of the image that is the reference, None: their mean.
        left_out: a sentence for each image that could not be used.
        kind: "series" or "template".
    """

    names: tuple[str, ...]
    places: tuple[Geometry, ...]
    itk: bool
    times: tuple[float, ...] | None = None
    period: float | None = None
    reference: int | None = None
    left_out: tuple[str, ...] = ()
    kind: str = "series"


def save_group(path: str | os.PathLike[str], fit: GroupFit, told: Told) -> None:
    """Write the fit of a group, whole or not at all.

    Raises:
        OSError: the file cannot be written.
        ValueError: a field that is not registered, or has no ``arguments``.
    """
    names = sorted({name for losses in fit.losses for step in losses for name in step})
    rows = [[step[n] for n in names] for losses in fit.losses for step in losses]
    header, tensors = described(fit.code, fit.field_AB, fit.field_BA)
    tensors["matrices"] = fit.matrices
    tensors["losses"] = torch.tensor(rows, dtype=torch.float32).reshape(-1, len(names))
    header |= {
        "format": GROUP,
        "place": asdict(fit.place),
        "told": asdict(told),
        "losses": names,
        "steps": [len(losses) for losses in fit.losses],
        "warnings": fit.warnings,
        "evidence": fit.evidence,
        "rounds": fit.rounds,
    }
    write_contents(path, header, tensors)


def load_group(path: str | os.PathLike[str]) -> tuple[GroupFit, Told]:
    """Return what `save_group` wrote, on the CPU.

    Raises:
        ValueError: missing, truncated, damaged, of a newer format, or of one pair.
    """
    contents = read_contents(path, GROUP)
    if contents.header.get("format") != GROUP:
        raise ValueError(f"{path} holds one pair, not a series or a template")
    return rebuilt(path, lambda: _assemble(contents))


def _assemble(contents: Contents) -> tuple[GroupFit, Told]:
    header, tensors = contents
    code = code_from(header, tensors)
    matrices, told = tensors["matrices"], header["told"]
    places = tuple(geometry_from(place) for place in told["places"])
    place = geometry_from(header["place"])
    names = "field_AB", "field_BA"
    fields = {n: module_from(n, header["fields"][n], tensors) for n in names}
    counts = {len(matrices), code.batch, len(places), len(told["names"])}
    if len(counts) != 1 or not len(matrices):
        raise ValueError("codes, matrices and images are not as many")
    for k, own in enumerate(places):
        check_parts(code.item(k), matrices[k], [own, place], fields)
    steps, rows = iter(tensors["losses"].tolist()), header["losses"]
    losses = [
        [dict(zip(rows, next(steps), strict=True)) for _ in range(int(count))]
        for count in header["steps"]
    ]
    fit = GroupFit(
        place=place,
        matrices=matrices,
        code=code,
        **fields,
        losses=losses,
        warnings=[[str(text) for text in texts] for texts in header["warnings"]],
        evidence=[{str(k): float(v) for k, v in e.items()} for e in header["evidence"]],
        rounds=int(header["rounds"]),
    )
    return fit, _told(told, places)


def _told(told: dict[str, Any], places: tuple[Geometry, ...]) -> Told:
    times, period = told["times"], told["period"]
    if times is not None and len(times) != len(places):
        raise ValueError("times and images are not as many")
    reference = told["reference"]
    if reference is not None and not 0 <= int(reference) < len(places):
        raise ValueError(f"image {reference} is no image of the group")
    return Told(
        names=tuple(map(str, told["names"])),
        places=places,
        itk=bool(told["itk"]),
        times=None if times is None else tuple(map(float, times)),
        period=None if period is None else float(period),
        reference=None if reference is None else int(reference),
        left_out=tuple(map(str, told["left_out"])),
        kind=str(told["kind"]),
    )
