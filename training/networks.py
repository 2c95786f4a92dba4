"""The networks that are compared: ours, and ICON's voxel network, in one loop."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from icon_nephi import Patches, Points, make_network
from icon_nephi.losses.similarities import PatchNCC

VOXEL_LMBDA = 1.5  # as ICON's pretrained networks


def make(
    args: argparse.Namespace, input_shape: Sequence[int], similarity: str
) -> nn.Module:
    """The network that ``--method`` and ``--preset`` name.

    Args:
        args: the options (``lmbda`` None: the network's own).
        input_shape: ICON's ``[B, C, *grid]``.
        similarity: "ncc" of whole images or "lncc" of neighbourhoods.
    """
    if args.method == "voxel":
        lmbda = VOXEL_LMBDA if args.lmbda is None else args.lmbda
        return voxel_network(input_shape, similarity, lmbda)
    keywords: dict[str, Any] = {"lmbda": args.lmbda, "levels": args.levels}
    if similarity == "lncc" and args.preset == "default":
        # Small blocks, samples far apart: local contrast, and reach.
        keywords["similarity"] = PatchNCC(floor=1e-3)
        keywords["similarity_sampler"] = Patches(200, size=3, stride=6.0)
    elif args.points:
        keywords["similarity_sampler"] = Points(args.points)
    return make_network(input_shape, preset=args.preset, **keywords)


def voxel_network(
    input_shape: Sequence[int], similarity: str = "lncc", lmbda: float = VOXEL_LMBDA
) -> nn.Module:
    """GradICON of displacements on voxels (one tallUNet2), as ICON trains it."""
    import icon_registration as icon
    from icon_registration import losses, networks

    measures = {"lncc": partial(losses.LNCC, sigma=4), "ncc": losses.NCC}
    channels, dimension = int(input_shape[1]), len(input_shape) - 2
    unet = networks.tallUNet2(dimension=dimension, input_channels=channels)
    network = losses.GradientICONSparse(
        icon.FunctionFromVectorField(unet), measures[similarity](), lmbda
    )
    network.assign_identity_map(input_shape)
    return network
