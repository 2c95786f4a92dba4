"""icon_registration.itk_wrapper for networks with neural fields: same calls, more kept.

Beyond ICON's: 2D, any pixel type, masks, fine-tuning of codes and fields alone, on
copies, so that the model is the same afterwards; transforms at any resolution. Images
are resized to the network's grid as ICON does it, and prepared by the caller.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Sequence
from typing import Any

import itk
import numpy as np
import torch
import torch.nn.functional as F
from icon_registration.losses import ICONLoss, to_floats
from torch import Tensor, nn

from icon_nephi._check import check_dimension
from icon_nephi.fit.refine import refine_pair, unrefined_maps
from icon_nephi.io.image_input import is_itk, read_input
from icon_nephi.io.itk_images import (
    check_itk_image,
    geometry_of,
    resample_to,
    tensor_of,
)
from icon_nephi.maps.transforms import Map
from icon_nephi.space.frames import Array, other_components, other_order
from icon_nephi.space.images import resize_image
from icon_nephi.space.intensities import check_intensities

# Points of an exported field evaluated at once.
SLAB = 2**18


def register_pair(
    model: nn.Module,
    image_A: Any,
    image_B: Any,
    finetune_steps: int | None = None,
    return_artifacts: bool = False,
    learning_rate: float = 1e-3,
    **options: Any,
) -> Any:
    """Return (phi_AB, phi_BA), ITK transforms; with ``return_artifacts`` and the loss.

    ``phi_AB.TransformPoint(point of image_B)`` is the point of image_A, LPS mm.

    Args:
        model: a loss around a registration network, or the network, whose identity map
            is assigned; unchanged afterwards.
        image_A: moving ITK image, 2D or 3D, prepared as the model was trained.
        image_B: fixed ITK image.
        finetune_steps: of instance optimisation; None or 0: none.
        return_artifacts: also return the ICONLoss of floats.
        learning_rate: of the fields (codes: ten times that). ICON's default, 2e-5, is
            for the weights of an encoder and does little here.
        **options: as `register_pair_with_mask`'s.

    Raises:
        TypeError: not ITK images.
        ValueError: images, masks or a model that this cannot be done with.
    """
    how = finetune_steps, return_artifacts, learning_rate
    return register_pair_with_mask(model, image_A, image_B, None, None, *how, **options)


def register_pair_with_mask(
    model: nn.Module,
    image_A: Any,
    image_B: Any,
    mask_A: Any = None,
    mask_B: Any = None,
    finetune_steps: int | None = None,
    return_artifacts: bool = False,
    learning_rate: float = 1e-3,
    segmentation_A: Any = None,
    segmentation_B: Any = None,
    **options: Any,
) -> Any:
    """Register as `register_pair`, looking only where the masks are above zero.

    ``mask_A`` and ``mask_B`` are ITK masks, on any grid; fine-tuning samples each image
    inside its own. ``segmentation_A`` and ``segmentation_B`` are ITK label maps, handed
    to a model whose loss takes them. ``options`` are ``export_shape`` (voxels of the
    transforms' fields, tensor order; default the network's grid), and of
    `icon_nephi.fit.refine.refine_pair` ``code_learning_rate``, ``stages``,
    ``regularity``, ``patience``, ``progress``, ``callback`` and ``seed``.

    Raises:
        TypeError: not ITK images.
        ValueError: images, masks or a model that this cannot be done with.
    """
    extras = {"mask_A": mask_A, "mask_B": mask_B}
    extras |= {"segmentation_A": segmentation_A, "segmentation_B": segmentation_B}
    how = finetune_steps, return_artifacts, learning_rate
    return _register(model, [image_A], [image_B], extras, *how, **options)


def register_pair_with_multimodalities(
    model: nn.Module,
    image_A: Sequence[Any],
    image_B: Sequence[Any],
    finetune_steps: int | None = None,
    return_artifacts: bool = False,
    learning_rate: float = 1e-3,
    **options: Any,
) -> Any:
    """Register as `register_pair`, of lists of images of one place, a channel each.

    The model's network takes that many channels.

    Raises:
        TypeError: not ITK images.
        ValueError: lists of different lengths, images that do not lie on each other.
    """
    if not image_A or len(image_A) != len(image_B):
        raise ValueError(
            f"image_A has {len(image_A)} modalities, image_B {len(image_B)}: pass the "
            "same ones of both, at least one"
        )
    how = finetune_steps, return_artifacts, learning_rate
    return _register(model, image_A, image_B, {}, *how, **options)


def _register(
    model: Any,
    images_A: Sequence[Any],
    images_B: Sequence[Any],
    extras: dict[str, Any],
    finetune_steps: int | None,
    return_artifacts: bool,
    learning_rate: float,
    *,
    export_shape: Sequence[int] | None = None,
    **options: Any,
) -> Any:
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    if finetune_steps is not None and finetune_steps < 0:
        raise ValueError(f"finetune_steps must be positive, got {finetune_steps}")
    if not hasattr(model, "identity_map"):
        raise ValueError(
            f"model ({type(model).__name__}) has no identity map; call "
            "model.assign_identity_map([1, C, *grid]) first"
        )
    shape, device = tuple(model.identity_map.shape[2:]), model.identity_map.device
    A, B = (
        _network_images(letter, images, shape).to(device)
        for letter, images in (("A", images_A), ("B", images_B))
    )
    labels: dict[str, Any] = {  # refine_pair takes them by these names
        name: _network_labels(name, image, images, shape).to(device)
        for (name, image), images in zip(
            extras.items(), (images_A, images_B) * 2, strict=False
        )
        if image is not None
    }
    losses: list[ICONLoss] = []
    if finetune_steps or options.get("stages"):
        call = options.pop("callback", None)

        def remember(step: int, loss: ICONLoss) -> None:
            losses[:] = [loss]
            if call is not None:
                call(step, loss)

        phi_AB, phi_BA, _ = refine_pair(
            model,
            A,
            B,
            steps=finetune_steps or 0,
            learning_rate=learning_rate,
            callback=remember,
            **labels,
            **options,
        )
    else:
        phi_AB, phi_BA = unrefined_maps(model, A, B)
    place_A, place_B = images_A[0], images_B[0]
    size = tuple(export_shape or shape)
    with torch.no_grad():
        results = (
            _exported(phi_AB, shape, size, device, place_B, place_A),
            _exported(phi_BA, shape, size, device, place_A, place_B),
        )
        if not return_artifacts:
            return results
        if not losses:
            taken = inspect.signature(model.forward).parameters
            known = {name: image for name, image in labels.items() if name in taken}
            losses = [model(A, B, **known)]
    return *results, to_floats(losses[0])


def _network_images(letter: str, images: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """Return the modalities of one side on the network's grid, ``[1, C, *shape]``."""
    channels, place = [], None
    name = f"image_{letter}"
    for image in images:
        if not is_itk(image):
            raise TypeError(
                f"{name} must be an itk.Image, got {type(image).__name__}; "
                "read it with itk.imread"
            )
        values, _, geometry = read_input(letter, image, None)
        check_intensities(name, values)
        advice = "pass images as it was made for"
        check_dimension(name, geometry.dimension, "the model is", len(shape), advice)
        if place is not None and geometry != place:
            raise ValueError(
                f"{name}: its modalities lie on different grids; resample them "
                "to the first"
            )
        place = geometry
        channels.append(resize_image(values, shape))
    return torch.cat(channels, 1)


def _network_labels(
    name: str, labels: Any, images: Sequence[Any], shape: Sequence[int]
) -> Tensor:
    """Return a mask or label map on the network's grid, ``[1, 1, *shape]``."""
    letter = name[-1]
    if name.startswith("mask"):
        values = read_input(letter, images[0], labels)[1]
        assert values is not None
        resized = resize_image(values, shape, "nearest")
        if bool(resized.any()):
            return resized
        # A mask so small that no nearest voxel hits it.
        pool = F.adaptive_max_pool2d if len(shape) == 2 else F.adaptive_max_pool3d
        pooled: Tensor = pool(values, tuple(shape))
        return pooled
    check_itk_image(name, labels)
    return resize_image(tensor_of(resample_to(labels, images[0])), shape, "nearest")


def _exported(
    phi: Map,
    shape: Sequence[int],
    size: Sequence[int],
    device: torch.device,
    source: Any,
    target: Any,
) -> Any:
    """Return phi as ICON exports it: a displacement field over the source image's box.

    Args:
        phi: the map, ICON frame of the network's grid.
        shape: the network's grid; its voxels and those of ``size`` fill the same box.
        size: voxels of the field.
        device: where phi is evaluated.
        source: the image whose points go in.
        target: the image whose points come out.
    """
    if len(size) != len(shape) or min(size) < 2:
        raise ValueError(
            f"export_shape must be {len(shape)} numbers above 1, got {tuple(size)}"
        )
    axes = [
        (((torch.arange(m, dtype=torch.float64) + 0.5) * n / m - 0.5) / (n - 1)).float()
        for m, n in zip(size, shape, strict=True)
    ]
    # ICON counts the displacement in voxels of the field, (m - 1) of them to a unit.
    d = len(shape)
    scale = torch.tensor([(n - 1) / n * m for m, n in zip(size, shape, strict=True)])
    units = scale.to(device).reshape(-1, *(1,) * d)
    field = itk.Image[itk.Vector[itk.D, d], d].New()
    field.SetRegions(other_order(int(m) for m in size))
    field.Allocate()
    values = itk.array_view_from_image(field)
    rows = max(1, SLAB // math.prod(size[1:]))
    for start in range(0, size[0], rows):
        slab = [axes[0][start : start + rows], *axes[1:]]
        x = torch.stack(torch.meshgrid(*slab, indexing="ij"))[None].to(device)
        moves = ((phi(x) - x) * units)[0].movedim(0, -1).cpu().numpy()
        values[start : start + rows] = other_components(moves)
    middle = _field_transform(d).New()
    middle.SetDisplacementField(field)
    composite = itk.CompositeTransform[itk.D, d].New()
    for part in (_from_index(source, size, True), middle, _from_index(target, size)):
        composite.PrependTransform(part)
    return composite


def _field_transform(d: int) -> Any:
    """Return ``itk.DisplacementFieldTransform[itk.D, d]``.

    Asked for by that name, ITK loads every class it might need with it: 400 MB.
    """
    try:
        module = importlib.import_module("itk.itkDisplacementFieldTransformPython")
        return getattr(module, f"itkDisplacementFieldTransformD{d}")
    except (ImportError, AttributeError):
        return itk.DisplacementFieldTransform[itk.D, d]


def _from_index(image: Any, size: Sequence[int], inverse: bool = False) -> Any:
    """Return voxel index of a grid over the image's box -> LPS mm, affine."""
    place = geometry_of(image).resized(size)
    matrix: Array = np.array(place.direction) * place.spacing
    offset: Array = np.array(place.origin)
    if inverse:
        matrix = np.linalg.inv(matrix)
        offset = -matrix @ offset
    affine = itk.AffineTransform[itk.D, len(size)].New()
    affine.SetMatrix(itk.matrix_from_array(matrix))
    affine.SetOffset(offset.tolist())
    return affine
