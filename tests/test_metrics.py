"""The measures against closed forms, brute force and ICON's own count."""

import math

import icon_registration.losses as icon_losses
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.distance import cdist

from icon_nephi.metrics import (
    dice,
    flips_percentage,
    fold_fraction,
    jacobian_determinant_of_displacement,
    summarize,
    surface_distance,
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


# ---- surfaces


def test_surface_distance_of_two_points_is_their_distance():
    first, second = np.zeros((2, 9, 9, 9), np.uint8)
    first[2, 3, 4] = second[5, 3, 6] = 7
    distance = surface_distance(first, second, (2.0, 1.0, 4.0))[7]
    assert distance == pytest.approx((10.0, 10.0))
    assert surface_distance(first, first, (2.0, 1.0, 4.0))[7] == (0.0, 0.0)


@pytest.mark.parametrize("spacing", [(1.5, 0.7), (1.5, 0.7, 2.0)])
def test_surface_distance_by_brute_force(spacing):
    d = len(spacing)
    generator = np.random.default_rng(d)
    noise = generator.normal(size=(2, *[16] * d))
    masks = [ndimage.gaussian_filter(n, 2) > 0.02 for n in noise]
    faces = ndimage.generate_binary_structure(d, 1)
    borders = [
        np.argwhere(m & ~ndimage.binary_erosion(m, faces)) * spacing for m in masks
    ]
    between = cdist(*borders)
    one, two = between.min(1), between.min(0)
    expected = (
        np.concatenate((one, two)).mean(),
        max(np.percentile(one, 95), np.percentile(two, 95)),
    )
    found = surface_distance(masks[0], torch.tensor(masks[1]), spacing)
    assert list(found) == [1]
    assert found[1] == pytest.approx(expected, rel=1e-5)
    assert found[1].hausdorff95 > found[1].mean > 0


def test_a_label_without_a_surface_has_no_distance():
    first, second = np.zeros((2, 5, 5), int)
    first[2, 2] = 1
    assert all(math.isnan(v) for v in surface_distance(first, second, (1, 1))[1])
    assert surface_distance(first, second, (1, 1), labels=[]) == {}


def test_surfaces_that_do_not_fit_are_refused():
    labels = np.ones((5, 5), int)
    with pytest.raises(ValueError, match=r"spacing must be 2 positive numbers"):
        surface_distance(labels, labels, (1, 1, 1))
    with pytest.raises(ValueError, match=r"labels_1 must have 2 or 3 axes"):
        surface_distance(labels[None, None], labels[None, None], (1, 1))


# ---- folds


@pytest.mark.parametrize("scheme", ["central", "forward", "backward"])
@pytest.mark.parametrize("spacing", [(0.5, 2.0), (0.5, 2.0, 3.0)])
def test_jacobian_of_an_affine_map_is_its_determinant(spacing, scheme):
    d = len(spacing)
    generator = torch.Generator().manual_seed(d)
    matrix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    x = voxels((5, 6, 7)[:d]) * torch.tensor(spacing).view(d, *[1] * d)
    displacement = torch.einsum("ij,j...->i...", matrix, x) - x
    found = jacobian_determinant_of_displacement(displacement, spacing, scheme)
    shape = (5, 6, 7)[:d] if scheme == "central" else (4, 5, 6)[:d]
    assert found.shape == shape
    torch.testing.assert_close(found, torch.det(matrix).expand(shape))


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
    # The same folds, counted by determinants of the displacement.
    scheme = "forward" if d == 2 else "backward"
    determinants = [
        jacobian_determinant_of_displacement(u, [1] * d, scheme)
        for u in strength * noise
    ]
    share = np.mean([fold_fraction(x) for x in determinants])
    assert 100 * share == pytest.approx(expected, abs=1e-4)


def test_fold_fraction_of_known_determinants():
    assert fold_fraction(torch.tensor([1.0, 0.0, -1.0, 2.0])) == 0.5
    assert fold_fraction(np.array([1.0, np.nan])) == 0.5
    assert fold_fraction(torch.ones(4, 4)) == 0.0
    with pytest.raises(ValueError, match="determinants must hold a number"):
        fold_fraction(torch.ones(0))


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"displacement must be .* u\[0\]"):
        jacobian_determinant_of_displacement(torch.zeros(1, 3, 4, 4, 4), [1] * 3)
    with pytest.raises(ValueError, match="scheme must be"):
        jacobian_determinant_of_displacement(torch.zeros(2, 4, 4), [1, 1], "upwind")
    with pytest.raises(ValueError, match="spacing must be 2 positive"):
        jacobian_determinant_of_displacement(torch.zeros(2, 4, 4), [1, 0])
    with pytest.raises(ValueError, match=r"phi_vectorfield must be"):
        flips_percentage(torch.zeros(3, 4, 4, 4))
