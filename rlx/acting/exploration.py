"""Says how much each lane explores, by its global number and by the progress of the run.

An amount of 0 gives the best action the agent knows (the mode), 1 gives its samples. For an agent
without a distribution of its own the amount is epsilon, the share of random actions.
Amounts that are drawn depend on the run's seed and on these numbers alone, so that every pool
draws the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated

import numpy as np

from rlx.interfaces import Exploration, PerEpisode
from rlx.problems import show
from rlx.seeding import uniforms
from rlx.types import Range, Runtime

EPISODES_ASKED = (*range(64), *(1 << bits for bits in range(6, 31)))  # for their amounts
Amount = Annotated[float, Range(ge=0, le=1)]
SomeAmount = Annotated[float, Range(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """epsilon_i = base^(1 + exponent i / (N - 1)), fixed for the run (Ape-X; R2D2, section 2.3).

    With one lane it is `base`. `final_scale` < 1 shrinks every rung linearly, by the same factor,
    over `decay_env_steps`; `minimum` is a floor. `DecayingLadder` lowers the base instead.
    """

    base: Amount
    exponent: Annotated[float, Range(ge=0)]
    minimum: Amount
    final_scale: Amount
    decay_env_steps: Annotated[int, Range(ge=1)] | None  # None: never shrinks

    def __post_init__(self) -> None:
        if (self.decay_env_steps is None) != (self.final_scale == 1):
            raise ValueError(
                f"exploration.final_scale={self.final_scale:g} and "
                f"exploration.decay_env_steps={show(self.decay_env_steps)}: to shrink the rungs "
                "give a scale below 1 and the env steps, else 1 and null."
            )

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        rung = lane / max(1, lanes - 1)
        ladder = self.base ** (1 + self.exponent * rung)
        scale = 1.0
        if self.decay_env_steps is not None:
            scale = 1 + (self.final_scale - 1) * min(1.0, env_steps / self.decay_env_steps)
        return np.maximum(self.minimum, ladder * scale).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class DecayingLadder:
    """epsilon_i = base^(1 + exponent i / (N - 1)), whose base falls over the run (rltime).

    The base goes linearly from `start_base` to `final_base` over the first `decay_env_steps`, and
    the power is taken of it, so lower rungs fall faster; `minimum` is a floor under every rung.
    Source: rltime 0.1.2, exploration/epsilon_greedy.py (`eps_start`, `eps_final`, `eps_min`,
    `per_actor_exponent_factor`). It needs two lanes there; here one lane has the base itself.
    """

    start_base: Amount
    final_base: Amount
    exponent: Annotated[float, Range(ge=0)]
    minimum: Amount
    decay_env_steps: Annotated[int, Range(ge=1)]

    def __post_init__(self) -> None:
        _refuse_rise("start_base", self.start_base, "final_base", self.final_base)

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        progress = _progress(env_steps, self.decay_env_steps)
        base = self.start_base + (self.final_base - self.start_base) * progress
        ladder = base ** (1 + self.exponent * lane / max(1, lanes - 1))
        return np.maximum(self.minimum, ladder).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same amount for every lane and the whole run."""

    value: Amount

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        return np.full(lane.shape, self.value, np.float32)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Every lane goes from `start` to `final` over the first `decay_env_steps` of the run."""

    start: Amount
    final: Amount
    decay_env_steps: Annotated[int, Range(ge=1)]

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        progress = _progress(env_steps, self.decay_env_steps)
        value = self.start + (self.final - self.start) * progress
        return np.full(lane.shape, value, np.float32)


@dataclass(frozen=True, kw_only=True)
class Piecewise:
    """Every lane goes linearly from point to point; beyond the ends it stays as there."""

    points: list[tuple[Annotated[int, Range(ge=0)], Amount]]  # (env steps of the run, amount)

    def __post_init__(self) -> None:
        places = [place for place, _ in self.points]
        if not places or any(a >= b for a, b in pairwise(places)):
            raise ValueError(
                f"exploration.points={[list(point) for point in self.points]}: give one or more "
                "pairs of env steps and an amount, in ascending order of env steps."
            )

    @property
    def turns(self) -> Sequence[int]:
        """The env steps of its points."""
        return [place for place, _ in self.points]

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        places, values = zip(*self.points, strict=True)
        return np.full(lane.shape, np.interp(env_steps, places, values), np.float32)


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """Every lane falls from `start` to `final` by the same factor in each env step of the run.

    It is `final` from `decay_env_steps` on: start (final / start)^min(1, env_steps /
    decay_env_steps). Source: the curve of optax.exponential_decay with `end_value`.
    """

    start: SomeAmount
    final: SomeAmount
    decay_env_steps: Annotated[int, Range(ge=1)]

    def __post_init__(self) -> None:
        _refuse_rise("start", self.start, "final", self.final)

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        progress = _progress(env_steps, self.decay_env_steps)
        value = self.start * (self.final / self.start) ** progress
        return np.full(lane.shape, value, np.float32)


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Each lane draws its own final amount, once for the run, and falls to it from `start`.

    `finals` are drawn with `weights`, which need not sum to 1; the fall is linear over the first
    `decay_env_steps`. A lane's draw depends on the run's seed and its global number.
    Source: Mnih et al. 2016 (A3C), the experimental setup in the supplement.
    """

    start: Amount
    finals: tuple[Amount, ...]
    weights: tuple[Annotated[float, Range(ge=0)], ...]
    decay_env_steps: Annotated[int, Range(ge=1)]
    seed: Runtime[int]

    def __post_init__(self) -> None:
        if len(self.finals) != len(self.weights):
            raise ValueError(
                f"exploration.weights has {len(self.weights)} numbers, exploration.finals has "
                f"{len(self.finals)}; give each final amount one weight."
            )
        if not sum(self.weights) > 0:
            raise ValueError(
                f"exploration.weights={list(self.weights)} sum to 0; give a weight above 0."
            )
        _refuse_rise("start", self.start, "finals", max(self.finals))

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        progress = _progress(env_steps, self.decay_env_steps)
        value = self.start + (self._finals(lane) - self.start) * progress
        return value.astype(np.float32)

    def _finals(self, lane: np.ndarray) -> np.ndarray:
        """Draws f64[n]: a final value lies at the place of the draw among the weights' sums."""
        drawn = uniforms(self.seed, "exploration", lane)
        ends = np.cumsum(self.weights) / sum(self.weights)
        return np.asarray(self.finals)[np.searchsorted(ends[:-1], drawn, side="right")]


@dataclass(frozen=True, kw_only=True)
class Redrawn:
    """Each lane draws an amount for each of its episodes, from `count` values of a logarithmic row.

    The row is highest (lowest / highest)^(j / (count - 1)), and every value is as likely.
    A draw depends on the run's seed, the lane, its chain, and the episode's number in the chain.
    An episode is what the agent sees as one: with `episodic_life` it is one life.
    Source: Acme's JAX R2D2 (`num_epsilons`), whose actor draws when an episode begins.
    """

    highest: SomeAmount
    lowest: SomeAmount
    count: Annotated[int, Range(ge=1)]
    seed: Runtime[int]

    def __post_init__(self) -> None:
        _refuse_rise("highest", self.highest, "lowest", self.lowest)

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        """The amount of each lane's first episode."""
        first = np.zeros(lane.shape, np.int64)
        return self.episode_amount(lane, lanes, env_steps, first, first)

    def episode_amount(
        self, lane: np.ndarray, lanes: int, env_steps: int, chain: np.ndarray, episode: np.ndarray
    ) -> np.ndarray:
        place = np.floor(uniforms(self.seed, "exploration", lane, chain, episode) * self.count)
        ratio = self.lowest / self.highest
        return (self.highest * ratio ** (place / max(1, self.count - 1))).astype(np.float32)


def _progress(env_steps: int, decay_env_steps: int) -> float:
    """The part of a decay that is over, 0 .. 1."""
    return min(1.0, env_steps / decay_env_steps)


def _refuse_rise(first: str, highest: float, last: str, lowest: float) -> None:
    """Raises ValueError for amounts that would rise."""
    if lowest > highest:
        raise ValueError(
            f"exploration.{last} has {lowest:g}, above exploration.{first}={highest:g}; "
            f"give at most {highest:g}."
        )


# --- of one actor --------------------------------------------------------------------------------


class Amounts:
    """Holds what each lane of one actor explores now.

    Amounts follow the requests, or, of an exploration that is `PerEpisode`, the lanes' episodes.
    """

    def __init__(self, exploration: Exploration, lane: np.ndarray, lanes: int) -> None:
        """lane: i32[N], the actor's own, by their numbers among all `lanes` of the run."""
        self._exploration, self._lane, self._lanes = exploration, lane, lanes
        self._drawing = exploration if isinstance(exploration, PerEpisode) else None
        self._episode = np.full(lane.shape, -1, np.int64)  # in the lane's chain
        self._env_steps = 0
        self.by_episode = self._drawing is not None
        self.now = np.zeros(lane.shape, np.float32)  # replaced, never written to

    def begin(self, env_steps: int) -> None:
        """Takes the env steps of the run with which a request comes."""
        self._env_steps = env_steps
        if not self.by_episode:
            self.now = self._exploration.amount(self._lane, self._lanes, env_steps)

    def begin_episodes(self, lane: np.ndarray, chain: np.ndarray) -> None:
        """Draws for these of the actor's own lanes i32[n], whose next episode begins.

        chain: i32[N], of all its lanes.
        """
        assert self._drawing is not None
        self._episode[lane] += 1
        now = self.now.copy()  # the policy may still read the old ones
        now[lane] = self._drawing.episode_amount(
            self._lane[lane], self._lanes, self._env_steps, chain[lane], self._episode[lane]
        )
        self.now = now

    def restart(self, lane: np.ndarray) -> None:
        """Counts the episodes of lanes intp[n] from 0: a new chain has lost the old ones."""
        self._episode[lane] = -1


def least_amount(exploration: Exploration, lanes: int, total_env_steps: int) -> float:
    """The least amount of any lane in a run of so many env steps.

    Amounts rise or fall between the ends of the run and the `turns` that an exploration may have.
    """
    turns = [turn for turn in getattr(exploration, "turns", ()) if turn < total_env_steps]
    times = (0, total_env_steps, *turns)
    return float(min(amounts(exploration, lanes, time).min() for time in times))


def amounts(exploration: Exploration, lanes: int, env_steps: int) -> np.ndarray:
    """The amounts f32[lanes, n] at a time of the run: of n episodes, where each has its own."""
    lane, chain = np.arange(lanes), np.zeros(lanes, np.int32)
    if not isinstance(exploration, PerEpisode):
        return exploration.amount(lane, lanes, env_steps)[:, None]
    ask = partial(exploration.episode_amount, lane, lanes, env_steps, chain)
    of = [ask(np.full(lanes, number, np.int32)) for number in EPISODES_ASKED]
    return np.stack(of, axis=1)
