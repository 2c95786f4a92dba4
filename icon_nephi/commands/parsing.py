"""Flags as fields of a dataclass: what argparse is told, and what was typed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar, NoReturn, TypeVar, get_args, get_type_hints


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line, which names the flags that were meant."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return all of the arguments, or complain."""
        known, others = self.parse_known_args(args, namespace)
        if others:
            flags = [f for f in self._option_string_actions if f.startswith("--")]
            near = [flag for flag in flags if others[0].lstrip("-") in flag]
            near = near or get_close_matches(others[0], flags)
            meant = f" (did you mean {' or '.join(near[:4])}?)" if near else ""
            self.error(f"unrecognized arguments: {' '.join(others)}{meant}")
        return known

    def error(self, message: str) -> NoReturn:
        """Raise what the commands turn into exit code 2."""
        raise ValueError(f"{message}; see {self.prog} --help")


class Chained(argparse.Action):
    """Adds what is typed to one list, with whether it was an ``--inverse...`` flag."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option: str | None = None
    ) -> None:
        """Keep the values in the order typed."""
        turned = str(option).startswith("--inverse")
        before = getattr(namespace, self.dest) or ()
        setattr(namespace, self.dest, (*before, *((v, turned) for v in values)))


FlagsT = TypeVar("FlagsT", bound="Flags")


@dataclass(frozen=True)
class Flags:
    """The flags of a command: the fields of a subclass, each made by `flag`."""

    PROG: ClassVar[str]
    ABOUT: ClassVar[str]
    EXAMPLES: ClassVar[str]

    @classmethod
    def typed(cls: type[FlagsT], argv: Sequence[str] | None) -> FlagsT:
        """Return the flags as they were typed; None: behind the name of the process.

        Raises:
            ValueError: what they cannot be, in one line.
        """
        parser = Parser(
            prog=cls.PROG,
            description=cls.ABOUT,
            epilog=cls.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        groups: dict[str, Any] = {"": parser}
        kinds = get_type_hints(cls)
        for entry in fields(cls):
            told = dict(entry.metadata["told"])
            group, alone = entry.metadata["group"], entry.metadata["alone"]
            if group not in groups:
                groups[group] = (
                    parser.add_mutually_exclusive_group(
                        required=told.pop("required", False)
                    )
                    if alone
                    else parser.add_argument_group(group)
                )
            if kinds[entry.name] is bool:
                told["action"] = "store_true"
            else:  # of "Path | None" the first
                first = (get_args(kinds[entry.name]) or (kinds[entry.name],))[0]
                told = {"type": first, "default": entry.default} | told
            groups[group].add_argument(told.pop("name", f"--{entry.name}"), **told)
        return cls(**vars(parser.parse_args(argv)))


def flag(
    text: str, default: Any = None, group: str = "", *, alone: bool = False, **told: Any
) -> Any:
    """Return a field of `Flags`.

    Args:
        text: its help.
        default: where it is not typed.
        group: what it is shown under.
        alone: no two of the group go together; its first says if one is ``required``.
        **told: what else argparse is told; its type is the field's.
    """
    told["help"] = text
    metadata = {"group": group, "alone": alone, "told": told}
    return field(default=default, metadata=metadata)
