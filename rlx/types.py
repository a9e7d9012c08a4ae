"""Every record that crosses a seam, with dtype[shape] on each field.

Letters: N lanes of one actor, n <= N lanes in one answer of an environment, M blocks in a rollout,
K rows of a block, B sequences of a batch, L rows of a sequence, T trained rows, S depth of the
frame stack, A actions, `*` the shape of an observation leaf.

An *observation* is always a flat dict from leaf name to array; an environment whose observation is
one array calls it "observation". Records are frozen and keyword-only. This module imports neither
JAX nor the rest of rlx: thin actors load it alone (`rlx.trees.register` makes pytrees of them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

Array = Any  # numpy.ndarray or jax.Array
Observation = Mapping[str, Array]
Params = Any  # nested dict of arrays
Leaves = dict[str, Any]  # arrays by their path in a tree

RECORDS: dict[type, tuple[str, ...]] = {}  # every record with array fields -> their names

C = TypeVar("C", bound=type)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Range:
    """The limits of a setting: `discount: Annotated[float, Range(ge=0, le=1)]`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None


@dataclass(frozen=True, kw_only=True)
class OfTheRun:
    """Marks a count over all learner processes, of which each takes its share, rounded up.

    exactly: the share must not be rounded. over: "actors" counts actors, and is divided where
    they are; "lanes" counts over an actor's lanes, and is divided where these are.
    """

    exactly: bool = False
    over: Literal["run", "actors", "lanes"] = "run"


class FromRun:
    """Marks a parameter that the run supplies; no YAML sets it."""


Runtime = Annotated[T, FromRun()]


class Gathered:
    """Marks a parameter whose class has settings of the same YAML, without a level of its own."""


Inline = Annotated[T, Gathered()]


class AloneOnly:
    """Marks a setting that needs a run with one learner process, unless it is null, false or {}."""


class NamesModule:
    """Marks a setting that names a module as 'module:name', which is imported."""


class IsPath:
    """Marks a setting that is a path: a relative one starts where the run was begun."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def record(cls: C) -> C:
    """A frozen keyword-only dataclass whose fields are arrays or trees of arrays."""
    made: Any = dataclass(frozen=True, kw_only=True, eq=False)(cls)
    RECORDS[made] = tuple(each.name for each in fields(made))
    return made


# --- static descriptions -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """Shape and NumPy dtype name of one array, without any leading lane, row or batch axis."""

    shape: tuple[int, ...]
    dtype: str


# Each kind of action says which array one action is, and what `prev_action` holds at an episode's
# first row, where there is none (networks read zeros there).


@dataclass(frozen=True, kw_only=True)
class DiscreteSpec:
    """One of the actions 0 .. n-1."""

    n: int

    @property
    def array(self) -> ArraySpec:
        return ArraySpec(shape=(), dtype="int32")

    @property
    def none(self) -> int:
        return -1


@dataclass(frozen=True, kw_only=True)
class MultiDiscreteSpec:
    """Several choices at once, the i-th one of 0 .. counts[i]-1."""

    counts: tuple[int, ...]

    @property
    def array(self) -> ArraySpec:
        return ArraySpec(shape=(len(self.counts),), dtype="int32")

    @property
    def none(self) -> int:
        return -1


@dataclass(frozen=True, kw_only=True)
class BoxSpec:
    """Continuous actions: every element between `low` and `high` of that shape.

    Rows keep actions as the agent chose them; the environment gets them clipped to the bounds.
    """

    shape: tuple[int, ...]
    low: tuple[float, ...]  # flattened; -inf: no bound
    high: tuple[float, ...]  # flattened; inf: no bound

    def __post_init__(self) -> None:
        if 0 in self.shape:
            raise ValueError(f"an action of shape {list(self.shape)} has no elements to choose.")

    @property
    def array(self) -> ArraySpec:
        return ArraySpec(shape=self.shape, dtype="float32")

    @property
    def none(self) -> float:
        return 0.0


ActionSpec = DiscreteSpec | MultiDiscreteSpec | BoxSpec


@dataclass(frozen=True, kw_only=True)
class Categories:
    """The values of a leaf that holds categories: element i is one of counts[i], from first[i]."""

    first: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class EnvSpec:
    """An environment gives and takes these, of one lane."""

    id: str
    observation: Mapping[str, ArraySpec]
    action: ActionSpec
    frames_per_env_step: int
    categories: Mapping[str, Categories] = field(default_factory=dict)  # by leaf
    said: tuple[str, ...] = ()  # what was inferred of the environment, a line each
    # The observation leaf [A] that is not 0 where an action is allowed (the choices of a
    # multi-discrete action side by side). It stays in the rows; torsos do not read it.
    action_mask: str | None = None


@dataclass(frozen=True, kw_only=True)
class SequenceSpec:
    """The windows of sequence replay, in rows. Only the agent makes one.

    A stride of whole blocks starts sequences at blocks' first rows; one that divides `block_rows`
    starts several in each block, which only an agent without a recurrent state can use.
    """

    burn_in: int
    unroll: int
    n_step: int
    stride: int
    block_rows: int

    @property
    def length(self) -> int:
        """Rows of one sequence; the input after the last one is `Batch.next`."""
        return self.burn_in + self.unroll + self.n_step - 1

    @property
    def start_rows(self) -> range:
        """The rows of a block that sequences start at."""
        return range(0, self.block_rows, min(self.stride, self.block_rows))

    @property
    def blocks_per_stride(self) -> int:
        """Blocks from one that sequences start in to the chain's next such block."""
        return max(1, self.stride // self.block_rows)

    def blocks_from(self, row: int) -> int:
        """Blocks that a sequence from this row of its first block touches."""
        return -(-(row + self.length) // self.block_rows)

    @property
    def blocks(self) -> int:
        """The most blocks that a sequence touches."""
        return self.blocks_from(self.start_rows[-1])

    @property
    def ends_with_a_block(self) -> bool:
        """Says whether sequences may end with a block's last row, and need the input after it."""
        return any((row + self.length) % self.block_rows == 0 for row in self.start_rows)


# --- acting --------------------------------------------------------------------------------------


@record
class Timestep:
    """An environment's answer for n of its lanes."""

    observation: Observation  # [n, *]
    reward: Array  # f32[n], raw; 0 where first
    terminated: Array  # bool[n]: the episode ended here, nothing follows
    truncated: Array  # bool[n]: the episode was cut here, a value may be bootstrapped
    first: Array  # bool[n]: an episode's first observation; the action before it was ignored
    lane: Array  # i32[n], 0 .. N-1


@dataclass(kw_only=True, slots=True)
class Episode:
    """One finished episode: unclipped, beneath all wrappers, by true game ends.

    Not frozen: the environment makes it, the actor completes it, and a bad policy ends thousands
    a second.
    """

    return_: float  # sum of raw rewards
    env_steps: int
    frames: int
    lane: int  # the environment's own index; the actor makes it the global id
    chain: int = 0  # this and what follows is the actor's to fill in
    epsilon: float = 0.0
    weights_version: int = -1
    task: str = ""  # of a run with several; set by the environment


@dataclass(frozen=True, kw_only=True)
class Cut:
    """An answer with a number that is not finite; its episode was cut before it, uncounted.

    Or an environment that raised, and was opened anew.
    """

    lane: int  # the environment's own index; the actor makes it the global id
    env_step: int  # of its episode that was answered; 0: the first observation
    says: str  # 'the reward is nan'
    answer: Mapping[str, Array]  # reward and observation leaves, of this lane
    reopened: bool = False  # it raised: there is no answer

    def __str__(self) -> str:
        return f"lane {self.lane}, env step {self.env_step} of its episode: {self.says}"


@record
class NetInput:
    """All that the network reads at one env step (leading axes as the place says)."""

    observation: Observation  # single frames; the network stacks them
    prev_action: Array  # as `spec.action.array`; `spec.action.none` where first
    prev_reward: Array  # f32, raw; 0 where first
    time: Array  # i32, env steps since the episode's first observation
    first: Array  # bool: reset the carry *before* reading this observation


@record
class Carry:
    """The network remembers this between two env steps."""

    core: Any  # tree of f32[batch, units]; () for feed-forward cores
    frames: Observation  # [batch, S-1, *] per stacked leaf, oldest first; {} without stacks


@record
class QActing:
    """A Q agent keeps this from acting time."""

    q: Array  # f32: Q of the action taken
    q_max: Array  # f32: the largest Q


@record
class SoftActing:
    """A Munchausen agent keeps this from acting time."""

    q: Array  # f32: Q of the action taken
    q_max: Array  # f32: what the state is worth by the policy
    bonus: Array  # f32: what the action adds to its reward


@record
class AtomsActing:
    """An agent with categorical distributions keeps this from acting time."""

    q: Array  # f32: the mean of the action taken
    log_taken: Array  # f32[K]: its atoms' log-probabilities
    worth: Array  # f32[K]: the probabilities of the state's own atoms
    bonus: Array  # f32: what the action adds to its reward (Munchausen)


@record
class Row:
    """One stored env step of one lane."""

    inputs: NetInput  # x_t, as the network ate it
    action: Array  # a_t, as `spec.action.array`
    reward: Array  # f32: r_{t+1}, raw
    discount: Array  # f32: 0 where t+1 is terminal (or the row is not valid), else 1
    valid: Array  # bool: False where x_t is an episode's last observation: a_t was ignored
    acting: Any  # the agent's record of acting time, here QActing


@record
class Rollout:
    """Finished blocks, stacked, in the order in which they were finished."""

    rows: Row  # [M, K, ...]
    carry: Carry  # [M, ...]: before each block's first row
    next: NetInput  # [M, ...]: the input after each block's last row
    lane: Array  # i32[M], global
    chain: Array  # i32[M]
    number: Array  # i64[M]: 0, 1, ... within the chain
    weights_version: Array  # i64[M]: of the block's first row
    episodes: tuple[Episode, ...]
    env_steps: int  # made since the last rollout; invalid rows are not env steps
    frames: int
    timings: Mapping[str, float]  # seconds per stage
    cuts: tuple[Cut, ...] = ()  # answers that were not finite


@record
class Weights:
    """A version of the acting parameters as it travels."""

    version: int  # updates made when they were taken
    params: Params  # numpy


@record
class Request:
    """The request that an actor gets."""

    weights: Weights | None  # None: keep what you have
    env_steps: int  # made by the whole run so far, for schedules
    want_env_steps: int  # over all lanes of the actor
    want_blocks: int | None  # of each lane, instead of env steps; then its lanes rest


@dataclass(frozen=True, kw_only=True)
class News:
    """A learner process sends this to all, itself too, between two updates."""

    env_steps: int  # made by its actors since its last news
    frames: int
    episodes: tuple[Episode, ...]  # that ended since
    startable: int  # sequences in its replay
    may_learn: bool
    is_writing: bool  # a snapshot of its replay
    wall_s: float  # seconds of the run, by its clock
    stop: bool  # it was asked to stop
    finish: bool  # one of its hooks wants the run to end here


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """An evaluation found these returns."""

    returns: tuple[float, ...]  # unclipped, one per episode
    weights_version: int  # it was played with
    env_steps: int  # of the run when those weights were taken
    name: str = ""  # of one of evaluation.others; '' is the run's own
    tasks: tuple[str, ...] = ()  # one per episode, of a run with several
    cuts: tuple[Cut, ...] = ()  # answers that were not finite; those episodes were played anew


# --- learning ------------------------------------------------------------------------------------


@record
class Batch:
    """Sequences to learn from."""

    rows: Row  # [B, L, ...]
    next: NetInput  # [B, ...]: the input after each sequence's last row
    carry: Carry  # [B, ...]: before each sequence's first row
    importance: Array  # f32[B]: correction factors of non-uniform sampling, at most 1
    env_steps: Array | None = None  # u32[B]: of the run so far, mod 2^32; the loop's
    scheduled: Mapping[str, Array] | None = None  # f32[B] each: settings that change; the loop's


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Copies of some of a replay's blocks, in the order of their keys."""

    keys: Array  # i64[M]: their numbers among all blocks ever added
    leaves: Leaves  # [M, ...] by path: rows/ [M, K, ...], carry/ and, where it is kept, next/


@record
class Sample:
    """A batch and what the host must remember of it."""

    batch: Batch
    keys: Array  # i64[B]: starts (rlx.replay.ring.index); never on a device
    weights_version: Array  # i64[B]: of each sequence's first block
    # importance = (chance of its draw * sequences that there are / this) ** -exponent
    least_scaled_probability: float
    importance_exponent: float


@record
class TrainState:
    """All that an update changes."""

    params: Params
    target_params: Params  # () for agents without targets
    opt_state: Any  # of one optimiser, or a dict of several
    statistics: Any  # running statistics (rlx.agents.running) by name; {} without any
    updates: Array  # i32[]
    gradient_steps: Array  # i32[]: an update may make several, or one for each optimiser
    key: Array  # a PRNG key


@record
class UpdateOutput:
    """An update returns this to the host."""

    priorities: Array | None  # f32[B, T], >= 0, -1 where a row is not valid; None: none are kept
    metrics: Mapping[str, Array]  # f32[] each
