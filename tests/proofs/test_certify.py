"""Proofs of det J > 0: bounds that hold, no false proof, folds found, clear answers."""

import copy
import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import icon_nephi
from icon_nephi import (
    LatentCode,
    LatentMLP,
    ModulatedSiren,
    certify,
)
from icon_nephi.fields.expansions import monomials
from icon_nephi.fit.settings import Fit
from icon_nephi.io import itk_images
from icon_nephi.io.image_input import voxel_geometry
from icon_nephi.maps.transforms import NeuralTransform, value_and_jacobian
from icon_nephi.maps.two_way import DIRECTIONS
from icon_nephi.proofs import determinants as determinant_bounds
from icon_nephi.proofs import search as proofs
from icon_nephi.proofs.bounds import expand_displacement, knots
from icon_nephi.proofs.determinants import bound_determinant
from icon_nephi.proofs.regions import Region
from icon_nephi.proofs.search import Search
from icon_nephi.registration.result import Registration
from icon_nephi.space.frames import EDGE, points_as_grid
from tests.small_fits import geometry, small_fit, unit_matrix

FIELDS = {
    "mlp": lambda d, size, g: LatentMLP(d, size, width=8, omega=2.0, generator=g),
    "mlp2": lambda d, size, g: LatentMLP(
        d, size, width=8, hidden_layers=2, generator=g
    ),
    "siren": lambda d, size, g: ModulatedSiren(
        d, size, width=8, frequencies=3, omega=5.0, generator=g
    ),
}


def random_map(kind, dimension, seed, strength=0.05, order="quadratic"):
    """A field with weights, and a code, float64."""
    g = torch.Generator().manual_seed(seed)
    grids = [
        torch.randn(1, 2, *shape[:dimension], generator=g)
        for shape in ((3, 4, 5), (5, 4, 3))
    ]
    code = LatentCode(torch.randn(1, 1, generator=g), tuple(grids), order)
    field = FIELDS[kind](dimension, code.size, g).requires_grad_(False)
    field.last.weight.normal_(generator=g).mul_(strength)
    return field.double(), doubled(code)


def doubled(code):
    grids = tuple(grid.double() for grid in code.local_codes)
    return LatentCode(code.global_code.double(), grids, code.interpolation)


def jacobians(field, code, points):
    """``[N, d, d]`` of the map itself, at points that may lie outside the unit box."""
    with torch.no_grad():
        phi = NeuralTransform(field, code)
        found = value_and_jacobian(phi, points_as_grid(points[None]))[1]
    return found[0].flatten(2).permute(2, 0, 1)


def random_boxes(code, dimension, count, generator, outside=False):
    """Boxes between knots, of many sizes; some beyond a border."""
    low, high = [], []
    for axis in range(dimension):
        edges = torch.cat(
            [torch.tensor([0.0]), knots(code, axis), torch.tensor([1.0])]
        ).double()
        if outside:
            edges = torch.cat([torch.tensor([-0.4]), edges, torch.tensor([1.3])])
        cell = torch.randint(len(edges) - 1, (count,), generator=generator)
        ends = torch.rand(count, 2, generator=generator).double().sort(1)[0]
        ends[: count // 3] = torch.tensor([0.0, 1.0]).double()
        ends[-count // 3 :, 1] = ends[-count // 3 :, 0] + 1e-3
        side = edges[cell + 1] - edges[cell]
        low.append(edges[cell] + ends[:, 0] * side)
        high.append(edges[cell] + ends[:, 1].clamp(max=1) * side)
    return torch.stack(low, 1), torch.stack(high, 1)


def samples(low, high, generator):
    """s in [-1, 1] and points in boxes: corners first, then inside ones."""
    d = low.shape[1]
    ends = [torch.tensor(c).double() for c in itertools.product((-1, 1), repeat=d)]
    inner = [2 * torch.rand(low.shape, generator=generator).double() - 1 for _ in "123"]
    for s in [e.expand_as(low) for e in ends] + inner:
        s = s * (1 - 1e-9)
        yield s, (low + high) / 2 + s * (high - low) / 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", ["quadratic", "linear"])
@pytest.mark.parametrize("kind", FIELDS)
def test_no_slope_strays_further_than_bounded(kind, dimension, order, dtype, generator):
    field, code = random_map(kind, dimension, 1, order=order)
    low, high = random_boxes(code, dimension, 60, generator)
    half = (high - low) / 2
    for degree in (2, 4):
        u = expand_displacement(field, code, (low + high) / 2, half, degree, dtype)
        powers = torch.tensor(monomials(dimension, degree)).double()
        for s, points in samples(low, high, generator):
            true = jacobians(field, code, points) - torch.eye(dimension)
            for axis in range(dimension):
                lower = powers.clone()
                lower[:, axis] = (lower[:, axis] - 1).clamp(min=0)
                terms = (s[None] ** lower[:, None]).prod(-1) * powers[:, axis, None]
                slope = torch.einsum("mn,mnc->nc", terms, u.rows.double())
                strayed = (true[:, :, axis] * half[:, axis, None] - slope).abs()
                assert (strayed <= u.stray[1 + axis] + 1e-14).all()
    tiny = expand_displacement(field, code, (low + high) / 2, half * 1e-3, 4)
    assert tiny.stray[1:].max() < 1e-6  # of a high order, not just large


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", FIELDS)
def test_determinants_stay_above_their_bound(kind, dimension, dtype, generator):
    field, code = random_map(kind, dimension, 2, strength=0.02)
    low, high = random_boxes(code, dimension, 300, generator, outside=True)
    bounds = bound_determinant(field, code, low, high, dtype)
    assert (bounds.least > 0.3).float().mean() > 0.3
    for _, points in samples(low, high, generator):
        # So near the border a Jacobian is that of the inner side, whose box it is in.
        points = torch.where((points < 0) & (points >= -EDGE), -2 * EDGE, points)
        points = torch.where((points > 1) & (points <= 1 + EDGE), 1 + 2 * EDGE, points)
        true = torch.linalg.det(jacobians(field, code, points))
        assert (true >= bounds.least * bounds.centre.clamp(min=0)).all()


def test_the_bound_of_dominant_diagonals_holds_at_every_corner(dimension, generator):
    shape = (2000, dimension, dimension)
    sizes = torch.rand(2000, 1, 1, generator=generator)
    e = (sizes * torch.rand(shape, generator=generator)).double()
    least = determinant_bounds._dominant(e)
    assert (least > 0).any()
    assert (least < 0).any()
    for signs in itertools.product((-1.0, 1.0), repeat=dimension**2):
        sign = torch.tensor(signs).double().reshape(dimension, dimension)
        matrix = torch.eye(dimension).double() + sign * e
        assert (torch.linalg.det(matrix) >= least - 1e-12).all()


@pytest.mark.parametrize("degree", [1, 3])
def test_the_bound_of_determinants_of_polynomials_holds(dimension, degree, generator):
    powers = torch.tensor(monomials(dimension, degree)).double()
    shape = (len(powers), dimension, dimension, 400)
    entries = 2 * torch.rand(shape, generator=generator).double() - 1
    entries *= torch.linspace(0, 0.2, 400).double()
    entries[0] += torch.eye(dimension)[:, :, None]
    stray = (
        0.1
        * torch.rand(shape[1:], generator=generator).double()
        * (torch.arange(400) % 3)
    )
    least = determinant_bounds._lowest(entries, stray, degree)
    assert (least > 0.5).any()
    assert (least < 0).any()
    ends = list(itertools.product((-1.0, 0.0, 1.0), repeat=dimension))
    inner = 2 * torch.rand(40, dimension, generator=generator) - 1
    for place in torch.cat([torch.tensor(ends), inner]).double():
        matrix = ((place**powers).prod(1) * entries.movedim(0, -1)).sum(-1)
        signs = torch.randint(2, stray.shape, generator=generator) * 2 - 1
        matrix += signs * stray
        assert (torch.linalg.det(matrix.permute(2, 0, 1)) >= least).all()
    # Where nothing strays and the degree suffices it is as low as some point, nearly.
    entries[1:] *= 1e-4
    flat = determinant_bounds._lowest(entries, 0 * stray, degree)
    torch.testing.assert_close(
        flat, torch.linalg.det(entries[0].permute(2, 0, 1)), rtol=0, atol=0.01
    )


def lowest_point(field, code, dimension, generator):
    """Where the determinant is about lowest in the unit box, and its value."""
    points = torch.rand(500, dimension, generator=generator).double()
    for reach in (0.03, 0.01, 0.003, 0.001):
        jitter = torch.randn(points.shape, generator=generator).double()
        points = torch.cat([points, (points + reach * jitter).clamp(0, 1)])
        values = torch.linalg.det(jacobians(field, code, points))
        best = values.argsort()[:40]
        lowest = points[best[0]], float(values[best[0]])
        points = points[best].repeat(4, 1)
    return lowest


def in_boxes(point, *several):
    return any(
        bool(((b.low <= point) & (point <= b.high)).all(1).any()) for b in several
    )


def check_no_false_proof(seeds, monkeypatch):
    """Fields around folding: what is found folded is never inside a proven box."""
    monkeypatch.setattr(proofs, "HALVINGS", 5)
    outcomes = []
    for seed in seeds:
        dimension, kind = 2 + (seed % 16 == 0), list(FIELDS)[seed % 3]
        order = "linear" if seed % 5 == 0 else "quadratic"
        g = torch.Generator().manual_seed(seed)
        strength = (0.03, 0.06, 0.12)[seed // 3 % 3] / (1 if kind == "mlp" else 2)
        field, code = random_map(kind, dimension, seed, strength, order)
        search = Search(field, code, Region(torch.eye(dimension + 1).double()))
        search.run(None, lambda part: None)
        point, value = lowest_point(field, code, dimension, g)
        unproven = *search.left, *search.folded
        whole = search.proven + sum(boxes.volume() for boxes in unproven)
        assert whole == pytest.approx(1.0, abs=1e-9)
        if value <= 0:
            assert in_boxes(point, *unproven)
        elif not in_boxes(point, *unproven):
            assert search.smallest <= value
        if len(search.points):
            there = torch.linalg.det(jacobians(field, code, search.points))
            assert (there <= 1e-12).all()
        outcomes.append(value <= 0 if unproven else "proven")
    return outcomes


def test_no_fold_is_ever_proven_away(monkeypatch):
    outcomes = check_no_false_proof(range(48), monkeypatch)
    assert outcomes.count("proven") > 8
    assert outcomes.count(True) > 12


@pytest.mark.slow
def test_no_fold_is_ever_proven_away_in_ten_thousand_fields(monkeypatch):
    outcomes = check_no_false_proof(range(1000, 11000), monkeypatch)
    assert outcomes.count(True) > 2000


def test_a_search_that_is_interrupted_leaves_threads_as_they_were(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(proofs, "BATCH", 1000)
    search = Search(*random_map("mlp", 2, 3), Region(torch.eye(3).double()))

    def interrupt(_):
        raise KeyboardInterrupt

    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            search.run(None, interrupt)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def wave(dimension, lowest, seed=0):
    """A map whose determinant is 1 - (1 - lowest) cos(...) along the first axis: it is
    lowest on one thin sheet, at x_0 = 0.6180."""
    field = LatentMLP(dimension, 0, width=1, omega=4.0)
    code = LatentCode(torch.zeros(1, 0, dtype=torch.float64), ())
    with torch.no_grad():
        layer = field.hidden[0]
        layer.weight.zero_()
        layer.weight[0, 0] = 1.0
        # Half a turn at x_0 = 0.618.
        layer.bias.fill_(np.pi / 4 - (2 * 0.618 - 1))
        field.last.weight.zero_()
        field.last.weight[0, 0] = (1 - lowest) / 8
    return field.double().requires_grad_(False), code


def registered(field, code, size, matrix=None, other=None, *, as_itk=False):
    d = len(size)
    matrix = torch.eye(d + 1, dtype=torch.float64) if matrix is None else matrix
    fit = Fit(matrix, code, field, other or field, [], [])
    place = geometry(size, 3) if as_itk else voxel_geometry(size)
    return Registration(fit, place, place, itk=as_itk)


def test_a_fold_that_every_voxel_misses_is_found(dimension):
    size = (23, 9, 8)[:dimension]
    result = registered(*wave(dimension, -1e-4), size)
    assert result.fold_fraction() == 0
    answer = certify(result, progress=False)
    assert not answer.holds
    assert 0 < answer.refuted < 0.9
    assert answer.counterexamples.shape[1] == dimension
    assert np.abs(answer.counterexamples[:, 0] - 0.618).max() < 0.01
    assert (answer.determinants <= 0).all()
    assert (np.abs(answer.determinants) < 1.1e-4).all()
    assert set(answer.directions) == set(DIRECTIONS)
    assert "refuted" in str(answer)


def test_a_map_that_nearly_folds_is_proven(dimension):
    result = registered(*wave(dimension, 1e-3), (23, 9, 8)[:dimension])
    answer = certify(result, progress=False)
    assert answer.holds
    assert answer.proven == 1.0
    assert 1e-4 < answer.smallest <= 1.001e-3
    assert len(answer.counterexamples) == 0
    assert "every point" in str(answer)


def made(dimension, *, strength, as_itk=True, kind="LatentMLP", matrix=None):
    matrix = unit_matrix(dimension) if matrix is None else matrix
    fit = small_fit(dimension, matrix, kind=kind, strength=strength, seed=4)
    sizes = (12, 16, 14)[:dimension], (17, 11, 13)[:dimension]
    place = geometry if as_itk else (lambda size, seed: voxel_geometry(size))
    return Registration(fit, place(sizes[0], 1), place(sizes[1], 2), itk=as_itk)


@pytest.mark.parametrize("as_itk", [True, False])
@pytest.mark.parametrize("kind", ["LatentMLP", "ModulatedSiren"])
def test_the_smallest_determinant_is_in_the_units_of_the_registration(kind, as_itk):
    result = made(2, strength=0.01, as_itk=as_itk, kind=kind)
    for direction in DIRECTIONS:
        answer = certify(result, direction=direction, progress=False)
        assert answer.holds
        image = result.jacobian_determinant(direction=direction)
        lowest = float(itk_images.array_of(image).min() if as_itk else image.min())
        assert 0.2 * lowest < answer.smallest <= lowest * (1 + 1e-5)


def test_folds_come_back_as_points_of_the_image_they_start_from():
    result = made(2, strength=0.2)
    for direction in DIRECTIONS:
        answer = certify(result, direction=direction, progress=False)
        assert answer.refuted > 0
        mapped = result.two_way.framed(direction)
        found = mapped.determinants(answer.counterexamples)
        assert (found < 1e-5).all()
        np.testing.assert_allclose(found, answer.determinants, rtol=1e-3, atol=1e-4)
        start = result.geometry_B if direction == DIRECTIONS[0] else result.geometry_A
        unit = answer.counterexamples @ start.physical_to_unit().numpy()[:2, :2].T
        unit = unit + start.physical_to_unit().numpy()[:2, 2]
        assert ((unit > -1e-9) & (unit < 1 + 1e-9)).all()


def test_a_reflecting_affine_part_is_no_fold():
    matrix = torch.diag(torch.tensor([-0.8, 0.9, 1.0], dtype=torch.float64))
    matrix[:2, 2] = torch.tensor([0.9, 0.05])
    answer = certify(
        made(2, strength=0.01, as_itk=False, matrix=matrix), progress=False
    )
    assert answer.holds
    assert answer.smallest > 0


def test_a_moving_image_beyond_the_fixed_one_is_covered():
    matrix = torch.diag(torch.tensor([0.5, 0.7, 1.0], dtype=torch.float64))
    matrix[:2, 2] = torch.tensor([0.3, 0.1])
    result = made(2, strength=0.02, as_itk=False, matrix=matrix)
    answer = certify(result, direction=DIRECTIONS[1], progress=False)
    assert answer.holds
    points = np.random.default_rng(0).uniform(0, 1, (20_000, 2))
    assert (
        answer.smallest
        <= result.two_way.framed(DIRECTIONS[1]).determinants(points).min()
    )


@pytest.mark.parametrize("as_itk", [True, False])
def test_a_region_without_the_fold_is_proven(as_itk):
    field, code = wave(2, -0.5)
    result = registered(field, code, (24, 12), as_itk=as_itk)
    assert certify(result, progress=False).refuted > 0
    mask = torch.zeros(1, 1, 24, 12)
    mask[..., :6, 2:9] = 1
    if as_itk:
        mask = itk_images.image_of(mask[0, 0].numpy(), result.geometry_B)
    answer = certify(result, mask, progress=False)
    assert answer.holds
    corners = np.array([[0.0, 0.1], [0.25, 0.9]])
    if as_itk:
        frame = result.geometry_B.unit_to_physical().numpy()
        ends = np.array([[0.1, 0.5], [0.11, 0.52]])
        corners = ends @ frame[:2, :2].T + frame[:2, 2]
    assert certify(result, corners, progress=False).holds
    folded = np.array([[0.55, 0.1], [0.7, 0.9]])
    if not as_itk:
        answer = certify(result, folded, progress=False)
        inside = (answer.counterexamples >= folded[0]) & (
            answer.counterexamples <= folded[1]
        )
        assert inside.all()
        assert answer.refuted > 0.5


def test_a_spent_budget_leaves_the_rest_undecided():
    result = made(3, strength=0.05, as_itk=False)
    answer = certify(result, time_limit=1e-6, progress=False)
    assert not answer.holds
    assert answer.undecided > 0
    total = answer.proven + answer.refuted + answer.undecided
    assert total == pytest.approx(1.0, abs=1e-12)
    assert "undecided" in str(answer)


def test_what_is_proven_stays_proven_when_more_is_asked_for(monkeypatch):
    monkeypatch.setattr(proofs, "SHARE", 2.0)
    monkeypatch.setattr(proofs, "HALVINGS", 2)
    assert certify(made(2, strength=0.01), progress=False).holds


def test_the_registration_is_left_as_it_was():
    result = made(2, strength=0.01)
    before = copy.deepcopy(result.fit.field_AB.state_dict())
    certify(result, progress=False)
    for name, weight in result.fit.field_AB.state_dict().items():
        assert weight.dtype == before[name].dtype
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"direction": "forward"}, ValueError, "fixed_to_moving"),
        ({"time_limit": 0}, ValueError, "time_limit must be positive"),
        ({"region": [[0, 0], [1, 1]], "direction": "both"}, ValueError, "each direc"),
        ({"region": [[0, 0, 0], [1, 1, 1]]}, ValueError, r"two corners \[2, 2\]"),
        ({"region": [[0, 0], [1, 0]]}, ValueError, "box with a volume"),
        ({"region": [[2, 2], [3, 3]]}, ValueError, "outside the image"),
        ({"region": "lung"}, ValueError, "region must be None, a mask"),
        ({"region": torch.ones(1, 1, 3, 3)}, ValueError, "grid"),
        ({"region": torch.zeros(1, 1, 17, 11)}, ValueError, "is empty"),
    ],
)
def test_what_cannot_be_certified_is_refused(arguments, error, words):
    result = made(2, strength=0.01, as_itk=False)
    with pytest.raises(error, match=words):
        certify(result, progress=False, **arguments)


def test_only_registrations_are_certified():
    with pytest.raises(TypeError, match="what register or load returns"):
        certify(lambda x: x)


def test_certify_is_a_function_and_no_room():
    assert importlib.import_module("icon_nephi.proofs.certificate").certify is certify
    assert icon_nephi.certify is certify
    assert not (Path(icon_nephi.__file__).parent / "certify.py").exists()
