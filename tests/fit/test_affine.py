"""The affine start: a known movement is found again."""

import time

import pytest
import torch

from icon_nephi.fit.affine import (
    centre_of_mass,
    in_unit_boxes,
    refine,
    search,
    voxel_stride,
)
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.space.frames import apply_affine
from tests.fit.moved_scene import OTHER, error, geometry, pair


def test_a_known_movement_is_found(dimension, generator):
    image_A, image_B, of_A, of_B, expected = pair(dimension)
    start = torch.eye(dimension + 1, dtype=torch.float64)
    options = {"angles": (-10.0, 0.0, 10.0), "count": 1500, "generator": generator}
    near = search(image_A, image_B, of_A, of_B, [start], **options)
    assert near.shape == start.shape
    assert near.dtype == torch.float64
    assert error(near, expected, of_B) < 0.6 * error(start, expected, of_B)
    found = refine(
        *(image_A, image_B, of_A, of_B, near),
        strides=(9.0, 5.0),
        steps=50,
        count=80,
        generator=generator,
    )
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert error(found, expected, of_B) < 1.0  # voxels are 1.5 to 3.4 mm


def test_a_mask_says_where_to_look(generator):
    image_A, image_B, of_A, of_B, expected = pair(2)
    mask = torch.zeros_like(image_B)
    mask[..., 8:30, 6:28] = 1
    image_B = torch.where(mask > 0, image_B, torch.rand(image_B.shape))
    start = torch.eye(3, dtype=torch.float64)
    options = {"angles": (-8.0, 0.0, 8.0), "mask_B": mask, "count": 1500}
    near = search(
        *(image_A, image_B, of_A, of_B, [start]), generator=generator, **options
    )
    assert error(near, expected, of_B) < 0.6 * error(start, expected, of_B)


def test_the_best_of_several_starts_is_taken(generator):
    image_A, image_B, of_A, of_B, expected = pair(2)
    far = torch.eye(3, dtype=torch.float64)
    far[:2, 2] = 70.0
    options = {"angles": (0.0,), "count": 1000, "generator": generator}
    near = search(image_A, image_B, of_A, of_B, [far, expected], **options)
    assert error(near, expected, of_B) < 3.0


def test_the_generator_decides_the_search_and_the_refinement():
    image_A, image_B, of_A, of_B, _ = pair(2)
    start = torch.eye(3, dtype=torch.float64)
    state = torch.get_rng_state()

    def found(seed):
        source = torch.Generator().manual_seed(seed)
        pair = (image_A, image_B, of_A, of_B)
        near = search(*pair, [start], angles=(0.0,), count=200, generator=source)
        return refine(*pair, near, strides=(6.0,), steps=3, count=9, generator=source)

    assert torch.equal(found(1), found(1))
    assert not torch.equal(found(1), found(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_perfect_start_is_kept(generator):
    _, image_B, _, of_B, _ = pair(2)
    start = torch.eye(3, dtype=torch.float64)
    found = refine(
        *(image_B, image_B, of_B, of_B, start),
        strides=(6.0,),
        steps=15,
        count=60,
        generator=generator,
    )
    assert error(found, start, of_B) < 0.5


def test_the_centre_of_mass_is_in_millimetres(dimension):
    of = geometry(OTHER[dimension], (1.7, 1.5, 3.0), (-5.0, 4.0, 2.0), 20.0)
    image = torch.zeros(1, 1, *of.size)
    corner = (3, 5, 7)[:dimension]
    image[(0, 0, *corner)] = 2.0
    unit = [i / (n - 1) for i, n in zip(corner, of.size, strict=True)]
    expected = apply_affine(of.unit_to_physical(), torch.tensor([unit]).double())[0]
    torch.testing.assert_close(
        centre_of_mass(image, of), expected, atol=1e-5, rtol=1e-6
    )


def test_unit_boxes_carry_the_same_map(dimension):
    _, _, of_A, of_B, matrix = pair(dimension)
    rows = torch.rand(5, dimension, dtype=torch.float64)
    there = apply_affine(matrix, apply_affine(of_B.unit_to_physical(), rows))
    expected = apply_affine(of_A.physical_to_unit(), there)
    found = apply_affine(in_unit_boxes(matrix, of_B, of_A), rows)
    torch.testing.assert_close(found, expected)


def test_a_stride_is_in_voxels_of_each_tensor_axis():
    of = geometry((10, 10, 10), (0.5, 2.0, 8.0), (0.0, 0.0, 0.0))
    assert voxel_stride(4.0, of) == pytest.approx((1.0, 2.0, 8.0))


class Clock:
    """A limit of so many seconds, of which every look at the clock takes one."""

    def __init__(self, monkeypatch, limit):
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", self.tick)
        self.options = FitOptions(progress=False, time_limit=limit)

    def tick(self):
        self.now += 1
        return self.now


@pytest.mark.parametrize(("limit", "share"), [(0.5, 1.001), (4, 1.001), (1000, 0.6)])
def test_a_search_ends_with_its_time_at_the_best_so_far(
    limit, share, generator, monkeypatch
):
    """Never at a worse map than the better of the starts."""
    image_A, image_B, of_A, of_B, expected = pair(2)
    far, start = (torch.eye(3, dtype=torch.float64) for _ in range(2))
    far[:2, 2] = 70.0
    clock = Clock(monkeypatch, limit)
    options = {"angles": (-10.0, 0.0, 10.0), "count": 1500, "generator": generator}
    images = (image_A, image_B, of_A, of_B)
    near = search(*images, [far, start], **options, options=clock.options)
    assert clock.now < limit + 6  # one look for each of three rounds, and one to begin
    assert error(near, expected, of_B) < share * error(start, expected, of_B)


@pytest.mark.parametrize("limit", [0.5, 5])
def test_a_refinement_ends_with_its_time(limit, generator, monkeypatch):
    image_A, image_B, of_A, of_B, _ = pair(2)
    start = torch.eye(3, dtype=torch.float64)
    clock = Clock(monkeypatch, limit)
    matrix = refine(
        *(image_A, image_B, of_A, of_B, start),
        strides=(9.0, 5.0),
        steps=50,
        count=30,
        generator=generator,
        options=clock.options,
    )
    assert clock.now <= limit + 2
    assert torch.equal(matrix, start) == (limit < 1)
