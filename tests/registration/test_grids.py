"""The grids of other libraries give the warped image, as we do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from icon_nephi.io import itk_images
from icon_nephi.io.image_input import voxel_geometry
from icon_nephi.registration.grids import monai_ddf, sampling_grid
from icon_nephi.registration.result import Registration
from tests.small_fits import geometry, small_fit, unit_matrix

SIZES = {2: ((23, 30), (18, 26)), 3: ((12, 16, 14), (17, 11, 13))}
WAYS = ["fixed_to_moving", "moving_to_fixed"]


def made(dimension, itk, sizes=None):
    """A registration and an image of each of its two spaces, moving and fixed."""
    sizes = sizes or SIZES[dimension]
    places = [
        geometry(n, 20 + i) if itk else voxel_geometry(n) for i, n in enumerate(sizes)
    ]
    result = Registration(
        small_fit(dimension, unit_matrix(dimension)), *places, itk=itk
    )
    arrays = [np.random.default_rng(0).normal(size=n).astype(np.float32) for n in sizes]
    images = [torch.from_numpy(a)[None, None] for a in arrays]
    if itk:
        pairs = zip(arrays, places, strict=True)
        images = [itk_images.image_of(a, p) for a, p in pairs]
    return result, images


def tensor(image):
    return image if isinstance(image, torch.Tensor) else itk_images.tensor_of(image)


def assert_same_inside(theirs, result, image, **keywords):
    """What they read is what we warp, where there is an image.

    Up to four roundings of a coordinate from -1 to 1, seen in the image: one rounding
    is up to n / 2 times as large in voxels, and values from one voxel to the next
    differ by up to the range of the image.
    """
    far = tensor(result.warp(image, outside=-1e6, **keywords)) == -1e6
    assert 0 < far.double().mean() < 0.5
    ours, values = tensor(result.warp(image, **keywords)), tensor(image)
    voxels = max(values.shape) / 2 * torch.finfo(values.dtype).eps
    atol = 4 * voxels * float(values.max() - values.min())
    torch.testing.assert_close(theirs[~far], ours[~far], atol=atol, rtol=0)


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("itk", [True, False])
@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_grid_sample_warps_as_we_do(dimension, itk, corners, way):
    result, images = made(dimension, itk)
    inverse = way == WAYS[1]
    image = images[1 if inverse else 0]
    grid = sampling_grid(result, direction=way, align_corners=corners)
    read = {"padding_mode": "border", "align_corners": corners}
    theirs = F.grid_sample(tensor(image), grid, **read)
    assert_same_inside(theirs, result, image, inverse=inverse)


@pytest.mark.parametrize("itk", [True, False])
def test_another_image_and_another_grid(itk):
    result, _ = made(3, itk)
    other = reference = torch.randn(
        1, 1, 6, 7, 8, generator=torch.Generator().manual_seed(0)
    )
    if itk:
        other, reference = (
            itk_images.image_of(other[0, 0].numpy(), place.resized((6, 7, 8)))
            for place in (result.geometry_A, result.geometry_B)
        )
    grid = sampling_grid(result, image=other, reference=reference)
    assert grid.shape == (1, 6, 7, 8, 3)
    read = {"padding_mode": "border", "align_corners": True}
    theirs = F.grid_sample(tensor(other), grid, **read)
    assert_same_inside(theirs, result, other, reference=reference)


def as_monai_documents(image, ddf):
    """Voxel i of the result is the image at i + ddf, channel c along tensor axis c."""
    shape = image.shape[2:]
    axes = [torch.arange(n, dtype=ddf.dtype) for n in shape]
    at = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None] + ddf
    unit = at / (torch.tensor(shape) - 1.0).reshape(1, -1, *(1,) * len(shape))
    grid = (2 * unit - 1).movedim(1, -1)[..., list(range(len(shape)))[::-1]]
    return F.grid_sample(image, grid, padding_mode="border", align_corners=True)


@pytest.mark.filterwarnings("ignore:monai")
@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("itk", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_ddf_of_monai(dimension, itk, way):
    size = (13, 15, 17)[:dimension]
    result, images = made(dimension, itk, (size, size))
    inverse = way == WAYS[1]
    image = images[1 if inverse else 0]
    ddf = monai_ddf(result, direction=way)
    assert ddf.shape == (1, dimension, *size)
    theirs = as_monai_documents(tensor(image), ddf)
    assert_same_inside(theirs, result, image, inverse=inverse)
    try:
        from monai.networks.blocks import Warp
    except ImportError:
        return
    theirs = Warp(mode="bilinear", padding_mode="border")(tensor(image), ddf)
    assert_same_inside(theirs, result, image, inverse=inverse)


def test_a_ddf_between_grids_of_one_shape_only():
    result, images = made(3, True)
    with pytest.raises(ValueError, match="one shape"):
        monai_ddf(result)
    place = result.geometry_A.resized(result.geometry_B.size)
    moving = itk_images.image_of(itk_images.array_of(images[1]), place)
    ddf = monai_ddf(result, image=moving)
    theirs = as_monai_documents(tensor(moving), ddf)
    assert_same_inside(theirs, result, moving)


def test_wrong_words_and_images_are_refused():
    result, images = made(3, True)
    with pytest.raises(ValueError, match="direction must be one of"):
        sampling_grid(result, direction="backward")
    with pytest.raises(TypeError, match="image must be"):
        sampling_grid(result, image=tensor(images[0]))
