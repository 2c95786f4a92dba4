"""Latent codes: reading order, derivatives, prior, tables."""

import pytest
import torch

from icon_nephi.fields.codes import LatentCode, LatentCodeTable
from icon_nephi.space.interpolation import read_grids

GRIDS = {2: ((3, 4), (5, 3)), 3: ((3, 4, 3), (4, 3, 5))}


def some_code(dimension, batch=2, order="quadratic", global_size=3):
    first, second = GRIDS[dimension]
    double = {"dtype": torch.float64}
    return LatentCode(
        torch.randn(batch, global_size, **double),
        (
            torch.randn(batch, 2, *first, **double),
            torch.randn(batch, 4, *second, **double),
        ),
        order,
    )


@pytest.mark.parametrize("order", ["linear", "quadratic"])
def test_values_are_the_global_vector_then_each_grid(dimension, order):
    code = some_code(dimension, order=order)
    x = torch.rand(2, 5, dimension, dtype=torch.float64)
    values = code.at(x)
    assert values.shape == (1, 2, 5, code.size)
    assert code.size == 9
    assert torch.equal(values[0, :, 3, :3], code.global_code)
    first, second = (read_grids([g], x, order=order)[0] for g in code.local_codes)
    assert torch.equal(values[0, ..., 3:5], first)
    assert torch.equal(values[0, ..., 5:], second)


def test_derivatives_are_central_differences(dimension):
    code = some_code(dimension)
    x = 0.01 + 0.98 * torch.rand(2, 5, dimension, dtype=torch.float64)
    values = code.at(x, gradient=True)
    assert values.shape == (1 + dimension, 2, 5, code.size)
    assert torch.equal(values[:1], code.at(x))
    for axis in range(dimension):
        step = torch.zeros(dimension, dtype=torch.float64)
        step[axis] = 1e-6
        difference = (code.at(x + step) - code.at(x - step))[0] / 2e-6
        torch.testing.assert_close(values[1 + axis], difference, atol=1e-7, rtol=1e-7)
        assert (values[1 + axis, ..., :3] == 0).all()


@pytest.mark.parametrize("gradient", [False, True])
def test_either_part_may_be_missing(dimension, gradient):
    x = torch.rand(2, 5, dimension, dtype=torch.float64)
    rows = 1 + dimension if gradient else 1
    local = some_code(dimension, global_size=0)
    assert local.at(x, gradient=gradient).shape == (rows, 2, 5, 6)
    lone = LatentCode(local.global_code.new_ones(2, 3), ())
    assert lone.at(x, gradient=gradient).shape == (rows, 2, 5, 3)
    assert (lone.at(x, gradient=gradient)[0] == 1).all()
    nothing = LatentCode(local.global_code, ())
    assert nothing.at(x, gradient=gradient).shape == (rows, 2, 5, 0)


def test_a_single_grid_is_a_tuple_of_one():
    code = LatentCode(torch.zeros(2, 3), torch.zeros(2, 4, 5, 5))
    assert isinstance(code.local_codes, tuple)
    assert code.size == 7
    assert code.batch == 2


def test_parts_of_different_pairs_are_refused():
    with pytest.raises(ValueError, match="batch 2, a local grid has 3"):
        LatentCode(torch.zeros(2, 3), torch.zeros(3, 4, 5, 5))


@pytest.mark.parametrize("sigma", [1.0, 0.5])
def test_the_prior_is_equation_7(sigma):
    code = some_code(2)
    total = 0.0
    for b in range(2):
        total += sum(float(z) ** 2 for z in code.global_code[b])
        for grid in code.local_codes:
            squares = [
                float(grid[b, c, i, j]) ** 2
                for c in range(grid.shape[1])
                for i in range(grid.shape[2])
                for j in range(grid.shape[3])
            ]
            total += sum(squares) / (grid.shape[2] * grid.shape[3])
    expected = total / 2 / sigma**2
    assert float(code.prior(sigma)) == pytest.approx(expected, rel=1e-12)


def test_a_detached_code_is_its_own():
    table = LatentCodeTable(2, grids=[(3, 3)], channels=[2], global_size=3)
    code = table(None, None)
    own = code.detached()
    assert not own.global_code.requires_grad
    with torch.no_grad():
        for weight in table.parameters():
            weight.add_(1)
    assert not torch.equal(own.global_code, code.global_code)
    assert not torch.equal(own.local_codes[0], code.local_codes[0])
    assert own.interpolation == code.interpolation


def test_a_table_has_a_code_for_every_pair():
    table = LatentCodeTable(
        5, grids=GRIDS[3], channels=[2, 4], global_size=3, interpolation="linear"
    )
    everything = table(None, None)
    assert everything.batch == 5
    assert everything.size == 9
    assert everything.interpolation == "linear"
    assert everything.local_codes[1].shape == (5, 4, *GRIDS[3][1])
    index = torch.tensor([3, 1])
    chosen = table(None, None, index)
    assert torch.equal(chosen.global_code, table.global_codes[index])
    assert torch.equal(chosen.local_codes[0], table.local_codes[0][index])
    chosen.prior().backward()
    assert (table.global_codes.grad[[0, 2, 4]] == 0).all()
    assert (table.global_codes.grad[[1, 3]] != 0).all()


def test_a_table_starts_normal_with_sigma():
    table = LatentCodeTable(50, grids=[(8, 8)], channels=[4], sigma=0.3)
    for weight in table.parameters():
        assert float(weight.detach().std()) == pytest.approx(0.3, rel=0.1)
        assert abs(float(weight.detach().mean())) < 0.03


def test_the_generator_decides_the_table():
    def numbers(seed):
        source = torch.Generator().manual_seed(seed)
        table = LatentCodeTable(grids=[(3, 3)], channels=[2], generator=source)
        return torch.cat([weight.flatten() for weight in table.parameters()])

    state = torch.get_rng_state()
    assert torch.equal(numbers(1), numbers(1))
    assert not torch.equal(numbers(1), numbers(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_grids_without_channels_are_refused():
    with pytest.raises(ValueError, match="2 grids, 1 channel"):
        LatentCodeTable(grids=[(3, 3), (4, 4)], channels=[2])


def test_a_table_saves_and_loads():
    table = LatentCodeTable(2, grids=GRIDS[2], channels=[2, 3])
    other = LatentCodeTable(2, grids=GRIDS[2], channels=[2, 3])
    other.load_state_dict(table.state_dict(), strict=True)
    assert torch.equal(other(None, None).local_codes[1], table.local_codes[1])
