"""ICON's itk_wrapper calls on our terms: 2D, masks, tuning that leaves the model."""

import icon_registration as icon
import icon_registration.itk_wrapper
import numpy as np
import pytest
import torch
from torch import nn

from icon_nephi.fields.codes import LatentCodeTable
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.maps.networks import NePhi
from icon_nephi.space.sampling import Patches, Points
from icon_nephi.swap import add_neural_residual
from tests.maps.problems import mlp, nephi, siren, voxels

itk = pytest.importorskip("itk")

from icon_nephi import itk_wrapper  # noqa: E402
from icon_nephi.io import itk_images  # noqa: E402

GRIDS = {2: (10, 12), 3: (7, 8, 6)}  # of the network


def scan(seed, size, spacing, origin, kind=np.float32):
    """A smooth image, oblique, of any pixel type."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(0, 1, n) for n in size], indexing="ij")
    waves = rng.uniform(2, 5, (3, len(size)))
    values = sum(
        np.sin(sum(w * a for w, a in zip(k, axes, strict=True))) for k in waves
    )
    image = itk.image_from_array((100 * values).astype(kind))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    turn = np.eye(len(size))
    c, s = np.cos(0.3), np.sin(0.3)
    turn[:2, :2] = [[c, -s], [s, c]]
    image.SetDirection(itk.matrix_from_array(turn))
    return image


def scans(dimension, kind=np.float32):
    if dimension == 2:
        A = scan(0, (15, 17), (1.5, 0.8), (3.0, -7.0), kind)
        return A, scan(1, (14, 18), (1.1, 1.9), (-4.0, 2.0), kind)
    A = scan(0, (9, 11, 8), (1.5, 0.8, 2.0), (3.0, -7.0, 11.0), kind)
    return A, scan(1, (8, 10, 9), (1.1, 1.9, 1.3), (-4.0, 2.0, 5.0), kind)


def sampled(net, dimension, channels=1):
    model = GradientICONPoints(
        net,
        PatchNCC(),
        0.2,
        similarity_sampler=Patches(20, 3, 1.0),
        regularity_sampler=Points(30),
    )
    model.assign_identity_map([1, channels, *GRIDS[dimension]])
    return model


def moving(net):
    """The network with last layers that are not zero."""
    torch.manual_seed(2)
    for module in net.modules():
        if hasattr(module, "last"):
            nn.init.normal_(module.last.weight, std=0.1)
    return net


def table(dimension):
    torch.manual_seed(3)
    code = LatentCodeTable(grids=[(4,) * dimension], channels=[4], global_size=2)
    return NePhi(code, mlp(dimension), mlp(dimension))


def points_of(image, count=40):
    """Physical points at voxel centres, where an exported field is exact."""
    size = np.array(image.GetLargestPossibleRegion().GetSize())
    index = np.random.default_rng(0).integers(1, size - 1, (count, len(size)))
    return [image.TransformIndexToPhysicalPoint(i.tolist()) for i in index]


def apart(first, second, image):
    return max(
        np.linalg.norm(
            np.array(first.TransformPoint(p)) - np.array(second.TransformPoint(p))
        )
        for p in points_of(image)
    )


def rounding(transform, image):
    """How far two ways to this map may be apart, in mm.

    A map is computed in float32, so it rounds with the size of what it adds up: the
    coordinates and the displacement. Ten roundings are allowed.
    """
    points = np.array(points_of(image))
    reach = np.abs([transform.TransformPoint(p) for p in points]).max()
    return 10 * np.finfo(np.float32).eps * max(reach, np.abs(points).max())


@pytest.mark.parametrize("dimension", [2, 3])
def test_without_tuning_it_is_icons_transform(dimension):
    model = sampled(moving(nephi(dimension, siren)), dimension)
    A, B = scans(dimension)
    found = itk_wrapper.register_pair(model, A, B)
    if dimension == 3:
        expected = icon.itk_wrapper.register_pair(model, A, B)
    else:  # ICON's register_pair is 3D only, its export is not
        tensors = itk_wrapper._network_images("A", [A], GRIDS[2])
        with torch.no_grad():
            maps = model.regis_net(
                tensors, itk_wrapper._network_images("B", [B], GRIDS[2])
            )
            x = model.identity_map
            expected = [
                icon.itk_wrapper.create_itk_transform(phi(x), x, *places)
                for phi, places in zip(maps, ((A, B), (B, A)), strict=True)
            ]
    for mine, theirs, image in zip(found, expected, (B, A), strict=True):
        assert isinstance(mine, itk.CompositeTransform[itk.D, dimension])
        assert mine.GetNumberOfTransforms() == 3
        assert apart(mine, theirs, image) < rounding(theirs, image)
        identity = itk.TranslationTransform[itk.D, dimension].New()
        assert apart(mine, identity, image) > 0.1


def test_a_fresh_residual_gives_the_voxel_models_transform():
    torch.manual_seed(1)
    net = voxels(3)
    nn.init.normal_(net.net.last.weight, std=2e-4)
    net = icon.losses.GradientICONSparse(net, icon.LNCC(sigma=2), 1.5)
    net.assign_identity_map([1, 1, *GRIDS[3]])
    A, B = scans(3)
    expected = icon.itk_wrapper.register_pair(net, A, B)
    model = add_neural_residual(net)
    for register in (itk_wrapper.register_pair, icon.itk_wrapper.register_pair):
        found = register(model, A, B)
        for mine, theirs, image in zip(found, expected, (B, A), strict=True):
            assert apart(mine, theirs, image) < rounding(theirs, image)


def test_a_finer_field_is_nearer_to_the_map():
    model = sampled(moving(nephi(3, siren)), 3)
    A, B = scans(3)
    fields = [
        itk_wrapper.register_pair(model, A, B, export_shape=shape)[0]
        for shape in (None, (28, 32, 24), (56, 64, 48))
    ]
    coarse, fine = (apart(field, fields[2], B) for field in fields[:2])
    assert fine < 0.3 * coarse
    with pytest.raises(ValueError, match="export_shape must be 3 numbers above 1"):
        itk_wrapper.register_pair(model, A, B, export_shape=(10, 10))


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("kind", [np.int32, np.uint8, np.float64])
def test_tuning_any_pixel_type_leaves_the_model_alone(dimension, kind):
    model = sampled(table(dimension), dimension)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    A, B = scans(dimension, kind)
    plain = itk_wrapper.register_pair(model, A, B)
    *tuned, loss = itk_wrapper.register_pair(
        model, A, B, finetune_steps=15, return_artifacts=True, progress=False
    )
    assert apart(plain[0], tuned[0], B) > 0.05
    assert isinstance(loss, icon.losses.ICONLoss)
    assert all(isinstance(number, float) for number in loss)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    again = itk_wrapper.register_pair(model, A, B, finetune_steps=15, progress=False)
    assert apart(again[0], tuned[0], B) == 0


def test_what_is_returned_is_the_tuned_map():
    model = sampled(table(3), 3)
    A, B = scans(3)
    options = {"learning_rate": 1e-2, "progress": False, "seed": 4}
    (found, back) = itk_wrapper.register_pair(model, A, B, 8, **options)
    from icon_nephi.fit.refine import refine_pair

    tensors = [itk_wrapper._network_images("A", [i], GRIDS[3]) for i in (A, B)]
    maps = refine_pair(model, *tensors, steps=8, **options)[:2]
    x = model.identity_map
    expected = [
        icon.itk_wrapper.create_itk_transform(phi(x), x, *places)
        for phi, places in zip(maps, ((A, B), (B, A)), strict=True)
    ]
    assert apart(found, expected[0], B) < rounding(expected[0], B)
    assert apart(back, expected[1], A) < rounding(expected[1], A)


def mask_of(image, reach):
    """A mask of the first voxels along x, on a grid of its own."""
    values = np.zeros(itk.array_from_image(image).shape, np.uint8)
    values[..., :reach] = 1
    mask = itk.image_from_array(values)
    mask.CopyInformation(image)
    return mask


def test_masks_and_label_maps():
    model = sampled(table(3), 3)
    A, B = scans(3)
    masks = mask_of(A, 4), mask_of(B, 4)
    everywhere = itk_wrapper.register_pair(model, A, B, 10, progress=False)
    inside = itk_wrapper.register_pair_with_mask(
        model, A, B, *masks, finetune_steps=10, progress=False
    )
    assert apart(everywhere[0], inside[0], B) > 0.01
    *_, loss = itk_wrapper.register_pair_with_mask(
        model, A, B, *masks, return_artifacts=True
    )
    assert np.isfinite(loss.all_loss)
    # ICON's dense losses take no masks; without tuning they change nothing.
    dense = icon.GradientICON(voxels(3), icon.LNCC(sigma=2), 0.2)
    dense.assign_identity_map([1, 1, *GRIDS[3]])
    itk_wrapper.register_pair_with_mask(dense, A, B, *masks, return_artifacts=True)
    with pytest.raises(ValueError, match=r"mask_A is empty"):
        itk_wrapper.register_pair_with_mask(model, A, B, mask_of(A, 0), progress=False)


def test_segmentations_pull_their_labels_together():
    A, B = scans(3)
    maps = mask_of(A, 4), mask_of(B, 6)  # the same label, a different reach
    dice = []
    for weight in (0.0, 5.0):
        model = sampled(table(3), 3)
        model.dice_loss_weight = weight
        found, _ = itk_wrapper.register_pair_with_mask(
            model,
            A,
            B,
            finetune_steps=30,
            segmentation_A=maps[0],
            segmentation_B=maps[1],
            progress=False,
        )
        warped = itk_images.resample(maps[0], B, found, "nearest")
        values = [itk.array_from_image(i) > 0 for i in (warped, maps[1])]
        dice.append(2 * (values[0] & values[1]).sum() / sum(v.sum() for v in values))
    assert dice[1] > dice[0] + 0.02


def test_a_mask_of_one_voxel_is_not_lost():
    model = sampled(table(3), 3)
    A, B = scans(3)
    mask = mask_of(A, 0)
    mask.SetPixel([3, 4, 5], 1)
    itk_wrapper.register_pair_with_mask(model, A, B, mask, None, 2, progress=False)


def test_modalities_are_channels():
    seen = []

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = table(3).net

        def forward(self, image_A, image_B):
            seen.append((image_A.shape, image_B.shape))
            return self.inner(image_A, image_B)

    model = sampled(NePhi(Two(), mlp(3), mlp(3)), 3, channels=2)
    (A, B) = scans(3)
    register = itk_wrapper.register_pair_with_multimodalities
    register(model, [A, A], [B, B], finetune_steps=2, progress=False)
    assert set(seen) == {((1, 2, *GRIDS[3]),) * 2}
    with pytest.raises(ValueError, match="image_A has 2 modalities, image_B 1"):
        register(model, [A, A], [B])
    with pytest.raises(ValueError, match="image_B: its modalities lie on different"):
        register(model, [A, A], [B, A])


def test_bad_input_is_one_sentence():
    model = sampled(table(3), 3)
    A, B = scans(3)
    with pytest.raises(TypeError, match=r"image_A must be an itk\.Image, got Tensor"):
        itk_wrapper.register_pair(model, torch.zeros(1, 1, 8, 8, 8), B)
    with pytest.raises(ValueError, match="image_B is 2D but the model is 3D"):
        itk_wrapper.register_pair(model, A, scans(2)[1])
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        itk_wrapper.register_pair(model, A, B, 2, learning_rate=0.0)
    with pytest.raises(ValueError, match="finetune_steps must be positive"):
        itk_wrapper.register_pair(model, A, B, -1)
    with pytest.raises(ValueError, match="has no identity map; call"):
        itk_wrapper.register_pair(nephi(3), A, B)
    blank = itk.image_from_array(np.zeros((5, 6, 7), np.float32))
    with pytest.raises(ValueError, match="image_A is constant"):
        itk_wrapper.register_pair(model, blank, B)
