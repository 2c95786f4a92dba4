"""The optimisation of one pair."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from icon_registration.losses import ICONLoss

from icon_nephi.fit.optimize import FitOptions, Stage, optimize
from icon_nephi.space.frames import identity_map
from icon_nephi.space.images import gaussian_blur, sample_image
from icon_nephi.space.sampling import Points
from tests.fit.small_runs import a_loss, blobs, run


@pytest.mark.parametrize("sigma", [0.5, 1.3, 2.0])
def test_blurring_is_scipys(dimension, sigma):
    image = torch.rand(1, 1, *(16, 14, 15)[:dimension], dtype=torch.float64)
    sigmas = [sigma, 0.0, 0.7 * sigma][:dimension]
    expected = image[0, 0].numpy()
    for axis, s in enumerate(sigmas):
        if s >= 0.3:
            expected = scipy.ndimage.gaussian_filter1d(
                expected, s, axis, mode="nearest", radius=int(np.ceil(2.5 * s))
            )
    before = image.clone()
    np.testing.assert_allclose(
        gaussian_blur(image, sigmas)[0, 0].numpy(), expected, rtol=1e-10
    )
    assert torch.equal(image, before)


def test_blurring_keeps_constants_batches_and_channels(dimension, precision):
    image = torch.full((2, 3, *(5, 9, 4)[:dimension]), 0.7, dtype=precision.dtype)
    blurred = gaussian_blur(image, [3.0] * dimension)
    assert blurred.shape == image.shape
    precision.close(blurred, image)


def test_a_little_blur_is_none():
    image = torch.rand(1, 1, 6, 6)
    assert torch.equal(gaussian_blur(image, [0.1, 0.0]), image)


def test_the_loss_goes_down_and_the_images_meet(dimension):
    course, loss = run(dimension, 60)
    history = course.losses
    assert len(history) == 60
    assert set(history[0]) == set(ICONLoss._fields)
    start = np.mean([h["similarity_loss"] for h in history[:5]])
    end = np.mean([h["similarity_loss"] for h in history[-5:]])
    assert end < 0.5 * start
    shape = (20, 17, 18)[:dimension]
    with torch.no_grad():
        moved = loss.phi_AB(identity_map(shape))
    fixed = blobs(shape)
    before = (blobs(shape, 0.05) - fixed).square().mean()
    after = (sample_image(blobs(shape, 0.05), moved) - fixed).square().mean()
    assert after < 0.5 * before


def test_the_same_seed_is_the_same_history_bit_for_bit():
    torch.manual_seed(1)
    first = run(steps=6, seed=4)[0]
    torch.manual_seed(2)
    assert run(steps=6, seed=4)[0] == first
    assert run(steps=6, seed=5)[0] != first


def test_a_callback_sees_every_step():
    seen = []
    history = run(steps=6, callback=lambda *step: seen.append(step))[0].losses
    assert [number for number, _ in seen] == [1, 2, 3, 4, 5, 6]
    for (_, result), entry in zip(seen, history, strict=True):
        assert isinstance(result, ICONLoss)
        assert float(result.all_loss.detach()) == entry["all_loss"]


def test_a_time_limit_stops_early():
    options = FitOptions(progress=False, time_limit=0.05)
    assert 1 <= len(run(steps=5000, options=options)[0].losses) < 1000


def test_masks_of_any_kind_are_taken():
    shape = (20, 17)
    mask = torch.zeros(1, 1, *shape)
    mask[..., 4:12, 5:9] = 3
    history = run(steps=4, mask_A=mask, mask_B=mask.bool())[0].losses
    assert all(np.isfinite(list(entry.values())).all() for entry in history)


def test_blur_is_in_the_units_of_the_spacing():
    fine = run(steps=4, spacing_A=[1.0, 1.0], spacing_B=[1.0, 1.0])[0]
    assert run(steps=4)[0] == fine
    assert run(steps=4, spacing_A=[0.2, 0.2], spacing_B=[0.2, 0.2])[0] != fine


def test_images_and_their_inputs_are_left_alone():
    shape = (20, 17)
    image_A, image_B = blobs(shape, 0.05), blobs(shape)
    copies = image_A.clone(), image_B.clone()
    loss = a_loss(2)
    groups = [{"params": list(loss.parameters()), "lr": 0.01}]
    optimize(loss, image_A, image_B, [Stage(2, Points(9), 2.0)], groups)
    assert torch.equal(image_A, copies[0])
    assert torch.equal(image_B, copies[1])
