"""Gymnasium environments: any package that registers with it, in one process or one per lane.

The stream is that of `rlx.envs.envpool`: vector mode NEXT_STEP, so the step after an episode's end
ignores its action and answers the next first observation; the true last observation is an ordinary
answer. Environments with vector code of their own are stepped one by one all the same: their reset
mode is theirs to choose, and SAME_STEP would hide the last observation.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

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
    nearest,
    raw_spaces,
    select,
)
from rlx.envs.one_lane import OneLane
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
    "wrappers": "register an id whose entry point wraps",
    "max_episode_steps": "set env.max_episode_steps",
    "render_mode": "videos belong to the evaluation's settings",
}


@dataclass(frozen=True, kw_only=True)
class Gymnasium:
    """The settings of a gymnasium environment (an `interfaces.EnvFamily`).

    float64 observations are cast to float32, int64 ones to int32; actions reach the environment
    in its own dtype.
    """

    id: Annotated[str, NamesModule()]
    kwargs: dict[str, Any]
    vector: Literal["sync", "async"]
    observe: str | list[str] | None
    components: list[int] | None
    scale: list[float] | None
    action_mask: str | None
    image: Image | None
    frames_per_env_step: Annotated[int, Range(ge=1)] | None
    max_episode_steps: Annotated[int, Range(ge=1, le=2**31 - 1)] | None

    def problems(self, *, lanes: int | None = None) -> list[str]:
        """Says what is wrong with the settings, a line each; allocates no environment."""
        found = _id_problems(self.id, sent=vars(self).get(SENT, False))
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
        return found

    def __getstate__(self) -> dict[str, Any]:
        """The settings as they travel to another process, which may have registered less."""
        return vars(self) | {SENT: True}

    def spec(self) -> EnvSpec:
        """Found from one throw-away lane. Raises ValueError (nearest ids) for an unknown id."""
        return self._describe()[0]

    def raw_spaces(self) -> RawSpaces:
        """The raw spaces of one environment, without our adapter."""
        return self._describe()[1]

    def make(self, *, lanes: int, seeds: Sequence[int], render: bool = False) -> GymnasiumLanes:
        """`lanes` copies, seeded one by one (int32 each); `render` allows `render(lane)`."""
        checked = check_lanes_and_seeds(lanes, seeds)
        spec, own = self._describe()
        sources = tuple(leaf.source for leaf in own.leaves)
        opened = [
            partial(open_lane, self.id, self._make_kwargs(render), lane, sources)
            for lane in range(lanes)
        ]
        vector = _made(lambda: self._vector(opened), self.id)
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
                says += f". What the script registers is not known there: {_by_module(self.id)}"
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

    def _make_kwargs(self, render: bool) -> dict[str, Any]:
        kwargs = dict(self.kwargs)
        if self.max_episode_steps is not None:
            kwargs["max_episode_steps"] = self.max_episode_steps
        if render:
            kwargs["render_mode"] = "rgb_array"
        return kwargs | {"disable_env_checker": True}

    def _describe(self) -> tuple[EnvSpec, RawSpaces]:
        """The spec, and what the environment itself gives and takes."""
        if problems := self.problems():
            raise ValueError("; ".join(problems))
        env = _made(lambda: gymnasium.make(self.id, **self._make_kwargs(render=False)), self.id)
        try:
            action, start = action_spec(self.id, env.action_space)
            sources = read_sources(env.observation_space)
            leaves = self._select(sources)
            frames = self.frames_per_env_step or _frames_per_env_step(self.id, env)
        finally:
            env.close()
        spec = env_spec(self.id, leaves, action, frames, self.action_mask)
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
            lanes=self.lanes, spec=spec, actions=actions, least_in_flight=self.lanes
        )
        self._sent: tuple[np.ndarray, np.ndarray] | None = None
        self._pictures: Any = None  # of all lanes, until the next answer: they come together
        self._one_thread = OneThread("one gymnasium environment")

    def reset(self) -> Timestep:
        """Starts every lane and answers all; only the first reset uses the seeds."""
        with self._one_thread:
            self._tracker.restart()
            raw, _ = self._vector.reset(seed=self._seeds)
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
            raw, reward, terminated, truncated, _ = self._vector.step(ordered)
            return self._answer(raw, reward, terminated, truncated, lane)

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
                self._pictures = _made(self._vector.render, self.spec.id)
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
            raw, _ = self._vector.reset(options={"reset_mask": anew})
            observation = self._observed(raw)
            reward = np.where(anew, 0.0, reward)
            terminated, truncated = terminated & ~anew, truncated & ~anew
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


def _id_problems(env_id: str, *, sent: bool) -> list[str]:
    """None for a registered id, or 'module:id' after importing that module.

    sent: whether another process gave the id, where it was registered.
    """
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
    except (ImportError, ValueError) as error:  # the latter: an empty name
        return [f"env.id={env_id!r}: {error}; install the package that registers {name!r}"]
    if name in gymnasium.registry:
        return []
    if sent and not module:
        return [
            f"env.id={env_id!r} was registered where the run was started, not in this process of "
            f"its actors; {_by_module(name)}"
        ]
    return [
        f"env.id={env_id!r} is not registered with gymnasium; "
        f"{nearest(name, gymnasium.registry)} ('module:id' imports the module that registers it)"
    ]


def _by_module(name: str) -> str:
    return f"give env.id=module:{name}, with the module that registers it"


def _made(make: Callable[[], Any], env_id: str) -> Any:
    """Calls `make`; raises one line that names the id if something (a package) is missing."""
    try:
        return make()
    except EnvironmentFailed:
        raise
    except (Exception, SystemExit) as error:  # it is anybody's code
        line = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"env.id={env_id!r} does not work here: {line}") from error


def open_lane(env_id: str, kwargs: Mapping[str, Any], lane: int, sources: Sequence[Source]) -> Any:
    """One environment of a vector, in whatever process it is."""
    if problems := _id_problems(env_id, sent=multiprocessing.parent_process() is not None):
        raise EnvironmentFailed(env_id, problems[0], lane)
    env = gymnasium.make(env_id, **kwargs)
    return OneLane(env, env_id=env_id, lane=lane, sources=sources)


def _frames_per_env_step(env_id: str, env: Any) -> int:
    """The emulator's frames of an env step: 1 of an environment without an emulator.

    ALE skips frames, and wrappers (AtariPreprocessing, MaxAndSkipObservation) skip its steps.
    """
    if not hasattr(env.unwrapped, "ale"):
        return 1
    skips, layer = [getattr(env.unwrapped, "_frameskip", 1)], env
    while isinstance(layer, gymnasium.Wrapper):
        own = vars(layer)
        skips += [own[name] for name in ("frame_skip", "_skip") if name in own]
        layer = layer.env
    if not all(isinstance(skip, int) for skip in skips):
        raise ValueError(
            f"env.id={env_id!r} skips {skips} frames, by chance; set env.kwargs.frameskip to a "
            "number, or env.frames_per_env_step to what is to be counted"
        )
    return math.prod(skips)
