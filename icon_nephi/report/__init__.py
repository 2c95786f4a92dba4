"""How good a registration is: numbers, the error to expect, pictures, the page."""

from icon_nephi.report.page import write_report

__all__ = ["write_report"]
