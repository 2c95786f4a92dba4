"""Templates: in the middle of all shapes, sharp, the same mirrored; labels fused."""

import numpy as np
import pytest
import torch

import icon_nephi
from icon_nephi.fit.mean_image import mean_image
from icon_nephi.maps.centre import affine_mean
from icon_nephi.maps.transforms import MatrixTransform
from icon_nephi.phantoms import breathing_cycle
from icon_nephi.space.intensities import PreparedImage
from tests.fit.small_runs import PLACE, SMALL, blobs

SIZE = (40, 40)


@pytest.fixture(scope="module")
def people():
    return [*breathing_cycle(SIZE, 4, noise=5.0).images]


@pytest.fixture(scope="module")
def template(people):
    known = {"field": SMALL, "progress": False, "affine": False}
    return icon_nephi.build_template(people, **known)


def test_the_template_is_in_the_middle_and_sharp(template, people):
    assert template.mean_displacement() < 0.3
    image = template.template
    assert image.shape == (1, 1, *SIZE)
    apart = torch.cat(people)
    aligned = torch.cat(list(template.warped()))
    inner = (..., slice(4, -4), slice(4, -4))
    before, after = (float(i[inner].var(0).mean()) for i in (apart, aligned))
    assert after < 0.6 * before


def test_labels_are_fused(template, people):
    labels = [(image > -200).to(torch.int16) for image in people]
    fused = template.fuse(labels)
    assert fused.shape == (1, 1, *SIZE)
    assert set(fused.unique().tolist()) == {0, 1}
    share = float((fused > 0).float().mean())
    assert share == pytest.approx(float(torch.cat(labels).float().mean()), abs=0.05)
    with pytest.raises(ValueError, match="labels are 1 and images 4"):
        template.fuse(labels[:1])


def test_templates_are_saved_and_take_new_images(template, people, tmp_path):
    template.save(tmp_path / "t.nephi")
    loaded = icon_nephi.load(tmp_path / "t.nephi")
    assert type(loaded) is icon_nephi.Template
    with pytest.raises(ValueError, match="no times"):
        loaded.at(0.5)
    with pytest.raises(ValueError, match="read its image file"):
        _ = loaded.template
    new = template.register(people[1], field=SMALL, affine=False, progress=False)
    rows = np.random.default_rng(0).uniform(0.3, 0.7, (50, 2))
    apart = new.transform_points(rows) - template.from_mean(1).transform_points(rows)
    assert np.abs(apart).mean() * SIZE[0] < 0.5


def test_the_mean_of_affine_maps_is_between_them():
    turn = np.radians(20)
    matrices = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    for matrix, angle in zip(matrices, (turn, -turn), strict=True):
        c, s = np.cos(angle), np.sin(angle)
        matrix[:2, :2] = torch.tensor([[c, -s], [s, c]])
    matrices[0, :2, 2] = 4.0
    mean, middle = affine_mean(matrices, torch.zeros(2, dtype=torch.float64))
    assert middle.tolist() == pytest.approx([2.0, 2.0])
    assert np.allclose(mean[:2, :2], np.eye(2))  # of opposite turns, not smaller
    assert mean[:2, 2].tolist() == pytest.approx([2.0, 2.0])


def test_a_mean_is_taken_where_the_images_lie():
    image, shift = blobs(PLACE.size), 0.05
    moved = torch.eye(3, dtype=torch.float64)[None].repeat(2, 1, 1)
    ways = [MatrixTransform(m[None].clone()) for m in moved]
    ways[0].matrix[0, :2, 2] = shift
    ways[1].matrix[0, :2, 2] = -shift
    images = [blobs(PLACE.size, -shift), blobs(PLACE.size, shift)]
    sources = [lambda i=i: PreparedImage.of(i, PLACE) for i in images]
    mean = mean_image(PLACE.size, sources, ways, moved)
    inner = (..., slice(5, -5), slice(5, -5))
    assert (mean - image)[inner].abs().max() < 0.01
