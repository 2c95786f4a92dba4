"""The laws over every transform, and what each transform is by itself."""

import icon_registration as icon
import pytest
import torch

import tests.maps.laws as laws
from icon_nephi.fields.codes import LatentCode, LatentCodeTable
from icon_nephi.maps import jacobians as derivatives
from icon_nephi.maps.networks import (
    AffinePair,
    FirstTransform,
    FunctionFromNeuralField,
    NePhi,
    TwoStepPair,
)
from icon_nephi.maps.transforms import (
    Composition,
    MatrixTransform,
    NeuralTransform,
    value_and_jacobian,
)
from icon_nephi.space.frames import identity_map
from icon_nephi.space.images import sample_image
from tests.maps.problems import (
    BOUNDED,
    OURS,
    PROBLEMS,
    SHAPES,
    Encoder,
    Problem,
    images,
    mlp,
    nephi,
    points,
    wave,
)


def over(problems):
    return pytest.mark.parametrize("problem", problems, ids=lambda p: p.name)


@over([p for p in PROBLEMS if p.starts])
def test_it_is_the_identity_at_the_start(problem, dimension, precision):
    laws.is_the_identity_at_the_start(problem, dimension, precision)


@over(OURS)
def test_one_chunk_is_many_chunks(problem, dimension, precision):
    laws.chunks_do_not_matter(problem, dimension, precision)


@over(PROBLEMS)
def test_a_batch_is_its_items(problem, dimension, precision):
    laws.a_batch_is_its_items(problem, dimension, precision)


@over(PROBLEMS)
def test_permuted_points_give_permuted_results(problem, dimension, precision):
    laws.permuted_points_give_permuted_results(problem, dimension, precision)


@over(PROBLEMS)
def test_a_dense_grid_is_its_points(problem, dimension, precision):
    laws.a_dense_grid_is_its_points(problem, dimension, precision)


@over(PROBLEMS)
def test_one_set_of_points_serves_the_batch(problem, dimension, precision):
    laws.one_set_of_points_serves_the_batch(problem, dimension, precision)


@over(PROBLEMS)
def test_an_empty_batch_works(problem, dimension, precision):
    laws.an_empty_batch_works(problem, dimension, precision)


@over(BOUNDED)
def test_outside_it_moves_as_the_nearest_border(problem, dimension, precision):
    laws.outside_moves_as_the_nearest_border(problem, dimension, precision)


@over([p for p in OURS if p in BOUNDED])
def test_rounding_does_not_put_border_voxels_outside(problem, dimension):
    laws.border_voxels_are_inside(problem, dimension)


@over(PROBLEMS)
def test_the_jacobian_is_the_central_difference(problem, dimension):
    laws.jacobian_is_the_central_difference(problem, dimension)


@over(PROBLEMS)
def test_made_without_gradients_it_owns_its_weights(problem, dimension, precision):
    laws.made_without_gradients_it_owns_its_weights(problem, dimension, precision)


@over(PROBLEMS)
def test_made_with_gradients_it_shares_the_weights(problem, dimension):
    laws.made_with_gradients_it_shares_the_weights(problem, dimension)


@over([p for p in OURS if p.mixed])
def test_the_dtype_is_that_of_the_coordinates(problem, dimension):
    single, double = torch.float32, torch.float64
    laws.dtype_is_that_of_the_coordinates(problem, dimension, single, double)
    laws.dtype_is_that_of_the_coordinates(problem, dimension, double, single)


@over(PROBLEMS)
def test_it_draws_no_random_numbers(problem, dimension):
    laws.draws_no_random_numbers(problem, dimension)


def smooth_maps(dimension, batch=1):
    """phi_AB and phi_BA of a pair with something in it, and their module."""
    module = Problem("pair", nephi).make(dimension)
    return (*module(*images(dimension, batch, torch.float64)), module)


def test_neural_transform_adds_the_fields_displacement(dimension):
    phi, _, module = smooth_maps(dimension)
    x = points(dimension)
    rows = x.flatten(2).mT
    moved = module.field_AB(rows, phi.code.at(rows)[0])
    torch.testing.assert_close(phi(x), x + moved.mT.reshape(x.shape))


def test_points_may_come_in_any_arrangement(dimension):
    phi, _, _ = smooth_maps(dimension, 2)
    x = points(dimension, 2, 12)
    rows = x.flatten(2)
    arranged = rows.reshape(2, dimension, 3, 2, 2)
    expected = phi(x).flatten(2)
    torch.testing.assert_close(phi(rows), expected)
    torch.testing.assert_close(phi(arranged).flatten(2), expected)
    assert phi.jacobian(arranged).shape == (2, dimension, dimension, 3, 2, 2)


def test_coordinates_of_the_wrong_dimension_are_refused(dimension):
    phi, _, _ = smooth_maps(dimension)
    with pytest.raises(ValueError, match=rf"must be \[B, {dimension}, \*any\]"):
        phi(points(5 - dimension))
    with pytest.raises(ValueError, match="unit box"):
        phi(torch.zeros(4, dimension))


@pytest.mark.parametrize("global_size", [0, 2])
def test_a_batch_that_is_not_the_codes_is_refused(global_size):
    code = LatentCode(torch.zeros(3, global_size), torch.rand(3, 2, 4, 4))
    phi = NeuralTransform(mlp(2, global_size + 2), code)
    with pytest.raises((ValueError, RuntimeError)):
        phi(torch.rand(2, 2, 5))


def test_a_code_of_one_pair_serves_any_batch_of_points(dimension):
    phi, _, _ = smooth_maps(dimension)
    x = points(dimension, 4)
    expected = torch.cat([phi(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(phi(x), expected)


def test_a_code_without_local_grids_moves_points():
    code = LatentCode(torch.rand(2, 3), ())
    phi = NeuralTransform(wave, code)
    assert phi(torch.rand(1, 3, 6)).shape == (2, 3, 6)
    assert phi.jacobian(torch.rand(1, 3, 6)).shape == (2, 3, 3, 6)


@pytest.mark.parametrize("owned", [True, False])
def test_ownership_can_be_chosen(owned):
    made, _, module = smooth_maps(2)
    x = points(2)
    phi = NeuralTransform(module.field_AB, made.code, owned=owned)
    before = phi(x)
    assert before.requires_grad is not owned
    laws.change_weights(module)
    assert torch.equal(phi(x), before) is owned


def test_autocast_does_not_touch_the_map():
    phi = Problem("pair", nephi).make(2, torch.float32)(*images(2, 1))[0]
    x = points(2, dtype=torch.float32)
    expected = phi(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(phi(x), expected)


def test_dense_evaluation_does_not_keep_the_activations():
    """Chunks are recomputed: what the graph keeps does not follow the points."""
    made, _, module = smooth_maps(2)

    def kept(count):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
        )
        phi = NeuralTransform(module.field_AB, made.code, chunk_size=64)
        with hooks:
            values = phi(points(2, 1, count))
        assert values.requires_grad
        return sum(sizes)

    coordinates = 2
    assert kept(1024) - kept(512) <= 512 * 3 * coordinates


def test_matrix_transform_is_the_matrix(dimension):
    matrix = torch.eye(dimension + 1, dtype=torch.float64)
    matrix[:dimension] += 0.1 * torch.randn(dimension, dimension + 1)
    x = points(dimension, 2)
    moved = MatrixTransform(matrix[None])(x)
    for b in range(2):
        for n in range(x.shape[2]):
            point = torch.cat([x[b, :, n].flatten(), torch.ones(1)])
            expected = (matrix @ point)[:dimension]
            torch.testing.assert_close(moved[b, :, n].flatten(), expected)


def test_composition_is_the_second_map_first():
    double = MatrixTransform(torch.diag(torch.tensor([2.0, 2.0, 1.0]))[None])
    shift = torch.eye(3)
    shift[0, 2] = 1
    shift = MatrixTransform(shift[None])
    x = torch.zeros(1, 2, 1)
    assert Composition(double, shift)(x)[0, 0, 0] == 2
    assert Composition(shift, double)(x)[0, 0, 0] == 1


def test_the_jacobian_of_a_foreign_map_is_its_own_whatever_its_names_are():
    """A closure over a phi and a psi need not be their composition."""
    phi, psi, _ = smooth_maps(2)

    def mean(x):
        return (phi(x) + psi(x)) / 2

    x = points(2)
    with torch.no_grad():
        jacobian = value_and_jacobian(mean, x)[1]
        expected = (phi.jacobian(x) + psi.jacobian(x)) / 2
    torch.testing.assert_close(jacobian, expected)


def test_the_jacobian_of_a_foreign_map_reaches_its_weights():
    shear = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def phi(x):
        return torch.stack([x[:, 0] + shear * x[:, 1] ** 2, x[:, 1]], 1)

    x = torch.rand(1, 2, 5, dtype=torch.float64)
    jacobian = value_and_jacobian(phi, x)[1]
    torch.testing.assert_close(jacobian[:, 0, 1], 2 * shear * x[:, 1])
    (gradient,) = torch.autograd.grad(jacobian[:, 0, 1].sum(), shear)
    torch.testing.assert_close(gradient, 2 * x[:, 1].sum())


def test_jacobians_do_not_ask_for_gradients_when_they_are_off():
    for problem in PROBLEMS:
        with torch.no_grad():
            maps = laws.maps_of(problem.make(2), *images(2, 1, torch.float64))
            for tensor in value_and_jacobian(maps[0], points(2)):
                assert not tensor.requires_grad, problem.name


def test_function_from_neural_field_reads_the_code_of_its_images():
    net, field = Encoder(2), mlp(2)
    torch.nn.init.normal_(field.last.weight)
    module = FunctionFromNeuralField(net, field)
    image_A, image_B = images(2)
    x = points(2, dtype=torch.float32)
    expected = NeuralTransform(field, net(image_A, image_B))(x)
    assert torch.equal(module(image_A, image_B)(x), expected)
    assert not torch.equal(module(image_B, image_A)(x), expected)


def test_nephi_has_one_code_and_two_fields():
    field_AB, field_BA = mlp(2), mlp(2)
    for field in (field_AB, field_BA):
        torch.nn.init.normal_(field.last.weight)
    table = LatentCodeTable(2, grids=[(3, 4)], channels=[4], global_size=2)
    phi_AB, phi_BA = NePhi(table, field_AB, field_BA)(*images(2))
    x = points(2, dtype=torch.float32)
    code = table(*images(2))
    assert torch.equal(phi_AB(x), NeuralTransform(field_AB, code)(x))
    assert torch.equal(phi_BA(x), NeuralTransform(field_BA, code)(x))


def test_two_step_pair_shows_the_second_network_the_warped_image(dimension):
    first = Problem("first", nephi).make(dimension, torch.float32)
    second = Problem("second", nephi).make(dimension, torch.float32)
    module = TwoStepPair(first, second)
    module.assign_identity_map([1, 1, *SHAPES[dimension]])
    image_A, image_B = images(dimension)
    phi_AB, phi_BA = first(image_A, image_B)
    warped = first.as_function(image_A)(phi_AB(module.identity_map))
    psi_AB, psi_BA = second(warped, image_B)
    both_AB, both_BA = module(image_A, image_B)
    x = points(dimension, dtype=torch.float32)
    torch.testing.assert_close(both_AB(x), phi_AB(psi_AB(x)))
    torch.testing.assert_close(both_BA(x), psi_BA(phi_BA(x)))
    # The single network's two steps are ICON's.
    single = icon.TwoStepRegistration(FirstTransform(first), FirstTransform(second))
    single.assign_identity_map([1, 1, *SHAPES[dimension]])
    torch.testing.assert_close(single(image_A, image_B)(x), both_AB(x))


def test_affine_pair_is_its_matrix_behind_an_untrained_network(dimension):
    matrix = torch.eye(dimension + 1, dtype=torch.float64)
    matrix[:dimension] += 0.1 * torch.randn(dimension, dimension + 1)
    net = Problem("pair", nephi).make(dimension, alive=False)
    pair = AffinePair(net, matrix)
    phi_AB, phi_BA = pair(*images(dimension, 2, torch.float64))
    x = points(dimension, 1)
    expected = MatrixTransform(matrix[None])(x)
    torch.testing.assert_close(phi_AB(x)[1:], expected)
    torch.testing.assert_close(phi_BA(phi_AB(x)), x.expand(2, *x.shape[1:]))


def test_affine_pair_takes_images_of_different_grids():
    matrix = torch.eye(3)
    matrix[0, 2] = 0.1
    table = LatentCodeTable(grids=[(4, 4)], channels=[2], global_size=1)
    pair = AffinePair(NePhi(table, mlp(2, 3), mlp(2, 3)), matrix)
    phi_AB, _ = pair(torch.rand(1, 1, 8, 6), torch.rand(1, 1, 5, 9))
    moved = phi_AB(identity_map((5, 9)))
    torch.testing.assert_close(moved[0, 0], identity_map((5, 9))[0, 0] + 0.1)


@pytest.mark.gpu
@over(OURS)
def test_on_a_gpu_it_is_the_same_map(problem, dimension):
    module = problem.make(dimension)
    pair = images(dimension, 2, torch.float64)
    x = points(dimension, reach=0.2)
    expected = [value_and_jacobian(phi, x) for phi in laws.maps_of(module, *pair)]
    module.cuda()
    maps = laws.maps_of(module, *(image.cuda() for image in pair))
    for phi, (values, jacobian) in zip(maps, expected, strict=True):
        found = value_and_jacobian(phi, x.cuda())
        assert found[0].is_cuda
        assert found[1].is_cuda
        torch.testing.assert_close(found[0].cpu(), values)
        torch.testing.assert_close(found[1].cpu(), jacobian)


def test_voxel_maps_are_trained_where_grid_sample_is_derived_once(
    dimension, generator, monkeypatch
):
    field = torch.rand(1, dimension, *(6,) * dimension, generator=generator) * 0.1
    field.requires_grad_()
    x = torch.rand(1, dimension, 300, generator=generator) * 0.9 + 0.05

    def phi(x):
        return x + sample_image(field, x)

    def loss_and_gradient():
        values, jacobian = value_and_jacobian(phi, x)
        jacobian.square().mean().backward()
        found, field.grad = field.grad, None
        return values.detach(), jacobian.detach(), found

    values, jacobian, gradient = loss_and_gradient()
    monkeypatch.setattr(derivatives, "_derives_twice", lambda: False)
    again = loss_and_gradient()
    torch.testing.assert_close(again[0], values)
    torch.testing.assert_close(again[1], jacobian)
    # Differences across the border of a voxel are between both sides'.
    assert (again[2] - gradient).norm() < 0.05 * gradient.norm()
