"""A folder of DICOM files as one image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Of the distance between slices: what they may lie off, and be read as evenly spaced.
_EVEN = 0.01
_UNEVEN = "ITK_non_uniform_sampling_deviation"


def read_series(folder: Path) -> Any:
    """Return the image of a folder's one DICOM series, as ITK (GDCM) reads it.

    A tilted gantry's slices stay where they were taken: the axes are then not at right
    angles.

    Raises:
        ValueError: no series, several, or slices that are missing.
    """
    import itk

    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(False)  # else slices of one scan may count as several
    names.SetGlobalWarningDisplay(False)
    names.SetDirectory(str(folder))
    series = {uid: list(names.GetFileNames(uid)) for uid in names.GetSeriesUIDs()}
    if not series:
        raise ValueError("is a folder without DICOM files; give a file")
    if len(series) > 1:
        found = ", ".join(
            f"{uid} ({len(files)} files, {Path(files[0]).name} ...)"
            for uid, files in sorted(series.items())
        )
        raise ValueError(
            f"holds {len(series)} DICOM series: {found}; put each into a folder of its "
            "own and give that"
        )
    (files,) = series.values()
    if len(files) == 1:
        raise ValueError("holds one DICOM file only; give it as the file it is")
    reader = _reader(itk, files)
    image = reader.GetOutput()
    if image.GetMetaDataDictionary().HasKey(_UNEVEN):
        off = float(image[_UNEVEN])
        if off > _EVEN * float(image.GetSpacing()[2]):
            raise ValueError(
                f"holds DICOM slices that are not evenly spaced, up to {off:.3g} mm "
                "off: is one missing? resample them to one volume first"
            )
    return image


def _reader(itk: Any, files: list[str]) -> Any:
    """Return what has read the files, in the type of the first."""
    header = itk.GDCMImageIO.New()
    header.SetFileName(files[0])
    header.ReadImageInformation()
    if header.GetNumberOfComponents() != 1:
        raise ValueError("holds DICOM files in colours; convert them to grey")
    kinds = {"unsigned_char": itk.UC, "short": itk.SS, "unsigned_short": itk.US}
    name = header.GetComponentTypeAsString(header.GetComponentType())
    pixel = kinds.get(name, itk.F)  # scaled values are floats
    reader = itk.ImageSeriesReader[itk.Image[pixel, 3]].New()
    reader.SetImageIO(header)
    reader.SetFileNames(files)
    reader.ForceOrthogonalDirectionOff()
    reader.Update()
    return reader
