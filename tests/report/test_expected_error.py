"""How far off a registration may be: there and back, and other seeds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluation.accuracy import trust as measured
from icon_nephi.io.image_input import voxel_geometry
from icon_nephi.maps.two_way import DIRECTIONS
from icon_nephi.registration import register as registration
from icon_nephi.registration.result import Registration
from icon_nephi.report import expected_error as trust
from tests.small_fits import geometry, rows_in, small_fit, unit_matrix

SIZES = ((12, 16, 14), (17, 11, 13))


def made(seed=0, *, itk=True, strength=0.01):
    place = (lambda n, s: geometry(n, s)) if itk else (lambda n, s: voxel_geometry(n))
    fit = small_fit(3, unit_matrix(3), strength=strength, seed=seed)
    return Registration(fit, place(SIZES[0], 1), place(SIZES[1], 2), itk=itk)


def points_of(result, direction=DIRECTIONS[0], count=30):
    place = result.geometry_B if direction == DIRECTIONS[0] else result.geometry_A
    rng = np.random.default_rng(0)
    return rows_in(place, count, rng) if result.itk else rng.uniform(size=(count, 3))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_inverse_consistency_is_the_way_there_and_back(direction):
    result = made()
    points = points_of(result, direction)
    back = DIRECTIONS[1 - DIRECTIONS.index(direction)]
    moved = result.transform_points(points, direction)
    missed = np.linalg.norm(result.transform_points(moved, back) - points, axis=1)
    assert missed.max() > 0.1
    np.testing.assert_allclose(
        trust.inverse_consistency(result, points, direction), missed
    )


def test_tensors_are_measured_in_voxels():
    result, other = made(itk=False), made(1, itk=False)
    points = points_of(result)
    back = result.transform_points(result.transform_points(points), DIRECTIONS[1])
    voxels = np.linalg.norm((back - points) * (np.array(SIZES[1]) - 1), axis=1)
    np.testing.assert_allclose(trust.inverse_consistency(result, points), voxels)
    moved = [r.transform_points(points) for r in (result, other)]
    apart = np.linalg.norm((moved[0] - moved[1]) * (np.array(SIZES[0]) - 1), axis=1)
    np.testing.assert_allclose(
        trust.spread([result, other], points), apart / np.sqrt(2)
    )


def test_the_spread_does_not_depend_on_how_many_seeds_there_are():
    moved = np.random.default_rng(0).normal(size=(40, 500, 3))
    for count in (2, 3, 40):
        squares = trust.scatter(moved[:count]) ** 2
        assert squares.mean() == pytest.approx(3, rel=0.1)
    np.testing.assert_allclose(trust.scatter(np.zeros((3, 4, 3))), 0)
    # One axis, three places 0, 1, 2: standard deviation 1.
    line = np.zeros((3, 1, 3))
    line[:, 0, 0] = 0, 1, 2
    np.testing.assert_allclose(trust.scatter(line), 1)


def test_the_estimate_grows_with_each_of_its_parts():
    missed = np.array([0.0, 1.0])
    alone = trust.estimate(2.0, missed)
    assert 0 < alone[0] < alone[1]
    together = trust.estimate(2.0, missed, np.array([0.5, 0.5]))
    assert (together > trust.estimate(2.0, missed, np.zeros(2))).all()
    assert trust.estimate(4.0, missed)[0] == pytest.approx(2 * alone[0])


@pytest.mark.parametrize("itk", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_how_sharp_images_are_makes_the_estimate(itk, direction):
    """Read where the points lie in the fixed image: it grows along its first axis."""
    result = made(itk=itk)
    nodes = torch.linspace(0, 1, 8).view(8, 1, 1).expand(1, 3, 8, 8, 8)
    result.fit = replace(result.fit, sharp=nodes.clone())
    points = points_of(result, direction)
    fixed = points
    if direction != DIRECTIONS[0]:
        fixed = result.transform_points(points, direction)
    if itk:
        inverse = result.geometry_B.physical_to_unit().numpy()
        fixed = fixed @ inverse[:3, :3].T + inverse[:3, 3]
    sharp = np.exp(2 * fixed[:, 0].clip(0, 1))
    np.testing.assert_allclose(result.sharp_at(points, direction), sharp, rtol=0.02)
    missed = trust.inverse_consistency(result, points, direction)
    guess = trust.estimate(1.0, missed, None, result.sharp_at(points, direction))
    np.testing.assert_allclose(
        result.error_estimate(points, direction=direction), guess
    )
    assert (guess > trust.estimate(1.0, missed, None, 0 * sharp)).all()
    assert made().sharp_at(points_of(made())) is None


@pytest.mark.parametrize("itk", [True, False])
def test_a_registration_estimates_its_errors_at_points_and_on_grids(itk):
    result, others = made(itk=itk), [made(s, itk=itk) for s in (1, 2)]
    points = points_of(result)
    alone, all_three = (result.error_estimate(points, o) for o in ((), others))
    assert alone.shape == all_three.shape == (30,)
    assert not np.allclose(alone, all_three)
    image = result.error_image(others=others)
    frame = result.two_way.frame_of(result.geometry_B).numpy()
    corners = np.stack([frame[:3, 3], frame[:3, :3].sum(1) + frame[:3, 3]])
    values = np.asarray(image).reshape(-1)[[0, -1]]
    np.testing.assert_allclose(
        values, result.error_estimate(corners, others), rtol=1e-4
    )


def test_lists_of_points_will_do():
    result = made()
    points = points_of(result)
    np.testing.assert_array_equal(
        result.error_estimate(points.tolist()), result.error_estimate(points)
    )
    np.testing.assert_array_equal(
        trust.inverse_consistency(result, points.tolist()),
        trust.inverse_consistency(result, points),
    )


def test_a_spread_needs_two():
    result = made()
    with pytest.raises(ValueError, match="two or more"):
        trust.spread([result], points_of(result))


def test_an_ensemble_is_one_registration_for_each_seed(monkeypatch):
    asked = []
    monkeypatch.setattr(registration, "register", lambda *a, **k: asked.append((a, k)))
    registration.ensemble("A", "B", 2, modality="ct")
    assert asked == [
        (("A", "B"), {"seed": seed, "modality": "ct"}) for seed in range(2)
    ]


# --- the script that measured the weights -------------------------------------------


def synthetic(case, weights, count=400):
    """A pair whose true errors scatter around a weighted sum of the ingredients."""
    rng = np.random.default_rng(sum(map(ord, case)))
    numbers = {name: rng.gamma(2.0, size=count) for name in measured.INGREDIENTS}
    numbers["voxel"] = np.full(count, rng.uniform(1, 3))
    parts = ("voxel", "consistency", "spread")
    typical = np.stack([numbers[p] for p in parts], 1) @ weights
    error = typical * np.exp(0.3 * rng.normal(size=count))
    return measured.Measured(case, error, numbers)


def test_the_script_finds_weights_and_how_good_they_are():
    pairs = [synthetic(case, np.array([0.5, 1.5, 0.7])) for case in "abcd"]
    weights = measured.fit(pairs, ("voxel", "consistency", "spread"))
    np.testing.assert_allclose(weights, [0.5, 1.5, 0.7], rtol=0.25)
    rows = measured.tabulate(pairs)
    assert list(rows[0]) == list(measured.COLUMNS)
    for row in rows:
        assert row["ensemble_rho"] > row["alone_rho"] > row["rho_displacement"]
        assert row["ensemble_below_1"] == pytest.approx(0.5, abs=0.15)
        assert row["ensemble_below_3"] > 0.95
