"""Methods to compare: NePhi, and a voxel network under GradICON, on one pair.

A *method* takes a `Case` and `Options` and returns a `MapPair`.
"""

from __future__ import annotations

import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from icon_nephi._memory import peak_memory
from icon_nephi.commands.flags import SIDES
from icon_nephi.fit.settings import find_settings
from icon_nephi.io.image_input import choose_device, read_input
from icon_nephi.maps.transforms import Map
from icon_nephi.registration.register import register
from icon_nephi.space.frames import Geometry
from icon_nephi.space.images import resize_image
from icon_nephi.space.intensities import prepare

if TYPE_CHECKING:  # ITK, which reads cases, is not needed here
    from icon_nephi.commands.cases import Case

SMALLEST = 17  # voxels a side that ICON's tallUNet2 needs in 3D
LARGEST = 175  # voxels a side of ICON's published lung network
RATE = 1e-3  # Adam's, of a voxel network on one pair; four were tried on a phantom


@dataclass(frozen=True)
class Options:
    """What every method is told."""

    seconds: float = 60.0  # to stop after: of the processor, on a GPU of the clock
    steps: int | None = None  # to take instead
    seed: int = 0
    device: str | None = None  # a GPU if there is one
    threads: int | None = None  # of torch; None: as it is
    side: int = LARGEST  # of the voxel network's grid, at most


@dataclass(frozen=True)
class MapPair:
    """Two maps between the unit boxes of two grids, and how many numbers made them."""

    phi_AB: Map  # unit box of place_B -> unit box of place_A, ICON frame
    phi_BA: Map
    place_A: Geometry
    place_B: Geometry
    representation: int = 0  # of the networks that are read at a point
    code: int = 0  # of this pair's code, or of its two displacement fields
    encoder: int = 0  # of the network that sees the images
    steps: int = 0  # of optimisation for this pair
    step_seconds: float | None = None
    warnings: Sequence[str] = ()


Method: TypeAlias = "Callable[[Case, Options], MapPair]"


def alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return what a function returns in a fresh process, or ``{"error": sentence}``."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, warnings.simplefilter, ("ignore",)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return {"error": "the process was ended (out of memory?)"}
        except Exception as error:  # the other rows go on
            return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def now(device: torch.device) -> float:
    """Return seconds of all threads; on a GPU those of the clock, its work done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib(device: torch.device) -> float | None:
    """Return this process's peak memory, on a GPU of its tensors; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_memory() / 2**30 or None


def nephi(case: Case, options: Options) -> MapPair:
    """Register as `icon_nephi.register` does; ``options.seconds`` is an upper limit."""
    size = case.fixed.GetLargestPossibleRegion().GetSize()
    settings = find_settings("auto", tuple(size), case.modality)
    began = now(device := choose_device(options.device, None))
    result = register(
        case.moving,
        case.fixed,
        modality=case.modality,
        mask_A=case.moving_mask,
        mask_B=case.fixed_mask,
        field=replace(settings, steps=options.steps or settings.steps),
        seed=options.seed,
        device=options.device,
        progress=False,
        time_limit=None if options.steps else options.seconds,
    )
    fit, steps = result.fit, len(result.losses)
    return MapPair(
        *(result.map_AB, result.map_BA, result.geometry_A, result.geometry_B),
        representation=count(fit.field_AB) + count(fit.field_BA),
        code=sum(t.numel() for t in (fit.code.global_code, *fit.code.local_codes)),
        steps=steps,
        step_seconds=(now(device) - began) / max(1, steps),
        warnings=result.warnings,
    )


def voxel(case: Case, options: Options, make: Any = None) -> MapPair:
    """Optimise GradICON's voxel network for this pair alone from random weights.

    ``make(shape)`` is the loss to optimise; default `voxel_network`.
    """
    torch.manual_seed(options.seed)
    A, B, places = network_images(case, options)
    network = (make or voxel_network)(A.shape).to(A.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    began, steps, progress = now(A.device), 0, 0.0
    while progress < 1:
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * progress)) / 2
        optimizer.zero_grad()
        network(A, B).all_loss.backward()
        optimizer.step()
        steps, spent = steps + 1, now(A.device) - began
        progress = steps / options.steps if options.steps else spent / options.seconds
    with torch.no_grad():  # in training mode: running means would be of earlier maps
        maps = [network.regis_net(*pair) for pair in ((A, B), (B, A))]
    pair = voxel_pair(maps, places, count(network))
    return replace(pair, steps=steps, step_seconds=spent / steps)


METHODS: dict[str, Method] = {"nephi": nephi, "voxel": voxel}


def voxel_network(shape: Sequence[int]) -> Any:
    """Return ICON's GradICON around one tallUNet2, for images ``[B, C, *grid]``."""
    return voxel_loss(voxel_step(shape), shape)


def voxel_step(shape: Sequence[int]) -> Any:
    """Return one voxel field of ICON's, predicted by a tallUNet2."""
    from icon_registration import FunctionFromVectorField, networks

    unet = networks.tallUNet2(dimension=len(shape) - 2, input_channels=int(shape[1]))
    return FunctionFromVectorField(unet)


def voxel_loss(net: nn.Module, shape: Sequence[int]) -> Any:
    """Return ICON's GradICON loss around a registration network."""
    from icon_registration import losses

    network = losses.GradientICONSparse(net, losses.LNCC(sigma=4), 1.5)
    network.assign_identity_map([1, *(int(n) for n in shape[1:])])
    return network


def network_images(
    case: Case, options: Options, shape: Sequence[int] = ()
) -> tuple[Tensor, Tensor, tuple[Geometry, Geometry]]:
    """Return moving and fixed ``[1, 1, *grid]`` on one grid, and where each then lies.

    Zero outside the masks, as ICON's lung network has it. The grid is the fixed
    image's, made smaller if a side is longer than ``options.side``, or the one given.
    """
    device, tensors, places = choose_device(options.device, None), [], []
    for side in SIDES:
        image, mask = getattr(case, side), getattr(case, f"{side}_mask")
        values, inside, place = read_input(side, image, mask)
        if not shape:
            scale = min(1.0, options.side / max(place.size))
            least = SMALLEST if place.dimension == 3 else 2
            shape = [max(least, round(n * scale)) for n in place.size]
        values = prepare(values.to(device), case.modality)
        values = values if inside is None else values * inside.to(device)
        tensors.append(resize_image(values, shape))
        places.append(place.resized(shape))
    return tensors[1], tensors[0], (places[1], places[0])


def voxel_pair(
    maps: Sequence[Map], places: Sequence[Geometry], encoder: int
) -> MapPair:
    """Return what a voxel network found, as maps of coordinates of any precision."""
    AB, BA = (partial(_as_float, phi) for phi in maps)
    dense = 2 * places[1].dimension * math.prod(places[1].size)
    return MapPair(AB, BA, places[0], places[1], code=dense, encoder=encoder)


def _as_float(phi: Map, coordinates: Tensor) -> Tensor:
    return phi(coordinates.float()).to(coordinates)


def count(network: nn.Module) -> int:
    """Return the number of its parameters."""
    return sum(p.numel() for p in network.parameters())
