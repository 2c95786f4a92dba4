"""Self-similarity features: what changes them, what does not; images made coarser."""

from dataclasses import replace

import pytest
import torch

from icon_nephi.fit.content import coarser
from icon_nephi.fit.settings import GRID
from icon_nephi.losses.features import FeatureDifference, turned, with_features
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.phantoms import triangles_and_circles
from icon_nephi.space.frames import Geometry, identity_map
from icon_nephi.space.images import gaussian_blur, sample_image
from icon_nephi.space.intensities import PreparedImage
from tests.small_fits import fit_tensors

SHAPES = {2: (24, 30), 3: (14, 16, 15)}


def image(dimension, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(1, 1, *SHAPES[dimension], generator=generator)
    smooth = gaussian_blur(noise, [1.5] * dimension)
    return (smooth - smooth.min()) / (smooth.max() - smooth.min())


@pytest.mark.parametrize(("dimension", "count"), [(2, 4), (3, 12)])
def test_features_stand_beside_the_image(dimension, count):
    x = image(dimension)
    both = with_features(x)
    assert both.shape == (1, 1 + count, *SHAPES[dimension])
    assert torch.equal(both[:, :1], x)
    features = both[:, 1:]
    assert features.min() >= 0
    assert features.max() <= 1
    # The most alike pair of neighbours of every voxel has 1.
    torch.testing.assert_close(features.amax(1), torch.ones_like(features[:, 0]))


@pytest.mark.parametrize("dimension", [2, 3])
def test_contrast_and_brightness_do_not_matter(dimension):
    x = image(dimension)
    features = with_features(x)[:, 1:]
    for other in (0.2 + 0.5 * x, 1 - x):
        torch.testing.assert_close(
            with_features(other)[:, 1:], features, atol=1e-3, rtol=0
        )
    away = with_features(image(dimension, seed=1))[:, 1:]
    assert (away - features).abs().mean() > 0.05


def test_features_move_with_the_image():
    x = image(2)
    moved = torch.roll(x, 3, 3)
    inner = slice(8, -8)
    torch.testing.assert_close(
        torch.roll(with_features(x), 3, 3)[:, 1:, inner, inner],
        with_features(moved)[:, 1:, inner, inner],
        atol=0.05,
        rtol=0,
    )


def test_a_constant_image_has_features_without_nan():
    assert with_features(torch.ones(1, 1, 9, 9)).isfinite().all()


def test_the_difference_adds_to_the_similarity():
    a = with_features(image(3))
    tag = torch.ones_like(a[:, :1])
    ncc = PatchNCC(1e-3)
    both = FeatureDifference(ncc, 1, 10.0)
    alike = both(torch.cat([a, tag], 1), a)
    torch.testing.assert_close(alike, ncc(torch.cat([a[:, :1], tag], 1), a[:, :1]))
    other = a.clone()
    other[:, 1:] += 0.1
    worse = both(torch.cat([other, tag], 1), a)
    torch.testing.assert_close(worse - alike, torch.tensor(10 * 0.1**2))
    # What the map takes outside does not count.
    outside = both(torch.cat([other, 0 * tag], 1), a)
    assert outside.isfinite()


def test_large_images_are_read_coarser_in_the_same_box():
    x, mask = image(3), torch.zeros(1, 1, *SHAPES[3])
    mask[:, :, 4:10, 4:10, 4:10] = 1
    place = Geometry(
        SHAPES[3],
        (1.0, 1.0, 2.0),
        (5.0, -3.0, 1.0),
        tuple(map(tuple, torch.eye(3).tolist())),
    )
    image_A = PreparedImage.of(x, place, mask=mask)
    small = coarser(image_A, voxels=500)
    assert 300 < small.values.numel() < 700
    assert small.values.shape[2:] == small.place.size == small.mask.shape[2:]
    frames = (small.place.unit_to_physical(), place.unit_to_physical())
    torch.testing.assert_close(*frames)
    at = identity_map(small.place.size)
    torch.testing.assert_close(sample_image(x, at), small.values, atol=1e-4, rtol=0)
    assert set(small.mask.unique().tolist()) == {0, 1}
    assert coarser(image_A) is image_A


def test_a_pair_is_registered_with_features():
    drawn = triangles_and_circles(2, size=48, seed=3)
    images = (drawn.images + 1) / 2
    settings = replace(GRID, features=20.0, steps=80, patches=150)
    place = Geometry.unit((48, 48))
    fit = fit_tensors(images[:1], images[1:], place, place, field=settings)
    first, last = (x["similarity_loss"] for x in (fit.losses[0], fit.losses[-1]))
    assert last < 0.6 * first


@pytest.mark.parametrize("dimension", [2, 3])
def test_features_follow_the_axes_of_another_image(dimension, generator):
    """As of an image whose axes were swapped and mirrored before."""
    shape = (12, 13, 14)[:dimension]
    image = torch.rand(1, 2, *shape, generator=generator)
    order = (1, 0, 2)[:dimension] if dimension == 2 else (2, 0, 1)
    elsewhere = image.permute(0, 1, *(2 + a for a in order)).flip(2)
    # Axis j of this image lies along the axis of the other where order is j.
    matrix = torch.zeros(dimension, dimension)
    for axis, own in enumerate(order):
        matrix[axis, own] = -1.0 if axis == 0 else 1.0
    matrix = matrix + 0.1 * torch.randn(matrix.shape, generator=generator)
    turned_back = turned(with_features(elsewhere.contiguous()), matrix).flip(2)
    back = [order.index(a) for a in range(dimension)]
    found = turned_back.permute(0, 1, *(2 + a for a in back))
    torch.testing.assert_close(found, with_features(image))
    same = with_features(image)
    assert turned(same, torch.eye(dimension)) is same
