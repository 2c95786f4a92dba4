"""Frames: against ICON for the unit box, against ITK for millimetres."""

import icon_registration as icon
import numpy as np
import pytest
import torch
from icon_registration.mermaidlite import compute_warped_image_multiNC

from icon_nephi._check import (
    check_coordinates,
    check_image,
    check_intensities,
    check_mask,
)
from icon_nephi.space.frames import (
    Geometry,
    apply_affine,
    from_rows,
    identity_map,
    inside,
    points_as_grid,
    to_rows,
)
from icon_nephi.space.images import sample_image
from tests.maps.problems import SHAPES, images, points


def oblique(dimension):
    """A geometry with nothing in common between its axes."""
    if dimension == 2:
        c, s = np.cos(0.4), np.sin(0.4)
        direction = np.array([[c, -s], [s, c]])
    else:
        direction = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
        direction[:, 0] *= np.linalg.det(direction)
    return Geometry(
        size=SHAPES[dimension],
        spacing=(0.7, 1.9, 3.1)[:dimension],
        origin=(-12.0, 5.0, 40.0)[:dimension],
        direction=tuple(map(tuple, direction.tolist())),
    )


def test_identity_map_is_icons(dimension):
    shape = SHAPES[dimension]
    module = icon.RegistrationModule()
    module.assign_identity_map([1, 1, *shape])
    torch.testing.assert_close(identity_map(shape), module.identity_map)
    assert identity_map(shape, dtype=torch.float64).dtype == torch.float64


def test_rows_are_the_same_numbers(dimension):
    x = torch.rand(2, dimension, *SHAPES[dimension])
    rows = to_rows(x)
    assert rows.shape == (2, x[0, 0].numel(), dimension)
    last = (slice(None), slice(None), *(-1 for _ in SHAPES[dimension]))
    assert torch.equal(rows[:, -1], x[last])
    assert torch.equal(from_rows(rows, x), x)
    channels = torch.rand(2, rows.shape[1], 7)
    assert from_rows(channels, x).shape == (2, 7, *SHAPES[dimension])


def test_points_as_grid_is_what_icon_accepts(dimension):
    rows = torch.rand(2, 5, dimension)
    grid = points_as_grid(rows)
    assert grid.shape == (2, dimension, 5, *(1,) * (dimension - 1))
    assert torch.equal(to_rows(grid), rows)
    module = icon.RegistrationModule()
    module.assign_identity_map([1, 1, *SHAPES[dimension]])
    assert module.as_function(images(dimension)[0])(grid).shape[2] == 5


def test_sample_image_reads_as_icon_does(dimension, precision):
    image = images(dimension, 2, precision.dtype)[0]
    x = points(dimension, 2, 50, precision.dtype, reach=0.4)
    spacing = 1 / (np.array(SHAPES[dimension]) - 1)
    expected = compute_warped_image_multiNC(image, x, spacing, 1)
    precision.close(sample_image(image, x), expected)


def test_sample_image_at_voxel_centres_is_the_image(dimension):
    image = images(dimension, 2, torch.float64)[0]
    x = identity_map(SHAPES[dimension], dtype=torch.float64)
    torch.testing.assert_close(sample_image(image, x), image)
    labels = image.mul(9).round()
    near = x + 0.3 * (torch.rand_like(x) - 0.5) / 6
    assert torch.equal(sample_image(labels, near, "nearest"), labels)


@pytest.mark.parametrize(
    ("of_image", "of_points", "expected"),
    [(1, 3, 3), (3, 1, 3), (2, 2, 2), (0, 1, 0), (1, 0, 0), (0, 0, 0)],
)
def test_sample_image_serves_every_batch(dimension, of_image, of_points, expected):
    image = images(dimension, of_image)[0]
    x = points(dimension, of_points, 4, torch.float32)
    values = sample_image(image, x)
    assert values.shape == (expected, 1, *x.shape[2:])


def test_sample_image_keeps_the_images_dtype():
    image = torch.rand(1, 1, 4, 5)
    values = sample_image(image, torch.rand(1, 2, 3, dtype=torch.float64))
    assert values.dtype == torch.float32


def test_inside_is_the_closed_unit_box():
    x = torch.tensor([[0.0, 0.5], [1.0, 1.0], [1.001, 0.5], [0.5, -0.001]]).T[None]
    assert inside(x).tolist() == [[[True, True, False, False]]]


def test_geometry_agrees_with_itk(dimension):
    itk = pytest.importorskip("itk")
    geometry = oblique(dimension)
    image = itk.image_from_array(np.zeros(geometry.size, np.float32))
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(itk.matrix_from_array(np.array(geometry.direction)))
    rows = 1.4 * torch.rand(20, dimension, dtype=torch.float64) - 0.2
    physical = apply_affine(geometry.unit_to_physical(), rows)
    for x, found in zip(rows, physical, strict=True):
        index = [float(u * (n - 1)) for u, n in zip(x, geometry.size, strict=True)]
        point = itk.ContinuousIndex[itk.D, dimension]()
        for axis, i in enumerate(reversed(index)):
            point.SetElement(axis, i)
        expected = image.TransformContinuousIndexToPhysicalPoint(point)
        np.testing.assert_allclose(found.numpy(), list(expected), atol=1e-9)


def test_physical_to_unit_is_the_way_back(dimension):
    geometry = oblique(dimension)
    rows = torch.rand(5, dimension, dtype=torch.float64)
    there = apply_affine(geometry.unit_to_physical(), rows)
    back = apply_affine(geometry.physical_to_unit(), there)
    torch.testing.assert_close(back, rows)


def test_unit_geometry_is_the_icon_frame_reversed(dimension):
    geometry = Geometry.unit(SHAPES[dimension])
    rows = torch.rand(5, dimension, dtype=torch.float64)
    torch.testing.assert_close(
        apply_affine(geometry.unit_to_physical(), rows), rows.flip(-1)
    )
    assert geometry.extent == pytest.approx((1.0,) * dimension)


def test_extent_is_between_the_outer_voxel_centres_along_tensor_axes():
    geometry = oblique(3)
    assert geometry.dimension == 3
    assert geometry.extent == pytest.approx((4 * 3.1, 3 * 1.9, 5 * 0.7))
    corner = apply_affine(geometry.unit_to_physical(), torch.eye(3).double())
    origin = torch.tensor(geometry.origin, dtype=torch.float64)
    assert (corner - origin).norm(dim=1).tolist() == pytest.approx(geometry.extent)


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (np.zeros((1, 1, 4, 4)), TypeError, "must be a torch.Tensor"),
        (torch.zeros(4, 4), ValueError, r"image\[None, None\]"),
        (torch.zeros(1, 1, 4, 4, 4, 4), ValueError, r"\[B, C, D, H, W\]"),
        (torch.zeros(1, 1, 4, 1), ValueError, "one voxel"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int32), TypeError, "A.float()"),
    ],
)
def test_an_image_of_the_wrong_form_is_refused(image, error, words):
    with pytest.raises(error, match="A .*" + words.replace("()", r"\(\)")):
        check_image("A", image)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.0, float("nan"), float("inf")], "2 NaN or infinite"),
        ([3.0, 3.0, 3.0], r"constant \(3 everywhere\)"),
    ],
)
def test_unusable_intensities_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        check_intensities("A", torch.tensor(values))


def test_unusable_masks_are_refused():
    with pytest.raises(ValueError, match=r"grid \(4, 4\) but its image has \(4, 5\)"):
        check_mask("mask_A", torch.ones(1, 1, 4, 4), (4, 5))
    with pytest.raises(ValueError, match="mask_A is empty"):
        check_mask("mask_A", torch.zeros(1, 1, 4, 4), (4, 4))


def test_what_is_right_passes():
    image = torch.rand(0, 2, 4, 4)
    check_image("A", image)
    check_intensities("A", torch.rand(1, 1, 4, 4))
    check_mask("mask_A", torch.ones(1, 1, 4, 4, dtype=torch.bool), (4, 4))
    check_coordinates("x", torch.rand(1, 2, 7), 2)


def test_another_grid_fills_the_same_box():
    place = Geometry((4, 6), (2.0, 1.0), (3.0, -1.0), ((0.0, -1.0), (1.0, 0.0)))
    other = place.resized((8, 3))
    assert other.size == (8, 3)
    edges = [
        apply_affine(
            g.unit_to_physical(),
            torch.tensor(
                [[(e * (n - 1) + (e - 0.5)) / (n - 1) for n in g.size] for e in (0, 1)],
                dtype=torch.float64,
            ),
        )
        for g in (place, other)
    ]
    torch.testing.assert_close(*edges)
    assert place.resized(place.size) == place


def test_a_voxel_reaches_to_its_face_and_what_rounding_adds():
    spacing, size = (0.7, 1.3, 0.1), (5, 6, 7)
    direction = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    place = Geometry(size, spacing, (3.0, -70.0, 900.0), tuple(map(tuple, direction)))
    corners = np.stack(np.meshgrid(*([-0.5, n - 0.5] for n in size[::-1])), -1)
    corners = corners.reshape(-1, 3)

    def millimetres(index):
        return (index * spacing) @ direction.T + place.origin

    assert not place.outside(millimetres(corners)).any()
    middle = (np.array(size[::-1]) - 1) / 2
    assert place.outside(millimetres(middle + 1.001 * (corners - middle))).all()
