"""One registration as the flags of nephi-register ask for it: read, register, write."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from tqdm import tqdm

from icon_nephi.commands.flags import IMAGES, TRANSFORMS, VECTORS, check_output
from icon_nephi.commands.inputs import Inputs
from icon_nephi.io import itk_images
from icon_nephi.io.atomic import written_whole
from icon_nephi.io.itk_images import write_image
from icon_nephi.io.itk_transforms import write_transform
from icon_nephi.io.versions import versions
from icon_nephi.maps.two_way import MOVING_TO_FIXED
from icon_nephi.registration.itk_pair import ItkPair
from icon_nephi.report.measure import label_scores, landmark_scores, summary

OUTPUTS = {
    "transform_out": TRANSFORMS,
    "inverse_transform_out": TRANSFORMS,
    "warped_moving_out": IMAGES,
    "displacement_out": VECTORS,
    "inverse_displacement_out": VECTORS,
    "jacobian_out": IMAGES,
    "error_out": IMAGES,
    "save": (".nephi",),
    "report": (".html", ".htm"),
}
_BOTH = ("landmarks", "labels", "segmentation")


def check_flags(given: argparse.Namespace) -> None:
    """Nothing, or a ValueError: flags that contradict each other."""
    scratch = given.model == "none"
    missing = [f"--{name}" for name in ("fixed", "moving") if not getattr(given, name)]
    if missing:
        raise ValueError(
            f"the following arguments are required: {', '.join(missing)}; see "
            "nephi-register --help"
        )
    if scratch and given.network_weights is not None:
        raise ValueError("--network_weights needs --model: which network are they of?")
    if not scratch:
        for name in ("save", "report", "error_out"):
            if getattr(given, name) is not None:
                raise ValueError(
                    f"--{name} holds what is registered from scratch; with --model "
                    "give --transform_out"
                )
        for name in ("fixed_window", "moving_window", "quantiles"):
            if getattr(given, name) is not None:
                raise ValueError(
                    f"--{name} is for registration from scratch; --model {given.model} "
                    "has the intensities it was trained with"
                )
        if (given.preset, given.similarity, given.seeds) != ("default", None, 1) or (
            given.mass_preserving
        ):
            raise ValueError(
                "--preset, --similarity, --seeds and --mass_preserving are for "
                "registration from scratch; with --model give --io_iterations and "
                "--io_sim"
            )
    if given.keep_on_interrupt and (not scratch or given.seeds > 1):
        raise ValueError(
            "--keep_on_interrupt is for one registration from scratch, without --model "
            "and --seeds"
        )
    if given.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {given.seeds}")
    names = {k: _pair_flags(k) for k in _BOTH}
    for flags in names.values():
        if len({getattr(given, flag) is None for flag in flags}) > 1:
            raise ValueError(
                f"--{flags[0]} and --{flags[1]} belong together: give both"
            )
    if given.time_limit is not None and not given.time_limit > 0:
        raise ValueError(
            f"--time_limit must be positive seconds, got {given.time_limit}"
        )
    for name in ("fixed_window", "moving_window", "quantiles"):
        ends = getattr(given, name)
        if ends is not None and not ends[0] < ends[1]:
            raise ValueError(
                f"--{name} must be LOW HIGH with LOW below HIGH, got {ends[0]:g} "
                f"{ends[1]:g}"
            )
    if given.quantiles is not None and not (
        given.quantiles[0] >= 0 and given.quantiles[1] <= 1
    ):
        raise ValueError("--quantiles must be shares from 0 to 1, such as 0.01 0.99")
    if _same(given.fixed, given.moving):
        raise ValueError(
            f"--fixed and --moving are the same file, {given.fixed}: there is nothing "
            "to register"
        )


def _pair_flags(kind: str) -> tuple[str, str]:
    if kind == "segmentation":
        return ("fixed_segmentation", "moving_segmentation")
    return (f"{kind}_fixed", f"{kind}_moving")


def _same(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and first.samefile(second)


def find_outputs(given: argparse.Namespace) -> dict[str, Path]:
    """The outputs asked for, each of which can be written."""
    outputs = {
        name: path
        for name, endings in OUTPUTS.items()
        if (path := check_output(name, getattr(given, name), endings)) is not None
    }
    if given.json is not None and str(given.json) != "-":
        path = check_output("json", given.json, (".json",))
        assert path is not None
        outputs["json"] = path
    if not set(outputs) - {"json"} and given.json is None:
        raise ValueError("nothing to write: give --transform_out or --save")
    places = [path.absolute() for path in outputs.values()]
    if len(set(places)) < len(places):
        raise ValueError("two outputs have the same path; give each its own")
    written = {*OUTPUTS, "json", "out_dir"}
    paths = {k: v for k, v in vars(given).items() if isinstance(v, Path)}
    inputs = [path for name, path in paths.items() if name not in written]
    for name, path in outputs.items():
        if any(_same(path, other) for other in inputs):
            raise ValueError(
                f"--{name}: {path} is also an input; it would be overwritten"
            )
    return outputs


def run(given: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """Register, write every output, and return the summary (see `measure.summary`).

    Args:
        given: the flags, checked.
        command: what was typed.

    Raises:
        ValueError: what cannot be registered, in the words of the flags.
        OSError: what cannot be written; then nothing is.
    """
    outputs = find_outputs(given)
    read = Inputs(given)
    start = time.perf_counter()
    register = _from_scratch if given.model == "none" else _through_model
    try:
        result, *others = register(given, read.images)
    except (ValueError, TypeError) as error:
        raise type(error)(in_flags(str(error))) from error
    seconds = time.perf_counter() - start
    found: dict[str, Any] = {
        "command": shlex.join(command),
        **{name: str(getattr(given, name)) for name in ("fixed", "moving")},
        **{name: getattr(given, name) for name in ("model", "preset", "seed")},
        "seconds": seconds,
        "flags": flags_of(given),
    }
    if not given.quiet or given.json is not None:
        found |= summary(result, others)
    found["warnings"] = [in_flags(w) for w in (*result.warnings, *read.warnings)]
    if read.landmarks is not None:
        found["landmarks_mm"] = landmark_scores(result, *read.landmarks)
    if read.labels is not None:
        found["dice"] = label_scores(result, *read.labels)
    found["outputs"] = {name: str(path) for name, path in outputs.items()}
    found["versions"] = versions()
    with written_whole(*outputs.values()) as parts:
        each = zip(outputs, parts, strict=True)
        bar = tqdm(each, "writing", len(outputs), disable=given.quiet, leave=False)
        for name, part in bar:
            _write(name, part, (result, others), read, found)
    return found


def flags_of(given: argparse.Namespace) -> dict[str, str]:
    """The flags that a result depends on, as text."""
    leave = {"pairs", "out_dir", "quiet", "json", "keep_on_interrupt"}
    return {
        name: str(value)
        for name, value in sorted(vars(given).items())
        if name not in leave and value is not None
    }


def _from_scratch(given: argparse.Namespace, images: dict[str, Any]) -> list[Any]:
    """A `Registration` of each seed."""
    from icon_nephi.fit.settings import find_effort
    from icon_nephi.registration.register import register

    kinds = [
        None if kind == "none" else kind
        for kind in (given.moving_modality, given.fixed_modality)
    ]
    size = itk_images.geometry_of(images["fixed"]).size
    modality = kinds[0] if kinds[0] == kinds[1] else None
    # What `register` calls as its flag is called needs no line here.
    known = signature(register).parameters
    choices = {name: value for name, value in vars(given).items() if name in known}
    choices |= {
        "modality": (kinds[0], kinds[1]),
        "mask_A": images.get("moving_mask"),
        "mask_B": images.get("fixed_mask"),
        "segmentation_A": images.get("moving_segmentation"),
        "segmentation_B": images.get("fixed_segmentation"),
        # lncc is what the default compares, with all it does beside.
        "similarity": given.similarity or (None if given.io_sim == "lncc" else "lncc2"),
        "field": "auto"
        if given.preset == "default"
        else find_effort(given.preset, size, modality),
        "affine": not given.no_affine,
        "progress": not given.quiet,
    }
    return [
        register(images["moving"], images["fixed"], **choices | {"seed": seed})
        for seed in range(given.seed, given.seed + given.seeds)
    ]


def _through_model(given: argparse.Namespace, images: dict[str, Any]) -> list[Any]:
    """One `ItkPair`, from a pretrained network and instance optimisation."""
    from icon_nephi import pretrained_models
    from icon_nephi.io.image_input import choose_device
    from icon_nephi.itk_wrapper import register_pair_with_mask
    from icon_nephi.losses.similarities import PatchNCC

    device = choose_device(given.device, None)
    weights = given.network_weights
    if weights is not None and not weights.is_file():
        raise ValueError(f"--network_weights: {weights} does not exist")
    model = pretrained_models.init_network(
        given.model, neural="residual", weights=weights
    ).to(device)
    if given.io_sim == "lncc2":
        model = model.changed(similarity=PatchNCC(1e-3, squared=True))
    moving, fixed = (_for_model(given, images, side) for side in ("moving", "fixed"))
    phi_AB, phi_BA = register_pair_with_mask(
        model,
        moving,
        fixed,
        images.get("moving_mask"),
        images.get("fixed_mask"),
        given.io_iterations,
        segmentation_A=images.get("moving_segmentation"),
        segmentation_B=images.get("fixed_segmentation"),
        progress=not given.quiet,
        seed=given.seed,
    )
    return [ItkPair(phi_AB, phi_BA, images["moving"], images["fixed"])]


def _for_model(given: argparse.Namespace, images: dict[str, Any], side: str) -> Any:
    """An image with the intensities its network was trained with."""
    from icon_nephi import pretrained_models as models

    image, mask = images[side], images.get(f"{side}_mask")
    if given.model == "lung":
        return models.lung_network_preprocess(image, mask)
    if given.model == "brain":
        return models.brain_network_preprocess(image)
    kind = "mri" if given.model == "knee" else getattr(given, f"{side}_modality")
    if kind == "none":
        raise ValueError(f"--model {given.model} needs --{side}_modality ct or mri")
    return models.unigradicon_network_preprocess(image, kind, mask)


def _write(
    name: str,
    path: Path,
    results: tuple[Any, Sequence[Any]],
    read: Inputs,
    found: dict[str, Any],
) -> None:
    result, others = results
    if name == "transform_out":
        write_transform(result.phi_AB, path)
    elif name == "inverse_transform_out":
        write_transform(result.phi_BA, path)
    elif name == "warped_moving_out":
        write_image(result.warp(read.original), path)
    elif name == "displacement_out":
        write_image(result.displacement_field(), path)
    elif name == "inverse_displacement_out":
        write_image(result.displacement_field(None, MOVING_TO_FIXED), path)
    elif name == "jacobian_out":
        write_image(result.jacobian_determinant(), path)
    elif name == "error_out":
        write_image(result.error_image(None, others), path)
    elif name == "report":
        given = {"landmarks": read.landmarks, "labels": read.labels}
        extras = {
            f"{kind}_{side}": what
            for kind, both in given.items()
            for side, what in zip(("fixed", "moving"), both or (), strict=False)
        }
        seconds, command = found["seconds"], found["command"]
        extras |= {"seconds": seconds, "command": command, "others": others}
        result.report(path, **extras)
    elif name == "json":
        path.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    else:
        result.save(path)


def in_flags(message: str) -> str:
    """The same complaint with the command's names for things."""
    for name, flag in (
        *(("image_A", "--moving"), ("image_B", "--fixed")),
        *(("mask_A", "--moving_mask"), ("mask_B", "--fixed_mask")),
        *(("segmentation_A", "--moving_segmentation"),),
        *(("segmentation_B", "--fixed_segmentation"),),
        *(("device ", "--device: "), ("time_limit ", "--time_limit ")),
        ("mass_preserving ", "--mass_preserving "),
        ("weights: ", "--network_weights: "),
    ):
        message = message.replace(name, flag)
    return message
