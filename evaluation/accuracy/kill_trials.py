"""What is left when a process is killed at any moment: kill -9, look, start again.

    python -m evaluation.accuracy.kill_trials [--trials 25] [--places NAME ...]
        [--out FILE.csv]

Four places: files being written (``writing``), ``nephi-register`` with ``--save`` and
``--transform_out`` (``register``), a warped image streamed to a file (``warp``), and
training with checkpoints (``training``). Each trial starts the work in a process of its
own, kills it after a random share of the time that it takes, and looks: a file with a
final name must be whole, that is the old one or the new one. Then the work is started
again and must end in the same files as work that nobody killed. Exits with 1 where one
was not so. ``left`` counts trials that left files with temporary names.
"""

import argparse
import csv
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation import image_from, write_csv

MODULES = (
    *(
        "icon_nephi.commands.register",
        "icon_nephi.registration.streaming",
        "training.train_triangles",
    ),
    *("scipy.linalg", "scipy.sparse", "torch._dynamo", "itk.support.extras"),
    "torch.utils.tensorboard",
)
LOADED_LATE = (
    *("ImageFileReader", "ImageFileWriter", "TransformFileReaderTemplate"),
    *("TransformFileWriterTemplate", "BSplineTransform", "CompositeTransform"),
    *("AffineTransform", "OptimizerParameters", "ImageIOFactory", "HDF5ImageIO"),
)
COLUMNS = ("place", "trial", "share", "interrupted", "corrupt", "resumed", "left")


class Place(NamedTuple):
    """Work that can be killed, all inside a folder.

    Attributes:
        work: does it; the second time it continues.
        names: the files it makes.
        read: a file as something to compare; raises what a damaged file raises.
        before: what is in the folder at the start.
    """

    work: Callable[[Path], None]
    names: tuple[str, ...]
    read: Callable[[Path], Any]
    before: Callable[[Path], None] = lambda folder: None


# --- the four places ----------------------------------------------------------------


def _fit(seed: int) -> Any:
    """A fit with random numbers, about as large as real ones."""
    import torch

    from icon_nephi import LatentCode
    from icon_nephi.fields import make_field
    from icon_nephi.fit.settings import Fit

    g = torch.Generator().manual_seed(seed)
    grids = tuple(torch.randn(1, 8, n, n, n, generator=g) for n in (8, 16, 32))
    arguments = {"dimension": 3, "code_size": 24, "width": 64}
    fields = [make_field("LatentMLP", arguments) for _ in "AB"]
    matrix = torch.eye(4, dtype=torch.float64) + 0.01 * seed
    code = LatentCode(torch.zeros(1, 0), grids)
    return Fit(matrix, code, *fields, losses=[], warnings=[])


def _save_pair(folder: Path, seed: int) -> None:
    from evaluation import written_whole
    from icon_nephi.io.nephi import save_fit
    from icon_nephi.space.frames import Geometry

    place = Geometry.unit((64, 64, 64))
    save_fit(folder / "pair.nephi", _fit(seed), place, place, itk=False)
    with written_whole(folder / "numbers.csv") as (part,):
        part.write_text(f"{seed}\n" * 200_000)


def _write_on(folder: Path) -> None:
    for seed in range(1, 9):
        _save_pair(folder, seed)


def _read_pair(path: Path) -> Any:
    if path.suffix == ".nephi":
        import icon_nephi

        fit = icon_nephi.load(path).fit
        return [fit.matrix.tolist(), *_numbers(fit.code.local_codes)]
    lines = path.read_text().split()
    if len(lines) != 200_000 or len(set(lines)) != 1:
        raise ValueError(f"{path} is not whole")
    return lines[0]


def _numbers(tensors: Any) -> list[bytes]:
    return [t.numpy().tobytes() for t in tensors]


def _images(folder: Path) -> None:
    import itk

    from icon_nephi.phantoms import breathing_thorax

    made = breathing_thorax((24, 20, 24))
    for name, values in (("moving", made.image_A), ("fixed", made.image_B)):
        image = image_from(values[0, 0].numpy().astype(np.float32))
        image.SetSpacing([float(s) for s in made.spacing[::-1]])
        itk.imwrite(image, str(folder / f"{name}.nrrd"))


def _register(folder: Path) -> None:
    from icon_nephi import cli
    from icon_nephi.fit import settings, unfold
    from icon_nephi.io import itk_transforms

    # How good the result is does not matter here, and steps and nodes take time.
    settings.EFFORTS["fast"], unfold.UNFOLD_ROUNDS = ("grid", 0.02), 0
    itk_transforms.FINE_NODES = 40_000
    files = {n: str(folder / n) for n in ("moving.nrrd", "fixed.nrrd", *_RESULTS)}
    cli.register(
        [
            *("--moving", files["moving.nrrd"], "--fixed", files["fixed.nrrd"]),
            *("--preset", "fast", "--no_affine", "--quiet"),
            *("--save", files["out.nephi"], "--transform_out", files["out.h5"]),
        ]
    )


_RESULTS = ("out.nephi", "out.h5")


def _read_result(path: Path) -> Any:
    if path.suffix == ".nephi":
        return _read_pair(path)
    from icon_nephi.io.itk_transforms import read_transform

    transform = read_transform("file", path)
    points = np.random.default_rng(0).uniform(50, 250, (20, 3))
    return [tuple(transform.TransformPoint(p.tolist())) for p in points]


def _warp(folder: Path) -> None:
    import icon_nephi
    from icon_nephi.streaming import warp_to

    result = icon_nephi.load(folder / "pair.nephi")
    values = np.random.default_rng(0).normal(size=(96, 96, 96)).astype(np.float32)
    import torch

    image = torch.from_numpy(values)[None, None]
    warp_to(result, image, folder / "warped.mha", reference=image, progress=False)


def _before_warp(folder: Path) -> None:
    _save_pair(folder, 0)
    (folder / "numbers.csv").unlink()


def _train(folder: Path) -> None:
    from training import train_triangles

    small = ("--device", "cpu", "--size", "16", "--batch", "4", "--count", "12")
    options = [*small, "--held", "2", "--validate_every", "0", "--steps", "20"]
    options += ["--save_every", "3", "--output", str(folder)]
    if (folder / "checkpoint.pt").exists():
        options += ["--resume", str(folder)]
    train_triangles.main(options)


def _read_trained(path: Path) -> Any:
    import torch

    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        # Steps after the last checkpoint are done again, and their rows come again;
        # what was killed may have left half a row.
        whole = [row for row in rows if None not in row.values()]
        return {r["step"]: (r["all_loss"], r["similarity_loss"]) for r in whole}
    found = torch.load(path, weights_only=True)
    weights = found.get("network", found) if isinstance(found, dict) else found
    return _numbers(v for v in weights.values() if isinstance(v, torch.Tensor))


PLACES = {
    "writing": Place(
        _write_on,
        ("pair.nephi", "numbers.csv"),
        _read_pair,
        before=lambda folder: _save_pair(folder, 0),
    ),
    "register": Place(_register, _RESULTS, _read_result, before=_images),
    "warp": Place(_warp, ("warped.mha",), Path.read_bytes, before=_before_warp),
    "training": Place(
        _train, ("checkpoint.pt", "network_weights.trch", "losses.csv"), _read_trained
    ),
}


# --- a trial ------------------------------------------------------------------------


def start(work: Callable[[Path], None], folder: Path) -> int:
    """Return the id of a new process that does the work and says nothing.

    It is a copy of this one, which therefore must not have started threads of ITK.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        work(folder)
        code = 0
    except BaseException as error:
        (folder / "error.txt").write_text(repr(error))
    finally:
        os._exit(code)


def end_of(child: int) -> int:
    """Return how a process ended: its code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def damaged(place: Place, folder: Path) -> list[str]:
    """Return the names of files that are there but cannot be read."""
    found = []
    for name in place.names:
        try:
            if (folder / name).exists():
                place.read(folder / name)
        except Exception as error:
            found.append(f"{name}: {error}")
    return found


def trial(
    place: Place, folder: Path, seconds: float, whole: list[Any]
) -> dict[str, Any]:
    """Return what became of work that is killed after some seconds."""
    end_of(start(place.before, folder))
    known = {*place.names, *(f.name for f in folder.iterdir())}
    child = start(place.work, folder)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    interrupted = end_of(child) == -signal.SIGKILL
    corrupt = damaged(place, folder)
    left = [f.name for f in folder.iterdir() if f.name not in known]
    resumed = end_of(start(place.work, folder)) == 0
    if resumed:
        resumed = [place.read(folder / name) for name in place.names] == whole
    return {
        "interrupted": int(interrupted),
        "corrupt": "; ".join(corrupt),
        "resumed": int(resumed),
        "left": len([name for name in left if "part" in name]),
    }


def trials(
    name: str, place: Place, count: int, g: np.random.Generator
) -> list[dict[str, Any]]:
    """Return a row for each trial."""
    with tempfile.TemporaryDirectory() as made:
        first, rows = Path(made) / "whole", []
        first.mkdir()
        end_of(start(place.before, first))
        begin = time.monotonic()
        if end_of(start(place.work, first)):
            raise RuntimeError((first / "error.txt").read_text())
        lasts = time.monotonic() - begin
        whole = [place.read(first / n) for n in place.names]
        for number in range(count):
            folder, share = Path(made) / str(number), float(g.uniform(0, 1))
            folder.mkdir()
            found = trial(place, folder, share * lasts, whole)
            rows.append({"place": name, "trial": number, "share": share, **found})
            shutil.rmtree(folder)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.accuracy.kill_trials",
        description="Kill work at random moments and look what is left.",
    )
    parser.add_argument("--trials", type=int, default=25, metavar="N", help="a place")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, metavar="CSV", help="write every trial")
    args = parser.parse_args(argv)

    # Loaded once; the processes are copies of this one.
    import itk
    import torch

    for module in MODULES:
        importlib.import_module(module)
    for name in LOADED_LATE:
        getattr(itk, name)
    torch.set_num_threads(1)
    generator, rows = np.random.default_rng(args.seed), []
    print(f"{'place':10} trials interrupted corrupt resumed  left")
    for name in args.places:
        found = trials(name, PLACES[name], args.trials, generator)
        rows += found
        interrupted, resumed, left = (
            sum(bool(r[key]) for r in found)
            for key in ("interrupted", "resumed", "left")
        )
        corrupt = [r["corrupt"] for r in found if r["corrupt"]]
        print(
            f"{name:10} {len(found):6} {interrupted:11} {len(corrupt):7} "
            f"{resumed:7} {left:5}",
            *corrupt,
            flush=True,
        )
        if args.out:
            write_csv(args.out, COLUMNS, rows)
    return int(any(r["corrupt"] or not r["resumed"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
