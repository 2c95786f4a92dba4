"""What is doubtful about a fit is found, and said."""

import math
from dataclasses import replace

import pytest
import torch

from icon_nephi.fit import optimize as optimize_room
from icon_nephi.fit.doubts import doubts, evidence, of_images
from icon_nephi.fit.settings import SIREN, make_pair
from icon_nephi.fit.steps import make_steps
from icon_nephi.maps.networks import AffinePair
from icon_nephi.phantoms import triangles_and_circles
from icon_nephi.space.frames import Geometry
from icon_nephi.space.intensities import PreparedImage
from tests.small_fits import fit_tensors

QUICK = replace(
    SIREN,
    arguments=(("width", 16), ("frequencies", 8), ("omega", 5.0)),
    grids=(5, 9),
    channels=(4, 4),
    steps=12,
    patches=100,
    regularity_points=40,
)
PLACE = Geometry((48, 48), (2.0, 2.0), (0.0, 0.0), ((1.0, 0.0), (0.0, 1.0)))
GOOD = {
    **{"outside": 0.0, "folded": 0.0, "return": 0.1, "return_most": 0.3},
    **{"uneven": 0.1, "alike": 0.9, "alike_start": 0.7, "opposed": 0.0},
}


@pytest.fixture(scope="module")
def image():
    return (triangles_and_circles(1, size=48, seed=3).images + 1) / 2


def found(image_A, image_B, matrix=None):
    """Evidence of a pair that is the identity behind a matrix."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.eye(3) if matrix is None else matrix
    pair = AffinePair(make_pair(QUICK, PLACE.extent, generator), matrix)
    where = torch.zeros(1, 1, 48, 48, dtype=torch.bool)
    where[..., 1:, :] = image_B.diff(dim=2).abs() > 0.05  # edges of the shape
    with torch.no_grad():
        return evidence(pair, image_A, image_B, PLACE, where, generator)


def test_a_good_result_has_nothing_doubtful(image):
    numbers = found(image, image)
    assert numbers.keys() == GOOD.keys()
    assert numbers["return"] < 1e-4
    assert numbers["folded"] == numbers["outside"] == 0
    assert numbers["alike"] == numbers["alike_start"] > 0.4
    assert doubts(GOOD) == []


def test_what_maps_outside_is_counted(image):
    shifted = torch.eye(3)
    shifted[0, 2] = 0.4
    numbers = found(image, image, shifted)
    assert 0.05 < numbers["outside"] < 0.6
    (sentence,) = doubts(GOOD | {"outside": 0.4})
    assert "outside image_A" in sentence


def test_inverted_contrast_is_told_where_it_was_not_announced(image):
    numbers = found(1 - image, image)
    assert numbers["alike"] < -0.3
    inverted = GOOD | {k: numbers[k] for k in ("alike", "alike_start", "opposed")}
    assert any("lncc2" in sentence for sentence in doubts(inverted))
    assert doubts(inverted, contrast=True) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"folded": 0.01}, "folds"),
        ({"coarse": 15.0}, "a voxel is 15/160"),
        ({"gaps": 3.0}, "3 slices"),
        ({"return": 9.0, "return_most": 20.0}, "each other's inverse"),
        ({"alike": 0.1, "alike_start": 0.05}, "little alike"),
        ({"alike": 0.6, "alike_start": 0.8}, "less alike than"),
        ({"uneven": 3.0}, "uneven"),
    ],
)
def test_every_doubt_is_one_sentence(change, words):
    (sentence,) = doubts(GOOD | change)
    assert words in sentence
    assert "\n" not in sentence


def test_empty_slices_and_thick_voxels_are_seen(image):
    holed = image.clone()
    holed[..., 20, :] = holed[..., 30] = 0
    holed[..., :3, :] = holed[..., -2:] = 0  # borders are no gaps
    thick = replace(PLACE, spacing=(2.0, 12.0))
    whole = PreparedImage.of(image, PLACE)
    assert of_images(whole, whole)["gaps"] == 0
    numbers = of_images(replace(whole, place=thick, gaps=2), whole)
    assert numbers["gaps"] == 2
    assert numbers["coarse"] == pytest.approx(160 * 12 / 94)


def test_a_fit_says_what_it_found_and_keeps_the_numbers(image):
    # Moved: of equal images no fit is as good as none, which is then kept, and said.
    fit = fit_tensors(image.roll(3, 2), image, PLACE, PLACE, field=QUICK)
    assert fit.evidence.keys() == {*GOOD, "coarse", "gaps"}
    assert all(math.isfinite(x) for x in fit.evidence.values())
    assert fit.warnings == doubts(fit.evidence)


@pytest.mark.parametrize("core", ["torch", ""])
@pytest.mark.parametrize("at", [7, 12])
def test_a_loss_that_is_not_a_number_keeps_the_last_good_map(
    image, monkeypatch, at, core
):
    def broken(*arguments):
        """Steps that make the weights NaN at some call."""
        steps, calls = make_steps(*arguments), []
        advance = steps.advance

        def break_at(part):
            advance(part)
            calls.append(part)
            for weight in steps.weights if len(calls) == at else ():
                weight.data.fill_(float("nan"))

        steps.advance = break_at
        return steps

    monkeypatch.setenv("NEPHI_CORE", core)
    monkeypatch.setattr(optimize_room, "make_steps", broken)
    monkeypatch.setattr("icon_nephi.fit.unfold.UNFOLD_ROUNDS", 0)
    fit = fit_tensors(image, image, PLACE, PLACE, field=QUICK, affine=False)
    assert len(fit.losses) == at
    assert all(math.isfinite(step["all_loss"]) for step in fit.losses)
    assert f"after {at} steps" in fit.warnings[0]
    parts = [*fit.code.local_codes, *fit.field_AB.state_dict().values()]
    assert all(bool(part.isfinite().all()) for part in parts)
