"""Packaging of icon_nephi. Tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

# The version is read as text, so that building does not import torch.
INIT = Path(__file__).parent / "icon_nephi" / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+)"$', INIT.read_text("utf-8"), re.MULTILINE)[1]

setup(
    name="icon_nephi",
    version=VERSION,
    description="NePhi neural deformation fields for icon_registration",
    license="Apache-2.0",
    packages=[
        "icon_nephi",
        "icon_nephi.fields",
    ],  # written out: training and tests are never installed
    package_data={"icon_nephi": ["py.typed", "report.html"]},
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
        "peers": ["antspyx", "itk-elastix", "convexAdam"],
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
            "nephi-warp = icon_nephi.cli:warp",
            "nephi-jacobian = icon_nephi.cli:jacobian",
            "nephi-info = icon_nephi.cli:info",
            "nephi-compare = icon_nephi.cli:compare",
        ]
    },
)
