"""Encoders: sizes, any shape and batch, places of the nodes, gradients."""

import pytest
import torch

from icon_nephi.fields.encoders import HybridEncoder
from icon_nephi.space.interpolation import read_grids

SHAPES = [(64, 64), (7, 5), (2, 2), (2, 40), (9, 12, 17), (2, 2, 2), (25, 9, 33)]


def parameters(module):
    return sum(weight.numel() for weight in module.parameters())


def pair(batch, shape, channels=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    size = (2, batch, channels, *shape)
    return torch.rand(size, generator=generator, dtype=torch.float64).to(dtype)


def test_the_published_encoder_has_the_published_size():
    encoder = HybridEncoder((1, 1, 175, 175, 175), grids=(6,), top_down=False)
    assert parameters(encoder) == 3_069_080  # 3.07 M in table 2
    # The released configuration branches at 22^3; the text names 16^3.
    released = HybridEncoder((1, 1, 175, 175, 175), top_down=False)
    assert parameters(released) == 2_986_136


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("top_down", [True, False])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_any_shape_and_batch(shape, top_down, batch):
    encoder = HybridEncoder((1, 2, *shape), top_down=top_down).train()
    code = encoder(*pair(batch, shape, channels=2))
    assert code.global_code.shape == (batch, 32)
    (local,) = code.local_codes
    assert local.shape[:2] == (batch, 32)
    assert code.size == encoder.code_size == 64
    points = torch.rand(batch, 3, len(shape))
    assert code.at(points, gradient=True).shape == (1 + len(shape), batch, 3, 64)
    assert all(v.isfinite().all() for v in (code.global_code, local))


@pytest.mark.parametrize(
    ("side", "grid", "nodes"), [(175, 16, 22), (64, 16, 16), (64, 8, 8), (128, 16, 16)]
)
def test_a_code_has_about_the_wanted_nodes(side, grid, nodes):
    encoder = HybridEncoder((1, 1, side, side), grids=(grid,))
    (local,) = encoder(*pair(1, (side, side))).local_codes
    assert local.shape[2:] == (nodes, nodes)


def test_several_grids_and_no_global_code():
    encoder = HybridEncoder(
        (1, 1, 32, 48), grids=(4, 8, 16), channels=(3, 5, 7), global_size=0
    )
    code = encoder(*pair(2, (32, 48)))
    assert code.global_code.shape == (2, 0)
    assert [g.shape[1] for g in code.local_codes] == [3, 5, 7]
    assert [g.shape[2:] for g in code.local_codes] == [(4, 6), (8, 12), (16, 24)]
    assert code.size == encoder.code_size == 15


def test_other_shapes_than_the_one_it_was_made_for():
    encoder = HybridEncoder((1, 1, 33, 33))
    for shape in ((33, 33), (47, 21), (128, 65)):
        assert encoder(*pair(2, shape)).global_code.shape == (2, 32)


@pytest.mark.parametrize("top_down", [True, False])
def test_a_batch_is_its_items(precision, top_down):
    encoder = HybridEncoder((1, 1, 20, 24), top_down=top_down).to(precision.dtype)
    image_A, image_B = pair(3, (20, 24), dtype=precision.dtype)
    together = encoder(image_A, image_B)
    for i in range(3):
        alone = encoder(image_A[[i]], image_B[[i]])
        precision.close(together.global_code[[i]], alone.global_code)
        precision.close(together.local_codes[0][[i]], alone.local_codes[0])
        assert alone.global_code.dtype == precision.dtype


def test_every_weight_gets_a_gradient(dimension):
    shape = (20, 17, 12)[:dimension]
    encoder = HybridEncoder((1, 1, *shape), grids=(3, 6), channels=(4, 4))
    code = encoder(*pair(2, shape))
    code.at(torch.rand(2, 50, dimension), gradient=True).square().sum().backward()
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("order", ["linear", "quadratic"])
@pytest.mark.parametrize("shape", [(33, 33), (32, 32), (30, 47)])
def test_codes_are_read_where_their_features_lie(order, shape):
    """A feature map that is x(voxel) gives a code that reads x(point)."""
    encoder = HybridEncoder((1, 1, *shape), grids=(8,), interpolation=order)
    level = encoder.levels[0]
    step = 2 ** (level + 1)
    size = [-(-n // step) for n in shape]
    axes = [
        torch.arange(n, dtype=torch.float64) * step / (voxels - 1)
        for n, voxels in zip(size, shape, strict=True)
    ]
    features = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
    code = encoder._place(features, level, shape)
    # Near the borders there are no features beyond, and the code is flat.
    points = 0.3 + 0.25 * torch.rand(1, 40, 2, dtype=torch.float64)
    torch.testing.assert_close(read_grids([code], points, order=order)[0], points)


def test_a_generator_decides_the_weights():
    def weights(seed):
        generator = torch.Generator().manual_seed(seed)
        state = torch.get_rng_state()
        encoder = HybridEncoder((1, 1, 16, 16), generator=generator)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([w.flatten() for w in encoder.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_wrong_input_is_refused():
    encoder = HybridEncoder((1, 1, 16, 16))
    image = torch.rand(1, 1, 16, 16)
    with pytest.raises(ValueError, match="one grid"):
        encoder(image, torch.rand(1, 1, 16, 18))
    with pytest.raises(ValueError, match="2 axes"):
        encoder(image, torch.rand(1, 1, 16, 16, 16))
    with pytest.raises(ValueError, match=r"\[B, 1, \*grid\]"):
        encoder(image.expand(1, 2, 16, 16), image)
    with pytest.raises(TypeError, match="floating"):
        encoder(image.int(), image)
    with pytest.raises(ValueError, match="input_shape"):
        HybridEncoder((1, 1, 16))
    with pytest.raises(ValueError, match="channel counts"):
        HybridEncoder((1, 1, 16, 16), grids=(8, 16))
