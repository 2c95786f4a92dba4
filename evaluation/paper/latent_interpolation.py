"""The paper's Fig. 5: maps between two pairs, by interpolating their codes.

    python -m evaluation.paper.latent_interpolation [--small] [--out DIR]

(a) codes from a table, learned beside two fields, one a pair of solid shapes;
(b) codes that an encoder predicts, trained on hollow shapes. The codes of two training
pairs are interpolated on a 5 x 5 grid, the local part z_l from left to right, the
global part z_g from bottom to top. Writes ``interpolation.csv`` (a row for each map)
and ``latent_interpolation_table.png``, ``latent_interpolation_encoder.png``.

Differs from the paper: (a) was shown on lungs whose data are not public; here shapes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from evaluation.paper import shapes
from icon_nephi import LatentCode, LatentMLP, NePhi
from icon_nephi.maps.jacobians import determinants, fold_fraction
from icon_nephi.phantoms import Shapes, triangles_and_circles
from icon_nephi.report.metrics import dice
from icon_nephi.space.frames import identity_map
from icon_nephi.space.images import sample_image
from icon_nephi.transforms import NeuralTransform, value_and_jacobian
from training.train_latent_table import CHANNELS, Table

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SMALL = {"size": 48, "count": 48, "steps": (600, 1000), "drawn": 96}
FULL = {"size": 128, "count": 1000, "steps": (20_000, 20_000), "drawn": 256}
WHERE = {"table": "codes from a table", "encoder": "codes from the encoder"}


def between(
    first: LatentCode, second: LatentCode, z_g: float, z_l: float
) -> LatentCode:
    """The code at that share of the way from one to the other, each part its own."""
    local = zip(first.local_codes, second.local_codes, strict=True)
    return replace(
        first,
        global_code=torch.lerp(first.global_code, second.global_code, z_g),
        local_codes=tuple(torch.lerp(a, b, z_l) for a, b in local),
    )


def by_table(
    folder: Path, size: int, count: int, steps: int, seed: int, device: str
) -> tuple[nn.Module, list[LatentCode], float]:
    """The forward field, the codes of the first two pairs of a table, their Dice."""
    drawn = triangles_and_circles(2 * count, size, seed=seed)
    net = Table(count, seed)
    generator = torch.Generator().manual_seed(seed)
    values = net.table.global_codes.shape[1] + sum(CHANNELS)
    fields = [LatentMLP(2, values, generator=generator) for _ in "AB"]
    made = shapes.network(size, seed)
    made.regis_net = NePhi(net, *fields)
    pairs = torch.arange(2 * count).reshape(2, -1).T
    shapes.learn(
        made,
        folder / "table",
        drawn.images,
        steps,
        pairs=pairs,
        seed=seed,
        device=device,
        chosen=lambda rows: setattr(net, "index", rows[:, 0]),
    )
    return codes_of(made.regis_net, drawn, pairs[:2], device)


def by_encoder(
    folder: Path, size: int, count: int, steps: int, seed: int, device: str
) -> tuple[nn.Module, list[LatentCode], float]:
    """The same of an encoder."""
    drawn = triangles_and_circles(2 * count, size, True, seed=seed)
    pairs = torch.arange(2 * count).reshape(2, -1).T
    made = shapes.network(size, seed)
    shapes.learn(
        made,
        folder / "encoder",
        drawn.images,
        steps,
        pairs=pairs,
        seed=seed,
        device=device,
    )
    return codes_of(made.regis_net, drawn, pairs[:2], device)


@torch.no_grad()
def codes_of(
    net: Any, drawn: Shapes, pairs: Tensor, device: str
) -> tuple[nn.Module, list[LatentCode], float]:
    """The forward field, the code of each pair ``[M, 2]``, and their mean Dice."""
    codes, overlaps = [], []
    for moving, fixed in pairs.tolist():
        net.net.index = torch.tensor([moving])
        phi = net(*(drawn.images[[i]].to(device) for i in (moving, fixed)))[0]
        codes.append(phi.code)
        moved = phi(identity_map(drawn.labels.shape[2:], device=device)).cpu()
        warped = sample_image(drawn.labels[[moving]].float(), moved, "nearest")
        overlaps.append(dice(warped.byte(), drawn.labels[[fixed]], [1])[1])
    return net.field_AB, codes, sum(overlaps) / len(overlaps)


def main(
    folder: Path,
    size: int = 48,
    count: int = 48,
    steps: tuple[int, int] = (600, 1000),
    drawn: int = 96,
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """The line that says whether the paper's statement holds here.

    Args:
        folder: to write to.
        size: voxels a side of the images.
        count: training pairs.
        steps: of training the table, and the encoder.
        drawn: points a side of the maps that are looked at.
        seed: of everything.
        device: to train on.
    """
    rows: list[dict[str, Any]] = []
    ways = {"table": by_table, "encoder": by_encoder}
    for (name, make), length in zip(tqdm(ways.items()), steps, strict=True):
        field, codes, overlap = make(folder, size, count, length, seed, device)
        maps, found = interpolated(field, codes, drawn)
        rows += [{"codes": name, **row, "dice_of_pairs": overlap} for row in found]
        picture = draw(maps, found, WHERE[name])
        picture.savefig(folder / f"latent_interpolation_{name}.png")
    shapes.table(folder, "interpolation", rows)
    return judged(rows)


@torch.no_grad()
def interpolated(
    field: nn.Module, codes: list[LatentCode], drawn: int
) -> tuple[list[Tensor], list[dict[str, float]]]:
    """All maps ``[1, 2, n, n]``, their folds, and how far each is from the two pairs'.

    Distances are the root mean square over the grid, in percent of the image's side.
    """
    x = identity_map((drawn, drawn), device=codes[0].global_code.device)

    def at(z_g: float, z_l: float) -> tuple[Tensor, Tensor]:
        return value_and_jacobian(NeuralTransform(field, between(*codes, z_g, z_l)), x)

    def distance(one: Tensor, other: Tensor) -> float:
        return 100 * float((one - other).square().sum(1).mean().sqrt())

    ends = at(0.0, 0.0)[0], at(1.0, 1.0)[0]
    maps, rows = [], []
    for z_g in SHARES:
        for z_l in SHARES:
            phi, jacobian = at(z_g, z_l)
            found = determinants(jacobian)
            maps.append(phi)
            rows.append(
                {
                    "z_g": z_g,
                    "z_l": z_l,
                    "folds_percent": 100 * fold_fraction(found),
                    "least_determinant": float(found.min()),
                    "distance_to_first": distance(phi, ends[0]),
                    "distance_to_second": distance(phi, ends[1]),
                }
            )
    return maps, rows


def judged(rows: list[dict[str, Any]]) -> str:
    """The verdict on the folds of all maps, and on what each part of the code moves."""
    words = []
    for name, title in WHERE.items():
        chosen = [row for row in rows if row["codes"] == name]
        folds = shapes.mean(chosen, "folds_percent")
        apart, by_g, by_l = (
            shapes.mean(chosen, "distance_to_first", z_g=g, z_l=local)
            for g, local in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0))
        )
        words.append(
            f"{title}: mean folds {folds:.4f} %, the two maps {apart:.1f} % of the "
            f"side apart, z_g alone moves {by_g:.1f}, z_l alone {by_l:.1f}, Dice of "
            f"the two pairs {chosen[0]['dice_of_pairs']:.3f}"
        )
    return shapes.verdict(
        "interpolated codes give smooth maps without folds, from one pair to the other",
        "; ".join(words),
        all(row["folds_percent"] == 0 for row in rows),
    )


def draw(maps: list[Tensor], rows: list[dict[str, float]], title: str) -> Any:
    """5 x 5 maps as bent lines; the first pair bottom left, the second top right."""
    figure = shapes.figure(9, 9.6)
    panels = figure.subplots(len(SHARES), len(SHARES))
    levels = torch.linspace(0, 1, 17).tolist()
    for i, (phi, row) in enumerate(zip(maps, rows, strict=True)):
        line, column = divmod(i, len(SHARES))
        panel = panels[len(SHARES) - 1 - line][column]
        for part, color in zip(phi[0].cpu(), ("tab:blue", "tab:orange"), strict=True):
            panel.contour(part, levels, colors=color, linewidths=0.7)
        panel.invert_yaxis()
        shapes.bare(panel, f"folds {row['folds_percent']:.2f} %")
        if line == 0:
            panel.set_xlabel(f"z_l: {row['z_l']:g}")
        if column == 0:
            panel.set_ylabel(f"z_g: {row['z_g']:g}")
    figure.suptitle(f"{title}: bottom left the first pair, top right the second")
    return figure


if __name__ == "__main__":
    shapes.command("latent_interpolation", __doc__, main, SMALL, FULL)
