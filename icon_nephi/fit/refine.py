"""Instance optimisation: refine the map a network gives for one pair.

Only codes and fields of the neural parts are optimised, on copies: encoders and voxel
steps have done their work and are let go, and the network stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from icon_registration import RegistrationModule
from icon_registration.losses import ICONLoss
from torch import Tensor, nn

from icon_nephi.fields.codes import LatentCode
from icon_nephi.fit.optimize import FitOptions, Stage, optimize
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.maps.networks import neural_parts
from icon_nephi.maps.transforms import Map
from icon_nephi.space.sampling import Patches, Points

# How a network is refined whose own loss needs dense grids.
SAMPLER = Patches(600, 3, 2.0, corners=True)
# Least and most voxels between the samples of a block, at first; the most at the end.
WIDE, FINE = (3.0, 6.0), 2.0


def refine_pair(
    model: nn.Module,
    image_A: Tensor,
    image_B: Tensor,
    *,
    steps: int = 50,
    learning_rate: float = 1e-3,
    code_learning_rate: float | None = None,
    mask_A: Tensor | None = None,
    mask_B: Tensor | None = None,
    segmentation_A: Tensor | None = None,
    segmentation_B: Tensor | None = None,
    stages: Sequence[Stage] | None = None,
    regularity: Callable[..., Tensor] | None = None,
    patience: int | None = None,
    progress: bool = True,
    callback: Callable[[int, ICONLoss], None] | None = None,
    seed: int | None = 0,
) -> tuple[Map, Map, list[dict[str, float]]]:
    """(phi_AB, phi_BA, the loss of every step) of one pair, refined.

    With a `GradientICONPoints` its own similarity, weights and counts of samples are
    used. For ICON's dense losses only ``lmbda`` is: the similarity becomes `PatchNCC`
    on `Patches`, as theirs would need every voxel in every step.

    Args:
        model: a loss around a registration network, or the network; as it was after.
        image_A: moving ``[1, C, *grid]``, on the network's grid.
        image_B: fixed ``[1, C, *grid]``.
        steps: how many, unless there are stages.
        learning_rate: Adam's, of the fields.
        code_learning_rate: of the codes; default ten times that, for codes larger than
            0.1 a hundred times that and their root mean square.
        mask_A: ``[1, 1, *grid]``, where the samples of image_A lie.
        mask_B: the same of image_B.
        segmentation_A: label map ``[1, 1, *grid]`` for the loss's Dice term, if it has
            a weight.
        segmentation_B: the same of image_B.
        stages: coarse to fine; default: with `Patches` half of the steps with samples
            6 voxels apart, and half with 2, in small images less; with `Points` all
            alike.
        regularity: in place of the loss's own. `guarded_term`, which also holds the
            values of both maps together, is better for one pair.
        patience: see `icon_nephi.fit.optimize.optimize`.
        progress: show a bar.
        callback: called after every step with its number and ICONLoss.
        seed: of the sample positions; None leaves the loss's own generator.

    Raises:
        ValueError: a model without neural parts, or a map that is not a closure.
    """
    maps = unrefined_maps(model, image_A, image_B)
    transforms = neural_parts(maps)
    if not transforms:
        raise ValueError(
            f"model ({type(model).__name__}) has no neural part to optimise; call "
            "icon_nephi.add_neural_residual(model), or let "
            "icon_registration.itk_wrapper tune its voxel fields"
        )
    # Shared parts stay shared: by identity, while the originals keep theirs taken.
    originals = [(t.code, t.field) for t in transforms]
    unique = {id(code): code for code, _ in originals}
    codes = {key: _trainable(code) for key, code in unique.items()}
    fields: dict[int, Any] = {id(field): field for _, field in originals}
    fields = {key: copy.deepcopy(field) for key, field in fields.items()}
    for transform, (code, field) in zip(transforms, originals, strict=True):
        transform.code, transform.field = codes[id(code)], fields[id(field)]
    loss = _loss_on(Given(maps), model, regularity, seed, image_B.dim() - 2)
    code_tensors = [
        t for c in codes.values() for t in (c.global_code, *c.local_codes) if t.numel()
    ]
    parts = [f for f in fields.values() if isinstance(f, nn.Module)]
    weights = [p.requires_grad_() for f in parts for p in f.parameters()]
    rates = code_learning_rate
    groups: list[dict[str, object]] = [
        {"params": [t], "lr": learning_rate * _reach(t) if rates is None else rates}
        for t in code_tensors
    ]
    groups += [{"params": weights, "lr": learning_rate}] if weights else []
    labels = {"segmentation_A": segmentation_A, "segmentation_B": segmentation_B}
    with torch.enable_grad():
        course = optimize(
            loss,
            image_A,
            image_B,
            stages or _stages(steps, loss.similarity_sampler, max(image_B.shape[2:])),
            groups,
            mask_A=mask_A,
            mask_B=mask_B,
            extras={k: v for k, v in labels.items() if v is not None},
            patience=patience,
            callback=callback,
            options=FitOptions(progress=progress),
        )
    history = course.complete()
    for transform in transforms:
        transform.code = transform.code.detached()
        if isinstance(transform.field, nn.Module):
            transform.field.requires_grad_(False)
    return *maps, history


def unrefined_maps(
    model: nn.Module, image_A: Tensor, image_B: Tensor
) -> tuple[Map, Map]:
    """(phi_AB, phi_BA) of a loss's network, or of a network, in ``eval()``.

    No graph is made, yet both maps share the codes and fields they share in training
    (those of maps made with gradients off are copies).
    """
    net: Any = getattr(model, "regis_net", model)
    with _untouched(net), torch.enable_grad():
        maps = net(image_A, image_B)
        if not isinstance(maps, tuple):
            maps = maps, net(image_B, image_A)
    return maps[0], maps[1]


class Given(RegistrationModule):
    """A network that knows its answer."""

    def __init__(self, maps: tuple[Map, Map]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, image_A: Tensor, image_B: Tensor) -> tuple[Map, Map]:
        """The maps, whatever the images."""
        return self.maps


def _loss_on(
    network: nn.Module,
    model: nn.Module,
    regularity: Callable[..., Tensor] | None,
    seed: int | None,
    dimension: int,
) -> GradientICONPoints:
    """The model's loss on another network, at sampled points."""
    changes: dict[str, Any] = {"regis_net": network}
    if not isinstance(model, GradientICONPoints):
        lmbda = float(getattr(model, "lmbda", 1.0))
        model = GradientICONPoints(
            network, PatchNCC(1e-3), lmbda, similarity_sampler=SAMPLER
        )
    if regularity is not None:
        changes["regularity"] = regularity
        if model.extent is None:
            changes["extent"] = torch.ones(dimension)
    if seed is not None:
        changes["generator"] = torch.Generator().manual_seed(seed)
    return model.changed(**changes)


def _stages(steps: int, sampler: Points | Patches, side: int) -> list[Stage]:
    """From wide blocks to small ones: what is far off is found first.

    Training may need wider ones all the time, for reach, which a predicted map has.
    """
    if isinstance(sampler, Points):
        return [Stage(steps, sampler)]
    own, first = sampler.stride, min(WIDE[1], max(WIDE[0], side / 16))
    shape = [s / min(own) for s in own] if isinstance(own, tuple) else None
    strides: list[Any] = [first, min(FINE, first / 2)]
    if shape:
        strides = [tuple(stride * s for s in shape) for stride in strides]
    wide, fine = (replace(sampler, stride=s, corners=True) for s in strides)
    return [Stage(steps // 2, wide), Stage(steps - steps // 2, fine)]


def _reach(code: Tensor) -> float:
    """How much faster a code may move than weights: predicted ones are larger."""
    return max(10.0, 100.0 * float(code.detach().square().mean().sqrt()))


def _trainable(code: LatentCode) -> LatentCode:
    code = code.detached()
    for tensor in (code.global_code, *code.local_codes):
        tensor.requires_grad_()
    return code


@contextmanager
def _untouched(net: nn.Module) -> Iterator[None]:
    """Within: ``eval()`` and no weight asks for a gradient; after: as before."""
    asked = [p for p in net.parameters() if p.requires_grad]
    trained = [m for m in net.modules() if m.training]
    try:
        for weight in asked:
            weight.requires_grad_(False)
        net.eval()
        yield
    finally:
        for weight in asked:
            weight.requires_grad_()
        for module in trained:
            module.training = True
