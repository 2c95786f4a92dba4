"""Images too large to hold, read at samples: only the chunks around them are in memory.

A `ChunkedImage` is a `Readable`: it stands where the losses take an image
``[1, 1, *grid]``, and is read at ICON-frame coordinates of the whole image, whichever
level it is of.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from icon_nephi.space.frames import Array, Geometry, from_rows, to_rows
from icon_nephi.space.sampling import draw_points

CHUNK = 64  # voxels a side, where a file or an array has no chunks of its own

Box: TypeAlias = tuple[slice, ...]


class ChunkCache:
    """The chunks of one array that were used last, in at most ``limit`` bytes.

    At least one chunk is held, of so many voxels along each axis; ``read`` gives the
    voxels of a box of the array. Reading is safe beside one thread of `ahead`, and what
    it gives does not depend on what is held.
    """

    def __init__(
        self,
        read: Callable[[Box], Array],
        shape: Sequence[int],
        chunk: Sequence[int],
        dtype: npt.DTypeLike,
        limit: int,
    ) -> None:
        self.read, self.shape = read, tuple(shape)
        self.chunk = tuple(min(c, n) for c, n in zip(chunk, shape, strict=True))
        pairs = zip(self.shape, self.chunk, strict=True)
        self.counts = tuple(-(-n // c) for n, c in pairs)
        self._total, self._voxels = math.prod(self.counts), math.prod(self.chunk)
        slots = limit // (self._voxels * np.dtype(dtype).itemsize)
        self.slots = max(1, min(int(slots), self._total))
        # Untouched slots take no memory.
        self._data = np.empty((self.slots, *self.chunk), dtype)
        self._given = False
        self._slot = np.full(self._total, -1, np.int64)  # of a chunk, -1: not held
        self._chunk = np.full(self.slots, -1, np.int64)  # in a slot, -1: free
        self._used = np.zeros(self.slots, np.int64)  # when, in calls
        self._calls, self._lock = 1, threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._reading: Future[None] | None = None

    @classmethod
    def of(cls, array: Array) -> ChunkCache:
        """All of an array in memory, which is not copied, as one chunk."""
        cache = cls(lambda box: array[box], array.shape, array.shape, array.dtype, 0)
        cache._data, cache._given = array[np.newaxis], True
        cache._slot[:] = cache._chunk[:] = 0
        return cache

    @property
    def whole(self) -> bool:
        """Whether every chunk has a place, so that none is ever read twice."""
        return self.slots == self._total

    @property
    def nbytes(self) -> int:
        """Bytes of the places for chunks, filled or not."""
        return int(self._data.nbytes)

    def voxels(self, axes: Sequence[Array]) -> Array:
        """``[2, ..., 2, N]``: voxels at every combination of two indices on each axis.

        The indices are ``[2, N]`` int64 for each axis.
        """
        d, number, place = len(axes), np.zeros((), np.int64), np.zeros((), np.int64)
        for axis, index in enumerate(axes):
            pile, within = np.divmod(index, self.chunk[axis])
            shape = (1,) * axis + (2,) + (1,) * (d - 1 - axis) + (-1,)
            number = number * self.counts[axis] + pile.reshape(shape)
            place = place * self.chunk[axis] + within.reshape(shape)
        met = np.zeros(self._total, bool)
        met[number] = True
        needed = np.flatnonzero(met)
        if len(needed) <= self.slots:
            with self._lock:
                self._hold(needed)
                return self._take(number, place)
        numbers, places = np.broadcast_arrays(number, place)
        result = np.empty(numbers.shape, self._data.dtype)
        for start in range(0, len(needed), self.slots):
            part = needed[start : start + self.slots]
            here = (numbers >= part[0]) & (numbers <= part[-1])
            with self._lock:
                self._hold(part)
                result[here] = self._take(numbers[here], places[here])
        return result

    def box(self, box: Box) -> Array:
        """The voxels of a box, put together from chunks."""
        result = np.empty([b.stop - b.start for b in box], self._data.dtype)
        for piles in product(*self._piles(box)):
            number = int(np.ravel_multi_index(piles, self.counts))
            start = [p * c for p, c in zip(piles, self.chunk, strict=True)]
            first = [max(b.start, s) for b, s in zip(box, start, strict=True)]
            sizes = zip(box, start, self.chunk, self.shape, strict=True)
            last = [min(b.stop, s + c, n) for b, s, c, n in sizes]
            into = _box_from([b.start for b in box], first, last)
            out = _box_from(start, first, last)
            with self._lock:
                self._hold(np.array([number]))
                result[into] = self._data[self._slot[number]][out]
        return result

    def ahead(self, boxes: Sequence[Box]) -> None:
        """Read the chunks of boxes that will be needed soon, in a thread."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "read-ahead")
        if self._reading is not None and not self._reading.done():
            return  # it is behind: what is missing will be read when it is needed
        numbers: set[int] = set()
        for box in boxes:
            piles = np.meshgrid(*self._piles(box), indexing="ij")
            flat = np.ravel_multi_index([p.ravel() for p in piles], self.counts)
            numbers |= set(flat.tolist())
        room = sorted(numbers)[: max(1, self.slots // 4)]
        self._reading = self._thread.submit(self._fetch, room)

    def close(self) -> None:
        """End the thread and let go of what was read."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        if not self._given:
            self._data = np.empty_like(self._data)
            self._slot[:] = self._chunk[:] = -1
            self._used[:] = 0

    def _piles(self, box: Box) -> list[range]:
        return [
            range(max(0, b.start) // c, -(-min(b.stop, n) // c))
            for b, c, n in zip(box, self.chunk, self.shape, strict=True)
        ]

    def _take(self, numbers: Array, places: Array) -> Array:
        at = self._slot[numbers] * self._voxels + places
        return self._data.reshape(-1).take(at)

    def _fetch(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if self._slot[number] < 0:
                values = self._read_chunk(number)
                with self._lock:
                    self._put(number, values)

    def _hold(self, numbers: Array) -> None:
        """All of these chunks are in their slots after this."""
        self._calls += 1
        slots = self._slot[numbers]
        self._used[slots[slots >= 0]] = self._calls
        for number in numbers[slots < 0].tolist():
            self._put(number, self._read_chunk(number))

    def _put(self, number: int, values: Array) -> None:
        slot = int(self._slot[number])
        if slot < 0:
            slot = int(self._used.argmin())
            if self._chunk[slot] >= 0:
                self._slot[self._chunk[slot]] = -1
            self._data[slot][tuple(slice(n) for n in values.shape)] = values
            self._slot[number], self._chunk[slot] = slot, number
        self._used[slot] = self._calls

    def _read_chunk(self, number: int) -> Array:
        piles = np.unravel_index(number, self.counts)
        sizes = zip(map(int, piles), self.chunk, self.shape, strict=True)
        return self.read(tuple(slice(p * c, min(p * c + c, n)) for p, c, n in sizes))


def _box_from(corner: list[int], first: list[int], last: list[int]) -> Box:
    """The box between two ends, counted from a corner."""
    ends = zip(corner, first, last, strict=True)
    return tuple(slice(low - c, high - c) for c, low, high in ends)


@dataclass(frozen=True)
class Level:
    """One grid of an image.

    Attributes:
        geometry: where it lies.
        chunk: voxels that are read together, along each axis.
        dtype: of the voxels.
        read: the voxels of a box.
        array: all voxels, where they are in memory.
    """

    geometry: Geometry
    chunk: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[Box], Array]
    array: Array | None = None

    @staticmethod
    def of(array: Array, geometry: Geometry) -> Level:
        """A level in memory; C-contiguous arrays are not copied."""
        values = np.ascontiguousarray(array)
        chunk = (CHUNK,) * values.ndim
        return Level(geometry, chunk, values.dtype, lambda box: values[box], values)

    @property
    def voxels(self) -> int:
        """How many."""
        return int(np.prod(self.geometry.size, dtype=np.int64))

    def cache(self, limit: int) -> ChunkCache:
        """Its voxels as they are needed; ``limit`` bytes, none where in memory."""
        if self.array is not None:
            return ChunkCache.of(self.array)
        return ChunkCache(self.read, self.geometry.size, self.chunk, self.dtype, limit)


class ChunkedImage:
    """A level of an image, read at points of the image's unit box.

    The unit box begins at ``shift`` and is ``scale`` long, in voxels of the level. What
    the registration sees of a float tensor of voxels are its ``intensities``, on the
    device.

    Attributes:
        shape: ``[1, 1, *grid]`` of the level.
        focus: rows ``[V, d]``: middles of the cells that samples are drawn in, None
            for all of the mask.
        cell: ``[d]``, size of such a cell in the unit box.
    """

    def __init__(
        self,
        cache: ChunkCache,
        scale: Sequence[float],
        shift: Sequence[float],
        intensities: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self.cache, self.intensities = cache, intensities
        self.scale = torch.tensor(scale, dtype=torch.float64)
        self.shift = torch.tensor(shift, dtype=torch.float64)
        self.shape = torch.Size((1, 1, *cache.shape))
        self.device, self.dtype = torch.device(device), torch.float32
        self.focus: Tensor | None = None
        self.cell = torch.zeros(len(cache.shape))

    @classmethod
    def of(cls, values: Tensor) -> ChunkedImage:
        """An image ``[1, 1, *grid]`` in memory, all of it one chunk."""
        array = np.ascontiguousarray(values[0, 0].cpu().numpy())
        scale, shift = [n - 1.0 for n in array.shape], [0.0] * array.ndim
        return cls(ChunkCache.of(array), scale, shift, lambda v: v, values.device)

    def sample(self, coordinates: Tensor) -> Tensor:
        """Intensities ``[1, 1, *any]`` at ICON-frame coordinates ``[1, d, *any]``.

        Multilinear, outside the level the nearest border value; differentiable by the
        coordinates. As `icon_nephi.space.images.sample_image` of all of the level.
        """
        rows = to_rows(coordinates)
        last = torch.tensor(self.cache.shape).to(rows) - 1
        x = rows[0] * self.scale.to(rows) + self.shift.to(rows)
        x = x.clamp(min=0).minimum(last)
        base = x.detach().floor().minimum(last - 1).clamp(min=0)
        low = base.long().cpu().numpy().T
        high = np.minimum(low + 1, np.array(self.cache.shape)[:, np.newaxis] - 1)
        ends = [np.stack(pair) for pair in zip(low, high, strict=True)]
        values = torch.from_numpy(self.cache.voxels(ends).astype(np.float32)).to(rows)
        values = self.intensities(values)
        for part in (x - base).unbind(1):  # one axis after the other
            values = values[0] + part * (values[1] - values[0])
        return from_rows(values[None, :, None], coordinates)

    def draw(
        self, count: int, mask: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Random rows ``[1, N, d]`` in the cells of ``focus``, else in the mask."""
        if self.focus is None or not len(self.focus):
            kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
            d = len(self.cache.shape)
            return draw_points(count, 1, d, mask=mask, generator=generator, **kind)
        chosen = torch.randint(len(self.focus), (count,), generator=generator)
        jitter = torch.rand(count, len(self.cell), generator=generator) - 0.5
        rows = self.focus[chosen] + jitter * self.cell
        return rows.clamp(0, 1)[None].to(self.device, self.dtype)

    def close(self) -> None:
        """Let go of the chunks and of where samples were drawn."""
        self.cache.close()
        self.focus = None

    def box(self, low: Tensor, high: Tensor, margin: int = 2) -> Box:
        """The voxels around a box of the unit box, both ends ``[d]``."""
        ends = torch.stack([low, high]).double() * self.scale + self.shift
        return tuple(
            slice(
                min(max(0, math.floor(a) - margin), n - 1),
                max(min(n, math.ceil(b) + margin + 1), 1),
            )
            for (a, b), n in zip(ends.T.tolist(), self.cache.shape, strict=True)
        )
