"""Synthetic pairs show what their motion says; training is a function of the seed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import itk
import pytest
import torch
from safetensors.torch import load_file

import icon_nephi
from icon_nephi.fields.pyramid import PyramidEncoder
from icon_nephi.fit import learned
from icon_nephi.space.frames import identity_map
from icon_nephi.space.images import sample_image
from training import finetune, train_general
from training.synthetic import make_pairs

ROOT = Path(__file__).parents[2]
SMALL = ["--dim", "2", "--device", "cpu", "--size", "64", "--batch", "1"]


def pairs(shape=(48, 32), count=6, seed=0):
    return make_pairs(shape, count, torch.Generator().manual_seed(seed))


def places(u, shape):
    """Where u leads from the voxels: unit box, and whether that is inside."""
    last = torch.tensor([n - 1.0 for n in shape]).view(1, -1, *(1,) * len(shape))
    x = identity_map(shape) + u / last
    return x, ((x >= 0) & (x <= 1)).all(1)


@pytest.mark.parametrize("shape", [(48, 32), (24, 32, 16)])
def test_synthetic_motions_are_each_others_inverse(shape):
    made = pairs(shape, count=3)
    x, inside = places(made.u_AB, shape)
    back = made.u_AB + sample_image(made.u_BA, x)
    # Linear between nodes a few voxels apart; at sliding walls more.
    assert back.norm(dim=1)[inside].mean() < 0.1
    assert made.u_AB.norm(dim=1).mean() > 1


def test_synthetic_images_agree_where_the_motion_leads():
    made = pairs((96, 96))
    x, inside = places(made.u_AB, (96, 96))
    unlike = (made.clean_A - made.clean_B).abs()[:, 0][inside].mean()
    left = (sample_image(made.clean_A, x) - made.clean_B).abs()[:, 0][inside].mean()
    assert left < 0.25 * unlike


def test_synthetic_pairs_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = pairs()
    torch.manual_seed(2)
    for name, value in vars(pairs()).items():
        assert torch.equal(value, getattr(first, name)), name
        assert value.isfinite().all(), name
    assert not torch.equal(pairs(seed=1).image_A, first.image_A)


def trained(folder, *options, monkeypatch):
    monkeypatch.setattr(train_general, "HELD_OUT", 1)
    train_general.main([*SMALL, "--out", str(folder), *map(str, options)])
    return load_file(folder / "general2d.safetensors")


def test_training_resumed_is_training_at_once(tmp_path, monkeypatch):
    once = trained(tmp_path / "once", "--steps", 3, monkeypatch=monkeypatch)
    parts = tmp_path / "parts"
    trained(parts, "--steps", 3, "--stop_at", 1, monkeypatch=monkeypatch)
    twice = trained(parts, "--steps", 3, "--resume", monkeypatch=monkeypatch)
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name
    assert (parts / "general2d.csv").stat().st_size


@pytest.mark.slow
def test_training_goes_on_after_a_kill(tmp_path):
    command = [sys.executable, "-m", "training.train_general", *SMALL]
    command += ["--out", str(tmp_path), "--steps", "400", "--save_every", "0.1"]
    keywords = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **keywords)
    until = time.monotonic() + 100
    while not (tmp_path / "general2d.pt").exists() and time.monotonic() < until:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(tmp_path / "general2d.pt", weights_only=True)["step"]
    command += ["--resume", "--stop_at", str(step + 2)]
    said = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", **keywords
    )
    assert said.returncode == 0, said.stderr
    assert f"step {step}" in said.stdout
    assert torch.load(tmp_path / "general2d.pt", weights_only=True)["step"] == step + 2


def test_own_pairs_are_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(learned, "WEIGHTS", tmp_path)
    source = torch.Generator().manual_seed(0)
    encoder = PyramidEncoder(
        2, widths=(8, 8), hidden=(8, 8), reach=(1, 1), generator=source
    )
    learned.save_encoder(encoder, tmp_path / "general2d.safetensors")
    made = pairs((48, 40), count=2)
    lines = ["moving,fixed"]
    for i in range(2):
        for name, image in (("a", made.image_A), ("b", made.image_B)):
            array = image[i, 0].numpy()
            itk.imwrite(itk.image_from_array(array), str(tmp_path / f"{name}{i}.nii"))
        lines.append(f"a{i}.nii,b{i}.nii")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    losses = finetune.main(
        [
            *("--pairs", str(tmp_path / "pairs.csv"), "--no_affine", "--steps", "2"),
            *("--output", str(tmp_path / "run"), "--device", "cpu"),
        ]
    )
    assert len(losses) == 2
    tuned = learned.general_encoder(2, tmp_path / "run" / "network.safetensors")
    first = learned.general_encoder(2).state_dict()
    assert any(not torch.equal(v, first[k]) for k, v in tuned.state_dict().items())
    A, B = (image[:1] for image in (made.image_A, made.image_B))
    result = icon_nephi.predict(
        A, B, affine=False, weights=tmp_path / "run" / "network.safetensors"
    )
    assert result.fold_fraction() == 0


def test_a_table_without_its_columns_is_refused(tmp_path):
    (tmp_path / "pairs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns moving and fixed"):
        finetune.rows(tmp_path / "pairs.csv")
