"""Find the compiled library, choose among its builds, and say which one runs."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

#: What forces a choice: "torch", the name of a build, or the path of a library.
VARIABLE = "NEPHI_CORE"
BUILDS = ("avx512", "avx2", "baseline")  # the quickest first
# Of the functions below; a library of another version is not used.
VERSION = 4

_I64, _F32, _F64 = ctypes.c_int64, ctypes.c_float, ctypes.c_double
_POINTER = ctypes.c_void_p


class Field(ctypes.Structure):
    """NephiField of source/model.hpp."""

    _fields_ = [
        ("bytes", _I64),
        ("kind", _I64),
        ("dimension", _I64),
        ("support", _I64),
        ("grids", _I64),
        ("nodes", _POINTER),
        ("stored", _POINTER),
        ("used", _POINTER),
        ("tables", _POINTER),
        ("shared", _I64),
        ("shared_code", _POINTER),
        ("width", _I64),
        ("layers", _I64),
        ("frequencies", _I64),
        ("frequency", _POINTER),
        ("first_omega", _F32),
        ("omega", _F32),
        ("weights", _POINTER),
    ]


class Image(ctypes.Structure):
    """NephiImage of source/blocks.cpp."""

    _fields_ = [
        ("intensities", _POINTER),
        ("features", _POINTER),
        ("counts", _POINTER),
        ("size", _I64 * 3),
    ]


class Blocks(ctypes.Structure):
    """NephiBlocks of source/blocks.cpp."""

    _fields_ = [
        ("bytes", _I64),
        ("dimension", _I64),
        ("count", _I64),
        ("samples", _I64),
        ("places", _I64),
        ("channels", _I64),
        ("features", _I64),
        ("stored", _I64),
        ("bits", _I64),
        ("form", _I64),
        ("centres", _POINTER),
        ("offsets", _POINTER),
        ("corners", _POINTER),
        ("shares", _POINTER),
        ("post", _POINTER),
        ("moving", Image),
        ("fixed", Image),
        ("floor", _F32),
        ("weight", _F32),
    ]


class Consistency(ctypes.Structure):
    """NephiConsistency of source/regularity.cpp."""

    _fields_ = [
        ("bytes", _I64),
        ("dimension", _I64),
        ("count", _I64),
        ("points", _POINTER),
        ("values", _POINTER),
        ("jacobian_1", _POINTER),
        ("jacobian_2", _POINTER),
        ("pre_1", _POINTER),
        ("post_1", _POINTER),
        ("pre_2", _POINTER),
        ("post_2", _POINTER),
        ("extent", _POINTER),
        ("consistency", _F32),
        ("hinge", _F32),
        ("goal", _F32),
        ("weight", _F32),
    ]


class Side(ctypes.Structure):
    """NephiSide of source/dense.cpp."""

    _fields_ = [
        ("moving", _POINTER),
        ("reachable", _POINTER),
        ("grid", _I64 * 3),
        ("to_moving", _F32 * 12),
        ("fixed", _POINTER),
        ("samples", _POINTER),
        ("centres", _POINTER),
    ]


class Dense(ctypes.Structure):
    """NephiDense of source/dense.cpp."""

    _fields_ = [
        ("bytes", _I64),
        ("dimension", _I64),
        ("channels", _I64),
        ("radius", _I64),
        ("squared", _I64),
        ("shared", _I64),
        ("order", _I64),
        ("size", _I64 * 3),
        ("between", _I64 * 3),
        ("nodes", _I64 * 3),
        ("code", _POINTER),
        ("scale", _F32 * 3),
        ("extent", _F32 * 3),
        ("sides", Side * 2),
        ("floor", _F32),
        ("lmbda", _F32),
        ("drift", _F32),
        ("hinge", _F32),
        ("goal", _F32),
        ("tension", _F32),
    ]


# i: int64, f: float, d: double, p: a pointer. All answer with a code.
_SIGNATURES = {
    "nephi_field_forward": "pipiipp",
    "nephi_field_backward": "pipiipppppp",
    "nephi_compare": "pppipp",
    "nephi_consistency": "ppppp",
    "nephi_dense_memory": "pp",
    "nephi_dense": "pippp",
    "nephi_determinants": "iipp",
    "nephi_adam": "iiddddipppppp",
    "nephi_rate": "iiiipppppip",
    "nephi_features": "iippip",
    "nephi_pack": "iiiipip",
}
_TYPES = {"i": _I64, "f": _F32, "d": _F64, "p": _POINTER}
_ANSWERS = {
    1: "no memory",
    2: "a size that cannot be",
    3: "a missing array",
    4: "not supported",
    5: "failed",
}


class CoreError(RuntimeError):
    """The compiled core refused a call, and nothing was computed."""


def check(answer: int, what: str) -> None:
    """Raise what an entry point's answer says, if it is not 0.

    Raises:
        MemoryError: there is no memory.
        CoreError: anything else.
    """
    if answer == 1:
        raise MemoryError(f"{what}: no memory left")
    if answer:
        raise CoreError(f"{what}: {_ANSWERS.get(answer, answer)}")


def library() -> ctypes.CDLL | None:
    """The library that runs, or None where everything is left to torch."""
    return _chosen(os.environ.get(VARIABLE, ""))


def call(name: str, *arguments: object) -> None:
    """Call a function of the library that runs.

    Raises:
        MemoryError: there is no memory.
        CoreError: it refused the call.
    """
    found = library()
    assert found is not None
    check(getattr(found, name)(*arguments), name)


def which() -> str:
    """Which core runs: "torch", the name of a build, or the path of a library."""
    found = library()
    if found is None:
        return "torch"
    name = Path(found._name).name
    known = [b for b in BUILDS if name.startswith(f"_{b}.")]
    return known[0] if known and _of_package(found._name) else str(found._name)


@cache
def _chosen(wanted: str) -> ctypes.CDLL | None:
    if wanted == "torch":
        return None
    if wanted in BUILDS:
        path = _built(wanted)
        if path is None:
            raise CoreError(
                f"{VARIABLE}={wanted}, but that build is not installed: install with a "
                f"C++ compiler at hand, or set {VARIABLE}=torch"
            )
        return _load(path)
    if wanted:
        return _load(Path(wanted))
    for build in BUILDS:
        path = _built(build)
        if path is not None and runs_here(build):
            try:
                return _load(path)
            except (OSError, CoreError):  # of another system or version
                continue
    return None


def _built(build: str) -> Path | None:
    found = sorted(Path(__file__).parent.glob(f"_{build}.*"))
    return next((p for p in found if p.suffix in (".so", ".dylib", ".pyd")), None)


def _of_package(name: str) -> bool:
    return Path(name).parent == Path(__file__).parent


def _load(path: Path) -> ctypes.CDLL:
    """A library with the types of its functions set.

    Raises:
        CoreError: it is not there, or of another version.
    """
    if not path.is_file():
        raise CoreError(
            f"{VARIABLE}={path}: no such library; give 'torch', one of {BUILDS}, or "
            "the path of a library"
        )
    loaded = ctypes.CDLL(str(path))
    version = getattr(loaded, "nephi_version", None)
    if version is None or version() != VERSION:
        raise CoreError(f"{path} is no core of version {VERSION}: install again")
    for name, types in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype = ctypes.c_int
        function.argtypes = [_TYPES[t] for t in types]
    return loaded


def runs_here(build: str) -> bool:
    """Whether a build that is installed runs on this processor, and well."""
    if build == "baseline":
        return True
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    baseline = _built("baseline")
    if baseline is None:
        return False
    asked = getattr(ctypes.CDLL(str(baseline)), f"nephi_has_{build}", None)
    return asked is not None and bool(asked())
