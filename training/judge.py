"""How good a network is on pairs that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icon_nephi.maps.jacobians import determinants, fold_fraction
from icon_nephi.report.metrics import dice, target_registration_error
from icon_nephi.space.frames import identity_map, points_as_grid
from icon_nephi.space.images import sample_image
from icon_nephi.transforms import value_and_jacobian

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Held:
    """A pair that was held out, and what is known of it.

    Attributes:
        image_A: moving ``[1, C, *grid]``.
        image_B: fixed ``[1, C, *grid]``.
        labels_A: integers ``[1, 1, *grid]``, for Dice.
        labels_B: the same of the fixed image.
        points_A: ``[N, d]`` in the unit box, for the registration error.
        points_B: the same places in the fixed image.
        spacing: millimetres between voxels along each tensor axis.
    """

    image_A: Tensor
    image_B: Tensor
    labels_A: Tensor | None = None
    labels_B: Tensor | None = None
    points_A: Tensor | None = None
    points_B: Tensor | None = None
    spacing: Sequence[float] | None = None


def judge(network: nn.Module, pairs: Iterable[Held]) -> dict[str, float]:
    """Return means over the pairs: Dice or millimetres, folds, inverse consistency.

    ``folds``: the share of voxel centres, in both maps, where the analytic determinant
    is not positive; ``folded_pairs``: of pairs that have one. ``inverse_consistency``:
    |phi_AB(phi_BA(x)) - x| in voxels. ``dice``: mean over labels; ``dice_min``: the
    worst pair. ``tre``: mean over landmarks.
    """
    device = next(network.parameters()).device
    figures: list[dict[str, float]] = []
    for pair in pairs:
        image_A, image_B = pair.image_A.to(device), pair.image_B.to(device)
        with torch.no_grad():
            maps = network.regis_net(image_A, image_B)
            if not isinstance(maps, tuple):
                maps = maps, network.regis_net(image_B, image_A)
            figures.append(_judge_pair(pair, *maps, device))
    means = {
        n: sum(row[n] for row in figures) / len(figures) for n in (figures or [{}])[0]
    }
    if "dice" in means:
        means["dice_min"] = min(row["dice"] for row in figures)
    return means


def _judge_pair(
    pair: Held, phi_AB: Map, phi_BA: Map, device: torch.device
) -> dict[str, float]:
    shape = pair.image_B.shape[2:]
    x = identity_map(shape, device=device)
    forward, slopes_AB = value_and_jacobian(phi_AB, x)
    backward, slopes_BA = value_and_jacobian(phi_BA, x)
    folds = fold_fraction(determinants(torch.cat([slopes_AB, slopes_BA])))
    voxels = torch.tensor([n - 1.0 for n in shape], device=device)
    error = (phi_AB(backward) - x).flatten(2)[0] * voxels[:, None]
    result = {
        "folds": folds,
        "folded_pairs": float(folds > 0),
        "inverse_consistency": error.norm(dim=0).mean().item(),
    }
    if pair.labels_A is not None and pair.labels_B is not None:
        labels = pair.labels_A.to(device, torch.float32)
        warped = sample_image(labels, forward, "nearest").round().long().cpu()
        overlaps = dice(warped, pair.labels_B.long()).values()
        result["dice"] = sum(overlaps) / max(1, len(overlaps))
    if pair.points_A is not None and pair.points_B is not None:
        spacing = torch.tensor(list(pair.spacing or [1.0] * len(shape)))
        mm = spacing * voxels.cpu()
        at = points_as_grid(pair.points_B[None].to(device))
        moved = phi_AB(at).flatten(2)[0].T.cpu()
        errors = target_registration_error(moved * mm, pair.points_A * mm)
        result["tre"] = float(errors.mean())
    return result
