"""A neural residual on a voxel field, beside registration from scratch.

    python -m evaluation.accuracy.residual_on_voxel --data DIR [--case NAME] [--random]

First a coarse voxel field is optimised for the pair (a sixteenth of the grid a side);
then `add_neural_residual` puts a neural field behind it and
`icon_nephi.itk_wrapper.register_pair_with_mask` fine-tunes that. With ``--random`` the
voxel field is random instead, 50 steps are taken, and scratch is left out.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import icon_registration as icon
import numpy as np
import torch
from torch import Tensor, nn

from evaluation import Case, image_from, register
from evaluation.accuracy.pairs import find_cases
from icon_nephi.report.metrics import landmark_summary

HALVINGS = 4  # of the grid to that of the voxel field
COARSE = (10.0, 6.0)  # strides of the blocks of the voxel stage, in voxels
FINE = (5.0, 2.5, 1.5)  # and of the neural stage


class VoxelPair(icon.RegistrationModule):
    """(phi_AB, phi_BA) of two learned displacement fields on the network's grid."""

    def __init__(self, shape: tuple[int, ...], spread: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fields = nn.ParameterList(
            spread * torch.randn(1, len(shape), *shape) for _ in "AB"
        )

    def forward(self, image_A: Tensor, image_B: Tensor) -> tuple[Any, Any]:
        """The maps, whatever the images."""

        def transform(field: Tensor) -> Any:
            displacement = self.as_function(field)
            return lambda coordinates: coordinates + displacement(coordinates)

        return transform(self.fields[0]), transform(self.fields[1])


def coarse_voxels(pair: Case, shape: tuple[int, ...], spread: float) -> nn.Module:
    """Return HALVINGS of the grid around two voxel fields."""
    net: nn.Module = VoxelPair(tuple(-(-n // 2**HALVINGS) for n in shape), spread)
    for _ in range(HALVINGS):
        net = icon.DownsampleRegistration(net, len(shape))
    net.assign_identity_map([1, 1, *shape])
    return net


def optimise(net: nn.Module, images: list[Tensor], masks: list[Tensor | None]) -> None:
    """Optimise the voxel fields with the same loss that the neural ones get."""
    from icon_nephi import GradientICONPoints, Patches
    from icon_nephi.fit.optimize import Stage, optimize
    from icon_nephi.losses.similarities import PatchNCC

    loss = GradientICONPoints(
        net, PatchNCC(1e-3), 1.0, generator=torch.Generator().manual_seed(0)
    )
    loss.assign_identity_map([1, 1, *images[0].shape[2:]])
    stages = [Stage(150, Patches(600, 3, s, corners=True)) for s in COARSE]
    parameters = [{"params": list(net.parameters()), "lr": 3e-3}]
    where = {"mask_A": masks[0], "mask_B": masks[1]}
    optimize(loss, *images, stages, parameters, **where).complete()


def errors(pair: Case, transforms: Any) -> str:
    """Return mean TRE fixed to moving / moving to fixed."""
    points = [pair.fixed_points, pair.moving_points]
    means = []
    for transform in transforms:
        moved = np.array([transform.TransformPoint(p.tolist()) for p in points[0]])
        means.append(f"{landmark_summary(moved, points[1])['mean']:.2f}")
        points.reverse()
    return " / ".join(means) + " mm"


def folds(transform: Any) -> float:
    """Return the percentage of voxels of the exported field that are folded."""
    import itk

    from icon_nephi.report.metrics import flips_percentage

    middle = itk.down_cast(transform.GetNthTransform(1))
    field = itk.array_from_image(middle.GetDisplacementField())
    index = np.stack(np.indices(field.shape[:-1]), -1) + field[..., ::-1]
    return flips_percentage(torch.from_numpy(np.moveaxis(index, -1, 0)[None].copy()))


def main(data: Path, case: str, random: bool, threads: int) -> None:
    """Print the errors of each way."""
    import icon_nephi
    from icon_nephi.fit.optimize import Stage
    from icon_nephi.fit.settings import SIREN, make_pair
    from icon_nephi.io.image_input import read_input
    from icon_nephi.itk_wrapper import register_pair_with_mask
    from icon_nephi.losses.regularity import guarded_term
    from icon_nephi.space.intensities import prepare

    torch.set_num_threads(threads)
    pair = find_cases(data, [case])[case]()
    print(f"{case}, before: {landmark_summary(pair.fixed_points, pair.moving_points)}")
    scans, tensors, masks = [], [], []
    for letter, scan, mask in (
        ("A", pair.moving, pair.moving_mask),
        ("B", pair.fixed, pair.fixed_mask),
    ):
        values, inside, _ = read_input(letter, scan, mask)
        tensors.append(prepare(values, pair.modality))
        scans.append(image_from(tensors[-1][0, 0].numpy(), scan))
        masks.append(inside)
    shape = tuple(tensors[1].shape[2:])
    start = time.process_time()
    net = coarse_voxels(pair, shape, 0.002 if random else 0.0)
    if not random:
        optimise(net, tensors, masks)
    box = [n - 1.0 for n in shape]
    residual = make_pair(SIREN, box, torch.Generator().manual_seed(0))
    # As registration from scratch: shifts both ways agree, near folds cost.
    model = icon_nephi.add_neural_residual(net, residual=residual).changed(
        regularity=guarded_term, extent=torch.tensor(box)
    )
    both = pair.moving_mask, pair.fixed_mask
    coarse = register_pair_with_mask(model, *scans, *both)
    lap = time.process_time()
    print(f"voxel field: {errors(pair, coarse)}, {lap - start:.0f} CPU s")
    steps = (50,) if random else (100, 100, 100)
    *fine, loss = register_pair_with_mask(
        model,
        *scans,
        *both,
        return_artifacts=True,
        learning_rate=SIREN.field_rate,
        progress=False,
        stages=None
        if random
        else [
            Stage(n, icon_nephi.Patches(600, 3, s, corners=True))
            for n, s in zip(steps, FINE, strict=True)
        ],
        finetune_steps=sum(steps),
    )
    print(
        f"with neural residual: {errors(pair, fine)}, "
        f"folds {folds(fine[0]):.4f} %, "
        f"{time.process_time() - lap:.0f} CPU s, {loss}"
    )
    if random:
        return
    lap = time.process_time()
    scratch = register(pair)
    seconds = time.process_time() - lap
    print(
        f"from scratch: {errors(pair, (scratch.phi_AB, scratch.phi_BA))}, "
        f"{seconds:.0f} CPU s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of cases")
    parser.add_argument("--case", default="lung3d_semireal/deep")
    parser.add_argument("--random", action="store_true", help="a random voxel field")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    main(given.data, given.case, given.random, given.threads)
