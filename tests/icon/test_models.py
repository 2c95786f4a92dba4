"""The network to train: sizes, start, options, and ICON's tools around it."""

from dataclasses import replace

import icon_registration as icon
import pytest
import torch

from icon_nephi import FirstTransform, Patches, Points
from icon_nephi.fit.refine import refine_pair
from icon_nephi.fit.settings import SIREN, make_pair
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.maps.networks import neural_parts
from icon_nephi.models import NETWORKS, make_network
from tests.maps.problems import SHAPES, images


def parameters(*modules):
    return sum(w.numel() for m in modules for w in m.parameters())


def small(dimension, **keywords):
    shape = SHAPES[dimension]
    keywords = {
        "similarity_sampler": Points(40),
        "regularity_sampler": Points(10),
        **keywords,
    }
    return make_network([2, 1, *shape], **keywords)


@pytest.mark.parametrize(
    "options", [*({"preset": name} for name in sorted(NETWORKS)), {"levels": 2}]
)
def test_the_start_is_the_identity(dimension, options):
    network = small(dimension, **options)
    image_A, image_B = images(dimension, 2)
    loss = network(image_A, image_B)
    assert isinstance(loss, icon.losses.ICONLoss)
    assert loss.inverse_consistency_loss == 0
    x = network.identity_map
    for field in (network.phi_AB_vectorfield, network.phi_BA_vectorfield):
        torch.testing.assert_close(field, x.expand_as(field), rtol=0, atol=0)
    assert x.shape == (1, dimension, *SHAPES[dimension])


@pytest.mark.parametrize(
    "options", [*({"preset": name} for name in sorted(NETWORKS)), {"levels": 2}]
)
def test_every_weight_is_trained(dimension, options):
    network = small(dimension, **options)
    before = {n: w.detach().clone() for n, w in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(2):  # the last layers start at zero: the others move second
        optimizer.zero_grad()
        network(*images(dimension, 2)).all_loss.backward()
        optimizer.step()
    for name, weight in network.named_parameters():
        assert not torch.equal(weight, before[name]), name


def test_the_paper_preset_has_the_published_sizes():
    net = make_network([1, 1, 175, 175, 175], preset="paper").regis_net
    assert parameters(net.field_AB, net.field_BA) == 280_838
    assert parameters(net.net) == 3_069_080


def test_options_reach_the_loss():
    similarity, sampler = PatchNCC(), Patches(5)
    network = small(
        2,
        similarity=similarity,
        similarity_sampler=sampler,
        lmbda=2.5,
        prior_lmbda=0.25,
        extent=torch.tensor([1.0, 2.0]),
    )
    assert network.similarity is similarity
    assert network.similarity_sampler is sampler
    assert (network.lmbda, network.prior_lmbda) == (2.5, 0.25)
    assert network.extent.tolist() == [1.0, 2.0]
    assert network(*images(2, 2)).all_loss.isfinite()
    with pytest.raises(ValueError, match="preset"):
        make_network([1, 1, 8, 8], preset="none")


def test_a_generator_decides_the_weights():
    def weights(seed):
        network = small(2, generator=torch.Generator().manual_seed(seed))
        return torch.cat([w.flatten() for w in network.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_icons_wrappers_take_it(dimension):
    pair = small(dimension).regis_net
    shape = SHAPES[dimension]
    net = icon.TwoStepRegistration(
        icon.DownsampleRegistration(FirstTransform(pair), dimension),
        FirstTransform(small(dimension).regis_net),
    )
    loss = icon.losses.GradientICONSparse(net, icon.losses.NCC(), 1.5)
    loss.assign_identity_map([1, 1, *shape])
    loss(*images(dimension, 2)).all_loss.backward()


def test_two_levels_are_refined_for_a_pair(dimension):
    network = small(dimension, levels=2)
    for code in (network.regis_net.netPhi.net.net, network.regis_net.netPsi.net):
        assert parameters(code) > 0
    pair = images(dimension, 1)
    phi_AB, phi_BA, losses = refine_pair(network, *pair, steps=3, progress=False)
    assert len(losses) == 3
    x = network.identity_map
    assert not torch.equal(phi_AB(x), x.expand_as(phi_AB(x)))
    assert len(neural_parts((phi_AB, phi_BA))) == 4


def test_the_numbers_of_a_field_are_taken_as_they_are():
    """Frequencies below one once came out as zero."""
    numbers = {"width": 8, "frequencies": 4, "first_omega": 0.5, "omega": 2.5}
    settings = replace(SIREN, arguments=tuple(numbers.items()))
    pair = make_pair(settings, (9.0, 9.0), torch.Generator().manual_seed(0))
    assert numbers.items() <= pair.field_AB.arguments.items()
    assert numbers.items() <= pair.field_BA.arguments.items()
