"""DIR-Lab's raw files, folders of people, and transforms of other programs."""

import itk
import numpy as np
import pytest

from evaluation import image_from
from evaluation.paper import dirlab
from evaluation.paper.table1_pairs import QUOTED, means, quoted, score_file, verdict

SIZE, SPACING = (10, 8, 6), 0.6


@pytest.fixture
def copd(tmp_path, monkeypatch):
    """Case 1 of COPDgene, very small, as it is unpacked."""
    monkeypatch.setitem(dirlab.COPD, 1, (SIZE, SPACING))
    home = tmp_path / "copd1" / "copd1"
    home.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for letter in "ei":
        values = np.arange(np.prod(SIZE)).astype("<i2")
        values.tofile(home / f"copd1_{letter}BHCT.img")
        voxels = generator.integers(1, SIZE, (300, 3))
        voxels[0] = (1, 1, 1) if letter == "e" else (3, 1, 2)
        np.savetxt(home / f"copd1_300_{letter}BH_xyz_r1.txt", voxels, "%d", "\t")
    return tmp_path


def pair(root):
    return dirlab.find_dirlab(root, "copd")["copd1"]


def test_raw_volumes_have_x_fastest_and_hounsfield_units(copd):
    found = pair(copd)()
    array = np.asarray(found.fixed)
    assert array.shape == SIZE[::-1]
    assert array[0, 0, 3] == 3 - 1024
    assert array[0, 1, 0] == SIZE[0] - 1024
    assert list(found.fixed.GetSpacing()) == [SPACING, SPACING, 2.5]
    assert found.modality == "ct"


def test_landmarks_count_from_one(copd):
    found = pair(copd)()
    np.testing.assert_allclose(found.fixed_points[0], [0, 0, 0])
    np.testing.assert_allclose(found.moving_points[0], [2 * SPACING, 0, 2.5])


def test_inhale_can_be_fixed(copd):
    turned = dirlab.find_dirlab(copd, "copd", fixed="inhale")["copd1"]()
    np.testing.assert_array_equal(turned.fixed_points, pair(copd)().moving_points)


def test_values_that_are_hounsfield_units_stay(tmp_path):
    path = tmp_path / "a.img"
    values = np.full(np.prod(SIZE), -900, "<i2")
    values[0], values[1] = -2000, 40
    values.tofile(path)
    array = np.asarray(dirlab.read_raw(path, SIZE, 1.0)).ravel()
    assert array[:3].tolist() == [-1024, 40, -900]


def test_the_other_set_is_found_under_its_names(tmp_path, monkeypatch):
    monkeypatch.setitem(dirlab.FOURD, 8, (SIZE, SPACING))
    home = tmp_path / "Case8Deploy"
    for name in ("Images", "extremePhases"):
        (home / name).mkdir(parents=True)
    for phase in ("T00", "T50"):
        zeros = np.zeros(np.prod(SIZE), "<i2")
        zeros.tofile(home / "Images" / f"case8_{phase}.img")
        text = home / "extremePhases" / f"case8_dirLab300_{phase}_xyz.txt"
        np.savetxt(text, np.ones((300, 3)), "%d")
    assert list(dirlab.find_dirlab(tmp_path, "4dct")) == ["4dct8"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda home: (home / "copd1_eBHCT.img").write_bytes(b"12"), "has 2 bytes"),
        (
            lambda h: (h / "copd1_300_eBH_xyz_r1.txt").write_text("1 2 3\n"),
            "must hold 300 rows",
        ),
        (
            lambda h: (h / "copd1_300_eBH_xyz_r1.txt").write_text("0 2 3\n" * 300),
            "outside 1 to",
        ),
        (
            lambda h: (h / "copd1_300_eBH_xyz_r1.txt").write_text("a b\n"),
            "cannot be read",
        ),
    ],
)
def test_bad_files_are_refused(copd, spoil, words):
    spoil(copd / "copd1" / "copd1")
    with pytest.raises(ValueError, match=words):
        pair(copd)()


def test_missing_cases_are_refused(copd):
    with pytest.raises(ValueError, match="holds no copd2"):
        dirlab.find_dirlab(copd, "copd", [2])
    with pytest.raises(ValueError, match="no case 11"):
        dirlab.find_dirlab(copd, "copd", [11])
    with pytest.raises(ValueError, match="holds no whole case"):
        dirlab.find_dirlab(copd, "4dct")


def test_both_errors_of_the_protocol(copd):
    found = pair(copd)()
    off = found.moving_points + np.array([0.2 * SPACING, 0, 1.0])
    errors = dirlab.landmark_errors(found, off)
    assert errors["tre_mm"] == pytest.approx(np.hypot(0.2 * SPACING, 1.0))
    assert errors["tre_snapped_mm"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("end", [".h5", ".tfm", ".nii.gz", ".mha"])
def test_transforms_of_other_programs_are_scored(copd, tmp_path, end):
    shift, path = np.array([1.0, -2.0, 0.5]), tmp_path / f"copd1{end}"
    if end in (".h5", ".tfm"):
        transform = itk.TranslationTransform[itk.D, 3].New()
        transform.SetOffset(shift.tolist())
        itk.transformwrite(transform, str(path))
    else:
        vectors = np.broadcast_to(shift, (*SIZE[::-1], 3)).astype(np.float32)
        kind = itk.Image[itk.Vector[itk.F, 3], 3]
        field = itk.image_from_array(vectors.copy(), ttype=(kind,))
        field.SetSpacing([SPACING, SPACING, 2.5])
        itk.imwrite(field, str(path))
    inside = np.array([[1.0, 2.0, 5.0]])
    np.testing.assert_allclose(
        dirlab.read_mover(path)(inside), inside + shift, atol=1e-5
    )
    row = score_file(pair(copd), dirlab.find_external(tmp_path, "copd1"))
    assert row["before_tre_mm"] > 0
    assert row["tre_mm"] > 0
    assert row["folds_voxels_percent"] == 0


def test_a_mirror_written_by_another_program_is_all_folds(copd, tmp_path):
    transform = itk.AffineTransform[itk.D, 3].New()
    transform.SetMatrix(itk.matrix_from_array(np.diag([-1.0, 1.0, 1.0])))
    itk.transformwrite(transform, str(tmp_path / "copd1.h5"))
    row = score_file(pair(copd), tmp_path / "copd1.h5")
    assert row["folds_voxels_percent"] == 100


@pytest.mark.parametrize("flat", [True, False])
def test_people_with_label_maps(tmp_path, flat):
    for number in range(3):
        image = image_from(np.random.default_rng(number).random((5, 6, 7), np.float32))
        labels = image_from(np.eye(6, 7, dtype=np.int16)[None].repeat(5, 0))
        home = tmp_path / f"p{number}"
        paths = [home / "image.nii.gz", home / "labels.nii.gz"]
        if flat:
            paths = [tmp_path / k / f"p{number}.nii.gz" for k in ("images", "labels")]
        for path, what in zip(paths, (image, labels), strict=True):
            path.parent.mkdir(exist_ok=True)
            itk.imwrite(what, str(path))
    found = dirlab.find_people(tmp_path)
    assert list(found) == ["p0-p1", "p1-p2", "p2-p0"]
    assert found["p0-p1"]().label_ids == (1,)


def test_quoted_figures_say_so_and_are_not_averaged():
    assert {row["source"] for row in quoted(QUOTED)} == {"quoted"}
    rows = [
        {"method": "a", "source": "measured", "tre_mm": t, "case": "c"} for t in (1, 2)
    ]
    (mean,) = means([*rows, {"method": "a", "source": "measured", "error": "x"}])
    assert mean["tre_mm"] == 1.5
    assert "cannot be compared" in verdict("it is", "a", [mean], 1.0)
    assert "does not agree" in verdict("it is", "a", [mean | {"data": "copd"}], 1.0)
