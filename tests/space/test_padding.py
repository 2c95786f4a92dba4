"""What is no part of an image is found, and nothing else."""

import math

import pytest
import torch

from icon_nephi.space import padding
from icon_nephi.space.intensities import (
    check_intensities,
    distance_reach,
    missing_slices,
    prepare,
)
from icon_nephi.space.padding import filled

SIZE = 60


def find_padding(image):
    return padding.find_padding(image[0])


@pytest.fixture
def scan(generator):
    """Tissue and air of a scan in Hounsfield units, with noise."""
    at = torch.linspace(-1, 1, SIZE)
    away = (at[:, None] ** 2 + (1.4 * at) ** 2).sqrt()
    scan = torch.where(away < 0.8, 40.0 + 60 * torch.sin(9 * at)[:, None], -990.0)
    noise = 12 * torch.randn(scan.shape, generator=generator)
    return (scan + noise).round().clamp(min=-1023)[None, None]


def around():
    at = torch.linspace(-1, 1, SIZE)
    return (at[:, None] ** 2 + at**2).sqrt()[None, None]


@pytest.mark.parametrize("value", [-2000.0, -3024.0, 32767.0, math.nan])
@pytest.mark.parametrize("radius", [0.7, 0.97])
def test_a_value_far_from_all_others_is_padding(scan, value, radius):
    where = around() > radius
    found = find_padding(torch.where(where, torch.tensor(value), scan))
    assert found.value == value or math.isnan(value)
    assert bool(found.where[where].all())
    # No more than a voxel around it.
    assert bool((~found.where)[around() < radius - 3 * 2 / SIZE].all())
    assert found.share == pytest.approx(float(found.where.float().mean()))


@pytest.mark.parametrize("value", [0.0, -1024.0])
def test_a_field_of_view_that_cuts_tissue_is_padding(scan, value):
    scan = scan + (1024 if value == 0 else 0)
    where = around() > 0.96
    at = torch.linspace(-1, 1, SIZE)
    scan = scan + 800 * (at.abs() < 0.5)  # tissue up to the border
    found = find_padding(torch.where(where, torch.tensor(value), scan))
    assert found.value == value
    assert bool(found.where[where].all())


def test_strips_of_padding_are_found(scan):
    scan[..., -7:] = -3000
    assert bool(find_padding(scan).where[..., -8:].all())
    assert not bool(find_padding(scan).where[..., :-8].any())


def test_empty_ground_is_no_padding(scan, generator):
    tissue = around() < 0.6
    brain = torch.where(
        tissue, 40 + 20 * torch.rand(scan.shape, generator=generator), 0
    )
    brain = torch.where(tissue & (around() > 0.5), brain * 0.3, brain)
    smooth = torch.exp(-4 * around().square())
    for image in (
        *(scan, brain, brain + 3, 255 - brain, smooth, (smooth - 0.2).clamp(min=0)),
        *(tissue.float(), (around() < 0.98).float(), (3 * smooth).round()),
    ):
        assert find_padding(image) is None


def test_what_is_filled_goes_on_from_what_counts(dimension):
    at = torch.linspace(0, 1, 17)
    ramp = at.view(1, 1, -1, *(1,) * (dimension - 1)).expand(1, 1, *(17,) * dimension)
    counts = ramp > 0.5
    holed = torch.where(counts, ramp, torch.nan)
    found = filled(holed, counts)
    assert torch.equal(found[counts], ramp[counts])
    assert float(found.min()) > 0.45
    assert float(found.max()) == 1
    assert filled(ramp, torch.ones_like(counts)) is ramp


def test_intensities_are_looked_at_where_they_count(scan):
    counts = around() < 0.9
    broken = torch.where(counts, scan, torch.nan)
    check_intensities("image_A", broken, counts)
    with pytest.raises(ValueError, match="NaN"):
        check_intensities("image_A", broken)
    with pytest.raises(ValueError, match="constant"):
        check_intensities("image_A", torch.where(counts, 1.0, scan), counts)


@pytest.mark.parametrize("modality", [None, "mri"])
@pytest.mark.parametrize("share", [0.003, 0.01, 0.029])
@pytest.mark.parametrize("value", [20.0, -15.0])
def test_a_few_extreme_voxels_do_not_set_the_scale(share, value, modality, generator):
    body = (
        torch.rand(1, 1, 90, 90, generator=generator)
        * (around() < 0.7).float().repeat(1, 1, 2, 2)[..., :90, :90]
    )
    clean = prepare(body, modality)
    hit = torch.rand(body.shape, generator=generator) < share
    found = prepare(torch.where(hit, value, body), modality)
    assert (found - clean)[~hit].abs().max() < 0.12


def test_a_small_object_on_noise_keeps_its_range(generator):
    image = 0.01 * torch.randn(1, 1, 90, 90, generator=generator)
    image[..., 40:52, 40:52] += torch.linspace(0.4, 1.0, 12)
    found = prepare(image)
    assert found[..., 45, 51] - found[..., 45, 40] > 0.5


def test_what_a_mask_leaves_out_does_not_set_the_scale(generator):
    image = torch.rand(1, 1, 40, 40, generator=generator)
    counts = torch.zeros_like(image)
    counts[..., 5:30, 5:30] = 1
    ruined = torch.where(counts > 0, image, 7e4)
    torch.testing.assert_close(
        prepare(ruined, None, counts)[counts > 0],
        prepare(image, None, counts)[counts > 0],
    )


def test_signed_distances_are_told_from_images(dimension, generator):
    grid = torch.stack(torch.meshgrid(*[torch.arange(30.0)] * dimension, indexing="ij"))
    steps = torch.linspace(1.0, 2.0, dimension).view(-1, *(1,) * dimension)
    away = ((grid - 14.3) * steps).square().sum(0).sqrt()[None, None]
    spacing = steps.flatten().tolist()
    assert distance_reach(away - 9, spacing) == pytest.approx(8.0, rel=0.03)
    assert distance_reach(0.1 * (away - 9), spacing) == pytest.approx(0.8, rel=0.03)
    noise = torch.randn(away.shape, generator=generator)
    for image in (away, noise, (away < 9).float() - 0.5, torch.cos(away / 5)):
        assert distance_reach(image, spacing) is None


def test_hot_voxels_in_empty_slices_make_no_gaps(generator):
    image = torch.zeros(1, 1, 20, 20, 20)
    image[..., 4:15, 4:15, 4:15] = torch.rand(11, 11, 11, generator=generator)
    image[..., 0, 5, 7] = image[..., 19, 3, 2] = 1.0
    assert len(missing_slices(image, 2)) == 0
    image[..., 9, :, :] = 0
    assert missing_slices(image, 2).tolist() == [9]
