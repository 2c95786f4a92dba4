"""Neural fields in ICON's networks: residuals after them, steps in them replaced."""

import icon_registration as icon
import pytest
import torch
from torch import nn

from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.maps.networks import FunctionFromNeuralField
from icon_nephi.maps.transforms import value_and_jacobian
from icon_nephi.swap import BothDirections, add_neural_residual, swap_fields
from tests.maps.problems import images, nephi, neural, voxels

SHAPES = {2: (9, 12), 3: (8, 9, 7)}


def pretrained(dimension, loss=False):
    """ICON's nesting: half resolution, full, full again; with voxel fields."""
    torch.manual_seed(5)
    inner = icon.TwoStepRegistration(
        icon.DownsampleRegistration(voxels(dimension), dimension), voxels(dimension)
    )
    net = icon.TwoStepRegistration(inner, voxels(dimension))
    for module in net.modules():
        if hasattr(module, "last"):
            nn.init.normal_(module.last.weight, std=0.05)
    if loss:
        net = icon.losses.GradientICONSparse(net, icon.LNCC(sigma=2), 1.5)
    net.assign_identity_map([1, 1, *SHAPES[dimension]])
    return net


def pair(dimension, batch=1):
    return images(dimension, batch, shape=SHAPES[dimension])


@pytest.mark.parametrize("dimension", [2, 3])
def test_a_fresh_residual_leaves_the_map_as_it_was(dimension):
    net = pretrained(dimension)
    A, B = pair(dimension)
    with torch.no_grad():
        expected = net(A, B)(net.identity_map), net(B, A)(net.identity_map)
        model = add_neural_residual(net)
        maps = model.regis_net(A, B)
        for phi, there in zip(maps, expected, strict=True):
            torch.testing.assert_close(phi(net.identity_map), there)
        assert (expected[0] - net.identity_map).abs().max() > 0.01


def test_only_the_residual_is_trained_when_the_network_is_frozen():
    net = pretrained(3, loss=True)
    model = add_neural_residual(net, residual=nephi(3))
    model.train()
    assert not model.regis_net.netPhi.net.training
    A, B = pair(3)
    model(A, B).all_loss.backward()
    graded = {k for k, p in model.named_parameters() if p.grad is not None}
    assert graded
    assert all(name.startswith("regis_net.netPsi.") for name in graded)


def test_a_network_that_is_not_frozen_learns_with_its_residual():
    model = add_neural_residual(pretrained(2), residual=nephi(2), freeze=False)
    model(*pair(2)).all_loss.backward()
    assert model.regis_net.netPhi.net.netPsi.net.last.weight.grad.abs().max() > 0


def test_each_direction_is_the_others_counterpart():
    A, B = pair(2)
    net = pretrained(2)
    residual = nephi(2)
    for field in (residual.field_AB, residual.field_BA):
        nn.init.normal_(field.last.weight, std=0.1)
    model = add_neural_residual(net, residual=residual)
    x = net.identity_map
    with torch.no_grad():
        phi_AB, phi_BA = model.regis_net(A, B)
        pre_AB, pre_BA = net(A, B), net(B, A)
        warped = net.as_function(A)(pre_AB(x))
        psi_AB, psi_BA = residual(warped, B)
        torch.testing.assert_close(phi_AB(x), pre_AB(psi_AB(x)))
        torch.testing.assert_close(phi_BA(x), psi_BA(pre_BA(x)))


def test_jacobians_run_through_the_voxel_field():
    model = add_neural_residual(pretrained(2), residual=nephi(2)).double()
    for module in model.modules():  # ICON's are not moved by double()
        if hasattr(module, "identity_map"):
            module.identity_map = module.identity_map.double()
    nn.init.normal_(model.regis_net.netPsi.field_AB.last.weight, std=0.1)
    A, B = (i.double() for i in pair(2))
    phi, _ = model.regis_net(A, B)
    torch.manual_seed(0)
    x = 0.2 + 0.6 * torch.rand(1, 2, 20, 1, dtype=torch.float64)
    found = value_and_jacobian(phi, x)[1]
    h = 1e-6
    for axis in range(2):
        step = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
        step[:, axis] = h
        slope = (phi(x + step) - phi(x - step)) / (2 * h)
        torch.testing.assert_close(found[:, :, axis], slope, rtol=1e-4, atol=1e-5)


def test_a_residual_on_a_pair_network():
    model = add_neural_residual(with_grid(nephi(2)))
    assert isinstance(model.regis_net.netPhi, BothDirections)
    maps = model.regis_net(*pair(2))
    assert len(maps) == 2


def with_grid(net):
    net.assign_identity_map([1, 1, *SHAPES[2]])
    return net


def test_a_network_without_identity_map_is_refused():
    with pytest.raises(ValueError, match="no identity map; call assign_identity_map"):
        add_neural_residual(voxels(2))
    with pytest.raises(ValueError, match="no identity map"):
        swap_fields(icon.TwoStepRegistration(voxels(2), voxels(2)))


@pytest.mark.parametrize("dimension", [2, 3])
def test_the_last_step_is_swapped_and_every_other_weight_stays(dimension):
    net = pretrained(dimension, loss=True)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    changed = swap_fields(net)
    assert changed is net
    assert net.swapped_fields == ("regis_net.netPsi",)
    assert isinstance(net.regis_net.netPsi, FunctionFromNeuralField)
    after = net.state_dict()
    kept = {k for k in before if not k.startswith("regis_net.netPsi.")}
    assert len(kept) == len(before) - 2
    assert all(torch.equal(before[k], after[k]) for k in kept)
    A, B = pair(dimension)
    loss = net(A, B)
    loss.all_loss.backward()
    assert loss.all_loss.isfinite()


def test_all_steps_may_share_a_field():
    net = swap_fields(pretrained(2), which="all", share=True)
    steps = [m for m in net.modules() if isinstance(m, FunctionFromNeuralField)]
    assert len(steps) == len(net.swapped_fields) == 3
    assert len({id(step.field) for step in steps}) == 1
    assert len({id(step.net) for step in steps}) == 3
    apart = swap_fields(pretrained(2), which="all")
    steps = [m for m in apart.modules() if isinstance(m, FunctionFromNeuralField)]
    assert len({id(step.field) for step in steps}) == 3


def test_steps_are_swapped_by_name_with_ones_own_maker():
    shapes = []

    def make(shape):
        shapes.append(shape)
        return neural(2)

    net = swap_fields(pretrained(2), ["netPhi.netPhi.net"], make)
    assert isinstance(net.netPhi.netPhi.net, FunctionFromNeuralField)
    assert shapes == [[1, 1, 5, 6]]
    assert isinstance(net.netPsi, icon.FunctionFromVectorField)


def test_a_single_field_is_swapped_too():
    net = swap_fields(with_grid(voxels(2)))
    assert isinstance(net, FunctionFromNeuralField)
    assert net(*pair(2))(net.identity_map).shape == (1, 2, *SHAPES[2])


def test_what_cannot_be_swapped_is_refused():
    with pytest.raises(ValueError, match="'netPhi' is a TwoStepRegistration of net"):
        swap_fields(pretrained(2), "netPhi")
    with pytest.raises(ValueError, match="'psi' is no module of net"):
        swap_fields(pretrained(2), ["psi"])
    with pytest.raises(ValueError, match="holds no FunctionFromVectorField"):
        swap_fields(with_grid(neural(2)))
    with pytest.raises(ValueError, match="share"):
        swap_fields(pretrained(2), make=lambda shape: neural(2), share=True)


def test_the_model_is_a_sampled_loss():
    assert isinstance(add_neural_residual(pretrained(2)), GradientICONPoints)
