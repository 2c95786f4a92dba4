"""The commands: what they write, and how they refuse."""

import csv
import subprocess
import sys

import itk
import numpy as np
import pytest
import torch

from icon_nephi import cli
from icon_nephi.io import image_files, itk_images, itk_transforms
from icon_nephi.io.image_input import voxel_geometry
from icon_nephi.registration.result import Registration, load
from tests.commands.command_files import (
    PLACE_A,
    PLACE_B,
    SIZE_A,
    SIZE_B,
    pair,
    refused,
    result,
    spoil,
    write_points,
)
from tests.small_fits import rows_in, small_fit


def read_points(path):
    with path.open() as file:
        header, *rows = csv.reader(file)
    assert header == ["x", "y", "z"]
    return np.array(rows, dtype=float)


def test_register_writes_what_is_asked_for(folder, capsys):
    out = folder.path / "out"
    flags = pair(
        transform_out="out/T.hdf5",
        inverse_transform_out="out/I.h5",
        warped_moving_out="out/warped.nii.gz",
        save="out/pair.nephi",
        fixed_mask="fixed_mask.nrrd",
        moving_mask="moving_mask.nrrd",
        fixed_segmentation="fixed_labels.nrrd",
        moving_segmentation="moving_labels.nrrd",
        fixed_modality="ct",
        moving_modality="mri",
        seed=3,
        time_limit=9,
    )
    cli.register([*flags, "--no_affine", "--mass_preserving"])
    names = ["I.h5", "T.hdf5", "pair.nephi", "warped.nii.gz"]
    assert sorted(p.name for p in out.iterdir()) == names
    text = capsys.readouterr()
    assert "folds" in text.out
    assert "inverse consistency" in text.out
    assert "affine start is doubtful" in text.err
    assert folder.options["seed"] == 3
    assert folder.options["time_limit"] == 9
    assert not folder.options["affine"]
    assert folder.options["mass_preserving"]
    assert folder.images[0].mask.shape == (1, 1, *SIZE_A)
    assert folder.images[0].labels.shape == (1, 1, *SIZE_A)
    assert folder.images[1].labels.max() > 0
    warped = itk.imread(str(out / "warped.nii.gz"))
    again = itk_images.geometry_of(warped)
    np.testing.assert_allclose(
        again.unit_to_physical(), PLACE_B.unit_to_physical(), atol=1e-3
    )
    saved = load(out / "pair.nephi")
    points = rows_in(PLACE_B, 20, np.random.default_rng(0))
    expected = result().transform_points(points)
    np.testing.assert_allclose(saved.transform_points(points), expected)
    forward, back = (
        itk_transforms.read_transform("T", out / n) for n in ("T.hdf5", "I.h5")
    )
    there = np.array([tuple(forward.TransformPoint(p)) for p in points.tolist()])
    np.testing.assert_allclose(there, expected, atol=1e-3)
    here = np.array([tuple(back.TransformPoint(p)) for p in expected.tolist()])
    backward = saved.transform_points(expected, "moving_to_fixed")
    np.testing.assert_allclose(here, backward, atol=0.1)  # kinks lie near the border


def test_quiet_is_quiet(folder, capsys):
    cli.register([*pair(save="out/pair.nephi"), "--quiet"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("transform", ["pair.nephi", "T.hdf5"])
def test_warp_moves_points_labels_and_images(folder, transform, capsys):
    cli.register([*pair(save="pair.nephi", transform_out="T.hdf5"), "--quiet"])
    points = rows_in(PLACE_B, 20, np.random.default_rng(0))
    write_points(folder.path / "points.csv", points)
    common = ["--transform", transform]
    cli.warp([*common, "--points", "points.csv", "--out", "moved.csv"])
    moved = read_points(folder.path / "moved.csv")
    np.testing.assert_allclose(moved, result().transform_points(points), atol=2e-3)
    for what in ("labels", "image"):
        name = "moving_labels.nrrd" if what == "labels" else "moving.nrrd"
        cli.warp(
            [
                *common,
                *(f"--{what}", name, "--reference", "fixed.nrrd"),
                *("--out", f"{what}.nii.gz"),
            ]
        )
        warped = itk.imread(str(folder.path / f"{what}.nii.gz"))
        moving = itk.imread(str(folder.path / name))
        ours = (
            result().warp_labels(moving) if what == "labels" else result().warp(moving)
        )
        theirs = np.asarray(warped)
        same = np.isclose(np.asarray(ours), theirs, atol=0.5)
        assert theirs.shape == SIZE_B
        assert theirs.dtype == (np.uint8 if what == "labels" else np.float32)
        # ITK stops a little earlier or later at the border of the image.
        assert same.mean() > (0.99 if transform == "pair.nephi" else 0.9)
    assert "out: " in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["linear", "cubic", "nearest", "onehot"])
def test_both_files_of_a_registration_warp_to_one_picture(folder, mode):
    cli.register([*pair(save="p.nephi", transform_out="T.h5"), "--quiet"])
    what = "image" if mode in ("linear", "cubic") else "labels"
    # Everything is far above 0, and the border is not the least there is.
    generator = np.random.default_rng(0)
    values = generator.integers(200, 250, SIZE_A).astype(np.uint8)
    values[4, 5, 6] = 100
    itk.imwrite(itk_images.image_of(values, PLACE_A), "bright.nrrd")
    pictures = []
    for transform in ("p.nephi", "T.h5"):
        flags = ["--transform", transform, "--reference", "fixed.nrrd", "--quiet"]
        flags += [f"--{what}", "bright.nrrd", "--interpolation", mode]
        cli.warp([*flags, "--out", "warped.nrrd"])
        pictures.append(itk.array_from_image(itk.imread("warped.nrrd")))
    beyond = [picture == (100 if what == "image" else 0) for picture in pictures]
    assert 0.05 < beyond[0].mean() < 0.5
    assert np.mean(beyond[0] != beyond[1]) < 0.01
    # The two maps differ by 0.001 mm: a label, or what is just outside, may turn.
    assert np.mean(np.isclose(*pictures, atol=0.5)) > 0.99


def test_warp_the_other_way(folder):
    result().save(folder.path / "pair.nephi")
    common = ["--transform", "pair.nephi", "--inverse"]
    cli.warp([*common, "--image", "fixed.nrrd", "--out", "back.nrrd"])
    back = itk.imread(str(folder.path / "back.nrrd"))
    assert np.asarray(back).shape == SIZE_A
    points = rows_in(PLACE_A, 5, np.random.default_rng(0))
    write_points(folder.path / "points.csv", points)
    cli.warp([*common, "--points", "points.csv", "--out", "moved.csv"])
    expected = result().transform_points(points, "moving_to_fixed")
    np.testing.assert_allclose(
        read_points(folder.path / "moved.csv"), expected, atol=1e-5
    )


OUT = {"save": "out/pair.nephi", "transform_out": "out/T.h5"}
BAD_PAIRS = {
    "constant": ({"fixed": "constant.nrrd"}, "--fixed is constant"),
    "NaN": ({"moving": "nan.nrrd"}, "--moving has 1 NaN"),
    "4D": ({"fixed": "4d.nrrd"}, "4D"),
    "thin": ({"fixed": "thin.nrrd"}, "register in 2D"),
    "2D and 3D": ({"fixed": "flat.nrrd"}, "two 2D or two 3D"),
    "vector": ({"fixed": "vector.nrrd"}, "3 numbers per voxel"),
    "missing": ({"fixed": "none.nrrd"}, "none.nrrd does not exist"),
    "folder": ({"fixed": "out"}, "is a folder"),
    "truncated": ({"fixed": "cut.nii.gz"}, "--fixed: cut.nii.gz is truncated"),
    "no image": ({"fixed": "text.nii"}, "cannot be read as an image"),
    "zero spacing": ({"fixed": "zero.nrrd"}, "--fixed: zero.nrrd"),
    "empty mask": ({"fixed_mask": "empty.nrrd"}, "--fixed_mask is empty"),
    "far mask": ({"fixed_mask": "far.nrrd"}, "--fixed_mask and --fixed do not overlap"),
    "device": ({"device": "nowhere"}, "--device: 'nowhere' is not available"),
    "time": ({"time_limit": -1}, "--time_limit must be positive"),
    "modality": ({"fixed_modality": "pet"}, "--fixed_modality"),
    "seed": ({"seed": "x"}, "--seed"),
    "no moving": ({"moving": None}, "--moving"),
    "ending": ({"transform_out": "out/T.mat"}, "must end in"),
    "image ending": ({"warped_moving_out": "out/w.mhd"}, "must end in"),
    "no folder": ({"save": "nowhere/p.nephi"}, "nowhere does not exist"),
    "no output": ({"save": None, "transform_out": None}, "nothing to write"),
    "same output": ({"inverse_transform_out": "out/T.h5"}, "same path"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_register_refuses(name, folder, capfd):
    spoil(folder.path)
    flags, words = BAD_PAIRS[name]
    refused(cli.register, pair(**(OUT | flags)), words, folder.path, capfd)


BAD_WARPS = {
    "no transform": (
        "--transform no.nephi --image moving.nrrd --out o.nrrd",
        "no.nephi",
    ),
    "no file": ("--transform no.h5 --points points.csv --out o.csv", "no.h5"),
    "kind": ("--transform none.png --image moving.nrrd --out o.nrrd", "must end in"),
    "no field": (
        "--transform fixed.nrrd --image moving.nrrd --out o.nrrd",
        "is no displacement field",
    ),
    "broken": ("--transform bad.nephi --image moving.nrrd --out o.nrrd", "bad.nephi"),
    "broken ITK": ("--transform bad.h5 --points points.csv --out o.csv", "bad.h5"),
    "tensors": ("--transform tensor.nephi --image moving.nrrd --out o.nrrd", "tensors"),
    "columns": ("--transform pair.nephi --points wrong.csv --out o.csv", "x,y,z"),
    "numbers": (
        "--transform pair.nephi --points words.csv --out o.csv",
        "finite numbers",
    ),
    "ragged": (
        "--transform pair.nephi --points ragged.csv --out o.csv",
        "3 finite numbers",
    ),
    "2D points": (
        "--transform pair.nephi --points flat.csv --out o.csv",
        "points must be",
    ),
    "no points": (
        "--transform pair.nephi --points no.csv --out o.csv",
        "does not exist",
    ),
    "binary": ("--transform pair.nephi --points fixed.nrrd --out o.csv", "--points"),
    "image": ("--transform pair.nephi --image no.nrrd --out o.nrrd", "does not exist"),
    "2D image": ("--transform pair.nephi --image flat.nrrd --out o.nrrd", "2D"),
    "ending": ("--transform pair.nephi --image moving.nrrd --out o.csv", "must end in"),
    "csv": ("--transform pair.nephi --points points.csv --out o.nrrd", "must end in"),
    "two": (
        "--transform pair.nephi --points p --image i --out o.nrrd",
        "1 names for 2",
    ),
    "none": ("--transform pair.nephi --out o.nrrd", "required"),
    "reference": ("--transform T.h5 --image moving.nrrd --out o.nrrd", "--reference"),
    "inverse": (
        "--transform T.h5 --inverse --points points.csv --out o.csv",
        "--inverse",
    ),
}


@pytest.mark.parametrize("name", BAD_WARPS)
def test_warp_refuses(name, folder, capfd):
    path = folder.path
    spoil(path)
    result().save(path / "pair.nephi")
    place = voxel_geometry((8, 8, 8))
    fit = small_fit(3, torch.eye(4, dtype=torch.float64))
    Registration(fit, place, place, itk=False).save(path / "tensor.nephi")
    (path / "bad.nephi").write_bytes(b"no")
    (path / "bad.h5").write_bytes(b"no")
    itk.transformwrite(itk.AffineTransform[itk.D, 3].New(), str(path / "T.h5"))
    write_points(path / "points.csv", [[1, 2, 3]])
    write_points(path / "wrong.csv", [[1, 2, 3]], "i,j,k")
    write_points(path / "words.csv", [["a", "b", "c"]])
    write_points(path / "ragged.csv", [[1, 2, 3], [4, 5]])
    write_points(path / "flat.csv", [[1, 2]], "x,y")
    arguments, words = BAD_WARPS[name]
    refused(cli.warp, arguments.split(), words, path, capfd)


def test_a_failure_while_writing_leaves_nothing(folder, monkeypatch, capfd):
    monkeypatch.setattr(Registration, "save", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.register(pair(**OUT))
    assert list(folder.path.joinpath("out").iterdir()) == []


@pytest.mark.parametrize("command", ["register", "warp", "jacobian", "info", "compare"])
def test_the_help_has_examples(command):
    code = f"from icon_nephi.cli import {command}; {command}(['--help'])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8"
    )
    assert run.returncode == 0, run.stderr
    assert "examples:" in run.stdout
    assert "fixed image" in run.stdout


@pytest.fixture
def tiny_lung(monkeypatch):
    """A network in place of the published ones, which cannot be had here."""
    import icon_registration as icon

    from icon_nephi import pretrained_models
    from icon_nephi.swap import add_neural_residual
    from tests.maps.problems import voxels

    asked = []

    def init_network(task, pretrained=True, *, neural, weights):
        asked.append((task, neural, weights))
        torch.manual_seed(0)
        net = icon.losses.GradientICONSparse(voxels(3), icon.LNCC(sigma=2), 1.5)
        net.assign_identity_map([1, 1, 16, 14, 12])
        return add_neural_residual(net)

    monkeypatch.setattr(pretrained_models, "init_network", init_network)
    return asked


def test_register_through_a_model(folder, tiny_lung):
    weights = folder.path / "w.trch"
    weights.touch()
    flags = {"model": "lung", "network_weights": "w.trch", "io_iterations": 3}
    flags |= {"transform_out": "out/T.hdf5", "inverse_transform_out": "out/I.h5"}
    flags |= {"warped_moving_out": "out/w.nrrd", "moving_mask": "moving_mask.nrrd"}
    cli.register([*pair(**flags), "--quiet"])
    assert [(task, neural, str(file)) for task, neural, file in tiny_lung] == [
        ("lung", "residual", "w.trch")
    ]
    for name in ("T.hdf5", "I.h5"):
        transform = itk_transforms.read_transform("T", folder.path / "out" / name)
        assert transform.GetNumberOfTransforms() == 3
    warped = image_files.read_image("w", folder.path / "out" / "w.nrrd")
    assert itk_images.geometry_of(warped).size == PLACE_B.size


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"model": "liver"}, "invalid choice: 'liver'"),
        ({"model": "lung", "save": "out/x.nephi"}, "--save holds what is registered"),
        ({"network_weights": "w.trch"}, "--network_weights needs --model"),
        (
            {"model": "lung", "network_weights": "missing.trch"},
            "--network_weights: missing.trch does not exist",
        ),
        ({"model": "unigradicon"}, "needs --moving_modality ct or mri"),
        ({"model": "lung", "io_iterations": -3}, "--io_iterations"),
    ],
)
def test_model_flags_that_cannot_be(folder, capsys, tiny_lung, flags, complaint):
    with pytest.raises(SystemExit) as stopped:
        cli.register(pair(transform_out="out/T.h5", **flags))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
    assert not list((folder.path / "out").iterdir())
