"""How sharply images say where a place belongs."""

import torch

from icon_nephi.fit.content import ImagePair
from icon_nephi.fit.sharpness import KNOWN, NODES, sharpness
from icon_nephi.space.intensities import PreparedImage
from tests.fit.small_runs import PLACE


def known(by=0.0, noise=0.05):
    """Of texture on the left and hardly anything on the right, under a shift."""
    source = torch.Generator().manual_seed(0)
    axes = torch.linspace(0, 1, 48)
    across = axes.expand(48, 48)
    texture = 0.5 + 0.4 * torch.sin(60 * across) * torch.sin(60 * across.T)
    image = torch.where(across < 0.5, texture, 0.5 + 0.1 * across)[None, None]
    images = [image + noise * torch.randn(image.shape, generator=source) for _ in "AB"]
    mask = torch.ones_like(image)
    pair = ImagePair(*(PreparedImage.of(i, PLACE, mask=mask) for i in images))
    shift = torch.tensor([0.0, by]).view(1, 2, 1, 1)
    generator = torch.Generator().manual_seed(1)
    found = sharpness(pair, lambda x: x + shift, generator)
    assert found.shape == (1, len(KNOWN), NODES, NODES)
    return dict(zip(KNOWN, found[0].exp(), strict=True))


def test_where_there_is_nothing_to_see_a_place_may_be_far_off():
    found = known()
    for name in ("bound", "unlike"):
        left, right = found[name][:, :3].mean(), found[name][:, -3:].mean()
        assert right > 3 * left


def test_a_map_that_is_off_shows_where_there_is_something():
    there, away = (known(by)["offset"][:, :3].mean() for by in (0.0, 0.01))
    assert away > 1.5 * there


def test_the_same_generator_gives_the_same_bits():
    assert torch.equal(known()["bound"], known()["bound"])
