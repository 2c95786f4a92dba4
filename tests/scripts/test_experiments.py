"""Every script of the paper's experiments runs, and writes what it says."""

import csv
import sys
from types import SimpleNamespace

import pytest
import torch

from evaluation.paper import (
    latent_interpolation,
    learned_ratio,
    regularity_tradeoff,
    regularizer_curves,
    regularizer_ratio,
    shapes,
    voxel_vs_neural_optimization,
)

FITTED = list(shapes.FITTED)
TINY = {"size": 24, "steps": 2, "pairs": 1}


def header(path):
    with path.open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len(rows) > 1
    assert all(rows[1])
    return rows[0]


def drawn(folder, *names):
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_ratio_of_the_regulariser(tmp_path):
    line = regularizer_ratio.main(tmp_path, **TINY, every=1)
    assert line.startswith("paper: ")
    assert header(tmp_path / "curves.csv") == ["points", "pair", *FITTED]
    assert header(tmp_path / "ratios.csv") == [
        *("points", "ratio_percent", "dice", "folds_percent"),
        *("worst_folds_percent", "memory_mib"),
    ]
    drawn(tmp_path, "regularizer_ratio")


def test_the_ratio_of_a_trained_network(tmp_path):
    learned_ratio.main(tmp_path, size=24, steps=2, every=1, count=6, held=2, batch=2)
    assert header(tmp_path / "curves.csv") == [
        *("network", "step", "dice", "folds_percent"),
    ]
    assert header(tmp_path / "networks.csv")[-1] == "memory_mib"
    drawn(tmp_path, "learned_ratio")


@pytest.mark.parametrize("learned", [False, True])
def test_the_tradeoff(tmp_path, learned):
    weights = dict.fromkeys(regularity_tradeoff.WEIGHTS, (1.0,))
    regularity_tradeoff.main(
        tmp_path, **TINY, weights=weights, learned=learned, count=4, batch=2
    )
    assert header(tmp_path / "tradeoff.csv") == [
        *("regularizer", "lmbda", "dice", "folds_percent"),
    ]
    drawn(tmp_path, "regularity_tradeoff")


def test_voxels_against_a_neural_field(tmp_path):
    voxel_vs_neural_optimization.main(tmp_path, **TINY, every=1)
    assert header(tmp_path / "curves.csv") == ["way", "pair", *FITTED]
    drawn(tmp_path, "voxel_vs_neural_optimization")


def test_the_interpolation_of_codes(tmp_path):
    latent_interpolation.main(tmp_path, size=24, count=4, steps=(2, 2), drawn=12)
    columns = ["codes", "z_g", "z_l", "folds_percent", "least_determinant"]
    assert header(tmp_path / "interpolation.csv")[:5] == columns
    drawn(tmp_path, "latent_interpolation_table", "latent_interpolation_encoder")


def test_the_curves_of_the_regularisers(tmp_path):
    regularizer_curves.main(tmp_path, **TINY, every=1)
    columns = ["shapes", "regularizer", "pair", *FITTED]
    assert header(tmp_path / "curves.csv") == columns
    drawn(tmp_path, "regularizer_curves")


def test_memory_grows_with_the_points():
    pair = shapes.held_pairs(1, 24, False, 0)[0]
    images = pair.image_A, pair.image_B
    found = []
    for count in (10, 1000):
        loss = shapes.loss_of(
            shapes.neural("ours", 0)[0],
            pair,
            0,
            regularity_sampler=shapes.Points(count),
        )
        found.append(shapes.step_memory(loss, *images))
    assert 0 < 2 * found[0] < found[1]


def test_codes_are_interpolated_part_by_part():
    first, second = (
        latent_interpolation.LatentCode(
            torch.full((1, 2), v), (torch.full((1, 2, 3, 3), v),)
        )
        for v in (0.0, 1.0)
    )
    code = latent_interpolation.between(first, second, 0.25, 0.75)
    assert code.global_code.unique().tolist() == [0.25]
    assert code.local_codes[0].unique().tolist() == [0.75]


@pytest.mark.parametrize("small", [False, True])
def test_the_command_runs_small_or_full_in_its_folder(tmp_path, monkeypatch, small):
    asked = {}
    footsteps = SimpleNamespace(output_dir=str(tmp_path), initialize=asked.update)
    monkeypatch.setitem(sys.modules, "footsteps", footsteps)
    options = ["--out", "runs", "--seed", "3", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["script", *options, *["--small"] * small])

    def main(folder, size, seed, device):
        return f"{folder == tmp_path} {size} {seed} {device}"

    line = shapes.command("name", "words", main, {"size": 1}, {"size": 2})
    assert line == f"True {1 if small else 2} 3 cpu"
    assert asked == {"run_name": "name", "output_root": "runs"}
