"""The grids of other libraries give the warped image, as we do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_fits import geometry, small_fit, unit_matrix

from icon_nephi import itk_images
from icon_nephi.grids import monai_ddf, sampling_grid
from icon_nephi.inputs import voxel_geometry
from icon_nephi.registration import Registration

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


def same(theirs, ours, image):
    """Both up to four roundings of a coordinate from -1 to 1, seen in the image.

    One rounding is up to n / 2 times as large in voxels, and values from one voxel to
    the next differ by up to the range of the image.
    """
    values = tensor(image)
    voxels = max(values.shape) / 2 * torch.finfo(values.dtype).eps
    atol = 4 * voxels * float(values.max() - values.min())
    torch.testing.assert_close(theirs, ours, atol=atol, rtol=0)


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
    ours = tensor(result.warp(image, inverse=inverse))
    same(theirs, ours, image)


@pytest.mark.parametrize("itk", [True, False])
def test_another_image_and_another_grid(itk):
    result, _ = made(3, itk)
    place = geometry((6, 7, 8), 20)
    other = torch.randn(1, 1, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    if itk:
        other = itk_images.image_of(other[0, 0].numpy(), place)
    grid = sampling_grid(result, image=other, reference=other)
    assert grid.shape == (1, 6, 7, 8, 3)
    read = {"padding_mode": "border", "align_corners": True}
    theirs = F.grid_sample(tensor(other), grid, **read)
    ours = tensor(result.warp(other, reference=other))
    same(theirs, ours, other)


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
    ours = tensor(result.warp(image, inverse=inverse))
    theirs = as_monai_documents(tensor(image), ddf)
    same(theirs, ours, image)
    try:
        from monai.networks.blocks import Warp
    except ImportError:
        return
    theirs = Warp(mode="bilinear", padding_mode="border")(tensor(image), ddf)
    same(theirs, ours, image)


def test_a_ddf_between_grids_of_one_shape_only():
    result, images = made(3, True)
    with pytest.raises(ValueError, match="one shape"):
        monai_ddf(result)
    on_fixed = itk_images.resample(images[0], images[1], None, "linear")
    ddf = monai_ddf(result, image=on_fixed)
    theirs = as_monai_documents(tensor(on_fixed), ddf)
    ours = tensor(result.warp(on_fixed))
    same(theirs, ours, on_fixed)


def test_wrong_words_and_images_are_refused():
    result, images = made(3, True)
    with pytest.raises(ValueError, match="direction must be one of"):
        sampling_grid(result, direction="backward")
    with pytest.raises(TypeError, match="image must be"):
        sampling_grid(result, image=tensor(images[0]))
