"""Registering one pair from scratch, on small 2D shapes."""

import time
from dataclasses import replace

import pytest
import torch

from icon_nephi.fields import make_field
from icon_nephi.fit import stages
from icon_nephi.fit.content import ImagePair
from icon_nephi.fit.settings import (
    CT,
    DETAIL,
    FLAT,
    GRID,
    LATTICES,
    SIREN,
    SLIDES,
    find_settings,
)
from icon_nephi.losses.features import FeatureDifference
from icon_nephi.losses.regularity import guarded_term
from icon_nephi.maps.transforms import (
    Composition,
    MatrixTransform,
    NeuralTransform,
    value_and_jacobian,
)
from icon_nephi.phantoms import triangles_and_circles
from icon_nephi.report.metrics import dice
from icon_nephi.space.chunks import ChunkedImage
from icon_nephi.space.frames import identity_map, points_as_grid
from icon_nephi.space.images import sample_image
from icon_nephi.space.intensities import PreparedImage
from icon_nephi.space.sampling import Patches
from tests.fit.small_runs import PLACE, SMALL
from tests.small_fits import fit_tensors

QUICK = replace(
    SIREN,
    arguments=(("width", 16), ("frequencies", 8), ("omega", 5.0)),
    grids=(5, 9),
    channels=(4, 4),
    steps=120,
    patches=150,
    regularity_points=80,
)


@pytest.fixture(scope="module")
def shapes():
    drawn = triangles_and_circles(2, size=48, seed=3)
    return (drawn.images + 1) / 2, drawn.labels


def maps(fit):
    psi = [NeuralTransform(f, fit.code) for f in (fit.field_AB, fit.field_BA)]
    matrix = fit.matrix.float()[None]
    inverse = torch.linalg.inv(fit.matrix).float()[None]
    return (
        Composition(MatrixTransform(matrix), psi[0]),
        Composition(psi[1], MatrixTransform(inverse)),
    )


def test_shapes_are_matched_without_folds(shapes):
    images, labels = shapes
    fit = fit_tensors(images[:1], images[1:], PLACE, PLACE, field=QUICK, affine=False)
    axes = torch.linspace(0, 1, 48)
    grid = torch.stack(torch.meshgrid(axes, axes, indexing="ij"))[None]
    phi_AB, _ = maps(fit)
    with torch.no_grad():
        moved, jacobian = phi_AB.value_and_jacobian(grid)
    warped = sample_image(labels[:1].float(), moved, mode="nearest").long()
    before = dice(labels[:1].long(), labels[1:].long())[1]
    after = dice(warped, labels[1:].long())[1]
    assert after > max(0.9, before)
    determinant = torch.linalg.det(jacobian.flatten(3).permute(0, 3, 1, 2))
    assert bool((determinant > 0).all())


def test_the_same_seed_gives_the_same_bits(shapes):
    images, _ = shapes
    short = replace(QUICK, steps=10)

    def run(seed):
        return fit_tensors(
            images[:1],
            images[1:],
            PLACE,
            PLACE,
            field=short,
            seed=seed,
            affine=False,
        )

    one, two, other = run(0), run(0), run(1)
    assert one.losses == two.losses
    for a, b in zip(one.code.local_codes, two.code.local_codes, strict=True):
        assert torch.equal(a, b)
    assert one.losses != other.losses


def fit_with_noise(shapes, sigma, generator, **settings):
    moving, fixed = shapes[0].split(1)
    fixed = fixed + sigma * torch.randn(fixed.shape, generator=generator)
    quick = replace(SMALL, **settings)
    fit_tensors(moving, fixed, PLACE, PLACE, field=quick, affine=False)


@pytest.mark.parametrize(("sigma", "blocks"), [(0.0, (150, 3)), (0.1, (75, 5))])
def test_noisy_images_are_compared_in_larger_blocks(
    shapes, sigma, blocks, generator, monkeypatch
):
    taken = set()

    def patches(count, size, *others, **options):
        taken.add((count, size))
        return Patches(count, size, *others, **options)

    monkeypatch.setattr(stages, "Patches", patches)
    fit_with_noise(shapes, sigma, generator, steps=4)
    assert taken == {blocks}


@pytest.mark.parametrize(("sigma", "share"), [(0.0, 0.5), (0.03, 0.0)])
def test_features_of_clean_images_keep_half_of_their_weight(
    shapes, sigma, share, generator, monkeypatch
):
    made = []

    def difference(*arguments):
        made.append(FeatureDifference(*arguments))
        return made[-1]

    monkeypatch.setattr(stages, "FeatureDifference", difference)
    fit_with_noise(shapes, sigma, generator, steps=10, features=10.0)
    assert made[-1].weight == pytest.approx(10 * share, abs=1.1)


def test_an_offset_between_the_frames_is_found(shapes):
    """The same image under another origin: the affine start brings it back."""
    images, _ = shapes
    far = replace(PLACE, origin=(500.0, -300.0))
    short = replace(QUICK, steps=10)
    fit = fit_tensors(images[:1], images[:1], far, PLACE, field=short)
    x = points_as_grid(torch.rand(1, 200, 2))
    phi_AB, _ = maps(fit)
    assert float((phi_AB(x) - x).abs().max()) < 0.03


def test_the_guard_is_zero_for_inverse_maps_and_not_for_folds():
    x = points_as_grid(torch.rand(1, 50, 2, dtype=torch.float64))
    extent = torch.tensor([2.0, 1.0], dtype=torch.float64)
    matrix = torch.eye(3, dtype=torch.float64)[None]
    matrix[0, 0, 0], matrix[0, 0, 2] = 1.2, 0.1
    phi, back = MatrixTransform(matrix), MatrixTransform(torch.linalg.inv(matrix))
    moved, jacobian = phi.value_and_jacobian(x)
    assert float(guarded_term(back, x, moved, jacobian, extent)) < 1e-12

    def fold(points):
        first = points[:, :1] - 0.5 * torch.sin(4 * points[:, :1])
        return torch.cat([first, points[:, 1:]], 1)

    moved, jacobian = value_and_jacobian(fold, x)
    identity = MatrixTransform(torch.eye(3, dtype=torch.float64)[None])
    term = guarded_term(identity, x, moved, jacobian, extent)
    assert float(term.detach()) > 0.1


def test_presets_are_found_by_name():
    assert find_settings("grid", (90, 90, 90)) is GRID
    assert find_settings("grid", (40, 36, 40)).grids == (8, 15)
    assert find_settings("grid", (64, 64)).grids == (8, 11)
    assert find_settings("grid", (9, 9, 9)).grids == (4,)
    assert find_settings(QUICK, (9, 9)) is QUICK
    assert find_settings("auto", (160, 192, 224)) is DETAIL
    assert find_settings("auto", (115, 157, 129)) is SIREN
    assert find_settings("auto", (115, 157, 129), "ct") is CT
    assert find_settings("auto", (512, 512), "ct").lattices == FLAT.lattices
    assert find_settings("auto", (513, 400)) is SLIDES
    assert find_settings("auto", (100, 128, 50)).lattices == LATTICES.lattices
    assert find_settings("auto", (100, 128, 40)) is SIREN  # a slab
    with pytest.raises(ValueError, match="'grid', 'lattices', 'siren'"):
        find_settings("sirren", (9, 9, 9))
    with pytest.raises(ValueError, match="LatentMLP"):
        make_field("MLP", {})


def hidden():
    """A disk that stays, and a smaller one in it, moved, that only labels show."""
    axes = torch.linspace(0, 1, 48)
    first, second = torch.meshgrid(axes, axes, indexing="ij")

    def disk(row, column, radius):
        far = ((first - row).square() + (second - column).square()).sqrt()
        return (far < radius)[None, None]

    body = disk(0.5, 0.5, 0.4).float()
    return body, (disk(0.45, 0.42, 0.12).long(), disk(0.53, 0.57, 0.15).long())


def test_label_maps_are_laid_on_each_other_where_images_show_nothing():
    image, (label_A, label_B) = hidden()
    values = []
    for labels in ({}, {"of_A": {"labels": label_A}, "of_B": {"labels": label_B}}):
        fit = fit_tensors(
            image,
            image,
            PLACE,
            PLACE,
            field=SMALL,
            affine=False,
            **labels,
        )
        with torch.no_grad():
            moved = maps(fit)[0](identity_map((48, 48)))
        warped = sample_image(label_A.float(), moved, mode="nearest").long()
        values.append(dice(warped, label_B)[1])
    assert values[0] < 0.5
    assert values[1] > 0.8


def test_label_maps_come_in_pairs_with_a_common_label():
    image, (label_A, label_B) = hidden()
    images = (image, image, PLACE, PLACE)
    with pytest.raises(ValueError, match="segmentation_B is missing"):
        fit_tensors(*images, of_A={"labels": label_A})
    with pytest.raises(ValueError, match="no label above 0 in common"):
        fit_tensors(
            *images,
            of_A={"labels": label_A},
            of_B={"labels": 2 * label_B},
            field=QUICK,
            affine=False,
        )


def test_a_squeezed_density_is_found_where_mass_is_kept():
    """A blob that a squeeze makes denser: correlation alone moves it elsewhere."""
    x = identity_map((48, 48))
    first = x[:, :1]

    def density(at):
        far = (at - torch.tensor([0.5, 0.5]).view(1, 2, 1, 1)).square().sum(1, True)
        return 0.2 + 0.5 * torch.exp(-far / 0.08)

    there = torch.cat([first + 0.08 * torch.sin(2 * torch.pi * first), x[:, 1:]], 1)
    fixed = density(there) * (1 + 0.16 * torch.pi * torch.cos(2 * torch.pi * first))
    errors = []
    for kept in (False, True):
        fit = fit_tensors(
            density(x),
            fixed,
            PLACE,
            PLACE,
            field=SMALL,
            similarity="ncc",
            of_A={"modality": "ct"},
            of_B={"modality": "ct"},
            mass_preserving=kept,
            affine=False,
        )
        with torch.no_grad():
            errors.append(float((maps(fit)[0](x) - there).norm(dim=1).mean()))
    assert errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize(
    ("kinds", "similarity"), [(("mri", "mri"), None), (("ct", "ct"), "mi")]
)
def test_mass_is_that_of_densities(kinds, similarity):
    image, _ = hidden()
    images = (image, image, PLACE, PLACE)
    known = {f"of_{k}": {"modality": m} for k, m in zip("AB", kinds, strict=True)}
    with pytest.raises(ValueError, match="both images must be of modality ct"):
        fit_tensors(*images, **known, mass_preserving=True, similarity=similarity)


def test_volumes_are_in_millimetres():
    """Whatever the boxes are: half as large spacings, a quarter of the volume."""
    near = replace(PLACE, spacing=(1.0, 1.0))
    image, _ = hidden()
    fixed = PreparedImage.of(image, PLACE)
    assert ImagePair(PreparedImage.of(image, near), fixed).volumes == 0.25
    mirror = replace(PLACE, direction=((-1.0, 0.0), (0.0, 1.0)))
    assert ImagePair(PreparedImage.of(image, mirror), fixed).volumes == -1


def test_all_of_a_fit_shares_one_limit_of_time(shapes, monkeypatch):
    """Trial fits, the fit and its finer levels; each once had a limit of its own."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def a_second(first, second):
        clock[0] += 1
        return (first - second).square().mean()

    finer = [{"finer": [ChunkedImage.of(image[None])]} for image in shapes[0]]
    images = (*shapes[0].split(1), PLACE, PLACE)
    known = {"of_A": finer[0], "of_B": finer[1]}
    # A step of each fit is past the limit, and one of the search for a start.
    for affine, most in ((False, 40), (True, 50)):
        begin = clock[0]
        choices = {"field": SMALL, "similarity": a_second, "affine": affine}
        fit_tensors(*images, **known, **choices, time_limit=30)
        assert clock[0] - begin < most
