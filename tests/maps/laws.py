"""The laws of every map, as functions of a problem; see DESIGN.md section 4.

A map is any ``coordinates [B, d, *any] -> [B, d, *any]`` in ICON's unit box.
"""

import torch
from torch import nn

from icon_nephi.maps.transforms import value_and_jacobian
from icon_nephi.space.frames import identity_map, points_as_grid, to_rows
from tests.maps.problems import FIELDS, images, points


def maps_of(module, image_A, image_B):
    """The maps of a module as a tuple, whether it makes one or a pair."""
    maps = module(image_A, image_B)
    return maps if isinstance(maps, tuple) else (maps,)


def set_chunks(module, size):
    for part in module.modules():
        if hasattr(part, "chunk_size"):
            part.chunk_size = size


def change_weights(module, kinds=nn.Module):
    """Add to every weight of the parts of these kinds, as training would."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, kinds):
                for weight in part.parameters():
                    weight.add_(0.1)


def is_the_identity_at_the_start(problem, dimension, precision):
    module = problem.make(dimension, precision.dtype, alive=False)
    x = points(dimension, dtype=precision.dtype, reach=0.3)
    for phi in maps_of(module, *images(dimension, 2, precision.dtype)):
        values, jacobian = value_and_jacobian(phi, x)
        assert torch.equal(phi(x), x.expand(2, *x.shape[1:]))
        assert torch.equal(values, phi(x))
        identity = torch.eye(dimension, dtype=precision.dtype)
        identity = identity.reshape(1, dimension, dimension, *(1,) * dimension)
        assert torch.equal(jacobian, identity.expand_as(jacobian))


def chunks_do_not_matter(problem, dimension, precision):
    """Values, Jacobians and every gradient, with one chunk and with many."""
    module = problem.make(dimension, precision.dtype)
    pair = images(dimension, 2, precision.dtype)
    x = points(dimension, 2, 11, precision.dtype, reach=0.2).requires_grad_()
    weights = [*module.parameters(), x]

    def everything(chunk_size):
        set_chunks(module, chunk_size)
        found = []
        total = 0
        for phi in maps_of(module, *pair):
            values, jacobian = value_and_jacobian(phi, x)
            found += [phi(x), values, jacobian]
            ramp = torch.linspace(-1, 1, jacobian.numel(), dtype=jacobian.dtype)
            total = total + phi(x).square().mean() + values.pow(3).mean()
            total = total + (ramp * jacobian.flatten()).mean()
            total = total + jacobian.square().mean()
        gradients = torch.autograd.grad(total, weights, allow_unused=True)
        return found + [g for g in gradients if g is not None]

    whole, pieces = everything(10**6), everything(6)
    assert len(whole) == len(pieces)
    for a, b in zip(whole, pieces, strict=True):
        precision.close(b, a)


def a_batch_is_its_items(problem, dimension, precision):
    module = problem.make(dimension, precision.dtype)
    image_A, image_B = images(dimension, 3, precision.dtype)
    x = points(dimension, 3, dtype=precision.dtype)
    together = maps_of(module, image_A, image_B)
    for i in range(3):
        one = slice(i, i + 1)
        alone = maps_of(module, image_A[one], image_B[one])
        for phi, psi in zip(together, alone, strict=True):
            values, jacobian = value_and_jacobian(phi, x)
            precision.close(values[one], psi(x[one]))
            precision.close(jacobian[one], value_and_jacobian(psi, x[one])[1])


def permuted_points_give_permuted_results(problem, dimension, precision):
    module = problem.make(dimension, precision.dtype)
    x = points(dimension, 2, dtype=precision.dtype)
    order = torch.randperm(x.shape[2], generator=torch.Generator().manual_seed(0))
    for phi in maps_of(module, *images(dimension, 2, precision.dtype)):
        precision.close(phi(x[:, :, order]), phi(x)[:, :, order])


def a_dense_grid_is_its_points(problem, dimension, precision):
    module = problem.make(dimension, precision.dtype)
    grid = identity_map((4, 3, 5)[:dimension], dtype=precision.dtype)
    rows = to_rows(grid)
    for phi in maps_of(module, *images(dimension, 1, precision.dtype)):
        dense = to_rows(phi(grid))
        jacobian = value_and_jacobian(phi, grid)[1].flatten(3)
        for n in range(rows.shape[1]):
            x = points_as_grid(rows[:, n : n + 1])
            precision.close(phi(x).flatten(1), dense[:, n])
            single = value_and_jacobian(phi, x)[1]
            precision.close(single.flatten(3)[..., 0], jacobian[..., n])


def one_set_of_points_serves_the_batch(problem, dimension, precision):
    module = problem.make(dimension, precision.dtype)
    x = points(dimension, 1, dtype=precision.dtype)
    many = x.expand(3, *x.shape[1:])
    for phi in maps_of(module, *images(dimension, 3, precision.dtype)):
        assert phi(x).shape == many.shape
        precision.close(phi(x), phi(many))
        values, jacobian = value_and_jacobian(phi, x)
        precision.close(values, phi(many))
        precision.close(jacobian, value_and_jacobian(phi, many)[1])
        assert (phi(x)[0] - phi(x)[1]).abs().max() > 1e-4  # the items do differ


def an_empty_batch_works(problem, dimension, precision):
    module = problem.make(dimension, precision.dtype)
    for phi in maps_of(module, *images(dimension, 0, precision.dtype)):
        for batch in (0, 1):
            x = points(dimension, batch, dtype=precision.dtype)
            assert phi(x).shape == (0, *x.shape[1:])
            values, jacobian = value_and_jacobian(phi, x)
            assert values.shape == (0, *x.shape[1:])
            assert jacobian.shape == (0, dimension, *x.shape[1:])


def outside_moves_as_the_nearest_border(problem, dimension, precision):
    module = problem.make(dimension, precision.dtype)
    x = points(dimension, 2, 40, precision.dtype, reach=1.5)
    border = x.clamp(0, 1)
    for phi in maps_of(module, *images(dimension, 2, precision.dtype)):
        precision.close(phi(x) - x, phi(border) - border)


def border_voxels_are_inside(problem, dimension):
    """Voxel centres on the border have the Jacobian of the inner side, though physical
    frames are rounded. In float64."""
    module = problem.make(dimension)
    border = points(dimension, 2, 40, reach=1.5).clamp(0, 1)
    for phi in maps_of(module, *images(dimension, 2, torch.float64)):
        with torch.no_grad():
            expected = value_and_jacobian(phi, border)[1]
            for beyond in (-1e-7, 1e-7):
                found = value_and_jacobian(phi, border + beyond)[1]
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def jacobian_is_the_central_difference(problem, dimension, reach=0.3):
    """In float64; inside and outside the unit box, through every composition."""
    module = problem.make(dimension)
    x = points(dimension, 2, 25, reach=reach)
    step = 1e-6
    for phi in maps_of(module, *images(dimension, 2, torch.float64)):
        with torch.no_grad():
            values, jacobian = value_and_jacobian(phi, x)
        torch.testing.assert_close(values, phi(x).detach())
        assert (jacobian.flatten(1).std(dim=1) > 1e-3).all()
        if hasattr(phi, "jacobian"):
            assert torch.equal(phi.jacobian(x), jacobian)
        for axis in range(dimension):
            shift = torch.zeros_like(x)
            shift[:, axis] = step
            difference = (phi(x + shift) - phi(x - shift)).detach() / (2 * step)
            torch.testing.assert_close(
                jacobian[:, :, axis], difference, rtol=1e-6, atol=1e-7
            )


def made_without_gradients_it_owns_its_weights(problem, dimension, precision):
    module = problem.make(dimension, precision.dtype)
    pair = images(dimension, 2, precision.dtype)
    x = points(dimension, dtype=precision.dtype)
    with torch.no_grad():
        maps = maps_of(module, *pair)
        before = [(phi(x), value_and_jacobian(phi, x)[1]) for phi in maps]
    change_weights(module)
    for phi, (values, jacobian) in zip(maps, before, strict=True):
        again = phi(x)  # outside no_grad, as ICON's itk_wrapper does
        assert not again.requires_grad
        assert torch.equal(torch.from_numpy(again.numpy()), values)
        precision.close(value_and_jacobian(phi, x)[1].detach(), jacobian)


def made_with_gradients_it_shares_the_weights(problem, dimension):
    module = problem.make(dimension)
    x = points(dimension)
    maps = maps_of(module, *images(dimension, 2, torch.float64))
    before = [phi(x) for phi in maps]
    sum(phi(x).square().sum() for phi in maps).backward()
    for name, weight in module.named_parameters():
        # FirstTransform throws the backward map away.
        if "field_BA" not in name or len(maps) == 2:
            assert weight.grad is not None, name
            assert weight.grad.abs().max() > 0, name
    if any(isinstance(part, FIELDS) for part in module.modules()):
        change_weights(module, FIELDS)
        for phi, values in zip(maps, before, strict=True):
            assert (phi(x) - values).abs().max() > 1e-3


def dtype_is_that_of_the_coordinates(problem, dimension, weights, coordinates):
    module = problem.make(dimension, weights)
    x = points(dimension, dtype=coordinates)
    for phi in maps_of(module, *images(dimension, 2, weights)):
        values, jacobian = value_and_jacobian(phi, x)
        assert phi(x).dtype == values.dtype == jacobian.dtype == coordinates


def draws_no_random_numbers(problem, dimension):
    module = problem.make(dimension)
    set_chunks(module, 4)
    x = points(dimension)
    state = torch.get_rng_state()
    total = 0
    for phi in maps_of(module, *images(dimension, 2, torch.float64)):
        values, jacobian = value_and_jacobian(phi, x)
        total = total + values.sum() + jacobian.square().sum() + phi(x).sum()
    total.backward()
    assert torch.equal(torch.get_rng_state(), state)
