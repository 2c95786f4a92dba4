"""The loss: closed forms, ICON's own numbers, what the similarity gets to see."""

import icon_registration as icon
import numpy as np
import pytest
import torch
from icon_registration.losses import ICONLoss

from icon_nephi.fields.codes import LatentCodeTable
from icon_nephi.losses.gradient_icon import (
    GradientICONPoints,
    gradient_inverse_consistency,
)
from icon_nephi.losses.patches import patch_maps
from icon_nephi.losses.regularity import (
    diffusion_term,
    inverse_consistency_term,
    no_term,
)
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.maps.networks import FunctionFromNeuralField, NePhi
from icon_nephi.maps.transforms import MatrixTransform
from icon_nephi.space.frames import identity_map
from icon_nephi.space.sampling import Patches, Points
from icon_nephi.swap import BothDirections
from tests.maps.problems import (
    SHAPES,
    Encoder,
    Problem,
    images,
    mlp,
    nephi,
    neural,
    points,
    siren,
    voxels,
)

DOUBLE = torch.float64


def affine(dimension, seed, batch=1):
    """Homogeneous matrices near the identity."""
    source = torch.Generator().manual_seed(seed)
    change = torch.randn(batch, dimension, dimension + 1, generator=source)
    matrix = torch.eye(dimension + 1, dtype=DOUBLE).repeat(batch, 1, 1)
    matrix[:, :dimension] += 0.1 * change
    return matrix


class Fixed(icon.RegistrationModule):
    """A network with nothing to learn: it returns what it was given."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, image_A, image_B):
        return self.maps


def identity_pair(dimension):
    return Fixed((MatrixTransform(torch.eye(dimension + 1)[None]),) * 2)


class Spy:
    """A similarity that remembers what it saw."""

    def __init__(self, tag=False):
        self.isInterpolated = tag
        self.seen = []

    def __call__(self, warped, fixed):
        self.seen.append((warped, fixed))
        return (warped[:, : fixed.shape[1]] - fixed).square().mean()


def make_loss(network, similarity=None, lmbda=1.0, seed=0, **options):
    options.setdefault("similarity_sampler", Points(30))
    options.setdefault("regularity_sampler", Points(20))
    source = torch.Generator().manual_seed(seed)
    similarity = similarity or icon.losses.SSD()
    loss = GradientICONPoints(network, similarity, lmbda, generator=source, **options)
    shape = next(
        (m.identity_map.shape for m in network.modules() if hasattr(m, "identity_map")),
        None,
    )
    if shape is not None:
        loss.assign_identity_map([1, 1, *shape[2:]])
    return loss


def pair_loss(dimension, similarity=None, lmbda=1.0, dtype=DOUBLE, **options):
    network = Problem("pair", nephi).make(dimension, dtype)
    return make_loss(network, similarity, lmbda, **options)


def gradients(loss, *pair, **masks):
    loss(*pair, **masks).all_loss.backward()
    found = [weight.grad for weight in loss.parameters()]
    loss.zero_grad()
    return found


# The gradient inverse consistency


def test_exact_inverses_are_consistent(dimension):
    matrix = affine(dimension, 0)
    there, back = MatrixTransform(matrix), MatrixTransform(torch.linalg.inv(matrix))
    assert gradient_inverse_consistency(there, back, points(dimension)) < 1e-28


def test_affine_pairs_have_a_closed_form(dimension):
    first, second = affine(dimension, 0, batch=2), affine(dimension, 1, batch=2)
    found = gradient_inverse_consistency(
        MatrixTransform(first), MatrixTransform(second), points(dimension)
    )
    linear = (first @ second)[:, :dimension, :dimension]
    error = (linear - torch.eye(dimension)).square().sum((1, 2)).mean() / dimension
    torch.testing.assert_close(found, error)


@pytest.mark.parametrize("field", [siren, mlp])
def test_it_is_icons_up_to_finite_differences(dimension, field):
    shape = (12, 9, 10)[:dimension]
    module = Problem("pair", lambda d: nephi(d, field)).make(dimension, shape=shape)
    phi_AB, phi_BA = module(*images(dimension, 1, DOUBLE, shape=shape))
    theirs = icon.GradientICON(module, icon.losses.SSD(), 1.0)
    theirs.assign_identity_map([1, 1, *shape])
    theirs.identity_map = identity_map(shape, dtype=DOUBLE)
    torch.manual_seed(5)
    expected = theirs.compute_gradient_icon_loss(phi_AB, phi_BA)
    torch.manual_seed(5)
    noise = torch.randn(theirs.identity_map.shape) / shape[-1]
    x = theirs.identity_map + noise
    found = gradient_inverse_consistency(phi_AB, phi_BA, x)
    assert found > 1e-3
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_it_takes_icons_maps_and_reaches_their_weights(dimension):
    module = Problem("voxels", voxels).make(dimension)
    image_A, image_B = images(dimension, 2, DOUBLE)
    loss = gradient_inverse_consistency(
        module(image_A, image_B), module(image_B, image_A), points(dimension, 2)
    )
    loss.backward()
    assert module.net.last.weight.grad.abs().max() > 0


def test_millimetres_treat_every_axis_alike():
    """A rotation error in a long box, in its own units and in physical ones."""
    extent = torch.tensor([30.0, 10.0], dtype=DOUBLE)
    rotation = torch.tensor([[0.0, -0.1], [0.1, 0.0]], dtype=DOUBLE)
    matrix = torch.eye(3, dtype=DOUBLE)[None]
    matrix[0, :2, :2] += rotation * extent / extent[:, None]
    x = points(2)
    identity = MatrixTransform(torch.eye(3, dtype=DOUBLE)[None])
    moved, jacobian = MatrixTransform(matrix).value_and_jacobian(x)
    for term in (inverse_consistency_term, diffusion_term):
        found = term(identity, x, moved, jacobian, extent)
        torch.testing.assert_close(found, torch.tensor(0.01, dtype=DOUBLE))
        assert abs(float(term(identity, x, moved, jacobian)) - 0.01) > 0.01


def test_the_baselines_of_the_paper(dimension):
    matrix, x = affine(dimension, 0), points(dimension)
    moved, jacobian = MatrixTransform(matrix).value_and_jacobian(x)
    phi = MatrixTransform(affine(dimension, 1))
    error = (matrix[0, :-1, :-1] - torch.eye(dimension)).square().sum() / dimension
    torch.testing.assert_close(diffusion_term(phi, x, moved, jacobian), error)
    assert no_term(phi, x, moved, jacobian) == 0


# PatchNCC


def numpy_patch_ncc(warped, fixed, floor):
    """Blocks one by one, in numpy; no sample left out."""
    total = []
    for a, b in zip(warped.numpy(), fixed.numpy(), strict=True):
        for x, y in zip(a, b, strict=True):
            x, y = x - x.mean(), y - y.mean()
            variances = ((x**2).mean() + floor) * ((y**2).mean() + floor)
            total.append((x * y).mean() / np.sqrt(variances))
    return np.array(total)


def tagged(blocks, weight=None):
    tag = torch.ones_like(blocks[:, :1]) if weight is None else weight
    return torch.cat([blocks, tag.to(blocks.dtype)], 1)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_patch_ncc_is_the_mean_correlation(dimension, squared, channels):
    size = (5, channels, *(3,) * dimension)
    warped, fixed = torch.rand(size, dtype=DOUBLE), torch.rand(size, dtype=DOUBLE)
    found = PatchNCC(floor=0.01, squared=squared)(tagged(warped), fixed)
    correlations = numpy_patch_ncc(warped, fixed, 0.01)
    expected = 1 - (correlations**2 if squared else correlations).mean()
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_patch_ncc_of_equal_patches_is_zero():
    fixed = torch.rand(4, 1, 3, 3, dtype=DOUBLE)
    assert float(PatchNCC(floor=0)(tagged(2 * fixed + 1), fixed)) == pytest.approx(0)
    opposite = tagged(-fixed)
    assert float(PatchNCC(floor=0)(opposite, fixed)) == pytest.approx(2)
    assert float(PatchNCC(0, squared=True)(opposite, fixed)) == pytest.approx(0)


def test_patch_ncc_of_constant_patches_is_finite(precision):
    warped = torch.ones(4, 1, 3, 3, dtype=precision.dtype, requires_grad=True)
    value = PatchNCC()(tagged(warped), torch.zeros(4, 1, 3, 3).to(precision.dtype))
    assert float(value.detach()) == pytest.approx(1)
    value.backward()
    assert warped.grad.isfinite().all()


def test_a_shared_floor_has_equal_patches_at_its_best():
    """However faint they are; with the variances' alone more contrast is better."""
    faint = 0.02 * torch.rand(4, 1, 3, 3, dtype=DOUBLE)
    gain = torch.ones((), dtype=DOUBLE, requires_grad=True)
    for shared in (True, False):
        (slope,) = torch.autograd.grad(
            PatchNCC(1e-3, shared=shared)(tagged(gain * faint), faint), gain
        )
        assert (abs(float(slope)) < 1e-12) == shared
    flat = torch.zeros(4, 1, 3, 3)
    assert float(PatchNCC(shared=True)(tagged(flat), flat)) == pytest.approx(0)


def test_patch_ncc_leaves_out_samples_outside():
    fixed = torch.rand(4, 1, 3, 3, dtype=DOUBLE)
    warped = torch.rand(4, 1, 3, 3, dtype=DOUBLE)
    weight = (torch.rand(4, 1, 3, 3) > 0.4).double()
    weight[3] = 0  # a block that is all outside
    other = torch.where(weight > 0, warped, torch.rand_like(warped))
    measure = PatchNCC()
    found = measure(tagged(warped, weight), fixed)
    assert torch.equal(found, measure(tagged(other, weight), fixed))
    correlations, shares = [], []
    for block, target, w in zip(warped[:3], fixed[:3], weight[:3], strict=True):
        keep = w > 0
        kept = block[keep][None, None], target[keep][None, None]
        correlations.append(numpy_patch_ncc(*kept, 1e-4)[0])
        shares.append(float(keep.double().mean()))
    expected = 1 - np.average(correlations, weights=shares)
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_patch_ncc_with_everything_outside_is_finite():
    warped = torch.rand(2, 1, 3, 3, requires_grad=True)
    value = PatchNCC()(tagged(warped, torch.zeros(2, 1, 3, 3)), torch.rand(2, 1, 3, 3))
    value.backward()
    assert value.isfinite()
    assert warped.grad.isfinite().all()


# Patches


@pytest.mark.parametrize("corners", [False, True])
def test_patches_of_an_affine_map_are_exact(dimension, corners):
    patches = Patches(4, size=3, stride=2.0, corners=corners)
    centres = torch.rand(2, 4, dimension, dtype=DOUBLE)
    phi = MatrixTransform(affine(dimension, 0, batch=2))
    x, moved = patch_maps(phi, patches, centres, torch.Size(SHAPES[dimension]))
    assert x.shape == moved.shape == (2, dimension, 12, *(3,) * (dimension - 1))
    torch.testing.assert_close(moved, phi(x))
    middle = x.reshape(2, dimension, 4, -1)[..., 3**dimension // 2]
    torch.testing.assert_close(middle.mT, centres)


def test_corners_are_where_the_map_is_evaluated(dimension):
    counts = []

    def phi(x):
        counts.append(x[0, 0].numel())
        return x + 0.1

    for corners in (False, True):
        patches = Patches(4, size=5, corners=corners)
        centres = torch.rand(1, 4, dimension)
        patch_maps(phi, patches, centres, torch.Size(SHAPES[dimension]))
    assert counts == [4 * 5**dimension, 4 * 2**dimension]


def squeeze(x):
    """Half of the box gets denser and half thinner; with its determinants."""
    first = x[:, :1] + 0.05 * torch.sin(2 * torch.pi * x[:, :1])
    second = 0.8 * x[:, 1:] + 0.1
    slope = 1 + 0.1 * torch.pi * torch.cos(2 * torch.pi * x[:, :1])
    return torch.cat([first, second], 1), 0.8 * slope


@pytest.mark.parametrize(
    "sampler",
    [Points(300), Patches(50, stride=0.1), Patches(50, stride=0.1, corners=True)],
    ids=["points", "patches", "corners"],
)
@pytest.mark.parametrize("volumes", [1.0, 0.3])
def test_a_squeezed_density_is_the_fixed_one(sampler, volumes):
    """B = A o phi * det J in closed form; the last channel is no density."""
    x = identity_map((300, 260), dtype=DOUBLE)

    def density(at):
        return 0.5 + 0.3 * torch.sin(4 * at[:, :1]) * torch.cos(5 * at[:, 1:])

    there, determinant = squeeze(x)
    image_A = torch.cat([density(x), density(x)], 1)
    squeezed = volumes * density(there) * determinant
    image_B = torch.cat([squeezed, density(there)], 1)
    maps = (lambda at: squeeze(at)[0]), MatrixTransform(torch.eye(3)[None].double())
    spy = Spy(tag=True)
    options = {"similarity_sampler": sampler, "densities": 1, "volumes": volumes}
    make_loss(Fixed(maps), spy, prior_lmbda=0, **options)(image_A, image_B)
    warped, fixed = spy.seen[0]
    assert warped.shape[1] == 3
    torch.testing.assert_close(warped[:, :2], fixed, atol=1e-3, rtol=0)
    assert (warped[:, :1] - warped[:, 1:2]).abs().max() > 0.1
    warped, _ = spy.seen[1]  # back, by the identity: the volumes the other way round
    ratio = warped[:, 0] / warped[:, 1]
    assert (ratio - 0.8).abs().max() < 0.8 * 0.1 * torch.pi + 1e-3


# GradientICONPoints


@pytest.mark.parametrize("build", [nephi, neural], ids=["pair", "single"])
@pytest.mark.parametrize("sampler", [Points(30), Patches(6)], ids=["points", "patches"])
def test_it_returns_icons_loss(dimension, precision, build, sampler):
    network = Problem("any", build).make(dimension, precision.dtype)
    loss = make_loss(network, lmbda=1.5, prior_lmbda=0.2, similarity_sampler=sampler)
    result = loss(*images(dimension, 2, precision.dtype))
    assert type(result) is ICONLoss
    for number in result:
        assert number.shape == ()
        assert number.isfinite()
        assert number.dtype == precision.dtype
    expected = (
        result.similarity_loss
        + 1.5 * result.inverse_consistency_loss
        + 0.2 * loss.prior
    )
    precision.close(result.all_loss, expected)
    result.all_loss.backward()
    for name, weight in loss.named_parameters():
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name


def test_similarity_and_regularity_are_of_both_directions(dimension):
    """All points known, so every term can be computed by hand."""
    image_A, image_B = images(dimension, 2, DOUBLE)
    spy = Spy()
    matrices = affine(dimension, 0), affine(dimension, 1)
    maps = tuple(MatrixTransform(m) for m in matrices)
    result = make_loss(Fixed(maps), spy, prior_lmbda=0)(image_A, image_B)
    (a, b), (c, d) = spy.seen
    by_hand = (a - b).square().mean() + (c - d).square().mean()
    torch.testing.assert_close(result.similarity_loss, by_hand)
    identity = torch.eye(dimension)
    errors = [
        (m[0, :dimension, :dimension] - identity).square().sum() / dimension
        for m in (matrices[0] @ matrices[1], matrices[1] @ matrices[0])
    ]
    torch.testing.assert_close(result.inverse_consistency_loss, sum(errors) / 2)


def test_the_similarity_compares_a_at_phi_with_b():
    """The images are coordinates, so the similarity sees where it is."""
    x = identity_map((9, 8), dtype=DOUBLE)
    spy = Spy(tag=True)
    shift = torch.eye(3, dtype=DOUBLE)
    shift[0, 2] = 0.25
    maps = MatrixTransform(shift[None]), MatrixTransform(torch.linalg.inv(shift)[None])
    make_loss(Fixed(maps), spy, prior_lmbda=0)(x, x)
    for (warped, fixed), phi in zip(spy.seen, maps, strict=True):
        moved = phi(fixed)
        torch.testing.assert_close(warped[:, :2], moved.clamp(0, 1))
        within = ((moved >= 0) & (moved <= 1)).all(1, keepdim=True)
        assert torch.equal(warped[:, 2:], within.double())
        assert 0 < within.double().mean() < 1


@pytest.mark.parametrize("tag", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_what_the_similarity_sees(dimension, tag, channels):
    size = (2, channels, *SHAPES[dimension])
    image_A, image_B = torch.rand(size), torch.rand(size)
    network = identity_pair(dimension)
    for sampler, batch, shape in (
        (Points(7), 2, (7, *(1,) * (dimension - 1))),
        (Patches(5, size=3), 10, (3,) * dimension),
    ):
        spy = Spy(tag)
        make_loss(network, spy, similarity_sampler=sampler)(image_A, image_B)
        assert len(spy.seen) == 2
        for warped, fixed in spy.seen:
            assert fixed.shape == (batch, channels, *shape)
            assert warped.shape == (batch, channels + tag, *shape)


def test_blocks_are_neighbours_in_the_image():
    """Blocks keep their layout: each is a little ramp along each axis."""
    x = identity_map((9, 8, 7), dtype=DOUBLE)
    spy = Spy()
    options = {"similarity_sampler": Patches(6, size=3, stride=0.01)}
    image = x.repeat(2, 1, 1, 1, 1)
    make_loss(identity_pair(3), spy, prior_lmbda=0, **options)(image, image)
    for _, fixed in spy.seen:
        assert fixed.shape == (12, 3, 3, 3, 3)
        inner = (fixed.amin((1, 2, 3, 4)) > 0) & (fixed.amax((1, 2, 3, 4)) < 1)
        assert inner.any()
        for axis, n in enumerate((9, 8, 7)):
            steps = fixed[inner].diff(dim=2 + axis)
            expected = torch.zeros_like(steps)
            expected[:, axis] = 0.01 / (n - 1)
            torch.testing.assert_close(steps, expected)


@pytest.mark.parametrize(
    ("similarity", "sampler"),
    [
        (icon.losses.NCC(), Points(40)),
        (icon.losses.SSD(), Points(40)),
        (icon.losses.SSDOnlyInterpolated(), Points(40)),
        (icon.losses.NCC(), Patches(5)),
        (icon.losses.LNCC(sigma=1), Patches(5, size=5)),
        (icon.losses.SquaredLNCC(sigma=1), Patches(5, size=5)),
        (PatchNCC(), Patches(5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_icons_similarities_work(dimension, similarity, sampler):
    loss = pair_loss(dimension, similarity, similarity_sampler=sampler)
    for gradient in gradients(loss, *images(dimension, 2, DOUBLE)):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_equal_images_and_the_identity_cost_nothing(dimension):
    image, _ = images(dimension, 2, DOUBLE)
    network = Problem("pair", nephi).make(dimension, alive=False)
    result = make_loss(network, icon.losses.NCC(), prior_lmbda=0)(image, image)
    for number in result:
        assert abs(float(number.detach())) < 1e-12


def test_the_generator_decides_the_loss(dimension):
    pair = images(dimension, 2, DOUBLE)
    state = torch.get_rng_state()

    def value(seed):
        return float(pair_loss(dimension, seed=seed)(*pair).all_loss.detach())

    assert value(1) == value(1)
    assert value(1) != value(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_chunks_do_not_matter(dimension):
    def found(chunk_size):
        loss = pair_loss(dimension, similarity_sampler=Patches(8))
        loss.regis_net.chunk_size = chunk_size
        return gradients(loss, *images(dimension, 2, DOUBLE))

    for a, b in zip(found(10**6), found(5), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sampler", [Points(200), Patches(40, stride=0.01)])
def test_masks_say_where_samples_lie(sampler):
    shape = (8, 10)
    x = identity_map(shape, dtype=DOUBLE)
    masks = torch.zeros(2, 1, 1, *shape)
    masks[0, ..., 2:4, 5:8] = 1
    masks[1, ..., 5:7, 1:3] = 1
    spy = Spy()
    loss = make_loss(identity_pair(2), spy, similarity_sampler=sampler)
    loss(x, x, mask_A=masks[0], mask_B=masks[1])
    (_, of_B), (_, of_A) = spy.seen
    for fixed, mask in ((of_A, masks[0]), (of_B, masks[1])):
        at = fixed.transpose(0, 1).flatten(1)
        voxel = (at * (torch.tensor(shape) - 1)[:, None]).round().long()
        slack = mask[0, 0]
        if isinstance(sampler, Patches):  # blocks reach over the edge of a voxel
            slack = torch.nn.functional.max_pool2d(mask, 3, 1, 1)[0, 0]
        assert (slack[tuple(voxel)] > 0).all()


def test_no_dense_grid_is_made_in_training(dimension):
    counts = []
    net = Problem("single", lambda d: FunctionFromNeuralField(Encoder(d), mlp(d)))
    network = net.make(dimension, shape=(20,) * dimension)
    network.field.register_forward_pre_hook(
        lambda module, inputs: counts.append(inputs[0].shape[1])
    )
    jet = network.field.jet
    network.field.jet = lambda x, values: (counts.append(x.shape[1]), jet(x, values))[1]
    loss = make_loss(network).train()
    pair = images(dimension, 1, DOUBLE, shape=(20,) * dimension)
    result = loss(*pair)
    result.all_loss.backward()
    assert max(counts) <= 30
    assert loss.phi_AB_vectorfield.shape == (1, dimension, *(20,) * dimension)
    assert max(counts) == 20**dimension


def test_dense_results_are_there_when_asked_for(dimension):
    image_A, image_B = images(dimension, 2)
    loss = pair_loss(dimension, dtype=torch.float32)
    loss(image_A, image_B)
    x = loss.identity_map
    for image, phi, field, warped in (
        (image_A, loss.phi_AB, loss.phi_AB_vectorfield, loss.warped_image_A),
        (image_B, loss.phi_BA, loss.phi_BA_vectorfield, loss.warped_image_B),
    ):
        torch.testing.assert_close(field, phi(x))
        torch.testing.assert_close(warped, loss.as_function(image)(phi(x)))
    loss.clean()
    assert loss.image_A is None
    assert loss.phi_AB is None


def test_an_empty_batch_works(dimension):
    """ICON's trainer validates with slices that may be empty."""
    table = LatentCodeTable(grids=[(3,) * dimension], channels=[2], global_size=1)
    learned = NePhi(table, mlp(dimension, 3), mlp(dimension, 3))
    learned.assign_identity_map([1, 1, *SHAPES[dimension]])
    encoded = Problem("pair", nephi).make(dimension, torch.float32)
    pair = images(dimension, 0)
    for network in (learned, encoded):
        loss = make_loss(network, PatchNCC(), similarity_sampler=Patches(4))
        with torch.no_grad():
            loss(*pair)
            assert loss.warped_image_A.shape == pair[0].shape


def test_magnitude_and_flips_have_icons_meaning():
    """A map that folds half of the box, against ICON's numbers on a fine grid."""
    shape = (64, 64)

    def fold(x):
        first = (2 * x[:, :1] - 1).abs() + 0.1 * x[:, 1:]
        return torch.cat([first, x[:, 1:]], 1)

    image = torch.rand(1, 1, *shape, dtype=DOUBLE)
    options = {"regularity_sampler": Points(4000), "regularity": no_term}
    loss = make_loss(Fixed((fold, fold)), **options)
    with torch.no_grad():
        result = loss(image, image)
        x = identity_map(shape, dtype=DOUBLE)
        flips = icon.losses.flips(fold(x))
        magnitude = (fold(x) - x).square().mean()
    assert float(result.flips) == pytest.approx(float(flips), rel=0.1)
    assert float(result.transform_magnitude) == pytest.approx(float(magnitude), rel=0.1)


@pytest.mark.parametrize("regularity", [diffusion_term, no_term])
def test_the_baselines_take_the_regularitys_place(regularity):
    pair = images(2, 2, DOUBLE)
    result = pair_loss(2, regularity=regularity, prior_lmbda=0)(*pair)
    expected = result.similarity_loss + result.inverse_consistency_loss
    torch.testing.assert_close(result.all_loss, expected)
    nothing = bool(result.inverse_consistency_loss == 0)
    assert nothing is (regularity is no_term)


@pytest.mark.parametrize("sigma", [1.0, 0.5])
def test_the_prior_is_that_of_the_code(sigma):
    loss = pair_loss(2, prior_lmbda=1.0, sigma=sigma)
    pair = images(2, 2, DOUBLE)
    loss(*pair)
    torch.testing.assert_close(loss.prior, loss.regis_net.net(*pair).prior(sigma))


def test_the_prior_of_a_single_network_is_of_both_its_codes():
    network = Problem("single", neural).make(2)
    loss = make_loss(network, prior_lmbda=1.0)
    image_A, image_B = images(2, 2, DOUBLE)
    loss(image_A, image_B)
    codes = network.net(image_A, image_B), network.net(image_B, image_A)
    torch.testing.assert_close(loss.prior, codes[0].prior() + codes[1].prior())


def test_the_prior_is_of_every_code_that_the_maps_hold():
    """Of a network called in both directions inside another: both, not its last one."""
    single = Problem("single", neural).make(2)
    pair = images(2, 2, DOUBLE)
    loss = make_loss(BothDirections(single), prior_lmbda=1.0)
    loss(*pair)
    codes = single.net(*pair), single.net(*reversed(pair))
    torch.testing.assert_close(loss.prior, codes[0].prior() + codes[1].prior())


def test_the_prior_is_the_same_without_gradients():
    """There both maps own their weights, but share one code all the same."""
    loss, pair = pair_loss(2, prior_lmbda=1.0), images(2, 2, DOUBLE)
    loss(*pair)
    prior = loss.prior.detach()
    with torch.no_grad():
        loss(*pair)
    assert torch.equal(loss.prior, prior)


def test_a_sampler_and_a_similarity_are_taken_for_one_call():
    seen = []

    def similarity(warped, fixed):
        seen.append(warped.shape[2])
        return (warped - fixed).square().mean()

    loss, pair = pair_loss(2), images(2, 2, DOUBLE)
    own = loss.similarity_sampler, loss.similarity
    loss(*pair, sampler=Points(7), similarity=similarity)
    assert seen == [7, 7]
    assert (loss.similarity_sampler, loss.similarity) == own
    other = loss.changed(prior_lmbda=0.0, sigma=2.0)
    assert (other.prior_lmbda, other.sigma, loss.sigma) == (0.0, 2.0, 1.0)
    assert other.regis_net is loss.regis_net


def test_a_network_without_codes_has_no_prior():
    loss = make_loss(Problem("voxels", voxels).make(2), prior_lmbda=1.0)
    loss(*images(2, 2, DOUBLE))
    assert loss.prior == 0


def test_the_images_may_have_different_grids(dimension):
    table = LatentCodeTable(grids=[(3,) * dimension], channels=[2], global_size=1)
    network = NePhi(table, mlp(dimension, 3), mlp(dimension, 3))
    image_A = torch.rand(1, 1, *(9, 6, 5)[:dimension])
    image_B = torch.rand(1, 1, *(4, 7, 8)[:dimension])
    loss = make_loss(network, PatchNCC(), similarity_sampler=Patches(5))
    assert loss(image_A, image_B).all_loss.isfinite()


def test_wrong_input_is_refused_in_words():
    loss = pair_loss(2)
    image = torch.rand(2, 1, 7, 5, dtype=DOUBLE)
    with pytest.raises(ValueError, match="image_A must be"):
        loss(image[0], image)
    with pytest.raises(TypeError, match="image_B must be floating point"):
        loss(image, image.int())
    with pytest.raises(ValueError, match="batch and channels must be the same"):
        loss(image, image[:, [0, 0]])
    with pytest.raises(ValueError, match=r"mask_B has grid \(5, 5\)"):
        loss(image, image, mask_B=torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match="mask is empty"):
        loss(image, image, mask_A=torch.zeros(2, 1, 7, 5))
