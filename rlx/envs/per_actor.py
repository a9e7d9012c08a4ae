"""Settings of environments that differ from actor to actor (`env.per_actor`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from rlx.interfaces import EnvFamily


@runtime_checkable
class PerActor(Protocol):
    """An environment family whose lanes may differ from actor to actor."""

    def of_actor(self, index: int, lanes: int) -> EnvFamily:
        """The family of the lanes index * lanes .. of the run."""


F = TypeVar("F")


def replaced(settings: F, /, **changes: Any) -> F:
    """A copy of a family with other settings, and with all that was noted beside them."""
    own: Any = settings
    made: F = dataclasses.replace(own, **changes)
    known = {field.name for field in dataclasses.fields(own)}
    for name, value in vars(settings).items():
        if name not in known:
            object.__setattr__(made, name, value)
    return made


def chosen(per_actor: Mapping[str, list[Any]], actor: int) -> dict[str, Any]:
    """The settings of an actor: of each list its element, counted round and round."""
    return {name: values[actor % len(values)] for name, values in per_actor.items()}


def per_actor_problems(
    per_actor: Mapping[str, list[Any]], reserved: Mapping[str, str]
) -> list[str]:
    """Says what is wrong with them, a line each; reserved: names that are set elsewhere."""
    found = [
        f"env.per_actor.{name} is not set here: {reserved[name]}"
        for name in per_actor
        if name in reserved
    ]
    return found + [
        f"env.per_actor.{name}=[] has no element; give a list with one for each actor"
        for name, values in per_actor.items()
        if not values
    ]
