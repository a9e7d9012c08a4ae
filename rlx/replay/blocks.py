"""The ring of blocks under every sequence replay.

Each row is stored once. A block's *key* is its number among all blocks ever added; it lies in slot
key % slots until the block `slots` later overwrites it. Lanes interleave in the ring, so each slot
links to its chain's next block, and a *window* is the keys of a sequence's blocks:

    keys     40   41   42   43   44   45        sequence.blocks = 3, blocks_per_stride = 1
    lane      0    1    0    1    1    0        windows: (40, 42, 45) of lane 0
    number    7    2    8    3    4    9                 (41, 43, 44) of lane 1

A *start* is a block whose number in its chain is a multiple of blocks_per_stride. It is startable
while all blocks of its window are there: its leaf in the sum tree is positive then, and 0
otherwise. The ring forgets the oldest block first, so a live start never loses its tail.

Threads: one writer and any number of readers. The writer sets leaf 0 and key -1, then the data,
then the key; a reader chooses under the lock, copies outside it, compares all keys again and draws
anew what changed. Comparing alone would miss a block that is being overwritten.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, final

import numpy as np

from rlx import trees
from rlx.replay.available import available_bytes
from rlx.replay.checks import checked_buffers, checked_leaves
from rlx.replay.memory import budget
from rlx.replay.storage import Storing, make_storage
from rlx.replay.sum_tree import SumTree
from rlx.replay.tables import LaneTable, SlotTable
from rlx.types import ArraySpec, Batch, Blocks, Carry, Leaves, Rollout, Row, Sample, SequenceSpec

LeafOf = Callable[[np.ndarray], np.ndarray]  # keys i64[M] of startable sequences -> f64[M] > 0

_MAX_REDRAWS = 1000


# --- the ring ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some blocks with consecutive keys, ready to be written."""

    keys: np.ndarray  # i64[M]
    previous_key: np.ndarray  # i64[M]
    lane: np.ndarray  # i32[M]
    chain: np.ndarray  # i32[M]
    number: np.ndarray  # i64[M]
    weights_version: np.ndarray  # i64[M]
    rows: Leaves  # [M, K, ...]
    carry: Leaves  # [M, ...]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Sequences copied out of the ring."""

    rows: Row  # [B, L, ...]
    carry: Carry  # [B, ...]
    keys: np.ndarray  # i64[B]
    weights_version: np.ndarray  # i64[B]
    scaled_probability: np.ndarray  # f64[B]: probability of each draw * startable sequences
    least_scaled_probability: float  # of any startable sequence

    def sample(self, importance: np.ndarray, *, least: float, exponent: float) -> Sample:
        """With an importance f32[B], as learners take it; see Sample."""
        return Sample(
            batch=Batch(rows=self.rows, carry=self.carry, importance=importance),
            keys=self.keys,
            weights_version=self.weights_version,
            least_scaled_probability=least,
            importance_exponent=exponent,
        )

    def evenly(self) -> Sample:
        """Without a correction."""
        return self.sample(np.ones(len(self.keys), np.float32), least=1.0, exponent=0.0)


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Sequences chosen, not yet copied."""

    window: np.ndarray  # i64[n, blocks]: keys
    weights_version: np.ndarray  # i64[n]
    scaled_probability: np.ndarray  # f64[n]


@final
class BlockRing:
    """Stores blocks of many lanes; copies out sequences drawn in proportion to their leaves."""

    def __init__(
        self,
        *,
        capacity_rows: int,
        sequence: SequenceSpec,
        row_spec: Row,
        carry_spec: Carry,
        lanes: int,
        storing: Storing | None = None,
    ) -> None:
        """The specs have ArraySpec leaves. Raises ValueError if the ring does not fit."""
        storing = storing or Storing()
        self.budget = budget(
            capacity_rows=capacity_rows,
            sequence=sequence,
            row_spec=row_spec,
            carry_spec=carry_spec,
            lanes=lanes,
            storing=storing,
        )
        self.budget.check(available_bytes())
        self.sequence = sequence
        self.slots = self.budget.blocks
        self.lanes = lanes
        self.env_steps = 0  # valid rows ever added
        self.blocks_dropped = 0  # of an older chain than their lane's latest
        self.redraws = 0  # sequences overwritten while they were copied
        self._row_spec, self._carry_spec = row_spec, carry_spec
        self._scalar_spec = replace(row_spec, inputs=replace(row_spec.inputs, observation={}))
        self._row_leaves: dict[str, ArraySpec] = trees.flatten(row_spec)
        self._carry_leaves: dict[str, ArraySpec] = trees.flatten(carry_spec)
        self._storage = make_storage(
            storing,
            row_spec=row_spec,
            carry_spec=carry_spec,
            slots=self.slots,
            block_rows=sequence.block_rows,
        )
        self._slot = SlotTable.empty(self.slots)
        self._lane = LaneTable.empty(lanes)
        self._tree = SumTree(self.slots)
        self._next_key = 0
        self._live = 0  # blocks
        self._startable = 0
        self._lock = threading.Lock()  # tables, tree, counters
        self._writing = threading.Lock()  # the data

    @property
    def startable(self) -> int:
        """Sequences that can be drawn now."""
        return self._startable

    @property
    def rows(self) -> int:
        """Rows stored now."""
        return self._live * self.sequence.block_rows

    @property
    def capacity_rows(self) -> int:
        """Rows that it can hold."""
        return self.budget.rows

    @property
    def block_nbytes(self) -> float:
        """Of one block, before compression."""
        return self.budget.total_bytes / self.slots

    @property
    def rings(self) -> list[BlockRing]:
        """Itself (see rlx.replay.shards for several)."""
        return [self]

    @property
    def copies_into_buffers(self) -> bool:
        """Whether `draw` fills buffers; else it answers arrays of its own."""
        return self._storage.in_place

    @property
    def oldest_key(self) -> int:
        """Of the blocks that are there, or the next one's if none is."""
        return max(0, self._next_key - self.slots)

    @property
    def next_key(self) -> int:
        """Of the next block to come."""
        return self._next_key

    @property
    def nbytes(self) -> int:
        tables = [*vars(self._slot).values(), *vars(self._lane).values()]
        return self._storage.nbytes + sum(t.nbytes for t in tables) + self._tree.nbytes

    @property
    def bytes_per_row(self) -> float:
        """All bytes of the ring by rows of capacity."""
        return self.nbytes / self.budget.rows

    def leaves(self, keys: np.ndarray) -> np.ndarray:
        """f64[n]: the leaf of each key i64[n]; 0 where it cannot be drawn (any more)."""
        with self._lock:
            slots = keys % self.slots
            return np.where(self._slot.key[slots] == keys, self._tree.get(slots), 0.0)

    @property
    def all_leaves(self) -> np.ndarray:
        """f64[slots]: a read-only view."""
        return self._tree.values

    def load_leaves(self, leaves: np.ndarray) -> None:
        """Sets f64[slots], zero where they are zero now."""
        with self._lock:
            self._tree.load(leaves)

    def stats(self) -> dict[str, float]:
        """Metrics: how full it is, and what was dropped or drawn again since the run began."""
        return {
            "replay/fill": self.rows / self.budget.rows,
            "replay/startable_sequences": float(self._startable),
            "replay/blocks_dropped": float(self.blocks_dropped),
            "replay/redraws": float(self.redraws),
        }

    # --- writing ---

    def add(self, rollout: Rollout, leaf_of: LeafOf) -> None:
        """Adds a rollout's blocks; `leaf_of` gives the leaves of the sequences they complete.

        Raises ValueError, with nothing added, for a block out of order within its chain or rows
        that are not of the spec. Blocks of an older chain of their lane are dropped and counted.
        """
        with self._writing:
            for part in self._parts(rollout):
                slots = part.keys % self.slots
                with self._lock:
                    self._retire(slots)
                self._write(part)
                with self._lock:
                    self._publish(part, slots)
                    starts = self._completed(part.keys)
                if starts.size:
                    leaves = leaf_of(starts)
                    with self._lock:
                        self._tree.set(starts % self.slots, leaves)
                        self._startable += len(starts)

    def check(self, rollout: Rollout) -> None:
        """Raises what `add` would, and adds nothing."""
        self._checked(rollout)
        self._admit(rollout.lane, rollout.chain, rollout.number)

    def set_leaves(self, keys: np.ndarray, leaves: np.ndarray) -> int:
        """Sets f64[n] > 0 of i64[n] keys and answers how many were overwritten since: ignored."""
        keys = np.asarray(keys, np.int64)
        self._check_keys(keys)
        with self._lock:
            slots = keys % self.slots
            live = self._slot.key[slots] == keys
            if (self._tree.get(slots[live]) == 0).any():
                raise ValueError(
                    f"Of the keys {keys[live].tolist()} some begin no startable sequence; "
                    f"pass the keys of a sample."
                )
            self._tree.set(slots[live], leaves[live])
        return int((~live).sum())

    def scalars(self, keys: np.ndarray) -> Row:
        """Row [M, L] of these sequences without observations; for the writer's thread only."""
        flat = self._storage.scalars(self._window(keys) % self.slots, self.sequence.length)
        scalars: Row = trees.unflatten(self._scalar_spec, flat)
        return scalars

    def _parts(self, rollout: Rollout) -> Iterator[_Part]:
        """The blocks to write, a few at a time so that readers never find the ring empty."""
        rows, carry = self._checked(rollout)
        kept, previous = self._admit(rollout.lane, rollout.chain, rollout.number)
        self.blocks_dropped += len(rollout.lane) - len(kept)
        first_key, most = self._next_key, max(1, self.slots // 8)
        for begin in range(0, len(kept), most):
            some = kept[begin : begin + most]
            index = _as_slice(some)
            yield _Part(
                keys=first_key + begin + np.arange(len(some)),
                previous_key=previous[begin : begin + most],
                lane=rollout.lane[index],
                chain=rollout.chain[index],
                number=rollout.number[index],
                weights_version=rollout.weights_version[index],
                rows={path: leaf[index] for path, leaf in rows.items()},
                carry={path: leaf[index] for path, leaf in carry.items()},
            )

    def _checked(self, rollout: Rollout) -> tuple[Leaves, Leaves]:
        """The leaves of a rollout's rows [M, K, ...] and carry [M, ...]."""
        leading = (len(rollout.lane), self.sequence.block_rows)
        return (
            checked_leaves("rows", rollout.rows, self._row_leaves, leading),
            checked_leaves("carry", rollout.carry, self._carry_leaves, leading[:1]),
        )

    def _admit(
        self, lane: np.ndarray, chain: np.ndarray, number: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the blocks to keep, and the key of the block before each in its chain."""
        heads: dict[int, tuple[int, int, int]] = {}  # lane -> chain, expected number, last key
        kept: list[int] = []
        previous: list[int] = []
        blocks = zip(lane.tolist(), chain.tolist(), number.tolist(), strict=True)
        for i, (its_lane, its_chain, its_number) in enumerate(blocks):
            newest, expected, last_key = heads.get(its_lane) or self._head(its_lane)
            if its_chain < newest:
                continue
            if its_chain > newest:
                expected, last_key = 0, -1
            if its_number != expected:
                raise ValueError(
                    f"Block out of order: lane {its_lane}, chain {its_chain} expects number "
                    f"{expected}, got {its_number}; deliver each block once and in order, "
                    f"or start a new chain at 0."
                )
            heads[its_lane] = (its_chain, expected + 1, self._next_key + len(kept))
            kept.append(i)
            previous.append(last_key)
        return np.array(kept, np.int64), np.array(previous, np.int64)

    def _head(self, lane: int) -> tuple[int, int, int]:
        if not 0 <= lane < self.lanes:
            raise ValueError(f"Lane {lane} is not one of the {self.lanes} lanes 0 .. lanes-1.")
        table = self._lane
        return int(table.chain[lane]), int(table.expected[lane]), int(table.last_key[lane])

    def _retire(self, slots: np.ndarray) -> None:
        self._startable -= int((self._tree.get(slots) > 0).sum())
        self._live -= int((self._slot.key[slots] >= 0).sum())
        self._tree.set(slots, 0.0)
        self._slot.key[slots] = -1

    def _write(self, part: _Part) -> None:
        self._storage.write(int(part.keys[0]) % self.slots, part.rows, part.carry)

    def _publish(self, part: _Part, slots: np.ndarray) -> None:
        table = self._slot
        table.key[slots] = part.keys
        table.next_key[slots] = -1
        table.previous_key[slots] = part.previous_key
        table.lane[slots], table.chain[slots] = part.lane, part.chain
        table.number[slots], table.weights_version[slots] = part.number, part.weights_version
        linked = self._live_keys(part.previous_key)
        table.next_key[part.previous_key[linked] % self.slots] = part.keys[linked]
        # A lane's blocks come in order, so of several in this part the last one stays.
        self._lane.chain[part.lane] = part.chain
        self._lane.expected[part.lane] = part.number + 1
        self._lane.last_key[part.lane] = part.keys
        self._next_key = int(part.keys[-1]) + 1
        self._live += len(slots)
        self.env_steps += int(np.count_nonzero(part.rows["valid"]))

    def _completed(self, keys: np.ndarray) -> np.ndarray:
        """i64[m]: the starts whose last needed block is one of these new ones."""
        first = self._slot.number[keys % self.slots] - (self.sequence.blocks - 1)
        keys = keys[(first >= 0) & (first % self.sequence.blocks_per_stride == 0)]
        for _ in range(self.sequence.blocks - 1):
            keys = self._slot.previous_key[keys % self.slots]
            keys = keys[self._live_keys(keys)]
        return keys

    def _live_keys(self, keys: np.ndarray) -> np.ndarray:
        """bool[n]: which blocks are in the ring."""
        live: np.ndarray = (keys >= 0) & (self._slot.key[keys % self.slots] == keys)
        return live

    def _check_keys(self, keys: np.ndarray) -> None:
        wrong = keys[(keys < 0) | (keys >= self._next_key)]
        if wrong.size:
            raise ValueError(
                f"Keys {wrong[:5].tolist()} were never given out: {self._next_key} blocks came; "
                f"pass the keys of a sample."
            )

    # --- reading ---

    def buffers(self, batch_size: int) -> Batch:
        """A batch of uninitialised arrays to draw into, again and again."""
        length = self.sequence.length
        rows = {
            path: np.empty((batch_size, length, *leaf.shape), leaf.dtype)
            for path, leaf in self._row_leaves.items()
        }
        carry = {
            path: np.empty((batch_size, *leaf.shape), leaf.dtype)
            for path, leaf in self._carry_leaves.items()
        }
        return Batch(
            rows=trees.unflatten(self._row_spec, rows),
            carry=trees.unflatten(self._carry_spec, carry),
            importance=np.ones(batch_size, np.float32),
        )

    def draw(
        self,
        batch_size: int,
        rng: np.random.Generator,
        *,
        stratified: bool = False,
        buffers: Batch | None = None,
        find_least: bool = False,
    ) -> Drawn:
        """Draws with replacement, in proportion to the leaves, and copies into the buffers.

        stratified: one draw from each of batch_size equal parts of the total. find_least: the least
        probability of all, too (else 0). Raises ValueError if nothing is startable.
        """
        choice, least = self._choose(np.arange(batch_size), batch_size, rng, stratified, find_least)
        rows, carry = self._copy_out(choice.window, buffers)
        for _ in range(_MAX_REDRAWS):
            changed = self._changed(choice.window)
            if not changed.size:
                break
            again, new_least = self._choose(changed, batch_size, rng, stratified, find_least)
            least = min(least, new_least)
            for name, values in vars(again).items():
                getattr(choice, name)[changed] = values
            rows, carry = self._copy_again(changed, choice.window, rows, carry)
        else:
            raise RuntimeError(
                f"{_MAX_REDRAWS} draws in a row were overwritten while being copied: "
                f"{self.slots} blocks are too few for this writer; raise replay.capacity."
            )
        return Drawn(
            rows=trees.unflatten(self._row_spec, rows),
            carry=trees.unflatten(self._carry_spec, carry),
            keys=choice.window[:, 0].copy(),
            weights_version=choice.weights_version,
            scaled_probability=choice.scaled_probability,
            least_scaled_probability=least,
        )

    def read(self, keys: np.ndarray, *, buffers: Batch | None = None) -> Drawn:
        """Copies the sequences with these keys i64[n]; for the writer's thread only."""
        with self._lock:
            window = self._window(keys)
            if not self._live_keys(window).all():
                raise ValueError("Of these sequences some are not in the ring (any more).")
            version = self._slot.weights_version[keys % self.slots]
        rows, carry = self._copy_out(window, buffers)
        return Drawn(
            rows=trees.unflatten(self._row_spec, rows),
            carry=trees.unflatten(self._carry_spec, carry),
            keys=keys,
            weights_version=version,
            scaled_probability=np.ones(len(keys)),
            least_scaled_probability=0.0,
        )

    def _least_leaf(self) -> float:
        leaves = self._tree.values
        return float(leaves[leaves > 0].min())

    def _choose(
        self,
        which: np.ndarray,
        batch_size: int,
        rng: np.random.Generator,
        stratified: bool,
        find_least: bool,
    ) -> tuple[_Choice, float]:
        """Chooses for these positions i64[n] of the batch; answers the least probability, too."""
        with self._lock:
            if self._startable == 0:
                raise ValueError(
                    f"No sequence is startable: {self._live} blocks of {self.sequence.block_rows} "
                    f"rows are stored, a sequence needs {self.sequence.blocks} of one chain; "
                    f"add more before sampling."
                )
            total, uniform = self._tree.total, rng.random(len(which))
            slots = self._tree.find(
                total * ((which + uniform) / batch_size if stratified else uniform)
            )
            least = self._least_leaf() / total * self._startable if find_least else 0.0
            return _Choice(
                window=self._window(self._slot.key[slots]),
                weights_version=self._slot.weights_version[slots],
                scaled_probability=self._startable * (self._tree.get(slots) / total),
            ), least

    def _window(self, keys: np.ndarray) -> np.ndarray:
        """i64[n, blocks]: the keys of each sequence's blocks, following the links."""
        window = np.empty((len(keys), self.sequence.blocks), np.int64)
        window[:, 0] = keys
        for block in range(1, self.sequence.blocks):
            window[:, block] = self._slot.next_key[window[:, block - 1] % self.slots]
        return window

    def _copy_out(self, window: np.ndarray, buffers: Batch | None) -> tuple[Leaves, Leaves]:
        """(rows, carry) of these windows: in the buffers or in new arrays."""
        slots = window % self.slots
        if not self._storage.in_place:
            return self._storage.take(slots, self.sequence.length)
        batch = buffers or self.buffers(len(window))
        rows = checked_buffers(batch.rows, len(window))
        carry = checked_buffers(batch.carry, len(window))
        self._storage.gather(slots, rows, carry)
        return rows, carry

    def _copy_again(
        self, which: np.ndarray, window: np.ndarray, rows: Leaves, carry: Leaves
    ) -> tuple[Leaves, Leaves]:
        """The same, with these positions of the batch copied once more."""
        if not self._storage.in_place:
            return self._copy_out(window, None)
        some_rows, some_carry = self._copy_out(window[which], None)
        for out, fresh in ((rows, some_rows), (carry, some_carry)):
            for path, leaf in out.items():
                leaf[which] = fresh[path]
        return rows, carry

    def _changed(self, window: np.ndarray) -> np.ndarray:
        """i64[m]: positions of which a block was overwritten since it was chosen."""
        with self._lock:
            same = (self._slot.key[window % self.slots] == window).all(axis=1)
            self.redraws += int((~same).sum())
        return np.flatnonzero(~same)

    # --- saving ---

    def state(self) -> dict[str, Any]:
        """Flat names to arrays and JSON scalars: all that `restore` needs beside the blocks."""
        with self._writing, self._lock:
            used = min(self._next_key, self.slots)  # slots ever filled
            counters = {name: int(getattr(self, name)) for name in _COUNTERS}
            tables = {
                path: (array if path.startswith("lane/") else array[:used]).copy()
                for path, array in self._tables().items()
            }
            return {"layout": self._layout(), **counters, **tables}

    def blocks_after(self, key: int, most: int) -> tuple[Blocks, int]:
        """Copies of up to `most` blocks with later keys, the oldest first; for any thread.

        Answers the key to go on after, too: the one given if nothing later came. Blocks that are
        overwritten meanwhile are left out.
        """
        with self._lock:
            first = max(key + 1, self._next_key - self.slots)
            keys = np.arange(first, min(first + most, self._next_key))
            last = int(keys[-1]) if keys.size else key
            keys = keys[self._live_keys(keys)]
        rows, carry = self._storage.blocks(keys % self.slots)
        with self._lock:
            same = self._live_keys(keys)
        return Blocks(
            keys=keys[same],
            rows={path: leaf[same] for path, leaf in rows.items()},
            carry={path: leaf[same] for path, leaf in carry.items()},
        ), last

    def restore(self, state: Mapping[str, Any], blocks: Sequence[Iterable[Blocks]]) -> None:
        """Takes over a saved state, given all blocks of it (and perhaps older ones) of each ring.

        Raises ValueError if it is of a ring made otherwise, or a block is missing.
        """
        if (saved := state.get("shards", 1)) != 1:
            raise ValueError(
                f"the saved replay has {saved} shards, now 1; resume with as many, or with "
                "checkpoint.replay=false to fill a new one"
            )
        if state["layout"] != self._layout():
            differences = _differences(state["layout"], self._layout())
            raise ValueError(
                f"the saved replay has another layout ({differences}); resume with the settings "
                "it was saved with, or with checkpoint.replay=false to fill a new one"
            )
        with self._writing, self._lock:
            self._slot.key[:] = -1
            for path, array in self._tables().items():
                if path != "leaves":
                    array[: len(state[path])] = state[path]
            self._tree.load(state["leaves"])
            for name in _COUNTERS:
                setattr(self, name, int(state[name]))
            self._live = int((self._slot.key >= 0).sum())
            self._startable = int((self._tree.values > 0).sum())
            found = sum(self._restore_blocks(some) for its in blocks for some in its)
        if found != self._live:
            raise ValueError(
                f"the saved replay has {self._live} blocks, {found} were found: it is damaged; "
                "resume with checkpoint.replay=false to fill a new one"
            )

    def _restore_blocks(self, blocks: Blocks) -> int:
        """Writes those that the tables name; answers how many."""
        live = np.flatnonzero(self._live_keys(blocks.keys))
        for run in np.split(live, np.flatnonzero(np.diff(blocks.keys[live]) != 1) + 1):
            if run.size:
                index = _as_slice(run)
                rows = {path: leaf[index] for path, leaf in blocks.rows.items()}
                carry = {path: leaf[index] for path, leaf in blocks.carry.items()}
                self._storage.write(int(blocks.keys[run[0]]) % self.slots, rows, carry)
        return len(live)

    def check_valid(self) -> tuple[bool, str]:
        """Whether tables, links, tree and counters agree (slow: for tests)."""
        with self._writing, self._lock:
            valid, reason = self._tree.check_valid()
            if not valid:
                return False, reason
            live = np.flatnonzero(self._slot.key >= 0)
            starts = np.flatnonzero(self._tree.values > 0)
            if self._live != len(live) or self._startable != len(starts):
                return False, "a counter is wrong"
            if (self._slot.key[live] % self.slots != live).any():
                return False, "a key lies in another's slot"
            if not self._live_keys(self._window(self._slot.key[starts])).all():
                return False, "a start has lost a block"
            linked = live[self._slot.next_key[live] >= 0]
            following = self._slot.next_key[linked] % self.slots
            for name, step in (("lane", 0), ("chain", 0), ("number", 1)):
                values = getattr(self._slot, name)
                if (values[following] != values[linked] + step).any():
                    return False, f"a link goes to another {name}"
            return True, ""

    def _tables(self) -> dict[str, np.ndarray]:
        """Per slot, or per lane where the name begins with `lane/`."""
        tables = {f"slot/{name}": array for name, array in vars(self._slot).items()}
        tables |= {f"lane/{name}": array for name, array in vars(self._lane).items()}
        return tables | {"leaves": self._tree.values}

    def _layout(self) -> str:
        """JSON of all that a saved state depends on."""
        leaves = trees.flatten({"rows": self._row_spec, "carry": self._carry_spec})
        return json.dumps(
            {
                "slots": self.slots,
                "lanes": self.lanes,
                "sequence": asdict(self.sequence),
                "leaves": {path: [list(leaf.shape), leaf.dtype] for path, leaf in leaves.items()},
            },
            sort_keys=True,
        )


def _differences(saved: str, now: str) -> str:
    """'lanes 64, now 128': where two layouts differ."""
    a, b = json.loads(saved), json.loads(now)
    return "; ".join(f"{name} {a[name]}, now {b[name]}" for name in a if a[name] != b[name])


_COUNTERS = ("_next_key", "env_steps", "blocks_dropped", "redraws")


def _as_slice(indices: np.ndarray) -> Any:
    """The same indices as a slice where they have no gap: a view instead of a copy."""
    if indices[-1] - indices[0] + 1 == len(indices):
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices
