"""The ring of blocks under every sequence replay.

Each row is stored once. `index` says which blocks there are and which sequences start in them,
`storage` holds their leaves, and a `Reader` copies sequences out.

Threads: one writer and any number of readers. The writer takes away leaves and keys, then writes
the data, then gives the keys. A reader chooses under the lock, copies outside it, compares all
block keys again and draws anew what changed. Comparing alone would miss a block that is being
overwritten.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from rlx.machine.memory import available_bytes
from rlx.replay.ring import saving
from rlx.replay.ring.block_spec import (
    CARRY,
    NEXT,
    ROWS,
    VALID,
    BlockSpec,
    block_leaves,
    checked_buffers,
    checked_leaves,
)
from rlx.replay.ring.budget import budget
from rlx.replay.ring.index import Arrivals, BlockIndex
from rlx.replay.ring.storage import Storage, Storing
from rlx.replay.ring.stores import make_storage
from rlx.types import Batch, Blocks, Carry, Leaves, NetInput, Rollout, Row, Sample

LeafOf = Callable[[np.ndarray], np.ndarray]  # keys i64[M] of startable sequences -> f64[M] > 0
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
    """These settings say how a batch is to be drawn."""

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
class BlockRing:
    """Stores blocks of many lanes; copies out sequences drawn in proportion to their leaves."""

    def __init__(
        self, *, capacity_rows: int, spec: BlockSpec, lanes: int, storing: Storing | None = None
    ) -> None:
        """Raises ValueError if the ring does not fit."""
        storing = storing or Storing()
        self.budget = budget(capacity_rows=capacity_rows, spec=spec, lanes=lanes, storing=storing)
        self.budget.check(available_bytes())
        self.spec, self.lanes = spec, lanes
        self.slots = self.budget.blocks
        self.env_steps = 0  # valid rows ever added
        self.blocks_dropped = 0  # of an older chain than their lane's latest
        self.index = BlockIndex(self.slots, lanes, spec.sequence)
        self.storage = make_storage(storing, spec, self.slots)
        self._lock = threading.Lock()  # the index and the counters
        self._writing = threading.Lock()  # the data
        self.reader = Reader(spec, self.index, self.storage, self._lock)

    # --- what it holds ---

    @property
    def startable(self) -> int:
        """Sequences that can be drawn now."""
        return self.index.startable

    @property
    def rows(self) -> int:
        """Rows stored now."""
        return self.index.live * self.spec.sequence.block_rows

    @property
    def capacity_rows(self) -> int:
        """Rows that it can hold."""
        return self.budget.rows

    @property
    def block_nbytes(self) -> float:
        """Bytes of one block, before compression."""
        return self.budget.total_bytes / self.slots

    @property
    def rings(self) -> list[BlockRing]:
        """Itself (see rlx.replay.ring.shards for several)."""
        return [self]

    @property
    def copies_into_buffers(self) -> bool:
        """Says whether `draw` fills buffers; else it answers arrays of its own."""
        return self.storage.in_place

    @property
    def oldest_key(self) -> int:
        """The oldest stored block's; `next_key` if the ring is empty."""
        return self.index.oldest_key

    @property
    def oldest_start(self) -> int:
        """The key of the first sequence that may be there (see `rlx.replay.ring.index`)."""
        return self.index.oldest_key * self.index.starts_per_block

    @property
    def next_key(self) -> int:
        """The next block's to come."""
        return self.index.next_key

    @property
    def nbytes(self) -> int:
        """Bytes taken now."""
        return self.storage.nbytes + self.index.nbytes

    @property
    def bytes_per_row(self) -> float:
        """All bytes of the ring by rows of capacity."""
        return self.nbytes / self.budget.rows

    def stats(self) -> dict[str, float]:
        """Metrics: how full it is, and what was dropped or drawn again since the run began."""
        return {
            "replay/fill": self.rows / self.budget.rows,
            "replay/startable_sequences": float(self.startable),
            "replay/blocks_dropped": float(self.blocks_dropped),
            "replay/redraws": float(self.reader.redraws),
        }

    # --- writing ---

    def add(self, rollout: Rollout, leaf_of: LeafOf) -> None:
        """Adds a rollout's blocks; `leaf_of` gives the leaves of the sequences they complete.

        Raises ValueError, with nothing added, for a block out of order within its chain or rows
        that are not of the spec. Blocks of an older chain of their lane are dropped and counted.
        """
        with self._writing:
            for arrivals, leaves in self._parts(rollout):
                with self._lock:
                    self.index.retire(arrivals.keys % self.slots)
                self._write(arrivals, leaves)
                with self._lock:
                    self.index.publish(arrivals)
                    self.env_steps += int(np.count_nonzero(leaves[VALID]))
                    starts = self.index.completed(arrivals.keys)
                if starts.size:
                    first = leaf_of(starts)
                    with self._lock:
                        self.index.start(starts, first)

    def check(self, rollout: Rollout) -> None:
        """Raises what `add` would, and adds nothing."""
        self._checked(rollout)
        self.index.admit(rollout.lane, rollout.chain, rollout.number)

    def set_leaves(self, keys: np.ndarray, leaves: np.ndarray) -> int:
        """Sets f64[n] > 0 of i64[n] keys and answers how many were overwritten since: ignored."""
        with self._lock:
            return self.index.set_leaves(np.asarray(keys, np.int64), leaves)

    def scalars(self, keys: np.ndarray) -> Row:
        """Row [M, L + 1] of these sequences without observations; for the writer's thread only.

        The last one is the row after the sequence, or its last row once more where the sequence
        ends with a block.
        """
        windows = self.index.windows(keys, self.index.window(keys))
        return self.spec.scalar_rows(self.storage.scalars(windows))

    def _parts(self, rollout: Rollout) -> Iterator[tuple[Arrivals, Leaves]]:
        """The blocks to write, a few at a time so that readers never find the ring empty."""
        leaves = self._checked(rollout)
        kept, previous = self.index.admit(rollout.lane, rollout.chain, rollout.number)
        self.blocks_dropped += len(rollout.lane) - len(kept)
        first_key, most = self.next_key, max(1, self.slots // 8)
        for begin in range(0, len(kept), most):
            some = kept[begin : begin + most]
            index = saving.as_slice(some)
            yield (
                Arrivals(
                    keys=first_key + begin + np.arange(len(some)),
                    previous_key=previous[begin : begin + most],
                    lane=rollout.lane[index],
                    chain=rollout.chain[index],
                    number=rollout.number[index],
                    weights_version=rollout.weights_version[index],
                ),
                {path: leaf[index] for path, leaf in leaves.items()},
            )

    def _checked(self, rollout: Rollout) -> Leaves:
        """The leaves of a rollout's blocks [M, ...]."""
        found = block_leaves(rollout.rows, rollout.carry, rollout.next, self.spec.leaves)
        for what in (ROWS, CARRY, NEXT):
            checked_leaves(what, found, self.spec.stored, len(rollout.lane))
        return found

    def _write(self, arrivals: Arrivals, leaves: Leaves) -> None:
        self.storage.write(int(arrivals.keys[0]) % self.slots, leaves)

    # --- reading ---

    def buffers(self, batch_size: int) -> Batch:
        """A batch of uninitialised arrays to draw into, again and again."""
        return self.spec.buffers(batch_size)

    def draw(self, how: Draw, rng: np.random.Generator, buffers: Batch | None = None) -> Drawn:
        """See Reader.draw."""
        return self.reader.draw(how, rng, buffers)

    def read(self, keys: np.ndarray, buffers: Batch | None = None) -> Drawn:
        """See Reader.read."""
        return self.reader.read(keys, buffers)

    def leaves(self, keys: np.ndarray) -> np.ndarray:
        """f64[n]: the leaf of each key i64[n]; 0 where it cannot be drawn (any more)."""
        with self._lock:
            return self.index.leaves(keys)

    @property
    def all_leaves(self) -> np.ndarray:
        """f64[slots * starts per block]: a read-only view."""
        return self.index.tree.values

    def load_leaves(self, leaves: np.ndarray) -> None:
        """Sets all leaves, zero where they are zero now."""
        with self._lock:
            self.index.load_leaves(leaves)

    # --- saving ---

    @property
    def layout(self) -> str:
        """JSON of all that a saved state depends on."""
        return saving.layout(self.spec, self.slots, self.lanes)

    def state(self) -> dict[str, Any]:
        """Flat names to arrays and JSON scalars: all that `restore` needs beside the blocks."""
        with self._writing, self._lock:
            counters = {
                "env_steps": self.env_steps,
                "blocks_dropped": self.blocks_dropped,
                "redraws": self.reader.redraws,
            }
            return {"layout": self.layout, **counters, **self.index.state()}

    def blocks_after(self, key: int, most: int) -> tuple[Blocks, int]:
        """Copies of up to `most` blocks with later keys, the oldest first; for any thread.

        Answers the key to go on after, too: the one given if nothing later came. Blocks that are
        overwritten meanwhile are left out.
        """
        with self._lock:
            first = max(key + 1, self.next_key - self.slots)
            keys = np.arange(first, min(first + most, self.next_key))
            last = int(keys[-1]) if keys.size else key
            keys = keys[self.index.are_live(keys)]
        leaves = self.storage.blocks(keys % self.slots)
        with self._lock:
            same = self.index.are_live(keys)
        kept = {path: leaf[same] for path, leaf in leaves.items()}
        return Blocks(keys=keys[same], leaves=kept), last

    def restore(self, state: Mapping[str, Any], blocks: Sequence[Iterable[Blocks]]) -> None:
        """Takes over a saved state, given all blocks of it (and perhaps older ones) of each ring.

        Raises ValueError if it is of a ring made otherwise, or a block is missing.
        """
        saving.check_shards(state, 1)
        saving.check_layout(state["layout"], self.layout)
        with self._writing, self._lock:
            self.index.restore(state)
            self.env_steps = int(state["env_steps"])
            self.blocks_dropped = int(state["blocks_dropped"])
            self.reader.redraws = int(state["redraws"])
            found = sum(
                saving.write_blocks(some, self.index, self.storage)
                for its in blocks
                for some in its
            )
        saving.check_found(found, self.index.live)

    def check_valid(self) -> tuple[bool, str]:
        """Says whether tables, links, tree and counters agree (slow: for tests)."""
        with self._writing, self._lock:
            return self.index.check_valid()


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
