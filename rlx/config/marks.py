"""Finds the settings whose types carry a mark, wherever they stand in a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlx.config.build import ROLES, setting_hints
from rlx.config.hints import marker
from rlx.config.targets import resolve


@dataclass(frozen=True, kw_only=True)
class Marked:
    """A setting that is marked so: node[name], at its path in the configuration."""

    node: dict[str, Any]
    name: str
    path: str
    marker: Any


def marked(settings: Mapping[str, Any], kind: type) -> Iterator[Marked]:
    """The settings that carry a mark of this kind."""
    for group in ROLES:
        yield from _marked_in(settings[group], group, kind)


def _marked_in(node: dict[str, Any], path: str, kind: type) -> Iterator[Marked]:
    cls, _ = resolve(node["_target_"])
    for name, hint in setting_hints(cls).items() if cls else ():
        if (found := marker(hint, kind)) is not None:
            yield Marked(node=node, name=name, path=f"{path}.{name}", marker=found)
        if isinstance(inner := node[name], dict) and "_target_" in inner:
            yield from _marked_in(inner, f"{path}.{name}", kind)
