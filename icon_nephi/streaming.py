"""Results larger than memory, written block by block."""

from icon_nephi.registration.streaming import displacement_to as displacement_to
from icon_nephi.registration.streaming import jacobian_to as jacobian_to
from icon_nephi.registration.streaming import warp_to as warp_to
