"""Images larger than memory, read in parts."""

from icon_nephi.io.volumes import Volume as Volume
from icon_nephi.io.volumes import open_volume as open_volume
