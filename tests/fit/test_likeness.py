"""What images have in common chooses the similarity, and what is kept of a fit."""

from dataclasses import replace

import pytest
import torch

from icon_nephi.fit.affine import find_affine, in_unit_boxes
from icon_nephi.fit.content import ImagePair
from icon_nephi.fit.contrast import OTHERS, find_contrast
from icon_nephi.fit.likeness import Likeness
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.fit.search import identity
from icon_nephi.fit.simpler import Watch, headers_or, simpler
from icon_nephi.losses.similarities import find_similarity
from icon_nephi.maps.transforms import NeuralTransform
from icon_nephi.space.frames import identity_map
from icon_nephi.space.intensities import PreparedImage, prepare
from tests.fit.moved_scene import error, pair
from tests.fit.small_runs import PLACE, SMALL, blobs
from tests.small_fits import fit_tensors

OPTIONS = FitOptions(progress=False)


def images_of(bent, dimension=2):
    """Both images of the scene, the fixed one with another contrast if it is bent."""
    image_A, image_B, of_A, of_B, matrix = pair(dimension)
    image_A, image_B = prepare(image_A), prepare(image_B)
    if bent:
        image_B = (1 - image_B).clamp(0, 1) ** 2
    both = PreparedImage.of(image_A, of_A), PreparedImage.of(image_B, of_B)
    return ImagePair(*both), matrix


def likeness_of(images, name="lncc"):
    return Likeness(images, find_similarity(name), 0)


@pytest.mark.parametrize("name", ["lncc", "mi"])
@pytest.mark.parametrize("bent", [False, True])
def test_the_true_map_is_judged_best(bent, name):
    images, matrix = images_of(bent)
    likeness = likeness_of(images, name)
    away = matrix.clone()
    away[0, 2] += 8.0
    scores = [likeness.judge(likeness.start(m)) for m in (matrix, away, identity(2))]
    assert scores[0] > 1.1 * max(scores[1:])
    assert scores[0] == likeness.judge(likeness.start(matrix))


def test_the_similarity_follows_the_contrasts():
    for bent in (False, True):
        images, matrix = images_of(bent)
        source = torch.Generator().manual_seed(0)
        found = find_affine(images, find_similarity(None), source, OPTIONS)
        name, start = find_contrast(likeness_of(images), found, OPTIONS)
        assert (name in OTHERS) == bent
        assert (start is found) or bent
        assert error(start, matrix, images.geometry_B) < 3.0


def test_nothing_in_common_is_left_to_correlation(generator):
    noise = [torch.rand(1, 1, 48, 48, generator=generator) for _ in "AB"]
    images = ImagePair(*(PreparedImage.of(image, PLACE) for image in noise))
    name, _ = find_contrast(likeness_of(images), identity(2), OPTIONS, search=False)
    assert name == "lncc"


def test_what_is_worse_than_the_headers_is_left_out():
    image = blobs((48, 48))
    images = ImagePair(*(PreparedImage.of(image, PLACE) for _ in "AB"))
    likeness, away = likeness_of(images), identity(2)
    away[0, 2] = 30.0
    kept, sentences = headers_or(away, likeness)
    assert torch.equal(kept, identity(2))
    assert "left out" in sentences[0]
    near = identity(2)
    near[0, 2] = 0.01
    assert headers_or(near, likeness) == (near, [])


def test_a_deformation_that_is_worse_goes_back_to_the_simplest_that_is_as_good():
    images, matrix = images_of(bent=False)
    likeness = likeness_of(images)
    grown = matrix.clone()
    grown[:2, :2] *= 1.01

    def far(x):
        return x + 0.15 * torch.sin(9 * x.flip(1))

    kept, sentence = simpler((far, far), grown, likeness)
    lengths = torch.linalg.svdvals(kept[:2, :2])
    torch.testing.assert_close(lengths, torch.ones(2, dtype=torch.float64))
    assert error(kept, matrix, images.geometry_B) < 1.5
    assert "rigid map" in sentence
    assert simpler(likeness.start(matrix), grown, likeness) is None


class Shift(torch.nn.Module):
    """A network whose maps are a shift, there and back."""

    def __init__(self):
        super().__init__()
        self.by = torch.nn.Parameter(torch.zeros(()))

    def forward(self, *_):
        by = self.by.detach().clone()
        return (lambda x: x + by), (lambda x: x - by)


def test_a_fit_goes_back_to_the_level_that_was_good():
    image = blobs((48, 48))
    images = ImagePair(*(PreparedImage.of(image, PLACE) for _ in "AB"))
    network = Shift()
    watch = Watch(network, likeness_of(images))
    assert watch.back() is None
    with torch.no_grad():
        network.by.fill_(0.3)
    watch.look()
    assert watch.back() == 0
    assert float(network.by.detach()) == 0
    watch, reached = Watch(network, likeness_of(images)), []
    watch.scores[0] = 0.0
    for by in (0.2, 0.01, 0.15):
        with torch.no_grad():
            network.by.fill_(by)
        watch.look()
        reached.append(watch.back())
    assert reached == [None, None, 2]
    assert float(network.by.detach()) == pytest.approx(0.01)
    assert len(watch.scores) == 3


@pytest.mark.parametrize("transform", ["rigid", "affine"])
def test_a_registration_without_a_deformation(transform):
    image_A, image_B, of_A, of_B, matrix = pair(2)
    fit = fit_tensors(image_A, image_B, of_A, of_B, transform=transform)
    assert fit.losses == []
    assert fit.similarity == "lncc"
    x = identity_map((9, 9))
    for field in (fit.field_AB, fit.field_BA):
        torch.testing.assert_close(NeuralTransform(field, fit.code)(x), x)
    physical = (
        torch.linalg.inv(of_A.physical_to_unit())
        @ fit.matrix
        @ torch.linalg.inv(of_B.unit_to_physical())
    )
    torch.testing.assert_close(fit.matrix, in_unit_boxes(physical, of_B, of_A))
    assert error(physical, matrix, of_B) < 1.5
    lengths = torch.linalg.svdvals(physical[:2, :2])
    still = torch.allclose(lengths, torch.ones_like(lengths), atol=1e-9)
    assert still == (transform == "rigid")


def test_other_transforms_are_refused():
    image = blobs((48, 48))
    images = (image, image, PLACE, PLACE)
    with pytest.raises(ValueError, match=r"'deformable'.*got 'elastic'"):
        fit_tensors(*images, transform="elastic")
    with pytest.raises(ValueError, match="leave affine=True"):
        fit_tensors(*images, transform="rigid", affine=False)


def test_a_fit_that_runs_away_is_left_out():
    image = blobs((48, 48))
    wild = replace(SMALL, steps=10, field_rate=3.0, code_rate=3.0, lmbda=0.0)
    moved = blobs((48, 48), 0.01)
    fit = fit_tensors(image, moved, PLACE, PLACE, field=wild, affine=False)
    assert any("it was left out" in sentence for sentence in fit.warnings)
    x = identity_map((9, 9))
    torch.testing.assert_close(NeuralTransform(fit.field_AB, fit.code)(x), x)
    assert fit.evidence["folded"] == 0
    assert len(fit.losses) >= wild.steps
