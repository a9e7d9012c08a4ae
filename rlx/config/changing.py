"""Settings that change while a run trains: a schedule, and settings with other values.

Actors load this module, so it does without JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np

from rlx.types import Range


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One setting's values over the run; beyond the first and the last point they stay as there."""

    setting: str  # its path in the configuration, such as agent.discount
    over: Literal["env_steps", "updates", "seconds"]
    points: list[tuple[Annotated[float, Range(ge=0)], float]]
    between: Literal["linear", "step"]  # step: the value of the point before

    def __post_init__(self) -> None:
        places = [place for place, _ in self.points]
        if not places or any(a >= b for a, b in pairwise(places)):
            raise ValueError(
                f"points={self.points}: give one or more pairs of {self.over} and a value, in "
                f"ascending order of {self.over}."
            )

    def value(self, *, env_steps: int, updates: int, seconds: float) -> float:
        """The setting's value now."""
        now = {"env_steps": env_steps, "updates": updates, "seconds": seconds}[self.over]
        places, values = zip(*self.points, strict=True)
        if self.between == "linear":
            return float(np.interp(now, places, values))
        return float(values[max(0, int(np.searchsorted(places, now, side="right")) - 1)])

    @property
    def group(self) -> str:
        """The group of the configuration that the setting is in."""
        return self.setting.partition(".")[0]

    @property
    def path(self) -> str:
        """The setting's path within its group."""
        return self.setting.partition(".")[2]


def replace_settings(settings: Any, values: Mapping[str, Any]) -> Any:
    """A copy of frozen settings with other values at these paths, which are not checked again."""
    own = {name: value for name, value in values.items() if "." not in name}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        first, dot, rest = path.partition(".")
        if dot:
            nested.setdefault(first, {})[rest] = value
    made = object.__new__(type(settings))
    for field in dataclasses.fields(settings):
        value = own.get(field.name, getattr(settings, field.name))
        if field.name in nested:
            value = replace_settings(value, nested[field.name])
        object.__setattr__(made, field.name, value)
    return made
