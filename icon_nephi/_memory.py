"""How much memory a process may take, holds, and has held; what to do without."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

#: What a registration may take where nothing is said.
MEMORY_LIMIT = "4GiB"
# Bytes that fitting a pair on a level takes for each of its voxels, and in any case.
_WORKING_BYTES, _RESERVE, _LEAST = 120, 300 * 2**20, 64 * 2**20
# What torch (CPU, CUDA, cuBLAS, Metal), NumPy and ITK say when there is none.
_NONE_LEFT = re.compile(
    "out of memory|(can't|unable to|failed to) allocate|not enough memory|alloc_failed",
    re.IGNORECASE,
)
_ASKED = re.compile(r"allocate ([\d.]+ ?(?:[KMGT]i?B|bytes))", re.IGNORECASE)

_Result = TypeVar("_Result")


def to_bytes(limit: int | str) -> int:
    """Return the bytes of a number or of a text such as "4GiB", "500 MB", "2G".

    Raises:
        ValueError: another text, or not positive.
    """
    text = str(limit).strip().upper()
    match = re.fullmatch(r"(\d+\.?\d*)\s*([KMGT]?)(I?)(B?)", text)
    result = 0
    if match:
        base = 1000 if match[4] and not match[3] else 1024
        result = int(float(match[1]) * base ** " KMGT".index(match[2] or " "))
    if result <= 0:
        raise ValueError(
            f"memory_limit must be bytes or a text such as '4GiB', got {limit!r}"
        )
    return result


def plan(limit: int, voxels: int) -> tuple[int, int]:
    """Return voxels of the working level of each image, and bytes for its chunks.

    Args:
        limit: bytes that the whole process may take.
        voxels: enough for a working level.

    Raises:
        ValueError: less than what is needed besides.
    """
    spare = limit - held_memory() - _RESERVE
    if spare < _LEAST:
        least = (limit - spare + _LEAST) / 2**20
        raise ValueError(
            f"memory_limit is {limit / 2**20:.0f} MiB, but with what the process holds "
            f"already at least {least:.0f} MiB are needed; raise it, or free arrays"
        )
    return min(voxels, spare // 2 // _WORKING_BYTES), spare // 5


def machine_memory() -> float:
    """Return the bytes of memory of this machine; infinity where it does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def held_memory() -> int:
    """Return the bytes of memory this process holds now, 0 where nobody says."""
    return _status("VmRSS")


def peak_memory() -> int:
    """Return the most bytes of memory this process has held, 0 where nobody says."""
    return _status("VmHWM")


def _status(name: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with the memory of the parent process
        return int(status.read_text().split(f"{name}:")[1].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Shortage(MemoryError):
    """Memory ran out; the message is a sentence for who asked."""


def ran_out(error: Exception) -> bool:
    """Return whether an error says that memory ran out, the machine's or a GPU's."""
    said = isinstance(error, RuntimeError) and _NONE_LEFT.search(str(error))
    return isinstance(error, MemoryError) or bool(said)


def shortage(error: Exception, doing: str = "this") -> Shortage:
    """Return what to raise in place of an error of which `ran_out` is true."""
    if isinstance(error, Shortage):
        return error
    asked = _ASKED.search(str(error))
    amount = ""
    if asked:
        number, unit = re.split(r"(?<=[\d.]) ?(?=[A-Za-z])", asked[1])
        if unit.lower() == "bytes":
            number, unit = f"{float(number) / 2**20:.0f}", "MiB"
        amount = f"{number} {unit} more were asked for, and "
    return Shortage(
        f"not enough memory for {doing}: {amount}the process holds "
        f"{held_memory() / 2**20:.0f} MiB; take smaller images or fewer points, end "
        "what else needs memory, or hand over images on disk with a memory_limit"
    )


@contextmanager
def memory_for(doing: str) -> Iterator[None]:
    """Turn errors within, of which `ran_out` is true, into a `Shortage`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise shortage(error, doing) from error


def in_smaller_parts(
    work: Callable[[int], _Result], size: int, least: int, doing: str
) -> _Result:
    """Return what ``work(size)`` does; while memory runs out, of half the size.

    Args:
        work: may be called again after an error.
        size: of the parts it does at once.
        least: the smallest size that is tried.
        doing: what it does, for the message.

    Raises:
        Shortage: the smallest size was too large.
    """
    while True:
        try:
            return work(size)
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            if size // 2 < least:
                raise shortage(error, doing) from error
        # Not within `except`, where the error holds what was allocated.
        size //= 2
