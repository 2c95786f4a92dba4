"""Files that appear whole or not at all, however a process ends."""

from __future__ import annotations

import csv
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# In the names of unfinished files: processes are numbered by each machine.
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_LONGEST = 200  # bytes of a name that leave room for what is put before it


@contextmanager
def written_whole(*paths: str | os.PathLike[str]) -> Iterator[list[Path]]:
    """Give paths to write to, in the same folders; in the end they replace the real.

    After an error nothing is left and earlier files are as they were; whenever the
    process or the machine stops, each path holds its old or its new file, whole. The
    ending stays the same but for capitals, because ITK chooses the format by it. What a
    symbolic link leads to is replaced, not the link, and a file keeps its permissions.

    Raises:
        PermissionError: a file that is there is read-only.
    """
    wanted = [Path(os.path.realpath(path)) for path in paths]
    for path in filter(is_read_only, wanted):
        raise PermissionError(f"{path} is read-only; remove it or choose another name")
    endings = [ending_of(Path(path)) for path in paths]
    parts = [
        part_of(p, i, e) for i, (p, e) in enumerate(zip(wanted, endings, strict=True))
    ]
    try:
        yield parts
        for part, path in zip(parts, wanted, strict=True):
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, part)
        for part, path in zip(parts, wanted, strict=True):
            os.replace(part, path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def write_csv(
    path: str | os.PathLike[str],
    columns: Iterable[str],
    rows: Iterable[dict[str, Any]],
) -> None:
    """Write rows as CSV with a header; what is in no column is left out."""
    with (
        written_whole(path) as (part,),
        part.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def is_read_only(path: Path) -> bool:
    """Return whether a file is there that nobody, or this user, may write to."""
    if not path.exists():
        return False
    return not (path.stat().st_mode & 0o222 and os.access(path, os.W_OK))


def ending_of(path: Path) -> str:
    """Return what says the format, in small letters: ``.nii.gz``, ``.nrrd``."""
    *others, last = ["", *path.suffixes][-2:]
    packed = last.lower() in (".gz", ".json") and others and len(others[0]) <= 8
    return ((others[0] if packed else "") + last).lower()


def part_of(
    path: Path, number: int = 0, ending: str | None = None, kind: str = "part"
) -> Path:
    """Return a name beside a path, of this process; remove those of dead processes.

    It ends in the path's own name where ITK and the file system can do with that one,
    else in its checksum and ending.

    Args:
        path: what is to be written.
        number: of this process's parts.
        ending: of the name, default: the path's, in small letters.
        kind: ``"part"``, or ``"old"``: what a path held before, which may be all there
            is of it.
    """
    ending = ending_of(path) if ending is None else ending
    own = path.name
    known = own.endswith(ending) and not re.search(r"\.(img|hdr)\.", own)
    if len(os.fsencode(own)) > _LONGEST or not known:
        own = f"{zlib.crc32(os.fsencode(own)):08x}{ending}"
    name = re.compile(rf"\.(part|old)-{_HOST}-(\d+)-\d+-{re.escape(own)}")
    with suppress(OSError):  # the folder is missing, or the file another user's
        for left in path.parent.iterdir():
            match = name.fullmatch(left.name)
            if match is None or _lives(int(match[2])):
                continue
            if match[1] == "part" or path.exists():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f".{kind}-{_HOST}-{os.getpid()}-{number}-{own}")


def _lives(process: int) -> bool:
    """Return whether a process of this machine may still be there."""
    if os.name != "posix":  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True
