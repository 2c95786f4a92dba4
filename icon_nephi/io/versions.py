"""The versions of what a result was made with."""

from __future__ import annotations

import sys
from importlib import metadata

from icon_nephi.core import which

#: What a registration depends on.
PACKAGES = ("icon_nephi", "icon_registration", "torch", "itk", "numpy")


def version(name: str) -> str | None:
    """Return the version of an installed or imported package, None without one."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return getattr(sys.modules.get(name), "__version__", None)


def versions() -> dict[str, str | None]:
    """Return the version of each of `PACKAGES`, and which core ran: `core.which`."""
    return {name: version(name) for name in PACKAGES} | {"core": which()}
