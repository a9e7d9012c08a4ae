"""Sequences in the order in which they were made, each trained on once: for on-policy learning."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, final

import numpy as np

from rlx.interfaces import ReplayContext, Ring
from rlx.replay.agreement import queue_clashes
from rlx.replay.held import HeldRing, Keeping
from rlx.types import (
    AloneOnly,
    Batch,
    Blocks,
    IsPath,
    OfTheRun,
    Range,
    Rollout,
    Runtime,
    Sample,
)


@final
class Online:
    """A queue. With stride = unroll and burn_in = 0 every row is trained on exactly once.

    Of an on-policy agent it holds one batch, `min_sequences`: acting stops when they are there.
    """

    trains_once = True
    clashes = staticmethod(queue_clashes)
    ratio = None  # the queue itself keeps both sides in step
    min_env_steps = 0

    def __init__(
        self,
        *,
        capacity: Annotated[int, Range(ge=1), OfTheRun()],
        min_sequences: Annotated[int, Range(ge=1), OfTheRun()],
        max_delay: Annotated[int, Range(ge=1), OfTheRun()],
        gather_threads: Annotated[int, Range(ge=1)],
        record: Annotated[str | None, AloneOnly(), IsPath()],
        context: Runtime[ReplayContext],
    ) -> None:
        """Settings: conf/replay/online.yaml. Raises ValueError for what cannot work."""
        keeping = Keeping(
            capacity=capacity,
            storage="memory",
            folder=None,
            compress="none",
            gather_threads=gather_threads,
            shards=1,
            where="thread",
            prefetch=0,
            record=record,
        )
        self._held = HeldRing(keeping, context, min_sequences=min_sequences)
        self._ring = self._held.ring
        self.min_sequences = min_sequences
        if not context.on_policy:
            _check_delay(max_delay, min_sequences, context)
        # An on-policy agent learns from one batch; the next one is made with the weights after it.
        self._on_policy = context.on_policy
        self._enough = min_sequences if context.on_policy else 2 * min_sequences
        self._max_delay = math.inf if context.on_policy else max_delay
        self._waiting: deque[tuple[int, int]] = deque()  # (key, env steps when it was complete)
        self._dropped = 0  # sequences

    @property
    def startable(self) -> int:
        """Sequences that wait to be trained on."""
        return len(self._waiting)

    @property
    def has_enough(self) -> bool:
        """Two batches: one to train on, one that is being made; one for an on-policy agent."""
        return len(self._waiting) >= self._enough

    def add(self, rollout: Rollout) -> None:
        """Stores a rollout's blocks; the sequences they complete wait to be trained on."""
        self._held.add(rollout, self._enqueue)
        self._drop_late()

    def _draw(self, batch_size: int, buffers: Batch | None) -> Sample:
        """The oldest ones."""
        if batch_size > len(self._waiting):
            raise ValueError(
                f"{batch_size} sequences are asked for, {len(self._waiting)} wait; set "
                "replay.min_sequences to learner.batch_size or more."
            )
        keys = np.array([self._waiting.popleft()[0] for _ in range(batch_size)], np.int64)
        drawn = self._ring.rings[0].read(keys, buffers)
        return drawn.evenly()

    def stats(self) -> dict[str, float]:
        """Metrics: the ring's, how many wait, and how many came too late."""
        return {
            **self._held.stats(),
            "replay/waiting_sequences": float(len(self._waiting)),
            "replay/dropped_sequences": float(self._dropped),
        }

    def state(self) -> dict[str, Any]:
        """Arrays and JSON scalars: all but the blocks."""
        waiting = np.array(self._waiting, np.int64).reshape(-1, 2)
        return {**self._held.state(), "waiting": waiting, "dropped": self._dropped}

    def restore(self, state: Mapping[str, Any], blocks: Sequence[Iterable[Blocks]]) -> None:
        """Goes on from a saved state and its blocks; raises ValueError if they do not fit."""
        self._held.restore(state, blocks)
        self._waiting = deque((int(key), int(at)) for key, at in state["waiting"])
        self._dropped = int(state["dropped"])
        if self._on_policy:  # a round that was broken off is made anew, by lanes of another chain
            self._waiting.clear()

    def _enqueue(self, keys: np.ndarray) -> np.ndarray:
        self._waiting.extend((key, self.env_steps) for key in keys.tolist())
        return np.ones(len(keys))

    def _drop_late(self) -> None:
        """Drops those that have waited too long, or that the ring has forgotten."""
        before, now, oldest = len(self._waiting), self.env_steps, self._ring.rings[0].oldest_start
        # A slow lane's sequence begins with an older block than those that were complete before it.
        self._waiting = deque(
            (key, at) for key, at in self._waiting if now - at <= self._max_delay and key >= oldest
        )
        self._dropped += before - len(self._waiting)

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
        """Lists the rings in which the blocks lie."""
        return self._ring.rings

    def flush(self) -> None:
        """Writes what is recorded; it is on the disk when this returns."""
        self._held.flush()

    def close(self) -> None:
        """Ends what was recorded, and drawing ahead."""
        self._held.close()


def _check_delay(max_delay: int, min_sequences: int, context: ReplayContext) -> None:
    """Raises ValueError if the first sequence of a batch is dropped before the last is there."""
    per_lane = -(-min_sequences // context.lanes) - 1  # that wait while the others come
    needed = per_lane * context.lanes * context.sequence.stride
    if needed >= max_delay:
        raise ValueError(
            f"max_delay={max_delay}: {min_sequences} sequences of {context.lanes} lanes take about "
            f"{needed} env steps, so the first would be dropped before the last is there; "
            "raise it, or lower min_sequences"
        )
