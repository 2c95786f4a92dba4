"""Jacobians of a registration as an image, and what they come to."""

from __future__ import annotations

import numpy as np

from icon_nephi.commands.early import check_jacobian
from icon_nephi.commands.flags import JacobianFlags
from icon_nephi.commands.inputs import in_words, read_map, read_reference
from icon_nephi.io.atomic import written_whole
from icon_nephi.io.image_files import check_holds, write_image
from icon_nephi.io.itk_images import array_of, geometry_of, image_of
from icon_nephi.maps.jacobians import count_folds
from icon_nephi.maps.two_way import direction_of
from icon_nephi.report.measure import determinant_range


def write_jacobian(flags: JacobianFlags) -> tuple[str, list[str]]:
    """Write determinants, their logarithm or the matrices; return a text and warnings.

    Raises:
        ValueError: files that cannot be used, or a direction that there is not.
    """
    out = check_jacobian(flags)
    way = "inverse" if flags.inverse else None
    mapping = read_map(flags.transform, way, flags.number)
    direction = direction_of(inverse=flags.inverse)
    reference = read_reference(flags.reference, mapping)
    if reference is not None:
        place = geometry_of(reference)
    else:
        place = mapping.geometry_A if flags.inverse else mapping.geometry_B
    warnings: list[str] = []
    numbers = place.dimension**2 if flags.tensor else None
    check_holds("--out", out, place, components=numbers, said=warnings)
    if flags.tensor:
        image = mapping.jacobian(reference, direction)
        matrices = array_of(image).astype(float)
        d = image.GetImageDimension()
        values = np.linalg.det(matrices.reshape(*matrices.shape[:-1], d, d))
    else:
        image = mapping.jacobian_determinant(reference, direction)
        values = array_of(image)
    folds = count_folds(values)
    if flags.log:
        logs = np.log(np.where(values > 0, values, np.nan)).astype(np.float32)
        image = image_of(logs, geometry_of(image))
        if folds:
            warnings.append(
                f"{folds} voxels have no logarithm (determinant not positive): they "
                "are NaN"
            )
    with written_whole(out) as (part,):
        write_image(image, part)
    ends = ", ".join(
        f"{name} {value:.4f}" for name, value in determinant_range(values).items()
    )
    return (
        f"jacobian: {in_words(mapping, direction)}, mm by mm\ndeterminant: {ends}\n"
        f"folds: {folds} of {values.size} voxels\nout: {out}",
        warnings,
    )
