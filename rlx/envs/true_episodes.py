"""True episodes: those of the environment itself, counted beneath the wrappers of `env.wrappers`.

A wrapper may clip a reward, end an episode where the game goes on, or delay its end. `Beneath`
lies under all of them, in whatever process the lane is; what it counts travels as one more array
of each answer, and `ToldEpisodes` makes the reported episodes of it.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import gymnasium
import numpy as np

from rlx.types import Episode

TOLD = "true episodes, counted beneath env.wrappers"  # the leaf's name, of no environment's own
# Its numbers: of the running episode, then of one that has ended.
RETURN, ENV_STEPS, HAS_ENDED, ENDED_RETURN, ENDED_ENV_STEPS = range(5)


class Beneath(gymnasium.Wrapper):
    """Counts the return and the env steps of one environment's episodes; changes nothing.

    An env step is one of the agent's: however often the wrappers above step the environment for
    it, it counts once, and not at all if they do not step it.
    """

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self._return, self._env_steps = 0.0, 0
        self._is_new = False  # an env step of the agent's that has not been counted
        self._ended: deque[tuple[float, int]] = deque()

    def begin_env_step(self) -> None:
        """Notes that the agent acts."""
        self._is_new = True

    def forget(self) -> None:
        """Forgets the running episode, and those that were not told."""
        self._return, self._env_steps = 0.0, 0
        self._ended.clear()

    def reset(self, **given: Any) -> Any:
        """Resets; an episode that had not ended ends here."""
        answer = self.env.reset(**given)
        self._end()
        return answer

    def step(self, action: Any) -> Any:
        """Steps the environment and counts."""
        answer = self.env.step(action)
        _, reward, terminated, truncated, _ = answer
        self._return += float(np.asarray(reward, np.float64).reshape(()))
        self._env_steps += self._is_new
        self._is_new = False
        if terminated or truncated:
            self._end()
        return answer

    def _end(self) -> None:
        if self._env_steps:  # else the agent had no part in it, as in a reset's own steps
            self._ended.append((self._return, self._env_steps))
        self._return, self._env_steps = 0.0, 0

    def told(self) -> np.ndarray:
        """f64[5]: the running episode's return and env steps, and those of one that has ended."""
        self._is_new = False  # steps of a reset are none of the agent's
        ended = (1.0, *self._ended.popleft()) if self._ended else (0.0, 0.0, 0.0)
        return np.array([self._return, self._env_steps, *ended])


class ToldEpisodes:
    """Makes episodes of what `Beneath` told; has what `lanes.EpisodeCounter` has."""

    def __init__(self, *, lanes: int, frames_per_env_step: int) -> None:
        self._running = np.zeros((lanes, 2))
        self._frames_per_env_step = frames_per_env_step
        self._ended: list[Episode] = []

    def hear(self, told: np.ndarray) -> None:
        """Takes f64[N, 5] of all lanes' answers."""
        self._running = told[:, [RETURN, ENV_STEPS]]
        for lane in np.flatnonzero(told[:, HAS_ENDED]).tolist():
            self._append(lane, told[lane, ENDED_RETURN], told[lane, ENDED_ENV_STEPS])

    def restart(self) -> None:
        """Forgets the unfinished episodes of all lanes."""
        self.forget(slice(None))

    def forget(self, lane: slice | np.ndarray) -> None:
        """Forgets the unfinished episodes of these lanes."""
        self._running[lane] = 0

    def env_steps(self, lane: int) -> int:
        """The env steps of the lane's unfinished episode."""
        return int(self._running[lane, 1])

    def add(self, **answer: Any) -> None:
        """Counts nothing: `hear` has."""

    def end(self, lane: np.ndarray) -> None:
        """Counts the episodes of these lanes as ended."""
        for i in lane.tolist():
            if self._running[i, 1]:  # else a reset's own steps go on, and no episode has begun
                self._append(i, *self._running[i])
        self.forget(lane)

    def _append(self, lane: int, return_: float, env_steps: float) -> None:
        self._ended.append(
            Episode(
                return_=float(return_),
                env_steps=int(env_steps),
                frames=int(env_steps) * self._frames_per_env_step,
                lane=lane,
            )
        )

    def take(self) -> list[Episode]:
        """The episodes that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended
