"""The paper's Fig. 3: the regulariser on ever fewer points, for a trained network.

    python -m evaluation.paper.learned_ratio [--small] [--out DIR]

An encoder with neural fields is trained on solid triangles and circles for each number
of regularity points, and ICON's voxel network beside them, all on the same pairs in
the same order. Writes ``curves.csv`` (what unseen pairs gave while training),
``networks.csv`` (the end, and the memory of a step) and ``learned_ratio.png``.

Differs from the paper: `icon_nephi.make_network`'s encoder and small sine field, and
in the small run far shorter trainings on small images.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from evaluation.paper import shapes
from icon_nephi.phantoms import triangles_and_circles
from training import networks

FEWEST = 16
VOXEL = "voxel network"
SMALL = {"size": 32, "steps": 240, "every": 40, "count": 1000, "held": 50}
FULL = {"size": 128, "steps": 20_000, "every": 1000, "count": 20_000, "held": 1000}
UNSEEN = 2**31  # a seed that training does not use
# What counts as none of the voxel network's (percent), and as no change of Dice.
NO_FOLDS, LESS_DICE = 0.01, 0.01


def main(
    folder: Path,
    size: int = 32,
    steps: int = 240,
    every: int = 40,
    count: int = 1000,
    held: int = 50,
    batch: int = 16,
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """The line that says whether the paper's statement holds here."""
    images = triangles_and_circles(count, size, seed=seed).images
    pairs = shapes.held_pairs(held, size, False, UNSEEN)
    counts = shapes.counts_of_points(FEWEST, size)
    ways: list[Any] = [VOXEL, *counts[::-1]]
    rows: list[dict[str, Any]] = []
    ends = []
    for way in tqdm(ways, desc="networks"):
        made = build(way, size, seed).to(device)
        # ICON's voxel network makes batches of one size only; so does this step.
        first = [images[i * batch : (i + 1) * batch].to(device) for i in range(2)]
        memory = shapes.step_memory(made, *first)
        how = {"every": every, "batch": batch, "seed": seed, "device": device}
        run = folder / str(way).replace(" ", "_")
        looks = shapes.learn(made, run, images, steps, held=pairs, **how)
        rows += [{"network": way, **row} for row in looks]
        ends.append({"network": way, **looks[-1], "memory_mib": memory})
    shapes.table(folder, "curves", rows)
    shapes.table(folder, "networks", ends)
    draw(rows, ends, size).savefig(folder / "learned_ratio.png")
    return judged(ends)


def build(way: str | int, size: int, seed: int) -> nn.Module:
    """ICON's voxel network, or ours with that many regularity points."""
    if way != VOXEL:
        return shapes.network(size, seed, points=int(way))
    torch.manual_seed(seed)
    return networks.voxel_network([1, 1, size, size], "ncc")


def judged(ends: list[dict[str, Any]]) -> str:
    """The verdict on unseen pairs at the end."""
    voxel, most, *_ = ends
    ours = [row for row in ends if row["network"] != VOXEL]
    few = ours[-1]
    words = ", ".join(
        f"{row['dice']:.3f} / {row['folds_percent']:.4f} % / "
        f"{row['memory_mib']:.0f} MiB ({row['network']})"
        for row in ends
    )
    return shapes.verdict(
        "no folds on unseen pairs, neither with voxels nor with any number of "
        "regularity points, which does not change Dice; less memory than voxels",
        f"Dice / folds / memory of a step: {words}",
        max(row["folds_percent"] for row in ours) == 0
        and voxel["folds_percent"] < NO_FOLDS
        and few["dice"] > most["dice"] - LESS_DICE
        and few["memory_mib"] < voxel["memory_mib"],
    )


def draw(rows: list[dict[str, Any]], ends: list[dict[str, Any]], size: int) -> Any:
    """Dice and folds of unseen pairs while training, and memory."""
    figure = shapes.figure(12, 4)
    panels = figure.subplots(1, 3)
    title = f"{size} x {size} pixels, unseen pairs"
    shapes.axes(panels[0], title, "step", "Dice")
    shapes.curves(panels[0], rows, "dice", "network")
    panels[0].legend(title="regularity points", fontsize=8, title_fontsize=8)
    shapes.folds_axis(shapes.axes(panels[1], title, "step", "folds (%)"))
    shapes.curves(panels[1], rows, "folds_percent", "network")
    panel = shapes.axes(panels[2], "one training step", "", "memory (MiB)")
    names = [str(row["network"]).replace(" ", "\n") for row in ends]
    colors = [f"C{i}" for i in range(len(ends))]
    panel.bar(names, [row["memory_mib"] for row in ends], color=colors)
    panel.tick_params(axis="x", labelsize=8)
    return figure


if __name__ == "__main__":
    shapes.command("learned_ratio", __doc__, main, SMALL, FULL)
