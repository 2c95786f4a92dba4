"""Sine layers with their own backward, in memory that is used again."""

import gc

import numpy as np
import pytest
import torch

from icon_nephi.fields import ModulatedSiren, jets
from icon_nephi.fields.workspace import Workspace


@pytest.fixture(autouse=True)
def workspace(monkeypatch):
    """What the fields of a test work in, alone."""
    gc.collect()
    workspace = Workspace()
    monkeypatch.setattr(jets, "WORKSPACE", workspace)
    return workspace


def problem(count=7, seed=0, levels=2):
    """A field that is not the identity, points and a jet of code values, float64."""
    generator = torch.Generator().manual_seed(seed)
    field = ModulatedSiren(
        3, 4, width=8, frequencies=5, hidden_layers=levels, generator=generator
    ).double()
    torch.nn.init.normal_(field.last.weight, generator=generator)
    x = torch.rand(1, count, 3, dtype=torch.float64, generator=generator)
    values = torch.randn(4, 1, count, 4, dtype=torch.float64, generator=generator)
    return field, x.requires_grad_(), values.requires_grad_()


def test_memory_is_used_again_once_nothing_refers_to_it():
    workspace = Workspace()
    first = workspace.take(1000, torch.empty(0))
    place, part = first.data_ptr(), first[500:]
    del first
    assert not workspace.waiting  # a part is still in use
    del part
    assert len(workspace.waiting) == 1
    again = workspace.take(900, torch.empty(0))
    assert again.data_ptr() == place
    assert again.shape == (900,)
    assert again.data_ptr() % 64 == 0
    assert workspace.take(900, torch.empty(0)).data_ptr() != place


def test_the_smallest_memory_that_fits_is_taken():
    workspace, like = Workspace(), torch.empty(0, dtype=torch.float64)
    parts = [workspace.take(count, like) for count in (5000, 100, 1000)]
    places = [part.data_ptr() for part in parts]
    del parts
    assert workspace.take(800, like).data_ptr() == places[2]


def test_not_more_than_a_bound_waits():
    workspace = Workspace(most=10_000)
    parts = [workspace.take(1000, torch.empty(0)) for _ in range(5)]
    del parts
    assert 0 < sum(map(len, workspace.waiting.values())) <= 10_000


def test_a_graph_that_is_kept_gives_the_same_gradients_twice():
    field, x, values = problem()
    out = field.jet(x, values)
    weights = [x, values, *field.parameters()]
    first = torch.autograd.grad(out.square().sum(), weights, retain_graph=True)
    other, *inputs = problem(seed=1)  # would write into memory that was given back
    other.jet(*inputs).sum().backward()
    with torch.no_grad():
        other.jet(*inputs)
    second = torch.autograd.grad(out.square().sum(), weights)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("rows", [1, 4])
def test_without_gradients_the_numbers_are_the_same(levels, rows):
    field, x, values = problem(levels=levels)
    live = field.jet(x, values[:rows])
    with torch.no_grad():
        assert torch.equal(field.jet(x, values[:rows]), live)
    owned = field.requires_grad_(False).jet(x.detach(), values[:rows].detach())
    assert not owned.requires_grad
    assert torch.equal(owned, live)


def test_gradients_of_any_number_of_levels_are_right():
    for levels in (0, 1, 3):
        field, x, values = problem(2, levels=levels)
        inputs = x, values, *field.parameters()
        assert torch.autograd.gradcheck(
            lambda x, values, *weights, f=field: f.jet(x, values), inputs
        )


def test_frozen_weights_get_none_and_change_nothing():
    field, x, values = problem()
    expected = torch.autograd.grad(field.jet(x, values).square().sum(), [x, values])
    field.requires_grad_(False)
    found = torch.autograd.grad(field.jet(x, values).square().sum(), [x, values])
    assert all(map(torch.equal, expected, found))
    field.last.requires_grad_(True)
    field.jet(x, values).square().sum().backward()
    assert field.last.weight.grad is not None
    assert all(layer.weight.grad is None for layer in field.synthesis)


def test_memory_that_held_anything_does_not_show(workspace):
    field, x, values = problem()
    expected = torch.autograd.grad(field.jet(x, values).square().sum(), [x, values])
    for _ in range(2):
        assert workspace.waiting
        for memory in workspace.waiting.values():
            memory.view(np.uint8)[:] = 255  # not a number, in every dtype
        found = torch.autograd.grad(field.jet(x, values).square().sum(), [x, values])
        assert all(map(torch.equal, expected, found))
