"""A pair compared on a lattice: against finite differences, torch, and by hand."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icon_nephi.core import loading, threads
from icon_nephi.losses.dense import DensePair, Side, coarsened, refined
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.space.images import gaussian_blur

needs_core = pytest.mark.skipif(loading.library() is None, reason="no compiled core")


def smooth(generator, *shape):
    noise = torch.rand(1, 2, *shape, generator=generator)
    return gaussian_blur(noise, [1.0] * len(shape))


def problem(
    dimension, masked=False, squared=False, seed=0, size=(13, 11, 9), shared=False
):
    """A pair with everything in it, and a code that moves by a few places."""
    g = torch.Generator().manual_seed(seed)
    size, grid = size[:dimension], tuple(n + 3 for n in size[:dimension])

    def mask(*shape):
        drawn = (torch.rand(1, 1, *shape, generator=g) > 0.2).float()
        return drawn if masked else None

    matrix = torch.eye(dimension, dimension + 1) * 1.02
    matrix = matrix + 0.01 * torch.randn(matrix.shape, generator=g)
    weights = [torch.rand(1, 1, *size, generator=g) for _ in "AB"]
    forth = Side(
        smooth(g, *grid), matrix, smooth(g, *size), weights[0], mask(*size), mask(*grid)
    )
    flat = torch.eye(dimension, dimension + 1)
    back = Side(
        smooth(g, *size), flat, smooth(g, *size), weights[1], mask(*size), mask(*size)
    )
    pair = DensePair(
        (forth, back),
        tuple(n // 2 + 1 for n in size),
        torch.tensor([100.0, 80.0, 120.0][:dimension]),
        squared=squared,
        shared=shared,
        hinge=3.0,
        tension=0.05,
    )
    nodes = [n // 3 + 2 for n in size]
    return pair, 0.05 * torch.randn(1, 2 * dimension, *nodes, generator=g)


@pytest.mark.parametrize("dimension", [2, 3])
def test_the_gradient_of_the_reference_is_that_of_differences(dimension):
    pair, code = problem(dimension)
    code = code.double().requires_grad_()
    (gradient,) = torch.autograd.grad(pair.loss(code)[0], code)
    generator = torch.Generator().manual_seed(1)
    way = torch.randn(code.shape, generator=generator, dtype=torch.float64)
    step = 1e-6
    ends = [float(pair.loss(code.detach() + s * way)[0]) for s in (step, -step)]
    expected = float((gradient * way).sum())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=1e-3)


@needs_core
@settings(max_examples=12, deadline=None)
@given(
    dimension=st.sampled_from([2, 3]),
    masked=st.booleans(),
    squared=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_core_finds_what_torch_finds(dimension, masked, squared, shared, seed):
    pair, code = problem(dimension, masked, squared, seed, shared=shared)
    found, gradient = pair.derive(code)
    exact = code.double().requires_grad_()
    total, parts = pair.loss(exact)
    (expected,) = torch.autograd.grad(total, exact)
    total = total.detach()
    assert found.total == pytest.approx(float(total), rel=2e-6)
    for one, other in zip(found[1:5], parts, strict=False):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5


@needs_core
@pytest.mark.parametrize("dimension", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(dimension, monkeypatch):
    pair, code = problem(dimension, size=(40, 37, 31))
    results = []
    for count in (1, 2, 3):
        monkeypatch.setattr(threads, "count", lambda count=count: count)
        results.append(pair.derive(code))
    for loss, gradient in results[1:]:
        assert loss == results[0][0]
        assert torch.equal(gradient, results[0][1])


@needs_core
def test_sizes_that_cannot_be_are_refused():
    pair, code = problem(2)
    for wrong in (replace(pair, radius=0), replace(pair, between=(1, 4))):
        with pytest.raises(loading.CoreError, match="size"):
            wrong.derive(code)


def test_images_with_a_place_that_is_no_number_give_a_loss_that_is_none():
    pair, code = problem(2)
    code[0, 0, 0, 0] = math.nan
    loss, _ = pair.derive(code)
    assert not math.isfinite(loss.total)


def test_a_window_is_compared_as_a_block_is():
    """In the middle of the lattice, maps that move nothing: PatchNCC of the window."""
    pair, code = problem(2)
    g = torch.Generator().manual_seed(3)
    A, B = smooth(g, 9, 9)[:, :1], smooth(g, 9, 9)[:, :1]
    middle = torch.zeros(1, 1, 9, 9)
    middle[0, 0, 4, 4] = 1.0
    side = Side(A, torch.eye(2, 3), B, middle)
    pair = replace(pair, sides=(side, side), lmbda=0.0, tension=0.0)
    found, _ = pair.derive(torch.zeros_like(code))
    blocks = [i[:, :, 2:7, 2:7] for i in (A, B)]
    tag = torch.ones(1, 1, 5, 5)
    expected = PatchNCC(pair.floor)(torch.cat([blocks[0], tag], 1), blocks[1])
    assert found.similarity == pytest.approx(2 * float(expected), rel=1e-5)


@pytest.mark.parametrize("dimension", [2, 3])
def test_twice_the_intervals_leave_the_map_as_it_is(dimension):
    pair, code = problem(dimension)
    nodes = [2 * n - 2 for n in code.shape[2:]]
    nodes[0] = code.shape[2]  # one axis stays
    before, after = (
        pair.on_lattice(c, pair.size)[0] for c in (code, refined(code, nodes))
    )
    assert float((before - after).abs().max()) < 1e-6 * float(before.abs().max())
    with pytest.raises(ValueError, match="nodes"):
        refined(code, [n + 1 for n in code.shape[2:]])


@pytest.mark.parametrize("dimension", [2, 3])
def test_gradients_go_back_to_coarser_nodes(dimension):
    _, code = problem(dimension)
    code = code.double().requires_grad_()
    fine = refined(code, [2 * n - 2 for n in code.shape[2:]])
    by_fine = torch.linspace(-1, 1, fine.numel(), dtype=torch.float64).view_as(fine)
    (expected,) = torch.autograd.grad(fine, code, by_fine)
    found = coarsened(by_fine, code.shape[2:])
    assert float((found - expected).abs().max()) < 1e-12 * float(expected.abs().max())


def test_maps_that_are_each_others_inverse_cost_no_regularity():
    pair, code = problem(2)
    d, step = 2, 0.05
    code = torch.zeros_like(code)
    code[:, :d], code[:, d:] = step, -step  # a shift and back
    found, _ = replace(pair, between=(40, 40)).derive(code)
    assert found.regularity < 1e-9
