"""ITK's classes from their own modules are ITK's, and bring little with them."""

import subprocess
import sys

import itk
import pytest

from icon_nephi.io import itk_modules


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


def test_reading_a_transform_does_not_load_the_filters(tmp_path):
    itk.transformwrite(a_transform("both"), str(tmp_path / "T.h5"))
    code = f"""
import sys
from pathlib import Path
from icon_nephi.io.itk_transforms import read_transform
transform = read_transform("T", Path({str(tmp_path / "T.h5")!r}))
assert tuple(transform.TransformPoint([0.0, 0.0, 0.0])) == (1.0, 2.0, 3.0)
print(*sys.modules, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    heavy = {"ITKImageIntensity", "ITKThresholding", "ITKImageGrid", "ITKFFT"}
    assert not {f"itk._{name}Python" for name in heavy} & loaded
