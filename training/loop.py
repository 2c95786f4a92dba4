"""The training loop that every experiment shares.

Every random number is a function of (seed, step, part of the batch): the order of the
pairs, their augmentation and the sample positions of the losses. So a run resumed from
a checkpoint, or spread over other processes, sees the same numbers.

A batch is cut into ``parts``, each with its own sample positions. Parts are worked on
by as many processes as there are (torchrun), or one after another; the result is the
same up to the rounding of sums.
"""

import csv
import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from icon_registration.losses import to_floats
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from icon_nephi import GradientICONPoints
from icon_nephi.io.atomic import written_whole
from icon_nephi.space.images import gaussian_blur
from training.data import Images, augment

CHECKPOINT = "checkpoint.pt"
# Of a run and the one that it continues.
MUST_AGREE = ("batch", "parts", "seed", "augment", "flip", "blur")


@dataclass(frozen=True)
class Plan:
    """How to train; the options of every script.

    Attributes:
        steps: after which to stop, if given.
        minutes: of training (validation not counted) after which to stop, if given.
        clock: "wall", or "cpu" (sum over threads), what minutes are counted by.
        batch: pairs a step, over all processes.
        parts: of a batch, see above; 0: as many as there are processes.
        rate: Adam's learning rate, warmed up, then a cosine down to zero.
        warmup: steps.
        augment: see `training.data.augment`; 0 for none.
        flip: the same.
        blur: voxels of Gaussian smoothing of the images at first, less and less, and
            none in the second half: thin things are found from further away.
        seed: of everything random.
        validate_every: steps; 0: at the end only.
        save_every: steps between checkpoints.
        resume: a checkpoint, or the folder of a run that wrote one.
        stop_at: leave after this step, as if killed (for tests).
    """

    steps: int | None = None
    minutes: float | None = None
    clock: str = "wall"
    batch: int = 8
    parts: int = 0
    rate: float = 1e-3
    warmup: int = 50
    augment: float = 0.0
    flip: bool = False
    blur: float = 0.0
    seed: int = 0
    validate_every: int = 0
    save_every: int = 200
    resume: str | None = None
    stop_at: int | None = None


def train(
    network: nn.Module,
    images: Images,
    plan: Plan,
    folder: Path,
    *,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    chosen: Callable[[Tensor], None] | None = None,
    device: torch.device | str = "cpu",
) -> list[dict[str, float]]:
    """The losses of every step since the start (or since the checkpoint).

    Writes ``losses.csv``, ``validation.csv``, tensorboard events, ``checkpoint.pt`` and
    ``network_weights.trch`` (the state of ``regis_net``, as ICON's) to the folder.

    Args:
        network: an ICON loss: called with images (and masks), returns ICONLoss.
        images: what to train on.
        plan: how.
        folder: of the run.
        validate: figures of merit of the network on held-out pairs.
        chosen: told the numbers of the pairs of each part before it is worked on.
        device: of the network and the batches.
    """
    if plan.steps is None and plan.minutes is None:
        raise ValueError("give --steps, --minutes or both: when is training to end?")
    rank, world = rank_and_world()
    parts = plan.parts or world
    if plan.batch % parts or parts % world:
        raise ValueError(
            f"a batch of {plan.batch} pairs cannot be cut into {parts} equal parts for "
            f"{world} processes"
        )
    network.to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=plan.rate, betas=(0.9, 0.99))
    step, spent = 0, 0.0
    if plan.resume:
        step, spent = _restore(Path(plan.resume), network, optimizer, plan, parts)
    live: nn.Module = network
    if world > 1:
        ids = None if torch.device(device).type == "cpu" else [torch.device(device)]
        # Buffers are constants, or running means that rank 0 keeps.
        live = DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)
    log = _Log(folder, step, plan.steps) if rank == 0 else None
    mine = range(rank * parts // world, (rank + 1) * parts // world)
    batches = _batches(images, plan, parts, mine, step)
    ours, history = isinstance(network, GradientICONPoints), []
    while True:
        progress = _progress(plan, step, spent)
        if progress >= 1 or step == plan.stop_at:
            break
        began = _now(plan.clock)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(plan, step, progress)
        blur = plan.blur * max(0.0, 1 - 2 * progress)
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for part in mine:
            rows, batch, generator = next(batches)
            if chosen is not None:
                chosen(rows)
            # Ours draw from it; ICON's losses draw from torch's own, seeded by it.
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            source = {"generator": generator} if ours else {}
            last = part == mine[-1]
            batch = (*_blurred(batch[:2], blur), *batch[2:])
            with nullcontext() if last or world == 1 else live.no_sync():
                loss = live(*(image.to(device) for image in batch), **source)
                (loss.all_loss.mean() / len(mine)).backward()
            losses.append([float(v) for v in to_floats(loss)])
        optimizer.step()
        step += 1
        spent = _shared(spent + _now(plan.clock) - began, plan, world, device)
        mean = torch.tensor(losses, dtype=torch.float64).mean(0).to(device)
        if world > 1:
            dist.all_reduce(mean)
            mean /= world
        history.append(dict(zip(loss._fields, mean.tolist(), strict=True)))
        if not math.isfinite(history[-1]["all_loss"]):
            raise RuntimeError(f"the loss is not finite at step {step}: lower --rate")
        ended = _progress(plan, step, spent) >= 1
        look = ended or (plan.validate_every and step % plan.validate_every == 0)
        if log is not None:
            log.losses(step, spent, history[-1], optimizer.param_groups[0]["lr"])
            if look and validate is not None:
                log.validation(step, spent, _looked_at(network, validate))
            if look or step % plan.save_every == 0:
                _save(folder, network, optimizer, plan, parts, step, spent)
    batches.close()
    if log is not None:
        log.close()
    if world > 1:
        dist.barrier()
    return history


def _batches(
    images: Images, plan: Plan, parts: int, mine: range, step: int
) -> Generator[tuple[Tensor, tuple[Tensor, ...], torch.Generator], None, None]:
    """Pairs, images and generator of each part from a step on, made one part ahead."""
    size = plan.batch // parts

    def make(
        step: int, part: int
    ) -> tuple[Tensor, tuple[Tensor, ...], torch.Generator]:
        rows = images.rows(step * plan.batch + part * size, size, plan.seed)
        generator = generator_of(plan.seed, step, part)
        batch = images.batch(rows)
        if plan.augment or plan.flip:
            batch = augment(batch, plan.augment, generator, plan.flip)
        return rows, batch, generator

    order = ((s, part) for s in itertools.count(step) for part in mine)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, *next(order))
        while True:
            ready, ahead = ahead, pool.submit(make, *next(order))
            yield ready.result()


def _blurred(images: tuple[Tensor, ...], sigma: float) -> tuple[Tensor, ...]:
    axes = images[0].dim() - 2
    return tuple(gaussian_blur(image.float(), [sigma] * axes) for image in images)


def rate_at(plan: Plan, step: int, progress: float) -> float:
    """Adam's rate: a straight line up, then half a cosine down to zero."""
    warm = min(1.0, (step + 1) / max(1, plan.warmup))
    return plan.rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def generator_of(*numbers: int) -> torch.Generator:
    """A generator for these numbers and no others (torch reads 32 bits of a seed)."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def _looked_at(
    network: nn.Module, validate: Callable[[nn.Module], dict[str, float]]
) -> dict[str, float]:
    network.eval()
    with torch.random.fork_rng():
        result = validate(network)
    network.train()
    return result


# --- the clock ----------------------------------------------------------------------


def _now(clock: str) -> float:
    return time.process_time() if clock == "cpu" else time.perf_counter()


def _progress(plan: Plan, step: int, spent: float) -> float:
    """The share that is done: of the steps or of the minutes, the larger one."""
    by_steps = 0.0 if plan.steps is None else step / max(1, plan.steps)
    by_time = 0.0 if plan.minutes is None else spent / max(1e-9, 60 * plan.minutes)
    return max(by_steps, by_time)


def _shared(spent: float, plan: Plan, world: int, device: Any) -> float:
    """Rank 0's seconds, so that all processes stop at the same step."""
    if world == 1 or plan.minutes is None:
        return spent
    seconds = torch.tensor(spent, dtype=torch.float64, device=device)
    dist.broadcast(seconds, 0)
    return float(seconds)


# --- processes ----------------------------------------------------------------------


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join(device: str | None = None) -> torch.device:
    """The device of this process; under torchrun it joins the other processes."""
    cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    name = device or ("cuda" if cuda else "cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if cuda:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(name)
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device(name)


# --- what is written ----------------------------------------------------------------


def _save(
    folder: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    parts: int,
    step: int,
    spent: float,
) -> None:
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "spent": spent,
        "plan": {**{k: getattr(plan, k) for k in MUST_AGREE}, "parts": parts},
    }
    weights = network.regis_net.state_dict()
    with written_whole(folder / CHECKPOINT, folder / "network_weights.trch") as parts:
        for value, part in zip((state, weights), parts, strict=True):
            torch.save(value, part)


def _restore(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    parts: int,
) -> tuple[int, float]:
    path = path / CHECKPOINT if path.is_dir() else path
    state = torch.load(path, map_location="cpu", weights_only=True)
    asked = {**{k: getattr(plan, k) for k in MUST_AGREE}, "parts": parts}
    for name, value in state["plan"].items():
        if asked[name] != value:
            raise ValueError(
                f"{path} was written with --{name} {value}, not {asked[name]}: give "
                "the same to continue it"
            )
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["spent"]


class _Log:
    """A bar, tensorboard, and two CSV files."""

    def __init__(self, folder: Path, step: int, steps: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.board = SummaryWriter(str(folder), flush_secs=30, purge_step=step)
        self.bar = tqdm(total=steps, initial=step, desc="training")

    def losses(
        self, step: int, spent: float, values: dict[str, float], rate: float
    ) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.add_scalar("rate", rate, step)
        self._row("losses.csv", {"step": step, "seconds": spent, **values})
        self.bar.update()
        self.bar.set_postfix(
            similarity=f"{values['similarity_loss']:.4f}",
            regularity=f"{values['inverse_consistency_loss']:.4f}",
        )

    def validation(self, step: int, spent: float, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(f"validation/{name}", value, step)
        self._row("validation.csv", {"step": step, "seconds": spent, **values})
        figures = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.bar.write(f"step {step}, {spent:.0f} s: {figures}")

    def _row(self, name: str, values: dict[str, float]) -> None:
        path = self.folder / name
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(values))
            if new:
                writer.writeheader()
            writer.writerow(values)

    def close(self) -> None:
        self.board.close()
        self.bar.close()
