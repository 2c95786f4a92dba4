"""What the paper's experiments on triangles and circles share.

Pairs, fits that are looked at while they run, memory, folders, pictures.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from icon_registration.losses import NCC
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from evaluation import write_csv
from icon_nephi import GradientICONPoints, Points, make_network
from icon_nephi.fit.optimize import Stage, optimize
from icon_nephi.fit.settings import PRESETS, make_pair
from icon_nephi.losses.regularity import (
    diffusion_term,
    inverse_consistency_term,
    no_term,
)
from icon_nephi.phantoms import triangles_and_circles
from training.data import Images, in_memory
from training.judge import Held, judge
from training.loop import Plan, train

OURS = PRESETS["siren"][2]
FIELDS = {
    "ours": OURS,
    # Width 128, 128 frequencies, omega 30, one code grid: the published field.
    "paper": replace(
        OURS, arguments=(), grids=(16,), channels=(32,), field_rate=1e-4, code_rate=1e-3
    ),
}
TERMS: dict[str, Callable[..., Tensor]] = {
    "gradient inverse consistency": inverse_consistency_term,
    "diffusion": diffusion_term,
    "none": no_term,
}
# The published weight, 10, in our normalisation in 2D: there both similarities and the
# d^2 entries of the Jacobian are averaged, here similarities add up and d rows are.
LMBDA = 10.0
SIMILARITY_POINTS = 1000
REGULARITY_POINTS = 128
# Outlines only pull where they overlap: first blurred, in shares of the image's side.
BLURS = (0.3, 0.2, 0.1, 0.04, 0.0)
FITTED = ("step", "dice", "folds_percent", "similarity_loss", "regularity_loss")

# --- pairs and fits -----------------------------------------------------------------


def counts_of_points(fewest: int, size: int) -> list[int]:
    """From the fewest, four times as many each, up to the pixels of an image."""
    counts = [fewest]
    while counts[-1] * 4 <= size**2:
        counts.append(counts[-1] * 4)
    return counts


def held_pairs(count: int, size: int, hollow: bool, seed: int) -> list[Held]:
    """Pairs of shapes with their filled labels."""
    drawn = triangles_and_circles(2 * count, size, hollow, seed=seed)
    sides = [*drawn.images.split(count), *drawn.labels.split(count)]
    return [Held(*(side[[i]] for side in sides)) for i in range(count)]


def neural(field: str, seed: int) -> tuple[nn.Module, list[dict[str, Any]]]:
    """An untrained pair of neural maps with its code, and Adam's parameter groups."""
    settings = FIELDS[field]
    pair = make_pair(settings, (1.0, 1.0), torch.Generator().manual_seed(seed))
    weights = [*pair.field_AB.parameters(), *pair.field_BA.parameters()]
    return pair, [
        {"params": list(pair.net.parameters()), "lr": settings.code_rate},
        {"params": weights, "lr": settings.field_rate},
    ]


def loss_of(network: nn.Module, pair: Held, seed: int, **other: Any) -> Any:
    """The paper's loss of a pair of maps; ``other`` goes to `GradientICONPoints`."""
    keywords: dict[str, Any] = {
        "lmbda": LMBDA,
        "similarity_sampler": Points(SIMILARITY_POINTS),
        "regularity_sampler": Points(REGULARITY_POINTS),
        "generator": torch.Generator().manual_seed(seed),
        **other,
    }
    loss = GradientICONPoints(network, NCC(), **keywords)
    loss.assign_identity_map(list(pair.image_B.shape))
    return loss.to(pair.image_B.device)


@dataclass(frozen=True)
class Fits:
    """Fits of pairs of shapes, one by one, all in the same way."""

    size: int  # pixels a side
    steps: int  # of each fit
    pairs: int
    every: int = 10  # steps between two looks
    field: str = "ours"  # of FIELDS
    seed: int = 0  # of pairs, weights and points
    device: str = "cpu"

    def held(self, hollow: bool = False) -> list[Held]:
        """Return the pairs, their images on the device."""
        return self.placed(held_pairs(self.pairs, self.size, hollow, self.seed))

    def placed(self, pairs: Sequence[Held]) -> list[Held]:
        """Return the same pairs with their images on the device."""
        to = self.device
        return [
            replace(p, image_A=p.image_A.to(to), image_B=p.image_B.to(to))
            for p in pairs
        ]

    def loss(self, pair: Held, made: Any = None, **other: Any) -> tuple[Any, Any]:
        """Return `loss_of` a pair and Adam's groups; ``made`` is as from `neural`."""
        net, groups = made or neural(self.field, self.seed)
        return loss_of(net.to(self.device), pair, self.seed, **other), groups

    def fit(
        self, loss: Any, groups: Any, pair: Held, blur: bool = False
    ) -> list[dict[str, float]]:
        """Optimise a loss; return what it was at every few steps, see ``FITTED``.

        Dice is that of the forward map, folds are the percentage of voxel centres, in
        both maps, where the analytic determinant is not positive.
        """
        looks: list[dict[str, float]] = []

        def look(step: int, result: Any) -> None:
            if step % self.every and step != self.steps:
                return
            with torch.random.fork_rng(devices=[]):
                seen = judge(loss, [pair])
            similarity, regularity = (
                float(part.detach())
                for part in (result.similarity_loss, result.inverse_consistency_loss)
            )
            values = step, seen["dice"], 100 * seen["folds"], similarity, regularity
            looks.append(dict(zip(FITTED, values, strict=True)))

        blurs = BLURS if blur else (0.0,)
        ends = [self.steps * (i + 1) // len(blurs) for i in range(len(blurs))]
        stages = [
            Stage(end - start, loss.similarity_sampler, share * pair.image_B.shape[-1])
            for start, end, share in zip([0, *ends], ends, blurs, strict=False)
        ]
        images = pair.image_A, pair.image_B
        optimize(loss, *images, stages, groups, callback=look).complete()
        return looks


def step_memory(loss: nn.Module, *images: Tensor) -> float:
    """MiB of one training step; on a CPU only what is kept for the backward pass."""
    device = images[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        loss(*images).all_loss.mean().backward()
        loss.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated(device) / 2**20
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The compiled core keeps nothing of a point: this is the memory of torch.
    with mock.patch.dict(os.environ, NEPHI_CORE="torch"):
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss(*images).all_loss.mean()
        value.backward()
    loss.zero_grad(set_to_none=True)
    return sum(kept.values()) / 2**20


# --- learning -----------------------------------------------------------------------


def network(
    size: int,
    seed: int,
    lmbda: float = LMBDA,
    regularity: Callable[..., Tensor] = inverse_consistency_term,
    points: int | None = None,
) -> GradientICONPoints:
    """An untrained encoder with two fields, under the paper's loss alone."""
    made = make_network(
        [1, 1, size, size],
        lmbda=lmbda,
        prior_lmbda=0.01,
        regularity_sampler=None if points is None else Points(points),
        generator=torch.Generator().manual_seed(seed),
    )
    # Without the guard of folds.
    return made.changed(regularity=regularity, extent=None)


def learn(
    made: nn.Module,
    folder: Path,
    images: Tensor,
    steps: int,
    *,
    pairs: Tensor | None = None,
    held: Sequence[Held] = (),
    every: int = 0,
    batch: int = 16,
    rate: float = 3e-3,
    seed: int = 0,
    device: str = "cpu",
    **other: Any,
) -> list[dict[str, float]]:
    """Train on images ``[N, 1, H, W]``; what `judge` said of the held pairs, and when.

    Writes what `training.loop.train` does to the folder; ``other`` goes there too.
    """
    looks: list[dict[str, float]] = []
    folder.mkdir(parents=True, exist_ok=True)

    def validate(live: nn.Module) -> dict[str, float]:
        seen = judge(live, held)
        step = min(steps, (len(looks) + 1) * (every or steps))
        values = step, seen["dice"], 100 * seen["folds"]
        looks.append(dict(zip(FITTED, values, strict=False)))
        return seen

    plan = Plan(steps=steps, batch=batch, rate=rate, seed=seed, validate_every=every)
    data = Images(in_memory(images), len(images), pairs)
    check = validate if held else None
    train(made, data, plan, folder, validate=check, device=device, **other)
    return looks


# --- what is written ----------------------------------------------------------------


def table(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows as CSV; the first one has all columns."""
    write_csv(folder / f"{name}.csv", rows[0], rows)


def mean(rows: list[dict[str, Any]], column: str, **where: Any) -> float:
    """The mean of a column over the rows that have these values."""
    values = [
        float(row[column])
        for row in rows
        if all(row[key] == value for key, value in where.items())
    ]
    return sum(values) / len(values)


def last(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the last step."""
    end = max(row["step"] for row in rows)
    return [row for row in rows if row["step"] == end]


def curves(
    panel: Any, rows: list[dict[str, Any]], column: str, by: str, **style: Any
) -> None:
    """Draw a column over the steps, one line for each value of ``by``: its mean."""
    for i, label in enumerate(dict.fromkeys(row[by] for row in rows)):
        chosen = [row for row in rows if row[by] == label]
        steps = list(dict.fromkeys(row["step"] for row in chosen))
        values = [mean(chosen, column, step=step) for step in steps]
        panel.plot(steps, values, label=str(label), color=f"C{i}", **style)


def figure(width: float, height: float) -> Any:
    """An empty figure, in inches, that is drawn to files only."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=100)


def axes(panel: Any, title: str, x: str, y: str) -> Any:
    """The panel, with words and a faint grid."""
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    return panel


def folds_axis(panel: Any) -> Any:
    """The panel, its y axis logarithmic from 0.001 % on, linear and with 0 below."""
    panel.set_yscale("symlog", linthresh=1e-3, linscale=0.5)
    panel.set_ylim(-1e-4, 100)
    ticks = [0, 1e-3, 1e-2, 1e-1, 1, 10, 100]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    return panel


def bare(panel: Any, title: str) -> Any:
    """The panel without axes, for images."""
    panel.set_title(title, fontsize=9)
    panel.set(xticks=[], yticks=[])
    panel.set_aspect("equal")
    return panel


def show_warp(panel: Any, image: Tensor, phi: Tensor, title: str, lines: int) -> None:
    """Draw an image ``[1, 1, H, W]`` and the lines that phi ``[1, 2, H, W]`` bends."""
    low, high = float(image.min()), float(image.max())
    panel.imshow(image[0, 0].cpu(), cmap="gray", vmin=low, vmax=high)
    levels = torch.linspace(0, 1, lines).tolist()
    for part in phi[0].cpu():
        panel.contour(part, levels, colors="tab:orange", linewidths=0.6)
    bare(panel, title)


def verdict(paper: str, ours: str, agrees: bool) -> str:
    """Print one line: the paper's statement, ours, whether they agree."""
    line = f"paper: {paper} | here: {ours} | {'agrees' if agrees else 'does not agree'}"
    print(line)
    return line


def command(
    name: str,
    description: str,
    main: Callable[..., str],
    small: dict[str, Any],
    full: dict[str, Any],
) -> str:
    """Run a script's ``main(folder, **numbers)`` in a folder that footsteps made."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="minutes on a CPU")
    parser.add_argument("--out", default="evaluation_results", help="folder of runs")
    parser.add_argument("--run_name", default=name, help="of the folder in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda where there is one")
    given = parser.parse_args()
    import footsteps

    footsteps.initialize(run_name=given.run_name, output_root=given.out)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(given.seed)
    numbers = small if given.small else full
    return main(Path(footsteps.output_dir), seed=given.seed, device=device, **numbers)
