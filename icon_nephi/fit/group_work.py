"""One image of many at work: with the fields that all share, alone or in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from icon_nephi.fields.codes import LatentCode
from icon_nephi.fit.from_scratch import Work
from icon_nephi.fit.optimize import Course, optimize
from icon_nephi.fit.settings import make_pair
from icon_nephi.fit.steps import Steps, StepsInTurn, make_steps
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.maps.networks import NePhi


def loss_with(
    work: Work,
    start: Tensor,
    fields: tuple[nn.Module, nn.Module],
    code: LatentCode,
) -> GradientICONPoints:
    """What is minimised for an image, by these fields, from a code of its own.

    Behind a start in millimetres; every image gets the same random numbers.
    """
    generator = torch.Generator().manual_seed(work.options.seed)
    loss = work.loss_from(start, generator)
    pair: Any = loss.regis_net
    own: Any = make_pair(work.settings, work.images.geometry_B.extent, generator).net
    with torch.no_grad():
        own.global_codes.copy_(code.global_code)
        for grid, values in zip(own.local_codes, code.local_codes, strict=True):
            grid.copy_(values)
    pair.net = NePhi(own, *fields).to(work.images.image_B.device)
    generator.manual_seed(work.options.seed)
    return loss


def code_of(loss: GradientICONPoints) -> LatentCode:
    """The code of an image, an own copy."""
    pair: Any = loss.regis_net
    code: LatentCode = pair.net.net(None, None).detached()
    return code


def fit_code(work: Work, loss: GradientICONPoints) -> Course:
    """The code of an image moved to where the loss is least; the fields stay."""
    return _fitted(work, loss, make_steps, codes_alone=True)


def fit_in_turn(works: Sequence[Work], losses: Sequence[GradientICONPoints]) -> Course:
    """The codes of all and the fields moved, a step of each image after the other."""

    def in_turn(*given: Any) -> Steps:
        extras, samplers, similarity = given[3], *given[5:]
        each: list[Steps] = []
        for work, loss in zip(works, losses, strict=True):
            masks = work.images.where_A, work.images.where_B
            own = loss, _sides(work, loss), masks, extras, _weights(work, loss)
            beside = each[0] if each else None
            each.append(make_steps(*own, samplers, similarity, beside))
        both = zip(works, losses, strict=True)
        return StepsInTurn(each, [_sides(work, loss) for work, loss in both])

    settings = works[0].settings
    settings = replace(settings, steps=settings.steps * len(works))
    return _fitted(replace(works[0], settings=settings), losses[0], in_turn)


def _fitted(
    work: Work,
    loss: GradientICONPoints,
    make: Callable[..., Steps],
    *,
    codes_alone: bool = False,
) -> Course:
    images = work.images
    return optimize(
        loss,
        *_sides(work, loss),
        work.stages(),
        _weights(work, loss)[: 1 if codes_alone else 2],
        mask_A=images.where_A,
        mask_B=images.where_B,
        similarity=work.similarity,
        spacing_A=images.geometry_A.tensor_spacing,
        spacing_B=images.geometry_B.tensor_spacing,
        options=work.options,
        make=make,
    )


def _sides(work: Work, loss: GradientICONPoints) -> tuple[Tensor, Tensor]:
    """Both images as they are compared."""
    pair: Any = loss.regis_net
    if work.settings.features or work.choice.features == "only":
        return work.images.featured(pair.matrix[0])
    return work.images.image_A, work.images.image_B


def _weights(work: Work, loss: GradientICONPoints) -> list[dict[str, object]]:
    """Adam's groups: the code, and the fields."""
    pair: Any = loss.regis_net
    net, settings = pair.net, work.settings
    fields = [*net.field_AB.parameters(), *net.field_BA.parameters()]
    codes = {"params": list(net.net.parameters()), "lr": settings.code_rate}
    return [codes, {"params": fields, "lr": settings.field_rate}]
