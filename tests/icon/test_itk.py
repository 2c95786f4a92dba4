"""ICON's bridges and trainers: masks, several modalities, monai, pictures, training."""

import sys
import types

import icon_registration as icon
import numpy as np
import pytest
import torch
from torch import nn

from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.maps.networks import FunctionFromNeuralField, NePhi
from icon_nephi.space.frames import identity_map
from icon_nephi.space.sampling import Points
from tests.icon_scans import (
    GRID,
    MILLIMETRES,
    as_icon_reads,
    coded,
    itk_image,
    millimetres_apart,
    through_itk,
)
from tests.maps.problems import (
    SHAPES,
    Encoder,
    Problem,
    conv,
    images,
    mlp,
    nephi,
    neural,
)


def points_model(network, shape, **options):
    model = GradientICONPoints(
        network,
        icon.losses.SSD(),
        0.1,
        similarity_sampler=Points(80),
        regularity_sampler=Points(20),
        generator=torch.Generator().manual_seed(1),
        **options,
    )
    model.assign_identity_map([1, 1, *shape])
    return model


def stock_model(network, shape):
    model = icon.GradientICON(network, icon.LNCC(sigma=1), 0.2)
    model.assign_identity_map([1, 1, *shape])
    return model


def pair_of(dimension, shape):
    return Problem("pair", nephi).make(dimension, torch.float32, shape=shape)


def single_of(dimension, shape):
    return Problem("single", neural).make(dimension, torch.float32, shape=shape)


# itk_wrapper


@pytest.mark.parametrize("steps", [None, 2], ids=["plain", "finetuned"])
@pytest.mark.parametrize("dice", [0.0, 0.5], ids=["masks", "masks_and_labels"])
def test_register_pair_with_mask(scans, steps, dice):
    itk, image_A, image_B = scans
    from icon_registration.itk_wrapper import register_pair_with_mask

    def map_like(image, seed, values):
        size = np.asarray(image).shape
        labels = np.random.default_rng(seed).integers(0, values, size)
        made = itk.image_from_array(labels.astype(np.float32))
        made.CopyInformation(image)
        return made

    maps = {
        "mask_A": map_like(image_A, 2, 2),
        "mask_B": map_like(image_B, 3, 2),
        "segmentation_A": map_like(image_A, 4, 4),
        "segmentation_B": map_like(image_B, 5, 4),
    }

    def make():
        return points_model(pair_of(3, GRID), GRID, dice_loss_weight=dice)

    model, twin = make(), make()
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    *transforms, loss = register_pair_with_mask(
        model,
        image_A,
        image_B,
        finetune_steps=steps,
        return_artifacts=True,
        learning_rate=1e-2,
        **maps,
    )
    given = {
        name: nn.functional.interpolate(
            torch.tensor(np.asarray(image))[None, None], size=GRID, mode="nearest"
        )
        for name, image in maps.items()
    }
    pair = as_icon_reads(image_A, image_B)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2)
    for _ in range(steps or 0):
        optimizer.zero_grad()
        twin(*pair, **given)[0].backward()
        optimizer.step()
    with torch.no_grad():
        expected = twin(*pair, **given)
    assert isinstance(loss, icon.losses.ICONLoss)
    assert loss == pytest.approx([float(number) for number in expected], rel=1e-4)
    for transform, phi, fixed, moving in (
        (transforms[0], twin.phi_AB, image_B, image_A),
        (transforms[1], twin.phi_BA, image_A, image_B),
    ):
        found = through_itk(transform, fixed, moving)
        moved = phi(twin.identity_map)
        assert millimetres_apart(found, moved, moving) < MILLIMETRES
    for key, value in model.state_dict().items():
        assert torch.equal(value, kept[key]), key


class ManyChannels(Encoder):
    def __init__(self, dimension, channels):
        super().__init__(dimension)
        self.conv = conv(dimension, 2 * channels, 6)


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("steps", [None, 2], ids=["plain", "finetuned"])
@pytest.mark.parametrize("kind", ["stock", "points"])
def test_register_pair_with_multimodalities(scans, channels, steps, kind):
    itk, image_A, image_B = scans
    from icon_registration.itk_wrapper import register_pair_with_multimodalities

    def build(d):
        encoder = ManyChannels(d, channels)
        if kind == "stock":
            return FunctionFromNeuralField(encoder, mlp(d))
        return NePhi(encoder, mlp(d), mlp(d))

    network = Problem("channels", build).make(3, torch.float32, shape=GRID)
    make = stock_model if kind == "stock" else points_model
    model = make(network, GRID)
    model.assign_identity_map([1, channels, *GRID])
    lists = [
        [image]
        + [
            itk_image(itk, s, np.asarray(image).shape, (1,) * 3, (0,) * 3)
            for s in range(6 + i, 5 + i + channels)
        ]
        for i, image in ((0, image_A), (10, image_B))
    ]
    *transforms, loss = register_pair_with_multimodalities(
        model, *lists, finetune_steps=steps, return_artifacts=True
    )
    assert isinstance(loss, icon.losses.ICONLoss)
    with torch.no_grad():
        pair = [torch.cat(as_icon_reads(*each), 1) for each in lists]
        model(*pair)
    for transform, phi, fixed, moving in (
        (transforms[0], model.phi_AB, image_B, image_A),
        (transforms[1], model.phi_BA, image_A, image_B),
    ):
        found = through_itk(transform, fixed, moving)
        apart = millimetres_apart(found, phi(model.identity_map), moving)
        assert (apart > 0) if steps else (apart < MILLIMETRES)
        assert apart < 1  # two small steps


@pytest.mark.parametrize("steps", [None, 1], ids=["plain", "finetuned"])
@pytest.mark.parametrize("make", [stock_model, points_model])
def test_register_pair_returns_artifacts(scans, steps, make):
    _, *pair = scans
    from icon_registration.itk_wrapper import register_pair

    model = make(single_of(3, GRID), GRID)
    phi_AB, phi_BA, loss = register_pair(
        model, *pair, finetune_steps=steps, return_artifacts=True
    )
    assert type(phi_AB) is type(phi_BA)
    assert isinstance(loss, icon.losses.ICONLoss)
    assert all(isinstance(number, float) for number in loss)


# monai_wrapper


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("make", [stock_model, points_model])
def test_monai_displacements_are_ours_in_voxels(dimension, batch, make):
    from icon_registration import monai_wrapper

    shape = SHAPES[dimension]
    network = single_of(dimension, shape)
    pair = images(dimension, batch)
    size = torch.tensor(shape).reshape(1, -1, *(1,) * dimension)
    phi, x = network(*pair), network.identity_map
    expected = size * (phi(x) - x)  # n, where n - 1 would be right: ICON's choice
    found = monai_wrapper.make_ddf_from_icon_transform(phi, x)
    torch.testing.assert_close(found, expected)
    plain = monai_wrapper.make_ddf_using_icon_module(network, *pair)
    torch.testing.assert_close(plain, expected)
    model = make(network, shape)
    field, loss = monai_wrapper.make_ddf_using_icon_module(model, *pair)
    torch.testing.assert_close(field, expected)
    (loss.all_loss + field.square().mean()).backward()
    assert all(weight.grad is not None for weight in network.parameters())


# Trainers and pictures


@pytest.fixture
def tensorboard(tmp_path, monkeypatch):
    """What footsteps and tensorboard are told, without their files."""
    footsteps = types.SimpleNamespace(output_dir=f"{tmp_path}/")
    monkeypatch.setitem(sys.modules, "footsteps", footsteps)
    monkeypatch.setenv("FOOTSTEPS_NAME", "test")
    monkeypatch.chdir(tmp_path)
    from torch.utils.tensorboard import SummaryWriter

    shown = {}
    monkeypatch.setattr(
        SummaryWriter,
        "add_images",
        lambda self, name, image, *_, **__: shown.setdefault(name, image),
    )
    return tmp_path, shown


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("make", [stock_model, points_model])
def test_icons_trainer_saves_and_validates(tensorboard, dimension, batch, make):
    from icon_registration.train import train_batchfunction

    folder, shown = tensorboard
    model = make(single_of(dimension, SHAPES[dimension]), SHAPES[dimension])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seen = []
    train_batchfunction(
        nn.DataParallel(model),
        optimizer,
        lambda: images(dimension, batch),
        steps=2,
        step_callback=seen.append,
        unwrapped_net=model,
    )
    assert seen == [model, model]
    assert model.training
    assert (folder / "optimizer_weights_0").exists()
    saved = torch.load(folder / "network_weights_0")
    other = single_of(dimension, SHAPES[dimension])
    other.load_state_dict(saved, strict=True)
    assert set(shown) == {
        "moving_image",
        "fixed_image",
        "warped_moving_image",
        "difference",
    }
    expected = (batch, 3, *SHAPES[dimension][:2])
    assert {tuple(image.shape) for image in shown.values()} == {expected}
    assert all(image.isfinite().all() for image in shown.values())


@pytest.mark.parametrize("make", [stock_model, points_model])
def test_icons_quick_trainer_takes_every_loss(dimension, make):
    from icon_registration.train import train_datasets

    model = make(single_of(dimension, SHAPES[dimension]), SHAPES[dimension])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    image_A, image_B = images(dimension, 2)
    history = train_datasets(model, optimizer, [[image_A]], [[image_B]], epochs=2)
    assert [type(entry) for entry in history] == [icon.losses.ICONLoss] * 2
    assert history[0] != history[1]


@pytest.mark.parametrize("kind", ["stock", "points", "table"])
def test_icon_draws_the_registration(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("MPLBACKEND", "agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from icon_registration import visualize

    shape = (12, 9)
    network = coded(2) if kind == "table" else single_of(2, shape)
    model = (stock_model if kind == "stock" else points_model)(network, shape)
    pair = images(2, 1, shape=shape)
    picture = tmp_path / "registration.png"
    figure = pyplot.figure
    monkeypatch.setattr(pyplot, "figure", lambda dpi: figure(dpi=40))
    try:
        visualize.visualizeRegistration(model, *pair, 0, picture)
        visualize.visualizeRegistrationCompact(model, *pair, 0)
    finally:
        pyplot.close("all")
    assert picture.stat().st_size > 1000
    field = model.phi_AB_vectorfield
    assert field.shape == (1, 2, *shape)
    assert kind == "table" or (field - identity_map(shape)).abs().max() > 1e-3
