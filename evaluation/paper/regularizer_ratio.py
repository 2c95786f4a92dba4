"""The paper's Fig. 2: the regulariser on ever fewer points, one pair at a time.

    python -m evaluation.paper.regularizer_ratio [--small] [--out DIR]

Each fit evaluates gradient inverse consistency on 1/4^n of the image's pixels, down to
16 points, with everything else as it was. Writes ``curves.csv`` (each pair, ratio and
step), ``ratios.csv`` (means at the end, and memory) and ``regularizer_ratio.png``.

Differs from the paper: in the full run several pairs; a smaller field with quadratic
codes unless ``field="paper"``; and no chunks that are recomputed in the backward pass,
so that memory is that of the points, in torch: the compiled core keeps nothing of one.
"""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation.paper import shapes
from icon_nephi import Points

FEWEST = 16
SMALL = {"size": 128, "steps": 100, "pairs": 1}
FULL = {"size": 512, "steps": 300, "pairs": 5}
# What counts as no change: less Dice than the full image, percent of pixels folded.
LESS_DICE, MORE_FOLDS = 0.01, 0.01


def main(folder: Path, **numbers: Any) -> str:
    """Return whether the paper's statement holds; the numbers are `shapes.Fits`'."""
    fits = shapes.Fits(**numbers)
    counts = shapes.counts_of_points(FEWEST, fits.size)
    rows: list[dict[str, Any]] = []
    memory = {}
    for count in tqdm(counts[::-1], desc="ratios"):
        for number, pair in enumerate(fits.held()):
            loss, groups = fits.loss(pair, regularity_sampler=Points(count))
            loss.regis_net.chunk_size = 3 * max(counts)
            memory[count] = shapes.step_memory(loss, pair.image_A, pair.image_B)
            looks = fits.fit(loss, groups, pair)
            rows += [{"points": count, "pair": number, **row} for row in looks]
    end = shapes.last(rows)
    ratios = [
        {
            "points": count,
            "ratio_percent": 100 * count / fits.size**2,
            "dice": shapes.mean(end, "dice", points=count),
            "folds_percent": shapes.mean(end, "folds_percent", points=count),
            "worst_folds_percent": max(
                row["folds_percent"] for row in rows if row["points"] == count
            ),
            "memory_mib": memory[count],
        }
        for count in counts[::-1]
    ]
    shapes.table(folder, "curves", rows)
    shapes.table(folder, "ratios", ratios)
    draw(rows, ratios, fits.size, fits.device).savefig(folder / "regularizer_ratio.png")
    return judged(ratios)


def judged(ratios: list[dict[str, Any]]) -> str:
    """The verdict on the means at the end of each ratio."""
    whole = ratios[0]
    good = [
        row["points"]
        for row in ratios
        if row["dice"] >= whole["dice"] - LESS_DICE
        and row["folds_percent"] <= whole["folds_percent"] + MORE_FOLDS
    ]
    few = ratios[-1]
    return shapes.verdict(
        "down to about 64 points, accuracy and folds stay as with all pixels, and "
        "memory falls",
        f"unchanged with {min(good)} points or more; Dice {whole['dice']:.3f} with all "
        f"{whole['points']}, {few['dice']:.3f} with {few['points']}; folds "
        f"{whole['folds_percent']:.3f} and {few['folds_percent']:.3f} %; memory of a "
        f"step {whole['memory_mib']:.0f} and {few['memory_mib']:.0f} MiB",
        all(row["points"] in good for row in ratios if row["points"] >= 64)
        and few["memory_mib"] < whole["memory_mib"],
    )


def draw(
    rows: list[dict[str, Any]], ratios: list[dict[str, Any]], size: int, device: str
) -> Any:
    """Accuracy and folds while fitting; at the end, beside the memory of a step."""
    figure = shapes.figure(12, 4)
    panels = figure.subplots(1, 3)
    title = f"{size} x {size} pixels, mean of pairs"
    shapes.axes(panels[0], title, "step", "Dice")
    shapes.curves(panels[0], rows, "dice", "points")
    panels[0].legend(title="regularity points", fontsize=8, title_fontsize=8)
    folded = any(row["folds_percent"] for row in rows)
    title = title if folded else "no folds with any of them: all lines at 0"
    shapes.folds_axis(shapes.axes(panels[1], title, "step", "folds (%)"))
    shapes.curves(panels[1], rows, "folds_percent", "points")
    kept = "peak" if device.startswith("cuda") else "kept for backward"
    panel = shapes.axes(panels[2], f"one step: {kept}", "points", "memory (MiB)")
    points = [row["points"] for row in ratios]
    panel.plot(points, [row["memory_mib"] for row in ratios], "o-")
    panel.set_xscale("log", base=4)
    panel.set_yscale("log")
    panel.minorticks_off()
    panel.set_xticks(points, [str(n) for n in points], rotation=45, fontsize=8)
    return figure


if __name__ == "__main__":
    shapes.command("regularizer_ratio", __doc__, main, SMALL, FULL)
