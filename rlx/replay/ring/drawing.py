"""Sequences drawn from a ring and copied out of it, while a writer may be at work.

A reader chooses under the lock, copies outside it, compares all block keys again and draws anew
what changed. Comparing alone would miss a block that is being overwritten: the writer therefore
takes away leaves and keys before it touches the data (`rlx.replay.ring.ring`).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import final

import numpy as np

from rlx.replay.ring.block_spec import CARRY, NEXT, ROWS, BlockSpec
from rlx.replay.ring.checks import checked_buffers
from rlx.replay.ring.index import BlockIndex
from rlx.replay.ring.storage import Storage
from rlx.types import Batch, Carry, Leaves, NetInput, Row, Sample

_MAX_REDRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Sequences copied out of the ring."""

    rows: Row  # [B, L, ...]
    next: NetInput  # [B, ...]
    carry: Carry  # [B, ...]
    keys: np.ndarray  # i64[B]
    weights_version: np.ndarray  # i64[B]
    scaled_probability: np.ndarray  # f64[B]: probability of each draw * startable sequences
    least_scaled_probability: float  # of any startable sequence

    def sample(self, importance: np.ndarray, *, least: float, exponent: float) -> Sample:
        """A Sample with an importance f32[B], as learners take it."""
        return Sample(
            batch=Batch(rows=self.rows, next=self.next, carry=self.carry, importance=importance),
            keys=self.keys,
            weights_version=self.weights_version,
            least_scaled_probability=least,
            importance_exponent=exponent,
        )

    def evenly(self) -> Sample:
        """A Sample without a correction."""
        return self.sample(np.ones(len(self.keys), np.float32), least=1.0, exponent=0.0)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How a batch is to be drawn."""

    batch_size: int
    stratified: bool = False  # one draw from each of batch_size equal parts of the total
    find_least: bool = False  # the least probability of all, too (else 0)


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Sequences chosen, not yet copied."""

    keys: np.ndarray  # i64[n]
    window: np.ndarray  # i64[n, blocks]: block keys
    weights_version: np.ndarray  # i64[n]
    scaled_probability: np.ndarray  # f64[n]


@final
class Reader:
    """Draws and copies; for any thread."""

    def __init__(
        self, spec: BlockSpec, index: BlockIndex, storage: Storage, lock: threading.Lock
    ) -> None:
        self.redraws = 0  # sequences overwritten while they were copied
        self._spec, self._index, self._storage, self._lock = spec, index, storage, lock

    def draw(self, how: Draw, rng: np.random.Generator, buffers: Batch | None) -> Drawn:
        """Draws with replacement, in proportion to the leaves, and copies into the buffers.

        Raises ValueError if nothing is startable.
        """
        choice, least = self._choose(np.arange(how.batch_size), how, rng)
        leaves = self._copy_out(choice.keys, choice.window, buffers)
        for _ in range(_MAX_REDRAWS):
            changed = self.changed(choice.window)
            if not changed.size:
                return self._drawn(choice, leaves, least)
            again, new_least = self._choose(changed, how, rng)
            least = min(least, new_least)
            for name, values in vars(again).items():
                getattr(choice, name)[changed] = values
            leaves = self._copy_again(changed, choice, leaves)
        raise RuntimeError(
            f"{_MAX_REDRAWS} draws in a row were overwritten while being copied: "
            f"{self._index.slots} blocks are too few for this writer; raise replay.capacity."
        )

    def read(self, keys: np.ndarray, buffers: Batch | None) -> Drawn:
        """Copies the sequences with these keys i64[n]; for the writer's thread only."""
        with self._lock:
            window = self._index.window(keys)
            if not self._index.are_live(window).all():
                raise ValueError("Of these sequences some are not in the ring (any more).")
            choice = _Choice(
                keys=keys,
                window=window,
                weights_version=self._index.weights_version(keys),
                scaled_probability=np.ones(len(keys)),
            )
        return self._drawn(choice, self._copy_out(keys, window, buffers), 0.0)

    def changed(self, window: np.ndarray) -> np.ndarray:
        """i64[m]: positions of which a block was overwritten since it was chosen."""
        with self._lock:
            same = self._index.are_live(window).all(axis=1)
            self.redraws += int((~same).sum())
        return np.flatnonzero(~same)

    def _choose(
        self, which: np.ndarray, how: Draw, rng: np.random.Generator
    ) -> tuple[_Choice, float]:
        """Chooses for these positions i64[n] of the batch; answers the least probability, too."""
        index = self._index
        with self._lock:
            self._check_any()
            total, uniform = index.tree.total, rng.random(len(which))
            share = (which + uniform) / how.batch_size if how.stratified else uniform
            leaves = index.tree.find(total * share)
            keys = index.keys_at(leaves)
            least = index.least_leaf() / total * index.startable if how.find_least else 0.0
            return _Choice(
                keys=keys,
                window=index.window(keys),
                weights_version=index.weights_version(keys),
                scaled_probability=index.startable * (index.tree.get(leaves) / total),
            ), least

    def _check_any(self) -> None:
        if self._index.startable == 0:
            sequence = self._spec.sequence
            raise ValueError(
                f"No sequence is startable: {self._index.live} blocks of {sequence.block_rows} "
                f"rows are stored, a sequence needs {sequence.blocks} of one chain; "
                f"add more before sampling."
            )

    def _copy_out(self, keys: np.ndarray, window: np.ndarray, buffers: Batch | None) -> Leaves:
        """The leaves of these windows: in the buffers or in new arrays."""
        windows = self._index.windows(keys, window)
        if not self._storage.in_place:
            return self._storage.take(windows)
        out = checked_buffers(buffers or self._spec.buffers(len(keys)), len(keys))
        out = {path: leaf for path, leaf in out.items() if path.startswith((ROWS, NEXT, CARRY))}
        self._storage.gather(windows, out)
        return out

    def _copy_again(self, which: np.ndarray, choice: _Choice, leaves: Leaves) -> Leaves:
        """The leaves, with these positions of the batch copied once more."""
        if not self._storage.in_place:
            return self._copy_out(choice.keys, choice.window, None)
        fresh = self._copy_out(choice.keys[which], choice.window[which], None)
        for path, leaf in leaves.items():
            leaf[which] = fresh[path]
        return leaves

    def _drawn(self, choice: _Choice, leaves: Leaves, least: float) -> Drawn:
        rows, following, carry = self._spec.trees_of(leaves)
        return Drawn(
            rows=rows,
            next=following,
            carry=carry,
            keys=choice.keys,
            weights_version=choice.weights_version,
            scaled_probability=choice.scaled_probability,
            least_scaled_probability=least,
        )
