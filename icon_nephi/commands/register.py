"""One registration as the flags of nephi-register ask for it: read, register, write.

What is heavy to import is imported once the flags have been checked.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icon_nephi.commands.early import check_there
from icon_nephi.commands.flags import (
    IMAGES,
    SIDES,
    TRANSFORMS,
    VECTORS,
    RegisterFlags,
)
from icon_nephi.commands.outputs import check_outputs, is_same
from icon_nephi.io.atomic import written_whole
from icon_nephi.io.versions import versions

if TYPE_CHECKING:
    from icon_nephi.commands.inputs import Inputs

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
    "json": (".json",),
}
WINDOWS = ("fixed_window", "moving_window", "quantiles")
FROM_SCRATCH = (
    *("initial", "use_landmarks", "restrict", "allow_mirror"),
    *("lesion_mask", "moving_lesion_mask", "rigid_mask", "volume_mask"),
)
COUPLED = (
    ("landmarks_fixed", "landmarks_moving"),
    ("labels_fixed", "labels_moving"),
    ("fixed_segmentation", "moving_segmentation"),
)


def check_flags(flags: RegisterFlags) -> None:
    """Refuse flags that contradict each other.

    Raises:
        ValueError: they do.
    """
    fixed, moving = flags.fixed, flags.moving
    if fixed is None or moving is None:
        missing = [f"--{side}" for side in SIDES if getattr(flags, side) is None]
        raise ValueError(
            f"the following arguments are required: {', '.join(missing)}; see "
            "nephi-register --help"
        )
    scratch = flags.model == "none"
    if scratch and flags.network_weights is not None:
        raise ValueError("--network_weights needs --model: which network are they of?")
    if not scratch:
        _check_model_flags(flags)
    if flags.keep_on_interrupt and (not scratch or flags.seeds > 1):
        raise ValueError(
            "--keep_on_interrupt is for one registration from scratch, without --model "
            "and --seeds"
        )
    if flags.transform != "deformable" and flags.no_affine:
        raise ValueError(
            f"--transform {flags.transform} is what --no_affine leaves out: give one"
        )
    if flags.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {flags.seeds}")
    for name in ("landmark_error", "stiffness"):
        if not getattr(flags, name) > 0:
            raise ValueError(f"--{name} must be above zero")
    if flags.landmarks_fixed is None:
        if flags.use_landmarks:
            raise ValueError("--use_landmarks needs --landmarks_fixed and _moving")
        if str(flags.initial) == "landmarks":
            raise ValueError("--initial landmarks needs --landmarks_fixed and _moving")
    if flags.initial not in (None, Path("landmarks")) and not flags.initial.is_file():
        raise ValueError(f"--initial: {flags.initial} does not exist")
    for first, second in COUPLED:
        if (getattr(flags, first) is None) != (getattr(flags, second) is None):
            raise ValueError(f"--{first} and --{second} belong together: give both")
    if flags.time_limit is not None and not flags.time_limit > 0:
        raise ValueError(
            f"--time_limit must be positive seconds, got {flags.time_limit}"
        )
    for name in WINDOWS:
        ends = getattr(flags, name)
        if ends is not None and not ends[0] < ends[1]:
            raise ValueError(
                f"--{name} must be LOW HIGH with LOW below HIGH, got {ends[0]:g} "
                f"{ends[1]:g}"
            )
    if flags.quantiles and not 0 <= flags.quantiles[0] < flags.quantiles[1] <= 1:
        raise ValueError("--quantiles must be shares from 0 to 1, such as 0.01 0.99")
    if fixed.exists() and is_same(fixed, moving):
        raise ValueError(
            f"--fixed and --moving are the same file, {fixed}: there is nothing to "
            "register"
        )


def _check_model_flags(flags: RegisterFlags) -> None:
    for name in ("save", "report", "error_out"):
        if getattr(flags, name) is not None:
            raise ValueError(
                f"--{name} holds what is registered from scratch; with --model give "
                "--transform_out"
            )
    for name in WINDOWS:
        if getattr(flags, name) is not None:
            raise ValueError(
                f"--{name} is for registration from scratch; --model {flags.model} has "
                "the intensities it was trained with"
            )
    for name in FROM_SCRATCH:
        if getattr(flags, name):
            raise ValueError(
                f"--{name} is for registration from scratch, without --model"
            )
    asked = (flags.preset, flags.similarity, flags.seeds, flags.transform, flags.start)
    if flags.mass_preserving or asked != ("default", None, 1, "deformable", "auto"):
        raise ValueError(
            "--preset, --similarity, --seeds, --transform, --start and "
            "--mass_preserving are for registration from scratch; with --model give "
            "--io_iterations and --io_sim"
        )


def find_outputs(flags: RegisterFlags) -> dict[str, Path]:
    """Return the outputs asked for, each of which can be written.

    Raises:
        ValueError: one that cannot, none at all, or one over another or an input.
    """
    paths = {k: v for k, v in vars(flags).items() if isinstance(v, Path)}
    asked = {
        name: (paths[name], endings)
        for name, endings in OUTPUTS.items()
        if name in paths and (name, str(paths[name])) != ("json", "-")
    }
    read = [paths[name] for name in paths if name not in (*OUTPUTS, "out_dir")]
    outputs = check_outputs(asked, read)
    if not set(outputs) - {"json"} and flags.json is None:
        raise ValueError("nothing to write: give --transform_out or --save")
    return outputs


def check_places(outputs: dict[str, Path], inputs: Inputs) -> None:
    """Refuse formats that cannot hold the images to be written.

    Raises:
        ValueError: one cannot.
    """
    from icon_nephi.io.image_files import check_holds
    from icon_nephi.io.itk_images import geometry_of

    for name, path in outputs.items():
        if OUTPUTS[name] not in (IMAGES, VECTORS):
            continue
        side = "moving" if name == "inverse_displacement_out" else "fixed"
        place = geometry_of(inputs.images[side])
        vectors = place.dimension if OUTPUTS[name] == VECTORS else None
        said = inputs.warnings
        check_holds(f"--{name}", path, place, components=vectors, said=said)


def run(flags: RegisterFlags, command: list[str]) -> dict[str, Any]:
    """Register, write every output, and return the summary (see `summarize_result`).

    Raises:
        ValueError: what cannot be registered, in the words of the flags.
        OSError: what cannot be written; then nothing is.
    """
    check_flags(flags)
    outputs = find_outputs(flags)
    check_there(flags)

    from tqdm import tqdm

    from icon_nephi.commands.inputs import Inputs
    from icon_nephi.report import measure

    inputs = Inputs(flags)
    check_places(outputs, inputs)
    start = time.perf_counter()
    register = _from_scratch if flags.model == "none" else _through_model
    try:
        result, *others = register(flags, inputs)
    except (ValueError, TypeError) as error:
        raise type(error)(in_flags(str(error))) from error
    numbers: dict[str, Any] = {
        "command": shlex.join(command),
        **{name: str(getattr(flags, name)) for name in SIDES},
        **{name: getattr(flags, name) for name in ("model", "preset", "seed")},
        "seconds": time.perf_counter() - start,
        "flags": flags_of(flags),
    }
    if not flags.quiet or flags.json is not None:
        numbers |= measure.summarize_result(result, others)
    for name, way in (("transform_out", "phi_AB"), ("inverse_transform_out", "phi_BA")):
        if name in outputs:  # made now, so that what they miss is said
            getattr(result, way)
    warnings = (*result.warnings, *inputs.warnings)
    numbers["warnings"] = [in_flags(warning) for warning in warnings]
    if inputs.landmarks is not None:
        numbers["landmarks_mm"] = measure.score_landmarks(result, *inputs.landmarks)
    if inputs.labels is not None:
        numbers["dice"] = measure.score_labels(result, *inputs.labels)
    numbers["outputs"] = {name: str(path) for name, path in outputs.items()}
    numbers["versions"] = versions()
    writers = _writers(result, others, inputs, numbers)
    with written_whole(*outputs.values()) as parts:
        each = zip(outputs, parts, strict=True)
        bar = tqdm(each, "writing", len(outputs), disable=flags.quiet, leave=False)
        for name, part in bar:
            writers[name](part)
    return numbers


def flags_of(flags: RegisterFlags) -> dict[str, str]:
    """Return the flags that a result depends on, as text."""
    leave = {"pairs", "out_dir", "quiet", "json", "keep_on_interrupt"}
    return {
        name: str(value)
        for name, value in sorted(vars(flags).items())
        if name not in leave and value is not None
    }


def _from_scratch(flags: RegisterFlags, inputs: Inputs) -> list[Any]:
    """Return a `Registration` of each seed."""
    images = inputs.images
    from icon_nephi.fit.settings import find_effort
    from icon_nephi.io.itk_images import geometry_of
    from icon_nephi.registration.register import register

    kinds = [
        None if kind == "none" else kind
        for kind in (flags.moving_modality, flags.fixed_modality)
    ]
    # What `register` calls as its flag is called needs no line here.
    known = signature(register).parameters
    choices = {name: value for name, value in vars(flags).items() if name in known}
    choices |= {
        "modality": (kinds[0], kinds[1]),
        "mask_A": images.get("moving_mask"),
        "mask_B": images.get("fixed_mask"),
        **_landmarks(flags, inputs),
        "lesion_mask_A": images.get("moving_lesion_mask"),
        "lesion_mask_B": images.get("lesion_mask"),
        "rigid_mask": images.get("rigid_mask"),
        "volume_mask": images.get("volume_mask"),
        "initial": None if flags.initial is None else str(flags.initial),
        "segmentation_A": images.get("moving_segmentation"),
        "segmentation_B": images.get("fixed_segmentation"),
        # lncc is what the default compares, with all it does beside.
        "similarity": flags.similarity or (None if flags.io_sim == "lncc" else "lncc2"),
        "field": "auto",
        "affine": not flags.no_affine,
        "progress": not flags.quiet,
    }
    if flags.preset != "default":
        size = geometry_of(images["fixed"]).size
        modality = kinds[0] if kinds[0] == kinds[1] else None
        choices["field"] = find_effort(flags.preset, size, modality)
    return [
        register(images["moving"], images["fixed"], **choices | {"seed": seed})
        for seed in range(flags.seed, flags.seed + flags.seeds)
    ]


def _landmarks(flags: RegisterFlags, inputs: Inputs) -> dict[str, Any]:
    """Return the landmarks that the registration itself is to go by."""
    if not (flags.use_landmarks or str(flags.initial) == "landmarks"):
        return {}
    assert inputs.landmarks is not None  # the flags were checked
    return dict(zip(("landmarks_B", "landmarks_A"), inputs.landmarks, strict=True))


def _through_model(flags: RegisterFlags, inputs: Inputs) -> list[Any]:
    """Return one `ItkPair`, of a pretrained network and instance optimisation."""
    images = inputs.images
    from icon_nephi import pretrained_models
    from icon_nephi.io.image_input import choose_device
    from icon_nephi.itk_wrapper import register_pair_with_mask
    from icon_nephi.losses.similarities import PatchNCC
    from icon_nephi.registration.itk_pair import ItkPair

    device = choose_device(flags.device, None)
    weights = flags.network_weights
    if weights is not None and not weights.is_file():
        raise ValueError(f"--network_weights: {weights} does not exist")
    model = pretrained_models.init_network(
        flags.model, neural="residual", weights=weights
    ).to(device)
    if flags.io_sim == "lncc2":
        model = model.changed(similarity=PatchNCC(1e-3, squared=True))
    phi_AB, phi_BA = register_pair_with_mask(
        model,
        _for_model(flags, images, "moving"),
        _for_model(flags, images, "fixed"),
        images.get("moving_mask"),
        images.get("fixed_mask"),
        flags.io_iterations,
        segmentation_A=images.get("moving_segmentation"),
        segmentation_B=images.get("fixed_segmentation"),
        progress=not flags.quiet,
        seed=flags.seed,
    )
    return [ItkPair(phi_AB, phi_BA, images["moving"], images["fixed"])]


def _for_model(flags: RegisterFlags, images: dict[str, Any], side: str) -> Any:
    """Return an image with the intensities its network was trained with."""
    from icon_nephi import pretrained_models as models

    image, mask = images[side], images.get(f"{side}_mask")
    if flags.model == "lung":
        return models.lung_network_preprocess(image, mask)
    if flags.model == "brain":
        return models.brain_network_preprocess(image)
    kind = "mri" if flags.model == "knee" else getattr(flags, f"{side}_modality")
    if kind == "none":
        raise ValueError(f"--model {flags.model} needs --{side}_modality ct or mri")
    return models.unigradicon_network_preprocess(image, kind, mask)


def _writers(
    result: Any, others: list[Any], inputs: Inputs, numbers: dict[str, Any]
) -> dict[str, Callable[[Path], object]]:
    """Return what writes each of `OUTPUTS`; it makes what it writes when called."""
    from icon_nephi.io.image_files import write_image
    from icon_nephi.io.itk_transforms import write_transform
    from icon_nephi.maps.two_way import MOVING_TO_FIXED

    def write_report(path: Path) -> None:
        extras = {name: numbers[name] for name in ("seconds", "command")}
        for kind in ("landmarks", "labels"):
            both = getattr(inputs, kind) or (None, None)
            extras |= dict(zip((f"{kind}_fixed", f"{kind}_moving"), both, strict=True))
        result.report(path, others=others, **extras)

    return {
        "transform_out": lambda path: write_transform(result.phi_AB, path),
        "inverse_transform_out": lambda path: write_transform(result.phi_BA, path),
        "warped_moving_out": lambda path: write_image(
            result.warp(inputs.original), path
        ),
        "displacement_out": lambda path: write_image(result.displacement_field(), path),
        "inverse_displacement_out": lambda path: write_image(
            result.displacement_field(None, MOVING_TO_FIXED), path
        ),
        "jacobian_out": lambda path: write_image(result.jacobian_determinant(), path),
        "error_out": lambda path: write_image(result.error_image(None, others), path),
        "save": lambda path: result.save(path),
        "report": write_report,
        "json": lambda path: path.write_text(
            json.dumps(numbers, indent=2) + "\n", "utf-8"
        ),
    }


def in_flags(message: str) -> str:
    """Return the same complaint with the command's names for things."""
    for letter, side in (("A", "moving"), ("B", "fixed")):
        message = message.replace(f"image_{letter}", f"--{side}")
        for kind in ("mask", "segmentation", "landmarks"):
            if kind == "landmarks":
                message = message.replace(f"{kind}_{letter}", f"--{kind}_{side}")
            message = message.replace(f"{kind}_{letter}", f"--{side}_{kind}")
    for name, flag in (
        *(("device ", "--device: "), ("time_limit ", "--time_limit ")),
        ("mass_preserving ", "--mass_preserving "),
        ("start=", "--start "),
        ("weights: ", "--network_weights: "),
    ):
        message = message.replace(name, flag)
    return message
