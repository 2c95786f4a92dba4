"""icon_registration, unmodified, takes our networks: what it calls and gets back."""

import sys
import types

import icon_registration as icon
import numpy as np
import pytest
import torch

from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.maps.networks import (
    FirstTransform,
    FunctionFromNeuralField,
    TwoStepPair,
)
from icon_nephi.maps.transforms import value_and_jacobian
from icon_nephi.space.frames import identity_map
from icon_nephi.space.sampling import Patches, Points
from tests.icon_scans import (
    GRID,
    MILLIMETRES,
    as_icon_reads,
    coded,
    millimetres_apart,
    through_itk,
)
from tests.maps.problems import (
    SHAPES,
    Problem,
    images,
    nephi,
    neural,
    points,
    siren,
    two_neural_steps,
    voxels,
)

SEED = 11


def scattered(network):
    sampling = {
        "similarity_sampler": Patches(20, 3, 1.0),
        "regularity_sampler": Points(30),
        "generator": torch.Generator().manual_seed(SEED),
    }
    return GradientICONPoints(network, PatchNCC(), 0.2, **sampling)


def on_voxels(network):
    return icon.GradientICON(network, icon.losses.LNCC(sigma=1), 0.2)


MODELS = {
    "GradientICON_encoder_siren": (on_voxels, lambda d: neural(d, siren)),
    "GradientICON_encoder_mlp": (on_voxels, neural),
    "GradientICON_table": (on_voxels, lambda d: FirstTransform(coded(d))),
    "GradientICONPoints_encoder": (scattered, lambda d: nephi(d, siren)),
    "GradientICONPoints_table": (scattered, coded),
    "GradientICONPoints_single": (scattered, neural),
    "GradientICONPoints_two_steps": (
        scattered,
        lambda d: TwoStepPair(nephi(d), coded(d)),
    ),
}


def make_model(name, dimension=3, shape=GRID):
    """The model; always the same weights and generator."""
    loss, build = MODELS[name]
    network = Problem(name, build).make(dimension, torch.float32, shape=shape)
    model = loss(network)
    model.assign_identity_map([1, 1, *shape])
    return model


def maps_after(model, scans, steps, learning_rate):
    """Directly: fine-tune as ICON does, and hold on to the maps."""
    image_A, image_B = as_icon_reads(*scans)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(image_A, image_B)[0].backward()
        optimizer.step()
    with torch.no_grad():
        model(image_A, image_B)
        x = model.identity_map
        return model.phi_AB(x), model.phi_BA(x)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "tuning",
    [{}, {"finetune_steps": 3}, {"finetune_steps": 3, "learning_rate": 1e-2}],
    ids=["as_is", "finetuned", "finetuned_strongly"],
)
def test_register_pair_returns_the_models_map(scans, name, tuning):
    itk, *pair = scans
    from icon_registration.itk_wrapper import register_pair

    model = make_model(name)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(SEED)
    transforms = register_pair(model, *pair, **tuning)
    torch.manual_seed(SEED)
    rate = tuning.get("learning_rate", 2e-5)
    twin = make_model(name)
    expected = maps_after(twin, pair, tuning.get("finetune_steps", 0), rate)
    plain = maps_after(make_model(name), pair, 0, 0.0)
    for transform, phi, untuned, fixed, moving in zip(
        transforms, expected, plain, pair[::-1], pair, strict=True
    ):
        assert isinstance(transform, itk.CompositeTransform[itk.D, 3])
        found = through_itk(transform, fixed, moving)
        assert millimetres_apart(found, phi, moving) < MILLIMETRES
        change = millimetres_apart(found, untuned, moving)
        if tuning:
            strongly = "learning_rate" in tuning
            assert change > (100 if strongly else 2) * MILLIMETRES
        else:
            assert change < MILLIMETRES
            # The network is no identity, so the comparison means something.
            x = identity_map(GRID)
            assert millimetres_apart(found, x, moving) > 100 * MILLIMETRES
    # ICON puts the weights back.
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_register_pair_returns_the_loss_as_floats(scans):
    _, *pair = scans
    from icon_registration.itk_wrapper import register_pair

    model = make_model("GradientICONPoints_encoder")
    *_, loss = register_pair(model, *pair, finetune_steps=1, return_artifacts=True)
    assert isinstance(loss, icon.losses.ICONLoss)
    assert all(isinstance(number, float) for number in loss)


# ICON's wrappers around ours


@pytest.mark.parametrize(
    "child",
    [neural, lambda d: FirstTransform(nephi(d)), lambda d: FirstTransform(coded(d))],
    ids=["single", "first_of_pair", "first_of_table"],
)
def test_two_steps_mix_neural_fields_with_voxel_fields(dimension, child):
    def build(d):
        return icon.TwoStepRegistration(
            icon.TwoStepRegistration(
                icon.DownsampleRegistration(child(d), d), voxels(d)
            ),
            child(d),
        )

    module = Problem("mix", build).make(dimension)
    image_A, image_B = images(dimension, 2, torch.float64)
    phi = module(image_A, image_B)
    coarse, middle = module.netPhi.netPhi, module.netPhi.netPsi
    first = coarse(image_A, image_B)
    warped = module.as_function(image_A)(first(module.identity_map))
    second = middle(warped, image_B)
    warped = module.as_function(image_A)(first(second(module.identity_map)))
    third = module.netPsi(warped, image_B)
    x = points(dimension)
    torch.testing.assert_close(phi(x), first(second(third(x))))
    values, jacobian = value_and_jacobian(phi, x)
    torch.testing.assert_close(values, phi(x))
    jacobian.square().sum().backward()
    for name, weight in module.named_parameters():
        assert "field_BA" in name or weight.grad.abs().max() > 0, name


def test_assign_identity_map_reaches_the_children():
    module = icon.DownsampleRegistration(TwoStepPair(nephi(2), coded(2)), 2)
    module.assign_identity_map([1, 1, 12, 9])
    assert module.net.identity_map.shape == (1, 2, 6, 5)
    assert module.net.netPsi.identity_map.shape == (1, 2, 6, 5)


def find_velocity_fields(phi):
    """As constricon's, which cannot be imported where torchvision is broken."""
    if hasattr(phi, "velocity_field"):
        yield phi.velocity_field
    for cell in phi.__closure__:
        if hasattr(cell.cell_contents, "__closure__"):
            yield from find_velocity_fields(cell.cell_contents)


class Velocity(icon.RegistrationModule):
    """A map with a velocity field tacked on, as constricon's."""

    def forward(self, image_A, image_B):
        field = torch.zeros(2)

        def transform(x):
            return x + field.sum()

        transform.velocity_field = field
        return transform


@pytest.mark.parametrize(
    "build",
    [
        neural,
        lambda d: FunctionFromNeuralField(coded(d).net, wave_without_closure),
        lambda d: FirstTransform(nephi(d)),
        lambda d: FirstTransform(TwoStepPair(nephi(d), nephi(d))),
        lambda d: icon.TwoStepRegistration(neural(d), voxels(d)),
        two_neural_steps,
    ],
    ids=["single", "plain_function", "pair", "two_step_pair", "two_steps", "three"],
)
def test_the_closures_of_maps_can_be_walked(build):
    for live in (True, False):
        with torch.set_grad_enabled(live):
            module = Problem("walked", build).make(2, torch.float32)
            assert list(find_velocity_fields(module(*images(2)))) == []


def wave_without_closure(points, values):
    return 0 * points


def test_velocity_fields_behind_ours_are_found():
    module = icon.TwoStepRegistration(
        icon.TwoStepRegistration(Velocity(), neural(2)), Velocity()
    )
    module.assign_identity_map([1, 1, *SHAPES[2]])
    assert len(list(find_velocity_fields(module(*images(2))))) == 2


# ICON's losses and trainers


@pytest.mark.parametrize(
    "loss",
    [
        icon.GradientICON,
        icon.losses.GradientICONSparse,
        icon.InverseConsistentNet,
        icon.losses.BendingEnergyNet,
        icon.losses.DiffusionRegularizedNet,
    ],
    ids=lambda loss: loss.__name__,
)
@pytest.mark.parametrize(
    "similarity", [icon.losses.SSD(), icon.losses.SSDOnlyInterpolated()]
)
def test_icons_losses_go_forward_and_backward(dimension, loss, similarity):
    network = Problem("single", neural).make(dimension, torch.float32)
    network.chunk_size = 50  # so that dense maps are made in pieces
    model = loss(network, similarity, 1.0)
    model.assign_identity_map([1, 1, *SHAPES[dimension]])
    result = model(*images(dimension, 2))
    result.all_loss.backward()
    assert result.all_loss.isfinite()
    for name, weight in model.named_parameters():
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", MODELS)
def test_batches_may_be_sliced_to_nothing(name):
    """ICON's trainer validates on [i : i + 1] for i in 0..3, whatever the batch."""
    model = make_model(name, 2, SHAPES[2]).eval()
    image_A, image_B = images(2, 1)
    warped = []
    with torch.no_grad():
        for i in range(4):
            part = slice(i, i + 1)
            model(image_A[part], image_B[part])
            warped.append(model.warped_image_A)
    assert torch.cat(warped).shape == image_A.shape


@pytest.mark.parametrize(
    "name",
    ["GradientICON_encoder_mlp", "GradientICONPoints_encoder"],
)
def test_icons_trainer_trains(name, tmp_path, monkeypatch):
    # The real footsteps may be set up only once a process, and asks who we are.
    footsteps = types.SimpleNamespace(output_dir=f"{tmp_path}/")
    monkeypatch.setitem(sys.modules, "footsteps", footsteps)
    monkeypatch.setenv("FOOTSTEPS_NAME", "test")
    monkeypatch.chdir(tmp_path)
    from icon_registration.train import train_batchfunction

    model = make_model(name, 2, SHAPES[2])
    before = [weight.clone() for weight in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train_batchfunction(model, optimizer, lambda: images(2, 2), steps=1)
    for old, new in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, new)
    saved = torch.load(tmp_path / "network_weights_0")
    make_model(name, 2, SHAPES[2]).regis_net.load_state_dict(saved, strict=True)


def test_icons_quick_trainer_lowers_the_loss():
    from icon_registration.train import train_datasets

    model = make_model("GradientICONPoints_encoder", 2, SHAPES[2])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    image_A, image_B = images(2, 2)
    data = [[image_A]], [[image_B]]
    history = train_datasets(model, optimizer, *data, epochs=20)
    losses = [entry.all_loss for entry in history]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_data_parallel_style_replicas_make_the_same_map():
    """A deep copy is the same map, and its own."""
    import copy

    model = make_model("GradientICONPoints_table")
    twin = copy.deepcopy(model.regis_net)
    x = points(3, dtype=torch.float32)
    pair = images(3, 1, shape=GRID)
    with torch.no_grad():
        expected = model.regis_net(*pair)[0](x)
        for weight in model.parameters():
            weight.add_(1)
        assert torch.equal(twin(*pair)[0](x), expected)
