"""The paper's Fig. 4a: Dice against folds over lmbda, on hollow shapes.

    python -m evaluation.paper.regularity_tradeoff [--small] [--out DIR]

Gradient inverse consistency against diffusion, each at several weights. The full run
trains a network for each weight, as the paper does, and looks at unseen pairs; the
small one optimises each pair by itself instead, which takes minutes. Writes
``tradeoff.csv`` (one row for each regulariser and weight) and
``regularity_tradeoff.png``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation.paper import shapes
from icon_nephi.phantoms import triangles_and_circles
from training.judge import judge

LMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
WEIGHTS = {"gradient inverse consistency": LMBDAS, "diffusion": LMBDAS}
SMALL = {"size": 96, "steps": 100, "pairs": 2}
FULL = {"size": 128, "steps": 20_000, "pairs": 500, "count": 10_000, "learned": True}


def main(
    folder: Path,
    size: int = 96,
    steps: int = 100,
    pairs: int = 2,
    weights: dict[str, tuple[float, ...]] = WEIGHTS,
    learned: bool = False,
    count: int = 1000,
    batch: int = 16,
    field: str = "ours",
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """The line that says whether the paper's statement holds here."""
    held = shapes.held_pairs(pairs, size, True, seed if not learned else 2**31)
    images = triangles_and_circles(count if learned else 0, size, True, seed).images
    rows = []
    work = [(term, lmbda) for term in weights for lmbda in weights[term]]
    for term, lmbda in tqdm(work, desc="weights"):
        keywords = {"lmbda": lmbda, "regularity": shapes.TERMS[term]}
        if learned:
            network = shapes.network(size, seed, **keywords)
            run = folder / f"{term.replace(' ', '_')}_{lmbda:g}"
            shapes.learn(
                network, run, images, steps, batch=batch, seed=seed, device=device
            )
            seen = [judge(network.eval(), held)]
        else:
            seen = list(fitted(held, steps, field, seed, device, keywords))
        rows.append(
            {
                "regularizer": term,
                "lmbda": lmbda,
                "dice": shapes.mean(seen, "dice"),
                "folds_percent": 100 * shapes.mean(seen, "folds"),
            }
        )
    shapes.table(folder, "tradeoff", rows)
    how = "trained networks, unseen pairs" if learned else "each pair optimised"
    draw(rows, f"hollow, {size} x {size} pixels, {how}").savefig(
        folder / "regularity_tradeoff.png"
    )
    return judged(rows)


def fitted(
    held: list[Any],
    steps: int,
    field: str,
    seed: int,
    device: str,
    keywords: dict[str, Any],
) -> Iterator[dict[str, float]]:
    """Of each pair, optimised by itself, what `judge` says."""
    for pair in (shapes.on(device, p) for p in held):
        net, groups = shapes.neural(field, seed)
        loss = shapes.loss_of(net.to(device), pair, seed, **keywords)
        shapes.fit(loss, groups, pair, steps, every=steps, blur=True)
        yield judge(loss, [pair])


def judged(rows: list[dict[str, Any]]) -> str:
    """The verdict: folds of each regulariser at the weight where its Dice is best."""
    best, spread = {}, {}
    for term in WEIGHTS:
        chosen = [row for row in rows if row["regularizer"] == term]
        best[term] = max(chosen, key=lambda row: row["dice"])
        folds = [row["folds_percent"] for row in chosen]
        spread[term] = min(folds), max(folds)
    ours, other = WEIGHTS
    words = [
        f"{term}: best Dice {best[term]['dice']:.3f} with "
        f"{best[term]['folds_percent']:.3f} % folds (lmbda {best[term]['lmbda']:g}), "
        f"folds {spread[term][0]:.3f} to {spread[term][1]:.3f} % over lmbda"
        for term in WEIGHTS
    ]
    return shapes.verdict(
        "gradient inverse consistency has the better trade-off, and loosening lmbda "
        "costs less regularity than with diffusion",
        "; ".join(words),
        spread[ours][1] < spread[other][1]
        and (
            best[ours]["dice"] >= best[other]["dice"]
            or best[ours]["folds_percent"] < best[other]["folds_percent"]
        ),
    )


def draw(rows: list[dict[str, Any]], title: str) -> Any:
    """Folds against what is missing of Dice, and each of the two over lmbda."""
    figure = shapes.figure(12, 4)
    panels = figure.subplots(1, 3)
    shapes.axes(panels[0], "one point for each lmbda", "1 - Dice", "folds (%)")
    shapes.axes(panels[1], "accuracy", "lmbda", "1 - Dice")
    shapes.axes(panels[2], "regularity", "lmbda", "folds (%)")
    for panel in (panels[0], panels[2]):
        shapes.folds_axis(panel)
    for panel in panels[1:]:
        panel.set_xscale("log")
    for term, marker in zip(WEIGHTS, "os", strict=True):
        chosen = [row for row in rows if row["regularizer"] == term]
        missing = [1 - row["dice"] for row in chosen]
        folds = [row["folds_percent"] for row in chosen]
        weights = [row["lmbda"] for row in chosen]
        style = {"marker": marker, "label": term, "clip_on": False}
        panels[0].plot(missing, folds, linestyle=":", **style)
        panels[1].plot(weights, missing, **style)
        panels[2].plot(weights, folds, **style)
    panels[0].set_xscale("log")
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    panels[0].set_xticks(ticks, [str(tick) for tick in ticks])
    panels[0].set_xlim(0.01, 0.5)
    panels[0].minorticks_off()
    panels[1].set_ylim(bottom=0)
    panels[1].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


if __name__ == "__main__":
    shapes.command("regularity_tradeoff", __doc__, main, SMALL, FULL)
