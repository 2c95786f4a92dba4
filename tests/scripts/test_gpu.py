"""The script for a GPU, its smallest size on the processor."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from evaluation.speed import bench_step, gpu


@pytest.mark.parametrize("part", ["export", "refine", "steps", "chunks"])
def test_a_part_runs_on_the_processor(part, tmp_path, monkeypatch):
    monkeypatch.setitem(bench_step.STEPS, "nephi IO", 1)
    job = gpu.Job("cpu", 18, tmp_path, smallest=True)
    rows = list(gpu.PARTS[part][0](job))
    assert rows
    assert all(row["what"] for row in rows)
    assert all(row.get("seconds", 1) > 0 for row in rows)
    assert all(
        row.get("peak_mib") is None or part in ("steps", "chunks") for row in rows
    )


def test_a_registration_is_measured_with_its_error(tmp_path):
    job = gpu.Job("cpu", 18, tmp_path, smallest=True)
    assert next(iter(gpu.phantom_part(job)))["quiet"]
    (row,) = gpu.register_part(job)
    assert row["before_mm"] > 5
    assert row["tre_mm"] < 2 * row["before_mm"]
    assert row["steps"] > 0
    assert "core" in row["what"] or "torch" in row["what"]


def test_a_part_that_fails_leaves_the_others(tmp_path, capfd):
    # There is no phantom for the second.
    words = ["--device", "cpu", "--smallest", "--parts", "device", "register"]
    assert gpu.main([*words, "--out", str(tmp_path / "out")]) == 1
    rows = json.loads((tmp_path / "out" / "gpu.json").read_text("utf-8"))
    assert Counter(row["part"] for row in rows) == {"device": 1, "register": 1}
    assert "error" not in rows[0]
    assert "ended with 1" in rows[1]["error"]
    table = (tmp_path / "out" / "gpu.md").read_text("utf-8")
    assert table.startswith(rows[0]["name"])
    assert "| register |" in table
    assert "No such file" in capfd.readouterr().err


def test_a_part_that_takes_too_long_is_stopped(tmp_path):
    job = gpu.Job("cpu", 18, tmp_path, smallest=True)
    (row,) = gpu.run_part("phantom", job, 0.05)
    assert "stopped after" in row["error"]


def test_it_needs_no_itk():
    # Where GPUs are there may be none.
    rooms = (
        "evaluation.speed.gpu, evaluation.speed.bench_step, evaluation.accuracy.voxel"
    )
    code = f"import sys; sys.modules['itk'] = None; import {rooms}"
    subprocess.run([sys.executable, "-c", code], check=True)
