"""Every test here runs on each build of the core that this machine can run."""

import os

import pytest
import torch

from icon_nephi.core import loading


def builds():
    """What to set the variable to; a path that is set already is the only one."""
    given = os.environ.get(loading.VARIABLE, "")
    if given and given != "torch":
        return [given]
    return [b for b in loading.BUILDS if runs(b)]


def runs(build):
    built = loading._built(build) is not None
    return built and loading.runs_here(build)


def pytest_generate_tests(metafunc):
    if "core" in metafunc.fixturenames:
        found = builds() or [pytest.param("", marks=pytest.mark.skip(WHY))]
        names = [b if isinstance(b, str) else "none" for b in found]
        metafunc.parametrize(
            "core", found, ids=map(os.path.basename, names), indirect=True
        )


WHY = "no compiled core: build it with `python setup.py build_ext --inplace`"


@pytest.fixture
def core(request, monkeypatch):
    """The name of the build that runs."""
    monkeypatch.setenv(loading.VARIABLE, request.param)
    return request.param


@pytest.fixture
def threads():
    """Set the number of threads; afterwards there is one again."""
    yield torch.set_num_threads
    torch.set_num_threads(1)
