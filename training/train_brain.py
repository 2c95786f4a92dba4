"""T1 brains, stripped of the skull: person to person, 130 x 155 x 130.

The folder has ``images/NAME.nii.gz`` and, for those to be held out, label maps
``labels/NAME.nii.gz`` on the same grid; all in one orientation and roughly centred.
Images as the networks see them are kept in ``--cache``.

    python -m training.train_brain --data DIR --cache DIR --steps 100000
"""

from pathlib import Path

from icon_nephi.space.intensities import prepare
from training import command, networks
from training.data import Images, all_ordered_pairs, box, kept, read, resample
from training.judge import Held, judge

SHAPE, MM = (130, 155, 130), 1.4  # about 182 x 217 x 182 mm


def brain(path, shape, mode):
    """The image or label map ``[1, *shape]`` on the network's grid."""
    image, geometry = read(path)
    spacing = tuple(reversed(geometry.spacing))
    mm = MM * SHAPE[0] / shape[0]
    return box(resample(image, spacing, mm, mode), shape, 0.0)


def main(argv=None):
    """Train; returns the losses of every step."""
    parser = command.parser(__doc__, batch=4, rate=3e-4)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="default: in memory")
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE)
    parser.add_argument("--held", type=int, default=5, help="people, of those labelled")
    args = parser.parse_args(argv)

    shape = tuple(args.shape)
    everyone = sorted((args.data / "images").glob("[!.]*.nii.gz"))
    labelled = [p for p in everyone if (args.data / "labels" / p.name).exists()]
    unseen = labelled[-args.held :]
    people = [p for p in everyone if p not in unseen] + unseen
    known = len(people) - len(unseen)

    def image(i):
        return prepare(brain(people[i], shape, "linear")[None], "mri")[0], None

    def labels(i):
        path = args.data / "labels" / people[i].name
        return brain(path, shape, "nearest").round().long(), None

    load = kept(image, args.cache)
    load_labels = kept(labels, args.cache and args.cache / "labels")

    def held():
        for i, j in (known + all_ordered_pairs(len(unseen))).tolist():
            (a, _), (b, _) = load(i), load(j)
            (labels_A, _), (labels_B, _) = load_labels(i), load_labels(j)
            yield Held(a[None], b[None], labels_A[None], labels_B[None])

    return command.run(
        args,
        "brain",
        lambda: networks.make(args, [1, 1, *shape], "lncc"),
        Images(load, known),
        validate=lambda network: judge(network, held()),
    )


if __name__ == "__main__":
    main()
