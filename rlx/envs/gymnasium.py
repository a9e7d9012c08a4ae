"""Gymnasium environments: any package that registers with it, in one process or one per lane.

The stream is that of `rlx.envs.envpool`: vector mode NEXT_STEP, so the step after an episode's end
ignores its action and answers the next first observation; the true last observation is an ordinary
answer. Environments with vector code of their own are stepped one by one all the same: their reset
mode is theirs to choose, and SAME_STEP would hide the last observation.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from rlx.envs import wrapping
from rlx.envs.actions import Actions
from rlx.envs.gymnasium_spaces import action_spec, read_sources
from rlx.envs.images import Image
from rlx.envs.lanes import LaneTracker, OneThread, check_lane, check_lanes_and_seeds
from rlx.envs.observations import (
    Leaf,
    ObservationReader,
    RawSpaces,
    Source,
    env_spec,
    raw_spaces,
    select,
)
from rlx.envs.one_lane import REOPENED, OneLane
from rlx.envs.opening import Opening, by_module, id_problems, made, open_lane
from rlx.envs.per_actor import chosen, per_actor_problems, replaced
from rlx.envs.true_episodes import TOLD, ToldEpisodes
from rlx.problems import EnvironmentFailed
from rlx.types import (
    Cut,
    EnvSpec,
    Episode,
    NamesModule,
    Range,
    Timestep,
)

VECTOR = ("sync", "async")
GUARD = (
    "its processes import the script that was started: put the script's calls beneath "
    "if __name__ == '__main__':"
)
SENT = "_sent"  # in the state of settings that came from another process
# Keywords of `gymnasium.make` and `make_vec` that `kwargs` may not set, and what to do instead.
RESERVED = {
    "id": "set env.id",
    "num_envs": "lanes come from acting.envs_per_actor",
    "vectorization_mode": "set env.vector",
    "vector_kwargs": "the reset mode is always NEXT_STEP",
    "autoreset_mode": "the reset mode is always NEXT_STEP",
    "wrappers": "set env.wrappers",
    "max_episode_steps": "set env.max_episode_steps",
    "render_mode": "videos belong to the evaluation's settings",
}


@dataclass(frozen=True, kw_only=True)
class Gymnasium:
    """The settings of a gymnasium environment (an `interfaces.EnvFamily`).

    float64 observations are cast to float32, int64 ones to int32; actions reach the environment
    in its own dtype. `wrappers` are put around each lane's environment, the first one innermost;
    episodes are counted beneath them (`rlx.envs.true_episodes`).
    """

    id: Annotated[str, NamesModule()]
    kwargs: dict[str, Any]
    wrappers: list[dict[str, Any]]
    vector: Literal["sync", "async"]
    observe: str | list[str] | None
    components: list[int] | None
    scale: list[float] | None
    action_mask: str | None
    image: Image | None
    frames_per_env_step: Annotated[int, Range(ge=1)] | None
    max_episode_steps: Annotated[int, Range(ge=1, le=2**31 - 1)] | None
    restarts: Annotated[int, Range(ge=0)]  # of a lane that fails, without an episode that ends
    per_actor: dict[str, list[Any]]  # keywords of the constructor -> an element for each actor

    def problems(self, *, lanes: int | None = None) -> list[str]:
        """Says what is wrong with the settings, a line each; allocates no environment."""
        found = id_problems(self.id, sent=vars(self).get(SENT, False))
        if self.vector not in VECTOR:
            found.append(
                f"env.vector={self.vector!r}; accepted: sync, async (both reset by NEXT_STEP; "
                "an environment's own vector code may not, so it is not used)"
            )
        found += [
            f"env.kwargs.{name} is not set here: {RESERVED[name]}"
            for name in self.kwargs
            if name in RESERVED
        ]
        found += per_actor_problems(self.per_actor, RESERVED)
        return found if vars(self).get(SENT, False) else found + wrapping.problems(self.wrappers)

    def __getstate__(self) -> dict[str, Any]:
        """The settings as they travel to another process, which may have registered less."""
        return vars(self) | {SENT: True}

    def spec(self) -> EnvSpec:
        """Found from one throw-away lane. Raises ValueError (nearest ids) for an unknown id.

        With wrappers that lane is reset, and stepped once: most of them fail no earlier.
        """
        return self._describe(tried=bool(self.wrappers))[0]

    def raw_spaces(self) -> RawSpaces:
        """The raw spaces of one environment, without our adapter."""
        return self._describe()[1]

    def open(self) -> gymnasium.Env:
        """One environment in its wrappers and without rlx's lanes, for agents in use."""
        if problems := self.problems():
            raise ValueError("; ".join(problems))
        env: gymnasium.Env = made(self._opening(render=False).open, self.id)[0]
        return env

    def of_actor(self, index: int, lanes: int) -> Gymnasium:
        """The settings of one actor's lanes (a `per_actor.PerActor`)."""
        if not self.per_actor:
            return self
        own = self.kwargs | chosen(self.per_actor, index)
        return replaced(self, kwargs=own, per_actor={})

    def make(self, *, lanes: int, seeds: Sequence[int], render: bool = False) -> GymnasiumLanes:
        """`lanes` copies, seeded one by one (int32 each); `render` allows `render(lane)`."""
        checked = check_lanes_and_seeds(lanes, seeds)
        spec, own = self._describe()
        sources = tuple(leaf.source for leaf in own.leaves)
        how = self._opening(render)
        opened = [
            partial(open_lane, how, lane, sources, restarts=self.restarts) for lane in range(lanes)
        ]
        vector = made(lambda: self._vector(opened), self.id)
        named = [replace(x, source=replace(x.source, path=(x.source.name,))) for x in own.leaves]
        return GymnasiumLanes(
            vector=vector,
            spec=spec,
            reader=ObservationReader(named),
            seeds=checked,
            actions=Actions(
                spec.action, start=own.action_start, dtype=vector.single_action_space.dtype
            ),
            render=render,
            told=_told_episodes(lanes, spec) if self.wrappers else None,
        )

    def _vector(self, opened: Sequence[Callable[[], Any]]) -> Any:
        if self.vector == "sync":
            return SyncVectorEnv(opened, autoreset_mode=AutoresetMode.NEXT_STEP)
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise ValueError(f"env.vector=async: {GUARD}")
        # What a lane raises arrives here and is told in one line; gymnasium warns of it, with the
        # traceback, as well.
        warnings.filterwarnings("ignore", r"(?s)\S*ERROR: (Received|Traceback|Shutting|Raising)")
        try:  # a forked copy of a process with threads can hang
            return AsyncVectorEnv(opened, context="spawn", autoreset_mode=AutoresetMode.NEXT_STEP)
        except (EOFError, ConnectionError) as error:
            says = f"a process of env.vector=async ended at its start; {GUARD}"
            if ":" not in self.id:
                says += f". What the script registers is not known there: {by_module(self.id)}"
            raise ValueError(says) from error

    def _select(self, sources: list[Source]) -> tuple[Leaf, ...]:
        return select(
            sources,
            observe=self.observe,
            components=self.components,
            scale=self.scale,
            action_mask=self.action_mask,
            image=self.image,
        )

    def _opening(self, render: bool) -> Opening:
        wrappers = wrapping.read(self.wrappers, sent=vars(self).get(SENT, False))
        kwargs, limit = dict(self.kwargs), self.max_episode_steps
        if limit is not None:  # around wrappers, which may skip steps, it counts env steps
            kwargs["max_episode_steps"] = -1 if wrappers else limit
        if render or wrapping.has_pictures(wrappers):
            kwargs["render_mode"] = "rgb_array"
        return Opening(
            env_id=self.id,
            kwargs=kwargs | {"disable_env_checker": True},
            wrappers=tuple(wrappers),
            limit=limit if wrappers else None,
        )

    def _describe(self, *, tried: bool = False) -> tuple[EnvSpec, RawSpaces]:
        """The spec, and what the environment itself gives and takes."""
        if problems := self.problems():
            raise ValueError("; ".join(problems))
        how = self._opening(render=False)
        env, beneath = made(how.open, self.id)
        try:
            action, start = action_spec(self.id, env.action_space)
            sources = read_sources(env.observation_space)
            leaves = self._select(sources)
            frames = self.frames_per_env_step or wrapping.frames_per_env_step(
                self.id, env, beneath or env
            )
            if tried:
                read = [leaf.source for leaf in leaves]
                _try(OneLane(env, env_id=self.id, lane=0, sources=read), self.action_mask is None)
        finally:
            env.close()
        spec = env_spec(self.id, leaves, action, frames, self.action_mask)
        spec = replace(spec, said=(*spec.said, *wrapping.said(how.wrappers)))
        return spec, raw_spaces(sources, leaves, start)


class GymnasiumLanes:
    """N lanes of a gymnasium environment (an `interfaces.Env`); `Gymnasium.make` makes one.

    Every step acts in all lanes, in any order, and answers them in that order.
    """

    def __init__(
        self,
        *,
        vector: gymnasium.vector.VectorEnv,
        spec: EnvSpec,
        reader: ObservationReader,
        seeds: list[int],
        actions: Actions,
        render: bool,
        told: ToldEpisodes | None = None,
    ) -> None:
        self.spec = spec
        self.lanes: int = vector.num_envs
        self._vector = vector
        self._all = np.arange(self.lanes, dtype=np.int32)
        self._read = reader
        self._seeds: list[int] | None = seeds
        self._actions = actions
        self._render = render
        self._tracker = LaneTracker(
            lanes=self.lanes, spec=spec, actions=actions, least_in_flight=self.lanes, told=told
        )
        self._told = told  # None: no wrappers, whose answers show the true episodes
        self._sent: tuple[np.ndarray, np.ndarray] | None = None
        self._pictures: Any = None  # of all lanes, until the next answer: they come together
        self._one_thread = OneThread("one gymnasium environment")

    def reset(self) -> Timestep:
        """Starts every lane and answers all; only the first reset uses the seeds."""
        with self._one_thread:
            self._tracker.restart()
            raw, info = self._vector.reset(seed=self._seeds, options={"uncounted": True})
            self._note_reopened(info)
            self._seeds = None  # a second reset goes on with other episodes, as EnvPool's does
            no = np.zeros(self.lanes, bool)
            return self._answer(raw, np.zeros(self.lanes), no, no.copy(), self._all)

    def step(self, action: np.ndarray, lane: np.ndarray) -> Timestep:
        """Acts in all lanes. action [N, *] as the spec says; lane: i32[N], each lane once."""
        self.send(action, lane)
        return self.recv()

    def send(self, action: np.ndarray, lane: np.ndarray) -> None:
        """The first half of `step`: checks and keeps the actions."""
        with self._one_thread:
            self._tracker.claim(action, lane)
            ordered = np.empty_like(action)
            ordered[lane] = action
            self._sent = self._actions.outward(ordered), lane

    def recv(self) -> Timestep:
        """The second half of `step`: acts in all lanes."""
        with self._one_thread:
            if self._sent is None:
                raise RuntimeError("recv() without send(): the lanes wait for actions")
            (ordered, lane), self._sent = self._sent, None
            self._tracker.count()
            raw, reward, terminated, truncated, info = self._vector.step(ordered)
            self._note_reopened(info)
            return self._answer(raw, reward, terminated, truncated, lane)

    def _note_reopened(self, info: Mapping[str, Any]) -> None:
        if REOPENED in info:
            lane = np.flatnonzero(info[f"_{REOPENED}"])
            self._tracker.reopened(lane, info[REOPENED][lane].tolist())

    def _observed(self, raw: Any) -> dict[str, np.ndarray]:
        try:
            with np.errstate(over="ignore"):  # an infinity is found by what follows
                return self._read(raw)
        except ValueError as error:
            raise EnvironmentFailed(self.spec.id, str(error)) from error

    def cuts(self) -> list[Cut]:
        """The episodes that were cut since the last call."""
        return self._tracker.cuts()

    def end(self, lane: np.ndarray) -> None:
        """Ends the episodes of lanes i32[n] that wait: their next answer is `first`."""
        self._tracker.end(lane)

    def episodes(self) -> list[Episode]:
        """The episodes that ended since the last call."""
        return self._tracker.episodes()

    def render(self, lane: int) -> np.ndarray:
        """uint8[H, W, 3]: a picture of this lane; ValueError where the environment draws none."""
        if not self._render:
            raise ValueError("this environment was made without pictures; use make(render=True)")
        check_lane(lane, self.lanes)
        with self._one_thread:
            if self._pictures is None:
                self._pictures = made(self._vector.render, self.spec.id)
            picture = np.asarray(self._pictures[lane])
        if picture.ndim != 3 or picture.dtype != np.uint8:
            raise ValueError(f"{self.spec.id!r} draws {picture.dtype}{list(picture.shape)}, no RGB")
        return picture

    def close(self) -> None:
        """Ends the environments and, with `vector=async`, their processes."""
        self._vector.close()

    def _answer(
        self,
        raw: Any,
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        lane: np.ndarray,
    ) -> Timestep:
        """The answer of arrays [N, *], brought from the order of the lanes into that of `lane`."""
        self._pictures = None
        observation = self._observed(raw)
        while (anew := self._tracker.begin_anew(self._all, observation, reward)) is not None:
            options = {"reset_mask": anew, "uncounted": True}
            raw, info = self._vector.reset(options=options)
            self._note_reopened(info)
            observation = self._observed(raw)
            reward = np.where(anew, 0.0, reward)
            terminated, truncated = terminated & ~anew, truncated & ~anew
        if self._told is not None:
            self._told.hear(raw[TOLD])
        if not np.array_equal(lane, self._all):
            observation = {name: array[lane] for name, array in observation.items()}
            reward, terminated, truncated = reward[lane], terminated[lane], truncated[lane]
        reward, done = reward.astype(np.float32), terminated | truncated
        return Timestep(
            observation=observation,
            reward=reward,
            terminated=terminated,
            truncated=truncated & ~terminated,  # gymnasium sets both at a game's end on the limit
            first=self._tracker.answered(lane=lane, reward=reward, done=done, ended=done),
            lane=lane,
        )


def _told_episodes(lanes: int, spec: EnvSpec) -> ToldEpisodes:
    return ToldEpisodes(lanes=lanes, frames_per_env_step=spec.frames_per_env_step)


def _try(lane: OneLane, steps: bool) -> None:
    """Resets a lane and, if it `steps`, steps it once with any action; raises ValueError."""
    try:
        lane.reset(seed=0)
        if steps:
            lane.action_space.seed(0)
            lane.step(lane.action_space.sample())
    except EnvironmentFailed as error:
        raise ValueError(f"{error} (tried with env.wrappers)") from error
