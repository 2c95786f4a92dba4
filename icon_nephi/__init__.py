"""Neural deformation fields (NePhi, arXiv 2309.07322) for icon_registration."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icon_nephi import itk_wrapper as itk_wrapper
    from icon_nephi.fields import LatentMLP as LatentMLP
    from icon_nephi.fields import ModulatedSiren as ModulatedSiren
    from icon_nephi.fields.codes import LatentCode as LatentCode
    from icon_nephi.fields.codes import LatentCodeTable as LatentCodeTable
    from icon_nephi.fields.encoders import HybridEncoder as HybridEncoder
    from icon_nephi.losses.gradient_icon import GradientICONPoints as GradientICONPoints
    from icon_nephi.losses.gradient_icon import (
        gradient_inverse_consistency as gradient_inverse_consistency,
    )
    from icon_nephi.maps.networks import FirstTransform as FirstTransform
    from icon_nephi.maps.networks import (
        FunctionFromNeuralField as FunctionFromNeuralField,
    )
    from icon_nephi.maps.networks import NePhi as NePhi
    from icon_nephi.maps.networks import TwoStepPair as TwoStepPair
    from icon_nephi.models import make_network as make_network
    from icon_nephi.proofs.certificate import certify as certify
    from icon_nephi.registration.group import build_template as build_template
    from icon_nephi.registration.group import register_series as register_series
    from icon_nephi.registration.predict import predict as predict
    from icon_nephi.registration.register import ensemble as ensemble
    from icon_nephi.registration.register import register as register
    from icon_nephi.registration.result import Registration as Registration
    from icon_nephi.registration.saved import load as load
    from icon_nephi.registration.series import Series as Series
    from icon_nephi.registration.template import Template as Template
    from icon_nephi.space.sampling import Patches as Patches
    from icon_nephi.space.sampling import Points as Points
    from icon_nephi.swap import add_neural_residual as add_neural_residual
    from icon_nephi.swap import swap_fields as swap_fields

__version__ = "0.1.0"

_ROOMS = {
    "fields": "LatentMLP ModulatedSiren",
    "fields.codes": "LatentCode LatentCodeTable",
    "fields.encoders": "HybridEncoder",
    "losses.gradient_icon": "GradientICONPoints gradient_inverse_consistency",
    "maps.networks": "FirstTransform FunctionFromNeuralField NePhi TwoStepPair",
    "models": "make_network",
    "proofs.certificate": "certify",
    "registration.group": "build_template register_series",
    "registration.predict": "predict",
    "registration.register": "ensemble register",
    "registration.result": "Registration",
    "registration.saved": "load",
    "registration.series": "Series",
    "registration.template": "Template",
    "space.sampling": "Patches Points",
    "swap": "add_neural_residual swap_fields",
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = sorted(_HOMES)


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
