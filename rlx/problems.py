"""Says what is wrong with a configuration, in one line each."""

from __future__ import annotations

import dataclasses
import difflib
import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MOST_SHOWN = 200  # characters of what was given
MOST_SAID = 2000  # characters of what is said of it, which may list what is accepted


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong, at one key."""

    path: str  # config path, such as acting.instances
    says: str  # what is accepted, and what to do
    given: str = ""
    source: str = ""  # 'conf/acting/local.yaml' or 'command line'

    def __str__(self) -> str:
        given = f"={cut(self.given)}" if self.given else ""
        source = f" ({cut(self.source, MOST_SAID)})" if self.source else ""
        return f"{cut(self.path)}{given}{source}: {cut(self.says, MOST_SAID)}"


class ConfigError(Exception):
    """All problems of a configuration, one line each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems)
        self.problems = list(problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class RunFailed(RuntimeError):
    """A run that cannot go on, through no fault of its configuration; says why."""

    is_worth_saving = False  # whether all that was learnt is well


class EnvironmentFailed(RunFailed):
    """An environment that raised, or answered what it had not declared."""

    is_worth_saving = True

    env_id: str
    says: str
    lane: int | None

    def __init__(self, env_id: Any, says: str = "", lane: int | None = None) -> None:
        """One that comes from gymnasium's own processes is made anew, of itself as `env_id`."""
        if isinstance(env_id, EnvironmentFailed):
            env_id, says, lane = env_id.env_id, env_id.says, env_id.lane
        super().__init__(env_id, says, lane)
        self.env_id, self.says, self.lane = env_id, says, lane

    def __str__(self) -> str:
        lane = "" if self.lane is None else f" in lane {self.lane}"
        return f"env.id={self.env_id!r}{lane}: {self.says}"


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Tells which file, or the command line, set each key."""

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    clashes: tuple[Problem, ...] = ()  # problems that only the sources show

    def of(self, path: str) -> str:
        """The source of a key or, where no file has it, of the section it belongs to."""
        while path and path not in self.names:
            path = path.rpartition(".")[0]
        return self.names.get(path, "")


@contextmanager
def or_exit(program: str, *also: type[Exception]) -> Iterator[None]:
    """Says each problem of a ConfigError in a line, and exits a command with status 2.

    also: further exceptions of one line that mean the same.
    """
    refusals: tuple[type[Exception], ...] = (ConfigError, *also)
    try:
        yield
    except refusals as error:
        for problem in getattr(error, "problems", [error]):
            print(f"{program}: {problem}", file=sys.stderr)
        sys.exit(2)


def print_anything() -> None:
    """Lets a command print any name of a file: what the terminal has not got is escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's or a test's may be another
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def or_run_failed() -> Iterator[None]:
    """Makes a RunFailed of a ValueError, whose line says all that another process is to know."""
    try:
        yield
    except ValueError as error:
        raise RunFailed(str(error)) from error


def refuse(path: str, says: str, *, given: str = "", source: str = "") -> ConfigError:
    """A ConfigError of one problem, to raise."""
    return ConfigError([Problem(path=path, says=says, given=given, source=source)])


def nearest(name: str, names: Iterable[str]) -> str:
    """The accepted name that looks most like this one, or ''."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), "")


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """The nearest accepted name or, where none is near, all of them."""
    names = sorted(names)
    if near := nearest(name, names):
        return f"did you mean {prefix}{near}?"
    return f"accepted: {', '.join(names) or 'none'}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its type where it has none."""
    try:
        text = str(error).strip()
    except Exception:  # of a class that cannot tell itself
        text = ""
    return (text or type(error).__name__).splitlines()[0]


def cut(text: str, most: int = MOST_SHOWN) -> str:
    """A text on one line of at most so many characters; what is left out is in its middle."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def show(value: Any) -> str:
    """A value as YAML and the command line write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) and value else repr(value)
