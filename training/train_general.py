"""Train the general network: images that do not exist, motions that are known.

    python -m training.train_general --dim 3 --device cuda --minutes 8 --out DIR

writes into DIR ``general3d.safetensors`` (float16, an average over the last steps),
``general3d.pt`` (the checkpoint that ``--resume`` goes on from) and ``general3d.csv``
(the errors on synthetic pairs that are never trained on). No real image is read.

With ``--steps`` in place of ``--minutes`` the result is a function of the seed, also
when it was stopped in between and resumed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from icon_nephi.fields.pyramid import (
    PyramidEncoder,
    cell_middles,
    read_lattice,
    swapped,
)
from icon_nephi.io.atomic import written_whole
from icon_nephi.space.frames import identity_map
from icon_nephi.space.images import sample_image
from training.synthetic import Pairs, make_pairs

NETWORK: dict[int, dict[str, Any]] = {
    2: {
        "widths": (16, 32, 48, 64, 96),
        "hidden": (16, 32, 48, 64, 96),
        "reach": (1, 2, 2, 3, 3),
    },
    3: {
        "widths": (16, 32, 48, 48),
        "hidden": (16, 32, 48, 48),
        "reach": (1, 1, 2, 2),
    },
}
SIZE, BATCH = {2: 192, 3: 96}, {2: 24, 3: 6}
# For this share of the training images are smaller, and there are more of them.
EARLY, SMALLER = 0.4, 2 / 3
SHOW_EVERY, HELD_OUT = 10.0, 8
AVERAGED = 0.998


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    new = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = new.add_argument
    add("--dim", type=int, choices=(2, 3), default=3)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--minutes", type=float, help="of this call, start and end counted in")
    add("--steps", type=int, help="in all, in place of minutes")
    add("--out", type=Path, required=True)
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--size", type=int, help="longest side in voxels (default: 192 in 2D, 96)")
    add("--batch", type=int, help="pairs a step")
    add("--rate", type=float, default=1e-3)
    add("--workers", type=int, default=0, help="processes that make pairs, on the CPU")
    add("--seed", type=int, default=0)
    add("--full", action="store_true", help="float32 on the GPU, too")
    add("--save_every", type=float, default=30.0, help="seconds")
    add("--stop_at", type=int, help=argparse.SUPPRESS)
    args = new.parse_args(arguments)
    if (args.minutes is None) == (args.steps is None):
        new.error("give --minutes or --steps")
    args.size = args.size or SIZE[args.dim]
    args.batch = args.batch or BATCH[args.dim]
    args.out.mkdir(parents=True, exist_ok=True)
    train(args, began)


def train(args: argparse.Namespace, began: float) -> None:
    """Train until the time is over or the steps are done."""
    device, d = torch.device(args.device), args.dim
    torch.backends.cudnn.benchmark = True
    net = PyramidEncoder(d, **NETWORK[d], generator=_seeded("cpu", args.seed, "net"))
    net.to(device).reduced = device.type == "cuda" and not args.full
    average = {k: v.detach().clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), args.rate, weight_decay=1e-4)
    run = _Run(args, net, average, optimizer, began)
    step = run.restore() if args.resume else 0
    first = step
    held = [
        make_pairs((args.size,) * d, 1, _seeded(device, 1, i)) for i in range(HELD_OUT)
    ]
    print(
        f"{sum(p.numel() for p in net.parameters())} weights, on {device}, "
        f"{run.seconds:.1f} s to start, step {step}",
        flush=True,
    )
    run.report(step, float("nan"), held)
    making = working = 0.0
    batches = _batches(args, step, run)
    losses: list[Tensor] = []
    last = time.monotonic()
    pairs = next(batches).to(device)
    while not run.over(step):
        began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = args.rate * run.rate(step, first)
        loss = loss_of(net, pairs)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        middle = time.monotonic()
        # Asked for before anything waits for the GPU, which has enough to do by then.
        pairs = next(batches).to(device)
        made = time.monotonic() - middle
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if bool(norm.isfinite()):
            optimizer.step()
        keep = min(AVERAGED, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in net.state_dict().items():
                average[name].lerp_(value, 1 - keep)
        losses.append(loss.detach())
        step += 1
        now = time.monotonic()
        making, working = making + made, working + now - began - made
        if now - last > SHOW_EVERY + run.judging:
            mean = float(torch.stack(losses).mean())
            run.report(step, mean, held)
            share = making / (making + working)
            print(
                f"    {len(losses)} steps, {share:.0%} of it to get pairs", flush=True
            )
            making = working = 0.0
            losses, last = [], time.monotonic()
        run.save_now_and_then(step)
    run.save(step)
    run.report(step, float("nan"), held)


def loss_of(net: PyramidEncoder, pairs: Pairs) -> Tensor:
    """Distance from the true motion at every level, and what maps should be like."""
    images = torch.cat([pairs.image_A, pairs.image_B])
    size = images.shape[2:]
    at = cell_middles(size, 1, images.device)
    truth = _halved(torch.cat([pairs.u_AB, pairs.u_BA]))
    weight = _halved(torch.cat([pairs.weight_B, pairs.weight_A]))
    weight = weight / weight.mean()
    grids = net.displacements(images)
    u, total = torch.zeros_like(truth), images.new_zeros(())
    for i, grid in enumerate(grids):
        u = u + read_lattice(grid, at)
        off = (u - truth).square().sum(1, keepdim=True)
        share = 1.0 if i == len(grids) - 1 else 0.25
        total = total + share * ((off + 0.05).sqrt() * weight).mean()
    # The same places in one contrast; where a place is, both maps agree; no folds.
    clean = [_halved(c) for c in (pairs.clean_A, pairs.clean_B)]
    moving = torch.cat(clean)
    fixed = swapped(moving)
    unlike = (_moved(moving, u) - fixed).abs()
    uneven = sum(s.square().mean() for s in _slopes(u + _moved(swapped(u), u)))
    jacobian = torch.stack(_slopes(u), 2)
    jacobian = jacobian.movedim((1, 2), (-2, -1)) + torch.eye(len(size)).to(u)
    folds = F.relu(0.15 - _determinant(jacobian)).mean()
    return total + 3.0 * (unlike * weight).mean() + 2.0 * uneven + 2.0 * folds


def _halved(values: Tensor) -> Tensor:
    return (F.avg_pool2d if values.dim() == 4 else F.avg_pool3d)(values, 2)


def _moved(values: Tensor, u: Tensor) -> Tensor:
    """Values on cells of two voxels at x + u, u in voxels."""
    size = values.shape[2:]
    last = u.new_tensor([n - 1.0 for n in size]).view(1, -1, *(1,) * len(size))
    return sample_image(values, identity_map(size, device=u.device) + u / (2 * last))


def _slopes(u: Tensor) -> list[Tensor]:
    """Differences along every axis, of voxels by voxels, on the cells all have."""
    d = u.dim() - 2
    inner = u
    for axis in range(d):
        inner = inner.narrow(2 + axis, 0, inner.shape[2 + axis] - 1)
    parts = []
    for axis in range(d):
        ahead = u
        for other in range(d):
            ahead = ahead.narrow(2 + other, int(other == axis), u.shape[2 + other] - 1)
        parts.append((ahead - inner) / 2)
    return parts


def _determinant(j: Tensor) -> Tensor:
    """Of small matrices ``[..., d, d]``, written out: quicker than by factors."""
    if j.shape[-1] == 2:
        return j[..., 0, 0] * j[..., 1, 1] - j[..., 0, 1] * j[..., 1, 0]
    cross = torch.linalg.cross(j[..., 1, :], j[..., 2, :], dim=-1)
    return (j[..., 0, :] * cross).sum(-1)


class _Run:
    """What a run writes, and how long it goes on."""

    def __init__(
        self,
        args: argparse.Namespace,
        net: PyramidEncoder,
        average: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        began: float,
    ) -> None:
        self.args, self.net, self.average = args, net, average
        self.optimizer, self.began = optimizer, began
        self.before = self.judging = 0.0
        self.saved, self.saving = time.monotonic(), 1.0
        self.path = args.out / f"general{args.dim}d"

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def done(self, step: int) -> float:
        """The share of the training that is over, 0 to 1."""
        if self.args.steps:
            return step / self.args.steps
        return (self.before + self.seconds) / (self.before + 60 * self.args.minutes)

    def rate(self, step: int, first: int) -> float:
        """The learning rate as a share of the highest."""
        since = step - first if self.args.minutes else step
        warm = min(1.0, (since + 1) / 100)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.done(step))))

    def over(self, step: int) -> bool:
        if self.args.steps:
            return step in (self.args.steps, self.args.stop_at)
        end = 2.0 + 1.2 * (self.judging + self.saving)
        return self.seconds + end > 60 * self.args.minutes

    def report(self, step: int, loss: float, held: Sequence[Pairs]) -> None:
        """Print and write down errors on pairs that were held out."""
        began = time.monotonic()
        figures = judge(self.net, self.average, held)
        self.judging = time.monotonic() - began
        row = {"step": step, "seconds": round(self.before + self.seconds, 1)}
        row |= {"loss": loss, **figures}
        path = self.path.with_suffix(".csv")
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        said = ", ".join(f"{k} {v:.4g}" for k, v in row.items())
        print(said, flush=True)

    def save_now_and_then(self, step: int) -> None:
        if time.monotonic() - self.saved > self.args.save_every:
            self.save(step)

    def save(self, step: int) -> None:
        """The checkpoint and the weights to be shipped, whole or not at all."""
        began = time.monotonic()
        seconds = self.before + self.seconds
        state = {
            "network": self.net.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": step,
            "seconds": seconds,
        }
        about = {
            "dimension": self.args.dim,
            "network": json.dumps(NETWORK[self.args.dim]),
            "steps": step,
            "seconds": round(seconds),
            "seed": self.args.seed,
            "size": self.args.size,
            "batch": self.args.batch,
        }
        weights = {k: v.half().cpu().contiguous() for k, v in self.average.items()}
        files = self.path.with_suffix(".pt"), self.path.with_suffix(".safetensors")
        with written_whole(*files) as (checkpoint, shipped):
            torch.save(state, checkpoint)
            save_file(weights, shipped, {k: str(v) for k, v in about.items()})
        self.saved = time.monotonic()
        self.saving = self.saved - began

    def restore(self) -> int:
        path = self.path.with_suffix(".pt")
        if not path.exists():
            print(f"{path} is not there yet: from the start", flush=True)
            return 0
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.net.load_state_dict(state["network"])
        with torch.no_grad():
            for name, value in state["average"].items():
                self.average[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.before = state["seconds"]
        return int(state["step"])


@torch.no_grad()
def judge(
    net: PyramidEncoder, average: dict[str, Tensor], held: Sequence[Pairs]
) -> dict[str, float]:
    """Errors of the averaged weights, voxels and shares, over held out pairs.

    ``error``: mean distance from the truth, ``before``: that of the identity,
    ``left``: mean over pairs of the one by the other, and ``last``, ``middle``: that of
    the worst pair and the median; ``folds``: the share of cells.
    """
    own = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(average)
    rows = []
    for pairs in held:
        images = torch.cat([pairs.image_A, pairs.image_B])
        at = cell_middles(images.shape[2:], 1, images.device)
        truth = _halved(torch.cat([pairs.u_AB, pairs.u_BA]))
        weight = _halved(torch.cat([pairs.weight_B, pairs.weight_A]))
        u = sum((read_lattice(g, at) for g in net.displacements(images)), 0 * truth)
        off, far = (
            ((v.norm(dim=1, keepdim=True)) * weight).sum() for v in (u - truth, truth)
        )
        jacobian = torch.stack(_slopes(u), 2).movedim((1, 2), (-2, -1))
        jacobian = jacobian + torch.eye(images.dim() - 2).to(u)
        folds = (_determinant(jacobian) <= 0).float().mean()
        rows.append(torch.stack([off / weight.sum(), far / weight.sum(), folds]))
    net.load_state_dict(own)
    error, before, folds = torch.stack(rows).T.double().cpu()
    left = error / before
    return {
        "error": float(error.mean()),
        "before": float(before.mean()),
        "left": float(left.mean()),
        "middle": float(left.median()),
        "last": float(left.max()),
        "folds": float(folds.mean()),
    }


# --- pairs --------------------------------------------------------------------------


def _seeded(device: torch.device | str, *numbers: int | str) -> torch.Generator:
    """A generator that depends on the numbers and the kind of device alone."""
    import hashlib

    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def _shape(size: int, d: int, step: int) -> tuple[int, ...]:
    """Cubes and boxes in turn: sides are multiples of what the network halves to."""
    sides = (1.0,) * d if step % 2 else (2 / 3, 1.0, 7 / 6)[-d:]
    unit = 2 ** len(NETWORK[d]["widths"])
    return tuple(max(2, round(size * side / unit)) * unit for side in sides)


def batch_of(
    step: int, early: bool, args: argparse.Namespace, device: torch.device | str
) -> Pairs:
    """The pairs of a step."""
    size, count = args.size, args.batch
    if early:
        count = round(count / SMALLER**args.dim)
        size = round(size * SMALLER)
    shape = _shape(size, args.dim, step)
    return make_pairs(shape, count, _seeded(device, args.seed, "step", step))


class _Steps(Dataset[Pairs]):
    """Batches by number of the step, for worker processes."""

    def __init__(self, args: argparse.Namespace, early: bool) -> None:
        self.args, self.early = args, early

    def __getitem__(self, step: int) -> Pairs:
        return batch_of(step, self.early, self.args, "cpu")


def _batches(args: argparse.Namespace, step: int, run: _Run) -> Iterator[Pairs]:
    """The pairs of every step from that one on, made here or by worker processes."""
    device = torch.device(args.device)
    for early in (True, False):
        source: Any = (batch_of(i, early, args, device) for i in itertools.count(step))
        if args.workers:
            source = DataLoader(
                _Steps(args, early),
                batch_size=None,
                sampler=range(step, 2**31),
                num_workers=args.workers,
            )
        for pairs in source if not early or run.done(step) < EARLY else ():
            yield pairs
            step += 1
            if early and run.done(step) >= EARLY:
                break


if __name__ == "__main__":
    main()
