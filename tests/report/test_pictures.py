"""Slices as anatomy draws them: which way is up, how large is a pixel, PNG files."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from icon_nephi.io.image_input import voxel_geometry
from icon_nephi.report import pictures as views
from icon_nephi.space.frames import Geometry
from tests.small_fits import geometry

# What lies to the right and downwards on the screen: LPS axis and sign.
SCREEN = {"Axial": ((0, 1), (1, 1)), "Coronal": ((0, 1), (2, -1))}
SCREEN["Sagittal"] = ((1, 1), (2, -1))
ACROSS = {"Axial": 2, "Coronal": 1, "Sagittal": 0}


def placed(direction, size=(10, 12, 14), spacing=(1.5, 2.0, 3.0)):
    return Geometry(size, spacing, (5.0, -7.0, 11.0), tuple(map(tuple, direction)))


def right_handed_and_not():
    """Every way to store the axes of a body: 6 orders times 8 signs."""
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            yield (np.eye(3)[list(order)] * signs).tolist()


@pytest.mark.parametrize("tilted", [False, True])
def test_pictures_show_the_body_the_same_way_however_it_is_stored(tilted):
    turn = np.eye(3)
    if tilted:  # about 20 degrees
        turn = np.linalg.qr(
            np.eye(3) + 0.2 * np.random.default_rng(0).normal(size=9).reshape(3, 3)
        )[0]
        turn = turn * np.sign(np.diag(turn))
    for direction in right_handed_and_not():
        place = placed((turn @ np.array(direction)).tolist())
        found = {view.name: view for view in views.views_of(place, physical=True)}
        assert list(found) == ["Axial", "Coronal", "Sagittal"]
        for name, view in found.items():
            points = views.pixel_grid(view, place, 20)
            right = points[0, 0, -1] - points[0, 0, 0]
            down = points[0, -1, 0] - points[0, 0, 0]
            for vector, (axis, sign) in zip((right, down), SCREEN[name], strict=True):
                assert np.argmax(np.abs(vector)) == axis
                assert np.sign(vector[axis]) == sign
            deeper = points[-1, 0, 0] - points[0, 0, 0]
            assert np.argmax(np.abs(deeper)) == ACROSS[name]
            assert deeper[ACROSS[name]] > 0
        edges = {name: view.edges for name, view in found.items()}
        assert edges["Axial"] == ("R", "L", "A", "P")
        assert edges["Coronal"] == ("R", "L", "S", "I")
        assert edges["Sagittal"] == ("A", "P", "S", "I")
        assert (views.tilt(place) > 5) == tilted


def test_pixels_are_square_and_fill_the_box():
    place = geometry((10, 30, 24), seed=3)
    for view in views.views_of(place, physical=True):
        points = views.pixel_grid(view, place, 100)
        down = np.linalg.norm(points[0, 1, 0] - points[0, 0, 0])
        right = np.linalg.norm(points[0, 0, 1] - points[0, 0, 0])
        assert down == pytest.approx(right, rel=0.05)
        height, width = points.shape[1:3]
        steps = place.spacing[::-1]
        assert height * down == pytest.approx(place.size[view.rows] * steps[view.rows])
        assert views.aspect(view, place) == pytest.approx(width / height, rel=0.05)
        vectors = views.in_plane(view, place)
        np.testing.assert_allclose(
            (points[0, 1, 0] - points[0, 0, 0]) / down, vectors[0], atol=1e-9
        )
        np.testing.assert_allclose(
            (points[0, 0, 1] - points[0, 0, 0]) / right, vectors[1], atol=1e-9
        )


def test_slices_are_spread_and_named_by_their_place():
    place = placed(np.eye(3).tolist(), size=(100, 12, 14))
    axial, coronal, _ = views.views_of(place, physical=True, slices=24)
    assert len(axial.numbers) == 24
    assert len(coronal.numbers) == 12
    assert np.ptp(np.diff(axial.numbers)) <= 1
    heights = [11 + 3 * n for n in axial.numbers]
    assert axial.places == tuple(f"S {h:.0f} mm" for h in heights)
    assert coronal.places[0] == "A 7 mm"


def test_tensors_have_axes_and_flat_images_one_view():
    found = views.views_of(voxel_geometry((5, 6, 7)), physical=False)
    assert [view.name for view in found] == ["Axis 0", "Axis 1", "Axis 2"]
    assert found[0].places[2] == "voxel 2"
    for place, physical in ((voxel_geometry((5, 6)), False), (geometry((5, 6)), True)):
        (view,) = views.views_of(place, physical=physical)
        points = views.pixel_grid(view, place, 12)
        assert points.shape[0] == 1
        assert points.shape[-1] == 2
        if physical:  # x to the right, y down
            assert points[0, 0, -1, 0] > points[0, 0, 0, 0]
            assert points[0, -1, 0, 1] > points[0, 0, 0, 1]


def decoded(picture):
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)


def test_png_files_are_read_by_others():
    index = np.arange(12).reshape(3, 4)
    palette = np.random.default_rng(0).integers(0, 256, (12, 3))
    np.testing.assert_array_equal(decoded(views.png(index, palette)), palette[index])


def test_colours_say_what_they_should():
    ramp = np.linspace(0, 1, 9)[None]
    grey = decoded(views.grey(ramp))
    assert np.ptp(grey, axis=-1).max() == 0
    np.testing.assert_allclose(grey[0, :, 0], 255 * ramp[0], atol=3)
    marked = np.zeros((1, 9), bool)
    marked[0, 2] = True
    colours = decoded(views.diverging(2 * ramp - 1, marked))[0]
    assert colours[0, 2] > colours[0, 0]  # blue
    assert colours[-1, 0] > colours[-1, 2]  # red
    assert tuple(colours[2]) == views.FOLD
    light = decoded(views.sequential(ramp))[0].sum(-1)
    assert (np.diff(light) > 0).all()


def test_the_grid_of_the_identity_is_regular():
    rows, columns = np.mgrid[0:40, 0:60].astype(float)
    lines = views.deformed_grid(np.stack((rows, columns), -1), 10)
    assert (lines[::10] == 1).all()
    assert (lines[:, ::10] == 1).all()
    assert lines[5, 5] == 0
    np.testing.assert_array_equal(
        views.deformed_grid(np.stack((rows, columns), -1) / 2, 10)[:, 20] == 1, True
    )


def test_a_checkerboard_takes_from_both():
    board = views.checkerboard(np.zeros((16, 32)), np.ones((16, 32)), tiles=8)
    assert board.mean() == 0.5
    assert board[0, 0] != board[0, 4]
    assert board[0, 0] != board[4, 0]
