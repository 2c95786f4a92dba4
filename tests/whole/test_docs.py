"""The code of the documentation runs: Python blocks, and the commands.

Every ```python block of docs/*.md, in order, in one namespace a page, in an empty
folder; of `OWN_FILES`, which read the user's own files, they and the commands of all
```sh blocks run in a folder that has such files, small ones, with a stand-in for the
optimisation.
"""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import itk
import numpy as np
import pytest

from icon_nephi import cli
from icon_nephi.fit.group import fit_group
from icon_nephi.io import itk_images
from icon_nephi.io.itk_frames import write_frames
from icon_nephi.registration import group
from icon_nephi.registration import register as registration
from icon_nephi.report import page as report_page
from icon_nephi.report import scene
from tests.commands.command_files import write_points
from tests.fit.small_runs import SMALL
from tests.small_fits import geometry, small_fit, unit_matrix

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OWN_FILES = ("README.md", "getting_started.md", "how_to.md")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
# Needs a trained ICON network, or a 175^3 one.
NOT_RUN = "In an ICON script"


def blocks(text):
    """The Python code of a page; line numbers are those of the page."""
    for match in BLOCK.finditer(text):
        yield "\n" * text.count("\n", 0, match.start(1)) + match[1]


def commands(text):
    """The words of every nephi-* command in the shell blocks of a page."""
    for block in SHELL.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and Path(words[0]).name.startswith("nephi-"):
                yield [Path(words[0]).name, *words[1:]]


WITH_CODE = [
    page
    for page in PAGES
    if page.name not in OWN_FILES and any(blocks(page.read_text("utf-8")))
]
WITH_COMMANDS = [p for p in PAGES if any(commands(p.read_text("utf-8")))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for code in blocks(page.read_text("utf-8")):
        exec(compile(code, str(page), "exec"), names)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, and a registration that takes no time."""

    def fit(image_A, image_B, **options):
        d = image_A.place.dimension
        return small_fit(d, unit_matrix(d))

    def fit_many(sources, **choices):
        return fit_group(sources, **choices | {"field": replace(SMALL, steps=8)})

    monkeypatch.setattr(registration, "fit_pair", fit)
    monkeypatch.setattr(group, "fit_group", fit_many)
    for name in ("PICTURE", "FLAT", "MAP"):
        monkeypatch.setattr(scene, name, 12)
    monkeypatch.setattr(report_page, "SLICES", 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_file(path):
    """A small file such as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.startswith("4d"):
        noise = np.random.default_rng(0).normal(size=(3, 9, 10, 11))
        frames = [itk_images.image_of(n, geometry(n.shape, 3)) for n in noise]
        return write_frames(frames, path)
    name, generator = path.name, np.random.default_rng(list(path.name.encode()))
    size = (9, 10) if name.endswith(".tif") else (9, 10, 11)
    if name.endswith((".nii.gz", ".nrrd", ".tif")):
        kind = np.uint8 if re.search("mask|lungs|labels", name) else np.int16
        values = generator.integers(0, 5, size).astype(kind)
        place = geometry(size, 3)
        if len(size) == 2:  # TIFF knows no directions
            eye = ((1.0, 0.0), (0.0, 1.0))
            place = type(place)(size, place.spacing, (0.0, 0.0), eye)
        itk.imwrite(itk_images.image_of(values, place), str(path))
    elif name == "pairs.csv":
        for side in ("one", "other"):
            make_file(path.with_name(f"{side}.nrrd"))
        write_points(path, [["one.nrrd", "other.nrrd"]], "fixed,moving")
    elif name.endswith(".csv"):
        write_points(path, generator.normal(size=(3, 3)).tolist())
    elif name.endswith(".fcsv"):
        header = "# CoordinateSystem = LPS\n# columns = id,x,y,z"
        write_points(path, [["a", 1, 2, 3]], header)
    elif name.endswith(".vtk"):
        head = "# vtk DataFile Version 3.0\nmesh\nASCII\nDATASET POLYDATA\n"
        path.write_text(head + "POINTS 1 float\n1 2 3\n")
    elif name.endswith(".stl"):
        corners = "vertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\n"
        facet = f"facet normal 0 0 1\nouter loop\n{corners}endloop\nendfacet\n"
        path.write_text(f"solid s\n{facet}endsolid s\n")
    else:
        raise AssertionError(f"no idea how to make {name}")


OUTPUTS = re.compile(r"--(out|save|report|json|\w+_out)$")


def run(words):
    """The command, with the files that it reads; its outputs are there after it."""
    written, flag = [], ""
    for word in words[1:]:
        if word.startswith("--"):
            flag = word
        elif OUTPUTS.match(flag):
            written.append(Path(word))
        elif flag == "--out_dir":
            Path(word).mkdir(exist_ok=True)
        elif flag and re.search("[.][a-z]", word) and not Path(word).exists():
            make_file(Path(word))
    getattr(cli, words[0].removeprefix("nephi-"))(words[1:])
    for path in written:
        assert path.exists(), path


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, folder):
    for words in commands(page.read_text("utf-8")):
        if words[0] != "nephi-compare" and "--model" not in words:
            run(words)


@pytest.mark.parametrize("name", OWN_FILES)
def test_the_first_page_runs_with_files_of_ones_own(name, folder):
    page = next(p for p in PAGES if p.name == name)
    text = page.read_text("utf-8").partition(NOT_RUN)[0]
    for file in ("inhale.nii.gz", "exhale.nii.gz"):
        make_file(folder / file)
    names = {"__name__": page.stem}
    for code in blocks(text):
        exec(compile(code, str(page), "exec"), names)


def test_pages_have_code_and_commands():
    assert "voxel_to_neural.md" in [page.name for page in WITH_CODE]
    expected = {"README.md", "getting_started.md", "how_to.md"}
    assert expected <= {page.name for page in WITH_COMMANDS}


def test_blocks_are_found_where_they_are():
    text = "a\n```python\nx = 1\n```\n```sh\nls  # nephi-no\n.venv/bin/nephi-info \\\n"
    text += "    p.nephi  # why\n```\n"
    assert list(blocks(text)) == ["\n\nx = 1\n"]
    assert list(commands(text)) == [["nephi-info", "p.nephi"]]
