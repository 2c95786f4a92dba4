"""Instance optimisation: copies of codes and fields learn, the network does not."""

import icon_registration as icon
import pytest
import torch
from torch import nn

from icon_nephi.fields.codes import LatentCodeTable
from icon_nephi.fit.optimize import Stage
from icon_nephi.fit.refine import refine_pair, unrefined_maps
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.maps.networks import NePhi, neural_parts
from icon_nephi.space.frames import identity_map
from icon_nephi.space.sampling import Patches, Points
from icon_nephi.swap import add_neural_residual
from tests.maps.problems import mlp, nephi, neural, voxels

SHAPE = (16, 18)


def blobs():
    """A disc, and the same disc elsewhere."""
    x = identity_map(SHAPE)
    discs = []
    for centre in ((0.45, 0.5), (0.55, 0.5)):
        away = (x - torch.tensor(centre).reshape(1, 2, 1, 1)).square().sum(1).sqrt()
        discs.append(torch.sigmoid((0.25 - away) * 15)[:, None])
    return discs


def coded():
    table = LatentCodeTable(
        grids=[(4, 4)],
        channels=[4],
        global_size=2,
        generator=torch.Generator().manual_seed(0),
    )
    torch.manual_seed(0)
    return NePhi(table, mlp(2), mlp(2))


def sampled(net, lmbda=0.2):
    samplers = {
        "similarity_sampler": Patches(60, 3, 2.0),
        "regularity_sampler": Points(40),
    }
    model = GradientICONPoints(net, PatchNCC(1e-2), lmbda, **samplers)
    model.assign_identity_map([1, 1, *SHAPE])
    return model


MODELS = {
    "pair_with_table": lambda: sampled(coded()),
    "pair_with_encoder": lambda: sampled(nephi(2)),
    "single_with_encoder": lambda: sampled(neural(2)),
    "residual": lambda: add_neural_residual(
        with_grid(field()), residual=coded(), similarity_sampler=Patches(60, 3, 2.0)
    ),
    "icon_loss": lambda: with_grid(icon.GradientICON(neural(2), icon.LNCC(2), 0.2)),
    "icon_two_steps": lambda: with_grid(
        icon.GradientICON(
            icon.TwoStepRegistration(field(), neural(2)), icon.LNCC(2), 0.2
        )
    ),
}


def field():
    """A voxel step that moves everything a little."""
    step = voxels(2)
    nn.init.normal_(step.net.last.weight, std=0.01)
    return step


def with_grid(net):
    net.assign_identity_map([1, 1, *SHAPE])
    return net


@pytest.mark.parametrize("name", MODELS)
def test_the_similarity_improves_and_the_model_stays(name):
    torch.manual_seed(1)
    model = MODELS[name]()
    model.train()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    A, B = blobs()
    rates = {"learning_rate": 3e-3, "code_learning_rate": 3e-2}
    phi_AB, phi_BA, history = refine_pair(
        model, A, B, steps=100, progress=False, **rates
    )
    assert len(history) == 100
    warped = model.as_function(A)(phi_AB(model.identity_map))
    assert not warped.requires_grad
    assert (warped - B).square().mean() < 0.6 * (A - B).square().mean()
    back = model.as_function(B)(phi_BA(model.identity_map))
    assert (back - A).square().mean() < 0.6 * (A - B).square().mean()
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert model.training
    assert all(
        p.requires_grad for k, p in model.named_parameters() if "netPhi" not in k
    )


def test_a_second_pair_does_not_start_from_the_first():
    A, B = blobs()
    other = [image.flip(2) for image in blobs()]

    def second(model):
        phi, _, _ = refine_pair(model, *other, steps=5, progress=False)
        return phi(identity_map(SHAPE))

    used = sampled(coded())
    refine_pair(used, A, B, steps=5, progress=False)
    assert torch.equal(second(used), second(sampled(coded())))


def test_a_pair_shares_its_code_while_it_is_refined():
    model = sampled(coded())
    maps = unrefined_maps(model, *blobs())
    first, second = neural_parts(maps)
    assert first.code is second.code
    phi_AB, phi_BA, _ = refine_pair(model, *blobs(), steps=3, progress=False)
    for mine, other in zip(
        phi_AB.code.local_codes, phi_BA.code.local_codes, strict=True
    ):
        assert torch.equal(mine, other)


def test_no_encoder_is_kept():
    model = sampled(nephi(2))
    phi_AB, *_ = refine_pair(model, *blobs(), steps=1, progress=False)
    for tensor in (phi_AB.code.global_code, *phi_AB.code.local_codes):
        assert tensor.grad_fn is None


def test_stages_patience_and_callback():
    seen = []
    _, _, history = refine_pair(
        sampled(coded()),
        *blobs(),
        stages=[Stage(3, Patches(20, 3, 3.0)), Stage(2, Points(20))],
        callback=lambda step, loss: seen.append((step, float(loss.all_loss.detach()))),
        progress=False,
    )
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5]
    assert [h["all_loss"] for h in history] == [loss for _, loss in seen]
    still = sampled(coded())
    _, _, history = refine_pair(
        still, *blobs(), steps=400, learning_rate=1e-12, patience=5, progress=False
    )
    assert len(history) < 400


def test_masks_say_where_samples_lie():
    A, B = blobs()
    seen = []

    def similarity(warped, fixed):
        seen.append(float(fixed.detach().min()))
        return (warped - fixed).square().mean()

    model = GradientICONPoints(coded(), similarity, 0.2, similarity_sampler=Points(50))
    model.assign_identity_map([1, 1, *SHAPE])
    masks = {"mask_A": (A > 0.9).float(), "mask_B": (B > 0.9).float()}
    refine_pair(model, A, B, steps=3, progress=False, **masks)
    assert min(seen) > 0.6
    seen.clear()
    refine_pair(model, A, B, steps=3, progress=False)
    assert min(seen) < 0.2


def test_a_model_without_neural_parts_is_refused():
    net = with_grid(icon.GradientICON(voxels(2), icon.LNCC(2), 0.2))
    with pytest.raises(ValueError, match="has no neural part to optimise; call"):
        refine_pair(net, *blobs(), progress=False)


def test_batch_norm_keeps_its_statistics():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.BatchNorm2d(1), coded().net

        def forward(self, image_A, image_B):
            self.norm(image_A)
            return self.inner(image_A, image_B)

    model = sampled(NePhi(Normed(), mlp(2), mlp(2)))
    before = model.regis_net.net.norm.running_mean.clone()
    refine_pair(model, *blobs(), steps=2, progress=False)
    assert torch.equal(model.regis_net.net.norm.running_mean, before)
