"""Voxel GradICON and NePhi on the same pairs, for the same time, on one machine.

A *method* takes a case and `Options` and returns what it `Found`; `measure` says what
that cost and how good it is. A case has the attributes that `read_case` gives it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from icon_nephi import metrics
from icon_nephi._check import check_intensities
from icon_nephi.coordinates import Geometry, apply_affine, resize_image
from icon_nephi.inputs import choose_device, read_input
from icon_nephi.memory import peak_memory
from icon_nephi.models import find_settings
from icon_nephi.physical import Array, FramedMap, over_grid
from icon_nephi.preprocess import prepare
from icon_nephi.registration import register
from icon_nephi.transforms import Map

COLUMNS = (
    *("case", "method", "error", "before_tre_mm", "tre_mm", "before_dice", "dice"),
    *("folds_voxels_percent", "folds_points_percent", "inverse_consistency_mm"),
    *("representation_m", "code_m", "encoder_m", "inference_ms", "step_ms", "steps"),
    *("seconds", "peak_gib", "grid", "warnings"),
)
SIDES, NUMBERS = ("fixed", "moving"), ("representation", "code", "encoder")
POINTS = 100_000  # where folds and inverse consistency are measured
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
class Found:
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


Method: TypeAlias = Callable[[Any, Options], Found]
Row: TypeAlias = dict[str, Any]


def find_cases(folder: Path, names: Sequence[str] | None = None) -> dict[str, Path]:
    """The case folders by name; ValueError for none, or a name that is not there."""
    if not folder.is_dir():
        raise ValueError(f"--data: {folder} is not a folder")
    files = [f for at in ("", "*/", "*/*/") for f in folder.glob(f"{at}fixed.*")]
    found = {
        home.resolve().name
        if home == folder
        else home.relative_to(folder).as_posix(): home
        for home in sorted({file.parent for file in files})
    }
    if not found:
        advice = "make one for each pair, with fixed.nii.gz and moving.nii.gz"
        raise ValueError(f"--data: {folder} holds no folder of a pair; {advice}")
    for name in names or ():
        if name not in found:
            raise ValueError(f"--cases: no {name!r} there, only {', '.join(found)}")
    return {name: found[name] for name in dict.fromkeys(names or found)}


def read_case(folder: Path, name: str) -> SimpleNamespace:
    """A case from a folder in the layout of docs/evaluation.md.

    It has a name, a modality, the ITK images fixed and moving, and where there are
    such files (else None) fixed_mask, fixed_labels, fixed_points (``[N, d]``, LPS mm),
    the same of moving, and label_ids, the labels that are in both maps.

    Raises:
        ValueError: a file that is missing, unreadable or does not fit the others.
    """
    parts: dict[str, Any] = {"modality": _modality(folder / "case.json")}
    for side in SIDES:
        for kind in ("", "_mask", "_labels"):
            parts[side + kind] = _image(folder, side + kind)
        if parts[side] is None:
            raise ValueError(f"{folder} holds no {side} image; name it {side}.nii.gz")
        values, _, place = read_input(side, parts[side], parts[f"{side}_mask"])
        check_intensities(f"{folder / side}", values)
        parts[f"{side}_points"] = _points(folder / f"{side}_landmarks.csv", place)
    if len({parts[side].GetImageDimension() for side in SIDES}) > 1:
        raise ValueError(f"{folder}: give two 2D or two 3D images")
    counts = {len(p) if (p := parts[f"{s}_points"]) is not None else 0 for s in SIDES}
    if len(counts) > 1:
        raise ValueError(f"{folder}: the two landmark files must correspond row by row")
    labels = [parts[f"{side}_labels"] for side in SIDES]
    ids = [set(np.unique(np.asarray(m))) - {0} for m in labels if m is not None]
    if len(ids) == 1 or (ids and not ids[0] & ids[1]):
        raise ValueError(f"{folder}: the two label maps must share a label")
    return SimpleNamespace(
        name=name, **parts, label_ids=sorted(map(int, ids[0] & ids[1])) if ids else []
    )


def _image(folder: Path, stem: str) -> Any:
    from icon_nephi.itk_images import read_image

    data = (".raw", ".zraw", ".raw.gz", ".img", ".img.gz")  # of a header beside them
    files = [f for f in folder.glob(f"{stem}.*") if not f.name.endswith(data)]
    if len(files) > 1:
        raise ValueError(f"{folder} holds {len(files)} files named {stem}; keep one")
    return read_image(stem, files[0]) if files else None


def _modality(path: Path) -> str | None:
    try:
        text = path.read_text("utf-8") if path.exists() else '{"modality": null}'
        return {None: None, "ct": "ct", "mri": "mri"}[json.loads(text)["modality"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = '{"modality": "ct"}, "mri" or null'
        raise ValueError(f"{path} must hold {expected}") from error


def _points(path: Path, place: Geometry) -> Array | None:
    if not path.exists():
        return None
    header = ",".join("xyz"[: place.dimension])
    try:
        first, _, rest = path.read_text("utf-8-sig").partition("\n")
        rows = [line.split(",") for line in rest.splitlines() if line.strip()]
        points = np.array(rows, dtype=float)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must hold rows of numbers {header}") from error
    if first.strip().lower() != header or points.shape[1:] != (place.dimension,):
        raise ValueError(f"{path} must begin with the line {header}, then hold rows")
    unit = apply_affine(place.physical_to_unit(), torch.from_numpy(points))
    if not ((unit > -0.05) & (unit < 1.05)).all(1).double().mean() >= 0.5:
        advice = "they must be LPS mm (RAS: change the sign of x and y)"
        raise ValueError(f"{path}: most points lie outside the image; {advice}")
    return points


# --- methods ------------------------------------------------------------------------


def nephi(case: Any, options: Options) -> Found:
    """`icon_nephi.register` from scratch; ``options.seconds`` is an upper limit."""
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
    return Found(
        *(result.map_AB, result.map_BA, result.geometry_A, result.geometry_B),
        representation=count(fit.field_AB) + count(fit.field_BA),
        code=sum(t.numel() for t in (fit.code.global_code, *fit.code.local_codes)),
        steps=steps,
        step_seconds=(now(device) - began) / max(1, steps),
        warnings=result.warnings,
    )


def voxel(case: Any, options: Options, make: Any = None) -> Found:
    """GradICON's voxel network, optimised for this pair alone from random weights.

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
    found = voxel_found(maps, places, count(network))
    return replace(found, steps=steps, step_seconds=spent / steps)


METHODS: dict[str, Method] = {"nephi": nephi, "voxel": voxel}


def voxel_network(shape: Sequence[int]) -> Any:
    """ICON's GradICON around one tallUNet2, for images ``[B, C, *grid]``."""
    return voxel_loss(voxel_step(shape), shape)


def voxel_step(shape: Sequence[int]) -> Any:
    """One voxel field of ICON's, predicted by a tallUNet2."""
    from icon_registration import FunctionFromVectorField, networks

    unet = networks.tallUNet2(dimension=len(shape) - 2, input_channels=int(shape[1]))
    return FunctionFromVectorField(unet)


def voxel_loss(net: nn.Module, shape: Sequence[int]) -> Any:
    """ICON's GradICON loss around a registration network."""
    from icon_registration import losses

    network = losses.GradientICONSparse(net, losses.LNCC(sigma=4), 1.5)
    network.assign_identity_map([1, *(int(n) for n in shape[1:])])
    return network


def network_images(
    case: Any, options: Options, shape: Sequence[int] = ()
) -> tuple[Tensor, Tensor, tuple[Geometry, Geometry]]:
    """Moving and fixed ``[1, 1, *grid]`` on one grid, and where each then lies.

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


def voxel_found(maps: Sequence[Map], places: Sequence[Geometry], encoder: int) -> Found:
    """What a voxel network found; its maps then take coordinates of any precision."""
    AB, BA = (partial(_as_float, phi) for phi in maps)
    dense = 2 * places[1].dimension * math.prod(places[1].size)
    return Found(AB, BA, places[0], places[1], code=dense, encoder=encoder)


def _as_float(phi: Map, coordinates: Tensor) -> Tensor:
    return phi(coordinates.float()).to(coordinates)


def count(network: nn.Module) -> int:
    """The number of its parameters."""
    return sum(p.numel() for p in network.parameters())


# --- what a registration cost, and how good it is -----------------------------------


def now(device: torch.device) -> float:
    """Seconds of this process, all threads; on a GPU of the clock, its work done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib(device: torch.device) -> float | None:
    """Peak memory of this process, on a GPU that of its tensors; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_memory() / 2**30 or None


def measure(case: Any, method: Method, options: Options) -> Row:
    """A row of `COLUMNS`: one registration, its cost, and its errors.

    ``inference_ms`` goes from the images to the displacement at every voxel of the
    fixed image, ``peak_gib`` up to there.
    """
    torch.set_num_threads(options.threads or torch.get_num_threads())
    began = now(device := choose_device(options.device, None))
    found = method(case, options)
    row: Row = {"seconds": now(device) - began}
    frame_A, frame_B = (p.unit_to_physical() for p in (found.place_A, found.place_B))
    forward = FramedMap(found.phi_AB, frame_B, frame_A, device)
    backward = FramedMap(found.phi_BA, frame_A, frame_B, device)
    fixed = read_input("B", case.fixed, None)[2]
    d, box = fixed.dimension, fixed.unit_to_physical()
    places = over_grid(lambda _, at: at, fixed.size, box, d, mapped=forward)
    moved = torch.from_numpy(places).double()
    row["inference_ms"] = 1000 * (now(device) - began)
    row |= {"peak_gib": peak_gib(device), "steps": found.steps}
    row["step_ms"] = found.step_seconds and 1000 * found.step_seconds
    row |= {f"{n}_m": getattr(found, n) / 1e6 for n in NUMBERS}
    row["grid"], row["warnings"] = found.place_B.size, "; ".join(found.warnings)
    index = apply_affine(torch.linalg.inv(box), moved.flatten(0, -2))
    index = (index * (torch.tensor(fixed.size) - 1)).reshape(*fixed.size, d)
    row["folds_voxels_percent"] = metrics.flips_percentage(index.movedim(-1, 0)[None])
    spread = torch.from_numpy(np.random.default_rng(0).uniform(size=(POINTS, d)))
    points = apply_affine(box, spread).numpy()
    there = forward(points)
    signs = np.concatenate([forward.determinants(points), backward.determinants(there)])
    row["folds_points_percent"] = 100 * metrics.fold_fraction(signs)
    missed = np.linalg.norm(backward(there) - points, axis=1)
    row["inverse_consistency_mm"] = float(missed.mean())
    if case.fixed_points is not None:
        for name, at in (("before_tre_mm", lambda p: p), ("tre_mm", forward)):
            moved_points = at(case.fixed_points)
            tre = metrics.target_registration_error(moved_points, case.moving_points)
            row[name] = float(tre.mean())
    if case.fixed_labels is not None:
        still = torch.from_numpy(over_grid(lambda p: p, fixed.size, box, d)).double()
        row["before_dice"], row["dice"] = (mean_dice(case, at) for at in (still, moved))
    return row


def mean_dice(case: Any, moved: Tensor) -> float:
    """The mean over labels, moving ones read at ``[*grid, d]`` mm, 0 outside."""
    from icon_nephi import itk_images

    fixed = itk_images.array_of(itk_images.resample_to(case.fixed_labels, case.fixed))
    moving = itk_images.array_of(case.moving_labels).astype(np.int64)
    place = itk_images.geometry_of(case.moving_labels)
    unit = apply_affine(place.physical_to_unit(), moved.flatten(0, -2))
    at = (unit * (torch.tensor(place.size) - 1)).round().long().numpy() + 1
    inside = tuple(at.clip(0, np.array(place.size) + 1).T)
    warped = np.pad(moving, 1)[inside].reshape(fixed.shape)
    overlap = metrics.dice(fixed.astype(np.int64), warped, case.label_ids)
    return float(np.mean(list(overlap.values())))


def compare_cases(
    cases: Mapping[str, Callable[[], Any]],
    methods: Mapping[str, Method],
    options: Options,
) -> Iterator[Row]:
    """A row for each case and method, which are functions that can be pickled.

    Each has its own process; others get the time that the first took for a case.
    """
    for name, read in cases.items():
        given = options
        for label, method in methods.items():
            row = alone(_read_and_measure, read, method, given)
            if given is options and "seconds" in row:
                given = replace(options, seconds=row["seconds"])
            yield {"case": name, "method": label} | row


def alone(function: Callable[..., Row], *arguments: Any) -> Row:
    """What a function returns in a fresh process, or ``{"error": sentence}``."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, warnings.simplefilter, ("ignore",)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return {"error": "the process was ended (out of memory?)"}
        except Exception as error:  # the other rows go on
            return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def _read_and_measure(read: Callable[[], Any], method: Method, options: Options) -> Row:
    return measure(read(), method, options)
