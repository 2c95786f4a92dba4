"""Both fields on the core: as torch in float32 and float64, with every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icon_nephi.core import loading
from icon_nephi.fields import compiled as core_field
from icon_nephi.fields.codes import LatentCode
from icon_nephi.maps.transforms import NeuralTransform
from tests.core.core_problems import apart, border, make_code, make_field, numbers, rows

CLOSE = 1e-5


def found(evaluate, field, code, jets, x):
    """What comes out, and the gradients by the rows, the code and the weights."""
    x = x.clone().requires_grad_()
    out = evaluate(field, code, jets, x)
    outer = [numbers(*o.shape, seed=9).to(o) for o in out]
    inputs = [x, code.global_code, *code.local_codes, *core_field.weights_of(field)]
    inputs = [i for i in inputs if i.numel()]
    grads = torch.autograd.grad(out, inputs, outer, allow_unused=True)
    return [*(o.detach() for o in out), *grads]


def by_torch(field, code, jets, x):
    return NeuralTransform(field, code, owned=False)._evaluate(jets, x)


def compare(kind, d, order, channels, shared, layers, width, jets, x):
    size = sum(channels) + shared
    field = make_field(kind, d, size, layers, width)
    code = make_code(d, channels, shared, order)
    assert core_field.suits(field, code, x)
    mine = found(core_field.displacements, field, code, jets, x)
    code = make_code(d, channels, shared, order, torch.float64)
    exact = found(by_torch, field.double(), code, jets, x.double())
    for one, other in zip(mine, exact, strict=True):
        assert one.shape == other.shape
        assert apart(one, other) < CLOSE


@given(
    kind=st.sampled_from(["small", "sines"]),
    d=st.sampled_from([2, 3]),
    order=st.sampled_from(["linear", "quadratic"]),
    channels=st.lists(st.integers(1, 17), max_size=3),
    shared=st.integers(0, 9),
    layers=st.integers(1, 3),
    width=st.integers(3, 40),
    jets=st.booleans(),
    count=st.sampled_from([1, 5, 48, 130]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def any_field(**chosen):
    if not chosen["channels"] and not chosen["shared"]:
        chosen["shared"] = 1
    count = chosen.pop("count")
    compare(x=rows(count, chosen["d"]), **chosen)


def test_any_field_is_as_in_float64(core):
    any_field()


@pytest.mark.parametrize("order", ["linear", "quadratic"])
@pytest.mark.parametrize("kind", ["small", "sines"])
@pytest.mark.parametrize("jets", [False, True])
def test_many_points(core, kind, order, jets, dimension):
    """Enough for several shares of the sums, and for all of their slots."""
    compare(kind, dimension, order, (8, 4), 3, 2, 16, jets, rows(4000, dimension))


@pytest.mark.parametrize("order", ["linear", "quadratic"])
@pytest.mark.parametrize("jets", [False, True])
def test_places_on_borders_and_nodes_are_as_in_torch(core, dimension, order, jets):
    """In float32, where both round a node to the same side."""
    nodes = torch.cartesian_prod(*[torch.linspace(0, 1, 9)] * dimension)[None]
    field, code = make_field("small", dimension, 13, 1, 16), None
    for x in (border(dimension), nodes):
        code = make_code(dimension, (8, 5), 0, order)
        mine = found(core_field.displacements, field, code, jets, x)
        theirs = found(by_torch, field, code, jets, x)
        for one, other in zip(mine, theirs, strict=True):
            assert apart(one, other) < CLOSE


@pytest.mark.parametrize("jets", [False, True])
@pytest.mark.parametrize("kind", ["small", "sines"])
def test_no_points(core, kind, jets, dimension):
    field, code = (
        make_field(kind, dimension, 8, 1, 8),
        make_code(dimension, (8,), 0, "linear"),
    )
    out = found(core_field.displacements, field, code, jets, rows(0, dimension))
    assert out[0].shape == (1, 0, dimension)
    assert all(not t.any() for t in out)


@pytest.mark.parametrize("what", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_places_that_are_none_reach_no_memory(core, what, dimension):
    field = make_field("small", dimension, 8, 1, 8)
    code = make_code(dimension, (8,), 0, "quadratic")
    x = rows(20, dimension)
    x[0, 7, 0] = what
    for jets in (False, True):
        out = found(core_field.displacements, field, code, jets, x)
        others = [i for i in range(20) if i != 7]
        assert out[0][0, others].isfinite().all()
        assert out[0][0, 7].isfinite().all() == (what == what)


@pytest.mark.parametrize("kind", ["small", "sines"])
@pytest.mark.parametrize("jets", [False, True])
def test_any_number_of_threads_gives_the_same_bits(core, threads, kind, jets):
    field, code = make_field(kind, 3, 16, 2, 24), make_code(3, (8, 5), 3, "quadratic")
    x, first = rows(5000, 3), None
    for count in (1, 2, 3, 2):
        threads(count)
        out = found(core_field.displacements, field, code, jets, x)
        first = first or out
        assert all(torch.equal(a, b) for a, b in zip(first, out, strict=True))


def test_only_what_is_needed_is_derived(core):
    field, code = make_field("small", 3, 8, 1, 8), make_code(3, (8,), 0, "quadratic")
    field.requires_grad_(False)
    (out,) = core_field.displacements(field, code, False, rows(9, 3))
    out.sum().backward()
    assert code.local_codes[0].grad.any()
    assert all(p.grad is None for p in field.parameters())


def test_a_second_derivative_is_refused_but_for_the_rows(core):
    field, code = make_field("small", 3, 8, 1, 8), make_code(3, (8,), 0, "quadratic")
    x = rows(9, 3).requires_grad_()
    (out,) = core_field.displacements(field, code, False, x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    _, jacobian = core_field.displacements(field, code, True, x)
    assert apart(slope, jacobian.sum(2)) < CLOSE
    slope.square().sum().backward()
    assert code.local_codes[0].grad.any()
    (out,) = core_field.displacements(field, code, False, x)
    grid = code.local_codes[0]
    (by_grid,) = torch.autograd.grad(out.sum(), grid, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        by_grid.sum().backward()


def test_padding_and_layout_do_not_matter(core):
    """Tables that are read where they are, and tables that are copied."""
    field = make_field("small", 3, 8, 1, 8)
    code = make_code(3, (8,), 0, "quadratic")
    grid = code.local_codes[0].detach()
    other = grid.to(memory_format=torch.channels_last_3d)
    assert core_field.as_table(other).data_ptr() == other.data_ptr()
    x = rows(50, 3)
    with torch.no_grad():
        a, b = (
            core_field.displacements(
                field, LatentCode(code.global_code, (g,)), False, x
            )
            for g in (grid, other)
        )
    assert torch.equal(a[0], b[0])


def test_what_does_not_suit_is_left_to_torch(core, monkeypatch):
    field, code = make_field("small", 3, 8, 1, 8), make_code(3, (8,), 0, "quadratic")
    x = rows(5, 3)
    assert core_field.suits(field, code, x)
    assert not core_field.suits(field, code, x.double())
    assert not core_field.suits(field, code, x.expand(2, -1, -1))
    assert not core_field.suits(lambda x, z: x, code, x)
    assert not core_field.suits(field, make_code(2, (8,), 0, "linear"), x)
    assert not core_field.suits(field, make_code(3, (7,), 0, "linear"), x)
    assert not core_field.suits(make_field("small", 3, 8, 0, 8), code, x)
    none = LatentCode(torch.zeros(2, 0), torch.zeros(2, 8, 4, 4, 4))
    assert not core_field.suits(field, none, x)
    monkeypatch.setenv(loading.VARIABLE, "torch")
    assert not core_field.suits(field, code, x)
