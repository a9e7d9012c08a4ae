"""Episodes that are played to evaluate an agent, during training and after it.

The episodes that *started* first are counted, not those that ended first: short ones would weigh
too much. They are played on the CPU, beside whatever trains on the GPUs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Annotated, Any, Literal

import numpy as np

from rlx.acting.actor import InputTracker
from rlx.acting.policy import Policy
from rlx.envs.finite import TRIES, Ending
from rlx.envs.tasks import SeveralTasks
from rlx.evaluation.video import GridRecorder, VideoRecorder, not_recorded, with_values
from rlx.interfaces import Agent, Asynchronous, Env, EnvFamily
from rlx.problems import EnvironmentFailed
from rlx.seeding import spawn_int
from rlx.statistics import summarize
from rlx.types import Cut, Episode, Evaluated, Range, Timestep, Weights

JSON = dict[str, Any]

log = logging.getLogger(__name__)

# Each purpose has starts and random actions of its own: a checkpoint that was chosen by some
# episodes is not judged by the same ones. Branches of the seed, see `rlx.seeding`.
Purpose = Literal["selection", "final", "test"]
BRANCHES: dict[Purpose, tuple[str, ...]] = {
    "selection": ("evaluation", "selection"),  # evaluations during training
    "final": ("evaluation", "final"),  # the one after training
    "test": ("evaluation",),  # of a saved run
}

TELL_S = 10.0  # between two lines that say how many episodes have ended


@dataclass(frozen=True, kw_only=True)
class Other:
    """An evaluation beside the run's own: it is told of, and never makes a checkpoint the best."""

    env: dict[str, Any]  # settings of the environment that differ from the training's
    every_env_steps: Annotated[int, Range(ge=1)]
    episodes: Annotated[int, Range(ge=1)]
    epsilon: Annotated[float, Range(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """These settings of conf/evaluation say when and how a run is evaluated."""

    every_env_steps: Annotated[int, Range(ge=1)] | None
    episodes: Annotated[int, Range(ge=1)]
    final_episodes: Annotated[int, Range(ge=0)]
    epsilon: Annotated[float, Range(ge=0, le=1)]
    envs: Annotated[int, Range(ge=1)]
    max_env_steps_per_episode: Annotated[int, Range(ge=1)] | None
    where: Literal["inline", "actor"]  # actor: in a Ray actor, beside the training
    env: dict[str, Any]  # settings of the environment that differ from the training's
    others: dict[str, Other]  # further evaluations, by name

    def play(
        self,
        *,
        agent: Agent,
        weights: Weights,
        families: Mapping[str, EnvFamily],
        name: str = "",
        episodes: int,
        seed: int,
        purpose: Purpose,
        watch: Watch | None = None,
        cut: OnCut | None = None,
    ) -> list[Episode]:
        """`episodes` episodes or, of several tasks, as many of each as make no fewer.

        families: of each evaluation, by name; name: of one of `others`, '' is the run's own.
        """
        return play_tasks(
            agent=agent,
            weights=weights,
            family=families[name],
            episodes=episodes,
            lanes=self.envs,
            epsilon=self.others[name].epsilon if name else self.epsilon,
            seed=seed,
            purpose=purpose,
            name=name,
            most_env_steps=self.max_env_steps_per_episode,
            watch=watch,
            cut=cut,
        )


# --- playing -------------------------------------------------------------------------------------


def play_tasks(*, family: EnvFamily, episodes: int, lanes: int, **given: Any) -> list[Episode]:
    """`run_episodes` in at most so many lanes; of several tasks each is played by itself.

    All tasks have equally many episodes, together no fewer than `episodes`.
    """
    if not isinstance(family, SeveralTasks):
        lanes = min(lanes, episodes)
        return run_episodes(family=family, episodes=episodes, lanes=lanes, **given)
    tasks = family.tasks()
    each = -(-episodes // len(tasks))
    found = []
    for name, own in tasks.items():
        for episode in run_episodes(family=own, episodes=each, lanes=min(lanes, each), **given):
            episode.task = name
            found.append(episode)
    return found


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
    name: str = "",
    most_env_steps: int | None = None,
    watch: Watch | None = None,
    acted: Acted | None = None,
    cut: OnCut | None = None,
    render: bool = False,
) -> list[Episode]:
    """The `episodes` episodes that started first, in the order in which they started.

    `watch` sees the environment, its answer and who started what, after every step; `acted` then
    sees the actions [n, *] chosen for that answer and the agent's record of them. An episode ends
    after `most_env_steps`. One that is cut, as an answer was not finite, is told to `cut` and
    played anew from another start. Evaluations of different names share no start.
    """
    branch = (*BRANCHES[purpose], *([name] if name else []))
    seeds = [spawn_int(seed, *branch, lane) for lane in range(lanes)]
    env = _open(family, seeds, render)
    policy = Policy(agent=agent, lanes=lanes, seed=seed, path=(*branch, "policy"), device="cpu")
    policy.take(weights)
    tracker, starts = InputTracker(lanes, env.spec.action), Starts(lanes, episodes)
    limits = _Limits(env, most_env_steps, cut or _tell)
    exploration = np.full(lanes, epsilon, np.float32)
    try:
        timestep = env.reset()
        while True:
            if watch is not None:
                watch(env, timestep, starts)
            if starts.complete:
                return limits.told(starts.finished())
            index = tracker.index(timestep.lane)
            subset = None if isinstance(index, slice) else timestep.lane
            inputs = tracker.inputs(timestep, index)
            action, acting = policy.act(inputs, subset, exploration[index])
            tracker.acted(index, action)
            if acted is not None:
                acted(action, acting)
            limits.end_long_episodes(timestep, inputs.time)
            timestep = env.step(action, timestep.lane)
            starts.ended(env.episodes())
            limits.tell(starts)
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
OnCut = Callable[[Cut], None]
Acted = Callable[[np.ndarray, Any], None]


def _tell(cut: Cut) -> None:
    log.warning("an episode was cut and is played anew: %s", cut)


class _Limits:
    """Watches over episodes that have no end, or none that counts, and says how far it is."""

    def __init__(self, env: Env, most_env_steps: int | None, cut: OnCut) -> None:
        self._env = env if isinstance(env, Ending) else None
        self._most, self._on_cut, self._cuts = most_env_steps, cut, 0
        self._told_s = monotonic()

    def end_long_episodes(self, timestep: Timestep, time: np.ndarray) -> None:
        """Ends the episodes that have made the most env steps; time: i32[n], of this answer."""
        if self._env is None or self._most is None or time.max() < self._most:
            return
        over = (time >= self._most) & ~(timestep.terminated | timestep.truncated)
        if over.any():
            self._env.end(timestep.lane[over])

    def tell(self, starts: Starts) -> None:
        """Tells of episodes that were cut and, a few times a minute, of those that have ended."""
        if self._env is not None:
            self._note_cuts(self._env, starts)
        if monotonic() - self._told_s > TELL_S:
            self._told_s = monotonic()
            log.info("evaluating, %d of %d episodes", starts.count, starts.wanted)

    def _note_cuts(self, env: Ending, starts: Starts) -> None:
        for each in env.cuts():
            self._cuts += 1
            self._on_cut(each)
            if self._cuts > max(starts.wanted, TRIES):
                says = f"{self._cuts} episodes of an evaluation were cut: {each.says}"
                raise EnvironmentFailed(env.spec.id, says, each.lane)

    def told(self, episodes: list[Episode]) -> list[Episode]:
        """The episodes, after a word about those that were ended."""
        long = sum(self._most is not None and e.env_steps >= self._most for e in episodes)
        if long:
            says = "%d of %d episodes were ended after %d env steps and count with their return "
            says += "until then (evaluation.max_env_steps_per_episode)"
            log.warning(says, long, len(episodes), self._most)
        return episodes


class Starts:
    """Numbers episodes by their starts; a lane's next one starts when its last one ends."""

    def __init__(self, lanes: int, episodes: int) -> None:
        self.number = np.arange(lanes)  # of the episode each lane is in
        self.wanted, self._next = episodes, lanes
        self._ended: dict[int, Episode] = {}

    @property
    def complete(self) -> bool:
        return self.count == self.wanted

    @property
    def count(self) -> int:
        """The number of wanted episodes that have ended."""
        return len(self._ended)

    def ended(self, episodes: list[Episode]) -> None:
        for episode in episodes:
            number = int(self.number[episode.lane])
            if number < self.wanted:
                self._ended[number] = episode
            self.number[episode.lane] = self._next
            self._next += 1

    def finished(self) -> list[Episode]:
        return [self._ended[number] for number in sorted(self._ended)]


def told(
    played: Sequence[Episode],
    *,
    weights_version: int,
    env_steps: int,
    name: str = "",
    cuts: Sequence[Cut] = (),
) -> Evaluated:
    """The record of an evaluation of these episodes; env_steps: of the run, at its weights."""
    return Evaluated(
        returns=tuple(episode.return_ for episode in played),
        weights_version=weights_version,
        env_steps=env_steps,
        name=name,
        tasks=tuple(episode.task for episode in played if episode.task),
        cuts=tuple(cuts),
    )


def of_tasks(episodes: list[Episode], seed: int) -> JSON:
    """{"tasks": the statistics of each task's episodes}, where there are several."""
    names = dict.fromkeys(episode.task for episode in episodes if episode.task)
    found = {
        name: summarize([e.return_ for e in episodes if e.task == name], seed=seed)
        for name in names
    }
    return {"tasks": found} if found else {}


def evaluate(
    *,
    agent: Agent,
    weights: Weights,
    family: EnvFamily,
    episodes: int,
    lanes: int,
    epsilon: float,
    seed: int,
    most_env_steps: int | None = None,
    recorder: VideoRecorder | GridRecorder | None = None,
) -> JSON:
    """Plays episodes; returns their statistics, returns and settings, ready for JSON."""
    if recorder is not None and isinstance(family, SeveralTasks):
        raise not_recorded("the run has several tasks, whose pictures may differ")
    finished = play_tasks(
        agent=with_values(agent) if isinstance(recorder, GridRecorder) else agent,
        weights=weights,
        family=family,
        episodes=episodes,
        lanes=lanes,
        epsilon=epsilon,
        seed=seed,
        purpose="test",
        most_env_steps=most_env_steps,
        watch=recorder,
        acted=recorder.acted if isinstance(recorder, GridRecorder) else None,
        render=recorder is not None,
    )
    returns = [episode.return_ for episode in finished]
    return {
        "env_id": str(getattr(family, "id", agent.spec.id)),
        "seed": seed,
        "epsilon": epsilon,
        "envs": min(lanes, episodes),
        **summarize(returns, seed=seed),
        **of_tasks(finished, seed),
        "max_env_steps_per_episode": most_env_steps,
        "length_mean": sum(episode.env_steps for episode in finished) / len(finished),
        "returns": returns,
    }
