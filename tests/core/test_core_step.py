"""A whole step on the core: as by torch, from the same draws."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icon_nephi.fields import compiled as core_field
from icon_nephi.fit.compiled import BETAS, PairSteps, suits
from icon_nephi.fit.wishes import Wishes
from icon_nephi.space.frames import Geometry
from icon_nephi.space.sampling import Points
from tests.core.core_problems import apart, groups_of, make_loss


def gradients(step):
    """As torch's, the prior's included, in the order of the step's owners."""
    found = []
    for number, owner in enumerate(step.owners):
        g = step.gradients[number] + 2 * step.decays[number] * step.weights[number]
        found.append(core_field.as_grid(g, owner) if owner.dim() > 2 else g)
    return found


def both(loss, images, masks):
    """The step on the core, its losses, and torch's from the same draws."""
    state = loss.generator.get_state()
    loss.zero_grad()
    expected = loss(*images, *masks)
    expected.all_loss.backward()
    drawn = loss.generator.get_state()
    loss.generator.set_state(state)
    step = PairSteps(loss, *images, *masks, groups_of(loss))
    found = step.derive()
    assert torch.equal(loss.generator.get_state(), drawn)
    return step, found, [float(t.detach()) for t in expected]


def check(loss, images, masks, close=1e-5):
    assert suits(loss, images, [loss.similarity_sampler])
    step, found, expected = both(loss, images, masks)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=2e-6, abs=1e-6)
    assert found.all_loss == pytest.approx(expected[0], rel=1e-6)
    for one, owner in zip(gradients(step), step.owners, strict=True):
        if owner.numel():
            assert apart(one, owner.grad) < close


@given(
    dimension=st.sampled_from([2, 3]),
    kind=st.sampled_from(["plain", "squared", "shared", "features", "mind"]),
    channels=st.integers(1, 3),
    corners=st.booleans(),
    masked=st.booleans(),
    counted=st.booleans(),
    size=st.integers(2, 5),
    field=st.sampled_from(["small", "sines"]),
    count=st.integers(1, 70),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def any_step(dimension, **chosen):
    # Of a few blocks alone torch itself is further than that from float64.
    close = 1e-5 if chosen["count"] >= 20 else 5e-5
    check(*make_loss(dimension, **chosen), close)


def test_any_step_is_as_torch(core):
    any_step()


@pytest.mark.parametrize("kind", ["plain", "shared", "features"])
def test_a_step_in_its_usual_size(core, dimension, kind):
    check(*make_loss(dimension, kind, masked=True, counted=True, count=300))


def test_parts_beside_the_images_are_as_torch(core, dimension, generator):
    loss, images, masks = make_loss(dimension)
    labels = torch.zeros(1, 1, *images[1].shape[2:], dtype=torch.long)
    labels[..., 4:9, 5:11] = 1
    labels[..., 12:16, 5:11] = 2
    points = torch.rand(4, dimension, generator=generator).double()
    wishes = Wishes(landmarks=(points, points + 0.1), rigid=labels, volume=labels)
    places_of = [Geometry.unit(i.shape[2:]) for i in images]
    loss.parts = wishes.parts(*places_of)
    # A shift of a whole part costs nothing: what it derives to cancels, to roundings.
    check(loss, images, masks, 3e-4)


def test_identity_on_the_border(core, dimension):
    """Untouched fields and no affine part: samples stay exactly where they are."""
    loss, images, masks = make_loss(dimension, count=200)
    pair = loss.regis_net
    for field in (pair.net.field_AB, pair.net.field_BA):
        torch.nn.init.zeros_(field.last.weight)
    for matrix in (pair.matrix, pair.inverse):
        matrix.copy_(torch.eye(dimension + 1))
    check(loss, images, masks)


def test_steps_one_after_the_other(core, dimension):
    """Adam's steps, and weights that torch reads."""
    loss, images, masks = make_loss(dimension, "features", masked=True)
    step = PairSteps(loss, *images, *masks, groups_of(loss))
    state = loss.generator.get_state()
    groups = groups_of(loss)
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    expected = []
    for _ in range(5):
        optimizer.zero_grad()
        found = loss(*images, *masks)
        found.all_loss.backward()
        optimizer.step()
        expected.append(float(found.all_loss.detach()))
    by_torch = [p.detach().clone() for p in step.owners]
    loss.generator.set_state(state)
    for value in expected:
        assert step.derive().all_loss == pytest.approx(value, rel=1e-4)
        step.advance(1.0)
    step.write()
    for owner, other in zip(step.owners, by_torch, strict=True):
        if owner.numel():
            assert apart(owner, other) < 1e-2
    assert step.finite()


def test_what_is_in_no_group_stays(core):
    loss, images, masks = make_loss(2)
    step = PairSteps(loss, *images, *masks, groups_of(loss)[:1])
    before = [w.clone() for w in step.weights]
    step.derive()
    step.advance(1.0)
    count = len(step.grids) + 1
    assert not torch.equal(step.weights[0], before[0])
    pairs = zip(step.weights[count:], before[count:], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(g.any() for g in step.gradients)


def test_a_step_is_taken_back(core):
    loss, images, masks = make_loss(2)
    step = PairSteps(loss, *images, *masks, groups_of(loss))
    before = [w.clone() for w in step.weights]
    step.derive()
    step.advance(1.0)
    step.restore()
    assert all(torch.equal(a, b) for a, b in zip(step.weights, before, strict=True))


@pytest.mark.parametrize("kind", ["plain", "features"])
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_images_with_numbers_that_are_none(core, dimension, kind, what):
    loss, images, masks = make_loss(dimension, kind)
    images[0][..., ::3] = what
    step = PairSteps(loss, *images, *masks, groups_of(loss))
    assert not math.isfinite(step.derive().all_loss)
    step.advance(1.0)
    assert not step.finite()


def test_any_number_of_threads_gives_the_same_bits(core, threads, dimension):
    found = []
    for count in (1, 2, 3):
        threads(count)
        loss, images, masks = make_loss(dimension, "features", masked=True, count=300)
        step = PairSteps(loss, *images, *masks, groups_of(loss))
        losses = []
        for _ in range(3):
            losses.append(tuple(step.derive()))
            step.advance(1.0)
        found.append((losses, step.weights))
    for losses, weights in found[1:]:
        assert losses == found[0][0]
        pairs = zip(weights, found[0][1], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_what_does_not_suit_is_left_to_torch(core):
    loss, images, _ = make_loss(2)
    sampler = loss.similarity_sampler
    assert suits(loss, images, [sampler])
    assert not suits(loss, images, [sampler, Points(9)])
    assert not suits(loss, [i.double() for i in images], [sampler])
    assert not suits(loss, images, [sampler], extras={"segmentation_A": images[0]})
    loss.dice_loss_weight = 1.0
    assert not suits(loss, images, [sampler])
    loss, images, _ = make_loss(2)
    loss.similarity = lambda a, b: (a - b).square().mean()
    assert not suits(loss, images, [sampler])
    loss, images, _ = make_loss(2)
    loss.densities = 1
    assert not suits(loss, images, [sampler])
    assert replace(sampler) == sampler  # layouts are kept by sampler
