"""A map on a lattice is the map at the lattice's points."""

import numpy as np
import pytest
import torch

from icon_nephi.fields import LatentMLP, ModulatedSiren
from icon_nephi.fields.codes import LatentCode
from icon_nephi.maps.framed import FramedMap, over_grid, slabs
from icon_nephi.maps.lattices import on_lattice
from icon_nephi.maps.transforms import Composition, MatrixTransform, NeuralTransform
from icon_nephi.space.frames import Geometry, points_as_grid, to_rows
from icon_nephi.space.interpolation import axis_matrix, read_grids
from tests.small_fits import geometry, unit_matrix

SIZES = {2: (13, 11), 3: (6, 7, 9)}


def neural(dimension, kind="LatentMLP", order="quadratic", global_size=2, **keywords):
    generator = torch.Generator().manual_seed(3)
    channels = (2, 3)
    grids = tuple(
        torch.randn(1, c, *(n,) * dimension, generator=generator, dtype=torch.float64)
        for c, n in zip(channels, (4, 6), strict=True)
    )
    codes = torch.randn(1, global_size, generator=generator, dtype=torch.float64)
    make = {"LatentMLP": LatentMLP, "ModulatedSiren": ModulatedSiren}[kind]
    field = make(dimension, global_size + 5, generator=generator, width=8, **keywords)
    torch.nn.init.normal_(field.last.weight, std=0.05, generator=generator)
    torch.nn.init.normal_(field.last.bias, std=0.05, generator=generator)
    code = LatentCode(codes, grids, order)
    # 50 points at once: lines are split over several parts.
    return NeuralTransform(field.double(), code, owned=True, chunk_size=50)


def lattice(dimension, low=-0.1, high=1.05):
    return [
        torch.linspace(low + 0.01 * a, high, n, dtype=torch.float64)
        for a, n in enumerate(SIZES[dimension])
    ]


def at_points(phi, axes):
    with torch.no_grad():
        return to_rows(phi(points_as_grid(torch.cartesian_prod(*axes)[None])))[0]


@pytest.mark.parametrize("order", ["linear", "quadratic"])
def test_an_axis_matrix_reads_a_grid(order):
    x = torch.linspace(-0.2, 1.1, 23, dtype=torch.float64)
    values = torch.randn(5, 2, dtype=torch.float64)
    expected = read_grids([values.T[None]], x[None, :, None], order=order)[0, 0]
    torch.testing.assert_close(axis_matrix(x, 5, order) @ values, expected)
    with pytest.raises(ValueError, match="nodes"):
        axis_matrix(x, 1, order)


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize(
    ("kind", "keywords"),
    [
        ("LatentMLP", {}),
        ("LatentMLP", {"hidden_layers": 2, "omega": 3.0, "order": "linear"}),
        ("LatentMLP", {"hidden_layers": 0, "global_size": 0}),
        ("ModulatedSiren", {"frequencies": 4}),
    ],
)
def test_fields_on_a_lattice_are_those_at_its_points(dimension, kind, keywords):
    phi, axes = neural(dimension, kind, **keywords), lattice(dimension)
    expected = at_points(phi, axes)
    assert (expected - torch.cartesian_prod(*axes)).abs().max() > 0.01
    parts = []
    for part in on_lattice(phi, axes):
        assert torch.is_grad_enabled()
        parts.append(part)
    assert len(parts) > 1
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dimension", [2, 3])
def test_so_are_compositions_with_affine_and_other_maps(dimension):
    phi, axes = neural(dimension), lattice(dimension)
    oblique = MatrixTransform(unit_matrix(dimension)[None])
    straight = torch.eye(dimension + 1, dtype=torch.float64)
    straight[:dimension] *= 0.9
    straight[:dimension, dimension] = 0.07
    for both in (
        Composition(oblique, phi),
        Composition(phi, oblique),
        Composition(phi, MatrixTransform(straight[None])),
        Composition(phi, phi),
        lambda x: x + 0.1 * x.square(),
    ):
        found = torch.cat(list(on_lattice(both, axes)))
        torch.testing.assert_close(found, at_points(both, axes), rtol=0, atol=1e-12)


@pytest.mark.parametrize("turned", [False, True])
def test_grids_in_millimetres_are_mapped_as_their_voxels(turned):
    place = geometry((9, 8, 7), 1)
    target = geometry((6, 8, 9), 2).unit_to_physical()
    mapped = FramedMap(neural(3), place.unit_to_physical(), target)
    grid = place.resized((6, 5, 11))
    if turned:
        grid = Geometry(
            grid.size,
            grid.spacing,
            (1.0, 2.0, 3.0),
            tuple(map(tuple, np.eye(3).tolist())),
        )
    frame = grid.unit_to_physical()
    expected = over_grid(lambda p: mapped(p) - p, grid.size, frame, 3)
    found = over_grid(lambda p, q: q - p, grid.size, frame, 3, mapped=mapped)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found).max() > 0.1


def test_slabs_are_the_voxels_in_order(monkeypatch):
    monkeypatch.setattr("icon_nephi.maps.framed.CHUNK", 20)
    place = geometry((5, 6, 7), 1)
    frame = place.unit_to_physical()
    parts = list(slabs(place.size, frame))
    index = np.stack(np.meshgrid(*map(np.arange, place.size), indexing="ij"), -1)
    unit = index.reshape(-1, 3) / (np.array(place.size) - 1)
    expected = unit @ frame[:3, :3].numpy().T + frame[:3, 3].numpy()
    np.testing.assert_allclose(np.concatenate([p for _, p in parts]), expected)
    assert len(parts) > 5
    assert [s.start for s, _ in parts[1:]] == [s.stop for s, _ in parts[:-1]]
    assert parts[-1][0].stop == 5 * 6 * 7
