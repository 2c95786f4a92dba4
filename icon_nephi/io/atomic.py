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


@contextmanager
def written_whole(*paths: str | os.PathLike[str]) -> Iterator[list[Path]]:
    """Give paths to write to, in the same folders; in the end they replace the real.

    After an error nothing is left and earlier files are as they were; whenever the
    process or the machine stops, each path holds its old or its new file, whole. The
    ending stays the same, because ITK chooses the format by it.
    """
    wanted = [Path(path) for path in paths]
    parts = [part_of(path, i) for i, path in enumerate(wanted)]
    try:
        yield parts
        for part in parts:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
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


def part_of(path: Path, number: int = 0, kind: str = "part") -> Path:
    """Return a name beside a path, of this process; remove those of dead processes.

    Args:
        path: what is to be written.
        number: of this process's parts.
        kind: ``"part"``, or ``"old"``: what a path held before, which may be all there
            is of it.
    """
    name = re.compile(rf"\.(part|old)-{_HOST}-(\d+)-\d+-{re.escape(path.name)}")
    with suppress(OSError):  # the folder is missing, or the file another user's
        for left in path.parent.iterdir():
            match = name.fullmatch(left.name)
            if match is None or _lives(int(match[2])):
                continue
            if match[1] == "part" or path.exists():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f".{kind}-{_HOST}-{os.getpid()}-{number}-{path.name}")


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
