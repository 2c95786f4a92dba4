"""Memory and time of `icon_nephi.itk_wrapper.register_pair` on a synthetic chest.

    python -m evaluation.speed.bench_instance [--shape 175 175 175] [--steps 50]

With the default network (an encoder, untrained) and 50 steps of instance optimisation,
and with a learned code instead of the encoder; each in its own process.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from evaluation import array_of, image_from, peak_memory
from evaluation.demo import chest
from evaluation.speed import bench

COLUMNS = ("kind", "seconds", "cpu_seconds", "peak_gib", "gib_before", "error")


def run(kind: str, shape: Sequence[int], steps: int, threads: int) -> dict[str, Any]:
    """Return what it cost; for a fresh process."""
    import torch

    import icon_nephi
    from icon_nephi.space.intensities import prepare

    torch.set_num_threads(threads)
    moving, fixed, _ = chest(shape, 0)
    A, B = (
        image_from(prepare(torch.tensor(values)[None, None], "ct")[0, 0].numpy(), image)
        for image in (moving, fixed)
        for values in [array_of(image).astype(np.float32)]
    )
    ready = peak_memory()
    torch.manual_seed(0)
    if kind == "encoder":
        model = icon_nephi.make_network([1, 1, *shape])
    else:
        model = bench.coded_loss(len(shape))
        model.assign_identity_map([1, 1, *shape])
    start, cpu = time.perf_counter(), time.process_time()
    icon_nephi.itk_wrapper.register_pair(
        model, A, B, finetune_steps=steps, progress=False
    )
    peak = peak_memory()
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gib": peak / 2**30,
        "gib_before": ready / 2**30,
        **bench.provenance(),
    }


if __name__ == "__main__":
    parser = bench.parser(__doc__)
    parser.add_argument("--shape", type=int, nargs="+", default=[175, 175, 175])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    rows = bench.alone_in_turn(
        (
            {"kind": kind},
            partial(run, kind, tuple(args.shape), args.steps, args.threads),
        )
        for kind in ("encoder", "table")
    )
    bench.finish(args.out, COLUMNS, rows)
