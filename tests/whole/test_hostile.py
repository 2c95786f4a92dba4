"""Files made to break a reader: the documented error, or a result, and nothing else.

``make fuzz`` runs the same with many more examples.
"""

import gzip
import json
import os
import struct
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from icon_nephi.io import image_files, itk_images
from icon_nephi.io.itk_points import rows_through
from icon_nephi.io.nephi import save_fit
from icon_nephi.io.other_transforms import read_any_transform
from icon_nephi.io.points import FORMATS, read_points
from icon_nephi.io.raw import find_voxels, geometry_in
from icon_nephi.registration.result import load
from tests.small_fits import geometry, small_fit, unit_matrix

# More, and others each time, for ``make fuzz``.
MANY = int(os.environ.get("NEPHI_FUZZ", "0"))
FEW = settings(
    max_examples=MANY or 15,
    deadline=None,
    derandomize=not MANY,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
POINTS = {
    ".csv": b"label,x,y,z\na,1,2,3\nb,4,5,6\n",
    ".fcsv": b"# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n"
    b"# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
    b"1,1.0,2.0,3.0,0,0,0,1,1,1,0,F-1,,\n",
    ".mrk.json": json.dumps(
        {
            "markups": [
                {
                    "type": "Fiducial",
                    "coordinateSystem": "LPS",
                    "controlPoints": [{"id": "1", "position": [1.0, 2.0, 3.0]}],
                }
            ]
        }
    ).encode(),
    ".vtk": b"# vtk DataFile Version 3.0\nmesh\nASCII\nDATASET POLYDATA\n"
    b"POINTS 3 float\n0 0 0 1 0 0 0 1 0\nPOLYGONS 1 4\n3 0 1 2\n",
    ".ply": b"ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\n"
    b"property float y\nproperty float z\nelement face 1\n"
    b"property list uchar int vertex_indices\nend_header\n"
    b"0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n",
    ".vtp": b'<VTKFile type="PolyData" byte_order="LittleEndian">'
    b'<PolyData><Piece NumberOfPoints="3"><PointData Normals="N"><DataArray '
    b'type="Float32" Name="N" NumberOfComponents="3" format="binary">JAAAAAAAAAAAAAAAAA'
    b"CAPwAAAAAAAAAAAACAPwAAAAAAAAAAAACAPw==</DataArray></PointData><Points><DataArray "
    b'type="Float32" NumberOfComponents="3" format="ascii">0 0 0 1 0 0 0 1 0'
    b"</DataArray></Points></Piece></PolyData></VTKFile>\n",
    ".obj": b"# SPACE=RAS\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvn 0 0 1\nf 1//1 2//1 3//1\n",
    ".stl": b"\0" * 80 + struct.pack("<I", 1) + struct.pack("<12fH", *range(12), 0),
}
IMAGES = {
    ".mha": b"ObjectType = Image\nNDims = 3\nBinaryData = True\n"
    b"BinaryDataByteOrderMSB = False\nCompressedData = False\n"
    b"TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
    b"ElementSpacing = 1 1 1\nDimSize = 4 3 2\nElementType = MET_UCHAR\n"
    b"ElementDataFile = LOCAL\n" + bytes(range(24)),
    ".nrrd": b"NRRD0004\ntype: unsigned char\ndimension: 3\n"
    b"space: left-posterior-superior\nsizes: 4 3 2\n"
    b"space directions: (1,0,0) (0,1,0) (0,0,1)\nkinds: domain domain domain\n"
    b"encoding: raw\nspace origin: (0,0,0)\n\n" + bytes(range(24)),
}


def nifti(size=(4, 3, 2), spacing=(1.0, 1.0, 1.0), rows=None):
    """A NIfTI-1 file of bytes, with the header as it is told."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *size, 1, 1, 1, 1)
    struct.pack_into("<hh", header, 70, 2, 8)
    struct.pack_into("<8f", header, 76, 1.0, *spacing, 0, 0, 0, 0)
    struct.pack_into("<3f", header, 108, 352.0, 1.0, 0.0)
    rows = np.diag(spacing) if rows is None else np.array(rows)
    struct.pack_into("<hh", header, 252, 0, 1)
    for row, place in zip(rows, (280, 296, 312), strict=True):
        struct.pack_into("<4f", header, place, *row, 0.0)
    header[344:348] = b"n+1\0"
    return bytes(header) + bytes(range(24))


def nifti_2():
    """The same as NIfTI-2."""
    header = bytearray(544)
    struct.pack_into("<i8s2h", header, 0, 540, b"n+2\0\r\n\x1a\n", 2, 8)
    struct.pack_into("<8q", header, 16, 3, 4, 3, 2, 1, 1, 1, 1)
    struct.pack_into("<8d", header, 104, 1, 1, 1, 1, 0, 0, 0, 0)
    struct.pack_into("<q2d", header, 168, 544, 1, 0)
    struct.pack_into("<2i", header, 344, 0, 1)
    struct.pack_into("<12d", header, 400, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
    return bytes(header) + bytes(range(24))


def tiff():
    """A grey picture of 6 by 4 pixels in two strips."""
    entries = [
        *((256, 3, 1, 6), (257, 3, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1)),
        *((262, 3, 1, 1), (273, 4, 2, 200), (277, 3, 1, 1), (278, 3, 1, 2)),
        (279, 4, 2, 208),
    ]
    data = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    data += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return data.ljust(200, b"\0") + struct.pack("<4I", 216, 228, 12, 12) + bytes(24)


IMAGES[".nii"] = nifti()
IMAGES["_2.nii"] = nifti_2()
IMAGES[".nii.gz"] = gzip.compress(nifti(), mtime=0)
IMAGES[".tif"] = tiff()
IMAGES[".vtk"] = (
    b"# vtk DataFile Version 3.0\nx\nBINARY\nDATASET STRUCTURED_POINTS\n"
    b"DIMENSIONS 4 3 2\nSPACING 1 1 1\nORIGIN 0 0 0\nPOINT_DATA 24\n"
    b"SCALARS s unsigned_char 1\nLOOKUP_TABLE default\n" + bytes(range(24)) + b"\n"
)


def damaged(data):
    """Bytes with some of them flipped, cut off, doubled or replaced."""
    place = st.integers(0, max(0, len(data) - 1))
    change = st.one_of(
        st.tuples(st.just("flip"), place, st.integers(0, 7)),
        st.tuples(st.just("cut"), place, st.just(0)),
        st.tuples(st.just("drop"), place, st.integers(1, 40)),
        st.tuples(st.just("double"), place, st.integers(1, 40)),
        st.tuples(
            st.just("put"),
            place,
            st.sampled_from(
                [
                    *(b"nan", b"-1", b"0", b"99999999999999999999", b"1e308", b"\0"),
                    *(b"../../x", b"%s", b"\xff\xfe", b"\n", b"inf", b"LIST"),
                ]
            ),
        ),
    )

    def apply(changes):
        found = bytearray(data)
        for kind, at, what in changes:
            at = min(at, max(0, len(found) - 1))
            if kind == "flip" and found:
                found[at] ^= 1 << what
            elif kind == "cut":
                del found[at:]
            elif kind == "drop":
                del found[at : at + what]
            elif kind == "double":
                found[at:at] = found[at : at + what]
            elif kind == "put":
                found[at : at + len(what)] = what
        return bytes(found)

    return st.lists(change, min_size=1, max_size=4).map(apply)


def numbers_or_refused(read, path):
    """What a reader gives, None where it refuses; anything else is a crash."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="builtin type")
        try:
            return read(path)
        except ValueError as error:
            said = str(error)
    assert said.strip()
    return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "pair.nephi"
    places = geometry((12, 16), 1), geometry((17, 11), 2)
    save_fit(path, small_fit(2, unit_matrix(2)), *places, itk=True)
    return path.read_bytes()


def a_registration(path):
    result = load(path)
    place = result.geometry_B
    middle = place.unit_to_physical().numpy() @ [0.5, 0.5, 1]
    return result.transform_points(middle[None, :2])


@FEW
@given(data=st.data())
def test_registrations(tmp_path, saved, data):
    path = tmp_path / "pair.nephi"
    path.write_bytes(data.draw(damaged(saved)))
    moved = numbers_or_refused(a_registration, path)
    assert moved is None or moved.shape == (1, 2)


def header_of(saved):
    size = int.from_bytes(saved[:8], "little")
    return json.loads(saved[8 : 8 + size]), saved[8 + size :]


WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**12),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-1, 10**9), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@FEW
@given(data=st.data())
def test_headers_of_registrations(tmp_path, saved, data):
    """Any JSON in any place of the header."""
    whole, rest = header_of(saved)
    told = json.loads(whole["__metadata__"]["nephi"])
    del told["sha256"]  # which would tell
    spot = told
    while True:
        keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
        key = data.draw(st.sampled_from(keys))
        inner = spot[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        spot = inner
    spot[key] = data.draw(WRONG)
    whole["__metadata__"]["nephi"] = json.dumps(told)
    text = json.dumps(whole).encode()
    path = tmp_path / "pair.nephi"
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    numbers_or_refused(a_registration, path)


@pytest.mark.parametrize("ending", POINTS)
@FEW
@given(data=st.data())
def test_points(tmp_path, ending, data):
    path = tmp_path / f"points{ending}"
    path.write_bytes(data.draw(damaged(POINTS[ending])))
    found = numbers_or_refused(lambda p: read_points("--points", p), path)
    if found is not None:
        assert np.isfinite(found.points).all()
        assert isinstance(found.content(found.points), bytes)


def test_every_kind_of_points_is_tried():
    assert {*POINTS, ".gii"} == set(FORMATS)


@FEW
@given(data=st.data())
def test_surfaces(tmp_path, data):
    nib = pytest.importorskip("nibabel")
    arrays = [
        nib.gifti.GiftiDataArray(np.eye(3, dtype=np.float32), "NIFTI_INTENT_POINTSET"),
        nib.gifti.GiftiDataArray(
            np.array([[0, 1, 2]], np.int32), "NIFTI_INTENT_TRIANGLE"
        ),
    ]
    whole = nib.GiftiImage(darrays=arrays).to_bytes()
    path = tmp_path / "surface.gii"
    path.write_bytes(data.draw(damaged(whole)))
    found = numbers_or_refused(lambda p: read_points("--points", p), path)
    if found is not None:
        assert np.isfinite(found.points).all()


MAPS = {
    ".mat": b"1 0 0 5\n0 1 0 6\n0 0 1 7\n0 0 0 1\n",
    ".txt": b"#Insight Transform File V1.0\n#Transform 0\n"
    b"Transform: AffineTransform_double_2_2\nParameters: 1 0 0 1 3 4\n"
    b"FixedParameters: 0 0\n",
    ".mha": b"ObjectType = Image\nNDims = 2\nBinaryData = True\n"
    b"BinaryDataByteOrderMSB = False\nCompressedData = False\n"
    b"TransformMatrix = 1 0 0 1\nOffset = 0 0\nElementSpacing = 1 1\nDimSize = 3 2\n"
    b"ElementNumberOfChannels = 2\nElementType = MET_FLOAT\nElementDataFile = LOCAL\n"
    + np.arange(12, dtype="<f4").tobytes(),
}


@pytest.mark.parametrize("ending", MAPS)
@FEW
@given(data=st.data())
def test_transforms_of_others(tmp_path, ending, data):
    path = tmp_path / f"map{ending}"
    path.write_bytes(data.draw(damaged(MAPS[ending])))
    found = numbers_or_refused(
        lambda p: read_any_transform("--transform", p, affine="ras"), path
    )
    if found is not None:
        moved = rows_through(found)(np.zeros((2, found.GetInputSpaceDimension())))
        assert moved.shape[0] == 2


def a_mapped_box(path):
    place = geometry_in(path)
    raw = find_voxels(path)
    return raw.read(place.size, tuple(slice(0, 2) for _ in place.size))


@pytest.mark.parametrize("reader", ["mapped", "read"])
@pytest.mark.parametrize("ending", IMAGES)
@FEW
@given(data=st.data())
def test_images(tmp_path, ending, reader, data):
    path = tmp_path / f"image{ending}"
    path.write_bytes(data.draw(damaged(IMAGES[ending])))
    read = {
        "mapped": a_mapped_box,
        "read": lambda p: image_files.read_image("--fixed", p),
    }[reader]
    numbers_or_refused(read, path)


def test_a_nifti_that_places_no_voxel_is_refused(tmp_path):
    path = tmp_path / "image.nii"
    for changed in (
        {"spacing": (float("nan"), 1, 1)},
        {"rows": [[1, 0, 0], [2, 0, 0], [0, 0, 1]]},
        {"rows": np.full((3, 3), np.nan)},
    ):
        path.write_bytes(nifti(**changed))
        image = numbers_or_refused(lambda p: image_files.read_image("--fixed", p), path)
        if image is not None:  # ITK mends some of them: then they are whole
            place = itk_images.geometry_of(image)
            assert np.isfinite(place.unit_to_physical()).all()
            assert all(s > 0 for s in place.spacing)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_images_that_are_said_to_be_huge_are_refused_at_once(tmp_path, ending):
    many = (30_000, 30_000, 30_000)
    data = {
        ".nii": nifti(many),
        ".nii.gz": gzip.compress(nifti(many)),
        ".mha": IMAGES[".mha"].replace(b"4 3 2", b"300000 300000 300000"),
        ".nrrd": IMAGES[".nrrd"].replace(b"4 3 2", b"300000 300000 300000"),
    }[ending]
    path = tmp_path / f"image{ending}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="--fixed"):
        image_files.read_image("--fixed", path)


def test_a_zip_bomb_is_not_blown_up(tmp_path):
    """A hundred million zeros behind a small image: only its voxels are read."""
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(nifti() + bytes(10**8)))
    opened, read = [], gzip.GzipFile.read

    def count(self, size=-1):
        part = read(self, size)
        opened.append(len(part))
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gzip.GzipFile, "read", count)
        image = image_files.read_image("--fixed", path)
    assert itk_images.array_of(image).shape == (2, 3, 4)
    assert sum(opened) < 10**7


def test_a_field_that_is_said_to_be_huge_is_not_made(tmp_path, saved):
    whole, rest = header_of(saved)
    told = json.loads(whole["__metadata__"]["nephi"])
    del told["sha256"]
    for change in ({"width": 10**7}, {"hidden_layers": 10**9}, {"width": "../x"}):
        mean = json.loads(json.dumps(told))
        mean["fields"]["field_AB"]["arguments"] |= change
        whole["__metadata__"]["nephi"] = json.dumps(mean)
        text = json.dumps(whole).encode()
        path = tmp_path / "pair.nephi"
        path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
        with pytest.raises(ValueError, match="damaged"):
            load(path)


@pytest.mark.parametrize("where", ["../secret.raw", "/etc/hostname", "none.raw", "."])
def test_voxels_are_not_read_from_other_folders(tmp_path, where):
    (tmp_path / "secret.raw").write_bytes(bytes(24))
    folder = tmp_path / "images"
    folder.mkdir()
    path = folder / "image.mhd"
    head = IMAGES[".mha"].split(b"LOCAL")[0]
    path.write_bytes(head + where.encode() + b"\n")
    with pytest.raises(ValueError, match="not in its folder"):
        find_voxels(path)
    (folder / "image.raw").write_bytes(bytes(24))
    path.write_bytes(head + b"image.raw\n")
    assert find_voxels(path).read((2, 3, 4), (slice(0, 2),) * 3).shape == (2, 2, 2)
