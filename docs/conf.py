"""Sphinx: `make docs` writes docs/_build/index.html, warnings are errors."""

import re
from pathlib import Path

INIT = Path(__file__).parents[1] / "icon_nephi" / "__init__.py"

project = "icon_nephi"
author = "the icon_nephi developers"
release = re.search(r'^__version__ = "(.+)"$', INIT.read_text("utf-8"), re.M)[1]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_typehints = "none"  # signatures show them
autodoc_member_order = "bysource"
default_role = "code"
napoleon_use_rtype = False
myst_heading_anchors = 3
# Links from pages to files of the repository, which have no page of their own.
suppress_warnings = ["myst.xref_missing"]
