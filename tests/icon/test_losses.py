"""ICON's losses, wrappers and modules with every kind of map below them, nested."""

import copy
import itertools

import icon_registration as icon
import pytest
import torch
from torch import nn

from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.losses.similarities import (
    PatchNCC,
    dice_loss,
    read_labels,
    shared_labels,
)
from icon_nephi.maps.networks import FirstTransform, TwoStepPair
from icon_nephi.maps.transforms import Composition, value_and_jacobian
from icon_nephi.space.sampling import Patches, Points
from tests.maps.problems import (
    SHAPES,
    Problem,
    icon_matrix,
    images,
    mlp,
    nephi,
    neural,
    points,
    siren,
    voxels,
)

DOUBLE = torch.float64
LOSSES = [
    icon.GradientICON,
    icon.losses.GradientICONSparse,
    icon.InverseConsistentNet,
    icon.losses.BendingEnergyNet,
    icon.losses.DiffusionRegularizedNet,
]
KINDS = {"neural": neural, "voxels": voxels, "matrix": icon_matrix}


def nested(kinds):
    """Three steps, each at half the resolution of the next."""

    def build(dimension):
        first, second, third = (KINDS[kind](dimension) for kind in kinds)
        for step in (second, third):
            coarse = icon.DownsampleRegistration(first, dimension)
            first = icon.TwoStepRegistration(coarse, step)
        return icon.DownsampleRegistration(first, dimension)

    return build


def steps_of(module):
    """The three steps of `nested`, in the order in which they see the images."""
    outer = module.net
    inner = outer.netPhi.net
    return inner.netPhi.net, inner.netPsi, outer.netPsi


ORDERS = list(itertools.permutations(KINDS))


@pytest.mark.parametrize("kinds", ORDERS, ids="_".join)
def test_three_levels_of_three_kinds_are_their_composition(dimension, kinds):
    shape = (13, 11, 9)[:dimension]
    module = Problem("nested", nested(kinds)).make(dimension, DOUBLE, shape=shape)
    pair = images(dimension, 2, DOUBLE, shape=shape)
    maps = {}
    for step in steps_of(module):

        def keep(step, _, result):
            maps[step] = result

        step.register_forward_hook(keep)
    phi = module(*pair)
    assert steps_of(module)[0].identity_map.shape[2:] == (2, 2, 2)[:dimension]
    x = points(dimension, reach=0.1)
    first, second, third = (maps[step] for step in steps_of(module))
    torch.testing.assert_close(phi(x), first(second(third(x))))
    values, jacobian = value_and_jacobian(phi, x)
    expected = Composition(first, Composition(second, third)).value_and_jacobian(x)
    torch.testing.assert_close((values, jacobian), expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kinds", ORDERS[:3], ids="_".join)
def test_three_levels_train_under_both_losses(dimension, kinds, batch):
    shape = (13, 11, 9)[:dimension]
    network = Problem("nested", nested(kinds)).make(
        dimension, torch.float32, shape=shape
    )
    similarity = icon.losses.SSD()
    for model in (
        icon.GradientICON(network, similarity, 0.1),
        GradientICONPoints(network, similarity, 0.1, regularity_sampler=Points(30)),
    ):
        model.zero_grad()
        model.assign_identity_map([1, 1, *shape])
        result = model(*images(dimension, batch, shape=shape))
        result.all_loss.backward()
        assert all(number.isfinite() for number in result)
        for name, weight in model.named_parameters():
            assert weight.grad.isfinite().all(), name
            assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(
    ("batch", "field"), [(1, siren), (2, mlp)], ids=["one_siren", "two_mlp"]
)
def test_chunks_do_not_change_icons_losses(dimension, loss, batch, field):
    """Loss and every gradient, dense maps in one piece and in many."""
    pair = images(dimension, batch)
    found = []
    for chunk_size in (10**6, 40):
        network = Problem("single", lambda d: neural(d, field)).make(
            dimension, torch.float32
        )
        network.chunk_size = chunk_size
        model = loss(network, icon.LNCC(sigma=1), 0.5)
        model.assign_identity_map([1, 1, *SHAPES[dimension]])
        torch.manual_seed(5)
        result = model(*pair)
        result.all_loss.backward()
        found.append([*result, *(w.grad for w in model.parameters())])
    # GradientICON divides by a step of 1e-3: a rounding becomes 1000 times as large.
    roundings = 10 * 1000 if loss is icon.GradientICON else 100
    for whole, pieces in zip(*found, strict=True):
        scale = float(whole.detach().abs().max())
        atol = roundings * torch.finfo(torch.float32).eps * scale
        torch.testing.assert_close(pieces, whole, rtol=0, atol=atol)


def bytes_kept(model, pair):
    """What autograd holds on to between forward and backward, each storage once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*pair)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("loss", LOSSES[:2], ids=lambda loss: loss.__name__)
def test_dense_losses_keep_little_of_each_voxel(loss):
    """Coordinates and displacements, not activations, whatever the network's width."""
    shape = (12, 11, 13)
    kept = {}
    for width in (8, 64):
        network = Problem(
            "wide", lambda d, w=width: neural(d, lambda d: type(mlp(d))(d, 6, width=w))
        ).make(3, torch.float32, shape=shape)
        network.chunk_size = 200
        model = loss(network, icon.losses.SSD(), 1.0)
        model.assign_identity_map([1, 1, *shape])
        voxels_here = 12 * 11 * 13
        kept[width] = bytes_kept(model, images(3, 1, shape=shape)) / voxels_here
    assert kept[64] < 1500
    assert kept[64] - kept[8] < 50


@pytest.mark.slow
@pytest.mark.parametrize("field", ["LatentMLP", "ModulatedSiren"])
def test_dense_losses_fit_into_two_gibibytes(field):
    """One step of GradientICON at 64^3, in a process of its own."""
    from evaluation.speed.bench_dense_losses import measure
    from icon_nephi.commands.compare import alone

    assert alone(measure, "GradientICON", field, 64)["peak_mib"] < 2048


def test_maps_wrapped_in_a_function_are_derived_as_well(dimension):
    """`lambda x: phi(x)` hides what we know; gradients must not go wrong silently."""
    found = []
    for wrap in (lambda phi: Composition(phi, phi), lambda phi: lambda x: phi(phi(x))):
        module = Problem("single", lambda d: neural(d, siren)).make(dimension)
        phi = wrap(module(*images(dimension, 2, DOUBLE)))
        values, jacobian = value_and_jacobian(phi, points(dimension, 2))
        ramp = torch.arange(jacobian.numel()).view_as(jacobian)
        (values.pow(3).mean() + (ramp * jacobian).mean()).backward()
        found.append([values, jacobian, *(w.grad for w in module.parameters())])
    for known, wrapped in zip(*found, strict=True):
        torch.testing.assert_close(wrapped, known)


def test_a_second_derivative_by_autograd_is_refused():
    module = Problem("single", neural).make(2)
    phi = module(*images(2, 1, DOUBLE))
    weight = module.net.conv.weight
    (slope,) = torch.autograd.grad(
        phi(points(2)).square().sum(), weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match="value_and_jacobian"):
        slope.square().sum().backward()


# Data parallel


def replica_of(module, copies=None):
    """As `torch.nn.parallel.replicate` does it on a device of its own."""
    copies = {} if copies is None else copies
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(replica, name, replica_of(child, copies))
    for name, weight in module._parameters.items():
        if weight is not None:
            if weight not in copies:
                copies[weight] = weight.clone()
            setattr(replica, name, copies[weight])
    for name, buffer in module._buffers.items():
        setattr(replica, name, None if buffer is None else buffer.clone())
    return replica


def points_loss(network):
    sampling = {
        "similarity_sampler": Patches(20, 3, 1.0),
        "regularity_sampler": Points(30),
        "generator": torch.Generator().manual_seed(2),
    }
    return GradientICONPoints(network, PatchNCC(), 0.2, **sampling)


@pytest.mark.parametrize(
    "make",
    [
        lambda net: icon.GradientICON(net, icon.losses.SSD(), 0.2),
        lambda net: icon.losses.GradientICONSparse(net, icon.losses.SSD(), 0.2),
        points_loss,
    ],
    ids=["GradientICON", "GradientICONSparse", "GradientICONPoints"],
)
def test_replicas_of_data_parallel_train_the_original(dimension, make):
    """Their weights are no parameters of theirs, and still get their gradients."""
    network = Problem("single", neural).make(dimension, torch.float32)
    network.chunk_size = 60
    found = []
    for replicate in (lambda model: model, replica_of):
        model = make(copy.deepcopy(network))
        model.assign_identity_map([1, 1, *SHAPES[dimension]])
        torch.manual_seed(1)
        loss = replicate(model)(*images(dimension, 2)).all_loss
        loss.backward()
        found.append([loss, *(weight.grad for weight in model.parameters())])
    for original, replicated in zip(*found, strict=True):
        scale = float(original.detach().abs().max())
        torch.testing.assert_close(replicated, original, rtol=1e-2, atol=1e-3 * scale)


def test_data_parallel_is_the_module_itself_without_a_device(dimension):
    network = Problem("single", neural).make(dimension, torch.float32)
    model = points_loss(network)
    model.assign_identity_map([1, 1, *SHAPES[dimension]])
    result = nn.DataParallel(model)(*images(dimension, 2))
    result.all_loss.mean().backward()
    assert isinstance(result, icon.losses.ICONLoss)
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Was asked to gather along dimension 0")
def test_data_parallel_on_devices(dimension):
    network = Problem("single", neural).make(dimension, torch.float32)
    model = icon.GradientICON(network, icon.losses.SSD(), 0.2)
    model.assign_identity_map([1, 1, *SHAPES[dimension]])
    parallel = nn.DataParallel(model.cuda())
    pair = [image.cuda() for image in images(dimension, 2)]
    parallel(*pair).all_loss.mean().backward()
    assert all(weight.grad is not None for weight in model.parameters())


# Modules of ICON's that return tuples


def constricon():
    """The module, where torchvision, which it imports, can be imported."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    from icon_registration import constricon

    return constricon


def trains(model, dimension, cancels="nothing"):
    result = model(*images(dimension, 2))
    result.all_loss.backward()
    assert all(number.isfinite() for number in result)
    for name, weight in model.named_parameters():
        if "field_BA" not in name and not name.endswith(cancels):
            assert weight.grad.abs().max() > 0, name


def test_constricons_pairs_take_ours_and_ours_take_theirs():
    module = constricon()

    def build(d):
        svf = module.ICONSquaringVelocityField(voxels(d).net)
        both = module.TwoStepInverseConsistent(nephi(d), svf)
        return TwoStepPair(both, nephi(d))

    network = Problem("pairs", build).make(2, torch.float32)
    # Velocities are net(A, B) - net(B, A): the last bias cancels.
    trains(points_loss(network), 2, "last.bias")
    single = module.FirstTransform(network)
    model = icon.GradientICON(single, icon.losses.SSD(), 0.2)
    model.assign_identity_map([1, 1, *SHAPES[2]])
    trains(model, 2, "last.bias")


def test_constricon_finds_velocity_fields_behind_ours():
    module = constricon()

    def build(d):
        svf = module.ICONSquaringVelocityField(voxels(d).net)
        return FirstTransform(TwoStepPair(svf, nephi(d)))

    network = Problem("velocities", build).make(2, torch.float32)
    for loss in (module.VelocityFieldBendingEnergyNet, module.VelocityFieldDiffusion):
        model = loss(network, icon.losses.SSD(), 1.0)
        model.assign_identity_map([1, 1, *SHAPES[2]])
        trains(model, 2, "last.bias")
    assert len(list(module.find_velocity_fields(network(*images(2))))) == 1


@pytest.mark.parametrize(
    "make",
    [points_loss, lambda n: icon.GradientICON(n, icon.losses.SSD(), 0.2)],
    ids=["GradientICONPoints", "GradientICON"],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_carl_augments_ours(dimension, make):
    carl = pytest.importorskip("icon_registration.carl")
    network = Problem("single", neural).make(dimension, torch.float32)
    model = make(network)
    model.assign_identity_map([1, 1, *SHAPES[dimension]])
    model = carl.augmentify(model)
    assert model.regis_net.netPsi.netPsi is network
    trains(model, dimension)


def test_carl_steps_around_ours(dimension):
    carl = pytest.importorskip("icon_registration.carl")

    def build(d):
        rotation = carl.RotationFunctionFromVectorField(voxels(d).net)
        return carl.PostStep(nephi(d), icon.TwoStepRegistration(rotation, neural(d)))

    network = Problem("around", build).make(dimension, torch.float32)
    model = icon.GradientICON(network, icon.losses.SSD(), 0.2)
    model.assign_identity_map([1, 1, *SHAPES[dimension]])
    trains(model, dimension)


# What uniGradICON's loss takes beside images


def label_maps(dimension, batch=2, shape=None):
    source = torch.Generator().manual_seed(8)
    size = (2, batch, 1, *(shape or SHAPES[dimension]))
    return torch.randint(0, 4, size, generator=source).to(DOUBLE)


def test_shares_of_labels_are_the_one_hot_image_read_linearly(dimension):
    maps, _ = label_maps(dimension)
    labels = torch.tensor([1, 3])
    x = points(dimension, 2, 50, reach=0.2).requires_grad_()
    found = read_labels(maps, x, labels)
    as_image = (maps == labels.reshape(1, -1, *(1,) * dimension)).to(DOUBLE)
    from icon_nephi.space.images import sample_image

    expected = sample_image(as_image, x).flatten(2)
    torch.testing.assert_close(found, expected)
    ramp = torch.linspace(-1, 1, found.numel(), dtype=DOUBLE).view_as(found)
    slopes = [torch.autograd.grad((f * ramp).sum(), x)[0] for f in (found, expected)]
    torch.testing.assert_close(*slopes)


def test_dice_of_equal_maps_is_zero_and_of_disjoint_ones_one(dimension):
    maps, _ = label_maps(dimension)
    labels = shared_labels(maps, maps)
    assert labels.tolist() == [1, 2, 3]
    x = points(dimension, 2, 60)
    assert float(dice_loss(maps, maps, x, x, labels)) == pytest.approx(0, abs=1e-12)
    ones, twos = torch.ones_like(maps), torch.full_like(maps, 2)
    both = torch.tensor([1, 2])
    assert float(dice_loss(ones, twos, x, x, both)) == pytest.approx(1)
    # A label that no sample meets says nothing.
    assert float(dice_loss(ones, ones, x, x, both)) == pytest.approx(0)


def test_labels_must_be_shared():
    ones = torch.ones(1, 1, 4, 4)
    with pytest.raises(ValueError, match="no label above 0 in common"):
        shared_labels(ones, 2 * ones)
    with pytest.raises(ValueError, match="got a negative one"):
        shared_labels(ones, -ones)


def test_the_dice_term_is_weighted_and_trains(dimension):
    def results(weight):
        network = Problem("pair", nephi).make(dimension)
        model = GradientICONPoints(
            network,
            icon.losses.SSD(),
            0.1,
            dice_loss_weight=weight,
            generator=torch.Generator().manual_seed(0),
        )
        maps_A, maps_B = label_maps(dimension)
        pair = images(dimension, 2, DOUBLE)
        result = model(*pair, segmentation_A=maps_A, segmentation_B=maps_B)
        result.all_loss.backward()
        return model, result

    without, plain = results(0.0)
    assert not hasattr(without, "dice")  # as uniGradICON: no weight, no term
    model, weighted = results(0.7)
    assert 0 < float(model.dice.detach()) < 2
    torch.testing.assert_close(
        weighted.all_loss, plain.all_loss + 0.7 * model.dice.detach()
    )
    torch.testing.assert_close(weighted.similarity_loss, plain.similarity_loss)
    first, second = (next(m.parameters()).grad for m in (without, model))
    assert (first - second).abs().max() > 0


def test_the_similarity_compares_labels_and_the_network_sees_images(dimension):
    pair = images(dimension, 2, DOUBLE)
    others = images(dimension, 2, DOUBLE, seed=4)

    def similarity(network_sees, **labels):
        network = Problem("pair", nephi).make(dimension)
        model = GradientICONPoints(
            network,
            icon.losses.SSD(),
            0.1,
            generator=torch.Generator().manual_seed(0),
        )
        result = model(*network_sees, **labels)
        return result.similarity_loss, model.phi_AB(points(dimension)), model

    given = dict(zip(("label_A", "label_B"), others, strict=True))
    found, phi, model = similarity(pair, **given)
    plain, expected, _ = similarity(pair)
    torch.testing.assert_close(phi, expected)
    assert abs(found - plain) > 1e-6
    assert model.image_A is pair[0]
    same = dict(zip(("label_A", "label_B"), pair, strict=True))
    torch.testing.assert_close(similarity(pair, **same)[0], plain)


def test_wrong_labels_and_segmentations_are_refused():
    model = points_loss(nephi(2))
    model.dice_loss_weight = 1.0
    image, other = images(2)
    maps, _ = label_maps(2)
    with pytest.raises(ValueError, match="segmentation_B is missing"):
        model(image, other, segmentation_A=maps)
    with pytest.raises(ValueError, match="segmentation_A has grid"):
        model(image, other, segmentation_A=maps[..., 1:], segmentation_B=maps)
    with pytest.raises(ValueError, match="label_A is"):
        model(
            image,
            other,
            label_A=image.repeat(1, 2, 1, 1),
            segmentation_A=maps,
            segmentation_B=maps,
        )
