"""ITK's classes from their own modules, without the groups of modules around them.

What is asked of ``itk`` itself it loads with all that the groups of its modules name:
for a transform all filters of images, 8 CPU seconds. A class's own module loads what
that class needs, and the classes are the same.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

_FORMATS = ("HDF5", "Matlab", "Txt")  # of transforms
_IMAGES = {
    **{"NiftiImageIO": (".nii", ".nii.gz"), "NrrdImageIO": (".nrrd", ".nhdr")},
    **{"MetaImageIO": (".mha", ".mhd"), "TIFFImageIO": (".tif", ".tiff")},
    "PNGImageIO": (".png",),
}
#: Pixel types of whole images that ITK's Python has, and its short names for them.
PIXELS = {
    **{"unsigned_char": "UC", "short": "SS", "unsigned_short": "US", "int": "SI"},
    **{"unsigned_int": "UI", "float": "F", "double": "D"},
}


def itk_class(name: str, types: str) -> Any:
    """Return a class of ITK.

    Args:
        name: as in ``itk.BSplineTransform``.
        types: of its template, as ITK abbreviates them: "D33".
    """
    return getattr(_module(name), f"itk{name}{types}")


def read_transforms(path: Path) -> list[Any]:
    """Return the transforms in a file, as ``itk.transformread``."""
    _know_formats()
    reader = itk_class("TransformFileReaderTemplate", "D").New()
    reader.SetFileName(str(path))
    reader.Update()
    found: list[Any] = []
    left = reader.GetModifiableTransformList()
    while not left.empty():
        found.insert(0, specialized(left.pop()))
    return found


def write_transforms(transform: Any, path: Path) -> None:
    """Write one transform, compressed where the format can be."""
    _know_formats()
    writer = itk_class("TransformFileWriterTemplate", "D").New()
    writer.SetFileName(str(path))
    writer.SetUseCompression(True)
    writer.AddTransform(transform)
    writer.Update()


def image_io(path: Path) -> Any:
    """Return ITK's reader and writer of an image format, None where only ITK knows it.

    Asked for one by one: ITK's own search loads those of all formats, 3 CPU seconds.
    """
    name = next((n for n, ends in _IMAGES.items() if path.name.endswith(ends)), None)
    return None if name is None else itk_class(name, "").New()


def read_voxels(path: Path, io: Any, kind: str, dimension: int) -> Any:
    """Return the scalar image of a file, in one of the types of `PIXELS`."""
    reader = itk_class("ImageFileReader", f"I{PIXELS[kind]}{dimension}").New()
    reader.SetFileName(str(path))
    reader.SetImageIO(io)
    reader.Update()
    return reader.GetOutput()


def write_voxels(image: Any, path: Path) -> None:
    """Write an image, compressed, as ``itk.imwrite``."""
    kind, io = type(image).__name__.removeprefix("itkImage"), image_io(path)
    known = kind[:-1] in PIXELS.values()
    if io is None or not known:
        import itk

        itk.imwrite(image, str(path), compression=True)
        return
    writer = itk_class("ImageFileWriter", f"I{kind}").New()
    writer.SetFileName(str(path))
    writer.SetImageIO(io)
    writer.SetInput(image)
    writer.SetUseCompression(True)
    writer.Update()


def specialized(transform: Any) -> Any:
    """Return a transform as what it is, as ``itk.down_cast``."""
    name = transform.GetNameOfClass()
    try:
        kinds = vars(_module(name)).items()
    except ImportError:
        kinds = {}.items()
    for key, kind in kinds:
        if key.startswith(f"itk{name}") and hasattr(kind, "cast"):
            try:
                return kind.cast(transform)
            except Exception:  # SWIG's own: another precision or dimension
                continue
    import itk

    return itk.down_cast(transform)


def _module(name: str) -> Any:
    home = {
        "TransformFileReaderTemplate": "TransformFileReader",
        "TransformFileWriterTemplate": "TransformFileWriter",
    }.get(name, name)
    return import_module(f"itk.itk{home}Python")


@cache
def _know_formats() -> None:
    """Let ITK know the formats of transforms."""
    for name in _FORMATS:
        kind = f"{name}TransformIO"
        getattr(_module(kind), f"itk{kind}Factory").RegisterOneFactory()
