"""Fits on lattices: plans, known motions, and the maps that come out."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import icon_nephi
from icon_nephi.fit.dense import mended, plan, spline_pair, together
from icon_nephi.fit.settings import PRESETS, Lattices
from icon_nephi.losses.dense import DensePair, refined
from icon_nephi.maps.transforms import value_and_jacobian
from icon_nephi.space.frames import identity_map
from icon_nephi.space.images import gaussian_blur, sample_image

SMALL = replace(
    PRESETS["lattices"][2], lattices=Lattices(steps=(30, 20), coarsest=24, hinge=300.0)
)


def moved_pair(dimension=2, size=48, far=0.03, seed=0):
    """Images ``[1, 1, *grid]``, and the displacement from the second to the first."""
    g = torch.Generator().manual_seed(seed)
    grid = (size,) * dimension
    A = gaussian_blur(torch.rand(1, 1, *grid, generator=g), [2.0] * dimension)
    A = (A - A.min()) / (A.max() - A.min())
    x = identity_map(grid)
    waves = torch.sin(2 * math.pi * x.roll(1, 1)) * torch.sin(math.pi * x)
    move = far * waves
    return A, sample_image(A, x + move), move


@pytest.mark.parametrize("dimension", [2, 3])
def test_a_known_motion_is_found_both_ways_without_folds(dimension):
    size, steps = (48, (30, 20)) if dimension == 2 else (32, (30, 20))
    A, B, move = moved_pair(dimension, size)
    how = replace(SMALL.lattices, steps=steps, coarsest=size // 2, radius=2)
    found = icon_nephi.register(
        A, B, field=replace(SMALL, lattices=how), progress=False, affine=False
    )
    x = identity_map(B.shape[2:])
    there, slopes = value_and_jacobian(found.phi_AB, x)
    middle = (slice(None), slice(None), *[slice(size // 6, -size // 6)] * dimension)
    before = move[middle].norm(dim=1).mean()
    after = (there - x - move)[middle].norm(dim=1).mean()
    assert after < 0.25 * before
    around = found.phi_BA(there) - x
    assert around[middle].norm(dim=1).mean() < 0.2 * before
    matrices = slopes.movedim((1, 2), (-2, -1))
    assert float(torch.linalg.det(matrices).min()) > 0


def test_the_same_fit_twice_gives_the_same_bits_whatever_the_seed():
    A, B, _ = moved_pair()
    codes = [
        icon_nephi.register(
            A, B, field=SMALL, progress=False, affine=False, seed=seed
        ).fit.code.local_codes[0]
        for seed in (0, 1)
    ]
    assert torch.equal(*codes)


def test_what_was_fitted_is_saved_and_comes_back(tmp_path):
    A, B, _ = moved_pair()
    found = icon_nephi.register(A, B, field=SMALL, progress=False, affine=False)
    found.save(tmp_path / "pair.nephi")
    again = icon_nephi.load(tmp_path / "pair.nephi")
    x = identity_map((7, 9))
    assert torch.equal(found.phi_AB(x), again.phi_AB(x))


def test_an_interrupt_that_is_kept_leaves_what_was_reached(monkeypatch):
    A, B, _ = moved_pair()
    derive, done = DensePair.derive, []

    def interrupted(self, code):
        done.append(1)
        if len(done) == 35:
            raise KeyboardInterrupt
        return derive(self, code)

    monkeypatch.setattr(DensePair, "derive", interrupted)
    options = {"field": SMALL, "progress": False, "affine": False}
    found = icon_nephi.register(A, B, keep_on_interrupt=True, **options)
    assert any("stopped by the user" in text for text in found.warnings)
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        icon_nephi.register(A, B, **options)


def test_levels_double_and_short_axes_keep_their_nodes():
    levels = plan((96, 96, 9), (95.0, 95.0, 40.0), Lattices(coarsest=16))
    sizes = [level.size for level in levels]
    assert sizes[-1] == (96, 96, 9)
    assert 16 < max(sizes[0]) <= 32
    for coarse, fine in pairwise(levels):
        for few, many in zip(coarse.intervals, fine.intervals, strict=True):
            assert many in (few, 2 * few)
    assert levels[-1].intervals[2] < levels[-1].intervals[0]


def test_an_image_is_compared_at_so_many_places_at_most():
    how = Lattices(places=(10_000, 20_000))
    for size in ((4000, 3000), (400, 300, 200)):
        levels = plan(size, [float(n - 1) for n in size], how)
        assert math.prod(levels[-1].size) <= how.places[len(size) - 2]


def test_parts_of_a_code_are_one_code():
    g = torch.Generator().manual_seed(0)
    coarse, fine = (torch.randn(1, 4, n, n, generator=g) for n in (6, 10))
    expected = refined(coarse, (10, 10)) + fine
    assert torch.equal(together([coarse, fine]), expected)


@pytest.mark.parametrize("dimension", [2, 3])
def test_folds_are_mended_and_the_rest_stays(dimension):
    code = torch.zeros(1, 2 * dimension, *(14,) * dimension)
    code[(0, 0, *(7,) * dimension)] = 0.4  # far beyond its neighbours
    size = (30,) * dimension
    scale = torch.ones(dimension)

    @torch.no_grad()
    def least(code):
        phi = spline_pair(code, (1.0,) * dimension)(*[torch.zeros(1, 1, *size)] * 2)[0]
        slopes = value_and_jacobian(phi, identity_map(size))[1]
        return float(torch.linalg.det(slopes.movedim((1, 2), (-2, -1))).min())

    better = mended(code, size, scale)
    assert least(code) < 0 < least(better)
    assert torch.equal(better[:, dimension:], code[:, dimension:])
    assert float(better[(0, 0, *(0,) * dimension)]) == 0.0


def test_a_loss_that_is_no_number_ends_it_at_what_was_reached(monkeypatch):
    A, B, _ = moved_pair()
    derive, done = DensePair.derive, []

    def broken(self, code):
        done.append(1)
        loss, gradient = derive(self, code)
        return (loss._replace(total=math.nan) if len(done) == 12 else loss), gradient

    monkeypatch.setattr(DensePair, "derive", broken)
    options = {"field": SMALL, "progress": False, "affine": False}
    found = icon_nephi.register(A, B, **options)
    assert any("after 11 steps" in text for text in found.warnings)
    assert found.phi_AB(identity_map((5, 5))).isfinite().all()
