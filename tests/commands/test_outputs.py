"""What the commands write: fields, Jacobians, scores, meshes, summaries."""

import json

import itk
import numpy as np
import pytest

from icon_nephi import cli
from icon_nephi.fit.settings import find_effort, find_settings
from icon_nephi.io import itk_images, itk_transforms
from icon_nephi.registration.itk_pair import ItkPair
from icon_nephi.registration.result import Registration
from icon_nephi.report import measure, metrics
from icon_nephi.space.frames import Geometry
from tests.commands.command_files import PLACE_A, PLACE_B, pair, result, write_points
from tests.small_fits import rows_in, voxels_in

NUMBERS = itk.VariableLengthVector[itk.F]


def at(image, points):
    """The numbers of an image at voxel centres."""
    index = [image.TransformPhysicalPointToIndex(p) for p in points.tolist()]
    values = itk.array_from_image(image)
    return np.array([values[tuple(reversed(tuple(i)))] for i in index])


def differences(mapped, points, step=1e-3):
    """Matrices ``[N, d, d]`` of central differences of a map of points."""
    d = points.shape[1]
    columns = [
        (mapped(points + h) - mapped(points - h)) / (2 * step) for h in step * np.eye(d)
    ]
    return np.stack(columns, -1)


def through(transform):
    return lambda points: np.array(
        [tuple(transform.TransformPoint(p)) for p in points.tolist()]
    )


@pytest.mark.parametrize("ending", ["nii.gz", "mha", "nrrd"])
def test_a_displacement_file_is_a_transform(folder, ending):
    out = folder.path / "out"
    names = {
        "displacement_out": out / f"u.{ending}",
        "inverse_displacement_out": out / f"v.{ending}",
    }
    cli.register([*pair(**names), "--quiet"])
    for path, place, way in zip(
        names.values(),
        (PLACE_B, PLACE_A),
        ("fixed_to_moving", "moving_to_fixed"),
        strict=True,
    ):
        field = itk.imread(str(path), itk.Vector[itk.F, 3])
        points = voxels_in(place, 20, np.random.default_rng(0))
        expected = result().transform_points(points, way)
        np.testing.assert_allclose(points + at(field, points), expected, atol=1e-3)
        transform = itk.DisplacementFieldTransform[itk.D, 3].New()
        wide = itk.Image[itk.Vector[itk.D, 3], 3].New()
        wide.SetRegions(itk.size(field))
        wide.Allocate()
        wide.SetSpacing(field.GetSpacing())
        wide.SetOrigin(field.GetOrigin())
        wide.SetDirection(field.GetDirection())
        itk.array_view_from_image(wide)[:] = itk.array_from_image(field)
        transform.SetDisplacementField(wide)
        # ITK gives the points on the very border none.
        unit = np.linalg.inv(place.unit_to_physical().numpy())
        box = points @ unit[:3, :3].T + unit[:3, 3]
        inner = ((box > 0.01) & (box < 0.99)).all(1)
        moved = through(transform)(points)
        np.testing.assert_allclose(moved[inner], expected[inner], atol=1e-3)


def test_the_summary_holds_every_number(folder, capsys):
    path = folder.path
    fixed = rows_in(PLACE_B, 12, np.random.default_rng(0), 0.1, 0.9)
    moving = result().transform_points(fixed) + np.array([0.5, 0, 0])
    write_points(path / "f.csv", fixed)
    write_points(path / "m.csv", moving)
    flags = pair(
        save="out/p.nephi",
        jacobian_out="out/j.nrrd",
        json="out/s.json",
        landmarks_fixed="f.csv",
        landmarks_moving="m.csv",
        labels_fixed="fixed_labels.nrrd",
        labels_moving="moving_labels.nrrd",
        seed=7,
    )
    cli.register(flags)
    found = json.loads((path / "out" / "s.json").read_text())
    assert found["seed"] == 7
    assert found["command"].startswith("nephi-register --fixed fixed.nrrd")
    assert found["landmarks_mm"]["after"]["mean"] == pytest.approx(0.5, abs=1e-4)
    before = np.linalg.norm(fixed - moving, axis=1).mean()
    assert found["landmarks_mm"]["before"]["mean"] == pytest.approx(before, abs=1e-3)
    assert set(found["dice"]["after"]["labels"]) == {"1", "2", "3", "4"}
    errors = np.asarray(result().inverse_consistency_error())
    assert found["inverse_consistency_mm"]["p95"] == pytest.approx(
        np.percentile(errors, 95), rel=1e-4
    )
    lengths = np.linalg.norm(np.asarray(result().displacement_field()), axis=-1)
    assert found["displacement_mm"]["mean"] == pytest.approx(lengths.mean(), rel=1e-4)
    assert found["folds_percent"] == pytest.approx(100 * result().fold_fraction())
    assert found["warnings"] == ["the affine start is doubtful"]
    assert found["versions"]["itk"]
    assert found["outputs"]["save"] == "out/p.nephi"
    assert found["steps"] == 2
    values = np.asarray(itk.imread(str(path / "out" / "j.nrrd")))
    np.testing.assert_allclose(values, np.asarray(result().jacobian_determinant()))
    text = capsys.readouterr().out
    assert "landmark error after: mean 0.50 mm" in text
    assert "fixed -> moving" in text
    assert "Dice before: mean" in text
    cli.register([*pair(json="-"), "--quiet"])
    assert json.loads(capsys.readouterr().out)["outputs"] == {}


def test_a_summary_looks_at_so_many_voxels_at_most():
    every = measure.summarize_result(result())
    assert every["voxels_measured"] == np.prod(PLACE_A.size) + np.prod(PLACE_B.size)
    some = measure.summarize_result(result(), most=600)
    assert 300 < some["voxels_measured"] < 1200
    for key in ("displacement_mm", "inverse_consistency_mm"):
        assert some[key]["median"] == pytest.approx(every[key]["median"], rel=0.2)
    thin = Geometry((3, 40, 50), (1.0, 2.0, 5.0), (0.0,) * 3, PLACE_A.direction)
    assert itk_images.geometry_of(measure.sparse_image(thin, 600)).size[0] == 2


def test_the_error_to_expect_is_written(folder, capsys):
    path = folder.path
    flags = pair(save="p.nephi", error_out="e.nrrd", json="s.json", seeds=2, seed=5)
    cli.register([*flags, "--quiet"])
    assert folder.seeds == [5, 6]
    ours = result()
    image = itk_images.array_of(itk.imread(str(path / "e.nrrd")))
    # The stand-in finds the same with every seed.
    expected = np.asarray(ours.error_image(None, [ours]))
    np.testing.assert_allclose(image, expected, rtol=1e-5)
    found = json.loads((path / "s.json").read_text())["expected_error_mm"]
    assert found["median"] == pytest.approx(np.median(image), rel=1e-4)
    points = rows_in(PLACE_B, 3, np.random.default_rng(0))
    write_points(path / "in.csv", points)
    common = ["--transform", "p.nephi", "--points", "in.csv", "--errors", "--out"]
    cli.warp([*common, "o.csv"])
    lines = (path / "o.csv").read_text().splitlines()
    assert lines[0] == "x,y,z,expected_error_mm"
    rows = np.array([line.split(",") for line in lines[1:]], float)
    np.testing.assert_allclose(rows[:, :3], ours.transform_points(points), atol=1e-5)
    np.testing.assert_allclose(rows[:, 3], ours.error_estimate(points), atol=1e-5)
    cli.warp([*common, "b.csv", "--inverse"])
    back = np.loadtxt(path / "b.csv", delimiter=",", skiprows=1)[:, 3]
    expected = ours.error_estimate(points, (), "moving_to_fixed")
    np.testing.assert_allclose(back, expected, atol=1e-5)


def test_labels_are_scored_as_they_are_written():
    ours, generator = result(), np.random.default_rng(0)
    maps = [
        itk_images.image_of(generator.integers(1, 3, p.size).astype(np.uint8), p)
        for p in (PLACE_B, PLACE_A)
    ]
    found = measure.score_labels(ours, *maps)["after"]["labels"]
    there, here = (
        itk_images.array_of(image)
        for image in (maps[0], ours.warp_labels(maps[1], maps[0]))
    )
    assert (here == 0).any()  # what comes from outside has no label
    assert found == {str(k): v for k, v in metrics.dice(there, here, [1, 2]).items()}


def test_what_is_asked_of_the_optimisation(folder):
    path, size = folder.path, PLACE_B.size
    flags = pair(save="out/p.nephi", preset="accurate", similarity="mind")
    cli.register([*flags, "--quantiles", "0.1", "0.9", "--quiet"])
    assert folder.options["similarity"] == "mind"
    assert folder.options["field"] == find_effort("accurate", size)
    assert folder.options["field"].steps == 2 * find_settings("auto", size).steps
    assert find_effort("fast", size).steps < find_settings("grid", size).steps
    with pytest.raises(ValueError, match="preset must be one of"):
        find_effort("slow", size)
    flags = pair(save="out/p.nephi", io_sim="lncc2", warped_moving_out="out/w.nrrd")
    cli.register([*flags, "--moving_window", "-50", "50", "--quiet"])
    assert folder.options["similarity"] == "lncc2"
    assert folder.options["field"] == "auto"
    warped = np.asarray(itk.imread(str(path / "out" / "w.nrrd")))
    assert warped.max() > 60  # the image itself is not clipped


@pytest.mark.parametrize("way", ["forward", "inverse", "reference"])
def test_jacobians_of_a_registration(folder, way, capsys):
    result().save(folder.path / "p.nephi")
    flags = ["--transform", "p.nephi"]
    direction, place = "fixed_to_moving", PLACE_B
    if way == "inverse":
        flags, direction, place = [*flags, "--inverse"], "moving_to_fixed", PLACE_A
    if way == "reference":
        flags += ["--reference", "other.nrrd"]
        corner = rows_in(PLACE_B, 1, np.random.default_rng(0), 0.4, 0.4)[0]
        place = type(PLACE_B)((5, 6, 7), (0.6, 0.7, 0.8), corner, PLACE_A.direction)
        image = itk_images.image_of(np.zeros(place.size, np.uint8), place)
        itk.imwrite(image, str(folder.path / "other.nrrd"))
    for kind in ("", "--log", "--tensor"):
        cli.jacobian([*flags, "--out", f"j{kind}.nrrd", *([kind] if kind else [])])
    images = [itk.imread(str(folder.path / f"j{kind}.nrrd")) for kind in ("", "--log")]
    tensor = itk.imread(str(folder.path / "j--tensor.nrrd"), NUMBERS)
    assert tensor.GetNumberOfComponentsPerPixel() == 9
    points = voxels_in(place, 25, np.random.default_rng(0))
    # Beyond the registered box, and on its edge, the map has kinks.
    own = PLACE_A if way == "inverse" else PLACE_B
    unit = own.physical_to_unit().numpy()
    box = points @ unit[:3, :3].T + unit[:3, 3]
    points = points[((box > 1e-3) & (box < 1 - 1e-3)).all(1)]
    assert len(points) > 3
    expected = differences(
        lambda p: result().transform_points(p, direction), points, 0.2
    )
    np.testing.assert_allclose(
        at(tensor, points).reshape(-1, 3, 3), expected, atol=4e-3
    )
    values = at(images[0], points)
    np.testing.assert_allclose(values, np.linalg.det(expected), atol=4e-3)
    np.testing.assert_allclose(at(images[1], points), np.log(values), atol=1e-5)
    text = capsys.readouterr().out
    said = "moving -> fixed" if way == "inverse" else "fixed -> moving"
    assert f"jacobian: {said}, mm by mm" in text
    assert "folds: 0 of" in text


def test_jacobians_of_an_itk_transform(folder):
    cli.register([*pair(transform_out="T.h5"), "--quiet"])
    common = ["--transform", "T.h5", "--reference", "fixed.nrrd", "--quiet"]
    cli.jacobian([*common, "--out", "d.nrrd"])
    cli.jacobian([*common, "--tensor", "--out", "t.nrrd"])
    transform = itk_transforms.read_transform("T", folder.path / "T.h5")
    points = voxels_in(PLACE_B, 25, np.random.default_rng(0))
    expected = differences(through(transform), points, 1e-2)
    tensor = itk.imread(str(folder.path / "t.nrrd"), NUMBERS)
    found = at(tensor, points).reshape(-1, 3, 3)
    unit = PLACE_B.physical_to_unit().numpy()
    box = points @ unit[:3, :3].T + unit[:3, 3]
    inner = ((box > 1e-3) & (box < 1 - 1e-3)).all(1)
    np.testing.assert_allclose(found[inner], expected[inner], atol=1e-3)
    values = at(itk.imread(str(folder.path / "d.nrrd")), points)
    np.testing.assert_allclose(values, np.linalg.det(found), atol=1e-4)


def test_folds_have_no_logarithm(folder, capsys):
    from tests.small_fits import small_fit, unit_matrix

    fit = small_fit(3, unit_matrix(3), strength=1.0)
    wild = Registration(fit, PLACE_A, PLACE_B, itk=True)
    wild.save(folder.path / "wild.nephi")
    cli.jacobian(["--transform", "wild.nephi", "--log", "--out", "l.nrrd"])
    values = np.asarray(wild.jacobian_determinant())
    logs = np.asarray(itk.imread(str(folder.path / "l.nrrd")))
    np.testing.assert_array_equal(np.isnan(logs), values <= 0)
    text = capsys.readouterr()
    count = int((values <= 0).sum())
    assert f"warning: {count} voxels have no logarithm" in text.err
    assert f"folds: {count} of {values.size} voxels" in text.out


def test_info_tells_what_is_in_a_file(folder, capsys):
    cli.register([*pair(save="p.nephi", transform_out="T.h5"), "--quiet"])
    capsys.readouterr()
    cli.info(["p.nephi", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == (folder.path / "p.nephi").stat().st_size
    assert found["fixed"]["size"] == list(reversed(PLACE_B.size))
    assert found["moving"]["spacing"] == pytest.approx(PLACE_A.spacing)
    assert found["steps"] == 2
    assert found["last_losses"] == {"all_loss": 0.25, "similarity_loss": 0.125}
    assert found["versions"]["torch"]
    fit = result().fit
    count = sum(p.numel() for f in (fit.field_AB, fit.field_BA) for p in f.parameters())
    assert found["parameters"]["fields"] == count
    cli.info(["p.nephi"])
    text = capsys.readouterr().out
    assert "directions: both: fixed -> moving and moving -> fixed" in text
    assert "the affine start is doubtful" in text
    cli.info(["T.h5"])
    text = capsys.readouterr().out
    assert "CompositeTransform" in text
    assert "fixed -> moving" in text
    cli.info(["T.h5", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["dimension"] == 3
    types = [part["type"] for part in found["in_order_of_use"]]
    assert "BSpline" in types[0]
    assert "Affine" in types[1]


def test_points_keep_their_columns_and_say_their_way(folder, capsys):
    result().save(folder.path / "p.nephi")
    points = rows_in(PLACE_A, 3, np.random.default_rng(0))
    rows = [["a", *p, 1] for p in points.tolist()]
    write_points(folder.path / "in.csv", rows, "name,x,y,z,n")
    common = ["--transform", "p.nephi", "--points", "in.csv", "--out"]
    cli.warp([*common, "to.csv", "--to", "fixed"])
    cli.warp([*common, "inverse.csv", "--inverse"])
    text = capsys.readouterr().out
    assert text.count("points: moving -> fixed (3 points, LPS mm)") == 2
    lines = (folder.path / "to.csv").read_text().splitlines()
    assert lines == (folder.path / "inverse.csv").read_text().splitlines()
    assert lines[0] == "name,x,y,z,n"
    moved = np.array([line.split(",")[1:4] for line in lines[1:]], float)
    expected = result().transform_points(points, "moving_to_fixed")
    np.testing.assert_allclose(moved, expected, atol=1e-5)


def test_points_outside_are_moved_with_a_warning(folder, capsys):
    result().save(folder.path / "p.nephi")
    points = [*rows_in(PLACE_B, 3, np.random.default_rng(0)).tolist(), [9e3, 0, 0]]
    write_points(folder.path / "in.csv", points)
    cli.warp(["--transform", "p.nephi", "--points", "in.csv", "--out", "o.csv"])
    text = capsys.readouterr()
    assert "points: fixed -> moving (4 points, LPS mm)" in text.out
    assert "warning: 1 of 4 points lie outside the fixed image" in text.err


@pytest.mark.parametrize("transform", ["p.nephi", "T.h5"])
def test_cubic_and_onehot(folder, transform):
    cli.register([*pair(save="p.nephi", transform_out="T.h5"), "--quiet"])
    smooth = itk.imread(str(folder.path / "moving.nrrd"), itk.F)
    x, y, z = np.meshgrid(*(np.arange(n) for n in PLACE_A.size), indexing="ij")
    wave = 100 * np.sin(x / 2.5) * np.cos(y / 3) + z
    smooth = itk_images.image_of(wave.astype(np.float32), PLACE_A)
    itk.imwrite(smooth, str(folder.path / "smooth.nrrd"))
    common = ["--transform", transform, "--reference", "fixed.nrrd"]
    for mode in ("linear", "cubic"):
        flags = ["--interpolation", mode, "--out", f"{mode}.nrrd"]
        cli.warp([*common, "--image", "smooth.nrrd", *flags])
    read = {
        m: np.asarray(itk.imread(str(folder.path / f"{m}.nrrd")))
        for m in ("linear", "cubic")
    }
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in PLACE_B.size), indexing="ij"))
    frame = PLACE_B.unit_to_physical().numpy()
    unit = grid.reshape(3, -1).T / (np.array(PLACE_B.size) - 1)
    moved = result().transform_points(unit @ frame[:3, :3].T + frame[:3, 3])
    back = PLACE_A.physical_to_unit().numpy()
    index = (moved @ back[:3, :3].T + back[:3, 3]) * (np.array(PLACE_A.size) - 1)
    inner = ((index > 2) & (index < np.array(PLACE_A.size) - 3)).all(1)
    assert inner.sum() > 100
    i, j, k = index[inner].T
    true = 100 * np.sin(i / 2.5) * np.cos(j / 3) + k
    worst = {m: np.abs(v.ravel()[inner] - true).max() for m, v in read.items()}
    assert worst["cubic"] < 0.5 * worst["linear"]
    assert worst["cubic"] < 2
    flags = ["--interpolation", "onehot", "--out", "l.nrrd"]
    cli.warp([*common, "--labels", "moving_labels.nrrd", *flags])
    labels = itk.array_from_image(itk.imread(str(folder.path / "moving_labels.nrrd")))
    ours = itk.array_from_image(itk.imread(str(folder.path / "l.nrrd")))
    assert ours.dtype == np.uint8
    shares = []
    for label in range(5):
        one = itk_images.image_of((labels == label).astype(np.float32), PLACE_A)
        shares.append(np.asarray(result().warp(one)).ravel()[inner])
    best = np.sort(shares, 0)
    clear = best[-1] - best[-2] > 1e-3
    np.testing.assert_array_equal(
        ours.ravel()[inner][clear], np.argmax(shares, 0)[clear]
    )


def test_two_itk_transforms_answer_as_a_registration_does(folder):
    ours = result()
    images = [
        itk_images.image_of(np.zeros(p.size, np.float32), p) for p in (PLACE_A, PLACE_B)
    ]
    both = ItkPair(ours.phi_AB, ours.phi_BA, *images)
    np.testing.assert_allclose(
        np.asarray(both.displacement_field()),
        np.asarray(ours.displacement_field()),
        atol=1e-3,
    )
    # Outside the moving image its field ends, so the middle is compared.
    middle = (slice(5, -5), slice(4, -4), slice(4, -4))
    ways = both.inverse_consistency_error, ours.inverse_consistency_error
    errors = [np.asarray(way())[middle] for way in ways]
    np.testing.assert_allclose(*errors, atol=0.1)
    assert both.fold_fraction() == pytest.approx(ours.fold_fraction(), abs=0.02)


def test_a_great_shift_does_not_spoil_differences():
    transform = itk.AffineTransform[itk.D, 3].New()
    matrix = np.array([[0.0, 1.1, 0], [-0.9, 0, 0.1], [0, 0, 1]])
    transform.SetMatrix(itk.matrix_from_array(matrix))
    transform.SetTranslation([5000.0, -3000, 100])
    image = itk_images.image_of(np.zeros(PLACE_B.size, np.uint8), PLACE_B)
    found = itk_images.array_of(ItkPair(transform).jacobian(image))
    found = found.reshape(-1, 3, 3)
    np.testing.assert_allclose(found, np.broadcast_to(matrix, found.shape), atol=1e-5)


def test_the_report_is_written_with_the_landmarks_and_the_command(folder, monkeypatch):
    asked = {}

    def report(self, path, **given):
        asked.update(given)
        path.write_text("<html></html>")

    monkeypatch.setattr(Registration, "report", report)
    points = rows_in(PLACE_B, 3, np.random.default_rng(0))
    write_points(folder.path / "p.csv", points)
    both = {"landmarks_fixed": "p.csv", "landmarks_moving": "p.csv"}
    cli.register([*pair(report="out/r.html", **both), "--quiet"])
    assert (folder.path / "out" / "r.html").exists()
    np.testing.assert_allclose(asked["landmarks_fixed"], points)
    assert asked["command"].startswith("nephi-register --fixed")
