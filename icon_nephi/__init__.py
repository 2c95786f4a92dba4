"""Neural deformation fields (NePhi, arXiv 2309.07322) for icon_registration."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from icon_nephi.codes import LatentCode, LatentCodeTable
from icon_nephi.encoders import HybridEncoder
from icon_nephi.fields import LatentMLP, ModulatedSiren
from icon_nephi.losses import GradientICONPoints, gradient_inverse_consistency
from icon_nephi.models import make_network
from icon_nephi.sampling import Patches, Points
from icon_nephi.swap import add_neural_residual, swap_fields
from icon_nephi.transforms import (
    FirstTransform,
    FunctionFromNeuralField,
    NePhi,
    TwoStepPair,
)

if TYPE_CHECKING:
    from icon_nephi import itk_wrapper as itk_wrapper
    from icon_nephi.certificate import certify
    from icon_nephi.registration import Registration, ensemble, load, register

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

_LAZY = {
    "Registration": "registration",
    "certify": "certificate",
    "ensemble": "registration",
    "load": "registration",
    "register": "registration",
}
_ROOMS = ("itk_wrapper", "pretrained_models")


def __getattr__(name: str) -> Any:
    """What is not needed to build networks is imported when it is first asked for."""
    if name in _LAZY:
        return getattr(importlib.import_module(f"icon_nephi.{_LAZY[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"icon_nephi.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_ROOMS})
