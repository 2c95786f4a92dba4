"""Auto-decoder (the paper's Eq. 8 over many pairs): one code a pair, shared fields.

No encoder: the codes of the training pairs are learned beside the two fields. An unseen
pair gets a code by optimisation with the fields as they are (``--fit_steps``).

    python -m training.train_latent_table --size 64 --minutes 5
"""

import torch
from icon_registration.losses import NCC
from torch import nn

from icon_nephi import GradientICONPoints, LatentCodeTable, LatentMLP, NePhi, Points
from icon_nephi.phantoms import triangles_and_circles
from training import command, loop
from training.data import Images, in_memory
from training.judge import Held, judge

GRIDS, CHANNELS = ((4, 4), (8, 8), (16, 16)), (16, 16, 16)


class Table(nn.Module):
    """A table of codes that is told which pairs come next."""

    def __init__(self, count, seed=0):
        super().__init__()
        numbers = {"grids": GRIDS, "channels": CHANNELS}
        generator = loop.generator_of(seed)
        self.table = LatentCodeTable(count, **numbers, generator=generator)
        self.index = torch.arange(count)

    def forward(self, image_A, image_B):
        """The codes of the chosen pairs."""
        return self.table(image_A, image_B, self.index)


def make_loss(table, field_AB, field_BA, size, generator=None):
    """Return the loss of a table and two fields, for images ``size`` voxels a side."""
    points = {"similarity_sampler": Points(300), "regularity_sampler": Points(30)}
    pair = NePhi(table, field_AB, field_BA)
    loss = GradientICONPoints(pair, NCC(), 1.0, generator=generator, **points)
    loss.assign_identity_map([1, 1, size, size])
    return loss


def fitted(network, held, steps, rate):
    """A network whose table has the codes of the held pairs, its fields untouched."""
    pair = network.regis_net
    table = Table(len(held))
    size = held[0].image_A.shape[-1]
    fields = pair.field_AB, pair.field_BA
    fitting = make_loss(table, *fields, size, loop.generator_of(0))
    images = [torch.cat([getattr(p, n) for p in held]) for n in ("image_A", "image_B")]
    optimizer = torch.optim.Adam(table.parameters(), lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = fitting(*images).all_loss
            # The fields stay as they are, so their gradients are not asked for.
            loss.backward(inputs=list(table.parameters()))
            optimizer.step()
    return fitting


def judge_fitted(network, held):
    """`judge`, with the table told of each pair before it is judged."""

    def told():
        for i, pair in enumerate(held):
            network.regis_net.net.index = torch.tensor([i])
            yield pair

    return judge(network, told())


def main(argv=None):
    """Train; returns the losses of every step."""
    parser = command.parser(__doc__, batch=16, rate=3e-3)
    parser.add_argument("--size", type=int, default=64, help="voxels a side")
    parser.add_argument("--count", type=int, default=256, help="training pairs")
    parser.add_argument("--held", type=int, default=16, help="unseen pairs")
    parser.add_argument("--fit_steps", type=int, default=100, help="of an unseen pair")
    args = parser.parse_args(argv)

    shapes = triangles_and_circles(2 * args.count, args.size, seed=args.seed)
    unseen = triangles_and_circles(2 * args.held, args.size, seed=2**31)
    sides = [*unseen.images.split(args.held), *unseen.labels.split(args.held)]
    held = [Held(*(side[[i]] for side in sides)) for i in range(args.held)]
    table = Table(args.count, args.seed)

    def make():
        values = sum(CHANNELS) + table.table.global_codes.shape[1]
        return make_loss(table, *(LatentMLP(2, values) for _ in "AB"), args.size)

    def validate(network):
        return judge_fitted(fitted(network, held, args.fit_steps, 3 * args.rate), held)

    pairs = torch.arange(2 * args.count).reshape(2, -1).T  # row i: image i, image i + M
    return command.run(
        args,
        "latent_table",
        make,
        Images(in_memory(shapes.images), 2 * args.count, pairs),
        chosen=lambda rows: setattr(table, "index", rows[:, 0]),
        validate=validate,
    )


if __name__ == "__main__":
    main()
