"""The names of files that a command is to write, checked once, before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from icon_nephi.io.atomic import is_read_only

#: Files that hold a part of another: what lies beside a header, and what names it.
_BESIDE = {
    ".hdr": (".img", ".img.gz"),
    ".img": (".hdr",),
    ".mhd": (".raw", ".zraw"),
    ".nhdr": (".raw", ".raw.gz"),
}


def check_outputs(
    outputs: Mapping[str, tuple[Path, Sequence[str]]], inputs: Iterable[Path] = ()
) -> dict[str, Path]:
    """Return the paths if all can be written to, so that no work is done in vain.

    Args:
        outputs: by flag, each with the endings it may have.
        inputs: files and folders that are read, none of which may be written over, by
            whatever way their names lead there.

    Raises:
        ValueError: a path cannot be written to, has another ending, is an input or
            twice an output.
    """
    read = [part for path in inputs for part in _with_parts(path)]
    known: dict[Path, str] = {}
    for flag, (path, endings) in outputs.items():
        _check_name(flag, path, endings)
        for part in _with_parts(path):
            other = next((p for p in read if is_same(part, p)), None)
            if other is not None:
                raise ValueError(
                    f"--{flag}: {path} is also an input; it would be overwritten"
                )
            twin = next((f for p, f in known.items() if is_same(part, p)), flag)
            if twin != flag or part in known:
                raise ValueError(
                    f"two outputs have the same path, {path} (--{twin} and --{flag}); "
                    "give each its own"
                )
            known[part] = flag
    return {flag: path for flag, (path, _) in outputs.items()}


def check_output(flag: str, path: Path, endings: Sequence[str]) -> Path:
    """Return one path: see `check_outputs`."""
    return check_outputs({flag: (path, endings)})[flag]


def is_same(first: Path, second: Path) -> bool:
    """Return whether two paths lead to one file, be it there yet or not."""
    with suppress(OSError):
        if first.samefile(second):
            return True
    return os.path.realpath(first) == os.path.realpath(second)


def _with_parts(path: Path) -> list[Path]:
    """Return a path and those of what belongs to it; of a folder all it holds."""
    if path.is_dir():
        return [path, *(p for p in path.iterdir() if p.is_file())]
    beside = _BESIDE.get(path.suffix.lower(), ())
    return [path, *(path.with_suffix(ending) for ending in beside)]


def _check_name(flag: str, path: Path, endings: Sequence[str]) -> None:
    if not path.name.lower().endswith(tuple(endings)):
        raise ValueError(f"--{flag}: {path} must end in {', '.join(endings)}")
    if path.name.lower() in endings:
        raise ValueError(f"--{flag}: {path} has nothing before its ending")
    if not path.parent.is_dir():
        raise ValueError(f"--{flag}: the folder {path.parent} does not exist")
    longest, length = _longest_name(path.parent), len(os.fsencode(path.name))
    if length > longest:
        raise ValueError(
            f"--{flag}: the name {path.name[:40]}... has {length} bytes, more than the "
            f"{longest} that names may have there; shorten it"
        )
    if path.is_dir():
        raise ValueError(f"--{flag}: {path} is a folder; give a file name in it")
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ValueError(
            f"--{flag}: {path} is a link to {target}, whose folder does not exist"
        )
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"--{flag}: the folder {path.parent} cannot be written to")
    if target.exists() and not target.is_file():
        raise ValueError(f"--{flag}: {path} is a device or a pipe; give a file name")
    if is_read_only(target):
        raise ValueError(
            f"--{flag}: {path} is there and read-only; remove it or choose another name"
        )


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, ValueError, OSError):  # where nobody says
        return 255
