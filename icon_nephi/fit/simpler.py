"""Never worse than something simpler: what is kept where a fit lays images on worse.

Judged by `Likeness`, which nothing was fitted to; a sentence says what was left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from icon_nephi.fit.affine import nearest_rigid
from icon_nephi.fit.likeness import Likeness
from icon_nephi.fit.search import identity
from icon_nephi.maps.transforms import Map

#: What a registration may be.
TRANSFORMS = ("rigid", "affine", "deformable")
# By how much something simpler must be better to be kept.
BETTER = 1.02
# By how much the best may be better than what is about as good.
ABOUT = 1.05
# By how much an earlier level must be better to be gone back to.
LOST = 1.05

#: A matrix in the physical frame, and why it is kept.
Simpler = tuple[Tensor, str]


def check_transform(transform: str, *, affine: bool = True) -> None:
    """Refuse what is not in `TRANSFORMS`, and what would be no registration."""
    if transform not in TRANSFORMS:
        raise ValueError(f"transform must be one of {TRANSFORMS}, got {transform!r}")
    if not affine and transform != "deformable":
        raise ValueError(
            f"transform {transform!r} is the affine start alone: leave affine=True"
        )


def headers_or(aligned: Tensor, likeness: Likeness) -> tuple[Tensor, list[str]]:
    """The affine map that was found, or none where the headers do better, and why."""
    none = identity(likeness.images.geometry_B.dimension)
    found, before = (likeness.judge(likeness.start(m)) for m in (aligned, none))
    if before <= BETTER * found:
        return aligned, []
    return none, [
        "the affine map that was found lays the images on each other worse than their "
        f"headers do ({found:.3f}, theirs {before:.3f}, by what it was not found by): "
        "it was left out"
    ]


class Watch:
    """The best of what a network had at first and when each level ended.

    Args:
        network: of maps; its weights are put back where they were better.
        likeness: judges.
    """

    def __init__(self, network: nn.Module, likeness: Likeness) -> None:
        self.network, self.likeness = network, likeness
        self.scores: list[float] = []
        self.best: dict[str, Tensor] = {}
        self.look()

    def look(self) -> None:
        """Judge the network as it is, after one more level."""
        with torch.no_grad():
            maps = self.network(*self.likeness.images.smooth)
        self.scores.append(self.likeness.judge(maps))
        if self.scores[-1] >= max(self.scores):
            state = self.network.state_dict()
            self.best = {name: weight.clone() for name, weight in state.items()}

    def back(self) -> int | None:
        """Go back to the best level if the last is much worse; how many were good."""
        if max(self.scores) <= LOST * self.scores[-1]:
            return None
        self.network.load_state_dict(self.best)
        good = self.scores.index(max(self.scores))
        self.scores = self.scores[: good + 1]
        return good


def simpler(maps: Sequence[Map], start: Tensor, likeness: Likeness) -> Simpler | None:
    """What to keep in place of a deformation, where the start alone is better, and why.

    Then it is the first that is about as good as any of: where the headers put the
    images, the rigid map nearest to the start, the start.
    """
    reached = likeness.judge(maps)
    if likeness.judge(likeness.start(start)) <= BETTER * reached:
        return None
    none = identity(likeness.images.geometry_B.dimension)
    kept = {"their headers do": none}
    if not torch.equal(start, none):
        near = nearest_rigid(start, likeness.images.geometry_B)
        kept["a rigid map does"] = near
        kept["the affine start does"] = start
    scores = {name: likeness.judge(likeness.start(m)) for name, m in kept.items()}
    best = max(scores.values())
    name = next(name for name, score in scores.items() if ABOUT * score >= best)
    return kept[name], (
        f"the deformation lays the images on each other worse than {name} "
        f"({reached:.3f}, there {scores[name]:.3f}, by what it was not fitted to): it "
        "was left out"
    )
