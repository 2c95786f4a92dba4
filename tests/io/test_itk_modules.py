"""ITK's classes from their own modules are ITK's, and bring little with them."""

import subprocess
import sys

import itk
import numpy as np
import pytest
import torch

from icon_nephi.io import itk_modules
from icon_nephi.io.itk_transforms import write_transform
from icon_nephi.registration.result import Registration
from icon_nephi.space.frames import Geometry
from tests.small_fits import small_fit

# Around the origin, 20 mm a side.
PLACE = Geometry(
    (11, 11, 11), (2.0,) * 3, (-10.0,) * 3, ((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0))
)


def a_transform(kind):
    if kind == "affine":
        affine = itk.AffineTransform[itk.D, 3].New()
        affine.SetTranslation([1.0, 2.0, 3.0])
        return affine
    if kind == "rigid":
        rigid = itk.Euler2DTransform[itk.D].New()
        rigid.SetAngle(0.3)
        return rigid
    if kind == "both":
        both = itk.CompositeTransform[itk.D, 3].New()
        both.AddTransform(a_transform("affine"))
        return both
    field = itk.Image[itk.Vector[itk.D, 2], 2].New()
    field.SetRegions([4, 4])
    field.Allocate()
    field.FillBuffer([0.5, 0.25])
    moved = itk.DisplacementFieldTransform[itk.D, 2].New()
    moved.SetDisplacementField(field)
    return moved


@pytest.mark.parametrize("kind", ["affine", "rigid", "both", "field"])
@pytest.mark.parametrize("ending", [".h5", ".tfm"])
def test_transforms_are_read_and_written_as_itk_does(tmp_path, kind, ending):
    transform, path = a_transform(kind), tmp_path / f"T{ending}"
    if (kind, ending) == ("field", ".tfm"):
        pytest.skip("ITK writes fields to HDF5")
    itk_modules.write_transforms(transform, path)
    (ours,), (theirs,) = itk_modules.read_transforms(path), itk.transformread(path)
    assert type(ours) is type(theirs) is type(transform)
    point = [1.0, 1.5, 2.0][: transform.GetInputSpaceDimension()]
    expected = tuple(transform.TransformPoint(point))
    assert tuple(ours.TransformPoint(point)) == expected


def test_a_class_is_that_of_itk():
    assert (
        itk_modules.itk_class("BSplineTransform", "D33")
        is (itk.BSplineTransform[itk.D, 3, 3])
    )


def test_points_through_a_transform_need_none_of_itks_filters(tmp_path):
    # In a process of its own, where nothing else has loaded more of ITK.
    result = Registration(small_fit(3, torch.eye(4).double()), PLACE, PLACE, itk=True)
    write_transform(result.phi_AB, tmp_path / "T.h5")
    points = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (tmp_path / "p.csv").write_text("x,y,z\n1,2,3\n4,5,6\n")
    code = """
import sys
from icon_nephi import cli
cli.warp(["--transform", "T.h5", "--points", "p.csv", "--out", "o.csv", "--quiet"])
print(*sys.modules, sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    moved = np.loadtxt(tmp_path / "o.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(moved, result.transform_points(points), atol=1e-3)
    loaded = set(done.stdout.split())
    heavy = {"ITKImageIntensity", "ITKThresholding", "ITKImageGrid", "ITKFFT"}
    assert not {f"itk._{name}Python" for name in heavy} & loaded
