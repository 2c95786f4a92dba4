"""Commands, Python and ITK agree for any two grids: oblique, anisotropic, unlike."""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import itk
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from icon_nephi import cli
from icon_nephi.io import itk_images, itk_transforms
from icon_nephi.maps.framed import over_grid
from icon_nephi.registration.result import Registration
from icon_nephi.space.frames import Geometry
from tests.small_fits import geometry, rows_in, small_fit, unit_matrix

SIZES = {2: (14, 22), 3: (9, 14)}
few = settings(max_examples=4, deadline=None, derandomize=True)
anything = (st.integers(0, 10**6), st.sampled_from([2, 3]), st.booleans())


@contextlib.contextmanager
def in_empty_folder():
    with tempfile.TemporaryDirectory() as name:
        before = Path.cwd()
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


def made(seed, dimension, flipped, strength=0.01):
    """A registration between two random places, and a smooth moving image."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(*SIZES[dimension], (2, dimension)).tolist()
    places = geometry(sizes[0], seed + 1, flipped), geometry(sizes[1], seed + 2)
    fit = small_fit(dimension, unit_matrix(dimension), seed=seed, strength=strength)
    result = Registration(fit, *places, itk=True)
    grid = np.stack(np.meshgrid(*map(np.arange, sizes[0]), indexing="ij"))
    values = np.cos(grid / 4.0).prod(0) + grid[0] / 10
    return result, itk_images.image_of(values.astype(np.float32), places[0])


def through(transform, points):
    return np.array([tuple(transform.TransformPoint(p)) for p in points.tolist()])


def box(place, points):
    d = place.dimension
    matrix = place.physical_to_unit().numpy()
    return points @ matrix[:d, :d].T + matrix[:d, d]


def within(place, points, margin=0.0):
    unit = box(place, points)
    return ((unit > margin) & (unit < 1 - margin)).all(1)


def centres(place):
    frame, d = place.unit_to_physical(), place.dimension
    return over_grid(lambda p: p, place.size, frame, d, float).reshape(-1, d)


@few
@given(*anything)
def test_three_ways_to_warp_an_image(seed, dimension, flipped):
    result, moving = made(seed, dimension, flipped)
    zeros = np.zeros(result.geometry_B.size, np.uint8)
    fixed = itk_images.image_of(zeros, result.geometry_B)
    with in_empty_folder() as path, contextlib.redirect_stdout(io.StringIO()):
        itk.imwrite(moving, "m.nrrd")
        itk.imwrite(fixed, "f.nrrd")
        result.save("p.nephi")
        itk.transformwrite(result.phi_AB, "T.h5")
        common = ["--image", "m.nrrd", "--reference", "f.nrrd", "--quiet"]
        for name in ("p.nephi", "T.h5"):
            out = f"{name[0]}.nrrd"
            cli.warp(["--transform", name, *common, "--out", out])
        commands = [itk.imread(str(path / f"{n}.nrrd")) for n in "pT"]
        transform = itk_transforms.read_transform("T", path / "T.h5")
    theirs = itk.resample_image_filter(
        moving, transform=transform, use_reference_image=True, reference_image=fixed
    )
    ours = itk_images.array_of(result.warp(moving)).ravel()
    moved = result.transform_points(centres(result.geometry_B))
    seen = within(result.geometry_A, moved, 1e-3)
    assert seen.mean() > 0.1
    for other in (*commands, theirs):
        apart = np.abs(itk_images.array_of(other).ravel() - ours)[seen].max()
        assert apart < 1e-3 * np.ptp(ours)


@few
@given(*anything)
def test_three_ways_to_move_points(seed, dimension, flipped):
    result, _ = made(seed, dimension, flipped)
    points = rows_in(result.geometry_B, 100, np.random.default_rng(seed))
    ours = result.transform_points(points)
    names = "xyz"[:dimension]
    with in_empty_folder() as path:
        result.save("p.nephi")
        itk.transformwrite(result.phi_AB, "T.tfm")
        header = ",".join(names)
        np.savetxt("in.csv", points, delimiter=",", header=header, comments="")
        for name in ("p.nephi", "T.tfm"):
            flags = ["--transform", name, "--points", "in.csv", "--quiet"]
            cli.warp([*flags, "--out", f"{name[0]}.csv"])
        commands = [
            np.loadtxt(f"{n}.csv", delimiter=",", skiprows=1, ndmin=2) for n in "pT"
        ]
        transform = itk_transforms.read_transform("T", path / "T.tfm")
    for other in (*commands, through(transform, points)):
        np.testing.assert_allclose(other, ours, atol=1e-3)
    assert np.abs(ours - points).max() > 0.5


def differences(mapped, points, h):
    """Determinants of central differences."""
    columns = [
        (mapped(points + step) - mapped(points - step)) / (2 * h)
        for step in h * np.eye(points.shape[1])
    ]
    return np.linalg.det(np.stack(columns, -1))


@few
@given(*anything)
def test_determinants_are_those_of_central_differences(seed, dimension, flipped):
    result, _ = made(seed, dimension, flipped)
    with in_empty_folder():
        result.save("p.nephi")
        itk.transformwrite(result.phi_AB, "T.h5")
        zeros = np.zeros(result.geometry_B.size, np.uint8)
        itk.imwrite(itk_images.image_of(zeros, result.geometry_B), "f.nrrd")
        common = ["--reference", "f.nrrd", "--quiet", "--out"]
        for name in ("p.nephi", "T.h5"):
            cli.jacobian(["--transform", name, *common, f"{name[0]}.nrrd"])
        exact, exported = (
            itk_images.array_of(itk.imread(f"{n}.nrrd")).ravel() for n in "pT"
        )
        transform = itk_transforms.read_transform("T", Path("T.h5"))
    ours = itk_images.array_of(result.jacobian_determinant()).ravel()
    points = centres(result.geometry_B)
    kept = within(result.geometry_B, points, 1e-3)  # the map has a kink at the border
    np.testing.assert_allclose(exact[kept], ours[kept], atol=1e-6)
    h = 0.02 * min(result.geometry_B.spacing)
    own = differences(result.transform_points, points[kept], h)
    np.testing.assert_allclose(exact[kept], own, atol=1e-3)
    theirs = differences(lambda p: through(transform, p), points[kept], h)
    np.testing.assert_allclose(exported[kept], theirs, atol=1e-3)
    # So rough a map for so few voxels takes more nodes than it may have.
    np.testing.assert_allclose(exported[kept], exact[kept], atol=5e-3)


@few
@given(*anything)
def test_the_export_has_the_determinants_of_the_map(seed, dimension, flipped):
    result, _ = made(seed, dimension, flipped, strength=0.003)
    ways = {"fixed_to_moving": result.phi_AB, "moving_to_fixed": result.phi_BA}
    places = {
        "fixed_to_moving": result.geometry_B,
        "moving_to_fixed": result.geometry_A,
    }
    for way, transform in ways.items():
        place = places[way]
        # Between the voxels, and far from where the fixed image ends, which is a kink.
        low = 0.02 if way == "fixed_to_moving" else 0.3
        corner = rows_in(place, 1, np.random.default_rng(0), low, low)[0]
        grid = Geometry(
            size=(5,) * dimension,
            spacing=tuple((1 - 2 * low) / 4 * e for e in place.extent[::-1]),
            origin=tuple(corner.tolist()),
            direction=place.direction,
        )
        reference = itk_images.image_of(np.zeros(grid.size, np.uint8), grid)
        exact = itk_images.array_of(result.jacobian_determinant(reference, way)).ravel()
        points, h = centres(grid), 0.01 * min(place.spacing)
        theirs = differences(lambda p, t=transform: through(t, p), points, h)
        assert np.ptp(exact) > 3e-3  # there is something to miss
        # 0.001 of a determinant of one; here they are up to 4, by the unlike grids.
        np.testing.assert_allclose(theirs, exact, rtol=5e-4, atol=5e-4)
