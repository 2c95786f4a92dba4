"""Which core runs, and that none does with what it must not be given."""

import ctypes
import sys

import pytest
import torch

from icon_nephi.core import loading, which
from icon_nephi.core import threads as counting
from icon_nephi.fields.compiled import Plan
from icon_nephi.losses import compiled as blocks
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.space.sampling import Patches
from tests.core.core_problems import make_code, make_field, rows


def test_the_core_that_runs_is_named(core):
    assert which() == core


def test_torch_is_forced(monkeypatch):
    monkeypatch.setenv(loading.VARIABLE, "torch")
    assert which() == "torch"
    assert loading.library() is None


def test_what_is_not_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(loading.VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(loading.CoreError, match=r"no such library.*baseline"):
        loading.library()
    monkeypatch.setattr(loading, "_built", lambda build: None)
    loading._chosen.cache_clear()
    monkeypatch.setenv(loading.VARIABLE, "baseline")
    with pytest.raises(loading.CoreError, match="C\\+\\+ compiler"):
        loading.library()
    monkeypatch.setenv(loading.VARIABLE, "")
    assert loading.library() is None  # nothing built: torch
    loading._chosen.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="a library of the system's")
def test_another_library_is_refused(monkeypatch):
    path = next((p for p in ("/lib/x86_64-linux-gnu/libm.so.6",)), None)
    monkeypatch.setenv(loading.VARIABLE, path)
    with pytest.raises(loading.CoreError, match=r"version|no such"):
        loading.library()


def plan():
    field, code = make_field("small", 3, 11, 1, 8), make_code(3, (8,), 3, "quadratic")
    return Plan.of(field, code, 3)


WRONG_FIELDS = [
    ("bytes", 8),
    ("kind", 2),
    ("kind", -1),
    ("dimension", 1),
    ("dimension", 4),
    ("support", 0),
    ("support", 4),
    ("grids", -1),
    ("grids", 2**40),
    ("nodes", None),
    ("stored", None),
    ("tables", None),
    ("shared", -1),
    ("shared", 2**40),
    ("shared_code", None),
    ("width", 0),
    ("width", 2**40),
    ("layers", 0),
    ("layers", 2**40),
    ("weights", None),
]


@pytest.mark.parametrize(("name", "value"), WRONG_FIELDS)
def test_a_wrong_field_is_refused(core, name, value):
    made = plan()
    setattr(made.raw, name, value)
    with pytest.raises(loading.CoreError):
        made.forward(True, rows(5, 3)[0])
    with pytest.raises(loading.CoreError):
        made.backward(False, rows(5, 3)[0], torch.zeros(5, 3))


@pytest.mark.parametrize("nodes", [0, 2, -5, 2**20, 2**62])
def test_grids_too_small_or_too_large_are_refused(core, nodes):
    made = plan()
    made._kept[0][:] = [nodes] * 3
    with pytest.raises(loading.CoreError, match="size"):
        made.forward(False, rows(5, 3)[0])


@pytest.mark.parametrize("stored", [0, 3, -4, 2**50])
def test_tables_of_wrong_channels_are_refused(core, stored):
    made = plan()
    made._kept[1][0] = stored
    with pytest.raises(loading.CoreError, match="size"):
        made.forward(False, rows(5, 3)[0])


def raw_blocks():
    patches, image = Patches(4, 3, 1.0, corners=True), torch.rand(1, 1, 9, 8, 7)
    measure = blocks.Measure(PatchNCC(), 0, 1, None)
    channels = blocks.Channels(image, measure)
    layout, kept = blocks.Layout(patches, image.shape[2:]), []
    centres, post = torch.rand(4, 3), torch.eye(3, 4)
    kept += [channels, layout, centres, post]
    raw = loading.Blocks(
        *(ctypes.sizeof(loading.Blocks), 3, 4, 27, 8, 1, 0, 0, 32, 0),
        *(t.data_ptr() for t in (centres, layout.offsets, layout.corners)),
        *(layout.shares.data_ptr(), post.data_ptr(), channels.raw(), channels.raw()),
        *(1e-3, 0.0),
    )
    return raw, kept


def call_compare(raw):
    at, sums = torch.rand(32, 3), (ctypes.c_double * 2)()
    moves, out = torch.zeros(32, 3), torch.empty(32, 3)
    pointers = at.data_ptr(), moves.data_ptr()
    loading.call("nephi_compare", ctypes.byref(raw), *pointers, 1, sums, out.data_ptr())
    return sums[0]


WRONG_BLOCKS = [
    ("bytes", 8),
    ("dimension", 4),
    ("count", -1),
    ("count", 2**60),
    ("samples", 0),
    ("samples", 2**40),
    ("places", 0),
    ("places", 28),
    ("channels", -1),
    ("features", 3),
    ("centres", None),
    ("offsets", None),
    ("corners", None),
    ("shares", None),
    ("post", None),
]


@pytest.mark.parametrize(("name", "value"), WRONG_BLOCKS)
def test_wrong_blocks_are_refused(core, name, value):
    raw, kept = raw_blocks()
    assert 0 <= call_compare(raw) <= 2
    setattr(raw, name, value)
    with pytest.raises(loading.CoreError):
        call_compare(raw)
    assert kept


@pytest.mark.parametrize("size", [1, 0, -3, 2**20])
def test_images_too_small_or_too_large_are_refused(core, size):
    raw, kept = raw_blocks()
    raw.moving.size[:] = [size] * 3
    with pytest.raises(loading.CoreError, match="size"):
        call_compare(raw)
    assert kept


def test_missing_arrays_are_refused(core):
    for name, arguments in {
        "nephi_determinants": (3, 5, None, None),
        "nephi_features": (3, 1, None, None, 1, None),
        "nephi_rate": (3, 1, 5, 5, None, None, None, None, None, 1, None),
        "nephi_adam": (5, 1, 0.1, 0.9, 0.99, 0.0, 1, *[None] * 6),
        "nephi_consistency": (None, None, None, None, None),
        "nephi_pack": (5, 1, 1, 1, None, 8, None),
    }.items():
        with pytest.raises(loading.CoreError):
            loading.call(name, *arguments)


def test_torch_works_on_one_thread_while_the_core_has_its_threads(threads):
    threads(2)
    had = counting.count()
    with counting.lent():
        assert torch.get_num_threads() == 1
        assert counting.count() == had
        with counting.lent():
            assert counting.count() == had
    assert torch.get_num_threads() == 2
    assert counting.count() == had
