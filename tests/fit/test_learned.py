"""The general network: codes are what they say, and a fit is never worse for them."""

import json

import pytest
import torch
from safetensors.torch import save_file

import icon_nephi
from icon_nephi.fields.codes import LatentCode
from icon_nephi.fields.pyramid import (
    PyramidEncoder,
    as_code,
    coarser_code,
    read_lattice,
    reading_fields,
)
from icon_nephi.fit import learned
from icon_nephi.fit.content import ImagePair
from icon_nephi.fit.likeness import Likeness
from icon_nephi.fit.settings import GRID, SIREN, make_pair
from icon_nephi.io.image_input import voxel_geometry
from icon_nephi.losses.similarities import find_similarity
from icon_nephi.maps.transforms import NeuralTransform
from icon_nephi.space.frames import identity_map
from icon_nephi.space.images import gaussian_blur
from icon_nephi.space.intensities import PreparedImage

SMALL = {"widths": (8, 8, 8), "hidden": (8, 8, 8), "reach": (1, 1, 1)}


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def small_encoder(d=2):
    return PyramidEncoder(d, **SMALL, generator=source()).eval().requires_grad_(False)


def images(shape=(40, 32), seed=0):
    noise = torch.randn(2, 1, *shape, generator=source(seed))
    return gaussian_blur(noise, [2.0] * len(shape)).chunk(2)


def code(d, nodes=12, size=0.05):
    u = size * torch.randn(1, 2 * d, *(nodes,) * d, generator=source())
    u = gaussian_blur(u, [1.5] * d)
    return u, as_code(*u.chunk(2, 1))


@pytest.mark.parametrize("d", [2, 3])
def test_swapping_the_images_swaps_the_maps(d):
    shape = (40, 32, 24)[:d]
    A, B = images(shape)
    encoder = small_encoder(d)
    (forward,), (backward,) = encoder(A, B).local_codes, encoder(B, A).local_codes
    torch.testing.assert_close(forward[:, :d], backward[:, d:])
    assert forward.abs().max() > 0


def test_scale_and_offset_of_intensities_do_not_matter():
    A, B = images()
    encoder = small_encoder()
    (first,), (second,) = (encoder(a, B).local_codes for a in (A, 7 * A + 3))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("d", [2, 3])
def test_reading_fields_read_what_a_code_was_made_of(d):
    u, known = code(d)
    at = identity_map(u.shape[2:])
    for side, field in enumerate(reading_fields(d)):
        moved = NeuralTransform(field, known)(at) - at
        expected = u[:, side * d : (side + 1) * d]
        # Between the nodes the sine of a mean is not the mean of sines.
        assert (moved - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_coarser_code_says_the_same():
    u, known = code(2, 48, size=0.01)
    u = gaussian_blur(u, [6.0, 6.0])
    known = as_code(*u.chunk(2, 1))
    coarse = coarser_code(known, 24)
    assert max(coarse.local_codes[0].shape[2:]) == 24
    at = identity_map((30, 30))
    first, second = (
        NeuralTransform(reading_fields(2)[0], c)(at) for c in (known, coarse)
    )
    assert (first - second).abs().max() < 0.1 * (first - at).abs().max()


def test_a_fit_begins_with_the_maps_of_a_code():
    _, known = code(2)
    pair = make_pair(GRID, (1.0, 1.0), source(), known)
    at = identity_map((20, 20))
    A, B = images()
    for phi, field in zip(pair(A, B), reading_fields(2), strict=True):
        torch.testing.assert_close(phi(at), NeuralTransform(field, known)(at))


def test_a_field_that_cannot_begin_says_so():
    with pytest.raises(ValueError, match="cannot start from what the general"):
        make_pair(SIREN, (1.0, 1.0), source(), code(2)[1])
    assert learned.can_begin(learned.beginning(SIREN))


def prepared(image):
    return PreparedImage.of(image, voxel_geometry(image.shape[2:]))


def begun(begin, A, B):
    pair = ImagePair(prepared(A), prepared(B))
    likeness = Likeness(pair, find_similarity(None), 0)
    start = torch.eye(A.dim() - 1, dtype=torch.float64)
    return learned.begin_with(begin, likeness, start, SIREN, "auto")


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder of weights that nobody trained."""
    monkeypatch.setattr(learned, "WEIGHTS", tmp_path)
    tensors = {k: v.half() for k, v in small_encoder().state_dict().items()}
    about = {"network": json.dumps(SMALL)}
    save_file(tensors, tmp_path / "general2d.safetensors", about)
    return tmp_path


def test_a_wrong_prediction_is_not_taken(weights):
    A, _ = images((48, 48))
    assert begun("auto", A, A) == (SIREN, None)
    settings, taken = begun("learned", A, A)
    assert isinstance(taken, LatentCode)
    assert learned.can_begin(settings)
    fit = learned.predict_pair(prepared(A), prepared(A), affine=False)
    assert fit.code.local_codes[0].abs().max() == 0


def test_missing_weights_are_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(learned, "WEIGHTS", tmp_path)
    A, B = images()
    with pytest.raises(FileNotFoundError, match=r"weights .* are missing: install"):
        icon_nephi.predict(A, B)
    with pytest.raises(FileNotFoundError, match="are missing"):
        icon_nephi.make_network(A.shape, pretrained="general")
    assert begun("auto", A, B) == (SIREN, None)


def test_an_unknown_start_is_refused():
    A, B = images()
    with pytest.raises(ValueError, match=r"start must be one of .* got 'last'"):
        icon_nephi.register(A, B, start="last", affine=False, progress=False)


def test_the_general_network_is_trained_on(weights):
    A, B = images((32, 32))
    network = icon_nephi.make_network(A.shape, pretrained="general", generator=source())
    loss = network(A, B)
    loss.all_loss.backward()
    gradients = [p.grad for p in network.regis_net.net.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_a_lattice_is_read_as_points_are():
    u, _ = code(2)
    at = [torch.linspace(0, 1, n) for n in (5, 7)]
    table = LatentCode(u.new_zeros(1, 0), (u,))
    rows = torch.cartesian_prod(*at)[None]
    expected = table.at(rows)[0, 0].T.reshape(4, 5, 7)
    torch.testing.assert_close(read_lattice(u, at)[0], expected)
