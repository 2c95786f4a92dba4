"""The affine start, features and determinants on the core: as by torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icon_nephi.core import arrays
from icon_nephi.fit.search import _weighted_ncc
from icon_nephi.losses import compiled as blocks
from icon_nephi.losses.features import with_features
from icon_nephi.losses.gradient_icon import compare
from icon_nephi.losses.patches import patch_maps
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.maps.jacobians import determinants
from icon_nephi.maps.transforms import MatrixTransform
from icon_nephi.space.frames import inside, points_as_grid
from icon_nephi.space.images import sample_image
from icon_nephi.space.sampling import Patches
from tests.core.core_problems import apart, numbers

SIZE = (20, 23, 17)


def by_torch(image):
    return with_features(image.double()).float()  # the core takes float32 alone


def affine(dimension, count, spread=0.2):
    eye = torch.eye(dimension + 1)[:dimension]
    return eye + numbers(count, dimension, dimension + 1, seed=3, scale=spread)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("count", [1, 301])
def test_scores_of_affine_maps(core, dimension, channels, count):
    image, other = (torch.rand(1, channels, *SIZE[:dimension]) for _ in "AB")
    points = torch.rand(1, count, dimension)
    target = sample_image(other, points_as_grid(points))[0].flatten(1)
    matrices = affine(dimension, 37)
    matrices[5] += 9  # nothing inside
    moved = points @ matrices[:, :, :dimension].mT + matrices[:, None, :, dimension]
    at = points_as_grid(moved.reshape(1, -1, dimension))
    values = sample_image(image, at)[0].reshape(channels, 37, -1)
    weight = inside(at)[0, 0].reshape(37, -1).float()
    expected = _weighted_ncc(values, target[:, None], weight).mean(0)
    found = arrays.rate(matrices, points[0], target, image)
    assert (found - expected * weight.mean(1).sqrt()).abs().max() < 2e-5


def test_scores_are_the_same_on_any_number_of_threads(core, threads):
    image, points, target = (
        torch.rand(1, 1, *SIZE),
        torch.rand(99, 3),
        torch.rand(1, 99),
    )
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(arrays.rate(affine(3, 200), points, target, image))
    assert all(torch.equal(found[0], f) for f in found[1:])


@pytest.mark.parametrize("channels", [1, 2])
def test_agreement_of_blocks_and_its_gradient(core, dimension, channels):
    shapes = SIZE[:dimension], SIZE[-dimension:]
    moving, fixed = (torch.rand(1, channels, *s) for s in shapes)
    patches, centres = Patches(40, 3, 1.5), torch.rand(1, 40, dimension)
    matrix = torch.eye(dimension + 1, dtype=torch.float64)
    matrix[:dimension] += numbers(dimension, dimension + 1, scale=0.05)
    matrix.requires_grad_()
    phi = MatrixTransform(matrix.float()[None])
    x, moved = patch_maps(phi, patches, centres, fixed.shape[2:])
    shape = (40, *x.shape[3:])
    expected = compare(PatchNCC(), moved, x, moving, fixed, shape)
    (expected_by,) = torch.autograd.grad(expected, matrix)
    agreement = blocks.agreement_of(PatchNCC(), moving, fixed)
    found = agreement(matrix, centres[0], patches, True)
    (mine,) = torch.autograd.grad(found, matrix)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=2e-6)
    assert apart(mine[:dimension], expected_by[:dimension]) < 2e-5


@given(
    size=st.one_of(*(st.tuples(*[st.integers(2, 12)] * d) for d in (2, 3))),
    channels=st.integers(1, 3),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def any_features(size, channels):
    image = numbers(1, channels, *size)
    expected, found = by_torch(image), arrays.with_features(image)
    assert found.stride() == expected.stride()
    assert (found - expected).abs().max() < 1e-5


def test_features(core):
    any_features()


def test_features_of_a_constant_image_and_of_none(core, dimension):
    image = torch.ones(1, 1, *SIZE[:dimension])
    assert (arrays.with_features(image) - by_torch(image)).abs().max() < 1e-6
    image[..., 3] = float("nan")
    assert arrays.with_features(image).shape == with_features(image).shape


def test_features_in_16_bits(core, dimension):
    image = with_features(numbers(1, 2, *SIZE[:dimension]))
    measure = blocks.Measure(PatchNCC(), 0, 2, 1.0)
    (packed,) = blocks.Channels.of([image], measure)
    assert packed.bits == 16
    whole = packed.features.int() % 65536
    expected = (image[0, 2:] * 65535).round().int().movedim(0, -1)
    assert ((whole[..., : packed.count] - expected).abs() <= 1).all()
    assert not whole[..., packed.count :].any()
    good = image.clone()
    image[:, 3] *= 2  # beyond what 16 bits are for
    assert [c.bits for c in blocks.Channels.of([good, image], measure)] == [32, 32]


def test_determinants(core, dimension):
    matrices = numbers(50, dimension, dimension)
    expected = determinants(matrices)[:, 0]
    assert apart(arrays.determinants(matrices), expected) < 1e-5
    assert arrays.determinants(matrices[:0]).shape == (0,)
