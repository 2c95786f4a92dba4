"""A pytest plugin: how near each numeric comparison of the tests is to failing.

    python -m pytest -p tests.tolerances --tolerances FILE tests/fields/test_codes.py
    python -m tests.tolerances FILE FILE ...

The first lists the comparisons by measured / allowed, the nearest to failing first, and
writes all of them to FILE. The second takes such files, each from another machine or
another setting, and lists the comparisons by how far they move from file to file, as a
part of what is left up to the bound: a bound with little left is fine where nothing
moves; one that moves by a third of what is left will fail somewhere.
"""

import ast
import builtins
import json
import operator
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from _pytest.assertion import rewrite

FOLDER = Path(__file__).parent
SHARED = {"tolerances.py", "conftest.py"}  # these compare for others
HELPERS = [
    "tests.maps.laws",
    "tests.maps.problems",
    "tests.small_fits",
]  # hold assert statements, too
BY_SIZE = {"Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt, "GtE": operator.ge}
DEFAULTS = {torch.float32: (1.3e-6, 1e-5), torch.float64: (1e-7, 1e-7)}  # of torch
NOT_NUMBERS = TypeError, ValueError, KeyError, RuntimeError
current = {}  # of the running test: place -> (measured, allowed)
every = {}  # of all tests: test and place -> (measured, allowed)


def note(measured, allowed, place=None):
    """Keep one comparison; of those in one place the one nearest to failing."""
    place = place or caller()
    if place is None or not 0 <= measured <= allowed < np.inf or allowed == 0:
        return  # what is more than allowed fails, or was asked to differ
    before = current.get(place, (0.0, 1.0))
    if measured / allowed >= before[0] / before[1]:
        current[place] = (float(measured), float(allowed))


def caller():
    """The test file and line that compares; None where the package itself does."""
    frame = sys._getframe(2)
    while frame:
        path = Path(frame.f_code.co_filename)
        if "icon_nephi" in path.parts and FOLDER not in path.parents:
            return None
        if FOLDER in path.parents and path.name not in SHARED:
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def as_array(value):
    if torch.is_tensor(value):
        value = value.detach().cpu().double()
    return np.asarray(value, np.float64)


def note_arrays(actual, expected, rtol, atol):
    """Keep the element of two arrays, or of two collections, nearest to failing."""
    if isinstance(actual, dict):
        actual, expected = [[v[k] for k in sorted(v)] for v in (actual, expected)]
    if isinstance(actual, list | tuple) and any(map(torch.is_tensor, actual)):
        for one, other in zip(actual, expected, strict=True):
            note_arrays(one, other, rtol, atol)
        return
    if rtol is None:
        rtol, atol = DEFAULTS.get(getattr(actual, "dtype", torch.float64), (0, 0))
    actual, expected = as_array(actual), as_array(expected)
    allowed = atol + rtol * np.abs(expected)
    differences = np.abs(actual - expected)
    note_largest(differences, np.broadcast_to(allowed, differences.shape))


def note_largest(measured, allowed, place=None):
    """Keep the element where `measured` takes the largest part of `allowed`."""
    if measured.size and (allowed > 0).any():
        index = np.argmax(measured / np.where(allowed > 0, allowed, np.inf))
        note(measured.flat[index], allowed.flat[index], place)


def noted(compare, rtol, atol):
    """`compare` of the tensors' or arrays' library, which keeps what it is given."""

    def function(actual, expected, *args, **kwargs):
        given = {**dict(zip(("rtol", "atol"), args, strict=False)), **kwargs}
        bounds = given.get("rtol", rtol), given.get("atol", atol)
        with suppress(*NOT_NUMBERS):  # nor of one shape: `compare` says so
            note_arrays(actual, expected, *bounds)
        return compare(actual, expected, *args, **kwargs)

    return function


def by_size(place, values, names):
    """What `a < b <= c` is; its sides are kept where they are numbers."""
    result = True
    for left, name, right in zip(values, names, values[1:], strict=False):
        result = BY_SIZE[name](left, right)
        small, large = (left, right) if name.startswith("Lt") else (right, left)
        with suppress(*NOT_NUMBERS):
            note_sides(small, large, place)
        if len(names) > 1 and not result:
            break
    return result


def note_sides(small, large, place):
    small, large = as_array(small), as_array(large)
    if (np.rint(small) == small).all() and (np.rint(large) == large).all():
        return  # counts do not round
    if (large < 0).all():
        small, large = -large, -small
    if (small >= 0).all() and (large > 0).all():
        note_largest(*np.broadcast_arrays(small, large), place)


class ThroughBySize(ast.NodeTransformer):
    """Send the comparisons by size in `assert` statements through `by_size`."""

    def __init__(self, name):
        self.name, self.asserting = name, False

    def visit_Assert(self, node):
        self.asserting = True
        node.test = self.visit(node.test)
        self.asserting = False
        return node

    def visit_Compare(self, node):
        self.generic_visit(node)
        names = [type(operation).__name__ for operation in node.ops]
        if not self.asserting or not set(names) <= BY_SIZE.keys():
            return node
        call = ast.parse("_by_size(0, 0, 0)", mode="eval").body
        call.args = [
            ast.Constant(f"{self.name}:{node.lineno}"),
            ast.List([node.left, *node.comparators], ast.Load()),
            ast.List([ast.Constant(name) for name in names], ast.Load()),
        ]
        return ast.fix_missing_locations(ast.copy_location(call, node))


def pytest_addoption(parser):
    parser.addoption("--tolerances", metavar="FILE", help="write all comparisons here")


def pytest_configure(config):
    torch.testing.assert_close = noted(torch.testing.assert_close, None, None)
    torch.allclose = noted(torch.allclose, 1e-5, 1e-8)
    np.allclose = noted(np.allclose, 1e-5, 1e-8)
    np.testing.assert_allclose = noted(np.testing.assert_allclose, 1e-7, 0.0)
    scalar = type(pytest.approx(1.0))
    equal = scalar.__eq__

    def equal_and_noted(self, actual):
        if isinstance(actual, float | np.floating) or torch.is_tensor(actual):
            note(abs(float(actual) - self.expected), self.tolerance)
        return equal(self, actual)

    scalar.__eq__ = equal_and_noted
    builtins._by_size = by_size
    rewrite_as_before = rewrite.rewrite_asserts

    def rewrite_asserts(module, source, module_path=None, config=None):
        if FOLDER in Path(module_path or "").parents:
            ThroughBySize(Path(module_path).name).visit(module)
        rewrite_as_before(module, source, module_path, config)

    rewrite.rewrite_asserts = rewrite_asserts
    rewrite.PYC_TAIL = ".tolerances" + rewrite.PYC_TAIL  # not the plain tests' files
    pytest.register_assert_rewrite(*HELPERS)


def pytest_runtest_setup():
    current.clear()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item):
    item.user_properties.append(("comparisons", dict(current)))  # xdist carries these


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        comparisons = dict(report.user_properties).get("comparisons", {})
        every.update({f"{report.nodeid} {k}": v for k, v in comparisons.items()})


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.section("comparisons nearest to failing: measured / allowed")
    for key in sorted(every, key=lambda key: -every[key][0] / every[key][1])[:60]:
        measured, allowed = every[key]
        line = f"{measured / allowed:.3f}  {measured:.3g} / {allowed:.3g}  {key}"
        terminalreporter.write_line(line)
    if config.getoption("--tolerances"):
        Path(config.getoption("--tolerances")).write_text(json.dumps(every, indent=0))


def moves(several):
    """How far one comparison moves, as a part of what is left up to its bound."""
    ratios = [measured / allowed for measured, allowed in several]
    return (max(ratios) - min(ratios)) / max(1 - max(ratios), 1e-9)


def main(paths):
    files = [json.loads(Path(path).read_text()) for path in paths]
    common = set.intersection(*map(set, files))
    rows = {key: [file[key] for file in files] for key in common}
    for key in sorted(rows, key=lambda key: -moves(rows[key]))[:60]:
        ratios = " ".join(f"{m / a:.4f}" for m, a in rows[key])
        print(f"{moves(rows[key]):.3f}  {ratios}  {key}")


if __name__ == "__main__":
    main(sys.argv[1:])
