"""Hippocampus MRI (Medical Segmentation Decathlon, Task 4): people to unseen people.

The folder has ``images/NAME.nii.gz`` (or ``imagesTr``) and ``labels/NAME.nii.gz``
(or ``labelsTr``), about 35 x 50 x 35 voxels of 1 mm. The people sorted last are held
out; all ordered pairs of the others are trained on, each image under a small random
affine map, because few people are soon learned by heart (``--augment 0``: without).

    python -m training.train_hippocampus --data DIR --minutes 30 --clock cpu
"""

from pathlib import Path

import torch

from icon_nephi.space.intensities import prepare
from training import command, networks
from training.data import Images, all_ordered_pairs, box, in_memory, read
from training.judge import Held, judge

SHAPE = (48, 56, 40)  # holds all of them; header origins mean nothing


def people(folder):
    """Images ``[N, 1, *SHAPE]`` in [0, 1] and labels, people in order of names."""
    images, labels = [], []
    where = next(folder / n for n in ("images", "imagesTr") if (folder / n).is_dir())
    for path in sorted(where.glob("[!.]*.nii.gz")):
        mask = folder / where.name.replace("images", "labels") / path.name
        image = prepare(read(path)[0][None], "mri")[0]
        # The crop's edge is no anatomy: it must not be seen.
        images.append(box(image, SHAPE))
        labels.append(box(read(mask)[0], SHAPE, 0.0).round().to(torch.uint8))
    if len(images) < 3:
        raise ValueError(f"{where} has {len(images)} images, at least 3 are needed")
    return torch.stack(images), torch.stack(labels)


def main(argv=None):
    """Train; returns the losses of every step."""
    parser = command.parser(__doc__, batch=4, rate=2e-3, augment=0.05)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held", type=int, default=3, help="people held out")
    args = parser.parse_args(argv)

    images, labels = people(args.data)
    known = len(images) - args.held
    held = [
        Held(images[[i]], images[[j]], labels[[i]], labels[[j]])
        for i, j in (known + all_ordered_pairs(args.held)).tolist()
    ]
    return command.run(
        args,
        "hippocampus",
        lambda: networks.make(args, [1, 1, *SHAPE], "lncc"),
        Images(in_memory(images[:known]), known, all_ordered_pairs(known)),
        validate=lambda network: judge(network, held),
    )


if __name__ == "__main__":
    main()
