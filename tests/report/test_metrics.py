"""The measures against closed forms, brute force and ICON's own count."""

import math

import icon_registration.losses as icon_losses
import numpy as np
import pytest
import torch

from icon_nephi.maps.jacobians import fold_fraction
from icon_nephi.report.metrics import (
    dice,
    flips_percentage,
    summarize,
    target_registration_error,
)


def voxels(shape):
    """Voxel indices [d, *shape], float64."""
    axes = [torch.arange(n, dtype=torch.float64) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


# ---- landmarks


def test_landmark_errors_are_euclidean_distances():
    moved = torch.tensor([[0.0, 0, 0], [3, 4, 0], [1, 1, 1]], requires_grad=True)
    errors = target_registration_error(moved, np.array([[0, 0, 2], [0, 0, 0], [1] * 3]))
    np.testing.assert_allclose(errors, [2, 5, 0])


def test_summary_of_known_errors():
    summary = summarize(np.arange(101))
    assert summary == {"mean": 50.0, "median": 50.0, "p95": 95.0, "max": 100.0}


@pytest.mark.parametrize(
    ("moved", "true", "message"),
    [
        (np.zeros((4, 3)), np.zeros((5, 3)), r"\(4, 3\) and \(5, 3\)"),
        (np.zeros((3, 7)), np.zeros((3, 7)), r"\[N, 3\]"),
        (
            np.full((4, 3), np.nan),
            np.zeros((4, 3)),
            "points_moved and points_true must be finite, got 12",
        ),
        (
            np.zeros((4, 3)),
            np.full((4, 3), np.inf),
            "points_moved and points_true must be finite",
        ),
    ],
)
def test_landmarks_that_do_not_fit_are_refused(moved, true, message):
    with pytest.raises(ValueError, match=message):
        target_registration_error(moved, true)


@pytest.mark.parametrize("errors", [np.zeros(0), np.array([1.0, np.nan])])
def test_no_or_broken_errors_have_no_summary(errors):
    with pytest.raises(ValueError, match="errors must"):
        summarize(errors)


# ---- overlap


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_dice_of_shifted_boxes(dtype):
    first, second = torch.zeros(2, 1, 1, 20, 20, dtype=dtype)
    first[..., 2:12, 2:12] = 1
    second[..., 4:14, 2:12] = 1
    second[..., 18:, :] = 5
    assert dice(first, second) == {1: 0.8, 5: 0.0}
    assert dice(second.numpy(), first) == {1: 0.8, 5: 0.0}
    assert dice(first, first) == {1: 1.0}


def test_dice_of_chosen_labels():
    first = np.array([0, 1, 1, 2, 3, 3, 3, 0])
    second = np.array([0, 1, 1, 0, 3, 3, 0, 4])
    assert dice(first, second) == {1: 1.0, 2: 0.0, 3: 0.8, 4: 0.0}
    assert dice(first, second, minimum_size=2) == {1: 1.0, 3: 0.8}
    assert dice(first, second, labels=[3]) == {3: 0.8}
    assert math.isnan(dice(first, second, labels=[9])[9])
    assert dice(first > 0, second > 0) == {1: pytest.approx(8 / 11)}


def test_a_lost_label_still_counts():
    first, second = np.ones(50, int), np.zeros(50, int)
    assert dice(first, second, minimum_size=20) == {1: 0.0}


def test_label_maps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"labels_2 must have the shape"):
        dice(np.zeros((3, 3), int), np.zeros((3, 4), int))
    with pytest.raises(ValueError, match=r"labels_2 must hold integers, got float32"):
        dice(np.zeros((3, 3), int), torch.zeros(3, 3))


# ---- folds


@pytest.mark.parametrize("shape", [(9, 11), (7, 8, 9)])
@pytest.mark.parametrize("strength", [0.0, 0.3, 2.0])
def test_flips_are_counted_as_icon_counts_them(shape, strength):
    d = len(shape)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, d, *shape, generator=generator, dtype=torch.float64)
    phi = voxels(shape) + strength * noise
    expected = float(icon_losses.flips(phi, in_percentage=True))
    assert flips_percentage(phi) == pytest.approx(expected, abs=1e-4)
    assert (expected > 0) == (strength > 0)


def test_fold_fraction_of_known_determinants():
    assert fold_fraction(torch.tensor([1.0, 0.0, -1.0, 2.0])) == 0.5
    assert fold_fraction(np.array([1.0, np.nan])) == 0.5
    assert fold_fraction(torch.ones(4, 4)) == 0.0
    with pytest.raises(ValueError, match="determinants must hold a number"):
        fold_fraction(torch.ones(0))


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"phi_vectorfield must be"):
        flips_percentage(torch.zeros(3, 4, 4, 4))
