"""What a .nephi file holds: one pair, a series, or a template."""

from __future__ import annotations

import os

from icon_nephi.io.nephi import load_fit, read_contents
from icon_nephi.io.nephi_group import GROUP, load_group
from icon_nephi.registration.result import Registration
from icon_nephi.registration.series import Series
from icon_nephi.registration.template import Template


def load(path: str | os.PathLike[str]) -> Registration | Series:
    """Return the `Registration`, `Series` or `Template` that was saved, on the CPU.

    Raises:
        ValueError: not such a file, truncated, damaged, or of a newer version.
    """
    if read_contents(path, GROUP).header.get("format") != GROUP:
        fit, geometry_A, geometry_B, itk = load_fit(path)
        return Registration(fit, geometry_A, geometry_B, itk=itk)
    group, told = load_group(path)
    kind = Template if told.kind == "template" else Series
    return kind(group, told)
