"""Two images registered by the general network alone, in one pass."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from icon_nephi.fit.learned import general_encoder, predict_pair
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.io.pair_input import read_pair
from icon_nephi.registration.result import Registration


def predict(
    image_A: Any,
    image_B: Any,
    *,
    modality: str | tuple[str | None, str | None] | None = None,
    mask_A: Any = None,
    mask_B: Any = None,
    affine: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> Registration:
    """Return the `Registration` that the general network predicts, not optimised.

    The network was trained on synthetic images alone (docs/general_network.md) and
    sees the pair behind an affine start. Where the images agree less with its answer
    than without, that start comes back.

    Args:
        image_A: moving, as `register` takes it.
        image_B: fixed: the same kind; its grid may differ.
        modality: as in `register`.
        mask_A: where the affine start and the choice between starts look at image_A.
        mask_B: the same of image_B.
        affine: look for an affine start; without, the headers' is taken.
        seed: of the search for it.
        device: default: the tensors' own; for ITK images a GPU if there is one.
        weights: another network's, as `training.finetune` writes them.

    Raises:
        TypeError: an argument of another kind than this.
        ValueError: images or masks that cannot be registered; one sentence says why.
        FileNotFoundError: the weights are missing.
    """
    options = FitOptions(seed, progress=False)
    modalities = modality if isinstance(modality, tuple) else (modality, modality)
    images = (image_A, image_B, mask_A, mask_B)
    A, B = read_pair(*images, modalities, device)
    with torch.enable_grad():
        path = None if weights is None else Path(weights)
        encoder = general_encoder(A.place.dimension, path)
        fit = predict_pair(A, B, affine=affine, encoder=encoder, options=options)
    choices = {"start": "learned", "steps": 0, "affine": affine, "modality": modality}
    choices |= {"seed": seed, "seconds": options.seconds}
    places = A.whole, B.whole
    return Registration(fit, *places, itk=A.placed, images=images, made_with=choices)
