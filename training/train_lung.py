"""Lungs breathed in and out (COPDGene): 2 mm, 175^3, HU [-1000, 0], inside the lungs.

The folder has one folder for each patient with ``inspiration.nii.gz``,
``expiration.nii.gz`` and the lungs as ``inspiration_mask.nii.gz``,
``expiration_mask.nii.gz``; patients with ``inspiration.csv`` and ``expiration.csv``
(rows x,y,z in LPS mm, same order) are held out, else the last ones. Images as the
networks see them are kept in ``--cache``.

    python -m training.train_lung --data DIR --cache DIR --steps 100000
"""

from pathlib import Path

import torch

from icon_nephi.space.frames import Geometry, apply_affine
from training import command, networks
from training.data import Images, both_ways, box, kept, middle, read, resample
from training.judge import Held, judge

SIDE, MM = 175, 2.0
PHASES = "inspiration", "expiration"


def lungs(folder, phase, side):
    """Image in [0, 1], zero outside the lungs, and the lungs; ``[1, side^3]`` each."""
    image, geometry = read(folder / f"{phase}.nii.gz")
    mask, _ = read(folder / f"{phase}_mask.nii.gz")
    spacing = tuple(reversed(geometry.spacing))
    mm = MM * SIDE / side
    mask = box(resample(mask, spacing, mm, "nearest"), (side,) * 3, 0.0) > 0
    image = box(resample(image, spacing, mm, "linear"), (side,) * 3, -1000.0)
    return (image.clamp(-1000, 0) / 1000 + 1) * mask, mask


def landmarks(folder, phase, side):
    """Points ``[N, 3]`` of the CSV file in the unit box of the network's image."""
    geometry: Geometry = read(folder / f"{phase}.nii.gz")[1]
    lines = (folder / f"{phase}.csv").read_text("utf-8").split()[1:]
    rows = torch.tensor([[float(v) for v in row.split(",")] for row in lines])
    unit = apply_affine(geometry.physical_to_unit(), rows.double())
    return middle(unit, geometry, MM * SIDE / side, (side,) * 3).float()


def main(argv=None):
    """Train; returns the losses of every step."""
    parser = command.parser(__doc__, batch=4, rate=3e-4)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="default: in memory")
    parser.add_argument("--side", type=int, default=SIDE, help="voxels a side")
    parser.add_argument("--held", type=int, default=10, help="if none has landmarks")
    args = parser.parse_args(argv)

    patients = sorted(p.parent for p in args.data.glob("*/inspiration.nii.gz"))
    unseen = [p for p in patients if (p / "inspiration.csv").exists()]
    unseen = unseen or patients[-args.held :]
    known = [p for p in patients if p not in unseen]
    scans = [(p, phase) for p in known + unseen for phase in PHASES]
    load = kept(lambda i: lungs(*scans[i], args.side), args.cache)

    def held():
        for k, patient in enumerate(unseen, len(known)):
            # Expiration is fixed, as in DirLab's benchmark: its voxels' places are
            # looked for in the other image.
            (a, mask_A), (b, mask_B) = load(2 * k), load(2 * k + 1)
            marked = (patient / "inspiration.csv").exists()
            points = [
                landmarks(patient, p, args.side) if marked else None for p in PHASES
            ]
            yield Held(
                a[None],
                b[None],
                mask_A[None].to(torch.uint8),
                mask_B[None].to(torch.uint8),
                *points,
                spacing=(MM * SIDE / args.side,) * 3,
            )

    pairs = both_ways([(2 * k, 2 * k + 1) for k in range(len(known))])
    shape = [1, 1, *(args.side,) * 3]
    return command.run(
        args,
        "lung",
        lambda: networks.make(args, shape, "lncc"),
        Images(load, len(scans), pairs, masks=args.method == "nephi"),
        validate=lambda network: judge(network, held()),
    )


if __name__ == "__main__":
    main()
