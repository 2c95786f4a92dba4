"""Image files as people have them: read as their headers say, whole, or refused."""

import gzip
import shutil
import struct

import itk
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from icon_nephi.io.image_files import check_holds, read_image
from icon_nephi.io.itk_images import array_of, geometry_of, image_of
from icon_nephi.io.nifti import find_nifti
from icon_nephi.space.frames import Geometry

AFFINE = np.array([[-2.0, 0, 0, 30], [0, -1.5, 0, 20], [0, 0, 3, -10], [0, 0, 0, 1]])
VALUES = np.random.default_rng(0).integers(1, 90, (7, 6, 5))  # x, y, z


def read(path, **options):
    return array_of(read_image("--fixed", path, **options))


def save(path, values=VALUES, affine=AFFINE, kind="int16", image=nib.Nifti1Image):
    made = image(values.astype(kind), affine, dtype=kind)
    nib.save(made, path)
    return path


TYPES = [
    *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float32", "float64"),
]
LARGE = {"uint32": 2**32 - 1, "int64": -(2**40), "uint64": 2**52, "float64": 2**31 + 5}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("ending", ["nii", "nii.gz", "nrrd", "mha"])
def test_every_number_of_every_pixel_type_is_read(kind, ending, tmp_path):
    path, values = tmp_path / f"a.{ending}", VALUES.astype(kind)
    values[0, 0, 0] = LARGE.get(kind, np.iinfo(kind).min if "int" in kind else 0.5)
    if ending.startswith("nii"):
        save(path, values, kind=kind)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(values.T), path)
    found = read(path)
    assert "64" not in found.dtype.name or found.dtype == np.float64
    assert found.ravel().tolist() == values.T.ravel().tolist()


def test_numbers_that_no_type_holds_are_refused(tmp_path):
    values = VALUES.astype(np.int64)
    values[0, 0, 0] = 2**53 + 1
    path = save(tmp_path / "a.nii", values, kind="int64")
    with pytest.raises(ValueError, match=r"--fixed: .*below 2\^53"):
        read_image("--fixed", path)
    sitk.WriteImage(sitk.GetImageFromArray(values.T), tmp_path / "a.nrrd")
    with pytest.raises(ValueError, match="2\\^53"):
        read_image("--fixed", tmp_path / "a.nrrd")


@pytest.mark.parametrize("version", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
@pytest.mark.parametrize("slope", [(0.5, -1024), (1, -3), (2, 0), (float("nan"),) * 2])
def test_scaled_integers_are_what_nibabel_reads(version, slope, tmp_path):
    path = tmp_path / ("a.img" if version is nib.Nifti1Pair else "a.nii")
    made = version(VALUES.astype(np.int16), AFFINE, dtype="int16")
    made.header.set_slope_inter(*slope)
    nib.save(made, path)
    # What was stored is what was given here: the header's scale is put in afterwards.
    place, form = (176, "2d") if version is nib.Nifti2Image else (112, "2f")
    header = path.with_suffix(".hdr") if version is nib.Nifti1Pair else path
    data = bytearray(header.read_bytes())
    struct.pack_into("<" + form, data, place, *slope)
    header.write_bytes(data)
    expected = nib.load(path).get_fdata().T
    np.testing.assert_allclose(read(path), expected, rtol=1e-6)
    assert np.abs(expected).max() > 50


def test_the_file_that_was_named_is_read(tmp_path):
    other = save(tmp_path / "T1.nii", np.full_like(VALUES, 7))
    named = save(tmp_path / "T1.nii.gz")
    assert (read(named) == VALUES.T).all()
    assert (read(other) == 7).all()
    # Whatever the name says: not packed, packed, capitals, with an ending inside.
    for name, source in {
        "plain.nii.gz": save(tmp_path / "p.nii"),
        "packed.nii": named,
        "A.NII.GZ": named,
        "sub-01.img.nii.gz": named,
        "sub-01.hdr.nii": save(tmp_path / "p.nii"),
        "ü %d [x].NII": save(tmp_path / "p.nii"),
    }.items():
        shutil.copy(source, tmp_path / name)
        assert (read(tmp_path / name) == VALUES.T).all(), name
    itk.imwrite(itk.image_from_array(VALUES.astype(np.int16)), str(tmp_path / "m.nrrd"))
    (tmp_path / "m.nrrd").rename(tmp_path / "M.NRRD")
    assert (read(tmp_path / "M.NRRD") == VALUES).all()
    (tmp_path / "link.nrrd").symlink_to(tmp_path / "M.NRRD")
    assert (read(tmp_path / "link.nrrd") == VALUES).all()


def test_bytes_behind_the_end_are_left(tmp_path):
    path = save(tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes() + bytes(500))
    assert (read(path) == VALUES.T).all()
    halves = gzip.decompress(path.read_bytes()[:-500])
    path.write_bytes(gzip.compress(halves[:400]) + gzip.compress(halves[400:] + b"x"))
    assert (read(path) == VALUES.T).all()


def written(kind, tmp_path):
    """A file of each kind, and the file of it that is to be cut."""
    path, image = tmp_path / f"a.{kind}", sitk.GetImageFromArray(VALUES.astype("int16"))
    flat = np.random.default_rng(0).integers(0, 255, (60, 50)).astype(np.uint8)
    if kind in ("png", "jpg", "bmp", "flat.tif"):
        sitk.WriteImage(sitk.GetImageFromArray(flat), path)
    elif kind in ("nii", "nii.gz"):
        save(path)
    elif kind == "img":
        save(path, image=nib.Nifti1Pair)
    elif kind == "extended.nii":
        made = nib.Nifti1Image(VALUES.astype(np.int16), AFFINE)
        made.header.extensions.append(nib.nifti1.Nifti1Extension(4, b"<a>" * 3000))
        nib.save(made, path)
    elif kind == "ascii.vtk":
        numbers = " ".join(map(str, VALUES.ravel()))
        path.write_text(
            "# vtk DataFile Version 3.0\nx\nASCII\nDATASET STRUCTURED_POINTS\n"
            "DIMENSIONS 5 6 7\nSPACING 1 1 1\nORIGIN 0 0 0\nPOINT_DATA 210\n"
            f"SCALARS s short 1\nLOOKUP_TABLE default\n{numbers}\n"
        )
    else:
        packed = kind in ("z.mha", "z.nrrd", "z.tif")
        sitk.WriteImage(image, path, packed)
    beside = {"mhd": "a.raw", "nhdr": "a.raw", "img": "a.img"}
    return path, tmp_path / beside.get(kind, path.name)


@pytest.mark.parametrize(
    "kind",
    [
        *("nii", "nii.gz", "extended.nii", "img", "mha", "z.mha", "mhd", "nrrd"),
        *("z.nrrd", "nhdr", "tif", "z.tif", "flat.tif", "vtk", "ascii.vtk", "png"),
        *("jpg", "bmp"),
    ],
)
def test_what_is_short_is_refused_and_what_is_whole_is_read(kind, tmp_path):
    path, voxels = written(kind, tmp_path)
    whole = array_of(read_image("--fixed", path, components=True))
    assert whole.size in (210, 3000, 9000)
    data = voxels.read_bytes()
    # By so little that the header of an extended NIfTI would hide it.
    for share in (0.9, 0.5):
        voxels.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=r"--fixed: .*(truncated|damaged|read)"):
            read_image("--fixed", path)


def test_nifti_2_lies_where_nifti_1_does(tmp_path):
    turned = AFFINE @ np.diag([1, -1, 1, 1])
    first = read_image("x", save(tmp_path / "a.nii", affine=turned))
    second = read_image(
        "x", save(tmp_path / "b.nii.gz", affine=turned, image=nib.Nifti2Image)
    )
    assert geometry_of(first) == geometry_of(second)
    assert (array_of(first) == array_of(second)).all()
    frame = geometry_of(second).unit_to_physical().numpy()
    last = frame @ [1, 1, 1, 1]
    expected = np.diag([-1, -1, 1, 1]) @ turned @ [6, 5, 4, 1]
    np.testing.assert_allclose(last, expected, atol=1e-5)


def sheared(path, by):
    affine = AFFINE.copy()
    affine[1, 2] += by
    made = nib.Nifti1Image(VALUES.astype(np.int16), affine)
    made.set_qform(None, 0)
    made.set_sform(affine, 1)
    nib.save(made, path)
    return affine


@pytest.mark.parametrize(("by", "words"), [(0.02, "straightened"), (0.9, "are kept")])
def test_axes_that_are_not_at_right_angles(by, words, tmp_path):
    path, said = tmp_path / "a.nii", []
    affine = sheared(path, by)
    image = read_image("--fixed", path, said=said)
    assert (array_of(image) == VALUES.T).all()
    assert len(said) == 1
    assert words in said[0]
    place = geometry_of(image)
    last = place.unit_to_physical().numpy() @ [1, 1, 1, 1]
    expected = np.diag([-1, -1, 1, 1]) @ affine @ [6, 5, 4, 1]
    # Of a voxel of 1.5 mm: straightened by at most half of one, else exactly there.
    assert np.abs(last - expected).max() < (0.1 if by < 0.1 else 1e-4)
    straight = np.array(place.direction).T @ np.array(place.direction)
    assert (np.abs(straight - np.eye(3)).max() < 1e-6) == (by < 0.1)


def test_a_two_dimensional_slice_of_another_plane(tmp_path):
    path, said = tmp_path / "coronal.nii", []
    made = nib.Nifti1Image(VALUES[:, 2, :].astype(np.int16), None)
    affine = AFFINE[:, [0, 2, 1, 3]]  # i along x, j along z
    made.set_sform(affine, 1)
    made.set_qform(None, 0)
    made.header["pixdim"][1:3] = 2, 3
    nib.save(made, path)
    image = read_image("--fixed", path, said=said)
    assert (array_of(image) == VALUES[:, 2, :].T).all()
    assert geometry_of(image).spacing == (2, 3)
    assert "no plane of x and y" in said[0]


def test_what_is_no_scalar_image_is_refused_before_it_is_read(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5, 6), "f4"), AFFINE), tmp_path / "4.nii")
    with pytest.raises(ValueError, match="is 4D, expected one 2D or 3D image"):
        read_image("--fixed", tmp_path / "4.nii")
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5, 1), "f4"), AFFINE), tmp_path / "1.nii")
    assert read(tmp_path / "1.nii").shape == (5, 4, 3)
    colours = itk.image_from_array(
        np.zeros((4, 5, 3), np.uint8), ttype=(itk.Image[itk.RGBPixel[itk.UC], 2],)
    )
    itk.imwrite(colours, str(tmp_path / "c.png"))
    with pytest.raises(ValueError, match="3 numbers per voxel"):
        read_image("--fixed", tmp_path / "c.png")
    assert read(tmp_path / "c.png", components=True).shape == (4, 5, 3)
    # Segmentations of Slicer whose segments overlap: a list of layers before x, y, z.
    head = (
        "NRRD0004\ntype: unsigned char\ndimension: 4\nspace: left-posterior-superior\n"
        "sizes: 2 4 3 2\nspace directions: none (1,0,0) (0,1,0) (0,0,1)\n"
        "kinds: list domain domain domain\nencoding: raw\nspace origin: (0,0,0)\n\n"
    )
    layered = tmp_path / "two.seg.nrrd"
    layered.write_bytes(head.encode() + bytes(48))
    with pytest.raises(ValueError, match=r"2 numbers per voxel.*in layers"):
        read_image("--labels", layered)


def test_the_reason_of_a_reader_is_told(tmp_path):
    path = tmp_path / "a.nrrd"
    path.write_bytes(b"NRRD0004\ntype: unsigned char\ndimension: 3\n\n")
    with pytest.raises(ValueError, match=r"cannot be read as an image \(.*\w+.*\)"):
        read_image("--fixed", path)


def slices(folder, numbers=range(5), uid="1.2.3", tilt=0.0):
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in numbers:
        image = sitk.GetImageFromArray(VALUES[:, :, k].astype(np.int16))
        for key, value in {
            **{"0020|000e": uid, "0020|000d": "1.2", "0008|0060": "CT"},
            **{"0008|0018": f"{uid}.{k + 1}", "0020|0013": str(k)},
            "0020|0032": f"-10\\{5 + tilt * k}\\{3 * k}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{uid}_{9 - k}.dcm"))
        writer.Execute(image)
    return folder


def test_a_folder_of_dicom_is_one_image(tmp_path):
    image = read_image("--fixed", slices(tmp_path / "scan"))
    assert (array_of(image) == np.moveaxis(VALUES, 2, 0)).all()
    np.testing.assert_allclose(geometry_of(image).origin, [-10, 5, 0])
    np.testing.assert_allclose(geometry_of(image).spacing, [1, 1, 3])
    tilted = geometry_of(read_image("--fixed", slices(tmp_path / "tilted", tilt=1.0)))
    last = tilted.unit_to_physical().numpy() @ [1, 1, 1, 1]
    np.testing.assert_allclose(last[:3], [-10 + 5, 5 + 6 + 4, 12], atol=1e-6)


def test_folders_that_are_no_one_series_are_refused(tmp_path):
    (tmp_path / "none").mkdir()
    two = slices(slices(tmp_path / "two"), uid="1.2.4")
    holed = slices(tmp_path / "holed", numbers=(0, 1, 3, 4))
    one = slices(tmp_path / "one", numbers=(2,))
    for folder, words in {
        tmp_path / "none": "is a folder without DICOM",
        two: r"2 DICOM series: 1\.2\.3 .*1\.2\.4",
        holed: "not evenly spaced",
        one: "holds one DICOM file",
    }.items():
        with pytest.raises(ValueError, match=f"--fixed: .*{words}"):
            read_image("--fixed", folder)


TILTED = np.array([[1, 0, 0], [0, 1, np.sin(0.26)], [0, 0, np.cos(0.26)]])
STRAIGHT = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def place(
    direction=STRAIGHT, origin=(1.0, 2, 3), size=(40, 50, 60), spacing=(1.0, 1, 2)
):
    d = len(size)
    rows = np.array(direction)[:d, :d].tolist()
    return Geometry(size, spacing[:d], origin[:d], tuple(map(tuple, rows)))


HELD = {
    "tilted": (place(TILTED), {".nrrd", ".mha"}),
    "straight": (place(), {".nrrd", ".mha", ".nii", ".nii.gz"}),
    "turned": (
        place(((0.0, 0, 1), (1.0, 0, 0), (0.0, 1, 0))),
        {".nrrd", ".mha", ".nii", ".nii.gz"},
    ),
    "flat, turned": (
        place(((0.8, 0.6, 0), (-0.6, 0.8, 0)), size=(40, 50)),
        {".nrrd", ".mha", ".nii", ".nii.gz"},
    ),
    "a picture": (
        place(size=(40, 50), origin=(0.0, 0.0, 0)),
        {".nrrd", ".mha", ".nii", ".nii.gz", ".tif", ".png"},
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_a_format_that_moves_voxels_is_refused(name, tmp_path):
    where, formats = HELD[name]
    for ending in (".nrrd", ".mha", ".nii", ".nii.gz", ".tif", ".png"):
        path = tmp_path / f"a{ending}"
        if ending in formats:
            check_holds("--out", path, where, np.uint8)
            itk.imwrite(image_of(np.zeros(where.size, np.uint8), where), str(path))
            again = geometry_of(read_image("x", path)).unit_to_physical()
            off = (again - where.unit_to_physical()).abs().max()
            assert off < 0.05 * min(where.spacing)
        else:
            with pytest.raises(ValueError, match=r"--out: .* cannot hold .* choose"):
                check_holds("--out", path, where, np.uint8)


def test_a_picture_holds_pixels_and_says_so(tmp_path):
    for ending, words in (
        (".tif", "not where they lie"),
        (".png", "not where"),
        (".nrrd", ""),
    ):
        said = []
        where = place(size=(40, 50))
        check_holds("--out", tmp_path / f"a{ending}", where, np.uint8, said=said)
        assert words in "".join(said)
        assert bool(said) == bool(words)


def test_a_format_without_such_numbers_is_refused(tmp_path):
    flat = place(size=(40, 50), origin=(0.0, 0.0, 0))
    with pytest.raises(ValueError, match=r"a \.png file cannot hold a 2D image of flo"):
        check_holds("--out", tmp_path / "a.png", flat, np.float32)
    check_holds("--out", tmp_path / "a.png", flat, np.uint8, 3)
    check_holds("--out", tmp_path / "a.nii.gz", flat, np.float32, 2)
    assert not list(tmp_path.iterdir())


def test_very_small_voxels_are_held_to_a_part_of_a_voxel(tmp_path):
    small = place(size=(40, 50), origin=(1e-3, 2e-3, 0), spacing=(1e-6, 1e-6, 1))
    check_holds("--out", tmp_path / "a.nrrd", small)
    far = place(size=(40, 50), origin=(100.1, 2e-3, 0), spacing=(1e-6, 1e-6, 1))
    with pytest.raises(ValueError, match="cannot hold where it lies"):
        check_holds("--out", tmp_path / "a.nii", far)  # float32 there


def test_what_a_nifti_header_cannot_mean_is_refused(tmp_path):
    path = save(tmp_path / "a.nii")
    data = bytearray(path.read_bytes())
    struct.pack_into("<8h", data, 40, 3, 7, -6, 5, 1, 1, 1, 1)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        find_nifti(path)
    pair = save(tmp_path / "b.img", image=nib.Nifti1Pair)
    pair.unlink()
    with pytest.raises(ValueError, match=r"b\.img, which is not beside it"):
        read_image("--fixed", tmp_path / "b.hdr")
