"""Memory of the processor that is used again."""

from __future__ import annotations

import weakref
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_LINE = 64  # bytes of the cache that are read together
_Memory: TypeAlias = npt.NDArray[np.uint8]


class Workspace:
    """Memory that waits for its next use once no tensor refers to it.

    Fresh memory costs a processor more than all the sines: the system hands it out in
    small pages, each faulted in and zeroed.

    Args:
        most: bytes that wait at most.

    Attributes:
        waiting: what waits, by address.
    """

    def __init__(self, most: int = 2**27) -> None:
        self.most = most
        self.waiting: dict[int, _Memory] = {}

    def take(self, count: int, like: Tensor) -> Tensor:
        """``[count]`` numbers, whatever they are, of a tensor's dtype and device.

        Torch itself keeps the memory of other devices than the processor.
        """
        if like.device.type != "cpu":
            return like.new_empty(count)
        size = count * like.element_size()
        waiting = self.waiting.copy().items()
        fits = [(len(m), a) for a, m in waiting if len(m) >= size + _LINE]
        memory = self.waiting.pop(min(fits)[1], None) if fits else None
        if memory is None:  # or another thread was faster
            memory = np.empty(size + _LINE, np.uint8)
        start = -memory.ctypes.data % _LINE
        lent = memory[start : start + size]
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return torch.from_numpy(lent).view(like.dtype)

    def _give_back(self, memory: _Memory) -> None:
        self.waiting[memory.ctypes.data] = memory
        held = self.waiting.copy()
        while sum(map(len, held.values())) > self.most:
            first = next(iter(held))
            del held[first]
            self.waiting.pop(first, None)


#: The one of the process, as torch has one for each GPU: what waits is bounded for all
#: fields together, and the backward field uses what the forward field is done with. It
#: holds no number that anybody reads.
WORKSPACE = Workspace()
