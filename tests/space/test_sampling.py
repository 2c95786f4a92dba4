"""Random points and blocks."""

import pytest
import torch

from icon_nephi.space.sampling import Patches, Points, draw_points

SHAPE = {2: (9, 5), 3: (5, 7, 4)}


def voxels(rows, shape):
    """The voxel that each row ``[..., d]`` lies in."""
    return (rows * (torch.tensor(shape) - 1)).round().long()


def some_mask(dimension, batch=1):
    mask = torch.zeros(batch, 1, *SHAPE[dimension])
    mask[:, :, 1:3, 2:4] = 1
    return mask


def test_points_fill_the_unit_box(dimension, precision, generator):
    rows = draw_points(4000, 2, dimension, generator=generator, dtype=precision.dtype)
    assert rows.shape == (2, 4000, dimension)
    assert rows.dtype == precision.dtype
    assert rows.min() >= 0
    assert rows.max() <= 1
    assert not torch.equal(rows[0], rows[1])
    torch.testing.assert_close(
        rows.mean(1), torch.full((2, dimension), 0.5).to(rows), atol=0.03, rtol=0
    )


def test_points_stay_in_the_mask_and_fill_it(dimension, precision, generator):
    mask = some_mask(dimension)
    rows = draw_points(
        3000, 2, dimension, mask=mask, generator=generator, dtype=precision.dtype
    )
    assert rows.dtype == precision.dtype
    for item in rows:
        found = voxels(item, SHAPE[dimension])
        assert (mask[0, 0][tuple(found.T)] > 0).all()
        counts = torch.zeros(SHAPE[dimension])
        counts.index_put_(tuple(found.T), torch.ones(3000), accumulate=True)
        share = counts[mask[0, 0] > 0] / 3000
        assert (share * len(share) - 1).abs().max() < 0.35


def test_every_item_has_its_own_mask(generator):
    mask = torch.zeros(2, 1, 6, 6)
    mask[0, :, 1, 1] = 1
    mask[1, :, 4, 3] = 1
    rows = draw_points(20, 2, 2, mask=mask, generator=generator)
    assert (voxels(rows[0], (6, 6)) == torch.tensor([1, 1])).all()
    assert (voxels(rows[1], (6, 6)) == torch.tensor([4, 3])).all()


def test_a_lone_voxel_in_a_large_mask_is_found(generator):
    mask = torch.zeros(1, 1, 200, 200, dtype=torch.bool)
    mask[0, 0, 199, 0] = True
    rows = draw_points(10, 1, 2, mask=mask, generator=generator)
    assert (voxels(rows[0], (200, 200)) == torch.tensor([199, 0])).all()
    assert rows.max() <= 1
    assert rows.min() >= 0


def test_an_empty_mask_is_refused(generator):
    with pytest.raises(ValueError, match="mask is empty"):
        draw_points(3, 1, 2, mask=torch.zeros(1, 1, 5, 5), generator=generator)


@pytest.mark.parametrize("masked", [False, True])
def test_the_generator_decides_everything(dimension, masked):
    mask = some_mask(dimension) if masked else None
    state = torch.get_rng_state()

    def draw(seed):
        source = torch.Generator().manual_seed(seed)
        return draw_points(50, 2, dimension, mask=mask, generator=source)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("masked", [False, True])
def test_no_items_have_no_points(dimension, masked):
    mask = some_mask(dimension, 0) if masked else None
    rows = draw_points(5, 0, dimension, mask=mask, dtype=torch.float64)
    assert rows.shape == (0, 5, dimension)
    assert rows.dtype == torch.float64


def test_offsets_are_voxels_apart_and_centred(precision):
    patches = Patches(1, size=4, stride=(2.0, 0.5))
    offsets = patches.offsets((9, 5), torch.zeros((), dtype=precision.dtype))
    assert offsets.shape == (2, 4, 4)
    assert offsets.dtype == precision.dtype
    precision.close(
        offsets[0, 1:] - offsets[0, :-1], torch.full_like(offsets[0, 1:], 2 / 8)
    )
    precision.close(
        offsets[1, :, 1:] - offsets[1, :, :-1],
        torch.full_like(offsets[1, :, 1:], 0.5 / 4),
    )
    precision.close(offsets.mean((1, 2)), torch.zeros(2, dtype=precision.dtype))


def test_one_stride_serves_every_axis(dimension):
    like = torch.zeros(())
    many = Patches(1, 3, (2.0,) * dimension).offsets(SHAPE[dimension], like)
    assert torch.equal(Patches(1, 3, 2.0).offsets(SHAPE[dimension], like), many)
    assert many.shape == (dimension, *(3,) * dimension)


@pytest.mark.parametrize("make", [Points, Patches])
def test_a_count_below_one_is_refused(make):
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        make(0)


def test_impossible_blocks_are_refused():
    with pytest.raises(ValueError, match="size must be at least 2, got 1"):
        Patches(5, size=1)
    with pytest.raises(ValueError, match="does not have 3 numbers"):
        Patches(5, stride=(1.0, 2.0)).offsets((4, 4, 4), torch.zeros(()))
