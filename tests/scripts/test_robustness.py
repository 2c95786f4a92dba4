"""The harness that perturbs pairs, and the one that kills processes."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from evaluation import geometry, to_index
from evaluation.accuracy import kill_trials, robustness
from evaluation.accuracy.perturbations import PERTURBATIONS
from evaluation.accuracy.robustness import AS_IT_IS, phantom
from icon_nephi.io.atomic import written_whole
from icon_nephi.io.itk_images import array_of

GOOD = dict.fromkeys(robustness.EVIDENCE, 0.0) | {"alike": 0.9, "alike_start": 0.8}


@pytest.fixture(scope="module", params=[2, 3])
def pair(request):
    return phantom(request.param, 0)


def brightness(image, points):
    """Values at the voxels nearest to points."""
    index = np.rint(to_index(image, points)).astype(int)[:, ::-1]
    size = np.array(array_of(image).shape)
    inside = ((index >= 0) & (index < size)).all(1)
    return array_of(image)[tuple(index[inside].T)], inside


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_landmarks_stay_on_what_they_mark(pair, name):
    make = PERTURBATIONS[name]
    change = make(pair, np.random.default_rng(1))
    again = make(pair, np.random.default_rng(1))
    assert np.array_equal(array_of(change.pair.moving), array_of(again.pair.moving))
    before, _ = brightness(pair.moving, pair.moving_points)
    after, inside = brightness(change.pair.moving, change.pair.moving_points)
    assert inside.mean() > 0.6
    if name in ("shifted", "turned", "cropped", "empty"):
        assert np.array_equal(after, before[inside])
    if name.startswith("inverted"):
        assert np.corrcoef(after, before)[0, 1] == pytest.approx(-1)
    if name in ("noisy", "biased"):
        assert np.corrcoef(after, before)[0, 1] > 0.5
    assert array_of(pair.moving) is not array_of(change.pair.moving)


def test_thick_slices_cover_what_thin_ones_did(pair):
    change = PERTURBATIONS["thick"](pair, np.random.default_rng(0))
    thin, thick = geometry(pair.moving), geometry(change.pair.moving)
    ratio = np.diag(thick[1]) / np.diag(thin[1])
    assert sorted(ratio)[-1] == pytest.approx(6)
    first = to_index(pair.moving, thick[0][None])[0]
    assert sorted(first)[-1] == pytest.approx(2.5)


def row(name, tre, **change):
    kept = {"pair": "p", "seed": 0, "perturbation": name, "tre_mm": tre}
    kept |= {"base_tre_mm": 1.0, "dice": "", "base_dice": "", "voxel_mm": 3.0}
    return {**kept, "error": "", **GOOD, **change}


def test_the_table_counts_failures_and_what_was_told_of_them():
    rows = [
        row("shifted", 1.5),
        row("turned", 2.5),  # failed, but less than a voxel off: not lost
        row("noisy", 9.0, outside=0.9),
        row("empty", 1.0, outside=0.9),
        row("metal", 1.0, dice=0.8, base_dice=0.9),
        row("thick", "", error="refused"),
    ]
    told = {
        "failed": [robustness.failed(r) for r in rows],
        "lost": [robustness.lost(r) for r in rows],
        "warned": [robustness.warned(r) for r in rows],
    }
    assert told == {
        "failed": [False, True, True, False, True, True],
        "lost": [False, False, True, False, False, True],
        "warned": [False, False, True, True, False, True],
    }
    text = robustness.summary(rows)
    assert "failed: 4 of 6 runs; warned of 2 of them (recall 50.0 %)" in text
    assert "precision 66.7 %, false alarms 50.0 %" in text


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    ran = []

    class Result:
        def save(self, path):
            path.write_text("here")

    def run(name, pair, seed, base, args):
        ran.append((pair.name, seed, name))
        made = row(name, 1.0) | {"pair": pair.name, "seed": seed, "cpu_s": 1.0}
        return {k: v for k, v in made.items() if v != ""}, Result()

    monkeypatch.setattr(robustness, "run", run)
    monkeypatch.setattr("icon_nephi.load", lambda path: path.read_text())
    monkeypatch.setattr(
        robustness, "phantom", lambda d, n: SimpleNamespace(name=f"thorax{d}d/{n}")
    )
    out = tmp_path / "rows.csv"
    few = ["--flat", "1", "--solid", "1", "--seeds", "2", "--out", str(out)]
    robustness.main([*few, "--perturbations", "noisy"])
    assert len(ran) == 2 * 2 * 2
    robustness.main([*few, "--perturbations", "noisy", "turned"])
    assert {name for _, _, name in ran[8:]} == {"turned"}
    assert len(ran) == 12
    assert len(robustness.read_rows(out)) == 12
    assert {r["perturbation"] for r in robustness.read_rows(out)} == {
        *(AS_IT_IS, "noisy", "turned")
    }
    assert out.with_suffix(".png").exists()
    assert "turned" in capsys.readouterr().out


def whole(path):
    text = path.read_text()
    if text not in ("old" * 1000, "new" * 1000):
        raise ValueError("not whole")
    return text


def carefully(folder):
    time.sleep(0.02)
    with written_whole(folder / "file") as (part,):
        part.write_text("new" * 500)
        time.sleep(0.05)
        part.write_text("new" * 1000)


def carelessly(folder):
    with (folder / "file").open("w") as file:
        for _ in range(1000):
            file.write("new")
            file.flush()
            time.sleep(0.0001)


@pytest.mark.parametrize(("work", "corrupt"), [(carefully, False), (carelessly, True)])
def test_what_is_half_written_is_found(work, corrupt):
    place = kill_trials.Place(
        work,
        ("file",),
        whole,
        before=lambda folder: (folder / "file").write_text("old" * 1000),
    )
    rows = kill_trials.trials("test", place, 6, np.random.default_rng(0))
    assert all(row["resumed"] for row in rows)
    assert any(row["interrupted"] for row in rows)
    assert any(row["corrupt"] for row in rows) == corrupt


@pytest.mark.slow
def test_nothing_is_corrupt_after_a_kill(capsys):
    assert kill_trials.main(["--trials", "2", "--places", "writing", "warp"]) == 0
