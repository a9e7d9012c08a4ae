"""Several environments with equal spaces in one run: each lane plays one of them (`env=tasks`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np

from rlx.envs.lanes import check_lane, check_lanes_and_seeds
from rlx.envs.observations import RawSpaces
from rlx.envs.per_actor import PerActor, replaced
from rlx.interfaces import CheckedFamily, EnvFamily, Outward, ThinFamily
from rlx.problems import Problem, first_line
from rlx.types import Cut, EnvSpec, Episode, NamesModule, Timestep


@runtime_checkable
class SeveralTasks(Protocol):
    """An environment family whose lanes play several environments."""

    def tasks(self) -> Mapping[str, EnvFamily]:
        """The family of each environment, by its name."""


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """The settings of several tasks (an `interfaces.EnvFamily`); conf/env/tasks.yaml.

    The lanes of actor i, counted over all learner processes, follow those of actor i - 1; the n-th
    lane plays task n modulo their number.
    """

    ids: Annotated[list[str], NamesModule()]
    family: EnvFamily  # all else; its own id is not used
    first_lane: int = 0  # of the run, among the lanes that are made

    def tasks(self) -> Mapping[str, EnvFamily]:
        """The family of each task by its id (a SeveralTasks)."""
        own: Any = self.family
        return {each: replaced(own, id=each) for each in self.ids}

    @property
    def needs_jax(self) -> bool:
        """Says whether the processes of its environments must load JAX."""
        return self.family.needs_jax if isinstance(self.family, ThinFamily) else True

    def problems(self, *, lanes: int | None = None) -> list[str]:
        """Says what is wrong with the settings, a line each; no environment stays open."""
        if len(set(self.ids)) < len(self.ids) or len(self.ids) < 2:
            return [f"env.ids={self.ids}: give two or more ids, each of them once"]
        if not hasattr(self.family, "id"):
            return [f"env.family: {type(self.family).__name__} has no id to choose a task by"]
        if getattr(self.family, "batch_size", None) is not None:
            return ["env.family.batch_size: lanes of several tasks answer together; set it to null"]
        found = []
        for name, own in self.tasks().items():
            said = own.problems(lanes=None) if isinstance(own, CheckedFamily) else ()
            found += [f"env.ids: {name}: {line}" for line in said]
        return found or self._unequal()

    def _unequal(self) -> list[str]:
        try:
            specs = self._specs
        except ValueError as error:
            return [f"env.ids: {first_line(error)}"]
        first = specs[0]
        for other in specs[1:]:
            for name in ("observation", "action", "action_mask", "frames_per_env_step"):
                here, there = getattr(first, name), getattr(other, name)
                if here != there:
                    says = f"{name} is {_shown(there)} in {other.id} and {_shown(here)} in "
                    return [f"env.ids: {says}{first.id}; tasks of one run have equal spaces"]
        return []

    @staticmethod
    def clashes(settings: Mapping[str, Any]) -> Sequence[Problem]:
        """Every task needs a lane; settings: of one of the learner processes."""
        acting, ids = settings["acting"], settings["env"]["ids"]
        lanes = acting["instances"] * acting["envs_per_actor"] * settings["learner"]["processes"]
        if lanes >= len(ids):
            return []
        says = f"{lanes} lanes play {lanes} of the {len(ids)} tasks; raise acting.envs_per_actor"
        return [Problem(path="env.ids", given=str(len(ids)), says=says)]

    @cached_property
    def _specs(self) -> list[EnvSpec]:
        return [own.spec() for own in self.tasks().values()]

    def spec(self) -> EnvSpec:
        """The spec of all of them; raises ValueError where they are not alike."""
        if problems := self.problems():
            raise ValueError("; ".join(problems))
        return replace(self._specs[0], id=", ".join(self.ids))

    def raw_spaces(self) -> RawSpaces:
        """The raw spaces of the first task's environment."""
        first = next(iter(self.tasks().values()))
        if not isinstance(first, Outward):
            raise ValueError(f"{type(first).__name__} does not say what its environments give")
        found: RawSpaces = first.raw_spaces()
        return found

    def of_actor(self, index: int, lanes: int) -> Tasks:
        """The settings of one actor's lanes (a `per_actor.PerActor`)."""
        own = self.family
        family = own.of_actor(index, lanes) if isinstance(own, PerActor) else own
        return replaced(self, first_lane=index * lanes, family=family)

    def make(self, *, lanes: int, seeds: Sequence[int], render: bool = False) -> TaskLanes:
        """`lanes` environments, seeded one by one (int32 each)."""
        checked = np.array(check_lanes_and_seeds(lanes, seeds))
        task_of = (self.first_lane + np.arange(lanes)) % len(self.ids)
        parts, spec = [], self.spec()
        given: dict[str, Any] = {"render": True} if render else {}
        with ExitStack() as undo:
            for number, (name, own) in enumerate(self.tasks().items()):
                if len(at := np.flatnonzero(task_of == number)):
                    env = own.make(lanes=len(at), seeds=checked[at].tolist(), **given)
                    undo.callback(env.close)
                    parts.append(Part(task=name, env=env, lanes=at))
            undo.pop_all()
        return TaskLanes(parts, spec)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in value.items())
    return str(value)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The environments of one task."""

    task: str
    env: Any  # an interfaces.Env; evaluations also use what some of them have more
    lanes: np.ndarray  # intp[n]: their numbers among all lanes


class TaskLanes:
    """N lanes of several tasks (an `interfaces.Env`), which all act in each step."""

    def __init__(self, parts: Sequence[Part], spec: EnvSpec) -> None:
        self.spec = spec
        self._parts = parts
        self.lanes = sum(len(part.lanes) for part in parts)
        self._all = np.arange(self.lanes, dtype=np.int32)
        # The answers of the parts side by side, brought into the order of the lanes.
        self._order = np.argsort(np.concatenate([part.lanes for part in parts]))
        self._own = [np.arange(len(part.lanes), dtype=np.int32) for part in parts]

    def reset(self) -> Timestep:
        """Starts every lane and answers all."""
        return self._joined([part.env.reset() for part in self._parts])

    def step(self, action: np.ndarray, lane: np.ndarray) -> Timestep:
        """Acts in all lanes. action [N, *] as the spec says; lane: i32[N], each lane once."""
        self.send(action, lane)
        return self.recv()

    def send(self, action: np.ndarray, lane: np.ndarray) -> None:
        """The first half of `step`: the lanes begin."""
        if len(lane) != self.lanes:
            raise ValueError(f"{len(lane)} lanes acted in; lanes of several tasks answer together")
        if not np.array_equal(lane, self._all):
            ordered = np.empty_like(action)
            ordered[lane] = action
            action = ordered
        for part, own in zip(self._parts, self._own, strict=True):
            part.env.send(action[part.lanes], own)

    def recv(self) -> Timestep:
        """The second half of `step`: waits for the answer of all."""
        return self._joined([_in_order(part.env.recv()) for part in self._parts])

    def _joined(self, answers: Sequence[Timestep]) -> Timestep:
        def join(*leaves: np.ndarray) -> np.ndarray:
            return np.concatenate(leaves)[self._order]

        names = answers[0].observation
        scalars = ("reward", "terminated", "truncated", "first")
        return Timestep(
            observation={name: join(*(a.observation[name] for a in answers)) for name in names},
            lane=self._all,
            **{name: join(*(getattr(a, name) for a in answers)) for name in scalars},
        )

    def episodes(self) -> list[Episode]:
        """The episodes that ended since the last call, with their tasks."""
        found = []
        for part in self._parts:
            for episode in part.env.episodes():
                episode.task, episode.lane = part.task, int(part.lanes[episode.lane])
                found.append(episode)
        return found

    def cuts(self) -> list[Cut]:
        """The episodes that were cut since the last call."""
        return [
            replace(cut, lane=int(part.lanes[cut.lane]))
            for part in self._parts
            if hasattr(part.env, "cuts")
            for cut in part.env.cuts()
        ]

    def render(self, lane: int) -> np.ndarray:
        """uint8[H, W, 3]: a picture of this lane."""
        check_lane(lane, self.lanes)
        for part in self._parts:
            if len(at := np.flatnonzero(part.lanes == lane)):
                picture: np.ndarray = part.env.render(int(at[0]))
                return picture
        raise AssertionError("unreachable: every lane is in a part")

    def close(self) -> None:
        """Ends the environments of all tasks."""
        with ExitStack() as ends:  # all of them, whatever one may raise
            for part in self._parts:
                ends.callback(part.env.close)


def _in_order(answer: Timestep) -> Timestep:
    """The answer with its lanes in ascending order."""
    order = np.argsort(answer.lane)
    if np.array_equal(order, np.arange(len(order))):
        return answer
    return Timestep(
        observation={name: leaf[order] for name, leaf in answer.observation.items()},
        reward=answer.reward[order],
        terminated=answer.terminated[order],
        truncated=answer.truncated[order],
        first=answer.first[order],
        lane=answer.lane[order],
    )
