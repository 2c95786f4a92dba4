"""What a GPU gives: tests, steps, whole registrations, dense maps, and their memory.

    python -m evaluation.speed.gpu [--device cuda] [--out DIR] [--side 175]
        [--seconds 480] [--parts NAME ...] [--smallest]

Each part runs in a process and within a time of its own, so that one that fails leaves
the others. Seconds are of the clock, with all work done; memory is the peak of the
tensors there. Writes gpu.md, a table for docs/performance.md, gpu.json, and
profile.txt: where a registration's time goes. ``--smallest`` shows that it runs.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation import machine, version, written_whole
from evaluation.speed import bench

Row = dict[str, Any]
SIDE, SECONDS = 175, 480
TESTS = (
    *("space/test_interpolation", "maps/test_transforms", "icon/test_losses"),
    "whole/test_devices",
)
CHUNKS = tuple(2**n for n in (13, 15, 17, 19))
POINTS = 2**19  # at which chunks are tried, a quarter with Jacobians
COLUMNS = ("what", "seconds", "peak_mib", "notes")


@dataclass(frozen=True)
class Job:
    """What every part is told."""

    device: str = "cuda"
    side: int = SIDE
    folder: Path = Path()  # what parts leave to others
    smallest: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def steps(self) -> int:
        return 2 if self.smallest else 50


# --- clocks -------------------------------------------------------------------------


def done(job: Job) -> float:
    """The clock's seconds, once the device has done its work."""
    import torch

    if job.on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(job: Job, work: Callable[[], Any], repeats: int = 1) -> tuple[Row, Any]:
    """Median seconds of calls after a first, its seconds, and what the last returned.

    Without repeats the first counts. ``peak_mib`` is what a call adds to the tensors
    that are there, on a GPU.
    """
    import torch

    seconds: list[float] = []
    result, peak = None, 0
    for _ in range(1 + repeats):
        result = None
        if job.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        started = done(job)
        result = work()
        seconds.append(done(job) - started)
        if job.on_gpu:
            peak = torch.cuda.max_memory_allocated() - held
    row: Row = {"first_seconds": seconds[0]}
    row["seconds"] = statistics.median(seconds[1:] or seconds)
    if job.on_gpu:
        row["peak_mib"] = peak / bench.MIB
    return row, result


# --- parts --------------------------------------------------------------------------


def device_part(job: Job) -> Iterator[Row]:
    """The card, and that it does a product of matrices."""
    import torch

    from icon_nephi.core import which

    name = torch.cuda.get_device_name() if job.on_gpu else machine()
    a = torch.rand(256, 256, device=job.device)
    row, _ = timed(job, lambda: a @ a)
    yield {"what": "the device", "name": name, "core": which()} | row


def tests_part(job: Job) -> Iterator[Row]:
    """``pytest -m gpu``, of the files that need no ITK."""
    root = Path(__file__).parents[2]
    files = [str(root / f"tests/{name}.py") for name in TESTS]
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-m", "gpu"]
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", *options, *files]
    if job.smallest:
        command.append("--collect-only")
    process = subprocess.run(
        command, cwd=root, capture_output=True, text=True, encoding="utf-8"
    )
    print(process.stdout[-6000:], process.stderr[-3000:], flush=True)
    lines = [line for line in process.stdout.splitlines() if line.strip()]
    yield {
        "what": "pytest -m gpu",
        "seconds": time.perf_counter() - started,
        "notes": lines[-1].strip("= ") if lines else f"exit {process.returncode}",
        **({"error": "tests failed"} if process.returncode else {}),
    }


def steps_part(job: Job) -> Iterator[Row]:
    """One step each, as `bench_step --device` measures it."""
    import torch

    from evaluation.speed import bench_step

    methods = ("nephi IO", "nephi training", "voxel")
    for method in methods[: 1 if job.smallest else 3]:
        if job.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        threads = torch.get_num_threads()
        row = bench_step.measure(method, job.side, job.device, threads)
        spread = f"{1000 * row['least']:.1f} to {1000 * row['most']:.1f} ms"
        yield row | {"what": f"a step, {method}", "notes": spread}


def refine_part(job: Job) -> Iterator[Row]:
    """Instance optimisation: a code of its own, and the default network's."""
    import torch

    import icon_nephi
    from icon_nephi.fit.refine import refine_pair

    shape = [1, 1, job.side, job.side, job.side]
    images = [torch.rand(shape, device=job.device) for _ in "AB"]
    for name in ("a code", "make_network's code"):
        model = bench.coded_loss(3) if name == "a code" else None
        model = model or icon_nephi.make_network(shape)
        model.assign_identity_map(shape)
        model.to(job.device)

        def work(model: Any = model) -> Any:
            return refine_pair(model, *images, steps=job.steps, progress=False)

        row, _ = timed(job, work)
        yield row | {"what": f"{job.steps} steps of instance optimisation, {name}"}


def phantom_part(job: Job) -> Iterator[Row]:
    """A breathing chest with its known motion, for those after it."""
    import torch

    from icon_nephi.phantoms import breathing_thorax

    if job.on_gpu:
        torch.set_num_threads(os.cpu_count() or 1)
    row, chest = timed(job, lambda: breathing_thorax((job.side,) * 3), 0)
    kept = {
        "images": (chest.image_A, chest.image_B),
        "points": (chest.points_A, chest.points_B),
        "box": chest.millimetres(torch.ones(1, 3)),
    }
    torch.save(kept, job.folder / "chest.pt")
    yield row | {"what": "the phantom, made on the processor", "quiet": True}


def register_part(job: Job) -> Iterator[Row]:
    """`register` from nothing, and on the processor beside it."""
    import cProfile
    import pstats

    import torch

    import icon_nephi
    from icon_nephi.core import which

    kept = torch.load(job.folder / "chest.pt")
    (moving, fixed), box = kept["points"], kept["box"].numpy()
    places = (job.device, "cpu") if job.on_gpu else ("cpu",)
    for place in places:
        images = [image.to(place) for image in kept["images"]]
        here = Job(place, job.side, job.folder, job.smallest)

        def work(images: Any = images) -> Any:
            limit = 2.0 if job.smallest else None
            return icon_nephi.register(
                *images, modality="ct", progress=False, time_limit=limit
            )

        repeats = 1 if place == job.device and not job.smallest else 0
        row, found = timed(here, work, repeats)
        moved = found.transform_points(fixed.numpy())
        errors = (((moved - moving.numpy()) * box) ** 2).sum(1) ** 0.5
        before = (((fixed - moving).numpy() * box) ** 2).sum(1) ** 0.5
        name = f"the processor ({which()} core)" if place == "cpu" else "the device"
        yield row | {
            "what": f"register, on {name}",
            "tre_mm": float(errors.mean()),
            "before_mm": float(before.mean()),
            "steps": len(found.losses),
            "notes": f"{errors.mean():.2f} mm (before {before.mean():.1f}), "
            f"{len(found.losses)} steps; the first call {row['first_seconds']:.1f} s",
            "warnings": found.warnings,
        }
        if repeats and job.on_gpu:
            profile = cProfile.Profile()
            profile.runcall(work)
            with (job.folder / "profile.txt").open("w") as stream:
                table = pstats.Stats(profile, stream=stream)
                table.sort_stats("cumulative").print_stats(70)
                table.sort_stats("tottime").print_stats(40)


def export_part(job: Job) -> Iterator[Row]:
    """Every voxel's displacement: on the device, and as an array of millimetres."""
    import torch

    from evaluation.speed.bench_export import export, make_map
    from icon_nephi.maps.lattices import on_lattice

    axes = [torch.linspace(0, 1, job.side, device=job.device)] * 3
    methods = ("default field", "paper's field", "tallUNet2")
    for method in methods[: 1 if job.smallest else 3]:
        if method == "tallUNet2":
            row, _ = timed(job, export(method, job.side, job.device), 5)
            yield row | {"what": "tallUNet2, one inference"}
            continue
        phi = make_map(method, job.side, job.device)
        row, _ = timed(job, lambda phi=phi: torch.cat([*on_lattice(phi, axes)]), 5)
        yield row | {"what": f"{method} at every voxel, on the device"}
        row, _ = timed(job, export(method, job.side, job.device), 2)
        yield row | {"what": f"{method} at every voxel, an array of mm"}


def chunks_part(job: Job) -> Iterator[Row]:
    """Nanoseconds a point by `chunk_size`: values, with backward, with Jacobians."""
    import torch

    from evaluation.speed.bench_export import make_map
    from icon_nephi.maps.transforms import NeuralTransform

    count = 2**12 if job.smallest else POINTS
    x = torch.rand(1, 3, count, 1, 1, device=job.device)
    for method in ("default field", "paper's field")[: 1 if job.smallest else 2]:
        owned = make_map(method, job.side, job.device)
        owned.field.requires_grad_()
        for size in CHUNKS[: 1 if job.smallest else None]:
            options = {"chunk_size": size, "owned": False}
            phi = NeuralTransform(owned.field, owned.code, **options)

            def value(phi: Any = phi) -> None:
                with torch.no_grad():
                    phi(x)

            def backward(phi: Any = phi) -> None:
                phi(x).square().mean().backward()

            def jacobians(phi: Any = phi) -> None:
                moved, slopes = phi.value_and_jacobian(x[:, :, : count // 4])
                (moved.square().mean() + slopes.square().mean()).backward()

            works = (value, count), (backward, count), (jacobians, count // 4)
            rows = [(timed(job, work, 3)[0], n) for work, n in works]
            peaks = [row.get("peak_mib", 0.0) for row, _ in rows]
            ns = [1e9 * row["seconds"] / n for row, n in rows]
            words = ", ".join(f"{n:.1f}" for n in ns)
            yield {
                "what": f"{method}, chunks of {size}",
                "nanoseconds": ns,
                "peak_mib": max(peaks),
                "notes": f"ns a point: {words} (value, backward, with Jacobian)",
            }


# What is done, and how many seconds it may take.
PARTS: dict[str, tuple[Callable[[Job], Iterator[Row]], float]] = {
    "device": (device_part, 60),
    "phantom": (phantom_part, 90),
    "register": (register_part, 120),
    "export": (export_part, 60),
    "refine": (refine_part, 60),
    "steps": (steps_part, 75),
    "tests": (tests_part, 90),
    "chunks": (chunks_part, 60),
}


# --- the whole ----------------------------------------------------------------------


def do_part(name: str, job: Job, path: Path) -> None:
    """Write the part's rows as they come, into a file of JSON."""
    rows: list[Row] = []
    for row in PARTS[name][0](job):
        rows.append({"part": name} | row)
        print(f"  {row['what']}: {row.get('seconds', 0):.4g} s", end="")
        print(f", {row.get('peak_mib') or 0:.0f} MiB  {row.get('notes', '')}")
        sys.stdout.flush()
        path.write_text(json.dumps(rows), "utf-8")


def run_part(name: str, job: Job, limit: float) -> list[Row]:
    """The rows of a part that runs in a process of its own, at most so long."""
    path = job.folder / f"{name}.json"
    words = ["--part", name, "--device", job.device, "--side", str(job.side)]
    words += ["--folder", str(job.folder), *(["--smallest"] * job.smallest)]
    command = [sys.executable, "-u", "-m", "evaluation.speed.gpu", *words]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], start_new_session=True
    )
    error = None
    try:
        code = process.wait(limit)
        error = f"ended with {code}" if code else None
    except subprocess.TimeoutExpired:
        error = f"stopped after {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    if error:
        print(f"  {name}: {error}", flush=True)
        rows.append({"part": name, "what": name, "error": error})
    return rows


def table_of(rows: list[Row], job: Job) -> str:
    """A table in Markdown, with the name of the card above it."""
    card = next((row["name"] for row in rows if "name" in row), job.device)
    lines = [
        f"{card}, torch {version('torch')}, {job.side}^3 (`make gpu`):",
        "",
        "| | seconds | peak memory, MiB | |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row.get("quiet") or "name" in row:
            continue
        time_, peak = row.get("seconds"), row.get("peak_mib")
        cells = (
            row["what"],
            "" if time_ is None else f"{time_:.3g}",
            "" if peak is None else f"{peak:.0f}",
            ", ".join(filter(None, (row.get("error"), row.get("notes")))),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--side", type=int, help="voxels (default: 175)")
    parser.add_argument("--out", type=Path, help="folder of what is written")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--smallest", action="store_true", help="24^3, a few steps")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    side = args.side or (24 if args.smallest else SIDE)
    if args.part:
        job = Job(args.device, side, args.folder, args.smallest)
        do_part(args.part, job, args.folder / f"{args.part}.json")
        return 0
    ends, rows = time.monotonic() + args.seconds, list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(args.device, side, Path(folder), args.smallest)
        for name in args.parts:
            left = ends - time.monotonic()
            print(f"{name} ({left:.0f} s left)", flush=True)
            if left < 1:
                rows.append({"part": name, "what": name, "error": "no time left"})
            else:
                rows += run_part(name, job, min(left, PARTS[name][1]))
            if args.out is not None:
                write(args.out, rows, job)
    print(table_of(rows, job))
    return int(any("error" in row for row in rows))


def write(out: Path, rows: list[Row], job: Job) -> None:
    """What is known so far."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {"gpu.md": table_of(rows, job), "gpu.json": json.dumps(rows, indent=1)}
    profile = job.folder / "profile.txt"
    if profile.exists():
        texts["profile.txt"] = profile.read_text("utf-8")
    for name, text in texts.items():
        with written_whole(out / name) as (path,):
            path.write_text(text, "utf-8")


if __name__ == "__main__":
    sys.exit(main())
