"""By what two images are compared where nobody says so, and from where that begins."""

from __future__ import annotations

import torch
from torch import Tensor

from icon_nephi.fit.affine import find_affine, in_unit_boxes
from icon_nephi.fit.likeness import Likeness
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.losses.similarities import find_similarity

# Of `Likeness.distinct`: from here on blocks are clearly alike; below it nothing is;
# by how much another start must be better.
CLEAR, NOTHING, BETTER = 1.15, 0.4, 1.1
# Of mean correlation over its mean absolute: from here on contrasts are the same.
SAME = 0.5
# What is compared where contrasts differ.
OTHERS = ("lncc2", "mind", "mi")


def find_contrast(
    likeness: Likeness,
    start: Tensor,
    options: FitOptions,
    *,
    search: bool = True,
    rigid: bool = False,
) -> tuple[str, Tensor]:
    """The name of a similarity, and the start that it goes on from.

    Where the images are clearly alike after a start that was found by correlation, that
    is "lncc" and that start. Else another start is searched for by mutual information,
    and taken if the images have clearly more in common there, whatever the sign; then
    the similarity is the one that tells blocks that lie on each other best from others.

    Args:
        likeness: of the images as they are fitted.
        start: physical frame, fixed to moving.
        options: of the fit.
        search: whether another start may be taken.
        rigid: of such a start.
    """
    images = likeness.images
    seen = likeness.distinct(likeness.start(start))
    if seen.get("lncc", 0.0) >= CLEAR:
        return "lncc", start
    if search:
        generator = torch.Generator().manual_seed(options.seed)
        by_information = find_similarity("mi")
        other = find_affine(images, by_information, generator, options, rigid=rigid)
        found = likeness.distinct(likeness.start(other))
        if found.get("lncc2", 0.0) > BETTER * max(seen.get("lncc2", 0.0), NOTHING / 2):
            start, seen = other, found
    if not seen or seen["signed"] >= SAME:
        return "lncc", start
    unit = in_unit_boxes(start, images.geometry_B, images.geometry_A)
    count = images.image_A.shape[1]
    A, B = (image[:, count:] for image in images.featured(unit))
    seen = likeness.distinct(likeness.start(start), (A, B))
    best = max(OTHERS, key=lambda name: seen[name])
    return (best if seen[best] > NOTHING else "lncc"), start
