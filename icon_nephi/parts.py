"""What maps are made of, however they were put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icon_nephi.transforms import Map, NeuralTransform


def neural_parts(maps: Sequence[Map]) -> list[NeuralTransform]:
    """The neural transforms that maps are made of, each once, in their order.

    Maps show what they close over in ``__closure__``, ours as ICON's functions do.
    """
    parts: list[NeuralTransform] = []
    seen: set[int] = set()
    waiting: list[Any] = list(reversed(maps))
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, NeuralTransform):
            parts.append(item)
            continue
        cells = getattr(item, "__closure__", None) or ()
        inner = [cell.cell_contents for cell in cells]
        waiting += reversed([*item] if isinstance(item, list | tuple) else inner)
    return parts
