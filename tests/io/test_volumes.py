"""Images read in parts: chunks, levels, headers, and a registration of such images."""

import gzip
import sys
import threading
from dataclasses import replace
from pathlib import Path

import itk
import numpy as np
import pytest
import torch

import icon_nephi
from icon_nephi import _memory as memory
from icon_nephi.fit.settings import GRID, make_pair
from icon_nephi.io import image_input as inputs
from icon_nephi.io import pair_input as pairs
from icon_nephi.io import volumes
from icon_nephi.io.volumes import Volume, open_volume
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.space.chunks import ChunkCache, ChunkedImage, Level
from icon_nephi.space.frames import Geometry, apply_affine, identity_map
from icon_nephi.space.images import sample_image
from icon_nephi.space.sampling import Patches
from tests.small_fits import geometry

SIZE = (40, 37, 50)


def voxels(size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 60_000, size).astype(np.uint16)


def chunked(array, slots, chunk=16):
    reads = []

    def read(box):
        reads.append(box)
        return array[box]

    limit = slots * chunk**array.ndim * array.itemsize
    cache = ChunkCache(read, array.shape, (chunk,) * array.ndim, array.dtype, limit)
    ends = [n - 1 for n in array.shape]
    image = ChunkedImage(cache, ends, [0.0] * array.ndim, lambda v: v / 60_000)
    return image, reads


def omezarr(path, array, *, levels=2, version="0.5", spacing=2.0, axes="zyx"):
    """An OME-Zarr pyramid of means, in micrometres, first voxel at (10, 20, 30)."""
    import zarr

    group = zarr.open_group(
        str(path), mode="w", zarr_format=3 if version == "0.5" else 2
    )
    datasets, lead = [], [1.0] * (len(axes) - 3)
    values = array.astype(np.float32)
    for k in range(levels):
        shape = (*[1] * len(lead), *values.shape)
        chunks = (*[1] * len(lead), 16, 16, 16)
        stored = group.create_array(
            str(k), shape=shape, chunks=chunks, dtype=array.dtype
        )
        stored[:] = values.reshape(shape).astype(array.dtype)
        step = spacing * 2**k
        origin = [1000.0 * o + (step - spacing) / 2 for o in (30, 20, 10)]
        steps = [
            {"type": "scale", "scale": [*lead, *[step] * 3]},
            {"type": "translation", "translation": [*(0 * o for o in lead), *origin]},
        ]
        datasets.append({"path": str(k), "coordinateTransformations": steps})
        n = [m // 2 for m in values.shape]
        cut = values[: 2 * n[0], : 2 * n[1], : 2 * n[2]]
        values = cut.reshape(n[0], 2, n[1], 2, n[2], 2).mean((1, 3, 5))
    named = [
        {"name": a, "type": "space", "unit": "micrometer"}
        if a in "zyx"
        else {"name": a, "type": "channel"}
        for a in axes
    ]
    scales = [{"version": version, "axes": named, "datasets": datasets}]
    if version == "0.5":
        group.attrs["ome"] = {"version": "0.5", "multiscales": scales}
    else:
        group.attrs["multiscales"] = scales
    return path


# --- chunks -------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 5, 1000])
def test_values_and_gradients_are_those_of_the_whole_image(slots):
    array = voxels()
    image, _ = chunked(array, slots)
    whole = torch.from_numpy(array / 60_000.0)[None, None]
    torch.manual_seed(0)
    x = (1.4 * torch.rand(1, 3, 90, 2, 1, dtype=torch.float64) - 0.2).requires_grad_()
    expected, read = sample_image(whole, x), image.sample(x)
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-6)
    weights = torch.randn_like(expected)
    slopes = [torch.autograd.grad((v * weights).sum(), x)[0] for v in (expected, read)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=0, atol=1e-4)


def test_the_cache_holds_no_more_than_its_limit_and_keeps_what_was_used_last():
    array = voxels((64, 64, 64))
    image, reads = chunked(array, 4)
    assert image.cache.nbytes == 4 * 16**3 * 2
    corner = torch.tensor([0.05, 0.05, 0.05]).reshape(1, 3, 1, 1, 1)
    for far in (0.35, 0.6, 0.85):  # three other chunks; the corner is asked each time
        image.sample(corner)
        image.sample(far * torch.ones(1, 3, 1, 1, 1))
    assert len(reads) == 4
    image.sample(0.35 * torch.ones(1, 3, 1, 1, 1))
    assert len(reads) == 4
    image.sample(torch.tensor([0.05, 0.05, 0.9]).reshape(1, 3, 1, 1, 1))
    image.sample(corner)
    assert len(reads) == 5
    image.sample(0.6 * torch.ones(1, 3, 1, 1, 1))
    assert len(reads) == 6  # it had become the oldest


def test_a_thread_reads_ahead_and_is_ended():
    image, reads = chunked(voxels(), 1000)
    image.cache.ahead([(slice(0, 20), slice(0, 10), slice(0, 10))])
    image.cache._reading.result()
    assert len(reads) == 2
    image.sample(torch.full((1, 3, 1, 1, 1), 0.1))
    assert len(reads) == 2
    image.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


def test_boxes_are_those_of_the_array():
    array = voxels()
    image, _ = chunked(array, 3)
    box = (slice(3, 39), slice(0, 37), slice(20, 41))
    np.testing.assert_array_equal(image.cache.box(box), array[box])


def test_the_loss_on_chunks_is_the_loss_on_tensors():
    array = voxels((32, 32, 32))
    image, _ = chunked(array, 8)
    tensor = torch.from_numpy(array / np.float32(60_000))[None, None]
    generator = torch.Generator().manual_seed(0)
    pair = make_pair(GRID, (31.0,) * 3, generator)
    loss = GradientICONPoints(
        pair,
        PatchNCC(),
        1.0,
        similarity_sampler=Patches(50),
        generator=generator,
    )
    results = []
    for images in ((tensor, tensor), (image, image)):
        generator.manual_seed(1)
        results.append(loss(*images).all_loss)
    torch.testing.assert_close(*results)


# --- opening ------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "axes"), [("0.4", "czyx"), ("0.5", "zyx")])
def test_a_pyramid_has_its_levels_in_millimetres(tmp_path, version, axes):
    array = voxels()
    path = omezarr(tmp_path / "a.zarr", array, version=version, axes=axes)
    volume = open_volume(path)
    fine, coarse = volume.levels
    assert (fine.geometry.size, coarse.geometry.size) == (SIZE, (20, 18, 25))
    assert fine.geometry.spacing == pytest.approx((0.002,) * 3)
    assert fine.geometry.origin == pytest.approx((10, 20, 30))
    assert coarse.geometry.origin == pytest.approx((10.001, 20.001, 30.001))
    box = (slice(5, 30), slice(0, 37), slice(17, 18))
    np.testing.assert_array_equal(fine.read(box), array[box])


def test_a_plain_array_has_voxels_of_a_millimetre(tmp_path):
    import zarr

    array = voxels((20, 21, 22))
    stored = zarr.create_array(str(tmp_path / "a.zarr"), data=array, chunks=(8, 8, 8))
    assert stored.shape == array.shape
    volume = open_volume(tmp_path / "a.zarr")
    assert volume.geometry.spacing == (1.0,) * 3
    box = (slice(0, 20),) * 3
    np.testing.assert_array_equal(volume.levels[0].read(box), array[box])


@pytest.mark.parametrize("kind", [".nii", ".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_files_are_read_as_itk_reads_them(tmp_path, kind, dtype):
    array = (voxels() // 4).astype(dtype)
    image = itk.image_from_array(array)
    place = geometry(SIZE, 3)
    image.SetSpacing(place.spacing)
    image.SetOrigin(place.origin)
    image.SetDirection(itk.matrix_from_array(np.array(place.direction)))
    path = tmp_path / f"image{kind}"
    itk.imwrite(image, str(path))
    volume = open_volume(path)
    frame = volume.geometry.unit_to_physical()
    torch.testing.assert_close(frame, place.unit_to_physical(), rtol=1e-4, atol=1e-3)
    assert volume.levels[0].dtype == dtype
    box = (slice(5, 30), slice(0, 37), slice(17, 40))
    np.testing.assert_array_equal(volume.levels[0].read(box), array[box])


def test_nifti_slopes_are_applied(tmp_path):
    array = (voxels() // 4).astype(np.int16)
    path = tmp_path / "image.nii"
    itk.imwrite(itk.image_from_array(array), str(path))
    data = bytearray(path.read_bytes())
    data[112:120] = np.array([0.5, -1000.0], "<f4").tobytes()
    path.write_bytes(data)
    box = (slice(0, 9),) * 3
    read = open_volume(path).levels[0].read(box)
    np.testing.assert_allclose(read, array[box] * 0.5 - 1000)


def missing(folder):
    return folder / "nothing.nii"


def compressed(folder):
    itk.imwrite(
        itk.image_from_array(voxels()), str(folder / "a.nrrd"), compression=True
    )
    return folder / "a.nrrd"


def gzipped(folder):
    path = folder / "a.nii.gz"
    path.write_bytes(gzip.compress(b"0"))
    return path


def truncated(folder):
    path = folder / "a.mha"
    itk.imwrite(itk.image_from_array(voxels()), str(path))
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def no_multiscales(folder):
    import zarr

    zarr.open_group(str(folder / "a.zarr"), mode="w").create_array(
        "labels", shape=(8, 8, 8), dtype="u1"
    )
    return folder / "a.zarr"


def not_zarr(folder):
    (folder / "a.zarr").mkdir()
    return folder / "a.zarr"


def two_channels(folder):
    import zarr

    zarr.create_array(
        str(folder / "a.zarr"), data=np.zeros((2, 8, 8, 8)), chunks=(1, 8, 8, 8)
    )
    return folder / "a.zarr"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (missing, "does not exist"),
        (compressed, "is compressed"),
        (gzipped, "cannot be read in parts"),
        (truncated, "is truncated"),
        (no_multiscales, "without multiscales.*labels"),
        (not_zarr, "is not a Zarr"),
        (two_channels, "several images in one"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, make, says):
    with pytest.raises(ValueError, match=says):
        open_volume(make(tmp_path))


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 2**32), ("500 MB", 500_000_000), ("2g", 2**31), (1000, 1000)],
)
def test_memory_limits(text, size):
    assert memory.to_bytes(text) == size


def test_memory_that_nobody_tells_is_zero(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda _: False)  # no /proc
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert memory.held_memory() == memory.peak_memory() == 0


@pytest.mark.parametrize("text", ["much", "-1", "0", "1.2.3G", "4 GiBs"])
def test_bad_memory_limits(text):
    with pytest.raises(ValueError, match="memory_limit must be"):
        memory.to_bytes(text)


def test_a_limit_below_what_is_needed_is_refused():
    with pytest.raises(ValueError, match="raise it"):
        memory.plan(2**20, 1000)


# --- levels -------------------------------------------------------------------------


def linear_image(place):
    """``x + 2 y + 3 z`` in millimetres at every voxel."""
    rows = identity_map(place.size).double().flatten(2)[0].T
    points = apply_affine(place.unit_to_physical(), rows)
    return (points @ torch.tensor([1.0, 2.0, 3.0]).double()).reshape(place.size)


def test_made_levels_lie_where_the_image_lies():
    place = geometry((48, 50, 31), 4)
    volume = Volume([Level.of(linear_image(place).float().numpy(), place)])
    before = list(volume.levels)
    level = volume.working(3000)
    assert level.voxels <= 3000
    expected = linear_image(level.geometry).numpy()
    np.testing.assert_allclose(level.array, expected, rtol=1e-4, atol=1e-2)
    assert volume.working(3000) is level
    assert volume.levels == before  # a question changes nothing


def test_a_whole_level_has_the_unit_box_of_the_finest():
    place = geometry((48, 50, 40), 4)
    volume = Volume([Level.of(linear_image(place).float().numpy(), place)])
    values, own = volume.whole(volume.working(20_000))
    torch.testing.assert_close(own.unit_to_physical(), place.unit_to_physical())
    inner = (slice(2, -2),) * 3  # the outermost voxels would have to be extrapolated
    torch.testing.assert_close(
        values[0, 0][inner], linear_image(own)[inner].float(), rtol=1e-4, atol=0.05
    )


def test_thick_slices_are_not_averaged_with_each_other():
    place = Geometry(
        (12, 64, 64), (1.0, 1.0, 5.0), (0.0,) * 3, tuple(map(tuple, np.eye(3).tolist()))
    )
    volume = Volume([Level.of(np.zeros(place.size, np.float32), place)])
    assert volume.working(12 * 32 * 32).geometry.size == (12, 32, 32)


# --- registering --------------------------------------------------------------------

FAST = replace(
    GRID,
    grids=(4, 8),
    channels=(8, 8),
    arguments=(("width", 32),),
    steps=50,
    patches=80,
    regularity_points=40,
)
SHIFT = (3.0, -2.0, 2.0)  # voxels along z, y, x


def moved_pair(size=48):
    """A fixed and a moving image, moving(x + SHIFT) = fixed(x), with a curved part."""
    generator = np.random.default_rng(5)
    centres = generator.uniform(0.15, 0.85, (60, 3)) * size
    widths = generator.uniform(1.5, 5.0, 60)
    heights = generator.uniform(0.3, 1.0, 60)
    axis = np.arange(size, dtype=np.float32)
    images = []
    for shift in (SHIFT, (0, 0, 0)):
        image = np.zeros((size,) * 3, np.float32)
        for centre, width, height in zip(centres, widths, heights, strict=True):
            parts = [
                np.exp(-(((axis - c - s) / width) ** 2) / 2)
                for c, s in zip(centre, shift, strict=True)
            ]
            image += height * np.einsum("i,j,k->ijk", *parts)
        images.append((10_000 * image).clip(0, 60_000).astype(np.uint16))
    return images, centres


@pytest.fixture
def small_levels(monkeypatch):
    """Working levels of 24^3 and chunk caches that cannot hold an image."""
    monkeypatch.setattr(pairs, "WORKING", 24**3)
    monkeypatch.setattr(volumes, "BETWEEN", 24**3)
    monkeypatch.setattr(pairs, "plan", lambda limit, voxels: (voxels, 12 * 16**3 * 2))


def test_a_pair_on_disk_is_registered_to_a_fraction_of_a_voxel(tmp_path, small_levels):
    images, centres = moved_pair()
    paths = [
        omezarr(tmp_path / f"{name}.zarr", image, spacing=1000.0)
        for name, image in zip("AB", images, strict=True)
    ]
    result = icon_nephi.register(
        open_volume(paths[0]), paths[1], field=FAST, affine=False, progress=False
    )
    points = centres[:, ::-1] + [10, 20, 30]  # x first, mm
    moved = result.transform_points(points)
    errors = np.linalg.norm(moved - points - SHIFT[::-1], axis=1)
    assert np.median(errors) < 0.3
    assert result.made_with["peak_memory"] > 2**20
    assert result.geometry_B.size == (48,) * 3
    result.save(tmp_path / "result.nephi")
    again = icon_nephi.load(tmp_path / "result.nephi")
    np.testing.assert_allclose(again.transform_points(points), moved, atol=1e-4)


def test_large_tensors_and_itk_images_take_the_same_way(monkeypatch, small_levels):
    monkeypatch.setattr(pairs, "LARGE", 48**3)
    images, _ = moved_pair()
    tensors = [torch.from_numpy(i.astype(np.float32))[None, None] for i in images]
    mask = torch.ones_like(tensors[0])
    found = []
    for given, masks in (
        (tensors, (mask, None)),
        ([itk.image_from_array(i) for i in images], (None, None)),
    ):
        A, B = pairs.read_pair(*given, *masks, (None, None), "cpu")
        found.append((A, B))
        assert [i.shape for i in A.finer] == [(1, 1, 48, 48, 48)]
        assert A.values.shape == (1, 1, 24, 24, 24)
        assert A.whole.size == (48,) * 3
    assert (found[0][0].placed, found[1][0].placed) == (False, True)
    torch.testing.assert_close(found[0][0].values, found[1][0].values)
    assert bool(found[0][0].mask.all())
    # What the finer level shows is the tensor, with the intensities of the coarse one.
    x = identity_map((48,) * 3)
    fine = found[0][1].finer[0].sample(x[:, :, :4])
    ratio = (fine / tensors[1][:, :, :4])[tensors[1][:, :, :4] > 3000]
    assert float(ratio.std() / ratio.mean()) < 0.05


def test_a_pair_of_two_kinds_is_refused(tmp_path):
    path = omezarr(tmp_path / "a.zarr", voxels((32, 32, 32)))
    with pytest.raises(TypeError, match="image_A is"):
        icon_nephi.register(open_volume(path), torch.rand(1, 1, 32, 32, 32))


def test_small_images_are_read_as_before():
    a, b = torch.rand(2, 1, 1, 12, 12, 12)
    A, B = pairs.read_pair(a, b, None, None, (None, None), None)
    assert A.finer == B.finer == ()
    assert not A.placed
    assert inputs.is_itk(a) is False
