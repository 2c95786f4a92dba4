"""What nephi-warp is to move and where to, checked by names alone."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from icon_nephi.commands.flags import IMAGES, POINTS, WarpFlags, is_own
from icon_nephi.commands.outputs import check_outputs

# How each kind of file may be read between voxels; the first is the default.
MODES: dict[str, tuple[str, ...]] = {
    "image": ("linear", "cubic"),
    "labels": ("nearest", "onehot"),
    "points": (),
}


class Task(NamedTuple):
    """One file to move: its kind, where it is, where its result goes."""

    kind: str
    path: Path
    out: Path


def find_tasks(flags: WarpFlags) -> list[Task]:
    """Return what is to be moved, in the order of ``--out``; every name is checked.

    Raises:
        ValueError: nothing to move, other counts, names that cannot be written, or
            flags that do not go together.
    """
    if not flags.transform:
        raise ValueError(
            "the following arguments are required: --transform; see nephi-warp --help"
        )
    named = [(k, p) for k in MODES for p in getattr(flags, k) or ()]
    if not named:
        raise ValueError(
            "one of the arguments --image --labels --points is required; see "
            "nephi-warp --help"
        )
    if (flags.out is None) == (flags.out_dir is None):
        raise ValueError("give either --out, a name for each file, or --out_dir")
    if flags.out_dir is not None:
        if not flags.out_dir.is_dir():
            raise ValueError(f"--out_dir: {flags.out_dir} is not a folder")
        outs = [flags.out_dir / path.name for _, path in named]
    else:
        outs = list(flags.out or ())
    if len(outs) != len(named):
        raise ValueError(
            f"--out has {len(outs)} names for {len(named)} files; give one for each: "
            "images first, then labels, then points"
        )
    tasks = [Task(*both, out) for both, out in zip(named, outs, strict=True)]
    read = [p for _, p in named] + [p for p, _ in flags.transform]
    read += [p for p in (flags.reference, flags.moving) if p is not None]
    several = len(tasks) > 1
    names = [f"out, name {i}" if several else "out" for i in range(1, len(tasks) + 1)]
    check_outputs(
        {
            name: (task.out, _endings(task))
            for name, task in zip(names, tasks, strict=True)
        },
        read,
    )
    kinds = {task.kind for task in tasks}
    allowed = {mode for kind in kinds for mode in MODES[kind]}
    if flags.interpolation is not None and flags.interpolation not in allowed:
        raise ValueError(
            f"--interpolation {flags.interpolation} is not for --{min(kinds)}; of "
            "--image linear or cubic, of --labels nearest or onehot"
        )
    if flags.outside is not None and kinds == {"points"}:
        raise ValueError("--outside is for --image and --labels")
    if flags.errors and any(
        _endings(t) != (".csv",) or t.kind != "points" for t in tasks
    ):
        raise ValueError("--errors needs one .nephi file and --points in a .csv")
    for path, _ in flags.transform:
        is_own("--transform", path)
    for path in filter(None, (flags.reference, flags.moving)):
        if not path.exists():
            flag = "--reference" if path == flags.reference else "--moving"
            raise ValueError(f"{flag}: {path} does not exist")
    for kind, path in named:
        if kind == "points" and not path.is_file():
            raise ValueError(f"--points: {path} does not exist or is not a file")
        if not path.exists():
            raise ValueError(f"--{kind}: {path} does not exist")
    return tasks


def _endings(task: Task) -> tuple[str, ...]:
    if task.kind != "points":
        return IMAGES
    return tuple(e for e in POINTS if task.path.name.lower().endswith(e)) or POINTS
