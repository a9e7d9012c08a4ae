"""Makes docs/reference.md, every key of the configuration, of the YAML and the signatures.

    python docs/make/reference.py            prints the page
    python docs/make/reference.py --write    writes it; a test holds the page against this

A key's meaning is the comment of its line in conf/, its type and range are those of the class that
reads it, and its defaults those of the files.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from rlx.config.build import ROLES, Root, setting_hints
from rlx.config.hints import choices, describe, is_class, split
from rlx.config.targets import full_name, resolve
from rlx.problems import show

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "reference.md"
LINE = re.compile(
    r"^(?P<indent> *)(?P<key>\w+):(?:'[^']*'|\"[^\"]*\"|[^#'\"])*?(?:\s#\s?(?P<says>.*))?$"
)
MORE = re.compile(r"^ +# (?P<says>.*)$")
WIDTH = 118  # columns of the page
MOST = 4  # files that a default is told of one by one
INTRO = """# Every key of the configuration

This page is made by `python docs/make/reference.py --write`.
It comes of the files in `conf/` and of the classes that read them.
A test holds it against both.
[configuration.md](configuration.md) explains how keys are set, and what is checked.
Each class below is what `_target_` names. Its keys are checked before anything starts.
A default of one file only is followed by the name of that file.
"""


@dataclass(kw_only=True)
class Key:
    """One key of a class, from all files that set it."""

    hint: Any
    says: Counter[str] = field(default_factory=Counter)  # comments, and how many files have them
    defaults: dict[str, str] = field(default_factory=dict)  # file -> value


Classes = dict[type, dict[str, Key]]


def comments(path: Path) -> dict[tuple[str, ...], str]:
    """The comment of each key of a YAML file, by its path; lines of comment alone go on with it."""
    found: dict[tuple[str, ...], str] = {}
    stack: list[tuple[int, str]] = []
    last: tuple[str, ...] = ()
    for line in path.read_text().splitlines():
        if (more := MORE.match(line)) and last in found and line.index("#") > 8:
            found[last] += f" {more['says']}"
        elif match := LINE.match(line):
            indent = len(match["indent"])
            stack = [(at, key) for at, key in stack if at < indent] + [(indent, match["key"])]
            last = tuple(key for _, key in stack)
            if match["says"]:
                found[last] = match["says"].strip()
    return found


def nodes(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """The nodes with a `_target_` in a tree, each with its path."""
    if isinstance(tree, Mapping):
        if "_target_" in tree:
            yield path, tree
        for name, child in tree.items():
            yield from nodes(child, (*path, str(name)))


def classes_of(group: str) -> Classes:
    """The classes of a group's files, in the order in which the files name them."""
    found: Classes = {}
    for path in sorted((CONF / group).glob("*.yaml")):
        tree, says = yaml.safe_load(path.read_text()), comments(path)
        placed = [each for each in tree.get("defaults", ()) if isinstance(each, Mapping)]
        chosen = [(*key.partition("@")[1:], name) for each in placed for key, name in each.items()]
        for where, node in nodes(tree):
            cls, _ = resolve(node["_target_"])
            assert cls is not None, (path, node["_target_"])
            keys = found.setdefault(
                cls, {name: Key(hint=hint) for name, hint in setting_hints(cls).items()}
            )
            for name, value in node.items():
                if name in keys:
                    keys[name].says.update([says[*where, name]] if (*where, name) in says else [])
                    keys[name].defaults[path.stem] = shown(value)
            for at, name, choice in chosen:
                if at and not where and name in keys:
                    keys[name].defaults[path.stem] = f"{group}={choice}"
    return found


def shown(value: Any) -> str:
    if isinstance(value, Mapping) and "_target_" in value:
        return value["_target_"].rpartition(".")[2]
    if isinstance(value, Mapping) and value:
        return "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
    return show(value) if not isinstance(value, list) else "[" + ", ".join(map(shown, value)) + "]"


def default(key: Key, files: int) -> str:
    """The default, or the defaults of each file where they differ."""
    by_value: dict[str, list[str]] = {}
    for file, value in key.defaults.items():
        by_value.setdefault(value, []).append(file)
    if not by_value:
        return "none"
    if len(by_value) == 1 and len(key.defaults) == files:
        return f"`{next(iter(by_value))}`"
    most = max(by_value, key=lambda value: len(by_value[value]))
    parts = []
    for value, names in by_value.items():
        told = ", ".join(names) if len(names) <= MOST and value != most else ""
        parts.append(f"`{value}`" + (f" ({told})" if told else ""))
    return "; ".join(parts)


def meaning(key: Key) -> str:
    """The comment that most files have; of a node the class in its place speaks for itself."""
    if key.says:
        return key.says.most_common(1)[0][0]
    kinds = choices(key.hint) if get_args(split(key.hint)[0]) else [key.hint]
    return "the class that its `_target_` names" if any(map(is_class, kinds)) else ""


def table(keys: Mapping[str, Key], files: int) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, key in keys.items():
        cells = (f"`{name}`", describe(key.hint), default(key, files), meaning(key))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def root_keys() -> dict[str, Key]:
    tree, says = yaml.safe_load((CONF / "config.yaml").read_text()), comments(CONF / "config.yaml")
    return {
        name: Key(hint=hint, says=Counter([says[name,]]), defaults={"config": shown(tree[name])})
        for name, hint in setting_hints(Root).items()
    }


def page() -> str:
    """The whole page."""
    lines = [INTRO, "## Keys of no group", "", *table(root_keys(), 1)]
    for group in ROLES:
        files = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        choices = ", ".join(f"`{group}={name}`" for name in files)
        lines += [f"## {group}", "", *textwrap.wrap(f"Choices: {choices}.", WIDTH), ""]
        for cls, keys in classes_of(group).items():
            home = (cls.__module__.replace(".", "/")) + ".py"
            doc = (cls.__doc__ or "").strip().splitlines()[0]
            count = len({file for key in keys.values() for file in key.defaults})
            says = f"{doc} It is in [{home}](../{home})."
            lines += [f"### {full_name(cls)}", "", *textwrap.wrap(says, WIDTH), ""]
            lines += table(keys, count) if keys else ["It has no keys.", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    else:
        print(page(), end="")
