"""How good a registration is: numbers, the error to expect, pictures, the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icon_nephi.report.page import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    """`write_report`, imported when it is asked for: the numbers need no page."""
    if name != "write_report":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from icon_nephi.report.page import write_report

    return write_report
