"""What is compared at each step of a fit by samples, and where these lie."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from icon_nephi.fit.affine import voxel_stride
from icon_nephi.fit.optimize import Stage
from icon_nephi.fit.settings import Settings
from icon_nephi.losses.features import FeatureDifference, FeaturesAlone
from icon_nephi.losses.similarities import Comparison
from icon_nephi.space.frames import Geometry
from icon_nephi.space.sampling import Patches, Points

# Where single points are compared: how many for each block there would be, and the
# blur of the images, in strides that the samples of a block would have.
POINTS, BLUR = 8, 0.5


def compared(
    choice: Comparison, settings: Settings, channels: int, step: int
) -> Callable[..., Tensor]:
    """What is compared after so many steps: features fade, or are all there is.

    Of images with so many channels of intensities.
    """
    if choice.features == "only":
        return FeaturesAlone(choice.similarity, channels)
    if not settings.features:
        return choice.similarity
    faded = (1 - settings.kept) * step / settings.steps
    weight = settings.features * (1 - faded)
    return FeatureDifference(choice.similarity, channels, weight)


def stages_of(
    choice: Comparison, settings: Settings, place: Geometry, unit: float
) -> list[Stage]:
    """Blocks, or single points of smoothed images, coarse to fine.

    Strides are counted in units of that many millimetres, in the fixed image's place.
    """
    stages = []
    for stride, share, exact in zip(
        settings.strides, settings.shares, settings.exact, strict=True
    ):
        steps, apart = round(settings.steps * share), stride * unit
        if choice.points:
            points = Points(POINTS * settings.patches)
            stages.append(Stage(steps, points, blur=BLUR * apart))
            continue
        blocks = settings.patches, settings.size, voxel_stride(apart, place), not exact
        stages.append(Stage(steps, Patches(*blocks)))
    return stages
