"""Methods side by side: reading pairs, scoring maps, and the command."""

import csv
from functools import partial

import itk
import numpy as np
import pytest
import torch

from evaluation.accuracy.compare_voxel import learned, main, parser, write_phantoms
from evaluation.accuracy.voxel import levels_of, nested
from icon_nephi import cli
from icon_nephi.commands import methods
from icon_nephi.commands.cases import find_cases, read_case
from icon_nephi.commands.compare import compare_cases, measure
from icon_nephi.commands.methods import Found, Options
from icon_nephi.io.itk_images import geometry_of
from icon_nephi.phantoms import breathing_thorax
from icon_nephi.space.frames import apply_affine

SHAPE = (24, 22, 26)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_phantoms(folder, shape=SHAPE)
    write_phantoms(folder / "flat", shape=(40, 40))
    return folder


@pytest.fixture
def case(data):
    return read_case(data / "phantom_0", "phantom_0")


def exact(case, options):
    phantom = breathing_thorax(SHAPE, seed=0)
    places = geometry_of(case.moving), geometry_of(case.fixed)
    return Found(phantom.phi_AB, phantom.phi_BA, *places)


def resampled(case, options):
    """The true map, known on the grid of a network that is not the image's."""
    phantom = breathing_thorax(SHAPE, seed=0)
    _, _, places = methods.network_images(case, options, (20, 30, 18))
    matrices = [p.unit_to_physical() for p in places]
    own = geometry_of(case.fixed).unit_to_physical()

    def change(x, matrix):
        moved = apply_affine(matrix, x.double().flatten(2)[0].T)
        return moved.T.reshape(x.shape)

    def through(phi, first, last, x):
        into = torch.linalg.inv(own) @ matrices[first]
        out = torch.linalg.inv(matrices[last]) @ own
        return change(phi(change(x, into)), out)

    maps = (
        partial(through, phantom.phi_AB, 1, 0),
        partial(through, phantom.phi_BA, 0, 1),
    )
    return Found(*maps, *places)


@pytest.mark.parametrize("method", [exact, resampled])
def test_the_true_map_scores_as_true(case, method):
    row = measure(case, method, Options(device="cpu"))
    assert row["before_tre_mm"] > 5
    assert row["tre_mm"] < 1e-2
    assert row["dice"] > row["before_dice"]
    assert row["folds_points_percent"] == row["folds_voxels_percent"] == 0
    assert row["inverse_consistency_mm"] < 1e-2


def test_a_folded_map_is_seen_by_both_measures(case):
    def mirrored(case, options):
        places = geometry_of(case.moving), geometry_of(case.fixed)
        return Found(lambda x: 1 - x, lambda x: 1 - x, *places)

    row = measure(case, mirrored, Options(device="cpu"))
    assert row["folds_points_percent"] == row["folds_voxels_percent"] == 100


@pytest.mark.parametrize(
    "method", [pytest.param("nephi", marks=pytest.mark.slow), "voxel"]
)
def test_methods_from_scratch_say_what_they_cost(case, method):
    row = measure(
        case,
        methods.METHODS[method],
        Options(steps=8 if method == "nephi" else 1, device="cpu"),
    )
    assert 0 < row["steps"] <= 8
    assert row["peak_gib"] is None or row["peak_gib"] > 0
    assert (row["encoder_m"] > 17) == (method == "voxel")
    assert (row["representation_m"] > 0) == (method == "nephi")


@pytest.mark.parametrize(("side", "levels"), [(17, 0), (33, 1), (64, 1), (65, 2)])
def test_levels_leave_enough_voxels(side, levels):
    assert levels_of([1, 1, side, side, side]) == levels


def test_a_trained_voxel_network_is_read_back(data, case, tmp_path):
    size = (1, 1, 17, 18, 19)
    weights = tmp_path / "network_weights.trch"
    torch.save(methods.voxel_network(size).regis_net.state_dict(), weights)
    flags = ["--out", "o.csv", "--voxel_weights", str(weights), "--shape", "17", "18"]
    trained = learned(parser().parse_args([*flags, "19"]))
    assert list(trained) == ["voxel learned", "voxel learned + IO"]
    row = measure(case, trained["voxel learned"], Options(device="cpu"))
    # Its last layer starts at zero, so this is the identity.
    assert row["tre_mm"] == pytest.approx(row["before_tre_mm"], abs=1e-2)
    assert row["grid"] == size[2:]
    assert nested(size).regis_net(*torch.rand(2, *size)) is not None


def still(case, options):
    places = geometry_of(case.moving), geometry_of(case.fixed)
    return Found(_same, _same, *places)


def _same(x):
    return x


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_command_writes_a_row_for_each_method(
    data, tmp_path, capfd, monkeypatch, real
):
    if not real:
        monkeypatch.setattr(methods, "METHODS", {"nephi": still, "voxel": still})
    out = tmp_path / "compare.csv"
    flags = ["--data", str(data / "flat"), "--out", str(out), "--device", "cpu"]
    cli.compare([*flags, "--seconds", "0.5", "--threads", "1"])
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["nephi", "voxel"]
    assert not any(row["error"] for row in rows)
    assert "TRE mm" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == [out]


def breaks(case, options):
    raise RuntimeError("no luck")


def test_one_failure_does_not_stop_the_others(data):
    read = partial(read_case, data / "phantom_0", "a")
    (row,) = compare_cases({"a": read}, {"bad": breaks}, Options())
    assert row["error"] == "RuntimeError: no luck"


def spoil(folder):
    write_phantoms(folder, shape=(16, 16))
    home = folder / "phantom_0"
    good = itk.imread(str(home / "fixed.nii.gz"))
    constant = itk.image_from_array(np.zeros((9, 9), np.int16))
    return home, good, constant


BAD = {
    "constant": "is constant",
    "text": "cannot be read as an image",
    "no moving": "holds no moving image",
    "one landmark file": "for one image only",
    "far": "lie outside the image",
    "header": "must begin with the line x,y",
    "modality": "case.json",
    "two files": "2 files named fixed",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_cases_are_refused(name, tmp_path, capfd):
    home, good, constant = spoil(tmp_path)
    landmarks = home / "fixed_landmarks.csv"
    if name == "constant":
        itk.imwrite(constant, str(home / "fixed.nii.gz"))
    elif name == "text":
        (home / "fixed.nii.gz").write_text("no")
    elif name == "no moving":
        (home / "moving.nii.gz").unlink()
    elif name == "one landmark file":
        landmarks.unlink()
    elif name == "far":
        for side in ("fixed", "moving"):
            (home / f"{side}_landmarks.csv").write_text("x,y\n9000,9000\n")
    elif name == "header":
        landmarks.write_text("i,j\n1,2\n")
    elif name == "modality":
        (home / "case.json").write_text('{"modality": "pet"}')
    else:
        itk.imwrite(good, str(home / "fixed.nrrd"))
    refused(["--data", str(tmp_path)], BAD[name], tmp_path, capfd)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cases", "nobody"], "no 'nobody' there"),
        (["--seconds", "-1"], "--seconds must be"),
        (["--side", "3"], "--side must be"),
        (["--device", "nowhere"], "not available"),
        (["--out", "x/y.csv"], "does not exist"),
        (["--out", "y.txt"], "must end in .csv"),
    ],
)
def test_bad_flags_are_refused(data, tmp_path, capfd, flags, words):
    refused(["--data", str(data), *flags], words, tmp_path, capfd)


def refused(flags, words, folder, capfd):
    before = sorted(folder.rglob("*"))
    if "--out" not in flags:
        flags = [*flags, "--out", str(folder / "o.csv")]
    with pytest.raises(SystemExit) as stop:
        cli.compare(flags)
    assert stop.value.code == 2
    said = capfd.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_folder_of_one_pair_is_a_case(data):
    assert list(find_cases(data / "phantom_0")) == ["phantom_0"]
    assert sorted(find_cases(data)) == ["flat/phantom_0", "phantom_0"]


def test_the_script_refuses_without_data(tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "o.csv")])
    assert stop.value.code == 2
