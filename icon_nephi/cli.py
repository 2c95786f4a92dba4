"""The commands: nephi-register, -series, -template, -warp, -jacobian, ..."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps

from icon_nephi._memory import memory_for
from icon_nephi.commands.early import check_compare, check_jacobian, check_there
from icon_nephi.commands.flags import (
    CompareFlags,
    InfoFlags,
    JacobianFlags,
    RegisterFlags,
    WarpFlags,
)
from icon_nephi.commands.group_flags import SeriesFlags, TemplateFlags
from icon_nephi.commands.tasks import find_tasks

_Command = Callable[[Sequence[str] | None], None]


def _one_sentence(command: _Command) -> _Command:
    """Turn errors of input and memory, and Ctrl-C, into a line on stderr and a code."""
    prog = f"nephi-{command.__name__}"

    @wraps(command)
    def run(argv: Sequence[str] | None = None) -> None:
        try:
            with memory_for("this"):
                command(argv)
        except (ValueError, TypeError, OSError, MemoryError) as error:
            print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt as stop:
            end = str(stop) or "what was not finished is not written"
            print(f"{prog}: stopped by the user; {end}", file=sys.stderr)
            raise SystemExit(130) from None

    return run


def _say(prog: str, text: str, warnings: Iterable[str], *, quiet: bool) -> None:
    for warning in warnings:
        print(f"{prog}: warning: {warning}", file=sys.stderr)
    if not quiet:
        print(text)


def _end(prog: str, failed: int, count: int, what: str) -> None:
    """Exit with code 1 if some of many failed."""
    if failed:
        print(f"{prog}: {failed} of {count}{what} failed", file=sys.stderr)
        raise SystemExit(1)


@_one_sentence
def register(argv: Sequence[str] | None = None) -> None:
    """Register two image files, or the pairs of a table."""
    typed = list(sys.argv[1:] if argv is None else argv)
    flags = RegisterFlags.typed(typed)
    command = ["nephi-register", *typed]

    from icon_nephi.commands.text import pairs_table, summary_text

    if flags.pairs is not None or flags.out_dir is not None:
        from icon_nephi.commands.batch import register_pairs

        rows, summary_file = register_pairs(flags, command)
        if not flags.quiet:
            print(f"{pairs_table(rows)}\nsummary: {summary_file}")
        failed = sum(row["status"] == "failed" for row in rows)
        return _end("nephi-register", failed, len(rows), " pairs")

    from icon_nephi.commands.register import run

    summary = run(flags, command)
    as_json = str(flags.json) == "-"
    text = json.dumps(summary, indent=2) if as_json else summary_text(summary)
    quiet = flags.quiet and not as_json
    _say("nephi-register", text, summary["warnings"], quiet=quiet)


@_one_sentence
def series(argv: Sequence[str] | None = None) -> None:
    """Register all images of a series at once."""
    _group(SeriesFlags, "run_series", argv)


@_one_sentence
def template(argv: Sequence[str] | None = None) -> None:
    """Build the template of a group of images."""
    _group(TemplateFlags, "run_template", argv)


def _group(
    kind: type[SeriesFlags] | type[TemplateFlags],
    name: str,
    argv: Sequence[str] | None,
) -> None:
    typed = list(sys.argv[1:] if argv is None else argv)
    flags = kind.typed(typed)

    from icon_nephi.commands import group
    from icon_nephi.commands.text import group_text

    command = shlex.join([kind.PROG, *typed])
    summary = getattr(group, name)(flags, command)
    as_json = str(flags.json) == "-"
    text = json.dumps(summary, indent=2) if as_json else group_text(summary)
    _say(kind.PROG, text, summary["warnings"], quiet=flags.quiet and not as_json)


@_one_sentence
def warp(argv: Sequence[str] | None = None) -> None:
    """Write images, label maps, points and meshes, moved by registrations."""
    flags = WarpFlags.typed(argv)
    tasks = find_tasks(flags)  # what is wrong by name is said before ITK is loaded

    from icon_nephi.commands.warp import warp_files

    _say("nephi-warp", *warp_files(flags, tasks), quiet=flags.quiet)


@_one_sentence
def jacobian(argv: Sequence[str] | None = None) -> None:
    """Write determinants, their logarithm or the matrices, and sum them up."""
    flags = JacobianFlags.typed(argv)
    check_jacobian(flags)
    check_there(flags)

    from icon_nephi.commands.jacobian import write_jacobian

    _say("nephi-jacobian", *write_jacobian(flags), quiet=flags.quiet)


@_one_sentence
def info(argv: Sequence[str] | None = None) -> None:
    """Print what is in a saved registration or an ITK transform."""
    flags = InfoFlags.typed(argv)
    check_there(flags)

    from icon_nephi.commands.info import describe
    from icon_nephi.commands.text import lines

    contents = describe(flags.file)
    print(json.dumps(contents, indent=2) if flags.json else "\n".join(lines(contents)))


@_one_sentence
def compare(argv: Sequence[str] | None = None) -> None:
    """Print a table of NePhi and a voxel network on the pairs of a folder."""
    flags = CompareFlags.typed(argv)
    check_compare(flags)

    from icon_nephi.commands.compare import compare_folder
    from icon_nephi.commands.text import comparison_table

    rows = compare_folder(flags)
    if not flags.quiet:
        print(comparison_table(rows))
    _end("nephi-compare", sum("error" in row for row in rows), len(rows), "")
