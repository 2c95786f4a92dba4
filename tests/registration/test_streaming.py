"""Results written block by block are those computed at once, whole or not at all."""

import itk
import numpy as np
import pytest
import torch

from icon_nephi.io import blocks as block_files
from icon_nephi.io.volumes import Volume, open_volume
from icon_nephi.registration import streaming
from icon_nephi.registration.result import Registration
from icon_nephi.registration.streaming import displacement_to, jacobian_to, warp_to
from icon_nephi.space.chunks import ChunkCache, Level
from icon_nephi.space.frames import Geometry
from tests.small_fits import geometry, small_fit, unit_matrix

SIZE_A, SIZE_B = (24, 21, 26), (22, 27, 20)


def straight(size, spacing=(1.0, 1.5, 2.0)):
    return Geometry(
        size, spacing, (5.0, -3.0, 2.0), tuple(map(tuple, np.eye(3).tolist()))
    )


def registration(place_A, place_B):
    matrix = unit_matrix(3)
    fit = small_fit(3, matrix, strength=0.02)
    return Registration(fit, place_A, place_B, itk=True)


def smooth(size, dtype=np.uint16):
    axes = [np.linspace(0, 3, n) for n in size]
    waves = np.einsum("i,j,k->ijk", *(1.2 + np.sin(a) for a in axes))
    return (3000 * waves).astype(dtype)


def as_itk(array, place):
    image = itk.image_from_array(array)
    image.SetSpacing(place.spacing)
    image.SetOrigin(place.origin)
    image.SetDirection(itk.matrix_from_array(np.array(place.direction)))
    return image


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(block_files, "BLOCK", 16)


@pytest.mark.parametrize("inverse", [False, True])
def test_the_warped_volume_is_the_warped_image(tmp_path, inverse):
    places = straight(SIZE_A), straight(SIZE_B, (2.0, 1.0, 1.2))
    result = registration(*places)
    mine = places[inverse]
    array = smooth(mine.size)
    volume = Volume([Level.of(array, mine)])
    path = tmp_path / "warped.zarr"
    error = warp_to(
        result, volume, path, inverse=inverse, tolerance=0.01, progress=False
    )
    assert error <= 0.01
    written = open_volume(path)
    whole = written.levels[0].read(tuple(slice(0, n) for n in written.geometry.size))
    assert whole.dtype == np.uint16
    image = result.warp(as_itk(array, mine), inverse=inverse)
    expected = itk.array_from_image(image)
    steepest = max(np.abs(np.diff(array.astype(float), axis=a)).max() for a in range(3))
    # A hundredth of a voxel along every axis, and rounding.
    assert np.abs(whole - expected).max() <= 3 * 0.01 * steepest + 0.6
    assert written.geometry.size == places[1 - inverse].size
    torch.testing.assert_close(
        written.geometry.unit_to_physical(), places[1 - inverse].unit_to_physical()
    )


def test_a_looser_bound_is_kept_with_fewer_evaluations(tmp_path, monkeypatch):
    result = registration(straight(SIZE_A), straight(SIZE_B))
    volume = Volume([Level.of(smooth(SIZE_A), straight(SIZE_A))])
    counts, asked, on_grid = [], [], streaming.FramedMap.on_grid

    def counted(self, size, frame):
        asked.append(np.prod(size))
        return on_grid(self, size, frame)

    monkeypatch.setattr(streaming.FramedMap, "on_grid", counted)
    for tolerance in (0.3, 1e-4):
        asked.clear()
        path = tmp_path / "a.mha"
        error = warp_to(result, volume, path, tolerance=tolerance, progress=False)
        assert error <= tolerance
        counts.append(sum(asked))
    assert 2 * counts[0] < counts[1]


def test_oblique_grids_go_to_metaimage_files(tmp_path):
    places = geometry(SIZE_A, 1), geometry(SIZE_B, 2)
    result = registration(*places)
    array = smooth(SIZE_A, np.float32)
    path = tmp_path / "warped.mha"
    warp_to(
        result,
        as_itk(array, places[0]),
        path,
        mode="nearest",
        outside=-7.0,
        tolerance=1e-9,
        progress=False,
    )
    read = itk.imread(str(path))
    image = as_itk(array, places[0])
    expected = itk.array_from_image(result.warp(image, "nearest", outside=-7.0))
    # Places on the border between two voxels may go either way.
    assert np.mean(itk.array_from_image(read) == expected) > 0.999
    assert (expected == -7).any()
    np.testing.assert_allclose(itk.spacing(read), places[1].spacing)
    np.testing.assert_allclose(
        itk.array_from_matrix(read.GetDirection()), places[1].direction
    )


@pytest.mark.parametrize("direction", ["fixed_to_moving", "moving_to_fixed"])
def test_displacements_and_determinants(tmp_path, direction):
    result = registration(straight(SIZE_A), straight(SIZE_B))
    path = tmp_path / "field.mha"
    displacement_to(result, path, direction=direction, tolerance=0.01, progress=False)
    expected = itk.array_from_image(result.displacement_field(direction=direction))
    read = itk.array_from_image(itk.imread(str(path)))
    assert np.linalg.norm(read - expected, axis=-1).max() < 0.01
    folder = tmp_path / "field.zarr"
    displacement_to(result, folder, direction=direction, tolerance=0.01, progress=False)
    import zarr

    np.testing.assert_allclose(np.moveaxis(zarr.open(str(folder))["0"][:], 0, -1), read)
    path = tmp_path / "jacobian.mha"
    error = jacobian_to(result, path, direction=direction, progress=False)
    assert error <= 0.01
    expected = itk.array_from_image(result.jacobian_determinant(direction=direction))
    read = itk.array_from_image(itk.imread(str(path)))
    assert np.abs(read - expected).max() < 0.01


def test_a_small_cache_reads_the_same(tmp_path, monkeypatch):
    place = straight(SIZE_A)
    array = smooth(SIZE_A)
    volumes = [
        Volume([Level.of(array, place)]),
        Volume([Level(place, (8,) * 3, array.dtype, lambda box: array[box])]),
    ]
    monkeypatch.setattr(streaming, "plan", lambda limit, voxels: (voxels, 3 * 8**3))
    result, found = registration(place, straight(SIZE_B)), []
    for name, volume in zip("ab", volumes, strict=True):
        path = tmp_path / f"{name}.mha"
        warp_to(result, volume, path, progress=False)
        found.append(itk.array_from_image(itk.imread(str(path))))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("name", ["a.zarr", "a.mha"])
@pytest.mark.parametrize("before", [False, True])
def test_what_is_cut_off_leaves_nothing_and_changes_nothing(
    tmp_path, monkeypatch, name, before
):
    place = straight(SIZE_A)
    result = registration(place, straight(SIZE_B))
    volume = Volume([Level.of(smooth(SIZE_A), place)])
    path = tmp_path / name
    if before:
        warp_to(result, volume, path, progress=False)
        kept = sorted((f, f.stat().st_mtime_ns) for f in tmp_path.rglob("*"))
    read, calls = ChunkCache.box, []

    def cut_off(*arguments):
        calls.append(0)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(ChunkCache, "box", cut_off)
    with pytest.raises(KeyboardInterrupt):
        warp_to(result, volume, path, progress=False)
    left = sorted((f, f.stat().st_mtime_ns) for f in tmp_path.rglob("*"))
    assert [f for f, _ in left] == ([f for f, _ in kept] if before else [])
    if before:
        assert [t for f, t in left if f.is_file()] == [
            t for f, t in kept if f.is_file()
        ]
    monkeypatch.setattr(ChunkCache, "box", read)
    warp_to(result, volume, path, progress=False)
    assert [f.name for f in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "keywords", "says"),
    [
        ("a.nii.gz", {}, "cannot be written in parts"),
        ("none/a.zarr", {}, "make the folder first"),
        ("a.zarr", {"mode": "cubic"}, "mode must be"),
        ("a.zarr", {"reference": geometry(SIZE_B, 2)}, "holds no direction"),
    ],
)
def test_bad_requests_get_one_sentence(tmp_path, name, keywords, says):
    place = straight(SIZE_A)
    volume = Volume([Level.of(smooth(SIZE_A), place)])
    with pytest.raises(ValueError, match=says):
        warp_to(registration(place, place), volume, tmp_path / name, **keywords)
    with pytest.raises(ValueError, match="direction must be"):
        jacobian_to(registration(place, place), tmp_path / "a.mha", direction="up")
