"""What is compared: one mask is enough, markers and metal do not lead astray."""

import pytest
import torch
from scipy import ndimage

from icon_nephi.fit.affine import find_affine
from icon_nephi.fit.content import ImagePair
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.losses.similarities import find_similarity
from icon_nephi.maps.jacobians import determinants
from icon_nephi.maps.transforms import value_and_jacobian
from icon_nephi.space.frames import Geometry, points_as_grid
from icon_nephi.space.intensities import PreparedImage, prepare
from tests.fit.bodies import (
    Body,
    Motion,
    drawn,
    error_of,
    go,
    inner,
    places,
    rotation,
)

SIZE = (72, 72)


def test_a_small_sharp_marker_in_a_smooth_image_is_not_all_that_is_looked_at():
    body, motion = Body(blobs=40, seed=4, size=(0.13, 0.26), edge=0.2), Motion()
    at = places(SIZE)
    letter = (at[:, 0] < -0.85) & (at[:, 1] < -0.75) & (at[:, 0] > -0.92)
    images = [
        drawn(torch.where(letter, 1.0, values), SIZE)
        for values in (body(at), body(motion(at)))
    ]
    result = go(*images)
    y = inner(body, motion, reach=0.75)
    before = (motion(y) - y).norm(dim=1).mean() * 35.5
    assert error_of(result, motion, y, SIZE).mean() < 0.15 * before
    assert result.warnings == []


@pytest.fixture(scope="module")
def artefact():
    """A pair, stripes over a disc of its moving image, and masks without that."""
    body, motion, at = Body(blobs=140), Motion(reach=0.07), places(SIZE)
    centre = torch.tensor([0.2, -0.12]).double()
    away = (at - centre).norm(dim=1)
    stripes = 0.8 + 0.8 * torch.sign(
        torch.sin(at[:, 0] * 40) * torch.sin(at[:, 1] * 33)
    )
    moving = torch.where(away < 0.22, stripes, body(at))
    y = inner(body, motion)
    y = y[(motion(y) - centre).norm(dim=1) > 0.24]
    images = drawn(moving, SIZE), drawn(body(motion(at)), SIZE)
    return motion, y, *images, drawn(away > 0.24, SIZE)


def test_what_one_mask_leaves_out_does_not_pull(artefact):
    motion, y, moving, fixed, mask = artefact
    error = error_of(go(moving, fixed, mask_A=mask, field="auto"), motion, y, SIZE)
    assert error.mean() < 0.4
    assert error.max() < 1.5


def test_what_both_masks_leave_out_may_be_anything(artefact):
    """Texture that is not the same outside, -3000 and NaN: as without it."""
    motion, y, moving, fixed, mask = artefact
    at, g = places(SIZE), torch.Generator().manual_seed(0)
    body = [
        drawn(at.norm(dim=1) < 0.8, SIZE),
        drawn(motion(at).norm(dim=1) < 0.8, SIZE),
    ]
    ruined = []
    for image, inside in zip((moving, fixed), body, strict=True):
        outside = 3 * torch.rand(image.shape, generator=g)
        outside[..., :9] = -3000.0
        outside[..., -5:] = torch.nan
        ruined.append(torch.where(inside > 0, image, outside))
    masks = {"mask_A": mask * body[0], "mask_B": body[1]}
    error = error_of(go(*ruined, **masks), motion, y[y.norm(dim=1) < 0.6], SIZE)
    assert error.mean() < 0.4


def test_an_image_keeps_its_volume_when_laid_on_itself():
    body, at = Body(blobs=140), places(SIZE)
    image = drawn(body(at), SIZE)
    result = go(image, image.clone(), affine=False, similarity="lncc")
    inside = points_as_grid(((at[body.inside(at) > 0.5] + 1) / 2).float()[None])
    for phi in (result.phi_AB, result.phi_BA):
        with torch.no_grad():
            slopes = value_and_jacobian(phi, inside)[1]
        assert abs(float(determinants(slopes).log().mean())) < 1e-3


def test_signed_distances_are_laid_on_each_other_by_their_values():
    at = places(SIZE)
    angle = torch.atan2(at[:, 1], at[:, 0])
    shapes = [
        at.norm(dim=1) < 0.4 * (1 + 0.15 * torch.cos(2 * angle)),
        at.norm(dim=1) < 0.55 * (1 + 0.2 * torch.sin(3 * angle)),
    ]
    images = []
    for shape in shapes:
        inside = shape.reshape(SIZE).numpy()
        away = ndimage.distance_transform_edt
        images.append(drawn(torch.from_numpy(away(~inside) - away(inside)), SIZE))
    result = go(*images)
    assert any("signed distance" in warning for warning in result.warnings)
    warped = result.warp_labels(drawn(shapes[0], SIZE).long()) > 0
    fixed = shapes[1].reshape(1, 1, *SIZE)
    both = (warped & fixed).sum()
    assert 2 * both / (warped.sum() + fixed.sum()) > 0.97


def test_padding_is_left_out_and_said():
    body, motion, at = Body(blobs=140), Motion(reach=0.07), places(SIZE)
    circle = at.norm(dim=1) > 0.7  # it cuts the body
    hounsfield = [(1300 * v - 1000).round() for v in (body(at), body(motion(at)))]
    images = [drawn(torch.where(circle, -2000.0, v), SIZE) for v in hounsfield]
    result = go(*images)
    y = inner(body, motion, reach=0.75)
    y = y[(y.norm(dim=1) < 0.65) & (motion(y).norm(dim=1) < 0.65)]
    assert error_of(result, motion, y, SIZE).mean() < 0.5
    said = [w for w in result.warnings if "padding (-2000)" in w]
    assert [w.split()[3] for w in said] == ["image_A", "image_B"]


def pair_of(body, motion, size):
    at = places(size)
    place = Geometry(
        size, (2.0,) * 3, (0.0,) * 3, tuple(map(tuple, torch.eye(3).tolist()))
    )
    images = [prepare(drawn(v, size)) for v in (body(at), body(motion(at)))]
    return ImagePair(*(PreparedImage.of(image, place) for image in images)), at


def affine_error(matrix, motion, y, size):
    """In millimetres, of places from -1 to 1 on a grid with voxels of 2 mm."""
    half = torch.tensor(size).double() - 1
    millimetres = ((y + 1) * half).flip(1)
    moved = millimetres @ matrix[:3, :3].T + matrix[:3, 3]
    true = ((motion(y) + 1) * half).flip(1)
    return (moved - true).norm(dim=1).mean()


@pytest.mark.parametrize(("degrees", "plane"), [(60, (1, 2)), (180, (0, 1))])
def test_a_solid_is_found_however_it_is_turned(degrees, plane, generator):
    size, body = (28, 28, 28), Body(3, blobs=120, size=(0.1, 0.2))
    motion = Motion(3, reach=0.05, turn=rotation(degrees, 3, plane))
    images, _ = pair_of(body, motion, size)
    said = []
    matrix = find_affine(images, find_similarity("lncc"), generator, None, said)
    y = inner(body, motion)
    assert affine_error(matrix, motion, y, size) < 1.5
    assert said == []


@pytest.mark.parametrize("allowed", [False, True])
def test_a_mirror_image_is_named_and_registered_where_that_is_allowed(
    allowed, generator
):
    size, body = (28, 28, 28), Body(3, blobs=120, size=(0.1, 0.2))
    motion = Motion(3, reach=0.05, turn=torch.diag(torch.tensor([1.0, -1, 1])).double())
    images, _ = pair_of(body, motion, size)
    options, said = FitOptions(progress=False, allow_mirror=allowed), []
    matrix = find_affine(images, find_similarity("lncc"), generator, options, said)
    assert "mirror" in said[0]
    error = affine_error(matrix, motion, inner(body, motion), size)
    assert (error < 1.5) == allowed
    assert (torch.linalg.det(matrix) < 0) == allowed
