"""Methods beside the package's own: more resolutions, trained networks.

Each is a function of a case and Options that returns what it Found; see
icon_nephi/commands/methods.py. Keywords are filled in with functools.partial.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import icon_registration as icon
import torch
from torch import Tensor

from icon_nephi import add_neural_residual, make_network
from icon_nephi.commands import methods
from icon_nephi.commands.methods import (
    Found,
    Options,
    network_images,
    voxel_found,
    voxel_loss,
    voxel_step,
)
from icon_nephi.fit.refine import Given, refine_pair, unrefined_maps
from icon_nephi.losses.regularity import guarded_term
from icon_nephi.maps.networks import neural_parts
from icon_nephi.space.images import resize_image

LEVELS = 2  # of ICON's published networks
TRIAL = 5  # steps of instance optimisation that are timed


def levels_of(shape: Sequence[int], most: int = LEVELS) -> int:
    """How often a grid can be halved before tallUNet2 does not take it any more."""
    least = methods.SMALLEST if len(shape) == 5 else 8
    fits = [n for n in range(most + 1) if math.ceil(min(shape[2:]) / 2**n) >= least]
    return max(fits, default=0)


def nested(shape: Sequence[int]) -> Any:
    """ICON's published network: coarse to fine, then once more at full resolution."""
    net, d = voxel_step(shape), len(shape) - 2
    for _ in range(levels_of(shape)):
        low = icon.DownsampleRegistration(net, d)
        net = icon.TwoStepRegistration(low, voxel_step(shape))
    return voxel_loss(icon.TwoStepRegistration(net, voxel_step(shape)), shape)


def coarse(shape: Sequence[int]) -> Any:
    """One network at half the resolution, which the paper puts before NePhi."""
    net, d = voxel_step(shape), len(shape) - 2
    for _ in range(min(1, levels_of(shape))):
        net = icon.DownsampleRegistration(net, d)
    return voxel_loss(net, shape)


NETWORKS = {"voxel": methods.voxel_network, "voxel_multi": nested, "coarse": coarse}


# --- from scratch -------------------------------------------------------------------


def voxel_multi(case: Any, options: Options) -> Found:
    """GradICON's nested voxel networks, optimised for this pair alone."""
    return methods.voxel(case, options, nested)


def nephi_multi(case: Any, options: Options, weights: Path | None = None) -> Found:
    """A voxel network at half the resolution, then NePhi, optimised, behind its map.

    Without weights the voxel network is optimised for the pair in half of the time
    (or steps).
    """
    A, B, places = network_images(case, options)
    began = methods.now(A.device)
    if weights is None:
        steps = options.steps and max(1, options.steps // 2)
        half = replace(options, seconds=options.seconds / 2, steps=steps)
        first = methods.voxel(case, half, coarse)
        maps, encoder = (first.phi_AB, first.phi_BA), first.encoder
    else:
        network = load(coarse(A.shape), weights).to(A.device)
        maps = unrefined_maps(network, A, B)
        encoder = methods.count(network)
    given = Given(maps)
    given.assign_identity_map([1, 1, *A.shape[2:]])
    given.to(A.device)
    model = add_neural_residual(given, seed=options.seed).to(A.device)
    masks = masks_of(case, A)
    start, count = methods.now(A.device), options.steps and options.steps // 2
    if not count:  # as many as the rest of the time allows
        refine_pair(model, A, B, steps=TRIAL, progress=False, **masks)
        trial = methods.now(A.device) - start
        left = options.seconds - (methods.now(A.device) - began)
        count, start = max(TRIAL, int(TRIAL * left / trial)), methods.now(A.device)
    return refined(model, A, B, masks, places, max(1, count), encoder, options)


def refined(
    model: Any,
    A: Tensor,
    B: Tensor,
    masks: dict[str, Tensor],
    places: Sequence[Any],
    steps: int,
    encoder: int,
    options: Options,
) -> Found:
    """What instance optimisation of a model's codes and fields found."""
    start = methods.now(A.device)
    phi_AB, phi_BA, _ = refine_pair(
        model,
        A,
        B,
        steps=steps,
        regularity=guarded_term,
        progress=False,
        seed=options.seed,
        **masks,
    )
    found = replace(
        voxel_found((phi_AB, phi_BA), places, encoder),
        steps=steps,
        step_seconds=(methods.now(A.device) - start) / steps,
    )
    return sized(found, (phi_AB, phi_BA))


def sized(found: Found, maps: Sequence[Any]) -> Found:
    """The same with the numbers of its fields and its code."""
    parts = neural_parts(maps)
    fields = {id(p.field): methods.count(p.field) for p in parts}
    tensors = [t for p in parts for t in (p.code.global_code, *p.code.local_codes)]
    codes = {t.data_ptr(): t.numel() for t in tensors if t.numel()}
    return replace(found, representation=sum(fields.values()), code=sum(codes.values()))


def masks_of(case: Any, like: Tensor) -> dict[str, Tensor]:
    """Where the samples lie, on the network's grid, by refine_pair's names."""
    from icon_nephi.io.image_input import read_input

    found = {}
    for letter, side in (("A", "moving"), ("B", "fixed")):
        mask = getattr(case, f"{side}_mask")
        if mask is not None:
            inside = read_input(letter, getattr(case, side), mask)[1]
            small = resize_image(inside, like.shape[2:], "nearest")
            found[f"mask_{letter}"] = small.to(like.device)
    return found


# --- trained ------------------------------------------------------------------------


def load(network: Any, weights: Path) -> Any:
    """The network with the weights that training/ wrote to network_weights.trch."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        network.regis_net.load_state_dict(state)
    except FileNotFoundError:
        raise ValueError(f"{weights} does not exist.") from None
    except Exception as error:
        raise ValueError(
            f"{weights} does not hold the weights of this network on this grid; give "
            "the --shape and --preset it was trained with."
        ) from error
    return network


def trained(
    case: Any,
    options: Options,
    kind: str,
    weights: Path,
    shape: Sequence[int] = (),
    preset: str = "default",
    levels: int = 1,
    io_steps: int = 0,
) -> Found:
    """A trained network: "voxel", "voxel_multi" or "nephi", and its refinement (IO).

    ICON's voxel networks are refined as ICON does it, all their weights.
    """
    A, B, places = network_images(case, options, shape)
    size = [1, 1, *A.shape[2:]]
    if kind == "nephi":
        model = make_network(size, preset=preset, levels=levels)
        load(model, weights).to(A.device)
        masks = masks_of(case, A)
        if io_steps:
            found = refined(model, A, B, masks, places, io_steps, 0, options)
        else:
            maps = unrefined_maps(model, A, B)
            found = sized(voxel_found(maps, places, 0), maps)
        everything = methods.count(model.regis_net)
        return replace(found, encoder=everything - found.representation)
    network = load(NETWORKS[kind](size), weights).to(A.device).eval()
    start = methods.now(A.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-5)  # ICON's
    for _ in range(io_steps):
        optimizer.zero_grad()
        network(A, B).all_loss.backward()
        optimizer.step()
    seconds = (methods.now(A.device) - start) / max(1, io_steps)
    with torch.no_grad():
        maps = unrefined_maps(network, A, B)
    found = voxel_found(maps, places, methods.count(network))
    return replace(found, steps=io_steps, step_seconds=seconds if io_steps else None)


def training_step(
    kind: str, shape: Sequence[int], preset: str = "default", device: str | None = None
) -> dict[str, Any]:
    """Cost of one training step on one pair: ``step_ms``, ``peak_gib``.

    The first step makes the optimiser's state; the second is timed.
    """
    from icon_nephi.io.image_input import choose_device

    where = choose_device(device, None)
    size = [1, 1, *shape]
    torch.manual_seed(0)
    A, B = (torch.rand(size, device=where) for _ in "AB")
    make = NETWORKS.get(kind)
    network = make(size) if make else make_network(size, preset=preset)
    network.to(where).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    for _ in range(2):
        start = methods.now(where)
        optimizer.zero_grad()
        network(A, B).all_loss.mean().backward()
        optimizer.step()
        spent = methods.now(where) - start
    return {"step_ms": 1000 * spent, "peak_gib": methods.peak_gib(where)}
