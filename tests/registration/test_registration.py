"""What a Registration answers, in millimetres and in the ICON frame."""

from dataclasses import replace

import itk
import numpy as np
import pytest
import torch

import icon_nephi
from icon_nephi.io import itk_images
from icon_nephi.io.image_input import voxel_geometry
from icon_nephi.maps.two_way import DIRECTIONS
from icon_nephi.models import find_settings
from icon_nephi.registration import register as registration
from icon_nephi.registration.register import register
from icon_nephi.registration.result import Registration
from icon_nephi.space.frames import identity_map
from icon_nephi.space.images import sample_image
from tests.small_fits import geometry, rows_in, small_fit, unit_matrix, voxels_in

SIZES = {2: ((23, 30), (18, 26)), 3: ((12, 16, 14), (17, 11, 13))}


def made(dimension, *, itk=True, flipped=False, strength=0.01, seed=0):
    size_A, size_B = SIZES[dimension]
    if itk:
        moving, fixed = geometry(size_A, 1, flipped), geometry(size_B, 2)
    else:
        moving, fixed = voxel_geometry(size_A), voxel_geometry(size_B)
    matrix = unit_matrix(dimension)
    fit = small_fit(dimension, matrix, strength=strength, seed=seed)
    return Registration(fit, moving, fixed, itk=itk)


def differences(result, points, direction, step=1e-3):
    """Determinants of central differences of transform_points, [N]."""
    columns = []
    for axis in range(points.shape[1]):
        h = np.zeros(points.shape[1])
        h[axis] = step
        ends = [result.transform_points(points + s * h, direction) for s in (1, -1)]
        columns.append((ends[0] - ends[1]) / (2 * step))
    return np.linalg.det(np.stack(columns, -1))


def doubled(result):
    """The same registration in float64, so that differences can be small."""
    fit = result.fit
    code = type(fit.code)(
        fit.code.global_code.double(), tuple(c.double() for c in fit.code.local_codes)
    )
    fields = {n: getattr(fit, n).double() for n in ("field_AB", "field_BA")}
    new = type(fit)(**{**vars(fit), "code": code, **fields})
    return Registration(new, result.geometry_A, result.geometry_B, itk=result.itk)


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("flipped", [False, True])
def test_determinants_are_those_of_the_points(dimension, flipped):
    result = doubled(made(dimension, flipped=flipped))
    for direction, place in zip(
        DIRECTIONS, (result.geometry_B, result.geometry_A), strict=True
    ):
        image = result.jacobian_determinant(direction=direction)
        assert itk_images.geometry_of(image) == place
        points = voxels_in(place, 20, np.random.default_rng(0))
        index = [image.TransformPhysicalPointToIndex(p) for p in points.tolist()]
        ours = np.array([image.GetPixel(i) for i in index])
        inner = np.array(
            [
                all(0 < a < n - 1 for a, n in zip(i, itk.size(image), strict=True))
                for i in index
            ]
        )
        theirs = differences(result, points, direction)
        np.testing.assert_allclose(ours[inner], theirs[inner], rtol=1e-3)
        # One header is a mirror image: then the physical map is one, too.
        assert (ours > 0).all() == (not flipped)


@pytest.mark.parametrize("itk", [True, False])
def test_the_identity_has_determinant_one_and_no_folds(itk):
    result = made(3, itk=itk, strength=0.0)
    frames = [
        result.two_way.frame_of(g) for g in (result.geometry_A, result.geometry_B)
    ]
    matrix = torch.linalg.inv(frames[0]) @ frames[1]  # the identity in that frame
    for field in (result.fit.field_AB, result.fit.field_BA):
        torch.nn.init.zeros_(field.last.weight)
        torch.nn.init.zeros_(field.last.bias)
    fit = type(result.fit)(**{**vars(result.fit), "matrix": matrix})
    same = Registration(fit, result.geometry_A, result.geometry_B, itk=itk)
    np.testing.assert_allclose(np.asarray(same.jacobian_determinant()), 1, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(same.displacement_field()), 0, atol=1e-4)
    np.testing.assert_allclose(
        np.asarray(same.inverse_consistency_error()), 0, atol=1e-4
    )
    assert same.fold_fraction() == 0


def test_folds_are_counted_in_both_directions():
    result = made(2, strength=1.0)
    determinants = [
        np.asarray(result.jacobian_determinant(direction=d)).ravel() for d in DIRECTIONS
    ]
    expected = np.mean(np.concatenate(determinants) <= 0)
    assert 0 < expected < 1
    assert result.fold_fraction() == pytest.approx(expected)
    points = rows_in(result.geometry_B, 200, np.random.default_rng(0))
    assert 0 < result.fold_fraction(points) < 1


@pytest.mark.parametrize("dimension", [2, 3])
def test_points_and_fields_agree_on_any_reference_grid(dimension):
    result = made(dimension)
    place = geometry(tuple(range(5, 5 + dimension)), 9)
    place = type(place)(
        place.size, place.spacing, result.geometry_B.origin, place.direction
    )
    reference = itk_images.image_of(np.zeros(place.size, np.int16), place)
    for direction in DIRECTIONS:
        field = result.displacement_field(reference, direction)
        assert itk_images.geometry_of(field) == itk_images.geometry_of(reference)
        for point in voxels_in(place, 10, np.random.default_rng(0)):
            index = field.TransformPhysicalPointToIndex(point.tolist())
            moved = point + np.array(list(field.GetPixel(index)))
            expected = result.transform_points(point[None], direction)[0]
            np.testing.assert_allclose(moved, expected, atol=1e-3)
    points = rows_in(result.geometry_B, 30, np.random.default_rng(0))
    there = result.transform_points(points)
    back = result.transform_points(there, "moving_to_fixed")
    errors = np.linalg.norm(back - points, axis=1)
    image = result.inverse_consistency_error()
    assert itk_images.geometry_of(image) == result.geometry_B
    assert errors.max() < 1.1 * np.asarray(image).max()
    assert errors.mean() == pytest.approx(np.asarray(image).mean(), rel=0.3)


def test_images_are_warped_as_itk_does():
    result = made(3)
    generator = np.random.default_rng(0)
    moving = itk_images.image_of(
        generator.normal(size=(20, 15, 18)).astype(np.float32),
        type(result.geometry_A)(
            (20, 15, 18),
            *[
                getattr(result.geometry_A, n)
                for n in ("spacing", "origin", "direction")
            ],
        ),
    )
    fixed = itk_images.image_of(np.zeros(SIZES[3][1], np.float32), result.geometry_B)
    ours = result.warp(moving)
    least = float(np.asarray(moving).min())
    theirs = itk_images.resample(moving, fixed, result.phi_AB, "linear", least)
    assert itk_images.geometry_of(ours) == result.geometry_B
    far = np.asarray(result.warp(moving, outside=-7.0)) == -7
    inside = np.asarray(theirs) != least
    assert (np.asarray(ours)[far] == least).all()
    assert np.mean(far == inside) < 0.01  # ITK stops a little earlier or later
    both = inside & ~far
    np.testing.assert_allclose(
        np.asarray(ours)[both], np.asarray(theirs)[both], atol=5e-3
    )
    assert 0 < far.mean() < 1
    back = result.warp(fixed, inverse=True)
    assert itk_images.geometry_of(back) == result.geometry_A


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint32])
def test_labels_stay_labels(kind):
    result = made(2)
    labels = np.random.default_rng(0).integers(0, 250, SIZES[2][0]).astype(kind)
    image = itk_images.image_of(labels, result.geometry_A)
    fixed = itk_images.image_of(np.zeros(SIZES[2][1], np.uint8), result.geometry_B)
    ours = result.warp_labels(image)
    assert np.asarray(ours).dtype == kind
    theirs = itk_images.resample(image, fixed, result.phi_AB, "nearest")
    assert np.mean(np.asarray(ours) != np.asarray(theirs)) < 0.01  # ties


@pytest.mark.parametrize("dimension", [2, 3])
def test_tensors_stay_in_the_icon_frame(dimension):
    result = made(dimension, itk=False)
    size_A, size_B = SIZES[dimension]
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 2, *size_A, generator=generator)
    grid = identity_map(size_B)
    assert result.phi_AB is result.map_AB
    moved = result.phi_AB(grid)
    half = 0.5 / (torch.tensor(size_A).view(1, -1, *(1,) * dimension) - 1)
    inside = ((moved >= -half) & (moved <= 1 + half)).all(1, keepdim=True)
    assert 0.5 < inside.double().mean() < 1
    # Four roundings of a coordinate, in voxels, where neighbours differ by the range.
    change = max(size_A) * float(image.max() - image.min())
    torch.testing.assert_close(
        result.warp(image),
        sample_image(image, moved).where(inside, image.min()),
        atol=4 * torch.finfo(torch.float32).eps * change,
        rtol=0,
    )
    torch.testing.assert_close(
        result.displacement_field(), moved - grid, atol=1e-5, rtol=0
    )
    rows = grid.flatten(2)[0].T
    np.testing.assert_allclose(
        result.transform_points(rows), moved.flatten(2)[0].T.numpy(), atol=1e-5
    )
    determinants = torch.linalg.det(
        result.map_AB.jacobian(grid)[0].flatten(2).permute(2, 0, 1)
    )
    ours = result.jacobian_determinant()
    assert ours.shape == (1, 1, *size_B)
    torch.testing.assert_close(ours.flatten(), determinants, atol=1e-4, rtol=1e-4)
    missed = (result.map_BA(moved) - grid) * (
        torch.tensor(size_B).view(1, -1, *(1,) * dimension) - 1
    )
    torch.testing.assert_close(
        result.inverse_consistency_error(),
        missed.norm(dim=1, keepdim=True),
        atol=1e-3,
        rtol=0,
    )
    labels = torch.randint(0, 9, (1, 1, *size_A), generator=generator)
    assert result.warp_labels(labels).dtype == torch.int64
    other = torch.zeros(1, 1, *range(6, 6 + dimension))
    assert result.warp(image, reference=other).shape[2:] == other.shape[2:]
    assert result.jacobian_determinant(other).shape == other.shape


def test_nothing_asks_for_gradients_and_no_points_are_fine():
    result = made(3, itk=False)
    assert not result.warp(torch.rand(1, 1, *SIZES[3][0])).requires_grad
    assert not result.phi_AB(torch.rand(1, 3, 4, 1, 1)).requires_grad
    assert result.transform_points(np.empty((0, 3))).shape == (0, 3)


@pytest.mark.parametrize(
    "points", [[[0.0, 0.0]], [0.0, 0.0, 0.0], [[0.0, 0.0, np.nan]]]
)
def test_points_of_another_shape_are_refused(points):
    with pytest.raises(ValueError, match="points must be"):
        made(3).transform_points(points)


def test_wrong_questions_are_refused():
    result = made(3)
    with pytest.raises(ValueError, match="direction must be one of"):
        result.transform_points([[0.0, 0.0, 0.0]], "backward")
    with pytest.raises(TypeError, match=r"image must be an itk\.Image"):
        result.warp(torch.zeros(1, 1, 4, 4, 4))
    flat = itk.image_from_array(np.zeros((4, 5), np.float32))
    with pytest.raises(ValueError, match="image is 2D but"):
        result.warp(flat)
    with pytest.raises(ValueError, match="reference is 2D but"):
        result.displacement_field(flat)
    with pytest.raises(ValueError, match="mode must be"):
        result.warp(flat, "sinc")
    with pytest.raises(TypeError, match=r"image must be a torch\.Tensor"):
        made(2, itk=False).warp(flat)


def noise(*shape):
    return torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))


def as_itk(tensor, origin=0.0):
    image = itk.image_from_array(tensor[0, 0].numpy())
    image.SetOrigin([origin] * image.GetImageDimension())
    return image


GOOD = noise(12, 14)
HOLED, ENDLESS = GOOD.clone(), GOOD.clone()
HOLED[0, 0, 3, 3] = torch.nan
ENDLESS[0, 0, 3, 3] = torch.inf
BAD_INPUT = {
    "constant": ((torch.ones(1, 1, 8, 8), GOOD), {}, "image_A is constant"),
    "NaN": ((GOOD, HOLED), {}, "image_B has 1 NaN"),
    "inf": ((ENDLESS, GOOD), {}, "image_A has 1 NaN or inf"),
    "channels": ((GOOD, GOOD.expand(1, 3, -1, -1)), {}, "channels"),
    "batch": ((GOOD.expand(2, 1, -1, -1), GOOD), {}, "one image"),
    "plain": ((GOOD[0, 0], GOOD[0, 0]), {}, r"\[None, None\]"),
    "numpy": ((GOOD.numpy(), GOOD), {}, r"torch\.from_numpy"),
    "path": (("a.nii.gz", GOOD), {}, r"itk\.imread"),
    "thin": ((GOOD[:, :, None], GOOD), {}, "2D"),
    "dimensions": ((noise(8, 8, 8), GOOD), {}, "3D"),
    "mixed": ((as_itk(GOOD), GOOD), {}, "two ITK images or two tensors"),
    "empty mask": ((GOOD, GOOD), {"mask_A": 0 * GOOD}, "mask_A is empty"),
    "other grid": ((GOOD, GOOD), {"mask_B": noise(9, 9)}, "mask_B has grid"),
    "mask kind": ((GOOD, GOOD), {"mask_B": as_itk(GOOD)}, "same kind"),
    "far mask": (
        (as_itk(GOOD), as_itk(GOOD)),
        {"mask_B": as_itk(GOOD, 500.0)},
        "mask_B and image_B do not overlap",
    ),
    "empty itk mask": (
        (as_itk(GOOD), as_itk(GOOD)),
        {"mask_B": as_itk(0 * GOOD)},
        "mask_B is empty",
    ),
    "mask dimension": (
        (as_itk(GOOD), as_itk(GOOD)),
        {"mask_B": as_itk(noise(4, 4, 4))},
        "mask_B is 3D",
    ),
    "one segmentation": (
        (GOOD, GOOD),
        {"segmentation_B": (GOOD > 0.5).long()},
        "segmentation_A is missing",
    ),
    "segmentation kind": (
        (as_itk(GOOD), as_itk(GOOD)),
        {"segmentation_A": GOOD, "segmentation_B": as_itk(GOOD)},
        "segmentation_A is Tensor; pass an ITK label map",
    ),
    "no labels": (
        (GOOD, GOOD),
        {"segmentation_A": GOOD, "segmentation_B": GOOD},
        "segmentation_A holds .* not whole or below 0",
    ),
    "other labels": (
        (GOOD, GOOD),
        {"segmentation_A": 3 * (GOOD > 0.5), "segmentation_B": 2 * (GOOD > 0.5)},
        "no label above 0 in common",
    ),
    "labels on another grid": (
        (GOOD, GOOD),
        {"segmentation_A": (GOOD > 0.5).long(), "segmentation_B": noise(9, 9).ceil()},
        r"segmentation_B has grid \(9, 9\)",
    ),
    "modality": ((GOOD, GOOD), {"modality": "pet"}, "modality"),
    "device": ((GOOD, GOOD), {"device": "nowhere"}, "not available"),
    "time": ((GOOD, GOOD), {"time_limit": 0}, "time_limit"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_in_one_sentence(name, monkeypatch):
    monkeypatch.setattr(registration, "fit_pair", lambda *a, **k: pytest.fail("ran"))
    images, options, words = BAD_INPUT[name]
    with pytest.raises((ValueError, TypeError), match=words):
        register(*images, **options)


@pytest.fixture
def asked(monkeypatch):
    """What `register` asks `fit_pair` for, which does not run."""
    found = []

    def fit(image_A, image_B, **choices):
        found.extend((image_A, image_B))
        raise InterruptedError

    monkeypatch.setattr(registration, "fit_pair", fit)
    return found


def test_masks_of_another_grid_are_read_at_the_voxels(asked):
    fine = torch.zeros(1, 1, 24, 28)
    fine[..., 10:] = 3
    mask = as_itk(fine)
    mask.SetSpacing([0.5, 0.5])
    with pytest.raises(InterruptedError):
        register(as_itk(GOOD), as_itk(GOOD), mask_A=mask)
    assert asked[1].mask is None
    expected = (torch.arange(14) >= 5).float().expand(1, 1, 12, 14)
    torch.testing.assert_close(asked[0].mask, expected)
    assert asked[0].values.dtype == asked[1].values.dtype == torch.float32


def test_label_maps_of_another_grid_are_read_at_the_voxels(asked):
    fine = torch.zeros(1, 1, 20, 24)
    fine[..., 9:21] = 300
    labels = as_itk(fine)
    labels.SetSpacing([0.5, 0.5])  # ends half a voxel before the image does
    same = 300 * (GOOD > 0.5)
    with pytest.raises(InterruptedError):
        register(
            as_itk(GOOD),
            as_itk(GOOD),
            segmentation_A=labels,
            segmentation_B=as_itk(same.short()),
        )
    expected = torch.zeros(12, 14, dtype=torch.long)
    expected[:10, 5:11] = 300  # 0 beyond the label map
    assert torch.equal(asked[0].labels[0, 0], expected)
    assert torch.equal(asked[1].labels, same)


def test_two_shapes_are_registered_and_everything_is_answered(tmp_path):
    grid = identity_map((40, 44))
    middle, radius = torch.tensor([0.5, 0.5]).view(1, 2, 1, 1), 0.25
    distance = (grid - middle).norm(dim=1, keepdim=True)
    fixed = torch.sigmoid((radius - distance) / 0.02)
    wide = ((grid - middle - 0.04) / torch.tensor([1.15, 0.9]).view(1, 2, 1, 1)).norm(
        dim=1, keepdim=True
    )
    moving = torch.sigmoid((radius - wide) / 0.02)
    field = replace(find_settings("grid", (40, 44)), steps=40)
    result = register(moving, fixed, field=field, progress=False, seed=0)
    before, after = (
        float((i - fixed).abs().mean()) for i in (moving, result.warp(moving))
    )
    assert after < 0.4 * before
    assert result.fold_fraction() == 0
    assert result.losses
    assert result.inverse_consistency_error().mean() < 1.0
    result.save(tmp_path / "pair.nephi")
    again = icon_nephi.load(tmp_path / "pair.nephi")
    torch.testing.assert_close(again.warp(moving), result.warp(moving))
    assert again.losses[-1].keys() == result.losses[-1].keys()


def test_the_package_offers_it_without_importing_itk():
    assert icon_nephi.register is register
    assert icon_nephi.Registration is Registration
    assert icon_nephi.itk_wrapper.register_pair
    assert "load" in dir(icon_nephi)
    with pytest.raises(AttributeError, match="no attribute 'regster'"):
        _ = icon_nephi.regster
