"""The paper's Fig. 4b, c: a free voxel field against a neural one, under one loss.

    python -m evaluation.paper.voxel_vs_neural_optimization [--small] [--out DIR]

Both are optimised for the same pairs of solid shapes, from the identity: the neural
pair as everywhere here, the voxel pair (a displacement at every pixel, one field for
each direction) with Adam at several rates, once on the same random points and once on
as many points as pixels. Writes ``curves.csv`` (each pair, way and step) and
``voxel_vs_neural_optimization.png``.

Differs from the paper: several pairs and several rates; the paper gives none.
"""

from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from evaluation.accuracy.residual_on_voxel import VoxelPair
from evaluation.paper import shapes
from icon_nephi import Points

SMALL = {"size": 64, "steps": 300, "pairs": 2}
FULL = {"size": 256, "steps": 500, "pairs": 5}
RATES = (1e-3, 1e-2)
NEURAL = "neural"
LOSSES = {"similarity_loss": "similarity", "regularity_loss": "regularity"}


def voxels(size: int, rate: float) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A free displacement at every pixel, both directions, and Adam's groups."""
    pair = VoxelPair((size, size))
    return pair, [{"params": list(pair.parameters()), "lr": rate}]


def main(
    folder: Path,
    size: int = 64,
    steps: int = 120,
    pairs: int = 2,
    every: int = 10,
    field: str = "ours",
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """The line that says whether the paper's statement holds here."""
    all_points = {
        "similarity_sampler": Points(size**2),
        "regularity_sampler": Points(size**2),
    }
    ways: list[tuple[str, float, dict[str, Any]]] = [(NEURAL, 0.0, {})]
    for rate in RATES:
        ways += [(f"voxels, rate {rate:g}", rate, {})]
        ways += [(f"voxels, rate {rate:g}, {size**2} points", rate, all_points)]
    rows: list[dict[str, Any]] = []
    work = [(way, number) for way in ways for number in range(pairs)]
    held = shapes.held_pairs(pairs, size, False, seed)
    for (name, rate, samplers), number in tqdm(work, desc="fits"):
        pair = shapes.on(device, held[number])
        net, groups = voxels(size, rate) if rate else shapes.neural(field, seed)
        loss = shapes.loss_of(net.to(device), pair, seed, **samplers)
        found = shapes.fit(loss, groups, pair, steps, every)
        rows += [{"way": name, "pair": number, **row} for row in found]
    shapes.table(folder, "curves", rows)
    draw(rows, size).savefig(folder / "voxel_vs_neural_optimization.png")
    return judged(rows)


def judged(rows: list[dict[str, Any]]) -> str:
    """The verdict at the last step, against the best of the voxel fields."""
    end = shapes.last(rows)
    ways = [w for w in dict.fromkeys(row["way"] for row in end) if w != NEURAL]

    def means(column: str) -> tuple[float, list[float]]:
        """Of the neural pair, and of the voxel fields in the order of their mean."""
        voxel = (shapes.mean(end, column, way=way) for way in ways)
        return shapes.mean(end, column, way=NEURAL), sorted(voxel)

    similarity, regularity = means("similarity_loss"), means("regularity_loss")
    words = [
        f"{label} {ours:.3g} neural, {others[0]:.3g} to {others[-1]:.3g} voxels"
        for label, (ours, others) in (
            ("similarity loss", similarity),
            ("regularity loss", regularity),
            ("Dice", means("dice")),
            ("folds (%)", means("folds_percent")),
        )
    ]
    return shapes.verdict(
        "the voxel field ends at a much poorer similarity, and less regular",
        "; ".join(words),
        similarity[1][0] > 2 * similarity[0] and regularity[1][0] > regularity[0],
    )


def draw(rows: list[dict[str, Any]], size: int) -> Any:
    """Similarity, regularity, Dice and folds while fitting."""
    figure = shapes.figure(14, 4)
    panels = figure.subplots(1, 4)
    title = f"{size} x {size} pixels, mean of pairs"
    columns = {**LOSSES, "dice": "Dice", "folds_percent": "folds (%)"}
    for panel, (column, label) in zip(panels, columns.items(), strict=True):
        shapes.axes(panel, title, "step", label + (" loss" if column in LOSSES else ""))
        if column == "folds_percent":
            shapes.folds_axis(panel)
        elif column in LOSSES:
            panel.set_yscale("log")
        shapes.curves(panel, rows, column, "way")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    return figure


if __name__ == "__main__":
    shapes.command("voxel_vs_neural_optimization", __doc__, main, SMALL, FULL)
