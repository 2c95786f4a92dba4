"""What the compiled core does beside torch: nanoseconds a point, milliseconds a step.

    python -m evaluation.speed.bench_core [--repeats 15] [--threads 1] [--only WORD]

Torch and the core take turns in one process, so that their ratio holds on a machine
that does other work too; CPU seconds of the process, medians. ``--threads 2`` times the
core alone, by the clock, on one thread and on two.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from icon_nephi.core import arrays, which
from icon_nephi.fields import LatentMLP, ModulatedSiren
from icon_nephi.fields import compiled as core_field
from icon_nephi.fields.codes import LatentCode, LatentCodeTable
from icon_nephi.fit.compiled import PairSteps
from icon_nephi.fit.settings import PRESETS, make_pair
from icon_nephi.losses.features import FeatureDifference, with_features
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.losses.regularity import guarded_term
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.maps.networks import AffinePair
from icon_nephi.maps.transforms import NeuralTransform
from icon_nephi.models import make_network
from icon_nephi.space.images import gaussian_blur
from icon_nephi.space.sampling import Patches, Points

Work = Callable[[], object]
STEPS = {
    "step 3D grid": ("grid", (40, 56, 48), False),
    "step 3D siren": ("siren", (40, 56, 48), False),
    "step 3D ct": ("ct", (160, 128, 160), True),
    "step 2D grid": ("grid", (160, 192), False),
}


def make_field(kind: str) -> tuple[Any, LatentCode]:
    """Return a field that moves and a code, of a preset or the paper's."""
    g = torch.Generator().manual_seed(0)
    if kind == "paper":
        field, grids, channels = ModulatedSiren(3, generator=g), (16,), (32,)
    else:
        settings = PRESETS[kind][3]
        grids, channels = settings.grids, settings.channels
        arguments: Any = dict(settings.arguments)
        made = LatentMLP if kind == "grid" else ModulatedSiren
        field = made(3, sum(channels), **arguments, generator=g)
    field.last.weight.data.normal_(0, 0.1, generator=g)
    codes = tuple(
        torch.randn(1, c, n, n, n, generator=g).requires_grad_()
        for c, n in zip(channels, grids, strict=True)
    )
    shared = torch.randn(1, 32 if kind == "paper" else 0).requires_grad_()
    order = "linear" if kind == "paper" else "quadratic"
    return field, LatentCode(shared, codes, order)


def field_works(kind: str, count: int, what: str) -> tuple[Work, Work]:
    """Return torch's and the core's way to a field's values or Jacobians."""
    field, code = make_field(kind)
    phi = NeuralTransform(field, code, owned=False)
    rows, jets = torch.rand(1, count, 3), what.startswith("Jacobian")

    def work(evaluate: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        with torch.set_grad_enabled(what.endswith("VJP")):
            out = evaluate(rows)
        if what.endswith("VJP"):
            torch.autograd.backward([o.square().sum() for o in out])

    by_core = partial(core_field.displacements, field, code, jets)
    return partial(work, partial(phi._evaluate, jets)), partial(work, by_core)


def make_loss(
    preset: str, shape: tuple[int, ...], features: bool
) -> tuple[GradientICONPoints, list[Tensor], list[dict[str, Any]]]:
    """Return a loss as `fitting` makes it, two images, and Adam's groups."""
    g, d = torch.Generator().manual_seed(0), len(shape)
    images = [
        gaussian_blur(torch.rand(1, 1, *shape, generator=g), [1.5] * d) for _ in "AB"
    ]
    similarity: Any = PatchNCC(1e-3)
    if features:
        images = [with_features(i) for i in images]
        similarity = FeatureDifference(similarity, 1, 10.0)
    settings, extent = PRESETS[preset][d], [float(n) for n in shape]
    net = make_pair(settings, extent, g)
    loss = GradientICONPoints(
        AffinePair(net, torch.eye(d + 1)),
        similarity,
        settings.lmbda,
        prior_lmbda=settings.prior_lmbda,
        similarity_sampler=Patches(settings.patches, 3, 2.5, corners=True),
        regularity_sampler=Points(settings.regularity_points),
        regularity=partial(guarded_term, consistency=300.0, weight=1.0),
        extent=torch.tensor(extent),
        generator=torch.Generator().manual_seed(0),
    )
    fields = [*net.field_AB.parameters(), *net.field_BA.parameters()]
    groups = [
        {"params": list(net.net.parameters()), "lr": settings.code_rate},
        {"params": fields, "lr": settings.field_rate},
    ]
    return loss, images, groups


def step_works(name: str) -> tuple[Work, Work]:
    """Return torch's and the core's way to make one step of a pair."""
    loss, images, groups = make_loss(*STEPS[name])
    masks = [torch.ones_like(i[:, :1]) > 0 for i in images]
    step = PairSteps(loss, *images, *masks, groups)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)

    def by_torch() -> None:
        optimizer.zero_grad()
        loss(*images, *masks).all_loss.backward()
        optimizer.step()

    def by_core() -> None:
        step.derive()
        step.advance(1.0)

    return by_torch, by_core


def training_works(preset: str) -> tuple[Work, Work]:
    """Return torch's and the core's way to one training step beside the encoder.

    Of `make_network` at 175^3: loss and gradients, of a code as the encoder's.
    """
    g, shape = torch.Generator().manual_seed(0), [1, 1, 175, 175, 175]
    images = [torch.rand(shape, generator=g) for _ in "AB"]
    network = make_network(shape, preset=preset, generator=g)
    pair: Any = network.regis_net
    with torch.no_grad():
        code = pair.net(*images)
    pair.net = LatentCodeTable(
        grids=[tuple(c.shape[2:]) for c in code.local_codes],
        channels=[c.shape[1] for c in code.local_codes],
        global_size=code.global_code.shape[1],
        interpolation=code.interpolation,
        generator=g,
    )
    for field in (pair.field_AB, pair.field_BA):
        field.last.weight.data.normal_(0, 1e-3, generator=g)

    def by_core() -> None:
        network(*images).all_loss.backward()

    def by_torch() -> None:
        with mock.patch.object(core_field, "suits", return_value=False):
            by_core()

    return by_torch, by_core


def time_both(works: tuple[Work, Work], repeats: int) -> list[float]:
    """Return median CPU seconds of each, run in turns."""
    found: list[list[float]] = [[], []]
    for turn in range(repeats + 1):
        for seconds, work in zip(found, works, strict=True):
            start = time.process_time()
            work()
            if turn:
                seconds.append(time.process_time() - start)
    return [statistics.median(f) for f in found]


def time_threads(work: Work, repeats: int) -> list[float]:
    """Return median seconds of the clock on one thread and on two, in turns."""
    found: list[list[float]] = [[], []]
    for _ in range(repeats):
        for threads, seconds in enumerate(found, 1):
            torch.set_num_threads(threads)
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(f) for f in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, choices=(1, 2), default=1)
    parser.add_argument("--only", default="", help="a word of the names to keep")
    options = parser.parse_args()
    works: dict[str, tuple[float, str, Callable[[], tuple[Work, Work]]]] = {}
    for kind in ("grid", "siren", "paper"):
        for what in ("value", "value + VJP", "Jacobian", "Jacobian + VJP"):
            make = partial(field_works, kind, 5000, what)
            works[f"field {kind}, {what}"] = 5000e-9, "ns a point", make
    image = torch.rand(1, 1, 96, 96, 96)
    both = partial(with_features, image), partial(arrays.with_features, image)
    works["features, 96^3"] = 1e-3, "ms", lambda: both
    for name in STEPS:
        works[name] = 1e-3, "ms", partial(step_works, name)
    for name in ("default", "paper"):
        works[f"training step, {name} network"] = (
            *(1e-3, "ms"),
            partial(training_works, name),
        )
    torch.set_num_threads(1)
    kind = "torch -> core" if options.threads == 1 else "one thread -> two"
    print(f"core: {which()}; {kind}")
    for name, (unit, word, make) in works.items():
        if options.only not in name:
            continue
        if options.threads == 1:
            one, other = time_both(make(), options.repeats)
        else:
            one, other = time_threads(make()[1], options.repeats)
        times = f"{one / unit:8.1f} -> {other / unit:7.1f} {word}"
        print(f"{name:32} {times:34} {one / other:5.1f} times")


if __name__ == "__main__":
    main()
