"""Points and meshes: read in LPS mm, moved, and everything else kept."""

import json
import struct

import numpy as np
import pytest

from icon_nephi.io import meshes
from icon_nephi.io.points import FORMATS, read_points

POINTS = np.array(
    [[1.5, -2.25, 30.0], [4.0, 5.5, -6.75], [7.0, 80.125, 9.0], [0, 1, 2]], float
)
RAS = POINTS * [-1, -1, 1]
FACES = np.array([[0, 1, 2], [0, 2, 3]])


def text_rows(points):
    return "\n".join(" ".join(f"{x:.6f}" for x in row) for row in points) + "\n"


def csv_file(frame="LPS"):
    rows = [
        f"p{i},{x:.6f},{y:.6f},{z:.6f},a b"
        for i, (x, y, z) in enumerate(POINTS.tolist())
    ]
    return ("name,X,Y,Z,note\n" + "\n".join(rows) + "\n").encode()


def fcsv_file(frame, points):
    head = (
        "# Markups fiducial file version = 4.11\n"
        f"# CoordinateSystem = {frame}\n"
        "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
    )
    rows = [
        f"vtkMRMLMarkupsFiducialNode_{i},{x:.6f},{y:.6f},{z:.6f},0,0,0,1,1,1,0,F-{i},,"
        for i, (x, y, z) in enumerate(points.tolist())
    ]
    return (head + "\n".join(rows) + "\n").encode()


def markups_file():
    points = [{"id": str(i), "position": p} for i, p in enumerate(RAS.tolist())]
    markup = {"type": "Fiducial", "coordinateSystem": "RAS", "controlPoints": points}
    return json.dumps({"@schema": "x", "markups": [markup]}, indent=2).encode() + b"\n"


def vtk_file(binary, space=""):
    points = RAS if space == "RAS" else POINTS
    head = "# vtk DataFile Version 4.2\n" + (f"SPACE={space}\n" if space else "mesh\n")
    head += ("BINARY" if binary else "ASCII") + "\nDATASET POLYDATA\nPOINTS 4 float\n"
    faces = np.concatenate([np.full((2, 1), 3), FACES], 1)
    data = "POINT_DATA 4\nSCALARS t double 1\nLOOKUP_TABLE default\n"
    if not binary:
        lines = text_rows(points) + "POLYGONS 2 8\n"
        lines += "\n".join(" ".join(map(str, f)) for f in faces.tolist())
        return (head + lines + f"\n{data}1\n2\n3\n4\n").encode()
    body = points.astype(">f4").tobytes() + b"\nPOLYGONS 2 8\n"
    body += faces.astype(">i4").tobytes() + b"\n" + data.encode()
    return head.encode() + body + np.arange(4.0).astype(">f8").tobytes()


def ply_file(form):
    head = (
        f"ply\nformat {form} 1.0\ncomment made by hand\nelement vertex 4\n"
        "property float x\nproperty float y\nproperty float z\nproperty uchar red\n"
        "element face 2\nproperty list uchar int vertex_indices\nend_header\n"
    )
    if form == "ascii":
        rows = "\n".join(f"{t} {9}" for t in text_rows(POINTS).splitlines())
        return (head + rows + "\n3 0 1 2\n3 0 2 3\n").encode()
    order = ">" if "big" in form else "<"
    body = b"".join(struct.pack(order + "fffB", *p, 9) for p in POINTS.tolist())
    body += b"".join(struct.pack(order + "Biii", 3, *f) for f in FACES.tolist())
    return head.encode() + body


def stl_file(binary):
    corners = POINTS[FACES]
    normals = meshes.normals_of(corners)
    if binary:
        body = b"".join(
            struct.pack("<12fH", *n, *c.ravel(), 7)
            for n, c in zip(normals, corners, strict=True)
        )
        return b"binary stl".ljust(80) + struct.pack("<I", 2) + body
    text = "solid s\n"
    for normal, corner in zip(normals, corners, strict=True):
        text += "facet normal " + text_rows(normal[None]) + "outer loop\n"
        text += "".join("vertex " + text_rows(c[None]) for c in corner)
        text += "endloop\nendfacet\n"
    return (text + "endsolid s\n").encode()


def gifti_file():
    import nibabel as nib

    arrays = [
        nib.gifti.GiftiDataArray(RAS.astype(np.float32), "NIFTI_INTENT_POINTSET"),
        nib.gifti.GiftiDataArray(FACES.astype(np.int32), "NIFTI_INTENT_TRIANGLE"),
        nib.gifti.GiftiDataArray(np.ones(4, np.float32), "NIFTI_INTENT_SHAPE"),
    ]
    return nib.GiftiImage(darrays=arrays).to_bytes()


FILES = {
    "table": (".csv", csv_file, "LPS"),
    "slicer LPS": (".fcsv", lambda: fcsv_file("LPS", POINTS), "LPS"),
    "slicer RAS": (".fcsv", lambda: fcsv_file("RAS", RAS), "RAS"),
    "slicer of old": (".fcsv", lambda: fcsv_file("0", RAS), "RAS"),
    "markups": (".mrk.json", markups_file, "RAS"),
    "vtk": (".vtk", lambda: vtk_file(False), "LPS"),
    "vtk binary": (".vtk", lambda: vtk_file(True), "LPS"),
    "vtk RAS": (".vtk", lambda: vtk_file(True, "RAS"), "RAS"),
    "ply": (".ply", lambda: ply_file("ascii"), "LPS"),
    "ply little": (".ply", lambda: ply_file("binary_little_endian"), "LPS"),
    "ply big": (".ply", lambda: ply_file("binary_big_endian"), "LPS"),
    "stl": (".stl", lambda: stl_file(False), "LPS"),
    "stl binary": (".stl", lambda: stl_file(True), "LPS"),
    "gifti": (".gii", gifti_file, "RAS"),
}


def expected(ending):
    return POINTS[FACES].reshape(-1, 3) if ending == ".stl" else POINTS


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_in_lps_and_only_its_points_change(name, tmp_path):
    ending, make, frame = FILES[name]
    data = make()
    path = tmp_path / f"in{ending}"
    path.write_bytes(data)
    found = read_points("--points", path)
    assert found.frame == frame
    np.testing.assert_allclose(found.points, expected(ending), atol=1e-5)
    if ending not in (".gii", ".mrk.json", ".ply"):
        assert found.content(found.points) == data  # nothing else is touched
    moved = found.points[:, ::-1] + [10.5, -3, 0.25]
    other = tmp_path / f"out{ending}"
    other.write_bytes(found.content(moved))
    again = read_points("--points", other)
    np.testing.assert_allclose(again.points, moved, atol=1e-4)
    assert again.frame == frame
    # Moved back, it is the first file again: faces, data and columns were kept.
    back = again.content(found.points)
    path.write_bytes(back)
    np.testing.assert_allclose(
        read_points("--points", path).points, found.points, atol=1e-5
    )
    assert len(back) == len(found.content(found.points))


def test_faces_and_data_of_a_surface_are_kept(tmp_path):
    import nibabel as nib

    path = tmp_path / "a.gii"
    path.write_bytes(gifti_file())
    found = read_points("--points", path)
    path.write_bytes(found.content(found.points + 1))
    arrays = nib.load(path).darrays
    np.testing.assert_allclose(arrays[0].data, RAS + np.array([-1, -1, 1]), atol=1e-5)
    np.testing.assert_array_equal(arrays[1].data, FACES)
    np.testing.assert_array_equal(arrays[2].data, 1)


def test_itk_reads_the_mesh_written(tmp_path):
    import itk

    path = tmp_path / "a.vtk"
    path.write_bytes(vtk_file(False))
    found = read_points("--points", path)
    path.write_bytes(found.content(found.points + 1))
    mesh = itk.meshread(str(path))
    assert mesh.GetNumberOfPoints() == 4
    assert mesh.GetNumberOfCells() == 2
    np.testing.assert_allclose(list(mesh.GetPoint(2)), POINTS[2] + 1, atol=1e-5)


def test_normals_of_a_moved_stl_follow_its_corners(tmp_path):
    for binary in (True, False):
        path = tmp_path / "a.stl"
        path.write_bytes(stl_file(binary))
        found = read_points("--points", path)
        turned = found.points @ np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
        data = found.content(turned)
        normals = meshes.normals_of(turned.reshape(-1, 3, 3))
        if binary:
            read = np.frombuffer(data, meshes.FACET, 2, 84)["normal"]
        else:
            lines = [x for x in data.decode().splitlines() if "normal" in x]
            read = [[float(w) for w in x.split()[2:]] for x in lines]
        np.testing.assert_allclose(read, normals, atol=1e-5)


def test_two_dimensional_tables(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x,y\n1,2\n\n3,4\n")
    found = read_points("--points", path)
    assert found.points.tolist() == [[1, 2], [3, 4]]
    assert (
        found.content(found.points + 1)
        == b"x,y\n2.000000,3.000000\n4.000000,5.000000\n"
    )


BROKEN = {
    "no table": (".csv", b"i,j,k\n1,2,3\n", "must begin with the line x,y,z"),
    "short row": (".csv", b"x,y,z,n\n1,2,3\n", "3 finite numbers"),
    "not a number": (".csv", b"x,y,z\n1,2,nan\n", "finite numbers"),
    "bytes": (".csv", b"\xff\xfe\x00", "cannot be read as text"),
    "voxel indices": (".fcsv", fcsv_file("IJK", POINTS), "coordinates in IJK"),
    "no json": (".mrk.json", b"{", "not a complete"),
    "no markups": (".mrk.json", b"{}", "not a complete"),
    "no vtk": (".vtk", b"hello", "not a legacy .vtk file"),
    "cut vtk": (".vtk", vtk_file(True)[:110], "not a complete .vtk"),
    "cut text": (".vtk", vtk_file(False)[:110], "vtk"),
    "no ply": (".ply", b"hello", "not a .ply file"),
    "cut ply": (".ply", ply_file("binary_little_endian")[:250], "not a complete .ply"),
    "cut stl": (".stl", stl_file(True)[:-20], "truncated"),
    "no stl": (".stl", b"hello", "truncated, or not an .stl"),
    "no gifti": (".gii", b"hello", "not a complete GIFTI"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_sentence(name, tmp_path):
    ending, data, words = BROKEN[name]
    path = tmp_path / f"bad{ending}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        read_points("--points", path)
    assert str(caught.value).startswith(f"--points: {path}")


def test_what_is_no_such_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must end in"):
        read_points("--points", tmp_path / "a.dae")
    for ending in FORMATS:
        with pytest.raises(ValueError, match="does not exist"):
            read_points("--points", tmp_path / f"a{ending}")


def test_gifti_without_nibabel_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nibabel", None)
    path = tmp_path / "a.gii"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"pip install icon_nephi\[meshes\]"):
        read_points("--points", path)
