"""Gymnasium environments: any package that registers with it, in one process or one per lane.

The stream is that of `rlx.envs.envpool`: vector mode NEXT_STEP, so the step after an episode's end
ignores its action and answers the next first observation; the true last observation is an ordinary
answer. Environments with vector code of their own are stepped one by one all the same: their reset
mode is theirs to choose, and SAME_STEP would hide the last observation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from rlx.envs.actions import Actions, Start
from rlx.envs.lanes import LaneTracker, OneThread, check_lane, check_lanes_and_seeds
from rlx.envs.observations import (
    Leaf,
    ObservationReader,
    RawSpaces,
    Source,
    check_mask,
    leaf_name,
    nearest,
    raw_spaces,
    select,
)
from rlx.types import (
    ActionSpec,
    BoxSpec,
    DiscreteSpec,
    EnvSpec,
    Episode,
    MultiDiscreteSpec,
    NamesModule,
    Range,
    Timestep,
)

VECTOR = ("sync", "async")
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
    max_episode_steps: Annotated[int, Range(ge=1)] | None

    def problems(self, *, lanes: int | None = None) -> list[str]:
        """Says what is wrong with the settings, a line each; allocates no environment."""
        found = _id_problems(self.id)
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

    def spec(self) -> EnvSpec:
        """Found from one throw-away lane. Raises ValueError (nearest ids) for an unknown id."""
        return self._describe()[0]

    def raw_spaces(self) -> RawSpaces:
        """The raw spaces of one environment, without our adapter."""
        return self._describe()[2]

    def make(self, *, lanes: int, seeds: Sequence[int], render: bool = False) -> GymnasiumLanes:
        """`lanes` copies, seeded one by one (int32 each); `render` allows `render(lane)`."""
        checked = check_lanes_and_seeds(lanes, seeds)
        spec, reader, own = self._describe()
        kwargs: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        if self.vector == "async":
            kwargs["context"] = "spawn"  # a forked copy of a process with threads can hang
        vector = gymnasium.make_vec(
            self.id,
            num_envs=lanes,
            vectorization_mode=self.vector,
            vector_kwargs=kwargs,
            **self._make_kwargs(render),
        )
        return GymnasiumLanes(
            vector=vector,
            spec=spec,
            reader=reader,
            seeds=checked,
            actions=Actions(
                spec.action, start=own.action_start, dtype=vector.single_action_space.dtype
            ),
            render=render,
        )

    def _select(self, sources: list[Source]) -> tuple[Leaf, ...]:
        return select(
            sources,
            observe=self.observe,
            components=self.components,
            scale=self.scale,
            action_mask=self.action_mask,
        )

    def _make_kwargs(self, render: bool) -> dict[str, Any]:
        kwargs = dict(self.kwargs)
        if self.max_episode_steps is not None:
            kwargs["max_episode_steps"] = self.max_episode_steps
        if render:
            kwargs["render_mode"] = "rgb_array"
        return kwargs | {"disable_env_checker": True}

    def _describe(self) -> tuple[EnvSpec, ObservationReader, RawSpaces]:
        """The spec, the reader of observations and what the environment itself gives and takes."""
        if problems := self.problems():
            raise ValueError("; ".join(problems))
        env = _made(lambda: gymnasium.make(self.id, **self._make_kwargs(render=False)), self.id)
        try:
            action, start = _action_spec(self.id, env.action_space)
            sources = _sources(self.id, env.observation_space)
            leaves = self._select(sources)
        finally:
            env.close()
        observation = {leaf.source.name: leaf.spec for leaf in leaves}
        spec = EnvSpec(
            id=self.id,
            observation=observation,
            action=action,
            frames_per_env_step=1,
            action_mask=self.action_mask,
        )
        return check_mask(spec), ObservationReader(leaves), raw_spaces(sources, leaves, start)


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
            return self._answer(raw, np.zeros(self.lanes), no, no.copy(), self._all_lanes())

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

    def _all_lanes(self) -> np.ndarray:
        return np.arange(self.lanes, dtype=np.int32)

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
        observation = self._read(raw)
        if not np.array_equal(lane, self._all_lanes()):
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


def _id_problems(env_id: str) -> list[str]:
    """None for a registered id, or 'module:id' after importing that module."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
    except (ImportError, ValueError) as error:  # the latter: an empty name
        return [f"env.id={env_id!r}: {error}; install the package that registers {name!r}"]
    if name in gymnasium.registry:
        return []
    return [
        f"env.id={env_id!r} is not registered with gymnasium; "
        f"{nearest(name, gymnasium.registry)} ('module:id' imports the module that registers it)"
    ]


def _made(make: Callable[[], Any], env_id: str) -> Any:
    """Calls `make`; raises one line that names the id if something (a package) is missing."""
    try:
        return make()
    except Exception as error:  # it is anybody's code
        line = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"env.id={env_id!r} does not work here: {line}") from error


def _sources(env_id: str, space: Any, path: tuple[str, ...] = ()) -> list[Source]:
    """The arrays of an observation space; nested dicts are flattened."""
    if isinstance(space, gymnasium.spaces.Dict):
        return [s for key, part in space.items() for s in _sources(env_id, part, (*path, str(key)))]
    if space.shape is None or space.dtype is None or space.dtype.kind not in "biuf":
        raise ValueError(f"env.id={env_id!r} observes {space}; accepted: (dicts of) numeric arrays")
    shape, dtype = tuple(space.shape), space.dtype.name
    return [Source(name=leaf_name(path), path=path, shape=shape, dtype=dtype)]


def _action_spec(env_id: str, space: Any) -> tuple[ActionSpec, Start]:
    """The action's spec and the number of the first action."""
    spaces = gymnasium.spaces
    if isinstance(space, spaces.Discrete):
        return DiscreteSpec(n=int(space.n)), int(space.start)
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        counts = MultiDiscreteSpec(counts=tuple(space.nvec.tolist()))
        return counts, tuple(space.start.tolist())
    if isinstance(space, spaces.MultiBinary) and len(space.shape) == 1:
        return MultiDiscreteSpec(counts=(2,) * space.shape[0]), 0
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":
        low, high = space.low.ravel().tolist(), space.high.ravel().tolist()
        return BoxSpec(shape=tuple(space.shape), low=tuple(low), high=tuple(high)), 0
    found = " ".join(str(space).split())  # arrays print over several lines
    raise ValueError(
        f"env.id={env_id!r} takes {found}; accepted: Discrete, MultiDiscrete and MultiBinary of "
        "one axis, and Box of floats"
    )
