"""One file for a registration: safetensors with a JSON header, never pickle.

Tensors: ``matrix``, ``losses``, ``code.global``, ``code.local.0``... and the two
fields' states under ``field_AB.`` and ``field_BA.``. The header's ``nephi`` entry says
how to put them together; it also holds the images' geometries and the versions of the
packages that wrote it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from icon_nephi.codes import LatentCode
from icon_nephi.coordinates import Geometry
from icon_nephi.models import Fit, make_field

#: Raised when a file's meaning changes; older files stay readable.
FORMAT = 1
_PACKAGES = ("icon_nephi", "icon_registration", "torch", "itk")
_FIELDS = ("field_AB", "field_BA")


class Saved(NamedTuple):
    """What a file holds: a fit, where its images lie, whether they were ITK images."""

    fit: Fit
    geometry_A: Geometry
    geometry_B: Geometry
    itk: bool


def save_fit(
    path: str | os.PathLike[str],
    fit: Fit,
    geometry_A: Geometry,
    geometry_B: Geometry,
    *,
    itk: bool,
) -> None:
    """Nothing; the file is complete when this returns, else as it was.

    Raises:
        OSError: the file cannot be written.
    """
    code, names = fit.code, list(fit.losses[0]) if fit.losses else []
    tensors: dict[str, Tensor] = {
        "matrix": fit.matrix,
        "losses": torch.tensor(
            [[step[name] for name in names] for step in fit.losses], dtype=torch.float32
        ).reshape(len(fit.losses), len(names)),
        "code.global": code.global_code,
    }
    tensors |= {f"code.local.{i}": grid for i, grid in enumerate(code.local_codes)}
    fields = {}
    for name in _FIELDS:
        field: Any = getattr(fit, name)
        fields[name] = {"kind": type(field).__name__, "arguments": field.arguments}
        for key, value in field.state_dict().items():
            tensors[f"{name}.{key}"] = value
    header = {
        "format": FORMAT,
        "itk": itk,
        "geometry_A": asdict(geometry_A),
        "geometry_B": asdict(geometry_B),
        "interpolation": code.interpolation,
        "local_codes": len(code.local_codes),
        "fields": fields,
        "losses": names,
        "warnings": fit.warnings,
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    # A tensor that shares memory with another is refused, hence the copies.
    owned = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    with written_whole(path) as (part,):
        # Not save_file, whose files nobody else may read.
        part.write_bytes(save(owned, metadata={"nephi": json.dumps(header)}))


def load_fit(path: str | os.PathLike[str]) -> Saved:
    """The fit of a file written by `save_fit`, on the CPU.

    Raises:
        ValueError: missing, not such a file, truncated, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["nephi"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not a complete .nephi file: truncated, or not written by "
            "Registration.save"
        ) from error
    if not isinstance(header, dict) or header.get("format", 0) > FORMAT:
        raise ValueError(
            f"{path} has a format newer than this icon_nephi reads ({FORMAT}); "
            "upgrade icon_nephi"
        )
    try:
        return _assemble(header, tensors)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: {str(error).splitlines()[0]}; save it again"
        ) from error


def _assemble(header: dict[str, Any], tensors: dict[str, Tensor]) -> Saved:
    code = LatentCode(
        tensors["code.global"],
        tuple(tensors[f"code.local.{i}"] for i in range(header["local_codes"])),
        header["interpolation"],
    )
    fields: dict[str, nn.Module] = {}
    for name in _FIELDS:
        built = make_field(**header["fields"][name])
        start = f"{name}."
        built.load_state_dict(
            {
                k.removeprefix(start): v
                for k, v in tensors.items()
                if k.startswith(start)
            }
        )
        fields[name] = built.requires_grad_(False)
    fit = Fit(
        matrix=tensors["matrix"],
        code=code,
        field_AB=fields["field_AB"],
        field_BA=fields["field_BA"],
        losses=[
            dict(zip(header["losses"], step, strict=True))
            for step in tensors["losses"].tolist()
        ],
        warnings=list(header["warnings"]),
    )
    places = [_geometry(header[name]) for name in ("geometry_A", "geometry_B")]
    return Saved(fit, places[0], places[1], bool(header["itk"]))


def _geometry(numbers: dict[str, Any]) -> Geometry:
    return Geometry(
        size=tuple(numbers["size"]),
        spacing=tuple(numbers["spacing"]),
        origin=tuple(numbers["origin"]),
        direction=tuple(map(tuple, numbers["direction"])),
    )


@contextmanager
def written_whole(*paths: str | os.PathLike[str]) -> Iterator[list[Path]]:
    """Paths to write to, in the same folders; they replace the real ones at the end.

    After an error nothing is left and earlier files are as they were. The ending stays
    the same, because ITK chooses the format by it.
    """
    wanted = [Path(path) for path in paths]
    parts = [
        p.with_name(f".part{os.getpid()}-{i}-{p.name}") for i, p in enumerate(wanted)
    ]
    try:
        yield parts
        for part, path in zip(parts, wanted, strict=True):
            os.replace(part, path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
