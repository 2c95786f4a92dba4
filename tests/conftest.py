"""What every test shares: precisions, seeds, threads, the order, who is skipped."""

import os
import random
from dataclasses import dataclass

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


@dataclass(frozen=True)
class Precision:
    """A floating point type and how far two ways to the same number may differ."""

    dtype: torch.dtype
    rtol: float
    atol: float

    def close(self, actual, expected):
        torch.testing.assert_close(actual, expected, rtol=self.rtol, atol=self.atol)


SINGLE = Precision(torch.float32, rtol=2e-4, atol=2e-5)
DOUBLE = Precision(torch.float64, rtol=1e-9, atol=1e-11)


@pytest.fixture(params=[SINGLE, DOUBLE], ids=["float32", "float64"])
def precision(request):
    return request.param


@pytest.fixture(params=[2, 3], ids=["2d", "3d"])
def dimension(request):
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the commands are tried in, see `make_folder`."""
    from tests.commands.command_files import (
        make_folder,  # imports itk, which few tests need
    )

    return make_folder(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def scans():
    """itk, a moving and a fixed image, see `make_scans`."""
    from tests.icon_scans import make_scans

    return make_scans()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--shuffle", metavar="SEED", help="run the tests in another order")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Shuffle the files, and the tests inside each; the same in every worker."""
    seed = config.getoption("--shuffle")
    if seed is not None:
        draw = random.Random(seed).random
        files = {path: draw() for path in sorted({item.path for item in items})}
        place = {item: (files[item.path], draw()) for item in items}
        items.sort(key=place.get)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("data") and not os.environ.get("NEPHI_DATA"):
        pytest.skip("needs real image pairs: set NEPHI_DATA to their folder")
