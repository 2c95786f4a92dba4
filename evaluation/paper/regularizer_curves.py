"""The paper's Fig. 6: no regulariser, diffusion, gradient inverse consistency.

    python -m evaluation.paper.regularizer_curves [--small] [--out DIR]

One neural pair is fitted to each pair of triangles and circles, solid and hollow, under
each of the three. Writes ``curves.csv`` (each pair and step) and
``regularizer_curves.png``: Dice and folds while fitting (mean of the pairs), and the
last pair's registered image with the lines of the map.

Differs from the paper: several pairs instead of one of each kind, and outlines are
blurred at first, because without that they do not find each other.
"""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from evaluation.paper import shapes

KINDS = {"solid": False, "hollow": True}
# The published weights, 10 and 1, in our normalisation (see `shapes.LMBDA`).
WEIGHTS = {"gradient inverse consistency": shapes.LMBDA, "diffusion": 1.0, "none": 0.0}
SMALL = {"size": 128, "steps": 140, "pairs": 3}
FULL = {"size": 512, "steps": 400, "pairs": 10}


def main(
    folder: Path,
    size: int = 128,
    steps: int = 120,
    pairs: int = 3,
    every: int = 10,
    field: str = "ours",
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """The line that says whether the paper's statement holds here."""
    rows: list[dict[str, Any]] = []
    images = {}
    work = [(kind, term, n) for kind in KINDS for term in WEIGHTS for n in range(pairs)]
    for kind, term, number in tqdm(work, desc="fits"):
        pair = shapes.held_pairs(pairs, size, KINDS[kind], seed)[number]
        pair = shapes.on(device, pair)
        net, groups = shapes.neural(field, seed)
        loss = shapes.loss_of(
            net.to(device),
            pair,
            seed,
            lmbda=WEIGHTS[term],
            regularity=shapes.TERMS[term],
        )
        found = shapes.fit(loss, groups, pair, steps, every, blur=KINDS[kind])
        rows += [
            {"shapes": kind, "regularizer": term, "pair": number, **row}
            for row in found
        ]
        if number == pairs - 1:
            with torch.no_grad():
                loss(pair.image_A, pair.image_B)
                images[kind, term] = loss.warped_image_A, loss.phi_AB_vectorfield
            images[kind] = pair.image_A, pair.image_B
    shapes.table(folder, "curves", rows)
    draw(rows, images, size).savefig(folder / "regularizer_curves.png")
    return judged(rows)


def judged(rows: list[dict[str, Any]]) -> str:
    """The verdict on all pairs."""
    ours, agrees = [], True
    for kind in KINDS:
        chosen = [row for row in rows if row["shapes"] == kind]
        worst = {
            term: max(r["folds_percent"] for r in chosen if r["regularizer"] == term)
            for term in WEIGHTS
        }
        dice = {
            term: shapes.mean(shapes.last(chosen), "dice", regularizer=term)
            for term in WEIGHTS
        }
        first, second, third = WEIGHTS
        agrees &= worst[first] == 0 < min(worst[second], worst[third])
        agrees &= dice[first] > dice[second]
        ours.append(
            f"{kind}: "
            + ", ".join(
                f"{term} Dice {dice[term]:.3f}, at worst {worst[term]:.2f} % folds"
                for term in WEIGHTS
            )
        )
    return shapes.verdict(
        "only gradient inverse consistency never folds on the way, and it ends with a "
        "higher Dice than diffusion",
        "; ".join(ours),
        agrees,
    )


def draw(rows: list[dict[str, Any]], images: dict[Any, Any], size: int) -> Any:
    """A row for each kind: Dice, folds, the images."""
    figure = shapes.figure(15, 6)
    widths = [1.5, 1.5, 1, 1, 1, 1, 1]
    panels = figure.subplots(2, 7, width_ratios=widths)
    for line, kind in zip(panels, KINDS, strict=True):
        chosen = [row for row in rows if row["shapes"] == kind]
        shapes.axes(line[0], f"{kind}, {size} x {size} pixels", "step", "Dice")
        shapes.curves(line[0], chosen, "dice", "regularizer")
        shapes.axes(line[1], f"{kind}, mean of pairs", "step", "folds (%)")
        shapes.folds_axis(line[1])
        shapes.curves(line[1], chosen, "folds_percent", "regularizer")
        for panel, image, title in zip(
            line[2:], images[kind], ("moving", "fixed"), strict=False
        ):
            panel.imshow(image[0, 0].cpu(), cmap="gray")
            shapes.bare(panel, f"{kind}, {title}")
        for panel, term in zip(line[4:], WEIGHTS, strict=True):
            title = term.replace("gradient ", "gradient\n")
            shapes.show_warp(panel, *images[kind, term], title, lines=21)
    panels[0][0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    shapes.command("regularizer_curves", __doc__, main, SMALL, FULL)
