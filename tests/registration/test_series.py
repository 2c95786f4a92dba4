"""A series laid on its mean: maps between any two images, in time, saved, resumed."""

import itertools

import itk
import numpy as np
import pytest
import torch

import icon_nephi
from icon_nephi.fit import group
from icon_nephi.io import itk_images
from icon_nephi.io.itk_frames import frames_of, write_frames
from icon_nephi.phantoms import breathing_cycle
from icon_nephi.space.frames import Geometry
from tests.fit.small_runs import SMALL

SIZE, PHASES = (40, 40), 5
MM = np.array([300.0, 300.0])
VOXEL = 300 / 39
QUICK = {"field": SMALL, "progress": False}


@pytest.fixture(scope="module")
def cycle():
    return breathing_cycle(SIZE, PHASES, noise=5.0)


@pytest.fixture(scope="module")
def series(cycle):
    return icon_nephi.register_series(list(cycle.images), periodic=True, **QUICK)


def errors(series, cycle):
    """Mean millimetres, over all pairs of two phases, after and before."""
    after, before = [], []
    for i, j in itertools.permutations(range(len(series)), 2):
        goal = cycle.points[j].numpy()
        moved = series.map(i, j).transform_points(cycle.points[i])
        after.append(np.linalg.norm((moved - goal) * MM, axis=1).mean())
        apart = (cycle.points[i].numpy() - goal) * MM
        before.append(np.linalg.norm(apart, axis=1).mean())
    return np.mean(after), np.mean(before)


def test_all_pairs_of_a_cycle_are_laid_on_each_other(series, cycle):
    after, before = errors(series, cycle)
    assert after < 0.5 * before
    assert after < VOXEL / 5
    assert not series.warnings
    assert all(e["folded"] == 0 for e in series.fit.evidence)


def test_no_image_is_special(series):
    assert series.mean_displacement() < 0.3


def test_a_way_around_the_cycle_ends_where_it_began(series, cycle):
    start = cycle.points[0].numpy()
    at = start
    for k in range(PHASES):
        at = series.map(k, (k + 1) % PHASES).transform_points(at)
    assert np.abs(at - start).max() * SIZE[0] < 1e-3
    two = series.map(0, 3)
    back = two.transform_points(two.transform_points(start), "moving_to_fixed")
    assert np.abs(back - start).max() * SIZE[0] < 1e-3


def test_jacobians_between_images_are_those_of_the_maps(series):
    pair, rows = series.map(1, 3), np.random.default_rng(0).uniform(0.2, 0.8, (20, 2))
    step = 1e-4
    for axis in range(2):
        off = step * np.eye(2)[axis]
        slope = pair.transform_points(rows + off) - pair.transform_points(rows - off)
        jacobian = pair.two_way.framed("fixed_to_moving").jacobians(rows)
        assert np.abs(slope / (2 * step) - jacobian[:, :, axis]).max() < 0.01


def test_points_are_followed_at_all_times(series, cycle):
    rows = cycle.points[0].numpy()
    path = series.follow(rows, 0)
    assert path.shape == (PHASES, len(rows), 2)
    assert np.abs(path[0] - rows).max() < 1e-5
    assert np.array_equal(path[3], series.map(0, 3).transform_points(rows))
    at_images = series.follow(rows, 0, [0.0, 3.0, 5.0])
    assert np.abs(at_images[:2] - path[[0, 3]]).max() < 1e-5
    assert np.abs(at_images[2] - path[0]).max() < 1e-5  # the period is over
    between = series.follow(rows, 0, [2.5])[0]
    middle = (path[2] + path[3]) / 2
    assert np.abs(between - middle).max() < np.abs(path[2] - path[0]).max()


def test_a_saved_series_is_the_same(series, cycle, tmp_path):
    series.save(tmp_path / "s.nephi")
    loaded = icon_nephi.load(tmp_path / "s.nephi")
    assert type(loaded) is icon_nephi.Series
    assert loaded.told == series.told
    assert loaded.fit.losses[1][-1] == pytest.approx(series.fit.losses[1][-1])
    rows = cycle.points[0].numpy()
    assert np.array_equal(loaded.follow(rows, 0), series.follow(rows, 0))
    with pytest.raises(ValueError, match="has no images"):
        loaded.mean_image()
    with pytest.raises(ValueError, match="save the series"):
        series.map(0, 1).save(tmp_path / "pair.nephi")
    with pytest.raises(ValueError, match="made of several"):
        icon_nephi.certify(series.map(0, 1))


def test_the_series_without_motion_stands_still(series, cycle):
    moving, still = torch.cat(cycle.images), torch.cat(list(series.warped()))
    inner = (..., slice(4, -4), slice(4, -4))
    before, after = (float(i[inner].var(0).mean()) for i in (moving, still))
    assert after < 0.6 * before
    mean = series.mean_image()
    assert torch.allclose(mean[0], still.mean(0), rtol=0, atol=1e-2)


def test_an_image_as_reference_stays_where_it_is(cycle):
    images = list(cycle.images)[:3]
    series = icon_nephi.register_series(images, 1, **QUICK)
    rows = cycle.points[1].numpy()
    moved = series.from_reference(1).transform_points(rows)
    assert np.abs(moved - rows).max() < 1e-6
    assert np.array_equal(series.follow(rows), series.follow(rows, 1))


def test_equal_images_have_equal_maps(cycle):
    images = [cycle.images[0], cycle.images[2], cycle.images[1], cycle.images[2]]
    series = icon_nephi.build_template(images, affine=False, **QUICK)
    rows = np.random.default_rng(0).uniform(0.1, 0.9, (200, 2))
    one, other = (series.from_mean(k).transform_points(rows) for k in (1, 3))
    assert np.array_equal(one, other)
    without = icon_nephi.build_template(images[:3], affine=False, **QUICK)
    alone = without.from_mean(1).transform_points(rows)
    assert np.array_equal(one, alone)


def test_a_run_that_was_killed_goes_on(cycle, tmp_path, monkeypatch):
    images, path = list(cycle.images)[:3], tmp_path / "begun"
    whole = icon_nephi.register_series(images, checkpoint=path, **QUICK)
    assert not path.exists()

    def killed(self, fit):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(group._Group, "end", killed)
        with pytest.raises(KeyboardInterrupt):
            icon_nephi.register_series(images, checkpoint=path, **QUICK)
    assert path.exists()

    def forbidden(*_):
        raise AssertionError("rounds are done already")

    with monkeypatch.context() as patch:
        patch.setattr(group._Group, "round", forbidden)
        again = icon_nephi.register_series(images, checkpoint=path, **QUICK)
    assert not path.exists()
    for one, other in zip(
        whole.fit.code.local_codes, again.fit.code.local_codes, strict=True
    ):
        assert torch.equal(one, other)


def test_one_bad_image_is_named_and_left_out(cycle, tmp_path):
    eye = ((1.0, 0.0), (0.0, 1.0))
    place = Geometry(SIZE, (VOXEL, VOXEL), (0.0, 0.0), eye)
    paths = [tmp_path / f"{k}.nrrd" for k in range(4)]
    for path, image in zip(paths, cycle.images, strict=False):
        itk.imwrite(itk_images.image_of(image[0, 0].numpy(), place), str(path))
    paths[1].write_bytes(b"no image")
    series = icon_nephi.register_series(paths, times=[0, 1, 2, 4], **QUICK)
    assert len(series) == 3
    assert series.times == (0, 2, 4)
    assert "1.nrrd" in series.warnings[0]
    assert series.warnings[0].startswith("left out")
    rows = cycle.points[2].numpy()[:, ::-1] * MM
    assert series.follow(rows, 1).shape == (3, len(rows), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": [0, 2, 1]}, "times must increase"),
        ({"times": [0, 1]}, "times are 2 and images 3"),
        ({"reference": 3}, "0 to 2"),
        ({"reference": "first"}, "must be 'mean'"),
        ({"periodic": 1.0}, "longer than all times"),
        ({"masks": [None]}, "masks are 1 and images 3"),
    ],
)
def test_what_cannot_be_is_said(cycle, change, message):
    with pytest.raises(ValueError, match=message):
        icon_nephi.register_series(list(cycle.images)[:3], **QUICK, **change)


def test_one_image_is_no_series(cycle, tmp_path):
    with pytest.raises(ValueError, match="two at least"):
        icon_nephi.register_series([cycle.images[0]], **QUICK)
    path = tmp_path / "one.nrrd"
    itk.imwrite(itk.image_from_array(np.ones((5, 5, 5), np.float32)), str(path))
    with pytest.raises(ValueError, match="one 3D image; give a 4D image"):
        icon_nephi.register_series(path, **QUICK)
    with pytest.raises(TypeError, match="got one tensor"):
        icon_nephi.register_series(cycle.images[0], **QUICK)
    two = icon_nephi.register_series(list(cycle.images)[:2], **QUICK)
    with pytest.raises(ValueError, match="outside of the series"):
        two.at(1.5)


def test_frames_of_a_file_come_back(tmp_path):
    generator = np.random.default_rng(0)
    turned = ((0.0, -1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    place = Geometry((4, 5, 6), (1.0, 2.0, 3.0), (-7.0, 8.0, 9.0), turned)
    values = generator.normal(size=(3, 4, 5, 6)).astype(np.float32)
    path = tmp_path / "4d.nii.gz"
    write_frames((itk_images.image_of(v, place) for v in values), path, 0.5)
    frames, step = frames_of("images", itk.imread(str(path)))
    assert step == 0.5
    assert len(frames) == 3
    for frame, array in zip(frames, values, strict=True):
        assert np.array_equal(itk_images.array_of(frame), array)
        found = itk_images.geometry_of(frame)
        assert np.allclose(found.unit_to_physical(), place.unit_to_physical())
    with pytest.raises(ValueError, match="one volume"):
        frames_of("images", itk.image_from_array(values[:1]))
