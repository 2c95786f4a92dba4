"""Triangles and circles (the paper's section 5): learned registration of 2D shapes.

python -m training.train_triangles --size 128 --minutes 10
python -m training.train_triangles --method voxel --size 128 --minutes 10
python -m training.train_triangles --minutes 10 --hollow --blur 8 --points 600 --lmbda 3
"""

from icon_nephi.phantoms import triangles_and_circles
from training import command, networks
from training.data import Images, in_memory
from training.judge import Held, judge


def main(argv=None):
    """Train; returns the losses of every step."""
    parser = command.parser(__doc__, batch=16, rate=3e-3)
    parser.add_argument("--size", type=int, default=64, help="voxels a side")
    parser.add_argument("--hollow", action="store_true", help="outlines only")
    parser.add_argument("--count", type=int, default=4000, help="training images")
    parser.add_argument("--held", type=int, default=200, help="unseen pairs")
    args = parser.parse_args(argv)

    shapes = triangles_and_circles(args.count, args.size, args.hollow, seed=args.seed)
    # Seeds that training does not use: validation shapes are the same in every run.
    unseen = triangles_and_circles(2 * args.held, args.size, args.hollow, seed=2**31)
    held = [
        Held(
            unseen.images[[i]],
            unseen.images[[i + args.held]],
            unseen.labels[[i]],
            unseen.labels[[i + args.held]],
        )
        for i in range(args.held)
    ]
    return command.run(
        args,
        "triangles",
        lambda: networks.make(args, [1, 1, args.size, args.size], "ncc"),
        Images(in_memory(shapes.images), args.count),
        validate=lambda network: judge(network, held),
    )


if __name__ == "__main__":
    main()
