"""How sharply the images say where a place belongs, all over the fixed image.

Around every block of samples the image that moves is shifted a little along each axis:
where that hardly changes how alike the blocks are, or where another shift would make
them more alike, the map may be far off. `icon_nephi.report.expected_error` makes
lengths of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from icon_nephi.fit.affine import voxel_stride
from icon_nephi.fit.content import ImagePair
from icon_nephi.losses.patches import as_blocks, patch_maps
from icon_nephi.losses.similarities import correlations
from icon_nephi.maps.transforms import Map
from icon_nephi.space.frames import identity_map, inside, to_rows
from icon_nephi.space.images import sample_image
from icon_nephi.space.sampling import Patches, draw_points

#: What is known at each node, in this order, see `sharpness`.
KNOWN = ("offset", "bound", "unlike")
# Blocks; samples a side, their stride and the shift in units of 1/160 of the box.
BLOCKS, SIZE, STRIDE, SHIFT = 800, 5, 1.5, 1.5
# Nodes a side of the result; as many blocks' weight has the mean of all in each.
NODES, PRIOR = 8, 3.0
FLOOR, LEAST = 1e-3, 1e-2


@torch.no_grad()
def sharpness(
    images: ImagePair,
    phi_AB: Map,
    generator: torch.Generator,
    *,
    contrast: bool = False,
) -> Tensor:
    """``[1, 3, *nodes]`` over the fixed image's unit box, natural logarithms of three.

    ``offset``: how far from where the map takes a block it would be most like the
    image there, at most as far as was looked. ``bound``: how far off it may be for what
    the blocks differ by (Cramer and Rao). Both in millimetres of the moving image.
    ``unlike``: 1 - correlation, its square where ``contrast`` may differ.
    """
    place_A, place_B = images.geometries
    d = place_B.dimension
    where = images.where_B.cpu()
    rows = draw_points(BLOCKS, 1, d, mask=where, generator=generator).float()
    moving, fixed = (image.cpu() for image in (images.image_A, images.image_B))
    stride = voxel_stride(STRIDE * images.unit, place_B)
    patches = Patches(BLOCKS, SIZE, stride, corners=True)

    def there(x: Tensor) -> Tensor:
        return phi_AB(x.to(images.image_B)).float().cpu()

    x, moved = patch_maps(there, patches, rows, fixed.shape[2:])
    values, shape = sample_image(fixed, x), (BLOCKS, *x.shape[3:])
    counts = images.counts_on("cpu")

    def unlike(by: Tensor) -> Tensor:
        at = moved + by.view(1, d, *[1] * d)
        tag = (inside(at) & inside(x)).float()
        for known, seen in zip(counts, (at, x), strict=True):
            if known is not None:
                tag = tag * sample_image(known.to(tag), seen, mode="nearest")
        a, b, weight = (
            as_blocks(v, shape).flatten(2)
            for v in (sample_image(moving, at), values, tag)
        )
        found = correlations(a, b, weight, FLOOR)
        return 1 - (found.square() if contrast else found).mean(1)

    seen = _around(unlike, SHIFT * images.unit, torch.tensor(place_A.extent))
    return _on_nodes(rows[0], seen.clamp(min=1e-6).log())


def _around(unlike: Callable[[Tensor], Tensor], shift: float, extent: Tensor) -> Tensor:
    """``[N, 3]``: the three of every block; shifts of so many millimetres."""
    d = len(extent)
    here = unlike(torch.zeros(d))
    offset, bound = torch.zeros_like(here), torch.zeros_like(here)
    for axis in range(d):
        by = torch.zeros(d)
        by[axis] = shift / float(extent[axis])
        after, before = unlike(by), unlike(-by)
        slope = (after - before) / (2 * shift)
        bend = ((after + before - 2 * here) / shift**2).clamp(min=LEAST / shift**2)
        offset += (slope / bend).clamp(-shift, shift).square()
        least = (here - slope.square() / (2 * bend)).clamp(min=1e-4)
        bound += (least / bend).clamp(max=(5 * shift) ** 2)
    return torch.stack([offset.sqrt(), bound.sqrt(), here], 1)


def _on_nodes(rows: Tensor, values: Tensor) -> Tensor:
    """``[1, C, *nodes]``: means of values ``[N, C]`` at rows around every node."""
    d = rows.shape[1]
    nodes = to_rows(identity_map((NODES,) * d))[0]
    weight = (-0.5 * (torch.cdist(nodes, rows) * NODES).square()).exp()
    mean = (weight @ values + PRIOR * values.mean(0)) / (weight.sum(1)[:, None] + PRIOR)
    return mean.T.reshape(1, -1, *[NODES] * d).contiguous()
