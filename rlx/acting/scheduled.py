"""An exploration whose numbers follow `schedules`, by the env steps of the run.

It is a function of these alone, so that all pools explore alike, and so does a run that goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlx.config.changing import Schedule, replace_settings
from rlx.interfaces import Exploration, PerEpisode


def scheduled_exploration(exploration: Exploration, schedules: Sequence[Schedule]) -> Exploration:
    """The exploration with the values of the schedules that are of its settings."""
    own = [schedule for schedule in schedules if schedule.group == "exploration"]
    if not own or not dataclasses.is_dataclass(exploration):  # whose settings are not known
        return exploration
    following = _Scheduled(exploration=exploration, schedules=own)
    if isinstance(exploration, PerEpisode):
        return _ScheduledPerEpisode(following=following)
    return following


@dataclass(frozen=True, kw_only=True)
class _Scheduled:
    """An interfaces.Exploration with other values in each request."""

    exploration: Any  # a dataclass
    schedules: Sequence[Schedule]

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        amount: np.ndarray = self.at(env_steps).amount(lane, lanes, env_steps)
        return amount

    @property
    def turns(self) -> Sequence[int]:
        """The env steps of the schedules' points, and of the exploration's own."""
        own = [int(place) for schedule in self.schedules for place, _ in schedule.points]
        return [*own, *getattr(self.exploration, "turns", ())]

    def at(self, env_steps: int) -> Any:
        """The exploration with its values at that time of the run."""
        values = {
            s.path: s.value(env_steps=env_steps, updates=0, seconds=0.0) for s in self.schedules
        }
        return replace_settings(self.exploration, values)


@dataclass(frozen=True, kw_only=True)
class _ScheduledPerEpisode:
    """An interfaces.PerEpisode with other values in each episode."""

    following: _Scheduled

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        return self.following.amount(lane, lanes, env_steps)

    def episode_amount(
        self, lane: np.ndarray, lanes: int, env_steps: int, chain: np.ndarray, episode: np.ndarray
    ) -> np.ndarray:
        now: PerEpisode = self.following.at(env_steps)
        return now.episode_amount(lane, lanes, env_steps, chain, episode)
