"""SimpleITK and ANTs read the files themselves and find the same places.

ANTs needs another numpy than this project's newest: to run its tests, install antspyx
beside the project in an environment of its own.
"""

from functools import cache

import itk
import numpy as np
import pytest

from icon_nephi.io import itk_images
from icon_nephi.io.image_files import write_image
from icon_nephi.io.itk_transforms import write_transform
from icon_nephi.maps.framed import over_grid
from icon_nephi.registration.result import Registration
from tests.small_fits import geometry, small_fit, unit_matrix, voxels_in

SIZES = {2: ((23, 30), (18, 26)), 3: ((12, 16, 14), (17, 11, 13))}
TRANSFORMS = ["h5", "hdf5", "tfm", "txt"]
FIELDS = ["nii.gz", "mha", "nrrd"]
CASES = [(2, False), (3, False), (3, True)]


@cache
def made(dimension, flipped=False):
    """Fixed and moving on differently sized, oblique, anisotropic grids."""
    size_A, size_B = SIZES[dimension]
    moving, fixed = geometry(size_A, 11, flipped), geometry(size_B, 12)
    return Registration(
        small_fit(dimension, unit_matrix(dimension)), moving, fixed, itk=True
    )


def wave(place):
    """A smooth image: its values change little between voxels."""
    grid = np.stack(np.meshgrid(*map(np.arange, place.size), indexing="ij"))
    values = np.cos(grid / 4.0).prod(0) + grid[0] / 10
    return itk_images.image_of(values.astype(np.float32), place)


def inside(points, place, share=0.02):
    """Which points lie well in an image; on its edge readers differ."""
    d = place.dimension
    matrix = place.physical_to_unit().numpy()
    unit = points @ matrix[:d, :d].T + matrix[:d, d]
    return ((unit > share) & (unit < 1 - share)).all(1)


def ways(result):
    """Direction, ITK transform, where its points are."""
    yield "fixed_to_moving", result.phi_AB, result.geometry_B
    yield "moving_to_fixed", result.phi_BA, result.geometry_A


@pytest.mark.parametrize(("dimension", "flipped"), CASES)
@pytest.mark.parametrize("ending", TRANSFORMS)
def test_simpleitk_reads_the_transform(tmp_path, dimension, flipped, ending):
    sitk = pytest.importorskip("SimpleITK")
    result = made(dimension, flipped)
    for direction, transform, place in ways(result):
        path = tmp_path / f"{direction}.{ending}"
        write_transform(transform, path)
        read = sitk.ReadTransform(str(path))
        points = voxels_in(place, 50, np.random.default_rng(0))
        moved = np.array([read.TransformPoint(p) for p in points.tolist()])
        expected = result.transform_points(points, direction)
        np.testing.assert_allclose(moved, expected, atol=1e-3)
        assert np.abs(expected - points).max() > 1  # there is something to see


@pytest.mark.parametrize(("dimension", "flipped"), CASES)
@pytest.mark.parametrize("ending", FIELDS)
def test_simpleitk_reads_the_displacements(tmp_path, dimension, flipped, ending):
    sitk = pytest.importorskip("SimpleITK")
    result = made(dimension, flipped)
    for direction, _, place in ways(result):
        path = tmp_path / f"{direction}.{ending}"
        write_image(result.displacement_field(direction=direction), path)
        field = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
        read = sitk.DisplacementFieldTransform(field)
        points = voxels_in(place, 100, np.random.default_rng(0))
        points = points[inside(points, place)]
        moved = np.array([read.TransformPoint(p) for p in points.tolist()])
        expected = result.transform_points(points, direction)
        np.testing.assert_allclose(moved, expected, atol=1e-3)
        assert len(points) > 20


@pytest.mark.parametrize(("dimension", "flipped"), CASES)
def test_simpleitk_resamples_as_we_do(tmp_path, dimension, flipped):
    sitk = pytest.importorskip("SimpleITK")
    result = made(dimension, flipped)
    moving = wave(result.geometry_A)
    write_transform(result.phi_AB, tmp_path / "T.h5")
    for name, image in (("m", moving), ("f", wave(result.geometry_B))):
        itk.imwrite(image, str(tmp_path / f"{name}.nrrd"))
    images = [sitk.ReadImage(str(tmp_path / f"{name}.nrrd")) for name in "mf"]
    read = sitk.ReadTransform(str(tmp_path / "T.h5"))
    theirs = sitk.GetArrayFromImage(sitk.Resample(*images, read))
    ours = itk_images.array_of(result.warp(moving))
    agree(ours, theirs, result)


def agree(ours, theirs, result):
    """To a thousandth of the intensities, where the moving image is looked at."""
    place, d = result.geometry_B, result.geometry_B.dimension
    frame = place.unit_to_physical()
    moved = over_grid(result.transform_points, place.size, frame, d, float)
    seen = inside(moved.reshape(-1, d), result.geometry_A)
    assert seen.sum() > 100
    apart = np.abs(ours.ravel() - theirs.ravel())[seen].max()
    assert apart < 1e-3 * np.ptp(ours)


def points_by_ants(ants, points, path):
    """Where ANTs takes points ``[N, d]`` with one file."""
    pandas = pytest.importorskip("pandas")
    d = points.shape[1]
    table = pandas.DataFrame(points, columns=list("xyz")[:d])
    moved = ants.apply_transforms_to_points(d, table, transformlist=[str(path)])
    return moved[list("xyz")[:d]].to_numpy()


@pytest.mark.parametrize(("dimension", "flipped"), CASES)
@pytest.mark.parametrize("ending", ["h5", "hdf5", "tfm", *FIELDS])
def test_ants_moves_points_by_the_file(tmp_path, dimension, flipped, ending):
    ants = pytest.importorskip("ants")
    result = made(dimension, flipped)
    for direction, transform, place in ways(result):
        path = tmp_path / f"{direction}.{ending}"
        if ending in FIELDS:
            write_image(result.displacement_field(direction=direction), path)
        else:
            write_transform(transform, path)
        points = voxels_in(place, 100, np.random.default_rng(0))
        points = points[inside(points, place)]
        moved = points_by_ants(ants, points, path)
        expected = result.transform_points(points, direction)
        np.testing.assert_allclose(moved, expected, atol=1e-3)


@pytest.mark.parametrize(("dimension", "flipped"), CASES)
@pytest.mark.parametrize("ending", ["h5", "nii.gz"])
def test_ants_resamples_as_we_do(tmp_path, dimension, flipped, ending):
    ants = pytest.importorskip("ants")
    result = made(dimension, flipped)
    moving, path = wave(result.geometry_A), tmp_path / f"T.{ending}"
    if ending == "h5":
        write_transform(result.phi_AB, path)
    else:
        write_image(result.displacement_field(), path)
    for name, image in (("m", moving), ("f", wave(result.geometry_B))):
        itk.imwrite(image, str(tmp_path / f"{name}.nrrd"))
    there, here = (ants.image_read(str(tmp_path / f"{name}.nrrd")) for name in "mf")
    theirs = ants.apply_transforms(here, there, [str(path)]).numpy()
    ours = itk_images.array_of(result.warp(moving))
    agree(ours, np.transpose(theirs), result)
