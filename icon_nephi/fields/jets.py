"""Sine layers on jets: what a field computes at a point, and its derivatives with it.

A jet is ``[R, M, C]``: row 0 the values of M points, row 1 + a the derivative by
coordinate a (R = 1: values alone). All of the paper's field is one function with its
own backward: the products of matrices write into, or add to, memory that was used
before, and what is between them is few passes over memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from icon_nephi.fields.workspace import WORKSPACE


class _Sine(torch.autograd.Function):
    """sin(z + b) of a jet: values sin, derivatives cos times theirs; fused backward."""

    @staticmethod
    def forward(ctx: Any, jet: Tensor, bias: Tensor) -> Tensor:
        out, cosine = torch.empty_like(jet), torch.empty_like(jet[0])
        torch.add(jet[0], bias, out=cosine)
        _sine_of(cosine, out=out[0])
        torch.mul(jet[1:], cosine, out=out[1:])
        ctx.save_for_backward(out, cosine, jet if len(jet) > 1 else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        out, cosine, jet = ctx.saved_tensors
        slopes = cosine[:0] if jet is None else jet[1:]
        result, total = torch.empty_like(grad), torch.empty_like(cosine)
        _sine_grad(grad, cosine, slopes, out[0], result, total)
        return result, result[0].sum(0)


def sine(jet: Tensor, bias: Tensor) -> Tensor:
    """sin(z + b) of a jet; what only its derivatives need is made for them only."""
    if len(jet) == 1 and not torch.is_grad_enabled():
        return (jet + bias).sin_()
    return _sine_with_graph(jet, bias)


_sine_with_graph = cast(Callable[[Tensor, Tensor], Tensor], _Sine.apply)


def siren(
    points: Tensor,
    values: Tensor,
    frequencies: Tensor,
    omegas: tuple[float, float],
    weights: Sequence[Tensor],
) -> Tensor:
    """``[R, M, d]``: the formulas of `icon_nephi.fields.siren.ModulatedSiren` on a jet.

    Args:
        points: ``[M, d]`` in the unit box.
        values: jet of the code ``[R, M, C]``, R = 1 or 1 + d.
        frequencies: ``[F, d]``.
        omegas: of the first synthesis layer, and of every other layer.
        weights: from level to level weight and bias of the modulator's layer and of
            the synthesis', then those of the last layer.
    """
    inputs = points, values, *weights
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return _siren(keep, omegas, frequencies, *inputs)


class _Siren(torch.autograd.Function):
    """Level by level: gate, wave (both sine layers), and their product.

    Of a sine layer z is kept, with the cosine where its values were, and the sine: its
    jet is [sine, cosine z']. The derivatives by z, from G by that jet, are cosine G
    with sine (G' . z') taken from the values'. The first gate is added to the others;
    the first product is its wave alone; the jet of no other wave is made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keep: bool,
        omegas: tuple[float, float],
        frequencies: Tensor,
        points: Tensor,
        values: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        rows, size, (start, omega) = len(values), values.shape[2], omegas
        levels, shape = len(weights) // 4, (*values.shape[:2], len(weights[0]))
        jet = _cut(4 * levels if keep else 4, shape, values)
        plane = _cut(2 * levels - 1 if keep else 3, shape[1:], values)
        features = _features(points, frequencies)
        repeated = features.expand(rows, -1, -1)
        turned = [
            _turned(factor * weight[:, -features.shape[1] :], frequencies, rows)
            for factor, weight in ((omega, weights[0]), (start, weights[2]))
        ]
        inner, first = jet(), jet()
        _flat(inner).addmm_(_flat(values), weights[0][:, :size].T, beta=0, alpha=omega)
        inner.baddbmm_(repeated, turned[0].mT)
        needed = keep or rows > 1  # the cosines
        _sine_of(inner[0].add_(weights[1], alpha=omega), first[0], needed)
        torch.mul(inner[1:], inner[0], out=first[1:])
        outer, product = jet() if keep else inner, jet()
        torch.bmm(repeated, turned[1].mT, out=outer)
        _sine_of(outer[0].add_(weights[3], alpha=start), product[0], needed)
        torch.mul(outer[1:], outer[0], out=product[1:])
        kept = [inner, first, outer, product]
        gate, spare = first, plane()
        for level in range(1, levels):
            modulate, shift, synthesise, offset = weights[4 * level : 4 * level + 4]
            before = gate
            if keep or level == 1:
                sine, wave, gate = plane(), plane(), jet()
            if keep:
                inner, outer = jet(), jet()
            _flat(inner).addmm_(_flat(before), modulate.T, beta=0, alpha=omega)
            _sine_of(inner[0].add_(shift, alpha=omega), sine, needed)
            torch.add(sine, first[0], out=gate[0])
            torch.addcmul(first[1:], inner[1:], inner[0], out=gate[1:])
            _flat(outer).addmm_(_flat(product), synthesise.T, beta=0, alpha=omega)
            _sine_of(outer[0].add_(offset, alpha=omega), wave, needed)
            product = jet() if keep else product
            torch.mul(wave, gate[0], out=product[0])
            if rows > 1:
                torch.mul(outer[0], gate[0], out=spare)
                torch.mul(outer[1:], spare, out=product[1:])
                product[1:].addcmul_(gate[1:], wave)
            kept += [inner, sine, gate, outer, wave, product]
        if keep:
            ctx.omegas = omegas
            constant = frequencies, features, *turned, values
            ctx.save_for_backward(*constant, *weights, *kept)
        out = product @ (0.5 * weights[-2].T)
        out[0].add_(weights[-1], alpha=0.5)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        frequencies, features, *saved = ctx.saved_tensors
        (*turned, values), saved = saved[:3], saved[3:]
        levels, (start, omega) = len(saved) // 10, ctx.omegas
        weights, kept = saved[: 4 * levels + 2], saved[4 * levels + 2 :]
        gates, products = [kept[1], *kept[6::6]], [kept[3], *kept[9::6]]
        needed, first = ctx.needs_input_grad[3:], kept[1]
        of_weights: list[Tensor | None] = [None] * len(weights)
        jet = _cut(5, first.shape, first)
        of_first, of_gate, of_inner, of_product, of_outer = (jet() for _ in range(5))
        total = _cut(1, first[0].shape, first)()

        def derive(at: int, of: Tensor, inputs: Tensor, factor: float) -> None:
            """By a layer's weight and bias, from the derivatives by its outputs."""
            if needed[2 + at]:
                of_weights[at] = (_flat(of).T @ _flat(inputs)).mul_(factor)
            if needed[3 + at]:
                of_weights[at + 1] = of[0].sum(0).mul_(factor)

        derive(4 * levels, grad, products[-1], 0.5)
        torch.mm(_flat(grad), 0.5 * weights[-2], out=_flat(of_product))
        for level in range(levels - 1, 0, -1):
            inner, sine, gate, outer, wave, _ = kept[6 * level - 2 : 6 * level + 4]
            top = level == levels - 1
            into = of_first if top else of_gate
            _product_grad(of_product, gate, outer, wave, into, of_outer, total)
            if not top:
                _flat(into).addmm_(_flat(of_inner), weights[4 * level + 4], alpha=omega)
                of_first += into
            _sine_grad(into, inner[0], inner[1:], sine, of_inner, total)
            derive(4 * level, of_inner, gates[level - 1], omega)
            derive(4 * level + 2, of_outer, products[level - 1], omega)
            _flat(of_product).addmm_(
                _flat(of_outer), weights[4 * level + 2], beta=0, alpha=omega
            )
        if levels > 1:
            _flat(of_first).addmm_(_flat(of_inner), weights[4], alpha=omega)
        else:
            of_first.zero_()
        for of, z, sine in (
            (of_first, kept[0], first[0]),
            (of_product, kept[2], products[0][0]),
        ):
            _sine_grad(of, z[0], z[1:], sine, of, total)
        for at, of, factor in ((0, of_first, omega), (2, of_product, start)):
            if needed[2 + at]:
                by = torch.bmm(of.mT, features.expand(len(of), -1, -1))
                by = _turned_back(by, frequencies)
                if at == 0:
                    by = torch.cat([_flat(of).T @ _flat(values), by], 1)
                of_weights[at] = by.mul_(factor)
            if needed[3 + at]:
                of_weights[at + 1] = of[0].sum(0).mul_(factor)
        of_points = of_values = None
        if needed[0]:
            parts = zip((*of_first, *of_product), (*turned[0], *turned[1]), strict=True)
            of_points = _points_grad(features, frequencies, parts)
        if needed[1]:
            of_values = of_first @ (omega * weights[0][:, : values.shape[2]])
        return None, None, None, of_points, of_values, *of_weights


_siren = cast(Callable[..., Tensor], _Siren.apply)


def _cut(number: int, shape: Sequence[int], like: Tensor) -> Callable[[], Tensor]:
    """What gives so many tensors of a shape, one after the other, of one workspace."""
    whole = WORKSPACE.take(number * math.prod(shape), like).view(number, *shape)
    return partial(next, iter(whole.unbind()))


def _flat(jet: Tensor) -> Tensor:
    return jet.flatten(0, 1)


def _features(points: Tensor, frequencies: Tensor) -> Tensor:
    """``[M, 2 F]``: sines and cosines of 2 pi B (2 x - 1)."""
    phase = F.linear(2 * points - 1, 2 * math.pi * frequencies)
    shape = len(points), 2 * len(frequencies)
    features = WORKSPACE.take(math.prod(shape), phase).view(shape)
    sine, cosine = features.chunk(2, 1)
    torch.sin(phase, out=sine)
    torch.cos(phase, out=cosine)
    return features


def _points_grad(
    features: Tensor, frequencies: Tensor, parts: Iterable[tuple[Tensor, Tensor]]
) -> Tensor:
    """``[M, d]`` by points, from the sum of products that is by their features."""
    grad = WORKSPACE.take(features.numel(), features).view_as(features)
    for number, (first, second) in enumerate(parts):
        grad.addmm_(first, second, beta=min(number, 1))
    (of_sine, of_cosine), (sine, cosine) = grad.chunk(2, 1), features.chunk(2, 1)
    of_phase = of_sine.mul_(cosine).addcmul_(of_cosine, sine, value=-1)
    return of_phase @ (4 * math.pi * frequencies)


def _turned(weight: Tensor, frequencies: Tensor, rows: int) -> Tensor:
    """``[R, H, 2 F]``: what makes the jet of W times features of the features alone.

    Their derivative along an axis is themselves, turned and scaled; turning and scaling
    W instead leaves nothing but products of matrices to be done per point.
    """
    result = weight.new_empty(rows, *weight.shape)
    result[0] = weight
    slopes = 4 * math.pi * frequencies.T[: rows - 1, None]
    of_sine, of_cosine = weight.chunk(2, 1)
    torch.mul(of_cosine, -slopes, out=result[1:, :, : of_sine.shape[1]])
    torch.mul(of_sine, slopes, out=result[1:, :, of_sine.shape[1] :])
    return result


def _turned_back(grad: Tensor, frequencies: Tensor) -> Tensor:
    """The derivatives by W from those by what `_turned` made of it."""
    of_sine, of_cosine = grad[0].chunk(2, 1)
    for part, slope in zip(grad[1:], 4 * math.pi * frequencies.T, strict=False):
        negative, positive = part.chunk(2, 1)
        of_sine.addcmul_(positive, slope)
        of_cosine.addcmul_(negative, slope, value=-1)
    return grad[0]


def _sine_of(values: Tensor, out: Tensor, keep: bool = True) -> None:
    """out = sin of the values, which become the cosine if that is to be kept."""
    torch.sin(values, out=out)
    if keep:
        values.cos_()


def _product_grad(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    wave: Tensor,
    of_gate: Tensor,
    of_z: Tensor,
    total: Tensor,
) -> None:
    """By the gate and by the wave's z, from grad by their product."""
    torch.mul(grad[0], wave, out=of_gate[0])
    _dot(grad, gate, out=of_z[0]).mul_(z[0])
    if len(grad) > 1:
        _dot(grad[1:], z[1:], out=total)
        of_gate[0].addcmul_(total, z[0])
        of_z[0].addcmul_(total.mul_(wave), gate[0], value=-1)
        torch.mul(grad[1:], wave, out=of_gate[1:])
        torch.mul(gate[0], z[0], out=total)
        torch.mul(grad[1:], total, out=of_z[1:])


def _sine_grad(
    grad: Tensor,
    cosine: Tensor,
    slopes: Tensor,
    sine: Tensor,
    out: Tensor,
    total: Tensor,
) -> None:
    """out, which may be grad, by z, from grad by the jet of its sine (see `_Siren`).

    Cosine and sine are of z's values ``[M, C]``, slopes of z ``[R - 1, M, C]``; total
    ``[M, C]`` is overwritten.
    """
    if len(grad) > 1:
        _dot(grad[1:], slopes, out=total)
    torch.mul(grad, cosine, out=out)
    if len(grad) > 1:
        out[0].addcmul_(total, sine, value=-1)


def _dot(first: Tensor, second: Tensor, out: Tensor) -> Tensor:
    """The sum over rows of their products: ``[M, C]`` of two ``[R, M, C]``."""
    total = torch.mul(first[0], second[0], out=out)
    for a, b in zip(first[1:], second[1:], strict=True):
        total.addcmul_(a, b)
    return total
