"""Evaluation, during training and after it: `python -m rlx.evaluate run=DIR episodes=100`.

The episodes that *started* first are counted, not those that ended first: short ones would weigh
too much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from rlx.acting.actor import InputTracker
from rlx.acting.policy import Policy
from rlx.interfaces import Agent, Env, EnvFamily
from rlx.seeding import spawn_int
from rlx.types import Episode, Range, Timestep, Weights


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When and how a run is evaluated (conf/evaluation)."""

    every_env_steps: Annotated[int, Range(ge=1)] | None
    episodes: Annotated[int, Range(ge=1)]
    final_episodes: Annotated[int, Range(ge=0)]
    epsilon: Annotated[float, Range(ge=0, le=1)]
    envs: Annotated[int, Range(ge=1)]

    def returns(
        self, *, agent: Agent, weights: Weights, family: EnvFamily, episodes: int, seed: int
    ) -> list[float]:
        """Unclipped returns of that many episodes."""
        finished = run_episodes(
            agent=agent,
            weights=weights,
            family=family,
            episodes=episodes,
            lanes=min(self.envs, episodes),
            epsilon=self.epsilon,
            seed=seed,
        )
        return [episode.ret for episode in finished]


def run_episodes(
    *,
    agent: Agent,
    weights: Weights,
    family: EnvFamily,
    episodes: int,
    lanes: int,
    epsilon: float,
    seed: int,
    watch: Callable[[Env, Timestep, Starts], None] | None = None,
    render: bool = False,
) -> list[Episode]:
    """The `episodes` episodes that started first, in the order in which they started.

    `watch` sees the environment, its answer and who started what, after every step.
    """
    seeds = [spawn_int(seed, "evaluation", lane) for lane in range(lanes)]
    options = {"render": True} if render else {}
    env = family.make(lanes=lanes, seeds=seeds, **options)
    policy = Policy(
        agent=agent, lanes=lanes, seed=seed, path=("evaluation", "policy"), device="cpu"
    )
    policy.take(weights)
    tracker, starts = InputTracker(lanes), Starts(lanes, episodes)
    exploration = np.full(lanes, epsilon, np.float32)
    try:
        timestep = env.reset()
        while True:
            if watch is not None:
                watch(env, timestep, starts)
            if starts.complete:
                return starts.finished()
            index = tracker.index(timestep.lane)
            subset = None if isinstance(index, slice) else timestep.lane
            action, _ = policy.act(tracker.inputs(timestep, index), subset, exploration[index])
            tracker.acted(index, action)
            timestep = env.step(action, timestep.lane)
            starts.ended(env.episodes())
    finally:
        env.close()


class Starts:
    """Numbers episodes by when they started: a lane's next one starts where its last one ended."""

    def __init__(self, lanes: int, episodes: int) -> None:
        self.number = np.arange(lanes)  # of the episode each lane is in
        self._wanted, self._next = episodes, lanes
        self._ended: dict[int, Episode] = {}

    @property
    def complete(self) -> bool:
        return len(self._ended) == self._wanted

    def ended(self, episodes: list[Episode]) -> None:
        for episode in episodes:
            number = int(self.number[episode.lane])
            if number < self._wanted:
                self._ended[number] = episode
            self.number[episode.lane] = self._next
            self._next += 1

    def finished(self) -> list[Episode]:
        return [self._ended[number] for number in sorted(self._ended)]
