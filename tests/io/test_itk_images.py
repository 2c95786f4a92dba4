"""ITK in and out: nothing moves by more than a thousandth of a millimetre."""

import itk
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icon_nephi.io import image_files, itk_images, itk_transforms
from icon_nephi.registration.result import Registration
from icon_nephi.space.frames import Geometry, apply_affine
from tests.small_fits import geometry, rows_in, small_fit, unit_matrix, voxels_in

SIZES = {2: ((23, 30), (18, 26)), 3: ((12, 16, 14), (17, 11, 13))}


def registration(dimension, seed=0, kind="LatentMLP", flipped=False):
    """Fixed and moving on differently sized, oblique, anisotropic grids."""
    size_A, size_B = SIZES[dimension]
    moving = geometry(size_A, seed + 1, flipped)
    fixed = geometry(size_B, seed + 2)
    fit = small_fit(dimension, unit_matrix(dimension), kind=kind, seed=seed)
    return Registration(fit, moving, fixed, itk=True)


def through(transform, points):
    return np.array([tuple(transform.TransformPoint(p)) for p in points.tolist()])


def worst(transform, mapped, points):
    return np.linalg.norm(through(transform, points) - mapped(points), axis=1).max()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3]), st.booleans())
def test_an_image_lies_where_its_geometry_says(seed, dimension, flipped):
    generator = np.random.default_rng(seed)
    size = tuple(generator.integers(2, 6, dimension).tolist())
    place = geometry(size, seed, flipped)
    array = generator.normal(size=size)
    image = itk_images.image_of(array, place)
    assert np.array_equal(itk_images.array_of(image), array)
    again = itk_images.geometry_of(image)
    torch.testing.assert_close(again.unit_to_physical(), place.unit_to_physical())
    index = generator.integers(0, size)
    unit = torch.from_numpy(index / (np.array(size) - 1))[None]
    ours = apply_affine(again.unit_to_physical(), unit)[0].numpy()
    itks = image.TransformIndexToPhysicalPoint([int(i) for i in index[::-1]])
    np.testing.assert_allclose(ours, np.array(tuple(itks)), atol=1e-9)


def test_the_first_voxel_of_a_cropped_image_is_the_origin():
    image = itk_images.image_of(np.zeros((8, 9)), geometry((8, 9)))
    cropped = itk.region_of_interest_image_filter(
        image, region_of_interest=itk.ImageRegion[2]([2, 3], [4, 5])
    )
    shifted = itk.extract_image_filter(
        image, extraction_region=itk.ImageRegion[2]([2, 3], [4, 5])
    )
    first, second = (itk_images.geometry_of(i) for i in (cropped, shifted))
    assert first.size == second.size == (5, 4)
    np.testing.assert_allclose(first.origin, second.origin)


@pytest.mark.parametrize("kind", ["uint8", "int16", "uint16", "float32", "float64"])
def test_every_pixel_type_becomes_float32(kind):
    array = (np.random.default_rng(0).uniform(0, 100, (4, 5, 6))).astype(kind)
    values = itk_images.tensor_of(itk.image_from_array(array))
    assert values.dtype == torch.float32
    np.testing.assert_array_equal(values[0, 0], array.astype(np.float32))


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("kind", ["LatentMLP", "ModulatedSiren"])
def test_the_transform_is_the_map_at_every_voxel_centre(dimension, kind):
    for seed in range(2):
        result = registration(dimension, seed, kind, flipped=bool(seed))
        generator = np.random.default_rng(seed)
        for direction, transform, place in (
            ("fixed_to_moving", result.phi_AB, result.geometry_B),
            ("moving_to_fixed", result.phi_BA, result.geometry_A),
        ):
            points = voxels_in(place, 300, generator)
            moved = result.transform_points(points, direction)
            assert np.abs(moved - points).max() > 1  # there is something to test
            assert (
                np.linalg.norm(through(transform, points) - moved, axis=1).max() < 1e-5
            )


@pytest.mark.parametrize("dimension", [2, 3])
def test_the_transform_is_the_map_between_voxels(dimension):
    result = registration(dimension)
    points = rows_in(result.geometry_B, 500, np.random.default_rng(3))
    assert worst(result.phi_AB, result.transform_points, points) < 1e-3


@pytest.mark.parametrize("dimension", [2, 3])
def test_backward_between_voxels_away_from_the_fixed_border(dimension):
    # Where the fixed image ends the map has a kink, which a smooth field rounds off.
    result = registration(dimension)
    generator = np.random.default_rng(3)
    inner = rows_in(result.geometry_B, 500, generator, 0.25, 0.75)
    points = result.transform_points(inner)

    def back(rows):
        return result.transform_points(rows, "moving_to_fixed")

    assert worst(result.phi_BA, back, points) < 1e-3


def test_just_outside_the_image_the_displacement_of_the_border_goes_on():
    result = registration(3)
    generator = np.random.default_rng(3)
    points = rows_in(result.geometry_B, 2000, generator, -0.04, 1.04)
    assert worst(result.phi_AB, result.transform_points, points) < 0.2


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("ending", ["h5", "hdf5", "tfm"])
def test_a_transform_file_reads_back_equal(tmp_path, dimension, ending):
    transform = registration(dimension).phi_AB
    assert isinstance(transform, itk.CompositeTransform[itk.D, dimension])
    path = tmp_path / f"transform.{ending}"
    itk.transformwrite(transform, str(path))
    again = itk_transforms.read_transform("--transform", path)
    points = rows_in(registration(dimension).geometry_B, 50, np.random.default_rng(0))
    np.testing.assert_allclose(through(again, points), through(transform, points))


def test_huge_images_get_coarser_fields(monkeypatch):
    monkeypatch.setattr(itk_transforms, "FINE_NODES", 1000)
    monkeypatch.setattr(itk_transforms, "MOST_NODES", 1000)
    result = registration(3)
    assert np.prod(nodes_of(result.phi_AB)) < 5000  # with the margin
    points = rows_in(result.geometry_B, 300, np.random.default_rng(3))
    assert worst(result.phi_AB, result.transform_points, points) < 0.1


def nodes_of(transform):
    """Nodes of its field with the margins, tensor order."""
    field = transform.GetNthTransform(1)
    d = field.GetInputSpaceDimension()
    return np.array(list(field.GetFixedParameters())[:d][::-1])


def made_for(place, strength, said=None):
    """The export of a map of one place to itself, and the map as a `Registration`."""
    eye = torch.eye(place.dimension + 1, dtype=torch.float64)
    fit = small_fit(place.dimension, eye, seed=3, strength=strength)
    result = Registration(fit, place, place, itk=True)
    transform = itk_transforms.composite_transform(
        result.map_AB, place, place, fit.matrix, said=said
    )
    return transform, result


def test_a_smooth_map_takes_fewer_nodes_than_the_image_has_voxels():
    place, said = geometry((150, 210), 5), []
    transform, result = made_for(place, 0.001, said)
    assert np.prod(nodes_of(transform)) < np.prod(place.size) / 4
    points = rows_in(place, 500, np.random.default_rng(3))
    assert worst(transform, result.transform_points, points) < 1e-3
    assert not said


def test_the_thick_slices_are_divided():
    place = geometry((7, 30, 30), 5)
    place = Geometry(place.size, (1.0, 1.0, 6.0), place.origin, place.direction)
    transform, result = made_for(place, 0.01)
    thick, *thin = nodes_of(transform) / np.array(place.size)
    assert thick > 2 * max(thin)
    points = rows_in(place, 500, np.random.default_rng(3))
    assert worst(transform, result.transform_points, points) < 1e-3


def test_too_few_nodes_are_told(monkeypatch):
    monkeypatch.setattr(itk_transforms, "FINE_NODES", 3000)
    monkeypatch.setattr(itk_transforms, "MOST_NODES", 3000)
    said = []
    made_for(geometry((20, 18, 16), 5), 0.03, said)
    assert len(said) == 1
    assert "no room for more nodes" in said[0]
    assert " mm off" in said[0]


@pytest.mark.parametrize(
    ("image", "word"),
    [
        (np.zeros((3, 3, 3, 3), np.float32), "4D"),
        (np.zeros((1, 8, 8), np.float32), "2D"),
    ],
)
def test_images_that_cannot_be_registered(image, word):
    with pytest.raises(ValueError, match=word):
        itk_images.check_itk_image("image_A", itk.image_from_array(image))


def test_vectors_and_colours_are_refused():
    vectors = itk.image_from_array(np.zeros((4, 5, 3), np.float32), is_vector=True)
    colours = itk.image_from_array(
        np.zeros((4, 5, 3), np.uint8), ttype=(itk.Image[itk.RGBPixel[itk.UC], 2],)
    )
    for image in (vectors, colours):
        with pytest.raises(ValueError, match="3 numbers per voxel"):
            itk_images.check_itk_image("image_A", image)


def test_only_itk_images_pass():
    with pytest.raises(TypeError, match=r"image_A must be an itk\.Image, got ndarray"):
        itk_images.check_itk_image("image_A", np.zeros((4, 4)))


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "nrrd", "mha"])
def test_truncated_and_foreign_files_are_refused(tmp_path, ending, capfd):
    path = tmp_path / f"image.{ending}"
    noise = np.random.default_rng(0).normal(size=(9, 9, 9)).astype(np.float32)
    itk.imwrite(itk.image_from_array(noise), str(path))
    assert image_files.read_image("--fixed", path).GetImageDimension() == 3
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"--fixed: .*image"):
        image_files.read_image("--fixed", path)
    path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"--fixed: .*image"):
        image_files.read_image("--fixed", path)
    assert capfd.readouterr().err == ""


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--fixed: .* does not exist"):
        image_files.read_image("--fixed", tmp_path / "none.nii")
    with pytest.raises(ValueError, match=r"--fixed: .* is a folder"):
        image_files.read_image("--fixed", tmp_path)
    (tmp_path / "bad.h5").write_bytes(b"no")
    for name in ("none.h5", "bad.h5"):
        with pytest.raises(ValueError, match="--transform"):
            itk_transforms.read_transform("--transform", tmp_path / name)


def test_a_geometry_without_volume_is_refused():
    image = itk.image_from_array(np.zeros((4, 5), np.float32))
    image.SetOrigin([np.nan, 0])
    with pytest.raises(ValueError, match="origin"):
        itk_images.check_itk_image("image_A", image)


def test_the_default_matrix_is_what_the_headers_say():
    moving, fixed = geometry((6, 7)), Geometry.unit((9, 8))
    headers = torch.linalg.inv(moving.unit_to_physical()) @ fixed.unit_to_physical()

    def phi(x):
        rows = x.flatten(2).transpose(1, 2)
        return apply_affine(headers, rows[0]).T.reshape(x.shape)

    transform = itk_transforms.composite_transform(phi, fixed, moving)
    points = rows_in(fixed, 20, np.random.default_rng(0))
    np.testing.assert_allclose(through(transform, points), points, atol=1e-6)
