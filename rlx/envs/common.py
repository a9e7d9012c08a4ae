"""What both environment families share: observation leaves, action checks, lane bookkeeping.

Letters as in `rlx.types`: N lanes, n <= N lanes in one answer, `*` the shape of a leaf.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlx.types import Array, ArraySpec, BoxSpec, DiscreteSpec, EnvSpec, Episode, Timestep

# float64 and int64 leaves become 32-bit: the replay and JAX's default hold no more, and doubling
# every stored observation for digits that the network never sees would be waste.
NARROWED = {"float64": "float32", "int64": "int32"}


def leaf_name(keys: Sequence[str]) -> str:
    """'a/b' of these keys from an observation's root; an observation that is one array has none."""
    return "/".join(keys) or "observation"


def nearest(given: str, accepted: Iterable[str], count: int = 3) -> str:
    """'nearest: a, b, c', or the way to see all names when none is near."""
    by_lower = {name.lower(): name for name in accepted}
    found = difflib.get_close_matches(given.lower(), list(by_lower), n=count, cutoff=0.5)
    if not found:
        return f"nothing near it among {len(by_lower)} names"
    return "nearest: " + ", ".join(by_lower[name] for name in found)


# --- observations --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Source:
    """One array of an environment's observation, as the environment gives it."""

    name: str
    path: tuple[str, ...]  # keys from the root of the raw answer; () when that is the array itself
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of an observation, as the rest of rlx sees it."""

    source: Source
    components: tuple[int, ...] | None
    scale: tuple[float, ...] | None

    @property
    def spec(self) -> ArraySpec:
        """Without the lane axis."""
        shape = self.source.shape if self.components is None else (len(self.components),)
        return ArraySpec(shape=shape, dtype=NARROWED.get(self.source.dtype, self.source.dtype))

    def read(self, array: Array) -> Array:
        """What `Reader` makes of this array [n, *], NumPy's or JAX's."""
        if self.components is not None:
            array = array.take(np.asarray(self.components), axis=1)
        array = array.astype(self.spec.dtype)
        return array if self.scale is None else array * np.asarray(self.scale, np.float32)[None]


@dataclass(frozen=True, kw_only=True)
class Outside:
    """What an environment itself gives and takes, for agents that are used without rlx's lanes."""

    leaves: tuple[Leaf, ...]  # those that the network reads
    ignored: tuple[str, ...]  # names of those that the settings leave out
    action_start: int  # the number of the first action; rlx counts from 0


def outside(sources: Sequence[Source], leaves: Sequence[Leaf], action_start: int) -> Outside:
    """Of all sources and those selected."""
    read = {leaf.source.name for leaf in leaves}
    ignored = tuple(source.name for source in sources if source.name not in read)
    return Outside(leaves=tuple(leaves), ignored=ignored, action_start=action_start)


def outside_of(family: Any, spec: EnvSpec) -> Outside:
    """A family's own account of it; for one that gives none, as rlx sees the environment."""
    if hasattr(family, "outside"):
        told: Outside = family.outside()
        return told
    sources = [
        Source(name=name, path=(), shape=leaf.shape, dtype=leaf.dtype)
        for name, leaf in sorted(spec.observation.items())
    ]
    leaves = [Leaf(source=source, components=None, scale=None) for source in sources]
    return outside(sources, leaves, 0)


def select(
    sources: Sequence[Source],
    *,
    observe: str | Sequence[str] | None,
    components: Sequence[int] | None,
    scale: Sequence[float] | None,
) -> tuple[Leaf, ...]:
    """The leaves that these settings ask for, sorted by name."""
    by_name = {source.name: source for source in sources}
    wanted = [observe] if isinstance(observe, str) else observe
    names = sorted(by_name if wanted is None else set(wanted))
    if not names:
        raise ValueError(
            f"env.observe=[] selects nothing; give null for all, or of: {_all(by_name)}"
        )
    for name in names:
        if name not in by_name:
            raise ValueError(
                f"env.observe={name!r} is no leaf of this observation; accepted: {_all(by_name)}"
            )
    if components is not None:
        _check_components([by_name[name] for name in names], components)
    columns = None if components is None else tuple(components)
    factors = None if scale is None else tuple(scale)
    leaves = [Leaf(source=by_name[n], components=columns, scale=factors) for n in names]
    if factors is not None:
        _check_scale(leaves, factors)
    return tuple(leaves)


def _all(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _check_components(sources: Sequence[Source], components: Sequence[int]) -> None:
    given = f"env.components={list(components)}"
    if len(sources) != 1 or len(sources[0].shape) != 1:
        shapes = {source.name: source.shape for source in sources}
        raise ValueError(
            f"{given} needs one selected 1-D leaf, got {shapes}; set env.observe to one"
        )
    size = sources[0].shape[0]
    if not components or not all(0 <= c < size for c in components):
        raise ValueError(f"{given} must name elements 0 .. {size - 1} of {sources[0].name!r}")


def _check_scale(leaves: Sequence[Leaf], scale: Sequence[float]) -> None:
    found = {leaf.source.name: leaf.spec for leaf in leaves}
    fits = [spec.shape == (len(scale),) and spec.dtype == "float32" for spec in found.values()]
    if fits != [True]:
        told = {name: f"{spec.dtype}{list(spec.shape)}" for name, spec in found.items()}
        raise ValueError(
            f"env.scale={list(scale)} needs one selected float leaf of {len(scale)} elements, "
            f"got {told}"
        )


class Reader:
    """Turns an environment's raw observations into flat dicts of the selected leaves."""

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._parts = [
            (
                leaf.source.name,
                leaf.source.path,
                None if leaf.components is None else np.asarray(leaf.components),
                None if leaf.scale is None else np.asarray(leaf.scale, np.float32),
                NARROWED.get(leaf.source.dtype),
            )
            for leaf in leaves
        ]

    def __call__(self, raw: Any) -> dict[str, np.ndarray]:
        """{leaf: dtype[n, *]}: views where nothing has to change, so treat them as read-only."""
        read = {}
        for name, path, components, scale, dtype in self._parts:
            array = raw
            for key in path:
                array = array[key]
            if components is not None:
                array = array.take(components, axis=1)
            if dtype is not None:
                array = array.astype(dtype)
            read[name] = array if scale is None else array * scale
        return read


# --- actions -------------------------------------------------------------------------------------


class Actions:
    """Checks actions at the speed of the hot path; EnvPool itself accepts any number."""

    def __init__(self, spec: DiscreteSpec | BoxSpec) -> None:
        self._spec = spec
        if isinstance(spec, BoxSpec):
            # Compared in float32, the dtype of the actions: 0.1 is a legal action of a box to 0.1.
            self._low = np.asarray(spec.low, np.float32).reshape(spec.shape)
            self._high = np.asarray(spec.high, np.float32).reshape(spec.shape)

    def check(self, action: np.ndarray) -> None:
        """Raises ValueError unless action is i32[n] (discrete) or f32[n, *] (box), in bounds."""
        if isinstance(self._spec, DiscreteSpec):
            self._check_discrete(action, self._spec.n)
        else:
            self._check_box(action, self._spec.shape)

    def _check_discrete(self, action: np.ndarray, n: int) -> None:
        if not isinstance(action, np.ndarray) or action.dtype != np.int32 or action.ndim != 1:
            raise ValueError(f"action is {describe(action)}; give numpy int32[n], one per lane")
        # Seen as uint32 a negative action is huge: one reduction checks both ends.
        if action.size and np.maximum.reduce(action.view(np.uint32)) >= n:
            raise ValueError(
                f"action has values {action.min()} .. {action.max()}; accepted: 0 .. {n - 1}"
            )

    def _check_box(self, action: np.ndarray, shape: tuple[int, ...]) -> None:
        if (
            not isinstance(action, np.ndarray)
            or action.dtype != np.float32
            or action.shape[1:] != shape
        ):
            wanted = ", ".join(map(str, ("n", *shape)))
            raise ValueError(f"action is {describe(action)}; give numpy float32[{wanted}]")
        # Written so that NaN, which compares false with everything, is refused too.
        if not ((action >= self._low) & (action <= self._high)).all():
            raise ValueError(
                f"action has values {action.min()} .. {action.max()}; accepted: "
                f"{self._low.min()} .. {self._high.max()}, each element in its own bounds"
            )


def describe(value: Any) -> str:
    """'int64[32]' for an array, else the type's name."""
    if not isinstance(value, np.ndarray):
        return type(value).__name__
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"


# --- lanes ---------------------------------------------------------------------------------------


class EpisodeCounter:
    """Counts unclipped return and env steps of every lane, under all wrappers."""

    def __init__(self, *, lanes: int, frames_per_env_step: int) -> None:
        self._return = np.zeros(lanes)  # float64: a sum of up to 1e5 rewards
        self._env_steps = np.zeros(lanes, np.int64)
        self._frames_per_env_step = frames_per_env_step
        self._ended: list[Episode] = []

    def restart(self) -> None:
        """Forgets the unfinished episodes of all lanes."""
        self._return[:] = 0
        self._env_steps[:] = 0

    def add(
        self,
        *,
        index: slice | np.ndarray,
        lane: np.ndarray,
        reward: np.ndarray,
        first: np.ndarray,
        ended: np.ndarray,
    ) -> None:
        """Counts one answer; index of lane i32[n], reward f32[n] raw, first and ended bool[n].

        A reset row (`first`) is no env step.
        """
        self._return[index] += reward
        self._env_steps[index] += ~first
        if ended.any():
            for i in lane[ended].tolist():
                self._end(i)

    def _end(self, lane: int) -> None:
        env_steps = int(self._env_steps[lane])
        self._ended.append(
            Episode(
                ret=float(self._return[lane]),
                env_steps=env_steps,
                frames=env_steps * self._frames_per_env_step,
                lane=lane,
            )
        )
        self._return[lane] = 0
        self._env_steps[lane] = 0

    def take(self) -> list[Episode]:
        """The episodes that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended


class Stream:
    """The lanes of one environment: which wait for an action, whose episode ended, the scores.

    It makes the stream of `rlx.types.Timestep`: the answer after an ended one is `first`. It is
    found from the previous answer of that lane alone; EnvPool's elapsed_step goes on counting over
    the resets of `episodic_life`.
    """

    def __init__(self, *, lanes: int, spec: EnvSpec, least_in_flight: int = 1) -> None:
        self.lanes = lanes
        self._least_in_flight = least_in_flight  # fewer would never make an answer
        self._actions = Actions(spec.action)
        self._all = np.arange(lanes, dtype=np.int32)
        self._answered: np.ndarray | None = None  # the very array of the last answer's lanes
        self._index_answered: slice | np.ndarray = slice(None)  # the same as an index
        self._waiting = np.zeros(lanes, bool)
        self._n_waiting = 0
        self._done = np.ones(lanes, bool)  # so that the very first answers are `first`
        self._counter = EpisodeCounter(lanes=lanes, frames_per_env_step=spec.frames_per_env_step)
        self._uncounted: dict[str, Any] | None = None  # of the last answer, for the counter

    @property
    def in_flight(self) -> int:
        """Lanes that were sent an action (or a reset) and have not answered."""
        return self.lanes - self._n_waiting

    def restart(self) -> None:
        """All lanes are being reset: none waits, each answers with `first` next."""
        self._waiting[:] = False
        self._n_waiting = 0
        self._done[:] = True
        self.count()
        self._counter.restart()

    def claim(self, action: np.ndarray, lane: np.ndarray) -> None:
        """Checks an action and marks its lanes as acted; raises ValueError and changes nothing.

        Here and not in EnvPool, which aborts the process or corrupts a lane without a word.
        """
        if not isinstance(lane, np.ndarray) or lane.dtype != np.int32 or lane.ndim != 1:
            raise ValueError(f"lane is {describe(lane)}; give numpy int32[n] of lane numbers")
        self._actions.check(action)
        n = len(lane)
        if n == 0 or len(action) != n:
            raise ValueError(
                f"{len(action)} actions for {n} lanes; give one each, and at least one"
            )
        if self.in_flight + n < self._least_in_flight:
            raise ValueError(
                f"{n} lanes acted in, {self.in_flight} busy: an answer takes "
                f"{self._least_in_flight}, this would wait for ever; act in more lanes at once"
            )
        if lane is self._answered:  # the lanes of the last answer, all of them: nothing to check
            self._answered = None
            self._waiting[self._index_answered] = False
            self._n_waiting -= n
            return
        self._answered = None
        # Seen as uint32 a negative lane is huge: one reduction checks both ends.
        if np.maximum.reduce(lane.view(np.uint32)) >= self.lanes:
            raise ValueError(
                f"lane has {lane.min()} .. {lane.max()}; accepted: 0 .. {self.lanes - 1}"
            )
        index = lane.astype(np.intp)  # NumPy indexes by intp several times faster than by int32
        if not self._waiting[index].all():
            busy = lane[~self._waiting[index]].tolist()
            raise ValueError(
                f"lanes {busy} wait for no action; reset first, then act once per answer"
            )
        self._waiting[index] = False
        if np.count_nonzero(self._waiting) != self._n_waiting - n:
            self._waiting[index] = True
            raise ValueError(f"lane names a lane twice: {lane.tolist()}; act once per answer")
        self._n_waiting -= n

    def _index(self, lane: np.ndarray) -> slice | np.ndarray:
        """As an index: a slice for all lanes in order, else intp, both much faster than int32."""
        if len(lane) == self.lanes and (lane == self._all).all():
            return slice(None)
        return lane.astype(np.intp)

    def is_waiting(self, lane: int) -> bool:
        """Whether this lane has answered and waits for an action."""
        return bool(self._waiting[lane])

    def answer(
        self,
        *,
        observation: Mapping[str, np.ndarray],
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        lane: np.ndarray,
        ended: np.ndarray | None = None,
    ) -> Timestep:
        """The Timestep of n lanes' raw answer, in its order.

        `terminated` and `truncated` (bool[n]) exclude each other; `ended` bool[n] says where the
        game truly ended, if that is not the same.
        """
        index = self._index(lane)
        first = self._done[index].copy()
        done = terminated | truncated
        self._done[index] = done
        self._waiting[index] = True
        self._n_waiting += len(lane)
        self._answered, self._index_answered = lane, index
        self.count()
        self._uncounted = {
            "index": index,
            "lane": lane,
            "reward": reward,
            "first": first,
            "ended": done if ended is None else ended,
        }
        return Timestep(
            observation=observation,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            first=first,
            lane=lane,
        )

    def count(self) -> None:
        """Counts the last answer's episodes, if not done yet: best while the lanes are busy."""
        if self._uncounted is not None:
            self._counter.add(**self._uncounted)
            self._uncounted = None

    def episodes(self) -> list[Episode]:
        """The episodes that ended since the last call."""
        self.count()
        return self._counter.take()


class OneThread:
    """`with` it around a call that two threads must never be in at once; raises if they are."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(f"two threads are in {self._what} at once; give each its own lanes")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def check_lane(lane: int, lanes: int) -> None:
    """Raises ValueError unless 0 <= lane < lanes."""
    if not 0 <= lane < lanes:
        raise ValueError(f"lane={lane} does not exist; accepted: 0 .. {lanes - 1}")


def check_lanes_and_seeds(lanes: int, seeds: Sequence[int]) -> list[int]:
    """The seeds as a list of int; raises ValueError unless there is one int32 per lane."""
    found = [int(seed) for seed in seeds]
    if lanes < 1 or len(found) != lanes:
        raise ValueError(f"{len(found)} seeds for lanes={lanes}; give one per lane, and lanes >= 1")
    if any(not -(2**31) <= seed < 2**31 for seed in found):
        raise ValueError(f"seeds must be int32, got {found}; use rlx.seeding.spawn_int")
    return found
