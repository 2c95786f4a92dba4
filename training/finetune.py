"""Train the general network on with pairs of your own.

``pairs.csv`` has the columns ``moving`` and ``fixed``: paths of image files, relative
to its own folder. Each pair is aligned by an affine map once, and learned in both
directions. Writes beside what every script writes ``network.safetensors``, for

    icon_nephi.predict(image_A, image_B, weights="network.safetensors")

    python -m training.finetune --pairs pairs.csv --minutes 30 --output DIR
"""

import csv
from pathlib import Path

import torch
from tqdm import tqdm

from icon_nephi import Patches, make_network
from icon_nephi.fit.affine import find_affine, in_unit_boxes
from icon_nephi.fit.content import ImagePair
from icon_nephi.fit.learned import Looker, save_encoder, working_size
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.io.atomic import written_whole
from icon_nephi.io.image_files import read_image
from icon_nephi.io.pair_input import read_pair
from icon_nephi.losses.similarities import PatchNCC, find_similarity
from training import command
from training.data import Images, both_ways, in_memory


def rows(path):
    """(moving, fixed) of every line of the table."""
    with path.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    if not table or {"moving", "fixed"} - table[0].keys():
        raise ValueError(
            f"{path} must be a CSV with the columns moving and fixed and a line for "
            "each pair"
        )
    return [
        [path.parent / line[side] for side in ("moving", "fixed")] for line in table
    ]


def aligned(pairs, modality, affine=True):
    """All images, ``[2 N, 1, *grid]``: moving behind its affine start, fixed, ..."""
    found, size = [], None
    for moving, fixed in tqdm(pairs, desc="aligning"):
        both = [read_image("image", path, as_float=True) for path in (moving, fixed)]
        A, B = read_pair(*both, None, None, (modality, modality), "cpu")
        images = ImagePair(A, B)
        # All on one grid: the boxes of one kind of image differ by little.
        size = size or working_size(images.geometry_B)
        start = torch.eye(len(size) + 1, dtype=torch.float64)
        if affine:
            generator, options = torch.Generator().manual_seed(0), FitOptions()
            start = find_affine(images, find_similarity(None), generator, options)
        matrix = in_unit_boxes(start, images.geometry_B, images.geometry_A)
        look = Looker(images, matrix, size)
        found += [look.moving(), look.fixed]
    return torch.cat(found)


def main(argv=None):
    """Train; returns the losses of every step."""
    parser = command.parser(__doc__, batch=2, rate=2e-4, validate_every=0)
    parser.add_argument("--pairs", type=Path, required=True, help="the table")
    parser.add_argument("--modality", choices=("ct", "mri"))
    parser.add_argument("--no_affine", action="store_true", help="trust the headers")
    args = parser.parse_args(argv)
    images = aligned(rows(args.pairs), args.modality, affine=not args.no_affine)
    count = len(images) // 2
    made = []

    def make():
        shape = [1, 1, *images.shape[2:]]
        stride = min(6.0, min(shape[2:]) / 8)
        blocks = {"similarity": PatchNCC(floor=1e-3)}
        blocks["similarity_sampler"] = Patches(200, size=3, stride=stride)
        network = make_network(shape, pretrained="general", lmbda=args.lmbda, **blocks)
        made.append(network)
        return network

    pairs = both_ways([(2 * i, 2 * i + 1) for i in range(count)])
    losses = command.run(
        args, "finetune", make, Images(in_memory(images), 2 * count, pairs)
    )
    folder = Path(args.output) if args.output else None
    if folder is None:
        import footsteps

        folder = Path(footsteps.output_dir)
    with written_whole(folder / "network.safetensors") as (part,):
        encoder = made[0].regis_net.net
        save_encoder(encoder, part, pairs=count, steps=len(losses), seed=args.seed)
    return losses


if __name__ == "__main__":
    main()
