"""What flags are refused for before anything heavy is imported: torch, ITK."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from icon_nephi.commands.flags import (
    IMAGES,
    VECTORS,
    CompareFlags,
    JacobianFlags,
    is_own,
)
from icon_nephi.commands.outputs import check_outputs
from icon_nephi.commands.parsing import Flags

# Groups of flags, and flags, that name files to be read.
_READ = ("inputs", "scores", "what", "transform", "reference", "moving", "file")


def check_there(flags: Flags) -> None:
    """Refuse what is to be read and is not there.

    Raises:
        ValueError: there is no such file, or it has no ending of a transform.
    """
    for entry in fields(flags):
        if entry.metadata["group"] not in _READ and entry.name not in _READ:
            continue
        name = "FILE" if entry.name == "file" else f"--{entry.name}"
        for path in _paths(getattr(flags, entry.name)):
            if entry.name in ("transform", "file"):
                is_own(name, path)
            if not path.exists():
                raise ValueError(f"{name}: {path} does not exist")


def _paths(given: object) -> list[Path]:
    """Return the paths in what was typed: one, several, or several with a tag."""
    if isinstance(given, Path):
        return [given]
    if isinstance(given, list | tuple):
        return [path for part in given for path in _paths(part)]
    return []


def check_jacobian(flags: JacobianFlags) -> Path:
    """Return where nephi-jacobian writes, if it can.

    Raises:
        ValueError: it cannot.
    """
    endings = VECTORS if flags.tensor else IMAGES
    read = [path for path in (flags.transform, flags.reference) if path is not None]
    return check_outputs({"out": (flags.out, endings)}, read)["out"]


def check_compare(flags: CompareFlags) -> None:
    """Refuse what nephi-compare cannot begin with.

    Raises:
        ValueError: an output, a number or a folder that cannot be.
    """
    if flags.out is not None:
        check_outputs({"out": (flags.out, (".csv",))})
    for name, least in (("seconds", 0.01), ("side", 17), ("threads", 1)):
        value = getattr(flags, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if not flags.data.is_dir():
        raise ValueError(f"--data: {flags.data} is not a folder")
