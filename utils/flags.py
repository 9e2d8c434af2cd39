"""Flags: one table per program says which there are, which of its modes read them, and what they set."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from utils.cli import say
from utils.config import find_key


def parse_names(text: str) -> list[str]:
    """Split names at commas: "ERBB2,GNAS"."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_numbers(text: str) -> list[int]:
    """Split whole numbers at commas: "0,2". Raises ValueError."""
    return [int(part) for part in text.split(",")]


_EXPECTED = {int: "a whole number", float: "a number", parse_numbers: "whole numbers such as 0,2"}


@dataclass(frozen=True)
class Flag:
    """One flag of a program. One that is not given is None; a switch, which has no value, is True or False.

    modes: those that read it; in any other it is an error.  needed_by: those of them that cannot do without it.
    help: one line; or what makes it, if that takes time.
    key: the configuration key that it sets; of a switch SECTION.key=value.
    kind: what makes the value of the text, ValueError if it cannot; bool for a switch.  choices: the only values.
    presets: value -> what it sets in the configuration, each SECTION.key=value.
    instead: mode that does not read the flag -> what it has in its place.
    is_repeated: it may be given several times; the value is a list.  nargs, metavar: as in argparse.
    also: a second name, that of the same flag in another program.
    """

    name: str
    modes: Sequence[str]
    help: str | Callable[[], str]
    key: str | None = None
    kind: Callable[[str], object] = str
    choices: Sequence[object] = ()
    needed_by: Sequence[str] = ()
    presets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)
    is_repeated: bool = False
    nargs: str | None = None
    metavar: str | None = None
    also: str | None = None

    def value_of(self, text: str, wrong: dict[str, str]) -> object:
        """Return the value that the text means; where it means none, None, and a message in `wrong`."""
        try:
            value = self.kind(text)
            if not self.choices or value in self.choices:
                return value
        except ValueError:
            pass
        names = [str(choice) for choice in self.choices]
        expected = one_of(names) if names else _EXPECTED.get(self.kind, "another value")
        close = difflib.get_close_matches(text, names, n=1)
        wrong[self.name] = f"--{self.name} should be {expected}, found {text!r}{_did_you_mean(close)}"
        return None

    def overrides(self, value: object) -> list[str]:
        """Return what a value of this flag sets in the configuration, each SECTION.key=value."""
        if isinstance(value, str) and value in self.presets:
            return list(self.presets[value])
        if self.key is None or not is_given(value):
            return []
        if self.kind is bool:
            return [self.key]
        # Text is quoted, or YAML would make a number of a folder called 2021.
        return [f"{self.key}={json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value}"]

    def describe(self) -> str:
        """Return the help."""
        return self.help if isinstance(self.help, str) else self.help()

    def add_to(self, group: argparse._ArgumentGroup, text: str | None, wrong: dict[str, str]) -> None:
        """Add the flag to a parser that collects wrong values in `wrong`. text: its help; None if it is not read."""
        name, is_read = f"--{self.name}", text is not None
        text = argparse.SUPPRESS if text is None else text
        if self.kind is bool:
            group.add_argument(name, action="store_true", help=text)
            return
        group.add_argument(
            *(name, f"--{self.also}")[: 1 if self.also is None else 2],
            dest=self.name,
            action="append" if self.is_repeated else "store",
            nargs=self.nargs,
            metavar=self.metavar or (f"{{{','.join(map(str, self.choices))}}}" if self.choices else None),
            type=partial(self.value_of, wrong=wrong) if is_read else str,
            help=text,
        )


@dataclass(frozen=True)
class CommandLine:
    """The command line of a program that has modes: `--mode MODE` and the flags that the mode reads.

    about: what `--help` without a mode says first.  modes: name -> what it does, in one line.
    groups: title in the help -> flags.  default_mode: where `--mode` may be left out.
    conflicts: messages about flags that contradict each other.
    """

    program: str
    about: str
    modes: Mapping[str, str]
    groups: Mapping[str, Sequence[Flag]]
    conflicts: Callable[[argparse.Namespace], Iterable[str]]
    default_mode: str | None = None

    @property
    def flags(self) -> Iterator[Flag]:
        return (flag for flags in self.groups.values() for flag in flags)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Return the values of all flags, of those not given None (of a switch False).

        `--help` prints and leaves. Raises ValueError with everything that is wrong: flags that are unknown or that the mode
        does not read, values, flags that are missing, flags that contradict each other. What a misspelt flag explains is not
        said beside it.
        """
        mode = self._mode_of(words)
        wrong: dict[str, str] = {}
        arguments, left_over = self._parser(mode, wrong, _asks_for_help(words)).parse_known_args(words)
        problems = [*self._unknown(left_over), *wrong.values()]
        meant = {self._names[near] for word in _flags_among(left_over) for near in self._near(word)}
        meant -= {flag.name for flag in self.flags if is_given(getattr(arguments, flag.name))}
        for flag in () if "mode" in meant else self.flags:
            given = is_given(getattr(arguments, flag.name)) or flag.name in wrong
            if given and mode not in flag.modes:
                instead = f"; --mode {mode} {flag.instead[mode]}" if mode in flag.instead else ""
                problems.append(f"--{flag.name} is for --mode {one_of(flag.modes)}{instead}.")
            elif not given and mode in flag.needed_by and flag.name not in meant:
                problems.append(f"--mode {mode} needs --{flag.name}: {flag.describe()}.")
        problems += [conflict for conflict in self.conflicts(arguments) if meant.isdisjoint(_named_in(conflict))]
        if problems:
            raise ValueError("\n".join(problems))
        return arguments

    def overrides(self, arguments: argparse.Namespace) -> list[str]:
        """Return the command line as SECTION.key=value, several; --set comes last and wins."""
        found = [override for flag in self.flags for override in flag.overrides(getattr(arguments, flag.name))]
        return found + (arguments.set or [])

    def overview(self) -> str:
        """Return the modes, one line each."""
        width = max(map(len, self.modes))
        lines = [f"  {mode:{width}}  {what}" for mode, what in self.modes.items()]
        return "\n".join([*lines, f"python {self.program} --mode MODE --help lists the flags of a mode."])

    def _mode_of(self, words: Sequence[str]) -> str:
        parser = _Parser(add_help=False, allow_abbrev=False)
        parser.add_argument("--mode")
        given: str | None = parser.parse_known_args(words)[0].mode
        if given is None and _asks_for_help(words):
            say(f"{self.about.strip()}\n\n--mode is one of\n{self.overview()}")
            raise SystemExit(0)
        mode = self.default_mode if given is None else given
        if mode is None:
            misspelt = [word for word in _flags_among(words) if self._near(word) == ["mode"]]
            said = self._unknown(misspelt) or [f"--mode is missing; it is one of\n{self.overview()}"]
            raise ValueError("\n".join(said))
        wrong: dict[str, str] = {}
        Flag("mode", (), "", choices=tuple(self.modes)).value_of(mode, wrong)
        if wrong:
            raise ValueError(wrong["mode"])
        return mode

    def _parser(self, mode: str, wrong: dict[str, str], with_help: bool) -> argparse.ArgumentParser:
        """Know all flags, so that the values of those that the mode does not read are taken for such; list its own."""
        parser = _Parser(
            prog=self.program,
            usage=f"python {self.program} --mode {mode} FLAGS",
            description=f"{mode}: {self.modes[mode]}",
            allow_abbrev=False,
        )
        parser.add_argument(
            "--mode", default=mode, metavar="MODE", help=f"here {mode}; python {self.program} --help lists all"
        )
        for title, flags in self.groups.items():
            group = parser.add_argument_group(title)
            for flag in flags:
                text = flag.describe() if with_help else ""
                flag.add_to(group, text if mode in flag.modes else None, wrong)
        return parser

    def _unknown(self, left_over: Sequence[str]) -> list[str]:
        """Return a message for each word that is no flag, or for what stands where a flag should."""
        words = _flags_among(left_over)
        if not words:
            return [f"{word!r} stands where a flag is expected." for word in left_over]
        return [f"{word} is no flag of {self.program}{self._hint(word)}" for word in words]

    def _hint(self, word: str) -> str:
        if key := self._key_of(word):
            return f"; --set {key}=VALUE sets that."
        return _did_you_mean([f"--{name}" for name in self._near(word)])

    def _near(self, word: str) -> list[str]:
        """The one flag that a word seems to mean which is none, if there is one."""
        name = word.strip("-")
        is_none = word not in [f"--{known}" for known in self._names] and self._key_of(word) is None
        return difflib.get_close_matches(name, self._names, n=1) if is_none else []

    def _key_of(self, word: str) -> str | None:
        """The configuration key that is called so, where no flag is."""
        name = word.strip("-")
        return None if name in self._names else find_key(name)

    @property
    def _names(self) -> dict[str, str]:
        """Every name of a flag, and the first one of the same."""
        return {name: flag.name for flag in self.flags for name in (flag.name, flag.also) if name} | {"mode": "mode"}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one ValueError, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}.")


def _flags_among(words: Sequence[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"-(?![\d.])", word)]


def _named_in(text: str) -> list[str]:
    return re.findall(r"--(\w+)", text)


def _asks_for_help(words: Sequence[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(words)


def is_given(value: object) -> bool:
    return value is not None and value is not False


def one_of(names: Sequence[str]) -> str:
    """Join names for a sentence: "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _did_you_mean(close: Sequence[str]) -> str:
    return f"; did you mean {close[0]}?" if close else "."
