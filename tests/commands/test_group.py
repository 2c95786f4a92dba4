"""nephi-series and nephi-template: their files, the page, and what they refuse."""

import json

import itk
import numpy as np
import pytest

from icon_nephi import cli
from icon_nephi.io import itk_images
from icon_nephi.io.itk_frames import frames_of, write_frames
from icon_nephi.phantoms import breathing_cycle
from icon_nephi.registration import group
from icon_nephi.report import scene, series_page
from icon_nephi.space.frames import Geometry
from tests.commands.command_files import refused, write_points
from tests.fit.small_runs import SMALL

SIZE, SPACING = (12, 10, 12), 300 / 11
EYE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
PLACE = Geometry(SIZE, (SPACING, 250 / 9, SPACING), (-5.0, 7.0, 9.0), EYE)


@pytest.fixture(scope="module")
def volumes():
    cycle = breathing_cycle(SIZE, 3, noise=5.0)
    return [image[0, 0].numpy().astype(np.int16) for image in cycle.images]


@pytest.fixture
def folder(tmp_path, monkeypatch, volumes):
    """A 4D file, its frames as files, and a search for maps that takes no time."""
    images = [itk_images.image_of(v, PLACE) for v in volumes]
    write_frames(images, tmp_path / "4d.nii.gz", 0.4)
    for number, image in enumerate(images):
        itk.imwrite(image, str(tmp_path / f"{number}.nii.gz"))
    fit = group.fit_group

    def quick(*sources, **choices):
        small = SMALL.__class__(**vars(SMALL) | {"steps": 20})
        return fit(*sources, **choices | {"field": small})

    monkeypatch.setattr(group, "fit_group", quick)
    for name in ("PICTURE", "FLAT", "MAP"):
        monkeypatch.setattr(scene, name, 12)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_4d_file_becomes_everything(folder, capsys):
    write_points(folder / "p.csv", [[60, 80, 90], [120, 100, 150]])
    mesh = "# vtk DataFile Version 3.0\nm\nASCII\nDATASET POLYDATA\nPOINTS 1 float\n"
    (folder / "m.vtk").write_text(mesh + "60 80 90\n")
    words = "--images 4d.nii.gz --periodic --reference 0 --save s.nephi --quiet"
    words += " --report s.html --json s.json --mean_out mean.nrrd"
    words += " --warped_out still.nii.gz --jacobians_out growth.nii.gz"
    words += " --displacements_out moves --points p.csv --points_out path.csv"
    cli.series(words.split())
    assert not list(folder.glob("*.begun"))
    told = json.loads((folder / "s.json").read_text())
    assert [image["time"] for image in told["images"]] == pytest.approx([0, 0.4, 0.8])
    assert not told["left_out"]
    page = (folder / "s.html").read_text()
    assert "time 0.4" in page
    assert 'aria-label="Axial image"' in page
    frames, step = frames_of("still", itk.imread("still.nii.gz"))
    assert step == pytest.approx(0.4)
    assert len(frames) == 3
    mean = np.mean([itk_images.array_of(f) for f in frames], 0)
    assert np.abs(itk_images.array_of(itk.imread("mean.nrrd")) - mean).max() < 0.01
    assert len(list(folder.glob("moves/*.nii.gz"))) == 3
    rows = np.genfromtxt(folder / "path.csv", delimiter=",", skip_header=1)
    assert rows.shape == (6, 5)
    assert rows[:2, 2:] == pytest.approx(np.array([[60, 80, 90], [120, 100, 150]]))
    cli.warp(
        [
            "--transform",
            "s.nephi",
            "--number",
            "2",
            "--points",
            "m.vtk",
            "--out",
            "m2.vtk",
        ]
    )
    last = (folder / "m2.vtk").read_text().split("\n")[5].split()
    assert [float(x) for x in last] == pytest.approx(rows[4, 2:].tolist(), abs=1e-3)
    capsys.readouterr()
    cli.info(["s.nephi"])
    said = capsys.readouterr().out
    assert "series by icon_nephi" in said
    assert "image 0" in said


def test_a_mesh_becomes_a_series_of_meshes(folder):
    mesh = "# vtk DataFile Version 3.0\nm\nASCII\nDATASET POLYDATA\nPOINTS 1 float\n"
    (folder / "m.vtk").write_text(mesh + "60 80 90\n")
    words = "--images 0.nii.gz 1.nii.gz 2.nii.gz --times 0 1 3 --quiet --points m.vtk"
    cli.series([*words.split(), "--points_out", "moved.vtk"])
    entries = json.loads((folder / "moved.vtk.series").read_text())["files"]
    assert [(e["name"], e["time"]) for e in entries] == [
        *(("moved_0.vtk", 0.0), ("moved_1.vtk", 1.0), ("moved_2.vtk", 3.0))
    ]
    assert all((folder / entry["name"]).exists() for entry in entries)


def test_a_group_becomes_a_template(folder, volumes, capsys):
    for number, values in enumerate(volumes):
        labels = itk_images.image_of((values > -500).astype(np.uint8), PLACE)
        itk.imwrite(labels, str(folder / f"seg{number}.nii.gz"))
    words = "--images 0.nii.gz 1.nii.gz 2.nii.gz --no_affine --out t.nii.gz"
    words += " --labels seg0.nii.gz seg1.nii.gz seg2.nii.gz --labels_out seg.nii.gz"
    cli.template(
        [*words.split(), *["--save", "t.nephi", "--report", "t.html", "--quiet"]]
    )
    template = itk_images.array_of(itk.imread("t.nii.gz"))
    labels = itk_images.array_of(itk.imread("seg.nii.gz"))
    assert template.shape == labels.shape == SIZE
    inside, outside = template[labels == 1].mean(), template[labels == 0].mean()
    assert inside > outside + 0.2
    assert "1.nii.gz" in (folder / "t.html").read_text()
    cli.info(["t.nephi"])
    assert "template by icon_nephi" in capsys.readouterr().out


SERIES, TEMPLATE = cli.series, cli.template


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        (SERIES, "--images 4d.nii.gz", "nothing to write"),
        (SERIES, "--images 0.nii.gz --save s.nephi", "one 3D image; give a 4D"),
        (SERIES, "--images no.nii.gz --save s.nephi", "does not exist"),
        (SERIES, "--images 0.nii.gz no.nii.gz --save s.nephi", "two at least"),
        (SERIES, "--images 0.nii.gz 0.nii.gz --save s.nephi", "all the same"),
        (SERIES, "--images 4d.nii.gz --mean_out 4d.nii.gz", "also an input"),
        (SERIES, "--images 4d.nii.gz --save s.txt", "must end in .nephi"),
        (SERIES, "--images 4d.nii.gz --save s.nephi --times 0 2 1", "must increase"),
        (SERIES, "--images 4d.nii.gz --save s.nephi --reference 3", "0 to 2"),
        (
            SERIES,
            "--images 4d.nii.gz --save s.nephi --periodic --period 3",
            "do not go together",
        ),
        (SERIES, "--images 4d.nii.gz --points_out p.csv", "belong together"),
        (SERIES, "--images 4d.nii.gz --transforms_out .", "holds inputs"),
        (TEMPLATE, "--images 0.nii.gz 1.nii.gz --labels_out s.nrrd", "together"),
        (
            TEMPLATE,
            "--images 0.nii.gz 1.nii.gz --labels 0.nii.gz --labels_out s.nrrd",
            "--labels are 1 and --images 2",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folder, capfd, command, words, said):
    refused(command, words.split(), said, folder, capfd)


def test_a_page_without_images_is_refused(folder):
    with pytest.raises(ValueError, match="must end in"):
        series_page.write_series_report("s.txt", None)
