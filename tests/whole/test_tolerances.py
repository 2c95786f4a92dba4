"""The plugin that finds comparisons near to failing sees what the tests compare."""

import ast

import numpy as np
import pytest
import torch

from tests import tolerances


@pytest.fixture(autouse=True)
def _of_this_test_only(monkeypatch):
    monkeypatch.setattr(tolerances, "current", {})


def measured():
    ((place, sides),) = tolerances.current.items()
    assert place.startswith("test_tolerances.py:")
    return sides


@pytest.mark.parametrize(
    ("statement", "sides"),
    [
        ("assert value < 1.5", (0.5, 1.5)),
        ("assert value > 0.25", (0.25, 0.5)),
        ("assert abs(value) <= 0.75", (0.5, 0.75)),
        ("assert 0.4 < value < 1.5", (0.4, 0.5)),
        ("assert all(v < 1.5 for v in (value, 0.1))", (0.5, 1.5)),
        ("assert -value > -1.5", (0.5, 1.5)),
    ],
)
def test_a_comparison_by_size_keeps_its_sides(statement, sides):
    tree = tolerances.ThroughBySize("test_tolerances.py").visit(ast.parse(statement))
    names = {"value": 0.5, "_by_size": tolerances.by_size}
    exec(compile(tree, "x", "exec"), names)
    assert measured() == sides


def test_counts_and_what_fails_are_not_kept():
    assert tolerances.by_size("here", [2, 3], ["Lt"])
    assert not tolerances.by_size("here", [2.5, 1.5], ["Lt"])
    assert not tolerances.current


@pytest.mark.parametrize("library", [np.array, torch.tensor])
def test_of_arrays_the_worst_element_is_kept(library):
    close = tolerances.noted(lambda *args, **kwargs: True, 0.0, 1e-3)
    assert close(library([1.0, 2.0]), library([1.0, 2.5]), atol=2.0)
    assert measured() == (0.5, 2.0)
