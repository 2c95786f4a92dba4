"""Reading grids: against plain implementations, torch's own, and gradcheck."""

import pytest
import torch
import torch.nn.functional as F

from icon_nephi.space.interpolation import ORDERS, read_grids

NODES = {2: (4, 6), 3: (5, 3, 4)}
pytestmark = pytest.mark.filterwarnings(
    "ignore:Input #:UserWarning"  # gradcheck, on inputs that are float32
)


@pytest.fixture(params=ORDERS)
def order(request):
    return request.param


def grid_and_points(dimension, batch=2, count=7, reach=0.0):
    grid = torch.randn(batch, 3, *NODES[dimension], dtype=torch.float64)
    x = torch.rand(batch, count, dimension, dtype=torch.float64)
    return grid, (1 + 2 * reach) * x - reach


def hat(t):
    return (1 - t.abs()).clamp(min=0)


def quadratic_b_spline(t):
    t = t.abs()
    outer = 0.5 * (1.5 - t).clamp(min=0).square()
    return torch.where(t <= 0.5, 0.75 - t.square(), outer)


def plain_read(grid, point, order):
    """One point ``[d]`` of ``[C, *g]``: every node times its basis function."""
    result = grid
    for x, n in zip(point.clamp(0, 1), grid.shape[1:], strict=True):
        nodes = torch.arange(n, dtype=grid.dtype)
        if order == "linear":
            weights = hat(x * (n - 1) - nodes)
        else:  # nodes half a step outside the box
            weights = quadratic_b_spline(x * (n - 2) + 0.5 - nodes)
        result = torch.tensordot(result, weights, dims=([1], [0]))
    return result


def test_it_agrees_with_a_plain_implementation_and_its_jacobian(dimension, order):
    grid, x = grid_and_points(dimension)
    read = read_grids([grid], x, order=order, gradient=True)
    assert read.shape == (1 + dimension, *x.shape[:2], 3)
    assert torch.equal(read[:1], read_grids([grid], x, order=order))
    for b in range(2):
        for n in range(x.shape[1]):
            value = plain_read(grid[b], x[b, n], order)
            torch.testing.assert_close(read[0, b, n], value)
            slopes = torch.func.jacfwd(plain_read, argnums=1)(grid[b], x[b, n], order)
            torch.testing.assert_close(read[1:, b, n], slopes.T)


def test_linear_reading_is_grid_sample(dimension, precision):
    grid, x = grid_and_points(dimension, reach=0.3)
    grid, x = grid.to(precision.dtype), x.to(precision.dtype)
    at = (2 * x - 1).flip(-1).reshape(2, -1, *(1,) * (dimension - 1), dimension)
    expected = F.grid_sample(grid, at, padding_mode="border", align_corners=True)
    found = read_grids([grid], x, order="linear")[0]
    precision.close(found.mT, expected.flatten(2))


def test_linear_reading_finds_the_nodes_at_the_corners(dimension):
    grid, _ = grid_and_points(dimension)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    corners = torch.cartesian_prod(*[ends] * dimension).expand(2, -1, -1)
    expected = grid
    for axis in range(2, 2 + dimension):
        ends = torch.tensor([0, grid.shape[axis] - 1])
        expected = expected.index_select(axis, ends)
    torch.testing.assert_close(
        read_grids([grid], corners, order="linear")[0].mT, expected.flatten(2)
    )


def test_affine_functions_are_read_exactly(dimension, order):
    slope = torch.randn(3, dimension, dtype=torch.float64)
    nodes = []
    for n in NODES[dimension]:
        index = torch.arange(n, dtype=torch.float64)
        nodes.append(index / (n - 1) if order == "linear" else (index - 0.5) / (n - 2))
    at = torch.stack(torch.meshgrid(*nodes, indexing="ij"))
    grid = torch.einsum("cd,d...->c...", slope, at)[None] + 2
    _, x = grid_and_points(dimension, batch=1, count=50)
    read = read_grids([grid], x, order=order, gradient=True)
    torch.testing.assert_close(read[0], x @ slope.T + 2)
    expected = slope.T[:, None, None, :].expand_as(read[1:])
    torch.testing.assert_close(read[1:], expected)


def test_quadratic_gradients_are_continuous_across_cells(dimension):
    grid, x = grid_and_points(dimension, batch=1, count=20)
    for axis, n in enumerate(NODES[dimension]):
        for cell in range(1, n - 2):
            before, after = x.clone(), x.clone()
            before[..., axis] = cell / (n - 2) - 1e-9
            after[..., axis] = cell / (n - 2) + 1e-9
            difference = read_grids([grid], before, gradient=True) - read_grids(
                [grid], after, gradient=True
            )
            assert difference.abs().max() < 1e-6


def test_linear_gradients_jump_across_cells():
    grid, x = grid_and_points(2, batch=1)
    x[..., 0] = 1 / 3
    near = [
        read_grids([grid], x + shift, order="linear", gradient=True)
        for shift in (-1e-9, 1e-9)
    ]
    assert (near[0] - near[1])[1].abs().max() > 0.1


def test_outside_the_box_is_the_border_and_flat_across_it(dimension, order):
    grid, x = grid_and_points(dimension, count=60, reach=1.0)
    read = read_grids([grid], x, order=order, gradient=True)
    border = read_grids([grid], x.clamp(0, 1), order=order, gradient=True)
    torch.testing.assert_close(read[0], border[0])
    for axis in range(dimension):
        out = (x[..., axis] < 0) | (x[..., axis] > 1)
        assert out.any()
        assert (read[1 + axis][out] == 0).all()
        torch.testing.assert_close(read[1 + axis][~out], border[1 + axis][~out])


def test_gradients_by_grid_and_points_are_right(dimension, order):
    grid, x = grid_and_points(dimension, batch=2, count=3)
    x = 0.02 + 0.96 * x
    grid.requires_grad_()
    x.requires_grad_()

    def read(grid, x):
        return read_grids([grid], x, order=order, gradient=True)

    assert torch.autograd.gradcheck(read, (grid, x), eps=1e-6, atol=1e-7, rtol=1e-6)


def test_one_grid_serves_a_batch_of_points(dimension, order):
    grid, x = grid_and_points(dimension, batch=3)
    grid = grid[:1].requires_grad_()
    many = grid.expand(3, *grid.shape[1:])
    one = read_grids([grid], x, order=order, gradient=True)
    torch.testing.assert_close(one, read_grids([many], x, order=order, gradient=True))
    (gradient,) = torch.autograd.grad(one.square().sum(), grid)
    squares = read_grids([many], x, order=order, gradient=True).square().sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(squares, grid)[0])


@pytest.mark.parametrize(("batch", "count"), [(0, 4), (2, 0), (0, 0)])
@pytest.mark.parametrize("gradient", [False, True])
def test_nothing_to_read_is_fine(dimension, order, batch, count, gradient):
    grid, x = grid_and_points(dimension, batch, count)
    grid.requires_grad_()
    read = read_grids([grid], x, order=order, gradient=gradient)
    rows = 1 + dimension if gradient else 1
    assert read.shape == (rows, batch, count, 3)
    read.sum().backward()
    assert (grid.grad == 0).all()


@pytest.mark.parametrize(
    ("order", "nodes", "words"),
    [
        ("cubic", (4, 4), "order must be one of"),
        ("linear", (4, 1), "at least 2"),
        ("quadratic", (2, 4), "at least 3"),
    ],
)
def test_what_cannot_be_read_is_refused(order, nodes, words):
    with pytest.raises(ValueError, match=words):
        read_grids([torch.zeros(1, 2, *nodes)], torch.rand(1, 3, 2), order=order)


@pytest.mark.gpu
def test_on_a_gpu_it_reads_the_same(dimension, order):
    grid, x = grid_and_points(dimension, reach=0.2)

    def both(grid, x):
        grid, x = grid.detach().requires_grad_(), x.detach().requires_grad_()
        read = read_grids([grid], x, order=order, gradient=True)
        return (read, *torch.autograd.grad(read.pow(3).sum(), (grid, x)))

    for a, b in zip(both(grid, x), both(grid.cuda(), x.cuda()), strict=True):
        torch.testing.assert_close(b.cpu(), a)
