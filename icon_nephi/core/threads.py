"""How many threads the core works on: torch's number, within what the system grants.

What the core finds has the same bits on any number of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch

_lent: ContextVar[int | None] = ContextVar("lent", default=None)
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


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
    """Whole processors of this process's share of them, where it has one."""
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no such limit, or "max"
        return 1024
