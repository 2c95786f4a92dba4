"""What people get wrong: one sentence, exit code 2, nothing half-written."""

import errno
import os

import itk
import numpy as np
import pytest

from icon_nephi import cli
from icon_nephi.io import itk_images, itk_modules
from icon_nephi.registration.result import Registration
from tests.commands.command_files import (
    PLACE_B,
    SIZE_B,
    make_folder,
    pair,
    refused,
    result,
    spoil,
    write_points,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = make_folder(tmp_path, monkeypatch)
    spoil(tmp_path)
    result().save(tmp_path / "pair.nephi")
    whole = (tmp_path / "pair.nephi").read_bytes()
    (tmp_path / "cut.nephi").write_bytes(whole[: len(whole) // 2])
    itk.transformwrite(itk.AffineTransform[itk.D, 3].New(), str(tmp_path / "T.h5"))
    itk.transformwrite(itk.AffineTransform[itk.D, 2].New(), str(tmp_path / "T2.h5"))
    write_points(tmp_path / "points.csv", [[1, 2, 3], [4, 5, 6]])
    write_points(tmp_path / "one.csv", [[1, 2, 3]])
    write_points(tmp_path / "flat.csv", [[1, 2]], "x,y")
    write_points(tmp_path / "none.csv", [])
    (tmp_path / "mesh.vtk").write_text("not a mesh\n")
    labels = np.random.default_rng(0).uniform(0, 4, SIZE_B).astype(np.float32)
    colours = np.zeros((4, 5, 6, 3), np.uint8)
    kind = itk.Image[itk.RGBPixel[itk.UC], 3]
    itk.imwrite(
        itk.image_from_array(colours, ttype=(kind,)), str(tmp_path / "rgb.nrrd")
    )
    for name, values in (
        ("shares.nrrd", labels),
        ("other.nrrd", np.full(SIZE_B, 9, np.uint8)),
    ):
        image = itk_images.image_of(values, PLACE_B)
        itk.imwrite(image, str(tmp_path / name))
    return made


OUT = {"save": "out/pair.nephi", "transform_out": "out/T.h5"}
REGISTER = {
    "the same file twice": ({"moving": "fixed.nrrd"}, "are the same file"),
    "output over an input": ({"warped_moving_out": "moving.nrrd"}, "also an input"),
    "image and mask swapped": (
        {"fixed": "fixed_mask.nrrd", "fixed_mask": "fixed.nrrd"},
        "were image and mask swapped?",
    ),
    "a transform for an image": ({"fixed": "T.h5"}, "cannot be read as an image"),
    "a CSV for an image": ({"moving": "points.csv"}, "cannot be read as an image"),
    "a colour image": ({"fixed": "rgb.nrrd"}, "3 numbers per voxel"),
    "a mask of NaN": ({"fixed_mask": "nan.nrrd"}, "does not look like a mask"),
    "a mask elsewhere": ({"fixed_mask": "far.nrrd"}, "do not overlap"),
    "2D with 3D": ({"moving": "flat.nrrd"}, "two 2D or two 3D"),
    "no time": ({"time_limit": 0}, "--time_limit must be positive"),
    "no seed": ({"seeds": 0}, "--seeds must be at least 1"),
    "no number": ({"time_limit": "soon"}, "--time_limit"),
    "no such device": ({"device": "cuda:99"}, "--device: 'cuda:99' is not available"),
    "no such preset": ({"preset": "best"}, "--preset"),
    "no such similarity": ({"similarity": "ssd"}, "--similarity"),
    "half a flag": (
        {"sav": "out/p.nephi"},
        "unrecognized arguments: --sav out/p.nephi (did you mean --save?)",
    ),
    "a flag's end": ({"moving_out": "w.nrrd"}, "did you mean --warped_moving_out?"),
    "a typing error": ({"persets": "fast"}, "did you mean --preset"),
    "no flag": ({"xyz": 1}, "unrecognized arguments: --xyz 1; see"),
    "report as PDF": ({"report": "out/r.pdf"}, "must end in .html"),
    "summary as text": ({"json": "out/s.txt"}, "must end in .json"),
    "field as tiff": ({"displacement_out": "out/u.tif"}, "must end in .nii.gz"),
    "a folder as output": ({"save": "out"}, "must end in .nephi"),
    "one side of landmarks": ({"landmarks_fixed": "points.csv"}, "belong together"),
    "landmarks of other counts": (
        {"landmarks_fixed": "points.csv", "landmarks_moving": "one.csv"},
        "must correspond row by row",
    ),
    "no landmarks": (
        {"landmarks_fixed": "none.csv", "landmarks_moving": "none.csv"},
        "has 0 points",
    ),
    "landmarks in 2D": (
        {"landmarks_fixed": "flat.csv", "landmarks_moving": "flat.csv"},
        "--landmarks_fixed has 2 coordinates",
    ),
    "labels as shares": (
        {"labels_fixed": "shares.nrrd", "labels_moving": "moving_labels.nrrd"},
        "not whole",
    ),
    "no common label": (
        {"labels_fixed": "other.nrrd", "labels_moving": "moving_labels.nrrd"},
        "no label above 0 in common",
    ),
    "labels in 2D": (
        {"labels_fixed": "flat.nrrd", "labels_moving": "flat.nrrd"},
        "--labels_fixed is 2D",
    ),
    "one segmentation": (
        {"fixed_segmentation": "fixed_labels.nrrd"},
        "--fixed_segmentation and --moving_segmentation belong together",
    ),
    "no common segmentation": (
        {
            "fixed_segmentation": "other.nrrd",
            "moving_segmentation": "moving_labels.nrrd",
        },
        "no label above 0 in common",
    ),
    "report of a model": (
        {"model": "lung", "save": None, "report": "out/r.html"},
        "--report",
    ),
    "preset of a model": (
        {"model": "lung", "save": None, "preset": "fast"},
        "--preset",
    ),
}
LISTS = {
    "window upside down": ("--fixed_window 5 1", "LOW below HIGH"),
    "window beyond": ("--moving_window 90000 90001", "leaves nothing of --moving"),
    "quantiles in percent": ("--quantiles 1 99", "shares from 0 to 1"),
    "one end only": ("--fixed_window 5", "--fixed_window"),
    "pairs without folder": ("--pairs points.csv", "belong together"),
}
OTHERS = {
    "a cut .nephi": (cli.warp, "--transform cut.nephi --points points.csv --out o.csv"),
    "labels as shares, warped": (
        cli.warp,
        "--transform pair.nephi --labels shares.nrrd --out o.nrrd",
    ),
    "errors of an ITK transform": (
        cli.warp,
        "--transform T.h5 --points points.csv --errors --out o.csv",
    ),
    "errors of an image": (
        cli.warp,
        "--transform pair.nephi --image fixed.nrrd --errors --out o.nrrd",
    ),
    "2D transform": (cli.warp, "--transform T2.h5 --points points.csv --out o.csv"),
    "2D transform, 3D image": (
        cli.warp,
        "--transform T2.h5 --image moving.nrrd --reference fixed.nrrd --out o.nrrd",
    ),
    "cubic labels": (
        cli.warp,
        "--transform pair.nephi --labels moving_labels.nrrd --interpolation cubic "
        "--out o.nrrd",
    ),
    "onehot image": (
        cli.warp,
        "--transform pair.nephi --image fixed.nrrd --interpolation onehot --out o.nrrd",
    ),
    "two ways": (
        cli.warp,
        "--transform pair.nephi --points points.csv --inverse --to fixed --out o.csv",
    ),
    "a way of an ITK file": (
        cli.warp,
        "--transform T.h5 --points points.csv --to fixed --out o.csv",
    ),
    "mesh to table": (cli.warp, "--transform pair.nephi --points mesh.vtk --out o.csv"),
    "no mesh": (cli.warp, "--transform pair.nephi --points mesh.vtk --out o.vtk"),
    "unknown mesh": (cli.warp, "--transform pair.nephi --points m.dae --out o.dae"),
    "image as points": (cli.warp, "--transform pair.nephi --points m.nrrd --out o.csv"),
    "no reference": (cli.jacobian, "--transform T.h5 --out o.nrrd"),
    "inverse of ITK": (
        cli.jacobian,
        "--transform T.h5 --reference fixed.nrrd --inverse --out o.nrrd",
    ),
    "log and tensor": (
        cli.jacobian,
        "--transform pair.nephi --log --tensor --out o.nrrd",
    ),
    "tensor as tiff": (cli.jacobian, "--transform pair.nephi --tensor --out o.tif"),
    "2D reference": (
        cli.jacobian,
        "--transform pair.nephi --reference flat.nrrd --out o.nrrd",
    ),
    "2D transform's Jacobian": (
        cli.jacobian,
        "--transform T2.h5 --reference fixed.nrrd --out o.nrrd",
    ),
    "info of a cut file": (cli.info, "cut.nephi"),
    "info of an image": (cli.info, "fixed.nrrd"),
    "info of nothing": (cli.info, "none.h5"),
    "info without a file": (cli.info, ""),
}


@pytest.mark.parametrize("name", REGISTER)
def test_register(name, folder, capfd):
    flags, words = REGISTER[name]
    refused(cli.register, pair(**(OUT | flags)), words, folder.path, capfd)


@pytest.mark.parametrize("name", LISTS)
def test_register_lists(name, folder, capfd):
    flags, words = LISTS[name]
    given = [*pair(**OUT), *flags.split()]
    refused(cli.register, given, words, folder.path, capfd)


@pytest.mark.parametrize("name", OTHERS)
def test_other_commands(name, folder, capfd):
    command, flags = OTHERS[name]
    refused(command, flags.split(), f"nephi-{command.__name__}: ", folder.path, capfd)


EVERYTHING = {
    **OUT,
    "inverse_transform_out": "out/I.h5",
    "warped_moving_out": "out/w.nii.gz",
    "displacement_out": "out/u.nii.gz",
    "jacobian_out": "out/j.nrrd",
    "json": "out/s.json",
}


@pytest.mark.parametrize("writer", ["write_voxels", "write_transforms", "save"])
@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_full_disk(writer, kind, folder, monkeypatch, capfd):
    def full(*arguments, **options):
        path = next(a for a in map(str, arguments[::-1]) if "out/" in a)
        with open(path, "wb") as file:
            file.write(b"the first part")
        if kind is OSError:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise RuntimeError("itk::ERROR: could not write")

    if writer == "save":
        if kind is RuntimeError:
            pytest.skip("only ITK says so")
        monkeypatch.setattr(Registration, "save", full)
    else:
        monkeypatch.setattr(itk_modules, writer, full)
    words = "No space left" if kind is OSError else "disk"
    refused(cli.register, [*pair(**EVERYTHING), "--quiet"], words, folder.path, capfd)
    assert not list((folder.path / "out").iterdir())


@pytest.mark.parametrize("command", ["register", "warp", "jacobian", "out_dir"])
def test_a_folder_that_cannot_be_written_to(command, folder, monkeypatch, capfd):
    monkeypatch.setattr(os, "access", lambda *_: False)
    start = ["--transform", "pair.nephi"]
    run, flags = {
        "register": (cli.register, pair(**OUT)),
        "warp": (cli.warp, [*start, "--points", "points.csv", "--out", "out/o.csv"]),
        "jacobian": (cli.jacobian, [*start, "--out", "out/o.nrrd"]),
        "out_dir": (cli.register, ["--pairs", "pairs.csv", "--out_dir", "out"]),
    }[command]
    refused(run, flags, "cannot be written to", folder.path, capfd)


def test_landmarks_outside_are_scored_with_a_warning(folder, capsys):
    write_points(folder.path / "far.csv", [[9e3, 0, 0]])
    flags = pair(landmarks_fixed="far.csv", landmarks_moving="far.csv", json="-")
    cli.register(flags)
    said = capsys.readouterr().err
    assert "1 of 1 landmarks lie outside the fixed image" in said


def test_being_stopped_is_no_traceback(folder, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Registration, "save", stop)
    with pytest.raises(SystemExit) as stopped:
        cli.register([*pair(save="out/p.nephi"), "--quiet"])
    assert stopped.value.code == 130
    said = "stopped by the user; what was not finished is not written"
    assert capsys.readouterr().err == f"nephi-register: {said}\n"
    assert not list((folder.path / "out").iterdir())
