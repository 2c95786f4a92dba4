"""The frames that files of points name, their normals, and what is left as it is."""

import base64
import json
import struct
import zlib

import numpy as np
import pytest

from icon_nephi.io.meshes import normals_of
from icon_nephi.io.points import FORMATS, read_points
from icon_nephi.io.tables import with_column

# A curved patch: its normals are known, and so are they after an affine map.
_U, _V = (x.ravel() for x in np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 4)))
POINTS = np.stack([20 * _U + 3, 15 * _V - 2, 2 * _U * _V + 7], 1)
NORMALS = np.stack([-2 * _V / 20, -2 * _U / 15, np.ones_like(_U)], 1)
NORMALS /= np.linalg.norm(NORMALS, axis=1, keepdims=True)
FACES = np.array([[0, 1, 5], [1, 6, 5], [2, 3, 7]])
SIGN = {"LPS": np.ones(3), "RAS": np.array([-1.0, -1, 1])}
MATRIX = np.array([[1.2, 0.3, 0], [-0.2, 0.9, 0.1], [0.05, 0, 1.1]])


def through(points):
    return points @ MATRIX.T + [4, 5, -6]


def words(rows):
    return "\n".join(" ".join(f"{x:.6f}" for x in row) for row in rows)


def vtk(frame, binary):
    p, n = POINTS * SIGN[frame], NORMALS * SIGN[frame]
    head = f"# vtk DataFile Version 5.1\n3D Slicer output. SPACE={frame}\n"
    head += ("BINARY" if binary else "ASCII") + "\nDATASET POLYDATA\nPOINTS 20 float\n"
    data = "POINT_DATA 20\nSCALARS t float 1\nLOOKUP_TABLE default\n"
    ones, faces = np.ones(20), np.concatenate([np.full((3, 1), 3), FACES], 1)
    if binary:
        body = head.encode() + p.astype(">f4").tobytes() + b"\nPOLYGONS 3 12\n"
        body += faces.astype(">i4").tobytes() + b"\n" + data.encode()
        body += ones.astype(">f4").tobytes() + b"\nNORMALS Normals float\n"
        return body + n.astype(">f4").tobytes() + b"\n"
    lines = words(p) + "\nPOLYGONS 3 12\n"
    lines += "\n".join(" ".join(map(str, f)) for f in faces.tolist()) + "\n"
    lines += data + "\n".join(map(str, ones)) + "\nNORMALS Normals float\n"
    return (head + lines + words(n) + "\n").encode()


def ply(frame, form):
    p, n = POINTS * SIGN[frame], NORMALS * SIGN[frame]
    head = f"ply\nformat {form} 1.0\ncomment SPACE={frame}\nelement vertex 20\n"
    head += "".join(f"property float {c}\n" for c in ("x", "y", "z", "nx", "ny", "nz"))
    head += "element face 3\nproperty list uchar int vertex_indices\nend_header\n"
    both = np.concatenate([p, n], 1)
    if form == "ascii":
        faces = "\n".join("3 " + " ".join(map(str, f)) for f in FACES.tolist())
        return (head + words(both) + "\n" + faces + "\n").encode()
    body = both.astype("<f4").tobytes()
    return (
        head.encode()
        + body
        + b"".join(struct.pack("<Biii", 3, *f) for f in FACES.tolist())
    )


def stl(frame, binary, capitals=False):
    corners = (POINTS * SIGN[frame])[FACES]
    normals = normals_of(corners)
    if binary:
        body = b"".join(
            struct.pack("<12fH", *n, *c.ravel(), 0)
            for n, c in zip(normals, corners, strict=True)
        )
        head = f"3D Slicer output. SPACE={frame}".encode().ljust(80, b"\0")
        return head + struct.pack("<I", 3) + body
    text = f"solid 3D Slicer output. SPACE={frame}\n"
    body = ""
    for normal, corner in zip(normals, corners, strict=True):
        body += f"facet normal {words([normal])}\nouter loop\n"
        body += "".join(f"vertex {words([c])}\n" for c in corner)
        body += "endloop\nendfacet\n"
    body += "endsolid\n"
    return (text + (body.upper() if capitals else body)).encode()


def obj(frame):
    lines = [f"# SPACE={frame}"]
    lines += [f"v {words([p])} 0.5 0.5 0.5" for p in POINTS * SIGN[frame]]
    lines += [f"vn {words([n])}" for n in (NORMALS * SIGN[frame])[::-1]]
    corner = "f " + " ".join(f"{i + 1}//{20 - i}" for i in range(3))
    lines += [corner, *(f"f {i + 1}//{20 - i} 1//20 -1//-20" for i in range(3, 20))]
    return ("\n".join(lines) + "\n").encode()


def packed(values, how, offset=0):
    """One array of a .vtp: its attributes, what is in it, and what is appended."""
    data = values.astype("<f4").tobytes()
    if how == "ascii":
        return 'format="ascii"', words(values).encode(), b""
    if how.startswith("zip"):
        parts = [data[:100], data[100:]]
        squeezed = [zlib.compress(part) for part in parts]
        head = struct.pack("<5I", 2, 100, len(parts[1]), *map(len, squeezed))
        if how == "zip raw":
            body = head + b"".join(squeezed)
            return f'format="appended" offset="{offset}"', b"", body
        text = base64.b64encode(head) + base64.b64encode(b"".join(squeezed))
        return 'format="binary"', text, b""
    body = struct.pack("<I", len(data)) + data
    if how == "raw":
        return f'format="appended" offset="{offset}"', b"", body
    return 'format="binary"', base64.b64encode(body), b""


def vtp(frame, how):
    first = packed(POINTS * SIGN[frame], how)
    second = packed(NORMALS * SIGN[frame], how, len(first[2]))
    letters = " ".join(str(ord(c)) for c in frame) + " 0"
    array = '<DataArray type="Float32" Name="%s" NumberOfComponents="3" %s>'
    squeezed = ' compressor="vtkZLibDataCompressor"' if how.startswith("zip") else ""
    out = (
        '<?xml version="1.0"?>\n<VTKFile type="PolyData" version="0.1" '
        f'byte_order="LittleEndian" header_type="UInt32"{squeezed}>\n<PolyData>\n'
        f'<FieldData><Array type="String" Name="SPACE" NumberOfTuples="1" '
        f'format="ascii">{letters}</Array></FieldData>\n'
        '<Piece NumberOfPoints="20" NumberOfPolys="0">\n<PointData Normals="N">\n'
    ).encode()
    out += (array % ("N", second[0])).encode() + second[1] + b"</DataArray>\n"
    out += b"</PointData>\n<Points>\n" + (array % ("Points", first[0])).encode()
    out += first[1] + b"</DataArray>\n</Points>\n</Piece>\n</PolyData>\n"
    if how.endswith("raw"):
        out += b'<AppendedData encoding="raw">\n_' + first[2] + second[2]
        out += b"\n</AppendedData>\n"
    return out + b"</VTKFile>\n"


MESHES = {
    "vtk": (".vtk", lambda frame: vtk(frame, False)),
    "vtk binary": (".vtk", lambda frame: vtk(frame, True)),
    "ply": (".ply", lambda frame: ply(frame, "ascii")),
    "ply binary": (".ply", lambda frame: ply(frame, "binary_little_endian")),
    "stl": (".stl", lambda frame: stl(frame, False)),
    "stl capitals": (".stl", lambda frame: stl(frame, False, True)),
    "stl binary": (".stl", lambda frame: stl(frame, True)),
    "obj": (".obj", obj),
    **{f"vtp {how}": (".vtp", lambda frame, how=how: vtp(frame, how)) for how in (
        "ascii", "base64", "raw", "zip", "zip raw"
    )},
}  # fmt: skip


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("frame", ["LPS", "RAS"])
def test_a_mesh_is_moved_in_the_frame_it_names_with_its_normals(name, frame, tmp_path):
    ending, make = MESHES[name]
    path = tmp_path / f"a{ending}"
    path.write_bytes(make(frame))
    file = read_points("--points", path)
    assert file.frame == frame
    expected = POINTS[FACES].reshape(-1, 3) if ending == ".stl" else POINTS
    np.testing.assert_allclose(file.points, expected, atol=1e-5)
    path.write_bytes(file.moved(through))
    again = read_points("--points", path)
    assert again.frame == frame
    np.testing.assert_allclose(again.points, through(expected), atol=2e-5)
    if ending == ".stl":
        return
    # Normals are turned by the inverse transpose: what `turned` keeps is seen by
    # asking the file for its tangents again.
    normals = NORMALS[::-1] if ending == ".obj" else NORMALS
    places = through(POINTS[::-1] if ending == ".obj" else POINTS)
    turned = normals @ np.linalg.inv(MATRIX)
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)
    along = again.beside.reshape(2, -1, 3) - places
    across = np.cross(along[0], along[1])
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    np.testing.assert_allclose(across, turned, atol=2e-4)
    assert again.points.shape == (20, 3)


def test_a_frame_that_is_neither_is_refused(tmp_path):
    for ending, make in MESHES.values():
        path = tmp_path / f"a{ending}"
        path.write_bytes(make("LPS").replace(b"SPACE=LPS", b"SPACE=IJK"))
        if b"SPACE=" in path.read_bytes():
            with pytest.raises(ValueError, match="coordinates in IJK"):
                read_points("--points", path)


CRAS = np.array([4.0, -18, 11])


@pytest.mark.parametrize("way", ["xform", "only the middle", "scanner", "none"])
def test_surfaces_of_freesurfer_are_where_their_volume_is(way, tmp_path):
    nib = pytest.importorskip("nibabel")
    lps = POINTS
    stored, meta = lps * SIGN["RAS"], {}
    matrix = np.eye(4)
    if way in ("xform", "only the middle"):
        stored = stored - CRAS
        meta = {f"VolGeomC_{a}": str(c) for a, c in zip("RAS", CRAS, strict=True)}
    if way == "scanner":  # mris_convert --to-scanner keeps the middle
        meta = {f"VolGeomC_{a}": str(c) for a, c in zip("RAS", CRAS, strict=True)}
    if way == "xform":
        matrix[:3, 3] = CRAS
    space = nib.gifti.GiftiCoordSystem(1 if way == "scanner" else 0, 1, matrix)
    array = nib.gifti.GiftiDataArray(
        stored.astype(np.float32),
        "NIFTI_INTENT_POINTSET",
        coordsys=space,
        meta=nib.gifti.GiftiMetaData(meta),
    )
    path = tmp_path / "lh.surf.gii"
    nib.save(nib.GiftiImage(darrays=[array]), path)
    file = read_points("--points", path)
    np.testing.assert_allclose(file.points, lps, atol=1e-4)
    path.write_bytes(file.moved(through))
    moved = nib.load(path).darrays[0]
    assert dict(moved.meta) == meta
    offset = CRAS if meta and way != "scanner" else 0
    expected = through(lps) * SIGN["RAS"] - offset
    np.testing.assert_allclose(moved.data, expected, atol=1e-4)


def markups(points, **others):
    return json.dumps({"markups": [{"controlPoints": points, **others}]}).encode()


@pytest.mark.parametrize("hole", ["", None, [], [None] * 3, [0.0, 0, 0], "omitted"])
def test_points_that_are_not_placed_stay_as_they_are(hole, tmp_path):
    points = [{"label": f"F-{i}", "position": [float(i), 2, 3]} for i in range(3)]
    points[1] |= {"positionStatus": "undefined", "position": hole}
    if hole == "omitted":
        del points[1]["position"]
    path = tmp_path / "a.mrk.json"
    path.write_bytes(markups(points))
    file = read_points("--points", path)
    assert len(file.points) == 2
    assert "1 points have no position" in file.notes[0]
    (after,) = json.loads(file.moved(through))["markups"]
    assert after["controlPoints"][1] == points[1]
    np.testing.assert_allclose(
        [after["controlPoints"][i]["position"] for i in (0, 2)],
        through(np.array([[0.0, 2, 3], [2, 2, 3]])),
    )


@pytest.mark.parametrize(("frame", "sign"), [("RAS", -1), (0, -1), (1, 1), ("lps", 1)])
def test_centres_move_with_their_points(frame, sign, tmp_path):
    path = tmp_path / "roi.mrk.json"
    point = {"position": [1.0, 2, 3], "positionStatus": "defined"}
    path.write_bytes(
        markups([point], coordinateSystem=frame, center=[1.0, 2, 3], size=[9, 9, 9])
    )
    file = read_points("--points", path)
    assert file.points.tolist() == [[sign, 2 * sign, 3]]
    (after,) = json.loads(file.moved(through))["markups"]
    assert after["center"] == after["controlPoints"][0]["position"]
    assert after["size"] == [9, 9, 9]
    expected = through(file.points)[0] * [sign, sign, 1]
    np.testing.assert_allclose(after["center"], expected)


def test_cells_of_a_table_are_kept_whatever_is_in_them(tmp_path):
    notes = ["one\ntwo", "a,b", 'say "x"', "one\u2028two", "ü"]
    text = "x,y,z,note\n" + "".join(
        '{},2,3,"{}"\n'.format(i, note.replace('"', '""'))
        for i, note in enumerate(notes)
    )
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8", newline="")
    file = read_points("--points", path)
    path.write_bytes(with_column(file.moved(through), "error", np.arange(5.0)))
    import csv

    with path.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.reader(lines))
    assert [row[3] for row in rows[1:]] == notes
    assert [row[4] for row in rows] == ["error", *(f"{i:.6f}" for i in range(5))]
    fcsv = tmp_path / "a.fcsv"
    fcsv.write_text(
        '# CoordinateSystem = LPS\r\nn,1,2,3,0,0,0,1,1,1,0,"a, \u2028ü",,\r\n',
        encoding="utf-8",
        newline="",
    )
    moved = read_points("--points", fcsv).moved(lambda p: p + 1).decode()
    assert 'n,2.000000,3.000000,4.000000,0,0,0,1,1,1,0,"a, \u2028ü",,' in moved or (
        "a, \u2028ü" in moved
    )


def test_planes_as_ants_writes_them(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x,y,z,t,label\n1,2,0,0,1\n3,4,0,0,2\n")
    file = read_points("--points", path).flat()
    assert file.points.tolist() == [[1, 2], [3, 4]]
    assert file.moved(lambda p: p + 1).decode().splitlines()[1:] == [
        "2.000000,3.000000,0.000000,0,1",
        "4.000000,5.000000,0.000000,0,2",
    ]
    path.write_text("x,y,z\n1,2,5\n")
    assert read_points("--points", path).flat().points.shape == (1, 3)


def test_a_hint_where_cells_are_separated_otherwise(tmp_path):
    path = tmp_path / "a.csv"
    for text in ("x;y;z\n1;2;3\n", "x\ty\tz\n1\t2\t3\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="separate its cells by commas"):
            read_points("--points", path)


def test_nothing_found_is_not_moved(tmp_path):
    empty = {
        ".csv": b"x,y,z\n",
        ".stl": b"solid a\nendsolid a\n",
        ".obj": b"# nothing\n",
        ".mrk.json": markups([]),
        ".ply": ply("LPS", "ascii").split(b"end_header")[0].replace(b"20", b"0")
        + b"end_header\n",
    }
    for ending, data in empty.items():
        path = tmp_path / f"a{ending}"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"--points: .*(no points|write it again)"):
            read_points("--points", path, some=True)
    assert set(empty) < set(FORMATS)
