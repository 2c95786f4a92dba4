"""The benchmarks: rivals compute the same numbers, and helpers count right."""

import pytest
import torch

from evaluation.speed import (
    bench,
    bench_export,
    bench_regularizer,
    bench_scaling,
    bench_step,
)

KINDS = tuple(bench_regularizer.FIELDS)


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(bench_regularizer, "NODES", 6)


@pytest.mark.parametrize("kind", KINDS)
def test_ours_and_exact_rivals_find_one_gradient(kind, little, monkeypatch):
    monkeypatch.setattr(bench_regularizer, "CHUNK", 7)
    problem = bench_regularizer.Problem(kind, 20, torch.float64)
    expected = bench_regularizer.double_backward(problem)
    for method in (bench_regularizer.ours, bench_regularizer.torch_func):
        assert bench_regularizer.error(method(problem), expected) < 1e-9


def test_float32_is_good_to_the_promised_digits(little):
    expected = bench_regularizer.exact("ModulatedSiren", 30)
    found = bench_regularizer.ours(bench_regularizer.Problem("ModulatedSiren", 30))
    assert bench_regularizer.error(found, expected) < 1e-5


def test_finite_differences_are_near_but_not_exact(little):
    problem = bench_regularizer.Problem("ModulatedSiren", 30, torch.float64)
    expected = bench_regularizer.double_backward(problem)
    found = bench_regularizer.finite_differences(problem)
    assert 1e-4 < bench_regularizer.error(found, expected) < 0.3


def test_products_are_noted_with_those_of_the_backward_pass():
    a, b = torch.rand(4, 3, requires_grad=True), torch.rand(3, 2)
    with bench.Products() as noted:
        (a @ b).sum().backward()
        torch.bmm(torch.rand(5, 2, 3), torch.rand(5, 3, 7))
    assert noted.shapes == [(4, 3, 2), (4, 2, 3), *[(2, 3, 7)] * 5]
    assert bench.flops(noted.shapes) == 2 * (24 + 24 + 5 * 42)
    bench.products(noted.shapes)()


def test_rivals_take_turns_after_one_call_that_does_not_count():
    calls = []
    works = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = bench.in_turn(works, 2)
    assert "".join(calls) == "ababab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert bench.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == (3.0, 2.0, 4.0)


@pytest.mark.parametrize("method", ["voxel", "nephi IO"])
def test_a_step_is_measured(method, monkeypatch):
    monkeypatch.setitem(bench_step.STEPS, method, 1)
    row = bench_step.measure(method, 20, "cpu", torch.get_num_threads())
    assert row["least"] <= row["seconds"] <= row["most"]
    assert row["cpu_seconds"] >= 0


def test_growth_is_measured():
    threads = torch.get_num_threads()
    row = bench_scaling.measure(16, 10, 16, 1)
    torch.set_num_threads(threads)
    assert row["cpu_seconds"] >= 0
    assert row["threads"] == 1


@pytest.mark.parametrize("method", bench_export.METHODS[1:])
def test_what_is_exported_has_a_vector_a_voxel(method):
    assert bench_export.export(method, 9)().shape == (9, 9, 9, 3)
