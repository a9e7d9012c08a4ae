"""Answers that are not finite: NaN and infinity must reach neither replay nor network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from rlx.types import Cut, EnvSpec

TRIES = 10  # first observations of a lane in a row that are not finite
MOST = float(np.finfo(np.float32).max)  # rewards are carried as float32


@runtime_checkable
class Cutting(Protocol):
    """Environments that cut an episode before an answer which is not finite.

    The lane begins its next episode: it answers with `first`, as after a truncation.
    """

    def cuts(self) -> list[Cut]:
        """The episodes that were cut since the last call."""


@runtime_checkable
class Ending(Cutting, Protocol):
    """Environments whose episodes can be ended from outside."""

    spec: EnvSpec

    def end(self, lane: np.ndarray) -> None:
        """Ends the episodes of these waiting lanes, i32[n]: the next answer of each is `first`."""


def not_finite(observation: Mapping[str, np.ndarray], reward: np.ndarray) -> np.ndarray | None:
    """bool[n]: the lanes of an answer that have a NaN or an infinity; None if no lane has."""
    floats = [leaf for leaf in observation.values() if leaf.dtype.kind == "f"]
    if (np.abs(reward) <= MOST).all() and all(np.isfinite(leaf).all() for leaf in floats):
        return None
    bad: np.ndarray = ~(np.abs(reward) <= MOST)
    for leaf in floats:
        bad |= ~np.isfinite(leaf.reshape(len(leaf), -1)).all(axis=1)
    return bad


def make_finite(observation: dict[str, np.ndarray], lanes: np.ndarray) -> None:
    """Puts 0 in the place of numbers that are not finite, in lanes bool[n] of an answer."""
    for name, leaf in observation.items():
        if leaf.dtype.kind == "f":
            observation[name] = leaf.copy()
            observation[name][lanes] = np.nan_to_num(leaf[lanes], nan=0.0, posinf=0.0, neginf=0.0)


def cut(
    lane: int, env_step: int, observation: Mapping[str, np.ndarray], reward: np.ndarray, at: int
) -> Cut:
    """Describes the answer at index `at`, of this lane."""
    answer = {"reward": np.asarray(reward[at]).copy()}
    says = "" if abs(reward[at]) <= MOST else f"the reward is {reward[at]:g}"
    says += " (rlx carries float32)" if says and np.isfinite(reward[at]) else ""
    for name, leaf in observation.items():
        answer[f"observation/{name}"] = leaf[at].copy()
        if leaf.dtype.kind == "f" and not says and not np.isfinite(leaf[at]).all():
            wrong = leaf[at][~np.isfinite(leaf[at])]
            says = (
                f"the observation {name!r} has {wrong.flat[0]:g} ({wrong.size} of {leaf[at].size})"
            )
    return Cut(lane=lane, env_step=env_step, says=says, answer=answer)
