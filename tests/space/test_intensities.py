"""Missing slices are filled in before a pair is compared, and noise is measured."""

import pytest
import torch

from icon_nephi.space.intensities import fill_missing, missing_slices, noise


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_missing_slices_are_interpolated(axis):
    ramp = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 9)] * 3, indexing="ij"))
    image = ramp.square().sum(0)[None, None]
    holed = image.clone().movedim(2 + axis, 0)
    holed[[3, 5, 6]] = 0
    holed = holed.movedim(0, 2 + axis)
    assert missing_slices(holed, 2 + axis).tolist() == [3, 5, 6]
    filled = fill_missing(holed)
    # A line between slices 3/8 apart is off a square by 1/8 * 2/8 at the most.
    torch.testing.assert_close(filled, image, atol=1 / 32 + 1e-6, rtol=0)
    assert holed.movedim(2 + axis, 0)[3].abs().max() == 0  # the user's is not changed


def test_space_between_two_objects_stays_empty():
    image = torch.zeros(1, 1, 20, 16)
    image[..., 2:9, 1:5] = 1
    image[..., 12:18, 10:14] = 1
    assert torch.equal(fill_missing(image), image)
    full = torch.rand(1, 1, 8, 8)
    assert fill_missing(full) is full


@pytest.mark.parametrize("size", [(80, 90), (24, 30, 28)])
def test_noise_is_measured_and_structure_is_not(size, generator):
    axes = torch.meshgrid(*[torch.linspace(0, 6, n) for n in size], indexing="ij")
    smooth = 0.5 + 0.5 * torch.stack(axes).sin().prod(0)[None, None]
    assert noise(smooth) < 0.005
    added = 0.1 * torch.randn(smooth.shape, generator=generator)
    assert noise(smooth + added) == pytest.approx(0.1, rel=0.1)
    assert noise(torch.cat([smooth, smooth + added], 1)) > 0.09  # its worst channel
    assert noise(torch.rand(1, 1, 2, 9)) == 0  # nothing to tell by


def test_edges_of_shapes_are_not_noise():
    x = torch.linspace(-1, 1, 64)
    disc = (x[:, None] ** 2 + x**2 < 0.5).float()[None, None]
    assert noise(disc) == 0
