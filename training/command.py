"""The command line that every script shares: options, run folder, processes."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training.data import Images
from training.loop import Plan, join, rank_and_world, train


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options that all scripts share; a script adds its own."""
    new = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = new.add_argument
    add("--run_name", help="of the folder under results/ (footsteps)")
    add("--output", help="write to this folder instead of a footsteps run")
    add("--method", choices=("nephi", "voxel"), default="nephi")
    add("--preset", choices=("default", "paper"), default="default")
    add("--levels", type=int, default=1, help="resolutions of nephi, coarse to fine")
    add("--points", type=int, help="of nephi's similarity (default: the preset's)")
    add("--lmbda", type=float, help="weight of the regularity (default: the preset's)")
    add("--device", help="default: cuda where there is one")
    add("--steps", type=int)
    add("--minutes", type=float, help="of training, without validation")
    add("--clock", choices=("wall", "cpu"), default="wall")
    add("--batch", type=int, default=8, help="pairs a step, over all processes")
    add("--parts", type=int, default=0, help="of a batch; 0: one for each process")
    add("--rate", type=float, default=1e-3)
    add("--warmup", type=int, default=50, help="steps")
    add("--augment", type=float, default=0.0, help="strength of random affine maps")
    add("--flip", action="store_true", help="mirror pairs at random, too")
    add("--blur", type=float, default=0.0, help="of the images, voxels, fading")
    add("--seed", type=int, default=0)
    add("--validate_every", type=int, default=500, help="steps; 0: only at the end")
    add("--save_every", type=int, default=200, help="steps")
    add("--resume", help="a checkpoint, or the folder of a run")
    add("--stop_at", type=int, help=argparse.SUPPRESS)
    new.set_defaults(**defaults)
    return new


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that the options say."""
    return Plan(**{k: v for k, v in vars(args).items() if k in Plan.__annotations__})


def run_folder(args: argparse.Namespace, default: str) -> Path:
    """The folder of this run; footsteps makes it, and records code and packages."""
    if args.output:
        return Path(args.output)
    if rank_and_world()[0]:
        return Path(os.devnull)  # only rank 0 writes
    import footsteps

    footsteps.initialize(run_name=args.run_name or default)
    return Path(footsteps.output_dir)


def run(
    args: argparse.Namespace,
    name: str,
    make: Callable[[], nn.Module],
    images: Images,
    **keywords: Any,
) -> list[dict[str, float]]:
    """Join the other processes, build the network, train it: what every main() does."""
    device = join(args.device)
    torch.manual_seed(args.seed)
    network = make()
    try:
        folder = run_folder(args, name)
        return train(network, images, plan_of(args), folder, device=device, **keywords)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
