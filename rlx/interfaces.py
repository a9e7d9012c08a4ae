"""The seams. A Protocol stands only where two implementations exist."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from rlx.problems import Problem
from rlx.types import (
    Array,
    Batch,
    Blocks,
    Carry,
    EnvSpec,
    Episode,
    Evaluated,
    NetInput,
    Params,
    Rollout,
    Row,
    Sample,
    SequenceSpec,
    Timestep,
    TrainState,
    UpdateOutput,
    Weights,
)

T = TypeVar("T")


class Env(Protocol):
    """N lanes of an environment. Lanes are 0 .. N-1."""

    spec: EnvSpec
    lanes: int

    def reset(self) -> Timestep:
        """Starts every lane; answers all lanes, or the first ones if asynchronous."""

    def step(self, action: np.ndarray, lane: np.ndarray) -> Timestep:
        """Acts in these lanes and answers those that are ready (all of them, if synchronous).

        action [n, *] as the spec says; lane: i32[n]. A lane whose last answer was terminated or
        truncated ignores its action and answers its next episode's first observation.
        """

    def send(self, action: np.ndarray, lane: np.ndarray) -> None:
        """The first half of `step`: the lanes begin."""

    def recv(self) -> Timestep:
        """The second half of `step`: waits for the answer."""

    def episodes(self) -> list[Episode]:
        """The episodes that ended since the last call."""

    def close(self) -> None: ...


class EnvFamily(Protocol):
    """The settings of an environment: makes lanes of it, wherever they are needed."""

    def spec(self) -> EnvSpec:
        """The spec, from one throw-away lane; raises ValueError (nearest ids) for an unknown id."""

    def make(self, *, lanes: int, seeds: Sequence[int]) -> Env:
        """`seeds`: one int32 per lane."""


@runtime_checkable
class Checked(Protocol):
    """Settings that can be judged before anything is made of them."""

    def problems(self) -> Sequence[str]:
        """Says what is wrong, a line each."""


@runtime_checkable
class CheckedFamily(Protocol):
    """An environment family that can judge its settings for a number of lanes."""

    def problems(self, *, lanes: int | None) -> Sequence[str]:
        """Says what is wrong, a line each; no environment is made."""


@runtime_checkable
class Asynchronous(Protocol):
    """An environment family whose lanes may answer some at a time."""

    @property
    def batch_size(self) -> int | None:
        """Lanes per answer; None: all."""


@runtime_checkable
class ThinFamily(Protocol):
    """An environment family that says whether its processes must load JAX; others must."""

    needs_jax: bool


@runtime_checkable
class Outward(Protocol):
    """An environment family that gives the raw spaces of its environments."""

    def raw_spaces(self) -> Any:
        """An `rlx.envs.observations.RawSpaces`."""


@runtime_checkable
class Agrees(Protocol):
    """A class of settings with rules on how other groups must be set beside it."""

    @staticmethod
    def clashes(settings: Mapping[str, Any]) -> Sequence[Problem]:
        """Says which of its rules these settings of a whole run break."""


class Network(Protocol):
    """A body (torso and core), to which an agent puts heads. Time-major: inputs [T, B, ...]."""

    @property
    def is_recurrent(self) -> bool:
        """Says whether the network remembers more than its stack of frames."""

    def init(self, key: Array, heads: Mapping[str, Head], **further: tuple[Array, ...]) -> Params:
        """The parameters of body and heads; further: what a head reads beside the features."""

    def apply(self, params: Params, inputs: NetInput, carry: Carry) -> tuple[Array, Carry]:
        """`stack_frames`, then `unroll`: (features f32[T, B, F], carry after the last row)."""

    def stack_frames(self, inputs: NetInput, carry: Carry) -> tuple[NetInput, Any]:
        """(inputs as `unroll` takes them, frames of the carry after the last row)."""

    def unroll(self, params: Params, stacked: NetInput, core: Any) -> tuple[Any, Any]:
        """(features f32[T, B, F], recurrent state after the last row)."""

    def read(self, params: Params, name: str, head: Head, features: Array, *further: Array) -> Any:
        """The output of the head of that name for features [..., F] and its further inputs."""

    def initial_carry(self, batch: int) -> Carry: ...


Head = Any  # a flax module: (features, action spec, dtype, *further) -> its output


class Agent(Protocol):
    """The algorithm: hyper-parameters and pure functions, a final frozen dataclass."""

    @property
    def spec(self) -> EnvSpec: ...
    @property
    def sequence(self) -> SequenceSpec: ...
    @property
    def on_policy(self) -> bool:
        """Says whether it learns only from rows of its newest weights, and once from each."""

    @property
    def samples(self) -> bool:
        """Says whether it draws actions from a distribution of its own; else only epsilon does."""

    @property
    def acting_spec(self) -> Any:
        """The agent's record of acting time, with ArraySpec leaves."""

    def init(self, key: Array) -> TrainState: ...
    def initial_carry(self, batch: int) -> Carry: ...
    def acting_params(self, state: TrainState) -> Params: ...
    def act(
        self, params: Params, inputs: NetInput, carry: Carry, key: Array, exploration: Array
    ) -> tuple[Array, Any, Carry]:
        """inputs [N, ...], exploration f32[N] -> (action [N, ...], acting record [N], carry).

        exploration: 0 is the best action it knows (the mode), 1 is as it samples; in between it
        is the share of sampled actions. For agents that do not sample it is epsilon.
        """

    def update(
        self, state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, UpdateOutput]:
        """Learns from a batch in one compiled call: a gradient step, or epochs of minibatches."""


@runtime_checkable
class Prioritizing(Protocol):
    """An agent whose sequences have priorities; its updates give their new ones."""

    def initial_priorities(self, rows: Row) -> np.ndarray:
        """f32[M, T] from the scalars [M, L + 1] of M sequences, in NumPy; -1 = not valid.

        The last of the L + 1 rows is the one after the sequence. If that has not arrived yet (the
        sequence ends with a block), it is the sequence's last row again. Observations are {}.
        """


@runtime_checkable
class SharesBatches(Protocol):
    """An agent that cannot learn from any number of sequences."""

    def check_share(self, sequences: int) -> None:
        """Raises ValueError for so many sequences of a device in an update."""


@runtime_checkable
class ValuesActions(Protocol):
    """An agent that has a value for each action."""

    def values(self, params: Params, inputs: NetInput, carry: Carry) -> tuple[Array, Carry]:
        """(values [N, A], carry)."""


Device = Literal["cpu", "learner"]
InitialPriorities = Callable[[Row], np.ndarray]  # Prioritizing.initial_priorities


@dataclass(frozen=True, kw_only=True)
class ReplayContext:
    """A run gives this record to the replay that it makes (`Runtime[ReplayContext]`)."""

    sequence: SequenceSpec
    row_spec: Row  # with ArraySpec leaves
    carry_spec: Carry  # with ArraySpec leaves
    lanes: int
    env: Mapping[str, Any]  # the environment's settings that decide what a row's numbers mean
    initial_priorities: InitialPriorities | None  # None: the agent has none
    on_policy: bool
    env_steps: int  # that these lanes had made before it; it begins empty all the same
    seed: int
    devices: Sequence[Any]  # the learner's; none in a process that has no learner


class Ring(Protocol):
    """Blocks in the order in which they were added, as a snapshot reads them."""

    @property
    def block_nbytes(self) -> float: ...
    @property
    def oldest_key(self) -> int:
        """The number of the oldest stored block; `next_key` if the ring is empty."""

    @property
    def next_key(self) -> int:
        """The number of the next block to come."""

    def blocks_after(self, key: int, most: int) -> tuple[Blocks, int]:
        """Copies of the blocks with later keys, and the key to continue after; for any thread."""


class Replay(Protocol):
    """Stores blocks, samples sequences."""

    ratio: float | None  # trained rows per env step added; None: no quota
    min_sequences: int  # startable sequences before learning begins
    min_env_steps: int  # as many env steps before learning begins

    @property
    def startable(self) -> int: ...  # sequences that can be sampled now
    @property
    def has_enough(self) -> bool:
        """Says whether acting should wait for the learner, whatever the ratio."""

    @property
    def rows(self) -> int: ...  # stored now
    @property
    def env_steps(self) -> int: ...  # valid rows ever added
    @property
    def nbytes(self) -> int: ...

    def add(self, rollout: Rollout) -> None: ...
    def sample(self, batch_size: int) -> Sample:
        """The arrays of a host's batch are overwritten after two more samples."""

    def flush(self) -> None: ...  # all of recorded experience is on the disk when this returns
    def close(self) -> None: ...
    def stats(self) -> dict[str, float]: ...
    def state(self) -> dict[str, Any]:
        """The state as arrays and JSON values: everything but the blocks."""

    @property
    def rings(self) -> Sequence[Ring]: ...  # that hold the blocks
    def restore(self, state: Mapping[str, Any], blocks: Sequence[Iterable[Blocks]]) -> None:
        """Restores a saved state and the blocks of each ring."""


@runtime_checkable
class FromRecord(Protocol):
    """A replay that may hold recorded experience: it is full from the start, and nobody acts."""

    is_recorded: bool


class Movable(Protocol):
    """A replay that can lie in a process of its own has these members beyond those of `Replay`."""

    capacity: int  # rows that it can hold

    def buffers(self, batch_size: int) -> Batch:
        """Arrays that `sample(batch_size, buffers=)` fills."""


@runtime_checkable
class TrainsOnce(Protocol):
    """A replay that may give each sequence once only, in the order in which they were made."""

    trains_once: bool


@runtime_checkable
class PrioritizedReplay(Protocol):
    """A replay whose sequences are drawn by the priorities that updates give."""

    @property
    def needs_priorities(self) -> bool:
        """Says whether drawing depends on priorities; if not, updates need not give any."""

    def update_priorities(self, keys: np.ndarray, priorities: np.ndarray) -> None:
        """New priorities f32[B, T] of the rows (-1 = not valid) of sequences with keys i64[B]."""


class Exploration(Protocol):
    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        """The amount f32[n] for these global lanes of `lanes` in all, `env_steps` into the run.

        0 is the best action the agent knows, 1 is as it samples (`Agent.act`).
        """


@runtime_checkable
class PerEpisode(Protocol):
    """An exploration whose amount for a lane changes where an episode begins, and only there."""

    def episode_amount(
        self, lane: np.ndarray, lanes: int, env_steps: int, chain: np.ndarray, episode: np.ndarray
    ) -> np.ndarray:
        """The amount f32[n] as `amount` has it, of episode number i64[n] in chain i32[n]."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """A run gives this record to the pool that it opens."""

    family: EnvFamily
    agent: Agent
    exploration: Exploration
    seed: int
    output_dir: Path | None  # the run's folder; None: it keeps nothing
    chain: int  # how many lives the lanes have had
    env_steps: int  # made by the run so far
    round_blocks: int | None  # a request's, of each lane (rlx.training.rounds); None: env steps
    process: tuple[int, int] = (0, 1)  # this learner process, and how many there are


class ActingPolicy(Protocol):
    """An actor needs this of a policy (`rlx.acting.policy`)."""

    version: int

    def take(self, weights: Weights) -> None: ...
    def start(self, inputs: NetInput, lane: np.ndarray | None, exploration: np.ndarray) -> Any: ...
    def finish(self, started: Any) -> tuple[np.ndarray, Any]: ...
    def carry(self, lane: np.ndarray) -> Carry: ...


class PoolSettings(Protocol):
    """The settings of a pool (conf/acting): opens it for a run."""

    @property
    def instances(self) -> int: ...  # actors
    @property
    def envs_per_actor(self) -> int: ...  # lanes of each actor
    @property
    def env_steps_per_request(self) -> int: ...  # over all lanes that answer a request
    def open(self, context: RunContext) -> ActingPool:
        """Raises ConfigError or ValueError for what cannot work."""


@runtime_checkable
class Served(Protocol):
    """The settings of a pool in which one request may be for all actors together."""

    @property
    def is_served(self) -> bool: ...


@runtime_checkable
class InRounds(Protocol):
    """The settings of a pool of which some suit an on-policy agent only, or no such agent."""

    def round_problems(
        self, *, on_policy: bool, publish_every_updates: int | None
    ) -> Sequence[Problem]:
        """Gives the problems with such an agent; publish_every_updates is None by env steps."""


@runtime_checkable
class TakesTurns(Protocol):
    """The settings of a pool that may act in turns with the learner, in its thread."""

    takes_turns: bool


class ActingPool(Protocol):
    """Holds the actors of a run and collects their rollouts."""

    @property
    def chain(self) -> int: ...  # the lives that the lanes have had
    @property
    def burst_env_steps(self) -> int: ...  # of one full round of requests
    def collect(self, timeout_s: float, updates: int) -> list[Rollout]:
        """Rollouts that are there, or come within `timeout_s`; [] if none does.

        `updates`: made by the learner so far, by which the age of weights is judged.
        """

    def publish(self, weights: Weights, env_steps: int) -> None: ...
    def reopen(self) -> None:
        """Opens the environments anew, as the next chain."""

    def stats(self) -> Mapping[str, float | None]: ...
    def close(self, timeout_s: float) -> None: ...


class Peers(Protocol):
    """The learner processes of a run, each with actors and a part of the replay of its own."""

    rank: int  # of this process, 0 .. count - 1
    count: int
    restarts: int  # of all of them, so far

    def exchange(self, mine: T) -> Sequence[T]:
        """Returns what each process gives, by rank; waits for the last one."""


class Evaluator(Protocol):
    """Evaluates beside the training."""

    def submit(self, weights: Weights, env_steps: int, name: str = "") -> bool:
        """Asks for an evaluation; False, and counted, while another of that name is not done."""

    def poll(self) -> list[Evaluated]:
        """The evaluations finished since the last call; it never waits."""

    def stats(self) -> dict[str, float]: ...
    def close(self) -> None: ...
