"""Neural deformation fields (NePhi, arXiv 2309.07322) for icon_registration."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icon_nephi import itk_wrapper as itk_wrapper
    from icon_nephi.certificate import certify
    from icon_nephi.codes import LatentCode, LatentCodeTable
    from icon_nephi.encoders import HybridEncoder
    from icon_nephi.fields import LatentMLP, ModulatedSiren
    from icon_nephi.losses import GradientICONPoints, gradient_inverse_consistency
    from icon_nephi.models import make_network
    from icon_nephi.registration import Registration, ensemble, load, register
    from icon_nephi.sampling import Patches, Points
    from icon_nephi.swap import add_neural_residual, swap_fields
    from icon_nephi.transforms import (
        FirstTransform,
        FunctionFromNeuralField,
        NePhi,
        TwoStepPair,
    )

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
    "FirstTransform": "transforms",
    "FunctionFromNeuralField": "transforms",
    "GradientICONPoints": "losses",
    "HybridEncoder": "encoders",
    "LatentCode": "codes",
    "LatentCodeTable": "codes",
    "LatentMLP": "fields",
    "ModulatedSiren": "fields",
    "NePhi": "transforms",
    "Patches": "sampling",
    "Points": "sampling",
    "Registration": "registration",
    "TwoStepPair": "transforms",
    "add_neural_residual": "swap",
    "certify": "certificate",
    "ensemble": "registration",
    "gradient_inverse_consistency": "losses",
    "load": "registration",
    "make_network": "models",
    "register": "registration",
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
