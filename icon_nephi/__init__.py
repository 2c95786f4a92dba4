"""Neural deformation fields (NePhi, arXiv 2309.07322) for icon_registration."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icon_nephi import itk_wrapper as itk_wrapper
    from icon_nephi.fields import LatentMLP, ModulatedSiren
    from icon_nephi.fields.codes import LatentCode, LatentCodeTable
    from icon_nephi.fields.encoders import HybridEncoder
    from icon_nephi.losses.gradient_icon import (
        GradientICONPoints,
        gradient_inverse_consistency,
    )
    from icon_nephi.maps.networks import (
        FirstTransform,
        FunctionFromNeuralField,
        NePhi,
        TwoStepPair,
    )
    from icon_nephi.models import make_network
    from icon_nephi.proofs.certificate import certify
    from icon_nephi.registration.register import ensemble, register
    from icon_nephi.registration.result import Registration, load
    from icon_nephi.space.sampling import Patches, Points
    from icon_nephi.swap import add_neural_residual, swap_fields

__version__ = "0.1.0"

__all__ = [
    "FirstTransform",
    "FunctionFromNeuralField",
    "GradientICONPoints",
    "HybridEncoder",
    "LatentCode",
    "LatentCodeTable",
    "LatentMLP",
    "ModulatedSiren",
    "NePhi",
    "Patches",
    "Points",
    "Registration",
    "TwoStepPair",
    "add_neural_residual",
    "certify",
    "ensemble",
    "gradient_inverse_consistency",
    "load",
    "make_network",
    "register",
    "swap_fields",
]

_HOMES = {
    "FirstTransform": "maps.networks",
    "FunctionFromNeuralField": "maps.networks",
    "GradientICONPoints": "losses.gradient_icon",
    "HybridEncoder": "fields.encoders",
    "LatentCode": "fields.codes",
    "LatentCodeTable": "fields.codes",
    "LatentMLP": "fields",
    "ModulatedSiren": "fields",
    "NePhi": "maps.networks",
    "Patches": "space.sampling",
    "Points": "space.sampling",
    "Registration": "registration.result",
    "TwoStepPair": "maps.networks",
    "add_neural_residual": "swap",
    "certify": "proofs.certificate",
    "ensemble": "registration.register",
    "gradient_inverse_consistency": "losses.gradient_icon",
    "load": "registration.result",
    "make_network": "models",
    "register": "registration.register",
    "swap_fields": "swap",
}


def __getattr__(name: str) -> Any:
    """A public name or a module, imported when it is first asked for.

    So a light module of the package can be used without torch.
    """
    home = f"icon_nephi.{_HOMES.get(name, name)}"
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        if error.name != home:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(module, name) if name in _HOMES else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "itk_wrapper", "pretrained_models"})
