"""Adam, as torch's: the first of torch's own imports its compiler, a second of work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Adam:
    """Adam on groups of weights, each with its ``lr``; the numbers are torch's.

    Args:
        groups: ``{"params": weights, "lr": rate}`` each; the rates may be changed.
        betas: decays of the means of gradients and of their squares.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.betas, self.done = betas, 0
        self.param_groups = [{**g, "params": list(g["params"])} for g in groups]
        self._means: dict[Tensor, tuple[Tensor, Tensor]] = {}

    @property
    def weights(self) -> Sequence[Tensor]:
        """All of them, group by group."""
        return [w for group in self.param_groups for w in group["params"]]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move the weights that have gradients."""
        self.done += 1
        first, second = self.betas
        root = (1 - second**self.done) ** 0.5
        for group in self.param_groups:
            rate = group["lr"] / (1 - first**self.done)
            live = [w for w in group["params"] if w.grad is not None]
            if not live:
                continue
            for w in live:
                if w not in self._means:
                    self._means[w] = torch.zeros_like(w), torch.zeros_like(w)
            slopes = [w.grad for w in live]
            means, squares = map(
                list, zip(*(self._means[w] for w in live), strict=True)
            )
            torch._foreach_lerp_(means, slopes, 1 - first)
            torch._foreach_mul_(squares, second)
            torch._foreach_addcmul_(squares, slopes, slopes, 1 - second)
            scale = torch._foreach_sqrt(squares)
            torch._foreach_div_(scale, root)
            torch._foreach_add_(scale, 1e-8)
            torch._foreach_addcdiv_(live, means, scale, -rate)
