"""Episodes that are played to evaluate an agent, during training and after it.

The episodes that *started* first are counted, not those that ended first: short ones would weigh
too much. They are played on the CPU, beside whatever trains on the GPUs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from rlx.acting.actor import InputTracker
from rlx.acting.policy import Policy
from rlx.evaluation.video import GridRecorder, VideoRecorder, not_recorded, with_values
from rlx.interfaces import Agent, Asynchronous, Env, EnvFamily
from rlx.seeding import spawn_int
from rlx.statistics import summarize
from rlx.types import Episode, Range, Timestep, Weights

JSON = dict[str, Any]

# Each purpose has starts and random actions of its own: a checkpoint that was chosen by some
# episodes is not judged by the same ones. Branches of the seed, see `rlx.seeding`.
Purpose = Literal["selection", "final", "test"]
BRANCHES: dict[Purpose, tuple[str, ...]] = {
    "selection": ("evaluation", "selection"),  # evaluations during training
    "final": ("evaluation", "final"),  # the one after training
    "test": ("evaluation",),  # of a saved run
}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """These settings of conf/evaluation say when and how a run is evaluated."""

    every_env_steps: Annotated[int, Range(ge=1)] | None
    episodes: Annotated[int, Range(ge=1)]
    final_episodes: Annotated[int, Range(ge=0)]
    epsilon: Annotated[float, Range(ge=0, le=1)]
    envs: Annotated[int, Range(ge=1)]
    where: Literal["inline", "actor"]  # actor: in a Ray actor, beside the training

    def returns(
        self,
        *,
        agent: Agent,
        weights: Weights,
        family: EnvFamily,
        episodes: int,
        seed: int,
        purpose: Purpose,
        watch: Watch | None = None,
    ) -> list[float]:
        """The unclipped returns of `episodes` episodes."""
        finished = run_episodes(
            agent=agent,
            weights=weights,
            family=family,
            episodes=episodes,
            lanes=min(self.envs, episodes),
            epsilon=self.epsilon,
            seed=seed,
            purpose=purpose,
            watch=watch,
        )
        return [episode.return_ for episode in finished]


# --- playing -------------------------------------------------------------------------------------


def run_episodes(
    *,
    agent: Agent,
    weights: Weights,
    family: EnvFamily,
    episodes: int,
    lanes: int,
    epsilon: float,
    seed: int,
    purpose: Purpose,
    watch: Watch | None = None,
    acted: Acted | None = None,
    render: bool = False,
) -> list[Episode]:
    """The `episodes` episodes that started first, in the order in which they started.

    `watch` sees the environment, its answer and who started what, after every step; `acted` then
    sees the actions [n, *] chosen for that answer and the agent's record of them.
    """
    branch = BRANCHES[purpose]
    seeds = [spawn_int(seed, *branch, lane) for lane in range(lanes)]
    env = _open(family, seeds, render)
    policy = Policy(agent=agent, lanes=lanes, seed=seed, path=(*branch, "policy"), device="cpu")
    policy.take(weights)
    tracker, starts = InputTracker(lanes, env.spec.action), Starts(lanes, episodes)
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
            action, acting = policy.act(tracker.inputs(timestep, index), subset, exploration[index])
            tracker.acted(index, action)
            if acted is not None:
                acted(action, acting)
            timestep = env.step(action, timestep.lane)
            starts.ended(env.episodes())
    finally:
        env.close()


def _open(family: EnvFamily, seeds: list[int], render: bool) -> Env:
    # Answers of all lanes at once: else the machine's load decides which episodes start first,
    # and a batch size that suits the lanes of training may be more than there are here.
    if dataclasses.is_dataclass(family) and isinstance(family, Asynchronous):
        family = dataclasses.replace(family, batch_size=None)
    if not render:
        return family.make(lanes=len(seeds), seeds=seeds)
    drawing: Any = family  # `render` is no part of every family
    try:
        return drawing.make(lanes=len(seeds), seeds=seeds, render=True)
    except (ValueError, TypeError) as error:
        raise not_recorded(str(error)) from error


Watch = Callable[[Env, Timestep, "Starts"], None]
Acted = Callable[[np.ndarray, Any], None]


class Starts:
    """Numbers episodes by their starts; a lane's next one starts when its last one ends."""

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


def evaluate(
    *,
    agent: Agent,
    weights: Weights,
    family: EnvFamily,
    episodes: int,
    lanes: int,
    epsilon: float,
    seed: int,
    recorder: VideoRecorder | GridRecorder | None = None,
) -> JSON:
    """Plays episodes; returns their statistics, returns and settings, ready for JSON."""
    lanes = min(lanes, episodes)
    finished = run_episodes(
        agent=with_values(agent) if isinstance(recorder, GridRecorder) else agent,
        weights=weights,
        family=family,
        episodes=episodes,
        lanes=lanes,
        epsilon=epsilon,
        seed=seed,
        purpose="test",
        watch=recorder,
        acted=recorder.acted if isinstance(recorder, GridRecorder) else None,
        render=recorder is not None,
    )
    returns = [episode.return_ for episode in finished]
    return {
        "env_id": agent.spec.id,
        "seed": seed,
        "epsilon": epsilon,
        "envs": lanes,
        **summarize(returns, seed=seed),
        "length_mean": sum(episode.env_steps for episode in finished) / len(finished),
        "returns": returns,
    }
