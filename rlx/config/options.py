"""The one reader of command lines: `key=value` texts become a frozen dataclass of typed options.

A command writes its options as a frozen dataclass. Each field has a type and, unless it must be
given, its default there and nowhere else:

    @dataclass(frozen=True, kw_only=True)
    class Options:
        run: str
        episodes: Annotated[int, Range(ge=1)] = 100

    command("rlx.evaluate", __doc__, Options, play)

Strings are taken as they stand, since run=0 may be a folder; lists are separated by commas; other
values are read as YAML. The last of several texts of one key counts.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml

from rlx.config.build import read_value
from rlx.config.hints import choices, describe, split
from rlx.problems import ConfigError, Problem, did_you_mean, or_exit, print_anything

Given = TypeVar("Given")
Result = TypeVar("Result")

NOTHING = ("null", "")  # how a text says null


def command(
    program: str,
    doc: str | None,
    cls: type[Given],
    act: Callable[[Given], Result],
    argv: Sequence[str] | None = None,
    *,
    places: Sequence[str] = (),
    also: tuple[type[Exception], ...] = (),
) -> Result | None:
    """Reads the options, does the command's work and returns its result.

    `-h` and `--help` print `doc` and return None. A ConfigError, and the exceptions in `also`, are
    printed on stderr, one line for each problem, and end the process with status 2. `argv` is
    `sys.argv[1:]` where it is None; `places` is explained at `read_options`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    print_anything()
    if {"-h", "--help"} & set(arguments):
        print((doc or "").strip())
        return None
    with or_exit(program, *also):
        return act(read_options(cls, arguments, places))


def read_options(cls: type[Given], arguments: Sequence[str], places: Sequence[str] = ()) -> Given:
    """The options of `key=value` texts; raises a ConfigError with every problem.

    `places` names the options that are given by position, without their key.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    problems: list[Problem] = []
    given: dict[str, Any] = {}
    for key, text in _pairs(arguments, hints, places, problems):
        given[key] = _read(text, hints[key], key, problems)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.name not in given:
            problems.append(Problem(path=field.name, says=_missing(hints[field.name], places)))
    if problems:
        raise ConfigError(problems)
    return cls(**given)


def _missing(hint: Any, places: Sequence[str]) -> str:
    return f"missing; accepted: {_usage(places)}" if places else f"missing; give {describe(hint)}"


def _usage(places: Sequence[str]) -> str:
    return " ".join(name.upper() for name in places)


def _pairs(
    arguments: Sequence[str],
    hints: Mapping[str, Any],
    places: Sequence[str],
    problems: list[Problem],
) -> Iterator[tuple[str, str]]:
    """(key, text) of each argument that has a known key or a place."""
    free = list(places)
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if equals and key in hints:
            yield key, text
            free = [name for name in free if name != key]
        elif free:  # also a folder with a `=` in its name
            yield free.pop(0), argument
        elif places:
            problems.append(Problem(path=argument, says=f"too many; accepted: {_usage(places)}"))
        elif equals:
            says = f"no such option; {did_you_mean(key, hints)}"
            problems.append(Problem(path=key, given=text, says=says))
        else:
            says = "write key=value; --help lists the keys"
            problems.append(Problem(path=argument, says=says))


def _read(text: str, hint: Any, key: str, problems: list[Problem]) -> Any:
    """The value of one text; its problems are added to `problems`."""
    if text in NOTHING and _takes(hint, types.NoneType):
        return None
    if _takes(hint, str):
        return text
    if (item := _item(hint)) is not None:
        return _read_list(text, item, key, problems)
    try:
        value = _parse(text)
    except ValueError as error:
        problems.append(Problem(path=key, given=text, says=str(error)))
        return None
    return read_value(value, hint, key, problems)


def _read_list(text: str, item: Any, key: str, problems: list[Problem]) -> tuple[Any, ...]:
    found: list[Problem] = []
    values = tuple(_read(part, item, key, found) for part in text.split(",")) if text else ()
    if found:
        says = f"accepted: {describe(item)}, or several with commas between"
        problems.append(Problem(path=key, given=text, says=says))
    return values


def _alternatives(hint: Any) -> list[Any]:
    inner, _ = split(hint)
    return choices(hint) if get_origin(inner) in (Union, types.UnionType) else [hint]


def _takes(hint: Any, kind: type) -> bool:
    return any(split(choice)[0] is kind for choice in _alternatives(hint))


def _item(hint: Any) -> Any:
    """The type of a list's items; None where the option is no list."""
    lists = (split(choice)[0] for choice in _alternatives(hint))
    return next((get_args(kind)[0] for kind in lists if get_origin(kind) is tuple), None)


def _parse(text: str) -> Any:
    """The value of a text as YAML 1.2 reads it: PyYAML, of 1.1, takes 1e-3 for a word."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError("cannot be read; write a number, true, false or null") from error
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
