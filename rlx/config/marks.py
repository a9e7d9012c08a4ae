"""Finds the settings whose types carry a mark, wherever they stand in a configuration."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlx.config.build import ROLES, Root, setting_hints
from rlx.config.hints import marker
from rlx.config.targets import may_import, resolve
from rlx.problems import ConfigError, Problem
from rlx.types import IsPath, NamesModule


@dataclass(frozen=True, kw_only=True)
class Marked:
    """A setting that is marked so: node[name], at its path in the configuration."""

    node: Any  # a dict
    name: str
    path: str
    marker: Any


def marked(settings: Mapping[str, Any], kind: type) -> Iterator[Marked]:
    """The settings that carry a mark of this kind; settings may lack keys that are in no group."""
    for name, hint in setting_hints(Root).items():
        if name in settings and (found := marker(hint, kind)) is not None:
            yield Marked(node=settings, name=name, path=name, marker=found)
    for group in ROLES:
        yield from _marked_in(settings.get(group), group, kind)


def _marked_in(node: Any, path: str, kind: type) -> Iterator[Marked]:
    if not isinstance(node, dict):
        return
    cls, _ = resolve(node.get("_target_"))
    for name, hint in setting_hints(cls).items() if cls else ():
        if name not in node:
            continue
        if (found := marker(hint, kind)) is not None:
            yield Marked(node=node, name=name, path=f"{path}.{name}", marker=found)
        if isinstance(inner := node[name], dict) and "_target_" in inner:
            yield from _marked_in(inner, f"{path}.{name}", kind)


def anchored(settings: Mapping[str, Any], folder: Path | str) -> dict[str, Any]:
    """The settings with whole paths: relative ones start in the folder.

    So a run that is resumed from another folder goes on with the same files.
    """
    found: dict[str, Any] = copy.deepcopy(dict(settings))
    for path in marked(found, IsPath):
        if isinstance(given := path.node[path.name], str):
            path.node[path.name] = os.path.abspath(Path(folder, given))
    return found


def refuse_modules(settings: Mapping[str, Any], source: str, named: Collection[str] = ()) -> None:
    """Raises ConfigError where settings that came with a run name a module to import.

    named: packages, and keys of settings, that somebody has named himself. A module that is
    imported already, or lies in an allowed package, may be named, too.
    """
    problems = []
    for found in (*marked(settings, NamesModule), *_of_evaluations(settings)):
        value = found.node[found.name]
        for given in map(str, value if isinstance(value, list) else [value]):
            module = given.rpartition(":")[0]
            package = module.partition(".")[0]
            if module and not may_import(module) and not {found.path, package} & {*named}:
                says = f"these settings came with a run, so {module} is not imported; if you trust "
                says += f"it, import it first (Python), write allow={package} (evaluate, export), "
                says += f"or {found.path}={given} (resume)"
                problems.append(Problem(path=found.path, given=given, says=says, source=source))
    if problems:
        raise ConfigError(problems)


def _of_evaluations(settings: Mapping[str, Any]) -> Iterator[Marked]:
    """The modules that the environments of evaluations name, where they differ."""
    evaluation, env = settings.get("evaluation"), settings.get("env")
    if not isinstance(evaluation, dict) or not isinstance(env, dict):
        return
    changes = {"evaluation.env": evaluation.get("env")}
    others = evaluation.get("others")
    for name, other in others.items() if isinstance(others, dict) else ():
        if isinstance(other, dict):
            changes[f"evaluation.others.{name}.env"] = other.get("env")
    for path, change in changes.items():
        if isinstance(change, dict) and change:
            yield from _marked_in(merged(env, change), path, NamesModule)


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with these changes; mappings in both are merged in turn."""
    found = dict(settings)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = merged(found[name], value) if both else value
    return found
