"""Reading image pairs, and the table of evaluation.register_pairs."""

import csv
import os
import re

import itk
import numpy as np
import pytest

from evaluation import (
    Case,
    before,
    image_from,
    random_points,
    to_index,
    to_physical,
)
from evaluation.accuracy.pairs import KNOWN, find_cases, load_pairs
from evaluation.accuracy.peers import (
    DenseMap,
    greedy,
    missing,
    prepare,
    voxel_centres,
)
from evaluation.register_pairs import main, measure, run_task, table
from icon_nephi.io.itk_images import array_of
from icon_nephi.io.points import read_points

SHIFT = np.array([2.0, -3.0, 4.0])  # mm, from fixed to moving points


def make_image(kind=np.float32, shift=0.0, shape=(6, 7, 8)):
    """An oblique, anisotropic image."""
    array = np.random.default_rng(0).uniform(-1000, 1000, size=shape)
    image = itk.image_from_array(array.astype(kind))
    dimension = len(shape)
    image.SetSpacing([1.0, 1.5, 2.0][:dimension])
    image.SetOrigin([-10.0 + shift, 20.0, 30.0][:dimension])
    turn = np.eye(dimension)
    turn[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    image.SetDirection(itk.matrix_from_array(turn))
    return image


def write_points(path, points, header="x,y,z"):
    rows = [header, *(",".join(str(v) for v in point) for point in points)]
    path.write_text("\n".join(rows) + "\n", "utf-8")


@pytest.fixture
def data(tmp_path):
    """Two cases: landmarks and masks of CT, labels of 2D slices one folder down."""
    folder = tmp_path / "data" / "lung"
    folder.mkdir(parents=True)
    fixed = make_image(np.int16)
    itk.imwrite(fixed, folder / "fixed.mha")
    itk.imwrite(make_image(np.int16, shift=3.0), folder / "moving.nii.gz")
    mask = np.zeros((6, 7, 8), np.uint8)
    mask[2:4, 2:5, 2:6] = 255
    for side, shift in (("fixed", 0.0), ("moving", 3.0)):
        image = image_from(mask, make_image(shift=shift))
        itk.imwrite(image, folder / f"{side}_mask.nrrd")
    points = to_physical(fixed, np.array([[1.0, 2, 3], [4, 5, 2], [2.5, 3, 1.5]]))
    write_points(folder / "fixed_landmarks.csv", points)
    write_points(folder / "moving_landmarks.csv", points + SHIFT, "X, Y, Z")
    (folder / "case.json").write_text('{"modality": "ct"}', "utf-8")
    folder = tmp_path / "data" / "slices" / "a-b"
    folder.mkdir(parents=True)
    labels = np.zeros((20, 30), np.float32)
    labels[5:15, 5:15], labels[2:4, 20:25] = 7, 9
    moved = np.roll(labels, 5, axis=1)
    moved[moved == 9] = 11
    for side, array in (("fixed", labels), ("moving", moved)):
        itk.imwrite(itk.image_from_array(array), folder / f"{side}.mha")
        itk.imwrite(itk.image_from_array(array), folder / f"{side}_labels.mha")
    return tmp_path / "data"


def test_a_folder_of_landmarks_is_read(data):
    (pair,) = load_pairs(data, ["lung"])
    assert (pair.name, pair.modality) == ("lung", "ct")
    assert type(pair.fixed) is type(pair.moving) is itk.Image[itk.F, 3]
    assert np.allclose(array_of(pair.fixed), array_of(make_image(np.int16)))
    assert np.unique(array_of(pair.moving_mask)).tolist() == [0, 1]
    assert pair.fixed_points.shape == (3, 3)
    assert np.allclose(pair.moving_points - pair.fixed_points, SHIFT)
    assert pair.fixed_labels is None
    assert pair.label_ids == ()


def test_a_folder_of_labels_is_read(data):
    (pair,) = load_pairs(data, ["slices"])
    assert (pair.name, pair.modality) == ("slices/a-b", None)
    assert pair.fixed.GetImageDimension() == 2
    assert pair.label_ids == (7,)
    assert array_of(pair.fixed_labels).dtype == np.int16


def test_colours_become_grey(data):
    colours = np.zeros((20, 30, 3), np.uint8)
    colours[..., 1] = 100
    colours[0, 0] = 0
    image = itk.image_from_array(colours, ttype=itk.Image[itk.RGBPixel[itk.UC], 2])
    (data / "slices" / "a-b" / "fixed.mha").unlink()
    itk.imwrite(image, data / "slices" / "a-b" / "fixed.png")
    (pair,) = load_pairs(data, ["slices"])
    values = array_of(pair.fixed)
    assert values[0, 0] == 0
    assert 60 < values[0, 1] == values.max() < 80


def test_physical_points_are_itk_points():
    image = make_image()
    index = np.array([[0.0, 0, 0], [3, 2, 1], [7, 6, 5]])
    there = [image.TransformIndexToPhysicalPoint(i) for i in index.astype(int).tolist()]
    assert np.allclose(to_physical(image, index), np.array(there))
    assert np.allclose(to_index(image, to_physical(image, index)), index)
    inside = to_index(image, random_points(image, 1000))
    assert inside.min() >= 0
    assert (inside.max(axis=0) <= [7, 6, 5]).all()


def test_pairs_are_read_lazily(data):
    (data / "slices" / "a-b" / "moving.mha").write_bytes(b"not an image")
    pairs = load_pairs(data)
    assert next(pairs).name == "lung"
    with pytest.raises(ValueError, match=r"moving\.mha cannot be read as an image"):
        next(pairs)


def test_wrong_folders_and_names(data, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        load_pairs(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no case: expected folders with"):
        load_pairs(tmp_path / "empty")
    assert list(find_cases(data / "lung")) == ["lung"]
    with pytest.raises(ValueError, match="no 'lungs' there, only lung, slices/a-b"):
        load_pairs(data, ["lungs"])
    assert list(find_cases(data, ["slices/", "lung", "lung"])) == ["slices/a-b", "lung"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("fixed_landmarks.csv", "i,j,k\n1,2,3\n", "must begin with the line"),
        ("fixed_landmarks.csv", "1,2,3\n1,2,3\n", "must begin with the line"),
        ("fixed_landmarks.csv", "", "must begin with the line"),
        ("fixed_landmarks.csv", "x,y,z\n1,2\n", "must hold rows of 3 finite numbers"),
        ("fixed_landmarks.csv", "x,y,z\n", "0 points in 3D and 3 points"),
        ("fixed_landmarks.csv", "x,y,z\n1,2,nan\n", "finite numbers"),
        ("fixed_landmarks.csv", "x,y,z\n1,2,3\n", "1 points in 3D and 3 points in 3D"),
        ("fixed_landmarks.csv", None, "holds moving_points for one image only"),
        ("fixed_labels.mha", "", "holds fixed_labels for one image only"),
        ("moving.nii.gz", None, "holds no moving image"),
        ("moving.mha", "", "2 files named moving, moving.mha, moving.nii.gz"),
        ("case.json", '{"modality": "xray"}', '{"modality": "ct"}, "mri" or null'),
        ("case.json", "[]", "case.json must hold"),
    ],
)
def test_badly_formed_folders_are_refused_at_once(data, file, text, message):
    if text is None:
        (data / "lung" / file).unlink()
    else:
        (data / "lung" / file).write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        find_cases(data, ["lung"])


def test_points_in_another_frame_are_refused(data):
    for side in ("fixed", "moving"):
        path = data / "lung" / f"{side}_landmarks.csv"
        write_points(path, read_points("landmarks", path).points * [-1, -1, 1])
    with pytest.raises(ValueError, match="3 of 3 points lie outside"):
        next(load_pairs(data, ["lung"]))
    for side in ("fixed", "moving"):
        write_points(data / "lung" / f"{side}_landmarks.csv", [[1, 2]], "x,y")
    with pytest.raises(ValueError, match="is 3D, its points are 2D"):
        next(load_pairs(data, ["lung"]))


def test_labels_that_are_not_whole_are_refused(data):
    half = itk.image_from_array(np.full((20, 30), 0.5, np.float32))
    itk.imwrite(half, data / "slices" / "a-b" / "fixed_labels.mha")
    with pytest.raises(ValueError, match="numbers that are not whole"):
        next(load_pairs(data, ["slices"]))


class Shift:
    """The right answer for fixed landmarks, the identity for the rest."""

    warnings = ("a stand-in",)

    def transform_points(self, points, direction):
        return points + SHIFT if direction == "fixed_to_moving" else points

    def warp_labels(self, labels):
        return labels

    def fold_fraction(self, points=None):
        if points is None:
            raise NotImplementedError
        assert points.shape == (100_000, 3)
        return 0.25

    def inverse_consistency_error(self):
        return np.linspace(0, 1, 101)

    def save(self, path):
        path.write_bytes(bytes(2000))


def shift(pair):  # found by its name, in another process
    return Shift()


def test_measure_scores_landmarks(data):
    (pair,) = load_pairs(data, ["lung"])
    row = measure(pair, shift)
    assert row["before_tre_mm"] == pytest.approx(np.linalg.norm(SHIFT))
    assert row["tre_fixed_to_moving_p95_mm"] == pytest.approx(0)
    assert row["tre_moving_to_fixed_median_mm"] == pytest.approx(np.linalg.norm(SHIFT))
    assert row["folds_points_percent"] == 25
    assert row["file_kb"] == 2
    assert row["cpu_s"] >= 0
    assert "folds_voxels_percent" not in row
    assert "dice" not in row


def test_measure_scores_labels(data):
    (pair,) = load_pairs(data, ["slices"])
    row = measure(
        pair, lambda pair: type("Result", (), {"warp_labels": lambda _, x: x})()
    )
    assert row["before_dice"] == row["dice"] == pytest.approx(0.5)


def test_peers_start_from_aligned_masks_and_know_dense_maps(data):
    (pair,) = load_pairs(data, ["lung"])
    fixed, moving, shift = prepare(pair)
    assert shift == pytest.approx([3, 0, 0])
    assert moving.GetOrigin() == fixed.GetOrigin()
    assert 0 <= array_of(moving).min() < array_of(moving).max() <= 1
    grid = array_of(fixed).shape
    result = DenseMap(fixed, lambda: np.broadcast_to(SHIFT, (*grid, 3)), 10)
    there = result.transform_points(pair.fixed_points, "fixed_to_moving")
    assert np.allclose(there, pair.moving_points)
    assert result.fold_fraction() == 0
    voxel = itk.array_from_matrix(fixed.GetDirection())[:, 0]  # 1 mm along x
    labels = image_from(np.arange(6 * 7 * 8, dtype=np.int16).reshape(grid), fixed)
    moved = DenseMap(fixed, lambda: np.broadcast_to(voxel, (*grid, 3)), 10)
    warped = array_of(moved.warp_labels(labels))
    assert np.array_equal(warped[..., :-1], array_of(labels)[..., 1:])
    assert not warped[..., -1].any()
    back = -2 * voxel * np.arange(8)[:, None]  # mirrors the image
    assert DenseMap(fixed, lambda: np.zeros((*grid, 3)) + back, 10).fold_fraction() == 1


def blob(shape, place, at):
    """A smooth image of a place, with structures around LPS mm."""
    image = image_from(np.zeros(shape, np.float32), place)
    x = voxel_centres(image) - at
    waves = sum(np.sin(x[..., a] / (2.5 + a) + a) for a in range(len(shape)))
    values = np.exp(-((np.linalg.norm(x, axis=-1) / 14) ** 4)) * (2 + waves)
    return image_from(values.astype(np.float32), image)


@pytest.mark.parametrize("shape", [(56, 52), (36, 34, 32)], ids=["2d", "3d"])
def test_greedy_finds_a_motion_and_its_inverse(shape):
    pytest.importorskip("picsl_greedy")
    d = len(shape)
    fixed_place, moving_place = make_image(shape=(4,) * d), make_image(shape=(4,) * d)
    moving_place.SetOrigin([5.0, -8.0, 12.0][:d])
    moving_place.SetDirection(itk.matrix_from_array(np.eye(d)))
    for place in (fixed_place, moving_place):
        place.SetSpacing([1.0, 1.1, 0.9][:d])
    middles = []
    for place in (fixed_place, moving_place):
        empty = image_from(np.zeros(shape, np.float32), place)
        middles.append(to_physical(empty, (np.array(shape[::-1]) - 1) / 2))
    shift = np.array([1.5, -2.0, 1.0])[:d]  # beyond that of the middles
    fixed = blob(shape, fixed_place, middles[0])
    moving = blob(shape, moving_place, middles[1] + shift)
    found = greedy(Case("shifted", fixed, moving))
    generator = np.random.default_rng(0)
    inside = middles[0] + generator.uniform(-6, 6, (50, d))
    truth = inside - middles[0] + middles[1] + shift
    moved = found.transform_points(inside, "fixed_to_moving")
    assert np.linalg.norm(moved - truth, axis=1).mean() < 0.5
    back = found.transform_points(truth, "moving_to_fixed")
    assert np.linalg.norm(back - inside, axis=1).mean() < 0.5
    assert found.file_size > 0
    assert found.fold_fraction() == 0


def test_what_a_peer_costs_is_counted_from_its_call(data):
    task = {"data": str(data), "case": "lung", "arguments": {}}
    task["function"] = f"{__name__}:shift"
    own = run_task(task | {"whole_process": False})
    assert 0 <= own["cpu_s"] < run_task(task)["cpu_s"]


def test_the_command(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "dies.py").write_text("import os; os._exit(3)", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    methods = {"shift": f"{__name__}:shift", "absent": "absent:f", "dies": "dies:f"}
    out = tmp_path / "results.csv"
    argv = ["--data", str(data), "--cases", "lung", "--out", str(out)]
    assert main(argv, methods) == 1
    printed = capsys.readouterr().out
    assert "[1/1] lung shift: TRE 5.39 -> 0.00 mm" in printed
    assert re.search(r"lung  absent +FAILED: ModuleNotFoundError: No module", printed)
    assert re.search(r"lung  dies +FAILED: the process ended with code 3", printed)
    line = next(line for line in printed.splitlines() if line.startswith("lung  shift"))
    numbers = [
        "5.39",
        "0.00/0.00/0.00",
        "5.39/5.39/5.39",
        "-",
        "-",
        "25",
        "0.500/0.950",
    ]
    assert line.split()[2:9] == numbers
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["shift", "absent", "dies"]
    assert all(rows[0][name] for name in ("itk", "torch", "machine"))
    assert rows[0]["warnings"] == "a stand-in"
    assert float(rows[0]["file_kb"]) == 2
    assert 0 < float(rows[0]["peak_rss_gib"]) < 2
    assert list(tmp_path.glob(".part*")) == []


def test_what_a_method_refuses_is_one_sentence(data, tmp_path, monkeypatch, capsys):
    task = {"data": str(data), "case": "lung", "arguments": {}}
    (tmp_path / "refuses.py").write_text(
        "def f(pair):\n    raise ValueError(f'{pair.name}\\nis constant.')", "utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run_task(task | {"function": "refuses:f"}) == {"error": "lung is constant."}
    assert "Traceback" in capsys.readouterr().err  # for --verbose


@pytest.mark.parametrize(
    "wrong",
    ["--cases x", "--threads 0", "--options x", "--peers x", "--out absent/x.csv"],
)
def test_wrong_arguments_exit_with_2_and_write_nothing(data, tmp_path, capsys, wrong):
    wrong = wrong.split()
    out = [] if "--out" in wrong else ["--out", str(tmp_path / "results.csv")]
    with pytest.raises(SystemExit) as stopped:
        main(["--data", str(data), *out, *wrong], {})
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "results.csv").exists()


def test_a_peer_that_is_not_installed_is_named(data, monkeypatch, capsys):
    monkeypatch.setitem(main.__globals__["PEERS"], "elastix", "no-such-distribution")
    assert "icon_nephi[peers]" in missing("elastix")
    assert main(["--data", str(data), "--only_peers", "--peers", "elastix"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("pip install 'icon_nephi[peers]'") == 1
    assert re.search(r"lung +elastix +not installed\n", printed)


def test_groups_of_label_cases_get_a_mean():
    row = {"method": "m", "before_dice": 0.5, "cpu_s": 1.0}
    rows = [{"case": f"g/{i}", "dice": i / 10, **row} for i in (6, 8)]
    assert table(rows).endswith("g  m: mean Dice of 2 pairs 0.700 (before 0.500)")
    assert "mean Dice" not in table(rows[:1])


BEFORE = {  # mean landmark error in mm, or mean Dice, of the identity
    "lung3d_elastix": [35.27],
    "lung3d_semireal": [13.75, 37.64],
    "abdomen3d_eth4dmri_18": [14.89, 16.35],
    "brain3d_freesurfer13": [0.592],
    "brain3d_hippocampus": [0.783, 0.450, 0.533],
    "brain2d_oasistrt": [0.454, 0.438, 0.470, 0.361, 0.362],
    "histology2d_lesions": [76.44],
    "brain3d_people": [0.067, 0.005, 0.031],
    "series_echo": [0.329, 0.149, 0.059, 0.054, 0.262, 0.312],
}


@pytest.mark.data
@pytest.mark.parametrize("group", BEFORE)
def test_known_cases_begin_where_they_should(group):
    assert BEFORE.keys() == {name.partition("/")[0] for name in KNOWN}
    pairs = load_pairs(os.environ["NEPHI_DATA"], [group])
    for pair, expected in zip(pairs, BEFORE[group], strict=True):
        row = before(pair)
        value, accuracy = row.get("before_tre_mm"), 0.01
        if value is None:
            value, accuracy = row["before_dice"], 0.001
        assert value == pytest.approx(expected, abs=accuracy)
