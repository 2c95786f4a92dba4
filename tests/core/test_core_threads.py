"""How many threads the core takes: torch's, within what the system grants."""

import os
import subprocess
import sys

import pytest
import torch

from icon_nephi.core import threads


def written(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.mark.parametrize(
    ("text", "processors"),
    [
        ("max 100000", 1024),
        ("50000 100000", 1),
        ("100000 100000", 1),
        ("150000 100000", 2),
        ("400000 100000", 4),
        ("", 1024),
        ("nonsense", 1024),
    ],
)
def test_a_limit_of_the_container(tmp_path, text, processors):
    written(tmp_path, cpu__max=text)
    assert threads.quota("0::/", tmp_path) == processors
    assert threads.quota("", tmp_path) == processors


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert threads.quota("0::/here/and/there\n", tmp_path / "none") == 1024


def test_the_least_of_a_group_and_those_around_it_holds(tmp_path):
    written(tmp_path / "outer" / "inner", cpu__max="max 100000")
    written(tmp_path / "outer", cpu__max="300000 100000")
    assert threads.quota("0::/outer/inner\n", tmp_path) == 3
    written(tmp_path / "outer" / "inner", cpu__max="200000 100000")
    assert threads.quota("0::/outer/inner\n", tmp_path) == 2
    assert threads.quota("0::/other\n", tmp_path) == 1024


def test_control_groups_of_the_first_version(tmp_path):
    group = tmp_path / "cpu,cpuacct" / "job"
    written(group, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    groups = "5:memory:/job\n4:cpu,cpuacct:/job\n"
    assert threads.quota(groups, tmp_path) == 1024
    written(group, cpu__cfs_quota_us="250000", cpu__cfs_period_us="100000")
    assert threads.quota(groups, tmp_path) == 3


def test_torchs_number_is_taken_within_the_grant(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(threads, "_granted", lambda: 3)
        for asked, taken in ((1, 1), (2, 2), (8, 3)):
            torch.set_num_threads(asked)
            assert threads.count() == taken
            with threads.lent():
                assert torch.get_num_threads() == 1
                assert threads.count() == taken
            assert torch.get_num_threads() == asked
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="of Linux")
def test_a_process_bound_to_one_processor_and_omp_num_threads():
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "import torch; torch.set_num_threads(4)\n"
        "from icon_nephi.core import threads; print(threads.count())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
    )
    assert done.stdout.split() == ["1"], done.stderr
