"""The phantoms: the known map is the map of the images, exactly and without folds."""

import math
from itertools import pairwise

import pytest
import torch
from scipy import ndimage

from icon_nephi.phantoms import LABELS, breathing_thorax, triangles_and_circles

SHAPES = [(96, 80), (48, 40, 44)]
IMAGES = ("image_A", "image_B", "mask_A", "mask_B", "labels_A", "labels_B")


@pytest.fixture(scope="module", params=SHAPES, ids=["2D", "3D"])
def phantom(request):
    """A thorax without noise."""
    return breathing_thorax(request.param, noise=0)


def dimension(phantom):
    return len(phantom.spacing)


def extents(phantom):
    """Millimetres from the first to the last voxel of each axis, [d, 1]."""
    far = torch.ones(1, dimension(phantom), dtype=torch.float64)
    return phantom.millimetres(far).T


def random_points(phantom, count, spread=1.0):
    """Points [1, d, count] of the unit box, float64."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, dimension(phantom), count)
    unit = torch.rand(shape, generator=generator, dtype=torch.float64)
    return 0.5 + spread * (unit - 0.5)


def grid(shape):
    """The unit box coordinates of every voxel, [1, d, *shape], float64."""
    axes = [torch.linspace(0, 1, n, dtype=torch.float64) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def read(image, coords, order):
    """A spline of the image at coords [1, d, *any]."""
    shape = torch.tensor(image.shape[2:]).double() - 1
    indices = coords[0] * shape.view(-1, *[1] * (coords.dim() - 2))
    values = ndimage.map_coordinates(image[0, 0].numpy(), indices.numpy(), order=order)
    return torch.from_numpy(values)


def smallest_determinant(phantom, count=2000):
    """The smallest Jacobian determinant of phi_AB at random points."""
    d, step = dimension(phantom), 1e-6
    x = random_points(phantom, count)
    columns = []
    for axis in range(d):
        shift = torch.zeros(1, d, 1, dtype=torch.float64)
        shift[:, axis] = step
        difference = phantom.phi_AB(x + shift) - phantom.phi_AB(x - shift)
        columns.append(difference[0].T / (2 * step))
    return float(torch.det(torch.stack(columns, -1)).min())


# ---- the map


@pytest.mark.parametrize("amplitude", [20.0, 37.0])
@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 16)])
def test_the_map_never_folds(shape, amplitude):
    phantom = breathing_thorax(shape, amplitude=amplitude, noise=0)
    assert smallest_determinant(phantom, 20_000) > 0.3
    x = random_points(phantom, 500)
    torch.testing.assert_close(phantom.phi_BA(phantom.phi_AB(x)), x, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)]
)
def test_the_maps_undo_each_other(phantom, dtype, atol):
    x = random_points(phantom, 5000, spread=1.2).to(dtype)
    for there, back in [
        (phantom.phi_AB, phantom.phi_BA),
        (phantom.phi_BA, phantom.phi_AB),
    ]:
        assert there(x).dtype == dtype
        torch.testing.assert_close(back(there(x)), x, rtol=0, atol=atol)


def test_the_diaphragm_moves_20_mm_and_the_border_stays(phantom):
    x = random_points(phantom, 50_000)
    moved = (phantom.phi_AB(x) - x)[0] * extents(phantom)
    assert 18 < moved.norm(dim=0).max() < 22
    assert moved[0].min() < -17  # inhaling pulls the diaphragm to the feet
    border = random_points(phantom, 1000, spread=4.0)  # nearly all of it outside
    border = border[..., (border[0] != border[0].clamp(0, 1)).any(0)]
    torch.testing.assert_close(phantom.phi_AB(border), border, rtol=0, atol=1e-12)


def test_the_maps_take_batches_and_any_grid(phantom):
    d = dimension(phantom)
    x = random_points(phantom, 24)[0].view(d, 2, 12).float()
    batch = torch.stack((x, 1 - x))
    both = phantom.phi_BA(batch)
    torch.testing.assert_close(both[1:], phantom.phi_BA(1 - x[None]), rtol=0, atol=0)
    long = batch.reshape(2, d, 24, *[1] * (d - 1))
    torch.testing.assert_close(phantom.phi_BA(long).reshape(batch.shape), both)
    assert phantom.phi_AB(x[None][:0]).shape == (0, d, 2, 12)
    with pytest.raises(ValueError, match=r"coords must be .*points\.T\[None\]"):
        phantom.phi_AB(phantom.points_B)


# ---- the images


def test_the_moving_image_through_the_map_is_the_fixed_image():
    phantom = breathing_thorax((256, 256), noise=0)
    x = grid(phantom.image_B.shape[2:])
    lungs = phantom.mask_B[0, 0]

    def difference(coords):
        return (read(phantom.image_A, coords, 3) - phantom.image_B[0, 0])[lungs].abs()

    right = difference(phantom.phi_AB(x))
    assert right.median() < 1  # HU
    assert right.mean() < 6
    assert difference(x).mean() > 60
    assert difference(phantom.phi_BA(x)).mean() > 60  # so the direction is told


def test_labels_and_masks_follow_the_map(phantom):
    x = phantom.phi_AB(grid(phantom.image_B.shape[2:]))
    for name in ("labels", "mask"):
        moved = read(getattr(phantom, f"{name}_A").byte(), x, 0)
        fixed = getattr(phantom, f"{name}_B")[0, 0].byte()
        both = (moved > 0) | (fixed > 0)
        # Nearest voxels, 6 mm in 3D: they differ along the surfaces.
        assert ((moved == fixed) & both).sum() / both.sum() > 0.94


def test_without_motion_both_images_are_equal():
    phantom = breathing_thorax((32, 24, 32), amplitude=0, noise=0)
    torch.testing.assert_close(phantom.image_A, phantom.image_B, rtol=0, atol=0.1)
    assert (phantom.labels_A == phantom.labels_B).float().mean() > 0.999
    torch.testing.assert_close(phantom.points_A, phantom.points_B)


@pytest.mark.parametrize("shape", SHAPES)
def test_images_masks_and_labels_are_what_they_say(shape):
    phantom = breathing_thorax(shape)
    for name in IMAGES:
        assert getattr(phantom, name).shape == (1, 1, *shape)
    assert phantom.image_A.dtype == phantom.image_B.dtype == torch.float32
    assert phantom.labels_A.dtype == phantom.labels_B.dtype == torch.uint8
    assert phantom.mask_A.dtype == phantom.mask_B.dtype == torch.bool
    present = set(phantom.labels_B.unique().tolist())
    assert present == set(LABELS.values())
    lungs = (LABELS["right lung"], LABELS["left lung"])
    expected = (phantom.labels_A == lungs[0]) | (phantom.labels_A == lungs[1])
    assert torch.equal(phantom.mask_A, expected)
    assert phantom.mask_A.sum() > 1.02 * phantom.mask_B.sum()  # A is breathed in
    hu = {
        name: float(phantom.image_B[phantom.labels_B == number].median())
        for name, number in LABELS.items()
    }
    assert hu["air"] < hu["left lung"] < -600 < 0 < hu["heart"] < hu["bone"] < 500


def test_landmarks_are_vessel_forks_inside_the_lungs(phantom):
    d = dimension(phantom)
    assert len(phantom.points_A) == len(phantom.points_B) >= 80
    for name in "AB":
        points = getattr(phantom, f"points_{name}")
        assert points.dtype == torch.float32
        assert points.shape[1] == d
        assert torch.pdist(phantom.millimetres(points)).min() > 0.5
        mask = read(getattr(phantom, f"mask_{name}").byte(), points.T[None], 0)
        assert mask.float().mean() > 0.97  # a voxel is 6 mm: some are at its edge
    moved = phantom.phi_AB(phantom.points_B.T[None])[0].T
    torch.testing.assert_close(moved, phantom.points_A)
    error = phantom.millimetres(phantom.points_A - phantom.points_B).norm(dim=1)
    assert 5 < error.mean() < 20
    fine = breathing_thorax((256, 256), noise=0)
    lung = fine.image_B[fine.mask_B].median()
    assert read(fine.image_B, fine.points_B.T[None], 1).min() > lung + 400


def test_a_finer_shape_shows_the_same_patient(phantom):
    shape = [2 * n - 1 for n in phantom.image_B.shape[2:]]
    fine = breathing_thorax(shape, noise=0)
    every_other = (..., *[slice(None, None, 2)] * len(shape))
    torch.testing.assert_close(
        fine.image_B[every_other], phantom.image_B, atol=0.5, rtol=0
    )
    torch.testing.assert_close(
        fine.image_A[every_other], phantom.image_A, atol=0.5, rtol=0
    )
    torch.testing.assert_close(fine.points_A, phantom.points_A)
    x = random_points(phantom, 100)
    torch.testing.assert_close(fine.phi_AB(x), phantom.phi_AB(x), rtol=0, atol=1e-7)


def test_noise_is_added_to_each_image_on_its_own():
    clean, noisy = (breathing_thorax((96, 96), noise=n) for n in (0, 30))
    noise_A = noisy.image_A - clean.image_A
    noise_B = noisy.image_B - clean.image_B
    assert noise_A.std() == pytest.approx(30, rel=0.05)
    both = torch.stack((noise_A.flatten(), noise_B.flatten()))
    assert torch.corrcoef(both)[0, 1].abs() < 0.05


def test_a_seed_is_a_patient_and_nothing_else_is_random():
    state = torch.get_rng_state()
    first, again, other = (breathing_thorax((40, 40), seed=s) for s in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    for name in (*IMAGES, "points_A", "points_B"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    x = random_points(first, 100)
    assert torch.equal(first.phi_AB(x), again.phi_AB(x))
    assert not torch.equal(first.phi_AB(x), other.phi_AB(x))
    clean = [breathing_thorax((40, 40), seed=s, noise=0).labels_B for s in (3, 4)]
    assert not torch.equal(*clean)


def test_spacing_is_in_millimetres():
    phantom = breathing_thorax((31, 26, 31))
    assert phantom.spacing == pytest.approx((10, 10, 10))
    box = breathing_thorax((31, 26, 31), spacing=(20, 10, 5), amplitude=20)
    assert extents(box)[:, 0].tolist() == [600, 250, 150]
    x = random_points(box, 20_000)
    moved = ((box.phi_AB(x) - x)[0] * extents(box)).norm(dim=0).max()
    assert 18 < moved < 22


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (64,)}, r"shape must be 2 or 3 numbers.*got \(64,\)"),
        ({"shape": (64, 64, 4)}, "shape must be"),
        ({"shape": (16, 16), "spacing": (1, 1, 1)}, "spacing must be 2 positive"),
        ({"shape": (16, 16), "spacing": (1, 0)}, "spacing must be"),
        ({"amplitude": -1}, "amplitude and noise must be finite"),
        ({"noise": math.nan}, "amplitude and noise must be finite"),
        ({"amplitude": 60}, r"amplitude must be at most 37.5 mm"),
        ({"spacing": (1, 1, 1), "amplitude": 20}, "amplitude must be at most"),
    ],
)
def test_a_thorax_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        breathing_thorax(**arguments)


# ---- triangles and circles


def corners(labels):
    """The share of the circumscribed circle that each shape fills, [count]."""
    shares = []
    for label in labels[:, 0]:
        at = label.nonzero().double()
        radius = (at - at.mean(0)).norm(dim=1).max() + 0.5
        shares.append(len(at) / (math.pi * float(radius) ** 2))
    return torch.tensor(shares)


def test_both_triangles_and_circles_are_drawn():
    labels = triangles_and_circles(400).labels
    edges = torch.stack([labels[..., i, :].sum((1, 2)) for i in (0, -1)])
    edges = edges.sum(0) + labels[..., 0].sum((1, 2)) + labels[..., -1].sum((1, 2))
    share = corners(labels[edges == 0])  # those the image does not cut
    triangle = 3 * math.sqrt(3) / (4 * math.pi)
    is_circle, is_triangle = (share - 1).abs() < 0.06, (share - triangle).abs() < 0.06
    assert (is_circle | is_triangle).all()
    assert is_circle.sum() > 40
    assert is_triangle.sum() > 40


@pytest.mark.parametrize("size", [33, 128])
def test_solid_shapes_are_one_inside(size):
    shapes = triangles_and_circles(20, size)
    assert shapes.images.shape == shapes.labels.shape == (20, 1, size, size)
    assert (shapes.images.dtype, shapes.labels.dtype) == (torch.float32, torch.uint8)
    assert torch.equal(shapes.labels == 1, shapes.images > 0)
    assert shapes.images.min() >= -1
    assert shapes.images.amax((1, 2, 3)).min() > 0.99
    assert 0.05 < shapes.labels.float().mean() < 0.5


def test_hollow_shapes_are_outlines_with_filled_labels():
    solid, hollow = (triangles_and_circles(20, hollow=h) for h in (False, True))
    assert torch.equal(solid.labels, hollow.labels)
    torch.testing.assert_close(hollow.images, 1 - solid.images**2)
    for image, label in zip(hollow.images[:, 0], hollow.labels[:, 0], strict=True):
        deep = ndimage.binary_erosion(label.numpy(), iterations=12)
        assert image[torch.from_numpy(deep)].max() < 0.1  # empty inside
        rim = label.bool() & ~torch.from_numpy(ndimage.binary_erosion(label.numpy()))
        assert image[1:-1, 1:-1][rim[1:-1, 1:-1]].min() > 0.7


def test_a_circle_has_icons_edge():
    shapes = triangles_and_circles(30, 129)
    share = corners(shapes.labels)
    number = int(share.argmax())
    image = shapes.images[number, 0]
    row = image[int(shapes.labels[number, 0].nonzero().double().mean(0)[0].round())]
    depth = torch.atanh(row.double().clamp(-0.999, 0.999)) / -40
    slopes = [float(b - a) * 128 for a, b in pairwise(depth) if abs(a + b) < 0.05]
    assert slopes
    assert all(abs(abs(slope) - 1) < 0.1 for slope in slopes)  # distance, unit box


def test_shapes_depend_on_the_seed_only():
    state = torch.get_rng_state()
    first, again, other = (triangles_and_circles(4, 32, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    noisy = triangles_and_circles(4, 64, noise=0.1).images
    clean = triangles_and_circles(4, 64).images
    assert (noisy - clean).std() == pytest.approx(0.1, rel=0.05)
    assert triangles_and_circles(0).images.shape == (0, 1, 128, 128)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("bad", [{"count": -1}, {"size": 1}, {"noise": -0.1}])
def test_shapes_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match="count must be at least 0, size at least 2"):
        triangles_and_circles(**{"count": 2, **bad})
