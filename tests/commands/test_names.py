"""Names that would do harm, and forty more misuses: a sentence, and nothing written."""

import os
import shutil

import itk
import nibabel as nib
import numpy as np
import pytest

from icon_nephi import cli
from icon_nephi.commands.outputs import check_outputs
from icon_nephi.io import itk_images
from icon_nephi.io.atomic import part_of, written_whole
from icon_nephi.space.frames import Geometry
from tests.commands.command_files import PLACE_A, PLACE_B, result, write_points

LONG = "a" * 251 + ".nrrd"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("names")
    generator = np.random.default_rng(0)

    def image(name, values, place):
        itk.imwrite(itk_images.image_of(values, place), str(path / name))

    for name, place in (("moving", PLACE_A), ("fixed", PLACE_B)):
        image(f"{name}.nrrd", generator.normal(size=place.size), place)
    labels = generator.integers(0, 4, PLACE_A.size).astype(np.uint8)
    image("labels.nrrd", labels, PLACE_A)
    flat = Geometry((9, 8), (1.0, 1.0), (3.0, 4.0), ((1.0, 0.0), (0.0, 1.0)))
    image("flat.nrrd", np.zeros(flat.size, np.uint8), flat)
    tilt = np.array(PLACE_B.direction) @ [[1, 0, 0], [0, 1, 0.3], [0, 0, 1]]
    tilt = tuple(map(tuple, (tilt / np.linalg.norm(tilt, axis=0)).tolist()))
    tilted = Geometry(PLACE_B.size, PLACE_B.spacing, PLACE_B.origin, tilt)
    image("tilted.nrrd", np.zeros(PLACE_B.size, np.float32), tilted)
    field = np.zeros((*PLACE_B.size, 3), np.float32)
    image("field.nii.gz", field, PLACE_B)
    field[3, 3, 3, 0] = np.nan
    image("hole.nrrd", field, PLACE_B)
    nib.save(nib.Nifti1Pair(np.ones((4, 5, 6), "i2"), np.eye(4)), path / "pair.img")
    result().save(path / "pair.nephi")
    itk.transformwrite(itk.AffineTransform[itk.D, 3].New(), str(path / "T.h5"))
    np.savetxt(path / "plain.mat", np.eye(4))
    np.savetxt(path / "flat.mat", np.eye(3))
    (path / "empty.mat").touch()
    (path / "words.txt").write_text("1 0 0\n0 1\nx\n")
    write_points(path / "p.csv", [[1, 2, 3], [4, 5, 6]])
    write_points(path / "q.csv", [[1, 2]], "x,y")
    write_points(path / "none.csv", [])
    (path / "semicolons.csv").write_text("x;y;z\n1;2;3\n")
    (path / "no_head.csv").write_text("1,2,3\n")
    (path / "twice.csv").write_text("x,y,z,x\n1,2,3,4\n")
    (path / "index.fcsv").write_text("# CoordinateSystem = IJK\nn,1,2,3\n")
    (path / "empty.stl").write_text("solid a\nendsolid a\n")
    (path / "cut.obj").write_text("v 1 2\n")
    (path / "faces.obj").write_text("v 1 2 3\nf 1 2 3\n")
    (path / "grid.vtp").write_text('<VTKFile type="ImageData"></VTKFile>')
    (path / "empty").mkdir()
    (path / "out").mkdir()
    (path / "read_only.nrrd").touch(mode=0o444)
    (path / "into_nowhere.nrrd").symlink_to(path / "none" / "x.nrrd")
    return path


def refused(command, flags, words, folder, capfd):
    before = {p: p.lstat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        command(flags.split())
    assert stop.value.code == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert words in said.err
    assert {p: p.lstat().st_mtime_ns for p in folder.rglob("*")} == before


I = "--transform pair.nephi --image moving.nrrd "  # noqa: E741
L = "--transform pair.nephi --labels labels.nrrd "
P = "--transform pair.nephi --points "
REGISTER = "--fixed fixed.nrrd --moving moving.nrrd "
WARPS = {
    "nothing to move": ("--transform pair.nephi --out o.nrrd", "is required"),
    "no transform": ("--image moving.nrrd --out o.nrrd", "--transform"),
    "no name": (I, "either --out"),
    "both kinds of names": (I + "--out o.nrrd --out_dir out", "either --out"),
    "too few names": (I + "labels.nrrd --out o.nrrd", "1 names for 2 files"),
    "too many names": (I + "--out o.nrrd p.nrrd", "2 names for 1 files"),
    "one name twice": (I + "labels.nrrd --out o.nrrd o.nrrd", "the same path"),
    "one name by two ways": (I + "labels.nrrd --out o.nrrd out/../o.nrrd", "same path"),
    "no folder": (I + "--out_dir none", "is not a folder"),
    "its own folder": (I + "--out_dir .", "also an input"),
    "a long name": (I + f"--out {LONG}", "shorten it"),
    "an ending alone": (I + "--out .nrrd", "nothing before its ending"),
    "a link into nowhere": (I + "--out into_nowhere.nrrd", "whose folder does not"),
    "read-only": (I + "--out read_only.nrrd", "read-only"),
    "no image": (
        "--transform pair.nephi --image x.nrrd --out o.nrrd",
        "does not exist",
    ),
    "no reference": (I + "--reference x.nrrd --out o.nrrd", "--reference: x.nrrd does"),
    "no such transform": ("--transform x.h5 --image moving.nrrd --out o.nrrd", "x.h5"),
    "a folder as transform": ("--transform out --points p.csv --out o.csv", "must end"),
    "an image as transform": (
        "--transform fixed.nrrd --points p.csv --out o.csv",
        "no displacement field",
    ),
    "a field with holes": (
        "--transform hole.nrrd --points p.csv --out o.csv",
        "not finite",
    ),
    "whose numbers": (
        "--transform plain.mat --points p.csv --out o.csv",
        "--affine ras",
    ),
    "flirt alone": (
        "--transform plain.mat --affine fsl --points p.csv --out o.csv",
        "--moving",
    ),
    "an affine in 2D": (
        "--transform flat.mat --affine ras --points p.csv --out o.csv",
        "points must be 2D",
    ),
    "an empty affine": (
        "--transform empty.mat --points p.csv --out o.csv",
        "empty.mat",
    ),
    "words as an affine": (
        "--transform words.txt --points p.csv --out o.csv",
        "words.txt",
    ),
    "a chain of two dimensions": (
        "--transform pair.nephi flat.mat --affine ras --points p.csv --out o.csv",
        "one transform is 2D",
    ),
    "a chain without a grid": (
        "--transform T.h5 pair.nephi --image moving.nrrd --out o.nrrd",
        "--reference is needed",
    ),
    "errors of a chain": (
        "--transform pair.nephi pair.nephi --points p.csv --errors --out o.csv",
        "one .nephi",
    ),
    "outside points": (P + "p.csv --outside 3 --out o.csv", "--outside is for"),
    "half a label": (L + "--outside 0.5 --out o.nrrd", "outside is 0.5"),
    "a label too large": (L + "--outside 300 --out o.nrrd", "outside is 300"),
    "a picture of a volume": (I + "--out o.png", "cannot hold"),
    "a volume as tiff": (I + "--out o.tif", "cannot hold"),
    "a tilted grid": (I + "--reference tilted.nrrd --out o.nii.gz", "at right angles"),
    "a flat reference": (I + "--reference flat.nrrd --out o.nrrd", "2D"),
    "an empty folder": (
        "--transform pair.nephi --image empty --out o.nrrd",
        "without DICOM",
    ),
    "a table without rows": (P + "none.csv --out o.csv", "holds no points"),
    "a mesh without triangles": (P + "empty.stl --out o.stl", "holds no points"),
    "semicolons": (P + "semicolons.csv --out o.csv", "by commas"),
    "no header": (P + "no_head.csv --out o.csv", "must begin with"),
    "a column twice": (P + "twice.csv --out o.csv", "must begin with"),
    "voxel indices": (P + "index.fcsv --out o.fcsv", "coordinates in IJK"),
    "a cut mesh": (P + "cut.obj --out o.obj", "cut.obj"),
    "faces of nothing": (P + "faces.obj --out o.obj", "does not hold"),
    "another VTK": (P + "grid.vtp --out o.vtp", "PolyData"),
    "points in 2D": (P + "q.csv --out o.csv", "points must be 3D"),
}
OTHERS = {
    "a label map as field": (cli.jacobian, "--transform labels.nrrd --out o.nrrd"),
    "numbers without a frame": (cli.info, "plain.mat"),
    "a tilted Jacobian": (
        cli.jacobian,
        "--transform pair.nephi --reference tilted.nrrd --out o.nii",
    ),
    "a tilted result": (
        cli.register,
        "--fixed tilted.nrrd --moving moving.nrrd --warped_moving_out o.nii.gz",
    ),
    "a tilted field": (
        cli.register,
        "--fixed moving.nrrd --moving tilted.nrrd --inverse_displacement_out o.nii.gz",
    ),
    "a picture": (cli.register, REGISTER + "--warped_moving_out o.tif"),
    "a long name": (cli.register, REGISTER + f"--warped_moving_out {LONG}"),
    "one path twice": (cli.register, REGISTER + "--save o.nephi --report out/../o.html "
    "--json out/../o.json --transform_out o.h5 --inverse_transform_out out/../o.h5"),
}  # fmt: skip


@pytest.mark.parametrize("name", WARPS)
def test_nephi_warp(name, made, monkeypatch, capfd):
    monkeypatch.chdir(made)
    flags, words = WARPS[name]
    refused(cli.warp, flags, words, made, capfd)


@pytest.mark.parametrize("name", OTHERS)
def test_others(name, made, monkeypatch, capfd):
    monkeypatch.chdir(made)
    command, flags = OTHERS[name]
    refused(command, flags, f"nephi-{command.__name__}: ", made, capfd)


OVER = {
    "image": (cli.warp, I + "--out {}", "moving.nrrd"),
    "labels": (cli.warp, L + "--out {}", "labels.nrrd"),
    "points": (cli.warp, P + "p.csv --out {}", "p.csv"),
    "reference": (cli.warp, I + "--reference fixed.nrrd --out {}", "fixed.nrrd"),
    "field": (cli.warp, "--transform field.nii.gz --image moving.nrrd --reference "
              "fixed.nrrd --out {}", "field.nii.gz"),
    "jacobian": (
        cli.jacobian,
        "--transform T.h5 --reference fixed.nrrd --out {}",
        "fixed.nrrd",
    ),
    "register": (cli.register, REGISTER + "--warped_moving_out {}", "fixed.nrrd"),
    "landmarks": (
        cli.register,
        REGISTER + "--labels_fixed labels.nrrd --labels_moving labels.nrrd "
        "--jacobian_out {}",
        "labels.nrrd",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OVER)
@pytest.mark.parametrize("way", ["itself", "symlink", "hard link", "another path"])
def test_no_input_is_written_over(name, way, made, monkeypatch, capfd):
    monkeypatch.chdir(made)
    command, flags, read = OVER[name]
    ending = read[read.index(".") :]
    path = {"itself": read, "another path": f"out/../{read}"}.get(way, f"out/l{ending}")
    if way == "symlink":
        os.symlink(made / read, path)
    elif way == "hard link":
        os.link(made / read, path)
    try:
        refused(command, flags.format(path), "also an input", made, capfd)
    finally:
        if "link" in way:
            os.unlink(path)


def test_what_belongs_to_an_input_is_not_written_over(made):
    for name, other in (("pair.hdr", "pair.img"), ("empty", "empty/x.nrrd")):
        if other.startswith("empty"):
            (made / other).touch()
        with pytest.raises(ValueError, match="also an input"):
            check_outputs({"out": (made / other, ("",))}, [made / name])
    (made / "empty/x.nrrd").unlink()


def test_names_that_are_odd_but_possible(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("moving.nrrd", "pair.nephi"):
        shutil.copy(made / name, name)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "sha").write_text("old")
    (tmp_path / "link.nrrd").symlink_to("store/sha")
    names = ["W.NII.GZ", "sub-01.img.nii.gz", "b" * 250 + ".nrrd", "link.nrrd"]
    names += ["ü %d [x] 日本.nii.gz", "-dash.nrrd"]
    for name in names:
        cli.warp(
            ["--transform", "pair.nephi", "--image", "moving.nrrd", f"--out=./{name}"]
        )
    assert (tmp_path / "W.NII.GZ").read_bytes()[:2] == b"\x1f\x8b"
    assert (tmp_path / "link.nrrd").is_symlink()
    assert (tmp_path / "store" / "sha").read_bytes().startswith(b"NRRD")
    found = {p.name for p in tmp_path.iterdir()}
    assert found == {*names, "moving.nrrd", "pair.nephi", "store"}


def test_a_file_keeps_its_permissions_and_what_is_read_only_stays(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o640)
    with written_whole(path) as (part,):
        assert len(part.name) < 255
        part.write_text("new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o640)
    path.chmod(0o400)
    with pytest.raises(PermissionError, match="read-only"), written_whole(path):
        pass
    assert path.read_text() == "new"
    long = part_of(tmp_path / ("ü" * 110 + ".nii.gz"))
    assert len(os.fsencode(long.name)) < 255
    assert long.name.endswith(".nii.gz")
