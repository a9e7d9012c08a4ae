"""The one reader of JSON and YAML that lie in run folders and datasets, whoever wrote them.

What a file holds is data, and may be damaged or hostile. Its size, depth, aliases and the length of
its numbers are bounded before it is parsed, so that one bad file costs that file and nothing else:
neither the memory, nor the stack, nor the time of who reads it.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from rlx.problems import first_line

MOST_BYTES = 16 << 20  # of a JSON file
MOST_YAML_BYTES = 1 << 20  # PyYAML is slow, and settings are a few kilobytes
MOST_DEPTH = 32  # lists and mappings in each other
MOST_DIGITS = 40  # of a number; the state of a generator has 39

LOADER: Any = type("Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
LOADER.yaml_implicit_resolvers = {  # a date is a word, as for Hydra
    first: [(tag, regexp) for tag, regexp in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for first, pairs in LOADER.yaml_implicit_resolvers.items()
}
LOADER.add_implicit_resolver(  # 1e-3 is a number, as for Hydra; of YAML 1.1 it is a word
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    [*"-+.0123456789"],
)

_TEXTS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_LONG_NUMBER = re.compile(rb"[\d.]{%d}" % (MOST_DIGITS + 1))
_LONG_IN_YAML = re.compile(rf"[-+]?[\d.:_]{{{MOST_DIGITS + 1}}}")  # 1:30 is a number there
_SURROGATE = re.compile(rb"\\u[dD]")
_NOT_A_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_PLAIN = (str, int, float, bool, type(None))


class Unreadable(ValueError):
    """A file, or a text, that is not read; says why in one line."""


def open_file(path: Path) -> BinaryIO:
    """An ordinary file, open to be read; raises FileNotFoundError or Unreadable."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise Unreadable("it is no file")
        return path.open("rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(error.strerror or first_line(error)) from error


def read_file(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of an ordinary file of at most so many; raises FileNotFoundError or Unreadable."""
    with open_file(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise Unreadable(f"it is larger than {most:,} bytes")
    return data


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """The value that a JSON file holds; raises FileNotFoundError, or Unreadable."""
    return parse_json(read_file(path, most))


def read_yaml(path: Path) -> Any:
    """The value that a YAML file holds, in JSON's types; raises as `read_json` does."""
    return parse_yaml(read_file(path, MOST_YAML_BYTES))


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text; raises Unreadable."""
    data = data.encode() if isinstance(data, str) else data
    if data.count(b"[") + data.count(b"{") > MOST_DEPTH or len(data) > MOST_DIGITS:
        _check_json(_TEXTS.sub(b"", data))
    found = _parsed(json.loads, data)
    if _SURROGATE.search(data):  # half of a pair can neither be printed nor written: ? stands there
        found = json.loads(json.dumps(found, ensure_ascii=False).encode(errors="replace"))
    return found


def _check_json(outside: bytes) -> None:
    """outside: a JSON text without its strings."""
    if _LONG_NUMBER.search(outside):
        raise Unreadable(f"a number has more than {MOST_DIGITS} digits")
    depth = 0
    for byte in outside.translate(None, _NOT_A_BRACKET):
        depth += 1 if byte in b"[{" else -1
        _check_depth(depth)


def parse_yaml(data: bytes) -> Any:
    """The value of a YAML text, in JSON's types; raises Unreadable."""
    if len(data) > MOST_YAML_BYTES:
        raise Unreadable(f"it is larger than {MOST_YAML_BYTES:,} bytes")
    _parsed(_check_yaml, data)
    found = _parsed(lambda data: yaml.load(data, LOADER), data)
    _check_plain(found)
    return found


def _check_yaml(data: bytes) -> None:
    """Walks through the events of a YAML text, which build nothing and call nothing again."""
    depth = 0
    for event in yaml.parse(data, LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise Unreadable(f"it has an alias (*{event.anchor[:40]}); write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        _check_depth(depth)
        is_plain = isinstance(event, yaml.ScalarEvent) and event.style is None
        if is_plain and _LONG_IN_YAML.match(event.value):
            raise Unreadable(f"a number has more than {MOST_DIGITS} digits")


def _check_depth(depth: int) -> None:
    if depth > MOST_DEPTH:
        raise Unreadable(f"it is nested more than {MOST_DEPTH} deep")


def _check_plain(value: Any) -> None:
    """Raises Unreadable for what a tag of YAML made: sets, bytes, dates."""
    if isinstance(value, dict):
        for key, child in value.items():
            if not isinstance(key, str | int | float):
                raise Unreadable(f"a key is {type(key).__name__}; accepted: names and numbers")
            _check_plain(child)
    elif isinstance(value, list):
        for child in value:
            _check_plain(child)
    elif type(value) is int and abs(value) >= 10**MOST_DIGITS:
        raise Unreadable(f"a number has more than {MOST_DIGITS} digits")
    elif type(value) not in _PLAIN:
        raise Unreadable(f"a value is of type {type(value).__name__}; accepted: JSON's types")


def _parsed(parse: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return parse(data)
    except Unreadable:
        raise
    except (ValueError, TypeError, RecursionError, OverflowError, yaml.YAMLError) as error:
        raise Unreadable(first_line(error)) from error
