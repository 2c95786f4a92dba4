"""What a person knows or asks for beside the images is kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from icon_nephi.fit.settings import GRID
from icon_nephi.fit.wishes import Wishes
from icon_nephi.losses.parts import best_turn
from icon_nephi.maps.jacobians import determinants
from icon_nephi.maps.transforms import value_and_jacobian
from icon_nephi.space.frames import points_as_grid
from tests.fit.bodies import (
    FAST,
    Body,
    Motion,
    drawn,
    error_of,
    found,
    go,
    inner,
    places,
    rotation,
)

SIZE = (72, 72)


def in_box(matrix, shift):
    """A linear map of places from -1 to 1 as a matrix of the unit boxes."""
    d = len(matrix)
    half = torch.eye(d + 1).double() / 2
    half[:d, d], half[d, d] = 0.5, 1
    linear = torch.eye(d + 1).double()
    linear[:d, :d], linear[:d, d] = matrix, shift
    return half @ linear @ torch.linalg.inv(half)


@pytest.fixture(scope="module")
def turned():
    """A body turned by 120 degrees and moved, and its motion without that."""
    body, turn = Body(blobs=140), rotation(120.0)
    shift = torch.tensor([0.5, -0.4]).double()
    small, at = Motion(reach=0.07), places(SIZE)

    def motion(y):
        return small((y - shift) @ turn.T)

    images = drawn(body(at), SIZE), drawn(body(motion(at)), SIZE)
    y = inner(body, small) @ turn + shift
    return images, motion, y, in_box(turn, -turn @ shift)


def test_an_initial_transform_is_kept(turned):
    images, motion, y, initial = turned
    y = y[(y.abs() < 0.97).all(1)]
    error = error_of(go(*images, initial=initial.numpy()), motion, y, SIZE)
    assert error.mean() < 0.5


def test_landmarks_are_a_start(turned):
    images, motion, y, _ = turned
    y = y[(y.abs() < 0.97).all(1)]
    points = y[::40]
    ends = {"landmarks_B": (points + 1) / 2, "landmarks_A": (motion(points) + 1) / 2}
    result = go(*images, **ends, initial="landmarks", use_landmarks=False)
    assert error_of(result, motion, y, SIZE).mean() < 0.5


def test_landmarks_bring_a_pair_that_fails_without():
    """Stripes that fit as well one period further."""
    at = places(SIZE)
    shift = torch.tensor([0.25, 0.0]).double()

    def draw(x):
        waves = 0.5 + 0.5 * torch.sin(x[:, 0] * 8 * np.pi)
        return waves * torch.sigmoid((0.8 - x.norm(dim=1)) * 25)

    images = drawn(draw(at), SIZE), drawn(draw(at + shift), SIZE)
    y = torch.tensor([[0.0, 0.0], [-0.3, 0.3], [-0.2, -0.4]]).double()
    ends = {"landmarks_B": (y + 1) / 2, "landmarks_A": (y + shift + 1) / 2}
    result = go(*images, **ends, landmark_error=1.0)
    away = (found(result, y) - y - shift).norm(dim=1) * 35.5
    assert away.max() < 1


def disc(at, centre, radius):
    return (at - torch.tensor(centre).double()).norm(dim=1) < radius


def test_a_rigid_part_is_turned_and_shifted_only():
    body, motion, at = Body(blobs=140), Motion(reach=0.09), places(SIZE)
    images = drawn(body(at), SIZE), drawn(body(motion(at)), SIZE)
    part = disc(at, [0.1, -0.1], 0.3)
    y = at[part]

    def unlike(result):
        moved = found(result, y)
        best = y @ best_turn(y, moved)
        away = moved - moved.mean(0) - best + best.mean(0)
        return float(away.norm(dim=1).max()) * 35.5

    assert unlike(go(*images)) > 0.5
    assert unlike(go(*images, rigid_mask=drawn(part, SIZE).long())) < 0.1


def slopes(result, y):
    """Determinants at places."""
    at = points_as_grid(((y + 1) / 2).float()[None])
    with torch.no_grad():
        return determinants(value_and_jacobian(result.phi_AB, at)[1]).flatten()


def test_a_part_keeps_its_volume():
    body, motion, at = Body(blobs=140), Motion(reach=0.09), places(SIZE)
    images = drawn(body(at), SIZE), drawn(body(motion(at)), SIZE)
    part = disc(at, [0.1, -0.1], 0.3)
    kept = go(*images, volume_mask=drawn(part, SIZE).long())
    assert (slopes(kept, at[part]) - 1).abs().max() < 0.03
    assert (slopes(kept, at[part]) - 1).abs().mean() < 0.01
    assert (slopes(go(*images), at[part]) - 1).abs().max() > 0.1


def test_a_lesion_without_a_counterpart_changes_nothing_else():
    body, motion, at = Body(blobs=140), Motion(reach=0.07), places(SIZE)
    hole = (motion(at) - torch.tensor([0.2, -0.1]).double()).norm(dim=1) < 0.22
    fixed = torch.where(hole, 0.05, body(motion(at)))
    images = drawn(body(at), SIZE), drawn(fixed, SIZE)
    result = go(*images, lesion_mask_B=drawn(hole, SIZE).long())
    y = inner(body, motion)
    assert error_of(result, motion, y, SIZE).mean() < 0.3
    # Its volume in the moving image, by the map and in truth.
    found_at, h = slopes(result, at[hole]), 1e-4
    step = torch.eye(2).double() * h
    columns = [(motion(at[hole] + s) - motion(at[hole] - s)) / (2 * h) for s in step]
    true = torch.linalg.det(torch.stack(columns, 2))
    assert float(found_at.sum() / true.sum()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("core", "steps"), [("", FAST.steps), ("torch", 10)])
def test_motion_is_restricted_to_an_axis(core, steps, monkeypatch):
    monkeypatch.setenv("NEPHI_CORE", core)
    body, at = Body(blobs=140), places(SIZE)
    push = Motion(reach=0.09)

    def motion(y):
        return torch.stack([push(y)[:, 0], y[:, 1]], 1)

    images = drawn(body(at), SIZE), drawn(body(motion(at)), SIZE)
    # Axis i is the last of a tensor.
    result = go(*images, restrict=(0, 1), field=replace(FAST, steps=steps))
    y = inner(body, motion)
    moved = found(result, y)
    assert (moved - y)[:, 1].abs().max() < 1e-6
    error = error_of(result, motion, y, SIZE).mean()
    assert steps < FAST.steps or error < 0.6


def test_stiffness_is_about_the_nodes():
    assert Wishes().suited(GRID) is GRID
    assert Wishes(stiffness=2.0).suited(GRID).grids == (4, 8, 16)


def wrong(**choices):
    image = torch.rand(1, 1, 12, 14, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r".") as error:
        go(image, image.flip(2), **choices)
    return str(error.value)


def test_wishes_that_cannot_be_are_refused():
    points = np.full((3, 2), 0.5)
    assert "landmarks_A is missing" in wrong(landmarks_B=points)
    assert "row by row" in wrong(landmarks_A=points, landmarks_B=points[:2])
    assert "there are none" in wrong(initial="landmarks")
    assert "does not exist" in wrong(initial="none.h5")
    assert "homogeneous matrix [3, 3]" in wrong(initial=np.eye(4))
    assert "cannot be inverted" in wrong(initial=np.diag([1.0, 0, 1]))
    assert "at least one of them 1" in wrong(restrict=(0, 0))
    assert "2 numbers 0 or 1" in wrong(restrict=(1, 0, 1))
    assert "stiffness must be above zero" in wrong(stiffness=0.0)
    assert "landmark_error must be above zero" in wrong(landmark_error=-1.0)
    empty = torch.zeros(1, 1, 12, 14).long()
    assert "rigid_mask is empty" in wrong(rigid_mask=empty)
    assert "leaves nothing of image_B" in wrong(lesion_mask_B=empty + 1)
