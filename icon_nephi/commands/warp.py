"""Images, label maps, points and meshes through a registration, as files."""

from __future__ import annotations

from pathlib import Path

from icon_nephi.commands.flags import IMAGES, POINTS, WarpFlags, check_output
from icon_nephi.commands.inputs import in_words, read_map, read_reference
from icon_nephi.io import itk_images
from icon_nephi.io.atomic import written_whole
from icon_nephi.io.points import read_points, with_column
from icon_nephi.maps.two_way import direction_of, opposite
from icon_nephi.registration.itk_pair import ItkPair
from icon_nephi.registration.result import Registration
from icon_nephi.report.expected_error import error_estimate

# How each kind of file may be read between voxels; the first is the default.
MODES: dict[str, tuple[str, ...]] = {
    "image": ("linear", "cubic"),
    "labels": ("nearest", "onehot"),
    "points": (),
}


def warp_file(flags: WarpFlags) -> tuple[str, list[str]]:
    """Write what is moved; return a text that says what was done, and warnings.

    Raises:
        ValueError: files that cannot be used, or flags that do not go together.
    """
    kind = next(kind for kind in MODES if getattr(flags, kind) is not None)
    path: Path = getattr(flags, kind)
    endings: tuple[str, ...] = IMAGES
    if kind == "points":
        endings = tuple(e for e in POINTS if path.name.lower().endswith(e)) or POINTS
    out = check_output("out", flags.out, endings)
    if flags.interpolation not in (None, *MODES[kind]):
        raise ValueError(
            f"--interpolation {flags.interpolation} is not for --{kind}; of --image "
            "linear or cubic, of --labels nearest or onehot"
        )
    # An image comes from where its points are looked up, so it goes the other way.
    home = "moving" if kind == "points" else "fixed"
    inverse = flags.inverse if flags.to is None else flags.to != home
    way = "inverse" if flags.inverse else flags.to
    mapping = read_map(flags.transform, way, flags.number)
    if flags.errors and (isinstance(mapping, ItkPair) or endings != (".csv",)):
        raise ValueError("--errors needs a .nephi file and --points in a .csv")
    if kind == "points":
        return _warp_points(flags, mapping, path, out, direction_of(inverse=inverse))
    image = itk_images.read_image(f"--{kind}", path)
    if kind == "labels":
        image = itk_images.check_label_map(f"--{kind}: {path}", image)
    warped = mapping.warp(
        image,
        flags.interpolation or MODES[kind][0],
        read_reference(flags.reference, mapping),
        inverse=inverse,
        outside=0 if kind == "labels" else None,
    )
    with written_whole(out) as (part,):
        itk_images.write_image(warped, part)
    way = in_words(mapping, opposite(direction_of(inverse=inverse)))
    return f"{kind}: {way}\nout: {out}", []


def _warp_points(
    flags: WarpFlags,
    mapping: Registration | ItkPair,
    path: Path,
    out: Path,
    direction: str,
) -> tuple[str, list[str]]:
    file = read_points("--points", path)
    points = file.points
    if isinstance(mapping, Registration):
        place, side = mapping.two_way.place(direction), direction.split("_")[0]
        dimension = place.dimension
    else:
        place, side, dimension = None, "reference", mapping.dimension
        if flags.reference is not None:
            image = itk_images.read_image("--reference", flags.reference)
            place = itk_images.geometry_of(image)
            if place.dimension != dimension:
                raise ValueError(
                    "--reference and --transform have different dimensions"
                )
    if points.shape[1] != dimension:
        raise ValueError(
            f"points must be {dimension}D as the transform, but --points has "
            f"{points.shape[1]} coordinates a point"
        )
    content = file.content(mapping.transform_points(points, direction))
    if flags.errors:
        expected = error_estimate(mapping, points, (), direction)
        content = with_column(content, "expected_error_mm", expected)
    with written_whole(out) as (part,):
        part.write_bytes(content)
    way = in_words(mapping, direction)
    text = f"points: {way} ({len(points)} points, {file.frame} mm)\nout: {out}"
    far = 0 if place is None else int(place.outside(points).sum())
    warning = (
        f"{far} of {len(points)} points lie outside the {side} image, where nothing "
        "was registered; they must be LPS mm"
    )
    return text, [warning] if far else []
