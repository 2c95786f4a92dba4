"""Packaging of icon_nephi. Tools are configured in pyproject.toml."""

import os
import platform
import re
import sys
from pathlib import Path

from setuptools import Extension, setup

# The version is read as text, so that building does not import torch.
INIT = Path(__file__).parent / "icon_nephi" / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+)"$', INIT.read_text("utf-8"), re.MULTILINE)[1]
# Written out: training, evaluation and tests are never installed.
WINGS = [
    *("space", "fields", "maps", "losses", "fit", "io"),
    *("report", "registration", "proofs", "commands", "core"),
]

PURE = bool(os.environ.get("NEPHI_PURE"))


def core(build: str, *flags: str) -> Extension:
    """One build of the compiled core; without a compiler the package does without it.

    No -march=native and no -ffast-math: what is built here may run elsewhere, and the
    range reduction of the sine needs the order of its terms.
    """
    source = Path("icon_nephi/core/source")
    return Extension(
        f"icon_nephi.core._{build}",
        [f"{source}/{build}.cpp"],
        depends=[str(p) for p in source.glob("*.[ch]pp")],
        extra_compile_args=[
            *("-std=c++17", "-O3", "-fvisibility=hidden", "-pthread"),
            *("-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
            *flags,
        ],
        extra_link_args=["-pthread", *os.environ.get("NEPHI_LINK", "").split()],
        py_limited_api=True,  # it knows nothing of Python: any version loads it
        optional=True,
    )


def cores() -> list[Extension]:
    """Those of this platform; which one runs is chosen when it is loaded.

    With NEPHI_PURE set there are none: a wheel for every platform.
    """
    if PURE:
        return []
    found = [core("baseline")]
    if platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32:
        wide = "-mavx2", "-mfma"
        found.append(core("avx2", *wide))
        wider = [f"-mavx512{part}" for part in ("f", "dq", "bw", "vl")]
        found.append(core("avx512", *wide, *wider, "-mprefer-vector-width=512"))
    return found


setup(
    name="icon_nephi",
    version=VERSION,
    description="NePhi neural deformation fields for icon_registration",
    license="Apache-2.0",
    packages=["icon_nephi", *(f"icon_nephi.{wing}" for wing in WINGS)],
    package_data={"icon_nephi": ["py.typed", "report/page.html", "weights/*"]},
    ext_modules=cores(),
    options={} if PURE else {"bdist_wheel": {"py_limited_api": "cp310"}},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "icon_registration>=1.1.9",
        "itk>=5.4",
        "numpy",
        "scipy",
        "safetensors",
        "tqdm",
        "jinja2",
        "pooch",
    ],
    extras_require={
        "peers": ["antspyx", "itk-elastix", "convexAdam", "picsl-greedy"],
        "meshes": ["nibabel"],
        "zarr": ["zarr>=3"],
        "dev": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "playwright"),
            *("nibabel", "zarr", "SimpleITK", "matplotlib"),
            *("sphinx", "myst-parser", "furo"),
        ],
    },
    entry_points={
        "console_scripts": [
            "nephi-register = icon_nephi.cli:register",
            "nephi-series = icon_nephi.cli:series",
            "nephi-template = icon_nephi.cli:template",
            "nephi-warp = icon_nephi.cli:warp",
            "nephi-jacobian = icon_nephi.cli:jacobian",
            "nephi-info = icon_nephi.cli:info",
            "nephi-compare = icon_nephi.cli:compare",
        ]
    },
)
