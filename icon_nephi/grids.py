"""A registration as grids of torch's grid_sample and of MONAI's Warp."""

from icon_nephi.registration.grids import monai_ddf as monai_ddf
from icon_nephi.registration.grids import sampling_grid as sampling_grid
