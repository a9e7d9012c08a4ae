"""Prioritised sequence replay, as in R2D2.

From the paper: priority eta * max + (1 - eta) * mean of the absolute n-step TD errors of a sequence
(section 2.3); drawing in proportion to priority^0.9, importance exponent 0.6 (appendix); first
priorities from acting-time Q-values, the online network as its own target (as in Ape-X).
The importance is divided by its maximum, over the whole batch or over the whole replay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, final

import numpy as np

from rlx.interfaces import InitialPriorities, Ring
from rlx.replay.agreement import ring_clashes
from rlx.replay.held import HeldRing, Shape, storings_of
from rlx.replay.ring.block_spec import BlockSpec
from rlx.replay.ring.checks import NOT_VALID, check_priorities
from rlx.replay.ring.drawing import Draw
from rlx.replay.ring.storage import Storing
from rlx.types import (
    Batch,
    Blocks,
    Carry,
    OfTheRun,
    Range,
    Rollout,
    Row,
    Runtime,
    Sample,
    SequenceSpec,
)


def sequence_priority(rows: np.ndarray, eta: float) -> np.ndarray:
    """f64[B] of the rows' f32[B, T]: eta * max + (1 - eta) * mean of the valid; 0 without any."""
    rows = np.asarray(rows, np.float64)
    valid = rows != NOT_VALID
    rows = np.where(valid, rows, 0.0)
    mean = rows.sum(axis=1) / np.maximum(1, valid.sum(axis=1))
    return eta * rows.max(axis=1) + (1.0 - eta) * mean


def importance_of(scaled_probability: np.ndarray, exponent: float, least: float) -> np.ndarray:
    """f32[B]: (N * P)^-exponent by the largest; N sequences, each drawn with chance P.

    The largest is that of the batch, or of a sequence with N * P = `least`.
    """
    return ((scaled_probability / least) ** -exponent).astype(np.float32)


@final
class Prioritized:
    """Draws sequences in proportion to (priority + epsilon)^priority_exponent."""

    clashes = staticmethod(ring_clashes)

    def __init__(
        self,
        *,
        capacity: Annotated[int, Range(ge=1), OfTheRun()],
        ratio: Annotated[float, Range(gt=0)] | None,
        min_sequences: Annotated[int, Range(ge=1), OfTheRun()],
        min_env_steps: Annotated[int, Range(ge=0), OfTheRun()],
        priority_exponent: Annotated[float, Range(ge=0)],
        priority_eta: Annotated[float, Range(ge=0, le=1)],
        priority_epsilon: Annotated[float, Range(gt=0)],
        importance_exponent: Annotated[float, Range(ge=0)],
        importance_exponent_final: Annotated[float, Range(ge=0)] | None,
        anneal_env_steps: Annotated[int, Range(ge=1), OfTheRun()] | None,
        importance_scale: Literal["batch", "replay"],
        initial_priority: Literal["acting", "max"],
        stratified: bool,
        storage: Literal["memory", "mmap", "device"],
        folder: str | None,
        compress: Literal["none", "lz4"],
        gather_threads: Annotated[int, Range(ge=1)],
        shards: Annotated[int, Range(ge=1)] | None,
        record: str | None,
        where: Literal["thread", "process"],
        prefetch: Annotated[int, Range(ge=0)],
        sequence: Runtime[SequenceSpec],
        row_spec: Runtime[Row],
        carry_spec: Runtime[Carry],
        lanes: Runtime[int],
        initial_priorities: Runtime[InitialPriorities | None],
        seed: Runtime[int],
        devices: Runtime[Sequence[Any]],
    ) -> None:
        """Settings: conf/replay/prioritized.yaml. Raises ValueError for what cannot work."""
        if initial_priorities is None and initial_priority == "acting" and priority_exponent > 0:
            raise ValueError(
                "this agent has no initial_priorities (interfaces.Prioritizing), which "
                "replay.initial_priority=acting draws by; choose replay=uniform or replay=online, "
                "or set replay.initial_priority=max if its updates give priorities."
            )
        storing = Storing(
            storage=storage, folder=folder, compress=compress, gather_threads=gather_threads
        )
        spec = BlockSpec(sequence=sequence, row=row_spec, carry=carry_spec)
        self._held = HeldRing(
            Shape(capacity=capacity, spec=spec, lanes=lanes),
            storings_of(storing, shards, devices, where),
            min_sequences=min_sequences,
            prefetch=prefetch,
            record=record,
            seed=seed,
        )
        self._ring = self._held.ring
        self.ratio = ratio
        self.min_sequences = min_sequences
        self.min_env_steps = min_env_steps
        self._exponent, self._eta, self._epsilon = priority_exponent, priority_eta, priority_epsilon
        if (importance_exponent_final is None) != (anneal_env_steps is None):
            raise ValueError("set importance_exponent_final and anneal_env_steps both, or neither.")
        self._importance_exponent = importance_exponent
        self._final = importance_exponent_final, anneal_env_steps
        self._importance_scale = importance_scale
        self._initial_priority = initial_priority
        self._stratified = stratified
        self._initial_priorities = initial_priorities
        self._largest_priority = 1.0  # ever written; read by initial_priority=max only
        self._stale_updates = 0
        self._clock: Callable[[], int] = lambda: self._ring.env_steps

    def follow(self, clock: Callable[[], int]) -> None:
        """Anneals by this count of env steps and not by those that were added."""
        self._clock = clock

    def add(self, rollout: Rollout) -> None:
        """Stores a rollout's blocks and gives the sequences they complete a first priority."""
        self._held.add(rollout, self._first_leaves)

    def _draw(self, batch_size: int, buffers: Batch | None) -> Sample:
        over_all = self._importance_scale == "replay"
        how = Draw(batch_size=batch_size, stratified=self._stratified, find_least=over_all)
        drawn = self._ring.draw(how, self._held.rng, buffers)
        scaled = drawn.scaled_probability
        least = drawn.least_scaled_probability if over_all else float(scaled.min())
        exponent = self.importance_exponent
        importance = importance_of(scaled, exponent, least)
        return drawn.sample(importance, least=least, exponent=exponent)

    @property
    def importance_exponent(self) -> float:
        """The exponent now; it goes linearly from the first to the final one, by env steps."""
        final, env_steps = self._final
        if final is None or env_steps is None:
            return self._importance_exponent
        done = min(1.0, self._clock() / env_steps)
        return (1.0 - done) * self._importance_exponent + done * final

    @property
    def needs_priorities(self) -> bool:
        """Whether drawing depends on priorities."""
        return self._exponent > 0

    def update_priorities(self, keys: np.ndarray, priorities: np.ndarray) -> None:
        """New priorities f32[B, T] of the rows (-1 = not valid) of the sequences with keys i64[B].

        Keys overwritten since they were sampled are ignored and counted. Raises
        FloatingPointError, naming the keys, if one is not finite.
        """
        self._stale_updates += self._ring.set_leaves(keys, self._leaves(keys, priorities))

    def stats(self) -> dict[str, float]:
        """Metrics: the ring's, and the updates that came too late."""
        return {
            **self._held.stats(),
            "replay/stale_updates": float(self._stale_updates),
            "replay/importance_exponent": self.importance_exponent,
        }

    def state(self) -> dict[str, Any]:
        """Arrays and JSON scalars: all but the blocks."""
        return {
            **self._held.state(),
            "largest_priority": self._largest_priority,
            "stale_updates": self._stale_updates,
        }

    def restore(self, state: Mapping[str, Any], blocks: Sequence[Iterable[Blocks]]) -> None:
        """Goes on from a saved state and its blocks; raises ValueError if they do not fit."""
        self._held.restore(state, blocks)
        self._largest_priority = float(state["largest_priority"])
        self._stale_updates = int(state["stale_updates"])

    def drawing_state(self) -> dict[str, Any]:
        """The part of `state` that does not follow from the blocks."""
        return {
            "rng": json.dumps(self._held.rng.bit_generator.state),
            "leaves": np.array(self._ring.rings[0].all_leaves),
            "largest_priority": self._largest_priority,
            "stale_updates": self._stale_updates,
        }

    def restore_drawing(self, state: Mapping[str, Any]) -> None:
        """Goes on from `drawing_state` with the same blocks."""
        self._ring.rings[0].load_leaves(np.asarray(state["leaves"]))
        self._held.rng.bit_generator.state = json.loads(state["rng"])
        self._largest_priority = float(state["largest_priority"])
        self._stale_updates = int(state["stale_updates"])

    def _first_leaves(self, keys: np.ndarray) -> np.ndarray:
        if self._initial_priority == "max" or self._initial_priorities is None:
            return self._to_leaves(np.full(len(keys), self._largest_priority))
        return self._leaves(keys, self._initial_priorities(self._ring.scalars(keys)))

    def _leaves(self, keys: np.ndarray, priorities: np.ndarray) -> np.ndarray:
        """f64[B] of priorities f32[B, T]."""
        check_priorities(keys, priorities)
        priority = sequence_priority(priorities, self._eta)
        self._largest_priority = max(self._largest_priority, float(priority.max(initial=0.0)))
        return self._to_leaves(priority)

    def _to_leaves(self, priority: np.ndarray) -> np.ndarray:
        # A leaf of 0 would take the sequence out of the replay.
        return np.maximum((priority + self._epsilon) ** self._exponent, np.finfo(np.float64).tiny)

    @property
    def startable(self) -> int:
        """Sequences that can be sampled now."""
        return self._ring.startable

    @property
    def has_enough(self) -> bool:
        """Never: the ratio alone decides who waits."""
        return False

    # --- of the ring -----------------------------------------------------------------------------

    def sample(self, batch_size: int, *, buffers: Batch | None = None) -> Sample:
        """See HeldRing.sample."""
        return self._held.sample(batch_size, buffers, self._draw)

    def buffers(self, batch_size: int) -> Batch:
        """Arrays that `sample` can fill again and again."""
        return self._ring.buffers(batch_size)

    @property
    def rows(self) -> int:
        """Rows stored now."""
        return self._ring.rows

    @property
    def env_steps(self) -> int:
        """Valid rows ever added."""
        return self._ring.env_steps

    @property
    def nbytes(self) -> int:
        """Bytes taken now."""
        return self._ring.nbytes

    @property
    def capacity(self) -> int:
        """Rows that it can hold."""
        return self._ring.capacity_rows

    @property
    def rings(self) -> Sequence[Ring]:
        """Where the blocks lie."""
        return self._ring.rings

    def flush(self) -> None:
        """What is recorded is on the disk when this returns."""
        self._held.flush()

    def close(self) -> None:
        """Ends what was recorded, and drawing ahead."""
        self._held.close()
