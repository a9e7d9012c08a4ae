"""The network's input at one env step, made from the answer and the step before."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlx.envs.lanes import lane_index
from rlx.types import ActionSpec, Array, NetInput, Observation, Timestep

ONE = np.int32(1)


def network_input(
    *,
    observation: Observation,
    reward: Array,
    first: Array,
    last_action: Array,
    last_time: Array,
    action: ActionSpec,
    xp: Any,
) -> NetInput:
    """x_t of n lanes; where `first` bool[n], nothing before it counts.

    reward: f32[n], of last_action [n, *], which was taken at last_time i32[n]. xp: the namespace
    of the arrays, NumPy's or JAX's.
    """
    every_element = first.reshape(*first.shape, *(1 for _ in action.array.shape))
    none = np.asarray(action.none, action.array.dtype)
    return NetInput(
        observation=observation,
        prev_action=xp.where(every_element, none, last_action),
        prev_reward=xp.where(first, np.float32(0), reward),
        time=xp.where(first, np.int32(0), last_time + ONE),
        first=first,
    )


class InputTracker:
    """Makes of each lane's timesteps what the network reads: previous action and reward, time."""

    def __init__(self, lanes: int, action: ActionSpec) -> None:
        self._all = np.arange(lanes, dtype=np.int32)
        self._spec = action
        self._action = np.full((lanes, *action.array.shape), action.none, action.array.dtype)
        self._time = np.zeros(lanes, np.int32)

    def index(self, lane: np.ndarray) -> slice | np.ndarray:
        """The index of these lanes: a slice if it is all of them in order (much cheaper)."""
        return lane_index(lane, self._all)

    def inputs(self, timestep: Timestep, index: slice | np.ndarray) -> NetInput:
        """The network's input [n, ...] for the lanes of this answer."""
        made = network_input(
            observation=timestep.observation,
            reward=timestep.reward,
            first=timestep.first,
            last_action=self._action[index],
            last_time=self._time[index],
            action=self._spec,
            xp=np,
        )
        self._time[index] = made.time
        return made

    def acted(self, index: slice | np.ndarray, action: np.ndarray) -> None:
        """Remembers the actions just chosen."""
        self._action[index] = action
