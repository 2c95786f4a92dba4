"""The template of a group: its mean image and fused labels; new images on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from icon_nephi.fit.mean_image import mean_image
from icon_nephi.maps.transforms import Composition
from icon_nephi.registration.register import register
from icon_nephi.registration.result import Registration
from icon_nephi.registration.series import Series
from icon_nephi.space.frames import Array
from icon_nephi.space.intensities import PreparedImage


class Template(Series):
    """A `Series` of images without an order, and what their mean is.

    The template is the reference: `from_mean` has its maps to each image, `map` those
    between two of them.

    Attributes:
        sources: read the images as they were fitted; None of a loaded one.
    """

    sources: Sequence[Callable[[], PreparedImage]] | None = None

    @cached_property
    def template(self) -> Any:
        """The mean image: robust, intensities scaled to about [0, 1]; of CT HU.

        An ITK image, or a tensor ``[1, C, *grid]``.

        Raises:
            ValueError: a loaded template, which has no images: read the file that was
                written of it.
        """
        if self.sources is None:
            raise ValueError("a loaded template has no images; read its image file")
        into, place = self._centre.into, self.place
        once = self._once
        maps = [Composition(self._psi(k), into) for k in once]
        sources = [self.sources[k] for k in once]
        with torch.no_grad():
            values = mean_image(place.size, sources, maps, self.fit.matrices[once])
        if self.made_with.get("modality") == "ct":
            values = 1000 * values - 1000
        if not self.told.itk:
            return values
        from icon_nephi.io.itk_images import image_of

        return image_of(values[0, 0].cpu().numpy(), place)

    def fuse(self, labels: Iterable[Any]) -> Any:
        """Return one label map on the template: what most images have at each voxel.

        Args:
            labels: a label map of each image, in their order.

        Raises:
            ValueError: not one of each.
        """
        maps = list(labels)
        if len(maps) != len(self):
            raise ValueError(f"labels are {len(maps)} and images {len(self)}")
        stacked: list[Array] = []
        for k, own in enumerate(maps):
            warped = self.from_mean(k).warp_labels(own, self._grid)
            if not isinstance(warped, torch.Tensor):
                from icon_nephi.io.itk_images import array_of

                warped = torch.from_numpy(array_of(warped).astype(np.int32))
            stacked.append(warped.numpy())
        most = torch.mode(torch.from_numpy(np.stack(stacked)), 0).values
        if not self.told.itk:
            return most
        from icon_nephi.io.itk_images import image_of

        return image_of(most.numpy().astype(np.int32), self.place)

    def register(self, image: Any, **choices: Any) -> Registration:
        """Return the `Registration` of the template (fixed) and a new image (moving).

        The template stays as it is. Choices are those of `icon_nephi.register`.
        """
        return register(image, self.template, **choices)
