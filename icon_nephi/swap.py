"""Neural fields into ICON's networks: after them (a residual) or in place of steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from icon_registration import FunctionFromVectorField, RegistrationModule
from torch import Tensor, nn

from icon_nephi.fields import LatentMLP
from icon_nephi.fields.encoders import HybridEncoder
from icon_nephi.fit.refine import SAMPLER
from icon_nephi.fit.settings import SIREN, make_pair
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.maps.networks import FunctionFromNeuralField, TwoStepPair
from icon_nephi.maps.transforms import Map

_log = logging.getLogger(__name__)


class BothDirections(RegistrationModule):
    """(phi_AB, phi_BA) of a network that returns one map, or a pair already.

    Args:
        net: any registration network; called a second time with the images swapped
            when it returns one map.
        freeze: run it without gradient, always in ``eval()``; its weights stay.
    """

    def __init__(self, net: nn.Module, freeze: bool = False) -> None:
        super().__init__()
        self.net, self.freeze = net, freeze
        if freeze:
            net.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> BothDirections:
        """Set the mode of what is not frozen (batch normalisation would go on)."""
        super().train(mode)
        if self.freeze:
            self.net.eval()
        return self

    def forward(self, image_A: Tensor, image_B: Tensor) -> tuple[Map, Map]:
        """Return (phi_AB, phi_BA), ICON frame."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            maps = self.net(image_A, image_B)
            if not isinstance(maps, tuple):
                maps = maps, self.net(image_B, image_A)
        return maps[0], maps[1]


def add_neural_residual(
    net: nn.Module,
    *,
    residual: nn.Module | None = None,
    freeze: bool = True,
    similarity: Callable[..., Tensor] | None = None,
    lmbda: float = 1.0,
    prior_lmbda: float = 0.01,
    similarity_sampler: Any = None,
    regularity_sampler: Any = None,
    seed: int = 0,
) -> GradientICONPoints:
    """Return a loss of ``net`` followed by a neural pair at full resolution.

    phi_AB = pre_AB o psi_AB and phi_BA = psi_BA o pre_BA, where ``net`` makes pre and
    the residual, which is handed A warped by pre_AB, makes psi. Until it is trained
    the result is the map of ``net``. The weights of ``net`` are found under
    ``regis_net.netPhi.net``.

    Args:
        net: an ICON registration network, or an ICON loss around one, whose identity
            map is assigned. It becomes part of the result.
        residual: returns (psi_AB, psi_BA); default: a code for one pair, optimised by
            `icon_nephi.itk_wrapper.register_pair`.
        freeze: do not train ``net``: no gradient, no activations kept.
        similarity: default `PatchNCC`.
        lmbda: weight of the gradient inverse consistency.
        prior_lmbda: weight of the codes' prior.
        similarity_sampler: default 600 `Patches`, 3 a side, 2 voxels apart.
        regularity_sampler: default 500 `Points`.
        seed: of the residual's initial code and the sample positions.

    Raises:
        ValueError: a network without identity map.
    """
    inner = getattr(net, "regis_net", net)
    shape = _input_shape("net", inner)
    generator = torch.Generator().manual_seed(seed)
    if residual is None:
        residual = make_pair(SIREN, [n - 1.0 for n in shape[2:]], generator)
    model = GradientICONPoints(
        TwoStepPair(BothDirections(inner, freeze), residual),
        similarity or PatchNCC(1e-3),
        lmbda,
        prior_lmbda=prior_lmbda,
        similarity_sampler=similarity_sampler or SAMPLER,
        regularity_sampler=regularity_sampler,
        generator=generator,
    )
    model.assign_identity_map(shape)
    model.to(inner.identity_map.device)
    return model


def swap_fields(
    net: nn.Module,
    which: str | Sequence[str] = "last",
    make: Callable[[list[int]], nn.Module] | None = None,
    *,
    share: bool = False,
) -> Any:
    """Return the network with neural steps for its ``FunctionFromVectorField`` steps.

    It is changed in place; all its other weights keep their keys. The names of the
    steps that were replaced are logged and in ``net.swapped_fields``.

    Args:
        net: an ICON network or loss whose identity map is assigned.
        which: ``"last"`` (the finest, applied last), ``"all"``, or names as in
            ``net.named_modules()``.
        make: the step for an input shape ``[1, C, *grid]``; default: a
            `FunctionFromNeuralField` with its own encoder.
        share: one field for all steps (their encoders differ); only without ``make``.

    Raises:
        ValueError: nothing to replace, a name that is no such step, a network without
            identity map, or ``share`` with ``make``.
    """
    if share and make is not None:
        raise ValueError("share is for the default make; share the field in your own")
    everything = dict(net.named_modules(remove_duplicate=False))
    steps = {k: m for k, m in everything.items() if type(m) is FunctionFromVectorField}
    names = _choose(which, steps, everything, type(net).__name__)
    made: dict[int, nn.Module] = {}
    field: nn.Module | None = None
    for name in names:
        step = steps[name]
        if id(step) not in made:
            shape = _input_shape(name or "net", step)
            if make is None:
                encoder = HybridEncoder(shape)
                if field is None or not share:
                    field = LatentMLP(len(shape) - 2)  # both have 64 code values
                new: nn.Module = FunctionFromNeuralField(encoder, field)
            else:
                new = make(shape)
            if isinstance(new, RegistrationModule):
                new.assign_identity_map(shape)
            made[id(step)] = new.to(step.identity_map.device).train(step.training)
        parent, _, attribute = name.rpartition(".")
        if name:
            setattr(net.get_submodule(parent), attribute, made[id(step)])
        else:
            net = made[id(step)]
    _log.info("replaced %s", ", ".join(names) or "the network itself")
    result: Any = net
    result.swapped_fields = tuple(names)
    return result


def _choose(
    which: str | Sequence[str],
    steps: dict[str, nn.Module],
    everything: dict[str, nn.Module],
    kind: str,
) -> list[str]:
    """Return the names asked for, all of them steps."""
    if not steps:
        raise ValueError(
            f"net is {kind} and holds no FunctionFromVectorField, the only step that "
            "can be swapped; use add_neural_residual to put a neural field after it"
        )
    if isinstance(which, str):
        if which in ("last", "all"):
            return list(steps) if which == "all" else list(steps)[-1:]
        which = [which]
    for name in which:
        if name not in steps:
            module = everything.get(name)
            what = "no module" if module is None else f"a {type(module).__name__}"
            raise ValueError(
                f"which: {name!r} is {what} of net, expected 'last', 'all' or some of "
                f"{list(steps)}"
            )
    return list(which)


def _input_shape(name: str, net: Any) -> list[int]:
    """Return [1, C, *grid] of a module that ICON's assign_identity_map has reached."""
    if not hasattr(net, "identity_map"):
        raise ValueError(
            f"{name} ({type(net).__name__}) has no identity map; call "
            "assign_identity_map(input_shape) on the network first, and keep its parts "
            "direct children of ICON's modules"
        )
    return [int(n) for n in net.input_shape]
