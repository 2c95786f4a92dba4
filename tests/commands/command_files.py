"""A pair of small images with everything around it, for tests of the commands."""

import itk
import numpy as np
import pytest

from icon_nephi.io import itk_images
from icon_nephi.registration import register as registration
from icon_nephi.registration.result import Registration
from tests.small_fits import geometry, small_fit, unit_matrix

SIZE_A, SIZE_B = (12, 16, 14), (17, 11, 13)
PLACE_A, PLACE_B = geometry(SIZE_A, 1), geometry(SIZE_B, 2)


def make_folder(tmp_path, monkeypatch):
    """A folder with a pair, masks and labels, and a stand-in for the optimisation."""
    generator = np.random.default_rng(0)
    for name, place in (("moving", PLACE_A), ("fixed", PLACE_B)):
        noise = 100 * generator.normal(size=place.size)
        for end, array in (
            ("", noise.astype(np.int16)),
            ("_mask", np.ones(place.size, np.uint8)),
            ("_labels", generator.integers(0, 5, place.size).astype(np.uint8)),
        ):
            image = itk_images.image_of(array, place)
            itk.imwrite(image, str(tmp_path / f"{name}{end}.nrrd"))

    def fit(image_A, image_B, *, options, **choices):
        fit.images, fit.options = (image_A, image_B), choices | vars(options)
        fit.seeds.append(options.seed)
        return small_fit(3, unit_matrix(3))

    fit.seeds = []
    monkeypatch.setattr(registration, "fit_pair", fit)
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("out").mkdir()
    fit.path = tmp_path
    return fit


def pair(**flags):
    given = {"fixed": "fixed.nrrd", "moving": "moving.nrrd"} | flags
    return [x for k, v in given.items() if v is not None for x in (f"--{k}", str(v))]


def result():
    return Registration(small_fit(3, unit_matrix(3)), PLACE_A, PLACE_B, itk=True)


def write_points(path, rows, header="x,y,z"):
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def refused(command, arguments, words, folder, capfd):
    """One line on stderr, exit code 2, nothing written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        command(arguments)
    assert stop.value.code == 2
    text = capfd.readouterr()
    assert text.err.count("\n") == 1
    assert words in text.err
    assert text.out == ""
    assert sorted(folder.rglob("*")) == before


def spoil(path):
    """Files that nobody can register."""
    good = itk.imread(str(path / "fixed.nrrd"), itk.F)
    array = itk.array_from_image(good)

    def write(name, values, **options):
        itk.imwrite(itk.image_from_array(values, **options), str(path / name))

    write("constant.nrrd", np.full_like(array, 7))
    holed = array.copy()
    holed[2, 2, 2] = np.nan
    write("nan.nrrd", holed)
    write("empty.nrrd", np.zeros(SIZE_B, np.uint8))
    write("4d.nrrd", np.zeros((3, 4, 5, 6), np.float32))
    write("thin.nrrd", np.random.default_rng(0).normal(size=(1, 9, 9)))
    write("flat.nrrd", np.random.default_rng(0).normal(size=(9, 9)))
    vector = np.zeros((4, 5, 6, 3), np.float32)
    write("vector.nrrd", vector, ttype=(itk.Image[itk.Vector[itk.F, 3], 3],))
    far = itk.image_from_array(np.ones(SIZE_B, np.uint8))
    far.SetOrigin([5000.0, 5000, 5000])
    itk.imwrite(far, str(path / "far.nrrd"))
    itk.imwrite(good, str(path / "cut.nii.gz"))
    for name in ("cut.nii.gz",):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[: len(whole) // 2])
    (path / "text.nii").write_text("not an image")
    # A header with a spacing of zero: x has no extent.
    lines = (path / "fixed.nrrd").read_bytes().split(b"\n")
    zero = [
        b"spacings: 0 1 1" if x.startswith(b"space directions") else x for x in lines
    ]
    zero = [x for x in zero if not x.startswith(b"space ")]
    (path / "zero.nrrd").write_bytes(b"\n".join(zero))
