"""Memory and time of `icon_nephi.itk_wrapper.register_pair` on a synthetic chest.

    python -m evaluation.speed.bench_instance [--shape 175 175 175] [--steps 50]

With the default network (an encoder, untrained) and 50 steps of instance optimisation,
and with a learned code instead of the encoder; each in its own process.
"""

import argparse
import time

from evaluation.demo import chest
from icon_nephi._memory import peak_memory
from icon_nephi.commands.compare import alone


def run(
    kind: str, shape: tuple[int, ...], steps: int, threads: int
) -> dict[str, float]:
    """Return what it cost; for a fresh process."""
    import torch

    import icon_nephi
    from icon_nephi.io.itk_images import geometry_of, image_of, tensor_of
    from icon_nephi.losses.similarities import PatchNCC
    from icon_nephi.space.intensities import prepare

    torch.set_num_threads(threads)
    moving, fixed, _ = chest(shape, 0)
    A, B = (
        image_of(prepare(tensor_of(i), "ct")[0, 0].numpy(), geometry_of(i))
        for i in (moving, fixed)
    )
    ready = peak_memory() / 2**30
    torch.manual_seed(0)
    if kind == "encoder":
        model = icon_nephi.make_network([1, 1, *shape])
    else:
        code = icon_nephi.LatentCodeTable(
            grids=[(16,) * len(shape)], channels=[32], global_size=32
        )
        fields = [icon_nephi.LatentMLP(len(shape)) for _ in "AB"]
        model = icon_nephi.GradientICONPoints(
            icon_nephi.NePhi(code, *fields),
            PatchNCC(1e-3),
            1.0,
            similarity_sampler=icon_nephi.Patches(600, 3, 2.0, corners=True),
        )
        model.assign_identity_map([1, 1, *shape])
    start, cpu = time.perf_counter(), time.process_time()
    icon_nephi.itk_wrapper.register_pair(
        model, A, B, finetune_steps=steps, progress=False
    )
    peak = peak_memory() / 2**30
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "ready": ready}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs="+", default=[175, 175, 175])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    for kind in ("encoder", "table"):
        row = alone(run, kind, tuple(args.shape), args.steps, args.threads)
        print(
            row.get("error")
            or f"{kind:8s} {row['seconds']:6.1f} s {row['cpu']:6.1f} CPU s   "
            f"peak {row['peak']:.2f} GiB ({row['ready']:.2f} GiB before)"
        )
