"""Says how much each lane explores, by its global number and by the progress of the run.

An amount of 0 gives the best action the agent knows (the mode), 1 gives its samples. For an agent
without a distribution of its own the amount is epsilon, the share of random actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from rlx.types import Range

Amount = Annotated[float, Range(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """epsilon_i = base^(1 + exponent i / (N - 1)), fixed for the run (Ape-X; R2D2, section 2.3).

    With one lane it is `base`. `final_scale` < 1 shrinks every rung linearly over `decay_env_steps`
    (rltime's decayed ladder); `minimum` is a floor.
    """

    base: Amount
    exponent: Annotated[float, Range(ge=0)]
    minimum: Amount
    final_scale: Amount
    decay_env_steps: Annotated[int, Range(ge=1)] | None  # None: never shrinks

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        rung = lane / max(1, lanes - 1)
        ladder = self.base ** (1 + self.exponent * rung)
        scale = 1.0
        if self.decay_env_steps is not None:
            scale = 1 + (self.final_scale - 1) * min(1.0, env_steps / self.decay_env_steps)
        return np.maximum(self.minimum, ladder * scale).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same amount for every lane and the whole run."""

    value: Amount

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        return np.full(lane.shape, self.value, np.float32)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Every lane goes from `start` to `final` over the first `decay_env_steps` of the run."""

    start: Amount
    final: Amount
    decay_env_steps: Annotated[int, Range(ge=1)]

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        progress = min(1.0, env_steps / self.decay_env_steps)
        value = self.start + (self.final - self.start) * progress
        return np.full(lane.shape, value, np.float32)
