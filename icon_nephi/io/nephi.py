"""One file for a registration: safetensors with a JSON header, never pickle.

Tensors: ``matrix``, ``losses``, ``code.global``, ``code.local.0``... and the two
fields' states under ``field_AB.`` and ``field_BA.``. The header's ``nephi`` entry says
how to put them together; it also holds the images' geometries, the versions of the
packages that wrote it, and a checksum: a file in which a bit has changed is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from icon_nephi.fields import UnknownField, make_field, name_of_field
from icon_nephi.fields.codes import LatentCode
from icon_nephi.fit.settings import Fit
from icon_nephi.io.atomic import written_whole
from icon_nephi.io.versions import versions
from icon_nephi.space.frames import Geometry

#: Raised when a file's meaning changes; older files stay readable.
FORMAT = 1
_FIELDS = ("field_AB", "field_BA")
_SUM = "sha256"
_T = TypeVar("_T")


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
    """Write a fit, whole or not at all.

    Raises:
        OSError: the file cannot be written.
        ValueError: a field that is not registered, or has no ``arguments``.
    """
    names = list(fit.losses[0]) if fit.losses else []
    header, tensors = described(fit.code, fit.field_AB, fit.field_BA)
    tensors["matrix"] = fit.matrix
    tensors["losses"] = torch.tensor(
        [[step[name] for name in names] for step in fit.losses], dtype=torch.float32
    ).reshape(len(fit.losses), len(names))
    if fit.sharp is not None:
        tensors["sharp"] = fit.sharp
    header |= {
        "format": FORMAT,
        "itk": itk,
        "geometry_A": asdict(geometry_A),
        "geometry_B": asdict(geometry_B),
        "losses": names,
        "warnings": fit.warnings,
        "evidence": fit.evidence,
        "similarity": fit.similarity,
    }
    write_contents(path, header, tensors)


def described(
    code: LatentCode, field_AB: nn.Module, field_BA: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header entries and tensors of codes and fields.

    Raises:
        ValueError: a field that is not registered, or has no ``arguments``.
    """
    tensors: dict[str, Tensor] = {"code.global": code.global_code}
    tensors |= {f"code.local.{i}": grid for i, grid in enumerate(code.local_codes)}
    fields = {}
    for name, field in zip(_FIELDS, (field_AB, field_BA), strict=True):
        fields[name] = {"kind": name_of_field(field), "arguments": _arguments(field)}
        tensors |= {f"{name}.{k}": value for k, value in field.state_dict().items()}
    header = {
        "interpolation": code.interpolation,
        "local_codes": len(code.local_codes),
        "fields": fields,
        "versions": versions(),
    }
    return header, tensors


def write_contents(
    path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write a file of this format, whole or not at all."""
    # A tensor that shares memory with another is refused, hence the copies.
    owned = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    header = json.loads(json.dumps(header))
    header[_SUM] = _checksum(header, owned)
    with written_whole(path) as (part,):
        # Not save_file, whose files nobody else may read.
        part.write_bytes(save(owned, metadata={"nephi": json.dumps(header)}))


def _arguments(field: nn.Module) -> dict[str, float]:
    """Return what a field is made again from; see `icon_nephi.fields`."""
    arguments = getattr(field, "arguments", None)
    if not isinstance(arguments, dict):
        raise ValueError(
            f"a {type(field).__name__} cannot be saved without its attribute "
            "`arguments`, the numbers to make it again from; see icon_nephi.fields"
        )
    return arguments


def load_fit(path: str | os.PathLike[str]) -> Saved:
    """Return the fit of a file written by `save_fit`, on the CPU.

    Raises:
        ValueError: missing, not such a file, truncated, of a newer format, or with a
            field that is not registered.
    """
    contents = read_contents(path, FORMAT)
    return rebuilt(path, lambda: _assemble(*contents))


class Contents(NamedTuple):
    """What a file holds, its checksum tried."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]


def read_contents(path: str | os.PathLike[str], newest: int) -> Contents:
    """Return what is in a file of a format up to the newest.

    Raises:
        ValueError: missing, not such a file, truncated, damaged, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["nephi"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, LookupError, ValueError, OSError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a complete .nephi file: truncated, or not written by "
            "Registration.save"
        ) from error
    known = header.get("format", 0) if isinstance(header, dict) else None
    if not isinstance(known, int) or known > newest:
        raise ValueError(
            f"{path} has a format newer than this icon_nephi reads ({newest}); "
            "upgrade icon_nephi"
        )
    told = header.pop(_SUM, None)  # files of the first versions have none
    if told is not None and told != _checksum(header, tensors):
        raise ValueError(
            f"{path} is damaged: it is not what was saved; save it again, or copy or "
            "download it again"
        )
    return Contents(header, tensors)


def rebuilt(path: str | os.PathLike[str], make: Callable[[], _T]) -> _T:
    """Return what is made of a file's contents; errors say that it is damaged.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        return make()
    except UnknownField as error:
        raise ValueError(f"{path} cannot be read here: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; save it again") from error
    except (RuntimeError, ValueError) as error:
        said = (str(error).splitlines() or ["it cannot be put together"])[0]
        raise ValueError(f"{path} is damaged: {said}; save it again") from error


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the sum of all that a file holds."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _assemble(header: dict[str, Any], tensors: dict[str, Tensor]) -> Saved:
    code = code_from(header, tensors)
    places = [geometry_from(header[name]) for name in ("geometry_A", "geometry_B")]
    fields = {
        name: module_from(name, header["fields"][name], tensors) for name in _FIELDS
    }
    check_parts(code, tensors["matrix"], places, fields)
    fit = Fit(
        matrix=tensors["matrix"],
        code=code,
        **fields,
        losses=[
            dict(zip(header["losses"], step, strict=True))
            for step in tensors["losses"].tolist()
        ],
        warnings=[str(sentence) for sentence in header["warnings"]],
        evidence={str(k): float(v) for k, v in header.get("evidence", {}).items()},
        similarity=str(header.get("similarity", "")),
        sharp=_sharp(tensors.get("sharp"), places[1].dimension),
    )
    return Saved(fit, places[0], places[1], bool(header["itk"]))


def _sharp(tensor: Tensor | None, d: int) -> Tensor | None:
    """Return it, if it is as `icon_nephi.fit.sharpness` makes it."""
    if tensor is not None and (tensor.dim() != d + 2 or not tensor.isfinite().all()):
        raise ValueError("what is known of errors does not fit to the images")
    return tensor


def code_from(header: dict[str, Any], tensors: dict[str, Tensor]) -> LatentCode:
    """Return the codes of a file."""
    local = tuple(tensors[f"code.local.{i}"] for i in range(header["local_codes"]))
    return LatentCode(tensors["code.global"], local, header["interpolation"])


def module_from(
    name: str, told: dict[str, Any], tensors: dict[str, Tensor]
) -> nn.Module:
    """Return a field with its weights; what only the header sizes is not made."""
    start = f"{name}."
    own = [key for key in tensors if key.startswith(start)]
    state = {key.removeprefix(start): tensors[key] for key in own}
    if not all(isinstance(v, int | float) for v in told["arguments"].values()):
        raise ValueError(f"{name} is made of {told['arguments']}")
    if told["arguments"].get("hidden_layers", 1) > len(state):
        raise ValueError(f"{name} has more layers than weights")
    with torch.device("meta"):
        field = make_field(told["kind"], told["arguments"])
    field.load_state_dict(state, assign=True)
    if not all(v.is_floating_point() and v.isfinite().all() for v in state.values()):
        raise ValueError(f"{name} has weights that are not finite numbers")
    return field.requires_grad_(False)


def check_parts(
    code: LatentCode, matrix: Tensor, places: list[Geometry], fields: dict[str, Any]
) -> None:
    """Raise a ValueError if parts do not belong together."""
    d = places[1].dimension
    parts = [code.global_code, *code.local_codes, matrix]
    if not all(p.is_floating_point() and p.isfinite().all() for p in parts):
        raise ValueError("codes and matrix must be finite numbers")
    if code.interpolation not in ("quadratic", "linear"):
        raise ValueError(f"codes cannot be read as {code.interpolation!r}")
    if (
        places[0].dimension != d
        or matrix.shape != (d + 1, d + 1)
        or code.global_code.shape[:1] != (1,)
        or code.global_code.dim() != 2
        or any(g.dim() != d + 2 or min(g.shape[2:]) < 3 for g in code.local_codes)
        or not abs(float(torch.linalg.det(matrix.double()))) > 1e-12
    ):
        raise ValueError("codes, matrix and images do not fit together")
    for name, field in fields.items():
        told = field.arguments
        if (told["dimension"], told["code_size"]) != (d, code.size):
            raise ValueError(f"{name} does not fit to the code")


def geometry_from(numbers: dict[str, Any]) -> Geometry:
    """Return a place from the numbers of a header; a ValueError where it is none."""
    place = Geometry(
        size=tuple(int(n) for n in numbers["size"]),
        spacing=tuple(float(s) for s in numbers["spacing"]),
        origin=tuple(float(x) for x in numbers["origin"]),
        direction=tuple(tuple(map(float, row)) for row in numbers["direction"]),
    )
    d = place.dimension
    if (
        d not in (2, 3)
        or {len(place.spacing), len(place.origin), len(place.direction)} != {d}
        or any(len(row) != d for row in place.direction)
        or not all(2 <= n < 2**31 for n in place.size)
        or not all(0 < s < math.inf for s in place.spacing)
        or not all(map(math.isfinite, place.origin))
        or not abs(float(torch.linalg.det(torch.tensor(place.direction)))) > 1e-6
    ):
        raise ValueError(f"an image cannot lie at {numbers}")
    return place
