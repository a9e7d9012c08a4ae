"""EnvPool environments: Atari, MiniGrid, MuJoCo, classic control, toy text and more.

Every trap of EnvPool 1.2 that rlx knows of is handled here and nowhere else:
- The step after an episode's end ignores its action and answers the next first observation.
- Asynchronous answers come in any order: everything is indexed by `info:env_id`.
- It checks no actions, and a wrong call aborts the process: `LaneTracker.claim` checks before it.
- It clips no actions either, MuJoCo's least of all: `Actions.outward` does.
- Its `terminated` is False when a game is over exactly at the time limit; Atari's info tells the
  truth. Other environments tell it nowhere: there such an end counts as truncated.
- Its `reward` may be clipped; Atari's info has the raw one.
- `episodic_life` ends an episode for learning at each life; `Episode` records are whole games.
- The first axis of emulator frames is its own frame stack: rlx wants single frames, [1, H, W] grey
  or [3, H, W] colour, and stacks them in the network (the same bits: a test).
- Rendering without the graphics library it needs aborts the process: a child process tries first.

Not reachable through EnvPool: saving and restoring an environment's state.
"""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import envpool
import numpy as np

from rlx.envs.actions import Actions
from rlx.envs.envpool_options import STACKS, option_problems, untried
from rlx.envs.envpool_spaces import action_spec, read_sources
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
from rlx.envs.per_actor import chosen, per_actor_problems, replaced
from rlx.problems import Problem
from rlx.types import (
    Cut,
    EnvSpec,
    Episode,
    Range,
    Timestep,
)

RENDER_TRIAL = """
import sys, envpool
env = envpool.make_gymnasium(sys.argv[1], num_envs=1, render_mode="rgb_array")
env.reset()
env.render(env_ids=0)
"""

OPEN_TRIAL = """
import json, sys, envpool, numpy
env = envpool.make_gymnasium(sys.argv[1], num_envs=1, num_threads=1, **json.loads(sys.argv[2]))
env.reset()
for _ in range(3):
    env.step(numpy.stack([env.action_space.sample()]))
"""


@dataclass(frozen=True, kw_only=True)
class EnvPool:
    """The settings of an EnvPool environment (an `interfaces.EnvFamily`); see conf/env/*.yaml.

    float64 observations are cast to float32, int64 ones to int32.
    """

    id: str
    observe: str | list[str] | None
    components: list[int] | None
    scale: list[float] | None
    action_mask: str | None
    image: Image | None
    max_episode_steps: Annotated[int, Range(ge=1, le=2**31 - 1)] | None
    batch_size: Annotated[int, Range(ge=1)] | None
    threads: Annotated[int, Range(ge=0, le=1024)]
    options: dict[str, Any]
    per_actor: dict[str, list[Any]]  # options -> an element for each actor
    needs_jax: ClassVar[bool] = False

    def problems(self, *, lanes: int | None = None) -> list[str]:
        """Says what is wrong with the settings, a line each; allocates no environment."""
        if self.id not in envpool.list_all_envs():
            return [_unknown_id(self.id)]
        try:
            defaults = _make_spec(self.id).config._asdict()
        except (ImportError, RuntimeError) as error:
            return [f"env.id={self.id!r} does not load here: {_first_line(error)}"]
        found = option_problems(self.id, self.options, defaults)
        found += per_actor_problems(self.per_actor, {})
        for actor in range(max(map(len, self.per_actor.values()), default=0) if not found else 0):
            own = self.of_actor(actor, 1).options
            found = found or option_problems(self.id, own, defaults)
        found += _batch_problems(self.batch_size, lanes)
        if not found:
            try:
                self.spec()
            except ValueError as error:
                found.append(_first_line(error))
        if not found and untried(self.options, defaults):
            own = self._env_options(self._raw_spec().config._asdict())
            if reason := _failure(OPEN_TRIAL, self.id, json.dumps(own)):
                found.append(f"env.options={self.options}: {self.id!r} cannot be opened ({reason})")
        return found

    @staticmethod
    def clashes(settings: Mapping[str, Any]) -> Sequence[Problem]:
        """No more lanes can answer at a time than an actor has."""
        answering, lanes = settings["env"]["batch_size"], settings["acting"]["envs_per_actor"]
        if answering is None or answering <= lanes:
            return []
        says = f"accepted: 1 .. {lanes} (acting.envs_per_actor), or null for all lanes at once"
        return [Problem(path="env.batch_size", given=str(answering), says=says)]

    def spec(self) -> EnvSpec:
        """Describes one lane; raises ValueError, with the nearest ids, for an unknown id."""
        raw = self._raw_spec()
        config = raw.config._asdict()
        leaves = self._select(read_sources(raw))
        frames = config["frame_skip"] if _is_atari(config) else 1
        return env_spec(self.id, leaves, action_spec(self.id, raw), frames, self.action_mask)

    def raw_spaces(self) -> RawSpaces:
        """The raw spaces of one environment, without our adapter; frames are single there, too."""
        sources = read_sources(self._raw_spec())
        return raw_spaces(sources, self._select(sources), 0)

    def of_actor(self, index: int, lanes: int) -> EnvPool:
        """The settings of one actor's lanes (a `per_actor.PerActor`)."""
        if not self.per_actor:
            return self
        own = self.options | chosen(self.per_actor, index)
        return replaced(self, options=own, per_actor={})

    def make(self, *, lanes: int, seeds: Sequence[int], render: bool = False) -> EnvPoolLanes:
        """`lanes` copies, seeded one by one (int32 each); `render` allows `render(lane)`.

        Equal seeds give equal streams, whatever the number of lanes, threads or the batch size.
        """
        if problems := self.problems(lanes=lanes):
            raise ValueError("; ".join(problems))
        if render and (reason := _failure(RENDER_TRIAL, self.id)):
            raise ValueError(
                f"env.id={self.id!r} cannot be rendered here ({reason}); turn video off"
            )
        return EnvPoolLanes(
            pool=self.open(lanes=lanes, seeds=seeds, render=render),
            spec=self.spec(),
            reader=ObservationReader(self._select(read_sources(self._raw_spec()))),
            render=render,
        )

    def open(self, *, lanes: int, seeds: Sequence[int], render: bool = False) -> Any:
        """Opens EnvPool's own object with these settings, without our adapter (to measure it)."""
        return envpool.make_gymnasium(
            self.id,
            num_envs=lanes,
            batch_size=self.batch_size or lanes,
            num_threads=self.threads,
            seed=check_lanes_and_seeds(lanes, seeds),
            **self._env_options(self._raw_spec().config._asdict()),
            **({"render_mode": "rgb_array"} if render else {}),
        )

    def _select(self, sources: list[Source]) -> tuple[Leaf, ...]:
        return select(
            sources,
            observe=self.observe,
            components=self.components,
            scale=self.scale,
            action_mask=self.action_mask,
            image=self.image,
        )

    def _raw_spec(self) -> Any:
        """EnvPool's own spec, with these settings."""
        if self.id not in envpool.list_all_envs():
            raise ValueError(_unknown_id(self.id))
        defaults = _make_spec(self.id).config._asdict()
        if problems := option_problems(self.id, self.options, defaults):
            raise ValueError("; ".join(problems))
        return _make_spec(self.id, **self._env_options(defaults))

    def _env_options(self, config: dict[str, Any]) -> dict[str, Any]:
        """The settings of the environment itself, as EnvPool's keywords."""
        options = {name: 1 for name in STACKS if name in config}
        if self.max_episode_steps is not None:
            options["max_episode_steps"] = self.max_episode_steps
        own = {k: v for k, v in self.options.items() if k not in STACKS}
        return options | own


class EnvPoolLanes:
    """N lanes of an EnvPool environment (an `interfaces.Env`); `EnvPool.make` makes one.

    Synchronous: answers exactly the lanes it was given, in their order. Asynchronous
    (`batch_size` < N): answers the first `batch_size` lanes that are ready.
    One thread at a time may call it. It calls EnvPool's compiled `_send` and `_recv`: the Python
    around them costs 30 us an env step of 32 lanes, as much as all that rlx does (2026-11-24).
    """

    def __init__(
        self, *, pool: Any, spec: EnvSpec, reader: ObservationReader, render: bool
    ) -> None:
        config = pool.config
        self.spec = spec
        self.lanes: int = config["num_envs"]
        self._pool = pool
        self._answer_names = pool._state_keys
        dtype = pool.spec.action_array_spec[pool._action_keys[-1]].dtype
        self._actions = Actions(spec.action, dtype=dtype)
        self._read = reader
        self._render = render
        # A synchronous pool answers any subset, an asynchronous one only whole batches.
        batch_size: int = config["batch_size"]
        least = batch_size if batch_size < self.lanes else 1
        self._tracker = LaneTracker(
            lanes=self.lanes, spec=spec, actions=self._actions, least_in_flight=least
        )
        self._one_thread = OneThread("one EnvPool environment")
        self._started = False
        self._atari = _is_atari(config)
        self._reward = "info:reward" if self._atari else "reward"  # the raw one
        self._in_batches = batch_size < self.lanes
        self._lives = np.zeros(self.lanes, np.int32) if config.get("episodic_life") else None

    def reset(self) -> Timestep:
        """Starts every lane; answers all lanes, or the first `batch_size` if asynchronous."""
        with self._one_thread:
            if self._started and self._tracker.in_flight:
                raise RuntimeError(
                    "reset() of an asynchronous environment that runs; make a new one instead"
                )
            self._started = True
            self._tracker.restart()
            self._pool.async_reset()
            return self._receive()

    def step(self, action: np.ndarray, lane: np.ndarray) -> Timestep:
        """Acts in these lanes; answers them, or the first `batch_size` ready ones.

        action [n, *] as the spec says; lane: i32[n], lanes that wait for an action, each once.
        """
        self.send(action, lane)
        return self.recv()

    def send(self, action: np.ndarray, lane: np.ndarray) -> None:
        """The first half of `step`: the lanes begin to step, on EnvPool's threads."""
        with self._one_thread:
            self._tracker.claim(action, lane)
            # A copy, as `outward` makes one: EnvPool wants it writable.
            action = np.ascontiguousarray(self._actions.outward(action))
            self._pool._send([lane, lane, action])  # environment, player, action
            self._tracker.count()

    def recv(self) -> Timestep:
        """The second half of `step`: waits for the answer."""
        with self._one_thread:
            return self._receive()

    def episodes(self) -> list[Episode]:
        """The whole games that ended since the last call."""
        return self._tracker.episodes()

    def cuts(self) -> list[Cut]:
        """The episodes that were cut since the last call."""
        return self._tracker.cuts()

    def end(self, lane: np.ndarray) -> None:
        """Ends the episodes of lanes i32[n] that wait: their next answer is `first`."""
        self._tracker.end(lane)

    def render(self, lane: int) -> np.ndarray:
        """uint8[H, W, 3]: a picture of this lane, at the emulator's own size and in its colours."""
        if not self._render:
            raise ValueError("this environment was made without pictures; use make(render=True)")
        check_lane(lane, self.lanes)
        with self._one_thread:
            if not self._tracker.is_waiting(lane):
                raise ValueError(f"lane={lane} is being stepped; render it after it has answered")
            return self._pool.render(env_ids=lane)[0]

    def close(self) -> None:
        """Stops EnvPool's threads; the environment cannot be used again."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
            self._tracker.restart()

    def _receive(self) -> Timestep:
        raw, observation = self._finite_answer()
        lane, reward, truncated = raw["info:env_id"], raw[self._reward], raw["trunc"]
        terminated = raw["done"] & ~truncated
        ended = None
        if self._atari:
            terminated, truncated, ended = self._atari_ends(terminated, truncated, raw)
        done = terminated | truncated
        return Timestep(
            observation=observation,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            first=self._tracker.answered(
                lane=lane, reward=reward, done=done, ended=done if ended is None else ended
            ),
            lane=lane,
        )

    def _finite_answer(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """EnvPool's answer, and the observation in it; lanes that are not finite begin anew."""
        raw = self._answer()
        while True:
            lane, observation = raw["info:env_id"], self._read(raw)
            anew = self._tracker.begin_anew(lane, observation, raw[self._reward])
            if anew is None:
                return raw, observation
            raw = self._begun_anew(raw, anew)

    def _begun_anew(self, raw: dict[str, np.ndarray], bad: np.ndarray) -> dict[str, np.ndarray]:
        """The answer with the first observations of lanes `bad` bool[n], which are reset."""
        self._pool._reset(raw["info:env_id"][bad])
        if self._in_batches:  # they answer among the next ones
            kept = {name: values[~bad] for name, values in raw.items()}
            return self._answer() if bad.all() else kept
        again = self._answer()
        order = np.argsort(again["info:env_id"])  # of the lanes that were reset
        places = np.flatnonzero(bad)[np.argsort(raw["info:env_id"][bad])]
        joined = {name: values.copy() for name, values in raw.items()}
        for name, values in again.items():
            if len(values) == len(order):
                joined[name][places] = values[order]
        return joined

    def _answer(self) -> dict[str, np.ndarray]:
        return dict(zip(self._answer_names, self._pool._recv(), strict=True))

    def _atari_ends(
        self, terminated: np.ndarray, truncated: np.ndarray, raw: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(terminated, truncated, whole game ended), bool[n] each, from EnvPool's own flags."""
        game_over = raw["info:terminated"] != 0
        ended = game_over | truncated  # EnvPool starts a new game after a time limit, too
        terminated = terminated | game_over
        if self._lives is not None:
            lane, lives = raw["info:env_id"], raw["info:lives"]
            terminated |= truncated & (lives < self._lives[lane])  # a life lost at the time limit
            self._lives[lane] = lives
        return terminated, truncated & ~terminated, ended


# --- EnvPool's own description -------------------------------------------------------------------


_specs: dict[str, Any] = {}


def _make_spec(env_id: str, **options: Any) -> Any:
    """EnvPool's spec, cached: making it takes a tenth of the start of a process with one lane."""
    key = f"{env_id} {sorted(options.items())}"
    if key not in _specs:
        _specs[key] = envpool.make_spec(env_id, **options)
    return _specs[key]


def _is_atari(config: dict[str, Any]) -> bool:
    return "repeat_action_probability" in config


# --- checks --------------------------------------------------------------------------------------


def _unknown_id(env_id: str) -> str:
    return (
        f"env.id={env_id!r} is no EnvPool environment; {nearest(env_id, envpool.list_all_envs())} "
        "(env=gymnasium for other packages)"
    )


def _batch_problems(batch_size: int | None, lanes: int | None) -> list[str]:
    if batch_size is None or (batch_size >= 1 and (lanes is None or batch_size <= lanes)):
        return []
    most = "the number of lanes" if lanes is None else f"{lanes} (lanes)"
    return [f"env.batch_size={batch_size}; accepted: 1 .. {most}, or null for all at once"]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


@functools.cache
def _failure(program: str, *arguments: str) -> str | None:
    """Says why a trial fails here, or None; a child tries, as compiled code may abort."""
    command = [sys.executable, "-c", program, *arguments]
    try:
        trial = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "the trial did not end within 120 s"
    if trial.returncode == 0:
        return None
    if trial.returncode < 0:
        return f"it ends its process by {signal.Signals(-trial.returncode).name}"
    lines = (trial.stdout + trial.stderr).strip().splitlines()
    return lines[-1][:200] if lines else f"the trial ended with status {trial.returncode}"
