"""Register two images in one call: ITK images, tensors, or images on disk."""

from __future__ import annotations

from typing import Any

import torch

from icon_nephi._memory import peak_memory
from icon_nephi.fit.from_scratch import fit_pair
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.fit.settings import Settings
from icon_nephi.io.pair_input import read_pair
from icon_nephi.registration.result import Registration


def register(
    image_A: Any,
    image_B: Any,
    *,
    modality: str | tuple[str | None, str | None] | None = None,
    mask_A: Any = None,
    mask_B: Any = None,
    segmentation_A: Any = None,
    segmentation_B: Any = None,
    similarity: Any = None,
    field: str | Settings = "auto",
    affine: bool = True,
    transform: str = "deformable",
    allow_mirror: bool = False,
    mass_preserving: bool = False,
    start: str = "auto",
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    time_limit: float | None = None,
    memory_limit: int | str | None = None,
    keep_on_interrupt: bool = False,
) -> Registration:
    """Return the `Registration` that lays image_A on image_B, optimised from scratch.

    Args:
        image_A: moving: an ITK image (2D or 3D, one number per voxel, any pixel type)
            or a tensor ``[1, C, *grid]``; on disk: a `icon_nephi.volumes.Volume`, or
            the path of a Zarr folder.
        image_B: fixed: the same kind; its grid may differ.
        modality: ``"ct"``, ``"mri"`` or None; a tuple of two for (A, B).
        mask_A: above zero where image_A counts; ITK: any grid, else ``[1, 1, *grid]``.
        mask_B: the same of image_B.
        segmentation_A: label map of image_A, on a grid as a mask's; the labels that
            both have are laid on each other beside the images.
        segmentation_B: the same of image_B.
        similarity: an ICON similarity or a name, ``"lncc"``, ``"lncc2"``, ``"ncc"``,
            ``"mind"``, ``"mi"`` (see `find_similarity`), or ``"auto"`` (the default):
            ``"lncc"`` unless the images show that their contrasts differ.
        field: ``"siren"`` (the modulated sine field), ``"grid"`` (a smaller one,
            about twice as fast, less exact on large motion), ``"detail"`` (the small
            one with finer codes), ``"ct"`` (the small one, comparing self-similarity
            features too), ``"auto"`` (3D CT: ct, else large 3D images: detail, else
            siren), or `icon_nephi.models.Settings`.
        affine: start from an affine map. Without, from where the headers (tensors:
            the unit boxes) put the images.
        transform: ``"deformable"``, or without a deformation ``"affine"`` or
            ``"rigid"``: a body that is the same in both images, laid on itself.
        allow_mirror: image_A may be turned over, as a section on its slide; without, a
            pair that fits better so is only named in `warnings`.
        mass_preserving: lung CT: what is stretched gets thinner, see `fit_pair`.
        start: of the deformation, behind the affine start: ``"scratch"``, nothing;
            ``"learned"``, what the general network predicts (see `predict`);
            ``"auto"``: learned where the images agree more with it.
        seed: of every random number.
        device: default: the tensors' own; for ITK images a GPU if there is one.
        progress: show a bar.
        time_limit: seconds after which the search for a start and the optimisation
            stop early; reading the images counts.
        memory_limit: bytes, or as "4GiB": what images on disk may take in all.
        keep_on_interrupt: Ctrl-C stops the optimisation early; `warnings` say so.

    Raises:
        TypeError: an argument of another kind than this.
        ValueError: images or masks that cannot be registered; one sentence says why.
    """
    options = FitOptions(seed, progress, time_limit, keep_on_interrupt, allow_mirror)
    modalities = modality if isinstance(modality, tuple) else (modality, modality)
    images = (image_A, image_B, mask_A, mask_B)
    labels = (segmentation_A, segmentation_B)
    A, B = read_pair(*images, modalities, device, memory_limit, progress, labels)
    choices: dict[str, Any] = {"similarity": similarity, "field": field}
    choices |= {"affine": affine, "mass_preserving": mass_preserving}
    choices["transform"] = transform
    with torch.enable_grad():
        fit = fit_pair(A, B, **choices, begin=start, options=options)
    choices["start"] = start
    choices |= {"modality": modality, "seed": seed, "time_limit": time_limit}
    choices["allow_mirror"] = allow_mirror
    choices |= {"memory_limit": memory_limit, "keep_on_interrupt": keep_on_interrupt}
    choices |= {"peak_memory": peak_memory(), "seconds": options.seconds}
    choices["segmentations"] = A.labels is not None
    choices["similarity"] = fit.similarity or similarity
    places = A.whole, B.whole
    return Registration(fit, *places, itk=A.placed, images=images, made_with=choices)


def ensemble(
    image_A: Any, image_B: Any, seeds: int = 3, **keywords: Any
) -> list[Registration]:
    """Return the pair `register`ed with seeds 0, 1, ...: for `error_estimate`."""
    return [register(image_A, image_B, seed=s, **keywords) for s in range(seeds)]
