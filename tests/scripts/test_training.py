"""The training loop: it learns, continues after a kill, and is the same on two."""

import csv
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from icon_nephi.models import make_network
from icon_nephi.phantoms import triangles_and_circles
from training import (
    loop,
    train_brain,
    train_hippocampus,
    train_latent_table,
    train_lung,
    train_triangles,
)
from training.data import Images, all_ordered_pairs, augment, box, in_memory

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--device", "cpu", "--size", "16", "--batch", "4", "--count", "12"),
    *("--held", "2", "--validate_every", "0"),
]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(loop, "tqdm", _NoBar)


class _NoBar:
    def __init__(self, **keywords):
        self.lines = []

    def update(self):
        pass

    def set_postfix(self, **values):
        pass

    def write(self, line):
        self.lines.append(line)

    def close(self):
        pass


def triangles(folder, *options):
    return train_triangles.main([*SMALL, "--output", str(folder), *map(str, options)])


def subprocess_of(folder, *options, before=()):
    command = [sys.executable, *before, "-m", "training.train_triangles", *SMALL]
    command += ["--output", str(folder), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def finish(process):
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors


def rows(folder, name="losses.csv"):
    with (folder / name).open(encoding="utf-8") as file:
        return [
            {k: float(v) for k, v in row.items() if k != "seconds"}
            for row in csv.DictReader(file)
        ]


def checkpoint(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    del state["spent"]
    return state


def assert_same(first, second):
    """Nested dicts of tensors, bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def test_training_lowers_the_loss(tmp_path):
    history = triangles(
        tmp_path, "--steps", 40, "--size", 24, "--batch", 8, "--warmup", 5
    )
    losses = [entry["all_loss"] for entry in history]
    assert len(losses) == 40
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert len(rows(tmp_path)) == 40
    (validation,) = rows(tmp_path, "validation.csv")
    assert validation["folds"] == 0
    assert 0 <= validation["dice_min"] <= validation["dice"] <= 1
    weights = torch.load(tmp_path / "network_weights.trch", weights_only=True)
    make_network([1, 1, 24, 24]).regis_net.load_state_dict(weights, strict=True)
    assert not list(tmp_path.glob(".part*"))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--augment", "0.1", "--blur", "3", "--points", "50"],
        ["--method", "voxel"],
        ["--parts", "2"],
        ["--levels", "2"],
    ],
)
def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path, options):
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    options = ["--steps", 7, "--save_every", 4, *options]
    losses = triangles(whole, *options)
    # Stopped at 5: steps after the checkpoint at 4 are lost and done again.
    triangles(first, *options, "--stop_at", 5)
    again = triangles(second, *options, "--resume", first)
    assert again == losses[4:]
    assert_same(checkpoint(second), checkpoint(whole))


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--steps", 50, "--save_every", 3]
    process = subprocess_of(killed, *options)
    path, deadline = killed / "losses.csv", time.monotonic() + 600
    while not (path.exists() and path.read_text("utf-8").count("\n") > 10):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = torch.load(killed / "checkpoint.pt", weights_only=True)["step"]
    assert 9 <= reached < 50
    losses = triangles(whole, *options)
    assert triangles(killed, *options, "--resume", killed) == losses[reached:]
    assert_same(checkpoint(killed), checkpoint(whole))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nephi", "voxel"])
def test_two_processes_train_as_one(tmp_path, method):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--steps", 5, "--parts", 2, "--method", method, "--warmup", 1]
    triangles(one, *options)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    finish(subprocess_of(two, *options, before=torchrun))
    for a, b in zip(rows(one), rows(two), strict=True):
        assert b == pytest.approx(a, rel=2e-3, abs=2e-4)


def test_another_plan_is_not_continued(tmp_path):
    triangles(tmp_path, "--steps", 1)
    for option, value in (("--batch", 2), ("--seed", 3), ("--augment", 0.5)):
        with pytest.raises(ValueError, match=option):
            triangles(
                tmp_path / "next", "--steps", 2, option, value, "--resume", tmp_path
            )
    with pytest.raises(ValueError, match="--steps"):
        triangles(tmp_path / "next")
    with pytest.raises(ValueError, match="3 equal parts"):
        triangles(tmp_path / "next", "--steps", 1, "--parts", 3)


def test_minutes_end_a_run_and_count_training_only(tmp_path):
    history = triangles(tmp_path, "--minutes", 0.01, "--clock", "cpu")
    assert len(history) >= 1
    spent = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["spent"]
    assert 0.6 <= spent < 3


def test_the_rate_rises_then_falls_to_zero():
    plan = loop.Plan(rate=2.0, warmup=10)
    rates = [loop.rate_at(plan, step, step / 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates.index(max(rates)) == 9
    assert rates[-1] == 0


def test_epochs_hold_every_pair_once():
    images = Images(in_memory(torch.zeros(5, 1, 4, 4)), 5, all_ordered_pairs(5))
    found = images.rows(0, 20, seed=1).tolist()
    assert sorted(found) == all_ordered_pairs(5).tolist()
    following = images.rows(20, 20, seed=1).tolist()
    assert following != found
    assert images.rows(13, 10, seed=1).tolist() == (found + following)[13:23]
    any_two = Images(in_memory(torch.zeros(5, 1, 4, 4)), 5).rows(0, 5, seed=0)
    assert sorted(any_two[:, 0].tolist()) == sorted(any_two[:, 1].tolist())
    assert (any_two[:, 0] != any_two[:, 1]).all()


def test_augmented_images_are_like_the_images():
    shapes = triangles_and_circles(4, 32, seed=0)
    masks = shapes.labels.bool()
    batch = (shapes.images[:2], shapes.images[2:], masks[:2], masks[2:])
    generator = torch.Generator().manual_seed(0)
    same = augment(batch, 0.0, generator)
    for image, other in zip(batch, same, strict=True):
        flips = [image, image.flip(2), image.flip(3), image.flip(2, 3)]
        for i in range(2):
            errors = [(f[i].float() - other[i].float()).abs().max() for f in flips]
            assert min(errors) < 1e-4
        assert image.dtype == other.dtype
    moved = augment(batch, 0.1, generator)
    assert ((moved[2] > 0) == (moved[0] > 0)).float().mean() > 0.97


def test_box_cuts_and_pads_around_the_middle():
    image = torch.arange(5.0)[None, :, None].expand(1, 5, 2)
    assert box(image, (3, 4), 0.0)[0, :, 1].tolist() == [1, 2, 3]
    assert box(image, (7, 2), -1.0)[0, :, 0].tolist() == [-1, 0, 1, 2, 3, 4, -1]
    assert box(image, (8, 2))[0, :, 0].tolist() == [0, 0, 1, 2, 3, 4, 4, 4]


def test_icons_trainer_takes_the_network_unchanged(tmp_path, monkeypatch):
    # The real footsteps may be set up only once a process, and asks who we are.
    footsteps = types.SimpleNamespace(output_dir=f"{tmp_path}/")
    monkeypatch.setitem(sys.modules, "footsteps", footsteps)
    from icon_registration.train import train_batchfunction

    shapes = triangles_and_circles(8, 16, seed=0)
    network = make_network([1, 1, 16, 16])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    train_batchfunction(
        network,
        optimizer,
        lambda: (shapes.images[:4], shapes.images[4:]),
        steps=2,
    )
    saved = torch.load(tmp_path / "network_weights_0", weights_only=True)
    make_network([1, 1, 16, 16]).regis_net.load_state_dict(saved, strict=True)


# --- the other scripts, on files made here ------------------------------------------


def write(path, array, spacing):
    import itk

    path.parent.mkdir(parents=True, exist_ok=True)
    image = itk.image_from_array(array.numpy())
    image.SetSpacing([float(spacing)] * 3)
    itk.imwrite(image, str(path))


def common(tmp_path, *options):
    return [
        *("--data", str(tmp_path / "data"), "--output", str(tmp_path / "run")),
        *("--steps", "2", "--batch", "2", "--device", "cpu", *options),
    ]


def test_latent_table(tmp_path):
    history = train_latent_table.main(
        [*SMALL, "--output", str(tmp_path), "--steps", "3", "--fit_steps", "2"]
    )
    assert len(history) == 3
    assert rows(tmp_path, "validation.csv")[0]["dice"] > 0


def test_hippocampus(tmp_path, monkeypatch):
    monkeypatch.setattr(train_hippocampus, "SHAPE", (12, 14, 10))
    for i in range(4):
        image = torch.rand(10 + i, 16, 9)
        write(tmp_path / f"data/images/p{i}.nii.gz", image, 1)
        write(tmp_path / f"data/labels/p{i}.nii.gz", (image > 0.5).byte(), 1)
    options = common(tmp_path, "--held", "2")
    assert len(train_hippocampus.main(options)) == 2
    assert 0 < rows(tmp_path / "run", "validation.csv")[0]["dice"] < 1


def test_lung(tmp_path):
    for patient in range(2):
        for phase in train_lung.PHASES:
            where = tmp_path / "data" / f"patient{patient}"
            image = 900 * torch.rand(20, 20, 20) - 1000
            write(where / f"{phase}.nii.gz", image, 15)
            mask = torch.zeros(20, 20, 20).byte()
            mask[3:-3, 3:-3, 4:-3] = 1
            write(where / f"{phase}_mask.nii.gz", mask, 15)
            if patient == 1:
                # The middle of voxel (5, 6, 7), x y z, in millimetres.
                (where / f"{phase}.csv").write_text("x,y,z\n75,90,105\n", "utf-8")
    options = common(tmp_path, "--side", "14", "--cache", f"{tmp_path}/cache")
    assert len(train_lung.main(options)) == 2
    (validation,) = rows(tmp_path / "run", "validation.csv")
    assert validation["tre"] < 10
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 4
    (point,) = train_lung.landmarks(where, "inspiration", 14)
    expected = ((torch.tensor([7, 6, 5]) + 0.5) * 15 / 25 - 0.5 + 1) / 13
    torch.testing.assert_close(point, expected)


def test_brain(tmp_path):
    for i in range(4):
        image = torch.rand(16, 18, 16)
        write(tmp_path / f"data/images/p{i}.nii.gz", image, 1)
        if i > 0:
            write(tmp_path / f"data/labels/p{i}.nii.gz", (3 * image).byte(), 1)
    options = common(tmp_path, "--held", "2", "--shape", "10", "12", "10")
    assert len(train_brain.main(options)) == 2
    assert 0 < rows(tmp_path / "run", "validation.csv")[0]["dice"] < 1
