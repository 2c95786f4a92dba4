"""Register two images in one call: ITK images, tensors, or images on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from icon_nephi._memory import peak_memory
from icon_nephi.fit.from_scratch import fit_pair
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.fit.settings import Settings
from icon_nephi.io.pair_input import read_pair
from icon_nephi.io.wish_input import read_wishes
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
    initial: Any = None,
    landmarks_A: Any = None,
    landmarks_B: Any = None,
    use_landmarks: bool = True,
    landmark_error: float = 1.0,
    rigid_mask: Any = None,
    volume_mask: Any = None,
    lesion_mask_A: Any = None,
    lesion_mask_B: Any = None,
    restrict: Sequence[int] | None = None,
    stiffness: float = 1.0,
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
            features too), ``"lattices"`` (splines, every voxel at every step: the
            quickest), ``"auto"`` (3D CT: ct; large 3D images: detail; slabs and middle
            sizes: siren; else lattices), or `icon_nephi.models.Settings`.
        affine: start from an affine map. Without, from where the headers (tensors:
            the unit boxes) put the images.
        transform: ``"deformable"``, or without a deformation ``"affine"`` or
            ``"rigid"``: a body that is the same in both images, laid on itself.
        allow_mirror: image_A may be turned over, as a section on its slide; without, a
            pair that fits better so is only named in `warnings`.
        initial: what is known of the map, fixed -> moving: the start, and part of the
            result. An ITK transform or its path, of which the affine part is taken, a
            homogeneous matrix between the physical frames (tensors: the unit boxes), or
            ``"landmarks"``: what these say. Without ``affine`` it is kept as it is.
        landmarks_A: points of image_A, LPS millimetres (tensors: ICON frame), that are
            laid on those of image_B, row by row, beside the images.
        landmarks_B: the same of image_B.
        use_landmarks: in the fit; else they only serve an ``initial="landmarks"``.
        landmark_error: of landmarks, in millimetres: smaller ones weigh more.
        rigid_mask: above zero in image_B where the map only shifts and turns: each
            label as one body, or each piece where there is one label.
        volume_mask: above zero in image_B where the map keeps volumes.
        lesion_mask_A: above zero where image_A has what image_B has not: it is not
            matched, and the map goes on smoothly there.
        lesion_mask_B: the same of image_B.
        restrict: 0 or 1 for each axis i, j(, k) of image_B: along which things may
            move; then no affine start is looked for.
        stiffness: 2 lets the map bend half as quickly from place to place.
        mass_preserving: lung CT: what is stretched gets thinner, see `fit_pair`.
        start: of the deformation, behind the affine start: ``"scratch"``, nothing;
            ``"learned"``, what the general network predicts (see `predict`);
            ``"auto"``: that, in 2D, where the images agree more with it.
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
    lesions = (lesion_mask_A, lesion_mask_B)
    known = (labels, lesions)
    A, B = read_pair(*images, modalities, device, memory_limit, progress, *known)
    asked: dict[str, Any] = {"landmark_error": landmark_error, "stiffness": stiffness}
    asked |= {"initial": initial, "restrict": restrict}
    asked |= {"rigid_mask": rigid_mask, "volume_mask": volume_mask}
    asked |= {"itk": A.placed, "landmarks": (landmarks_A, landmarks_B)}
    wishes = read_wishes(A.place, B.place, **asked)
    if not use_landmarks:
        wishes = replace(wishes, landmarks=None)
    choices: dict[str, Any] = {"similarity": similarity, "field": field}
    choices |= {"affine": affine, "mass_preserving": mass_preserving}
    choices["transform"] = transform
    with torch.enable_grad():
        wishes = replace(wishes, begin=start)
        fit = fit_pair(A, B, **choices, wishes=wishes, options=options)
    choices["start"] = start
    choices |= {"modality": modality, "seed": seed, "time_limit": time_limit}
    choices |= {"allow_mirror": allow_mirror, "stiffness": stiffness}
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
