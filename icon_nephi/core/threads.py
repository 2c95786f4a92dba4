"""How many threads the core works on: torch's number, within what the system grants.

What the core finds has the same bits on any number of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch

_lent: ContextVar[int | None] = ContextVar("lent", default=None)


def count() -> int:
    """The number of threads that the core may work on."""
    return min(_lent.get() or torch.get_num_threads(), _granted())


@contextmanager
def lent() -> Iterator[None]:
    """Within, torch works on one thread, and the core on as many as torch had.

    Torch's threads wait for each other at every operator, however small: between calls
    of the core that costs more than it gains, and on a busy machine many times more.
    """
    threads = torch.get_num_threads()
    token = _lent.set(count())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _lent.reset(token)


@cache
def _granted() -> int:
    """Processors that this process may keep busy."""
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        groups = ""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1024
    return min(bound, quota(groups))


def quota(groups: str, root: Path = Path("/sys/fs/cgroup")) -> int:
    """The whole processors that control groups leave, a started one for a whole one.

    Args:
        groups: of the process, as in /proc/self/cgroup. A limit of a group holds for
            all within it.
        root: where the groups' files are.

    Returns:
        At least 1; 1024 without a limit.
    """
    least = 1024.0
    for line in ("0::/", *groups.splitlines()):
        _, kinds, path = [*line.split(":", 2), "", ""][:3]
        if kinds and "cpu" not in kinds.split(","):
            continue
        home = root / kinds if kinds else root
        inner = home / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(home):
                least = min(least, _limit(folder))
    return max(1, math.ceil(least))


def _limit(group: Path) -> float:
    """Processors that one group leaves; version 1 says it in two files."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            text = " ".join((group / name).read_text() for name in names)
            most, period = map(int, text.split())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if most > 0 and period > 0:
            return most / period
    return math.inf
