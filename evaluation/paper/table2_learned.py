"""The paper's Table 2: networks trained on other pairs, with and without refinement.

    python -m evaluation.paper.table2_learned --copd DIR --nephi_weights W
        --voxel_weights W
        --shape 175 175 175 --out table2.csv
    python -m evaluation.paper.table2_learned --small --out table2.csv

Weights are the network_weights.trch of training/. Landmarks, label maps and other
programs' results as in table1_pairs. With ``--small`` both networks are first trained
for some steps on phantoms, which shows that everything runs and nothing more. The
figures of other systems, and of the paper's NePhi, are quoted from the paper.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from evaluation.accuracy.compare_voxel import learned, training_costs
from evaluation.paper.table1_pairs import SHAPE, find, finish, parser, run, verdict

GIB = 1e6 / 2**30  # of the paper's MB
ROWS = (  # method, mTRE, folds %, representation M, encoder M, ms, MB
    ("LapIRN (M)", 4.24, 1.1e-2, 0, 0.92, 235, None),
    ("GradICON (M)", 1.93, 2.6e-4, 0, 70.68, 161, 13482),
    ("GradICON (S)", 5.41, 1.4e-4, 0, 17.67, 202, 6394),
    ("GradICON+IO (S)", 2.10, 3.5e-4, 0, 17.67, 53200, 6394),
    ("NePhi (S)", 5.45, 0.0, 0.28, 3.07, 461, 2648),
    ("NePhi+IO (S)", 1.88, 0.0, 0.28, 0, 7566, 2496),
)
KEYS = ("method", "tre_mm", "folds", "representation_m", "encoder_m", "inference_ms")
QUOTED = [
    dict(zip(KEYS, row[:-1], strict=True))
    | {"training_peak_gib": None if row[-1] is None else row[-1] * GIB}
    for row in ROWS
]
CLAIM = "learned and refined (IO), 1.88 mm on DIR-Lab COPDgene without folds"


def train(kind: str, path: Path, shape: tuple[int, ...], steps: int) -> None:
    """Write weights of a network trained for some steps on phantoms."""
    from evaluation.accuracy.voxel import NETWORKS
    from icon_nephi import make_network
    from icon_nephi.phantoms import breathing_thorax
    from icon_nephi.space.intensities import prepare

    size = [1, 1, *shape]
    torch.manual_seed(0)
    network = NETWORKS[kind](size) if kind in NETWORKS else make_network(size)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    pairs = [breathing_thorax(shape, seed=seed) for seed in range(100, 104)]
    images = [[prepare(i, "ct") for i in (p.image_A, p.image_B)] for p in pairs]
    for number in tqdm(range(steps), f"training {kind}"):
        optimizer.zero_grad()
        network(*images[number % len(images)]).all_loss.mean().backward()
        optimizer.step()
    torch.save(network.regis_net.state_dict(), path)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 where a registration failed."""
    new = parser(__doc__.splitlines()[0], "table2_learned")
    add = new.add_argument
    for kind in ("voxel", "voxel_multi", "nephi"):
        add(f"--{kind}_weights", type=Path, help="network_weights.trch of a training")
    add("--shape", type=int, nargs="+", default=[], help="grid of the networks")
    add("--preset", default="default", help="of the trained NePhi")
    add("--io_steps", type=int, default=50, help="of instance optimisation")
    add("--train_steps", type=int, default=20, help="of --small")
    args = new.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as own:
        try:
            data, cases = find(args, folder)
            if args.small:
                args.shape = list(SHAPE)
                torch.set_num_threads(args.threads)
                for kind in ("voxel", "nephi"):
                    path = Path(own) / f"{kind}.trch"
                    train(kind, path, SHAPE, args.train_steps)
                    setattr(args, f"{kind}_weights", path)
            methods = {} if args.only_external else learned(args)
            if not methods and not args.external:
                raise ValueError("give --nephi_weights, --voxel_weights or --external.")
            rows = run(args, cases, methods)
        except ValueError as error:
            new.error(str(error))
    costs(rows, args)
    summary = finish(args, data, rows, QUOTED)
    print(verdict(CLAIM, "nephi learned + IO", summary, goal=1.88))
    return int(any(row.get("error") for row in rows))


def costs(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Add the peak memory of a training step; other programs' rows have none."""
    own = [row for row in rows if row["source"] == "measured" and not row.get("error")]
    training_costs(own, args.preset, args.device)


if __name__ == "__main__":
    sys.exit(main())
