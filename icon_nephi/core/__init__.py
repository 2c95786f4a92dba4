"""The compiled core: what a step of a registration spends its time on, in C++.

Everything here has a reference in torch that gives the same numbers; whether a piece of
work goes here or there is decided in one place, `loading.library`. See docs/core.md.
"""

from icon_nephi.core.loading import which as which
