"""MemoryChain: a bit is shown once and asked for `length` env steps later.

It is bsuite's memory task with one bit (Osband et al. 2020, "memory length"), which asks how far
back an agent can remember and nothing else. It registers with gymnasium: `env=memory_chain`.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

ID = "rlx/MemoryChain-v0"


class MemoryChain(gymnasium.Env[np.ndarray, int]):
    """Observations are f32[3]: the part of the time that is left, the question, the bit as -1 or 1.

    The question is 1 at the last observation alone, and the bit is there at the first one alone;
    elsewhere both are 0. The action after the question earns 1 if it is the bit, else -1. All
    other actions earn 0. An episode has `length + 1` env steps.
    """

    def __init__(self, *, length: int = 100) -> None:
        """Raises ValueError for a length below 1."""
        if length < 1:
            raise ValueError(f"length={length}; a chain has at least one env step to remember over")
        self._length = length
        self._time = 0
        self._bit = 0
        self.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        self._time, self._bit = 0, int(self.np_random.integers(2))
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self._time < self._length:
            self._time += 1
            return self._observation(), 0.0, False, False, {}
        reward = 1.0 if int(action) == self._bit else -1.0
        return self._observation(), reward, True, False, {}

    def _observation(self) -> np.ndarray:
        left = 1 - self._time / self._length
        asked = float(self._time == self._length)
        shown = 2.0 * self._bit - 1 if self._time == 0 else 0.0
        return np.array([left, asked, shown], np.float32)


gymnasium.register(ID, entry_point=MemoryChain)
