"""Fields: the paper's formulas, derivatives carried forward, gradients."""

import math

import numpy as np
import pytest
import torch

from icon_nephi.fields import LatentMLP, ModulatedSiren, displacement_and_jacobian
from tests.maps.problems import TanhField, mlp, siren, wave

CODE = 6


def alive(field):
    """The field with a last layer that is not zero, float64."""
    torch.nn.init.uniform_(field.last.weight, -0.3, 0.3)
    torch.nn.init.uniform_(field.last.bias, -0.1, 0.1)
    return field.double()


def rows(dimension, batch=2, count=5, derivatives=True):
    """Points and a jet of code values, both with gradients."""
    x = torch.rand(batch, count, dimension, dtype=torch.float64)
    size = (1 + dimension if derivatives else 1, batch, count, CODE)
    values = torch.randn(size, dtype=torch.float64)
    return x.requires_grad_(), values.requires_grad_()


@pytest.fixture(params=[siren, mlp], ids=["siren", "mlp"])
def make(request):
    return request.param


def test_the_papers_pair_has_280838_parameters():
    pair = [ModulatedSiren(3), ModulatedSiren(3)]
    count = sum(weight.numel() for field in pair for weight in field.parameters())
    assert count == 280_838
    assert all(weight.requires_grad for field in pair for weight in field.parameters())


def formulas_of_the_siren(field, x, z):
    """One point, from the formulas of the paper and its official code, in numpy."""

    def weights(layer):
        return layer.weight.detach().numpy(), layer.bias.detach().numpy()

    def sine(layer, inputs, omega):
        matrix, bias = weights(layer)
        return np.array(
            [
                math.sin(
                    omega * (sum(w * v for w, v in zip(row, inputs, strict=True)) + b)
                )
                for row, b in zip(matrix, bias, strict=True)
            ]
        )

    centred = [2 * c - 1 for c in x]
    phases = [
        2 * math.pi * sum(b * c for b, c in zip(frequency, centred, strict=True))
        for frequency in field.frequencies.numpy()
    ]
    features = [math.sin(p) for p in phases] + [math.cos(p) for p in phases]
    first = gate = sine(field.modulator[0], [*z, *features], field.omega)
    hidden = sine(field.synthesis[0], features, field.first_omega)
    for modulate, synthesise in zip(
        field.modulator[1:], field.synthesis[1:], strict=True
    ):
        gate = sine(modulate, gate, field.omega) + first
        hidden = gate * sine(synthesise, hidden, field.omega)
    matrix, bias = weights(field.last)
    return (matrix @ hidden + bias) / 2  # the official frame is [-1, 1]


def test_the_siren_agrees_with_the_formulas(dimension):
    field = ModulatedSiren(dimension, CODE, width=9, hidden_layers=3, frequencies=4)
    field = alive(field)
    assert (field.first_omega, field.omega) == (1.0, 30.0)
    x, values = rows(dimension, derivatives=False)
    found = field(x, values[0]).detach().numpy()
    for b in range(2):
        for n in range(5):
            expected = formulas_of_the_siren(
                field, x[b, n].tolist(), values[0, b, n].tolist()
            )
            np.testing.assert_allclose(found[b, n], expected, rtol=1e-9, atol=1e-12)


def test_the_mlp_agrees_with_the_formulas(dimension):
    field = alive(LatentMLP(dimension, CODE, width=9, hidden_layers=2, omega=1.7))
    x, values = rows(dimension, derivatives=False)
    hidden = torch.cat([2 * x - 1, values[0]], -1)
    for layer in field.hidden:
        hidden = torch.sin(1.7 * (hidden @ layer.weight.T + layer.bias))
    expected = hidden @ field.last.weight.T + field.last.bias
    torch.testing.assert_close(field(x, values[0]), expected)


def test_the_last_layer_starts_at_zero(dimension, make):
    field = make(dimension)
    assert (field.last.weight == 0).all()
    assert (field.last.bias == 0).all()
    x, values = rows(dimension)
    assert (field.double().jet(x, values) == 0).all()


def test_the_first_layers_start_within_the_siren_bounds():
    field = ModulatedSiren(2, 4, width=16, frequencies=5, omega=7.0)
    bounds = [1 / 10, math.sqrt(6 / 16) / 7, math.sqrt(6 / 16) / 7]
    for layers, first in ((field.synthesis, 10), (field.modulator, 14)):
        bounds[0] = 1 / first
        for layer, bound in zip(layers, bounds, strict=True):
            assert 0.9 * bound < layer.weight.detach().abs().max() <= bound


def test_frequencies_are_fixed_and_saved():
    field = ModulatedSiren(3, 4, width=8, frequencies=2000, frequency_scale=2.0)
    assert "frequencies" in field.state_dict()
    assert "frequencies" not in dict(field.named_parameters())
    assert float(field.frequencies.std()) == pytest.approx(2.0, rel=0.05)


def test_gradients_of_the_jet_are_right(dimension, make):
    field = alive(make(dimension))
    x, values = rows(dimension, batch=1, count=2)

    def jet(x, values, *weights):
        return field.jet(x, values)

    inputs = (x, values, *field.parameters())
    assert torch.autograd.gradcheck(jet, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_gradients_of_the_values_are_right(dimension, make):
    field = alive(make(dimension))
    x, values = rows(dimension, batch=1, count=2, derivatives=False)

    def forward(x, values, *weights):
        return field(x, values)

    inputs = (x, values[0].detach().requires_grad_(), *field.parameters())
    assert torch.autograd.gradcheck(forward, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


def plain(field, point, values):
    """One point ``[d]`` in ordinary torch operations, for torch.func."""
    if not isinstance(field, ModulatedSiren):
        hidden = torch.cat([2 * point - 1, values])
        for layer in field.hidden:
            hidden = torch.sin(field.omega * layer(hidden))
        return field.last(hidden)
    phase = 2 * math.pi * field.frequencies @ (2 * point - 1)
    features = torch.cat([phase.sin(), phase.cos()])
    first = torch.sin(field.omega * field.modulator[0](torch.cat([values, features])))
    gate, hidden = first, torch.sin(field.first_omega * field.synthesis[0](features))
    for modulate, synthesise in zip(
        field.modulator[1:], field.synthesis[1:], strict=True
    ):
        gate = torch.sin(field.omega * modulate(gate)) + first
        hidden = gate * torch.sin(field.omega * synthesise(hidden))
    return field.last(hidden) / 2


def test_derivatives_are_those_of_forward_mode_autodiff(dimension, make):
    field = alive(make(dimension))
    x, jet = (tensor.detach() for tensor in rows(dimension))
    found, jacobian = displacement_and_jacobian(field, x, jet)
    for b in range(2):
        for n in range(5):
            values, slopes = jet[0, b, n], jet[1:, b, n]

            def along(point, b=b, n=n, values=values, slopes=slopes):
                return plain(field, point, values + (point - x[b, n]) @ slopes)

            torch.testing.assert_close(found[b, n], along(x[b, n]))
            expected = torch.func.jacfwd(along)(x[b, n])
            torch.testing.assert_close(jacobian[b, n], expected)


@pytest.mark.parametrize("field", ["module", "function"])
def test_a_foreign_field_is_derived_by_jvp(dimension, field):
    field = TanhField(dimension).double() if field == "module" else wave
    x, jet = (tensor.detach() for tensor in rows(dimension))
    found, jacobian = displacement_and_jacobian(field, x, jet)
    torch.testing.assert_close(found, field(x, jet[0]))
    for axis in range(dimension):
        step = 1e-6 * torch.eye(dimension, dtype=torch.float64)[axis]
        ahead = field(x + step, jet[0] + 1e-6 * jet[1 + axis])
        behind = field(x - step, jet[0] - 1e-6 * jet[1 + axis])
        torch.testing.assert_close(
            jacobian[..., axis], (ahead - behind) / 2e-6, atol=1e-8, rtol=1e-7
        )


def test_the_jacobian_of_a_foreign_field_reaches_its_weights():
    field = TanhField(2).double()
    x, jet = rows(2)
    _, jacobian = displacement_and_jacobian(field, x, jet)
    jacobian.square().sum().backward()
    assert field.first.weight.grad.abs().max() > 0
    assert jet.grad.abs().max() > 0
    assert x.grad.abs().max() > 0


def test_no_points_and_no_items_are_fine(dimension, make):
    field = alive(make(dimension))
    for batch, count in ((0, 4), (2, 0)):
        x, jet = rows(dimension, batch, count)
        assert field(x, jet[0]).shape == (batch, count, dimension)
        assert field.jet(x, jet).shape == (1 + dimension, batch, count, dimension)


def test_the_generator_decides_every_weight(make):
    kind = type(make(2))

    def numbers(seed):
        field = kind(2, 3, width=4, generator=torch.Generator().manual_seed(seed))
        return torch.cat([tensor.flatten() for tensor in field.state_dict().values()])

    assert torch.equal(numbers(1), numbers(1))
    assert not torch.equal(numbers(1), numbers(2))


def test_a_field_with_a_generator_leaves_the_global_one_alone(make):
    kind = type(make(2))
    state = torch.get_rng_state()
    kind(2, 3, width=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
