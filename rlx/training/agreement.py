"""Checks what the groups of a configuration must agree on, before anything is built.

Each rule stands with the class that it concerns (interfaces.Agrees); here all are asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlx.config.build import ROLES
from rlx.config.targets import resolve
from rlx.interfaces import Agrees, TakesTurns
from rlx.problems import ConfigError, Problem


def check_agreement(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError with all that two groups do not agree on."""
    problems: list[Problem] = []
    for group in ROLES:
        cls, _ = resolve(settings[group]["_target_"])
        if isinstance(cls, Agrees):
            problems += cls.clashes(settings)
    if problems:
        raise ConfigError(problems)


def takes_turns(settings: Mapping[str, Any]) -> bool:
    """Says whether acting takes turns with learning, in this process."""
    cls, _ = resolve(settings["acting"]["_target_"])
    return isinstance(cls, TakesTurns) and cls.takes_turns


def by_clock(settings: Mapping[str, Any]) -> bool:
    """Says whether a setting changes by seconds, which no repeated run has alike."""
    return any(each.get("over") == "seconds" for each in settings["schedules"])
