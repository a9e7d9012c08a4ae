"""Knows which blocks lie in a ring, how they follow, and which sequences start in them.

A *block key* is a block's number among all blocks ever added; the block lies in slot key % slots
until the one `slots` later overwrites it. Lanes interleave in the ring, so each slot links to its
chain's next block:

    block keys   40   41   42   43   44   45     blocks of a sequence: 3, starts: each block
    lane          0    1    0    1    1    0     windows: (40, 42, 45) of lane 0
    number        7    2    8    3    4    9              (41, 43, 44) of lane 1

A *key*, as samples have it, names a sequence by its start: block key * S + i for the i-th of the S
rows of a block that sequences start at (`SequenceSpec.start_rows`); where blocks are all there is
to start at, it is the block key. Its leaf in the sum tree has index key % (slots * S).

A start's leaf is positive while all blocks of its window are there, and 0 otherwise. The ring
forgets the oldest block first, so a live start never loses its tail.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from rlx.replay.ring.block_spec import Windows
from rlx.replay.ring.sum_tree import SumTree, sum_tree_nbytes
from rlx.types import SequenceSpec


@dataclass(kw_only=True)
class SlotTable:
    """This is known of the block in each slot; the key is -1 where there is none."""

    key: np.ndarray  # i64[slots]
    next_key: np.ndarray  # i64[slots]: the chain's next block, -1 if it has not come
    previous_key: np.ndarray  # i64[slots]: the chain's block before, perhaps forgotten since
    lane: np.ndarray  # i32[slots]
    chain: np.ndarray  # i32[slots]
    number: np.ndarray  # i64[slots], within the chain
    weights_version: np.ndarray  # i64[slots]

    @classmethod
    def empty(cls, slots: int) -> SlotTable:
        wide = [np.full(slots, -1, np.int64) for _ in range(5)]
        return cls(
            key=wide[0],
            next_key=wide[1],
            previous_key=wide[2],
            number=wide[3],
            weights_version=wide[4],
            lane=np.full(slots, -1, np.int32),
            chain=np.full(slots, -1, np.int32),
        )


@dataclass(kw_only=True)
class LaneTable:
    """These arrays say where each lane's latest chain stands."""

    chain: np.ndarray  # i32[lanes], -1 before the first
    expected: np.ndarray  # i64[lanes]: the number of the chain's next block
    last_key: np.ndarray  # i64[lanes]: of the chain's last block, -1 before the first

    @classmethod
    def empty(cls, lanes: int) -> LaneTable:
        return cls(
            chain=np.full(lanes, -1, np.int32),
            expected=np.zeros(lanes, np.int64),
            last_key=np.full(lanes, -1, np.int64),
        )


SLOT_NBYTES = 5 * 8 + 2 * 4
LANE_NBYTES = 4 + 2 * 8


def index_nbytes(slots: int, sequence: SequenceSpec) -> int:
    """Bytes of an index without its lanes (LANE_NBYTES each), without making one."""
    return slots * SLOT_NBYTES + sum_tree_nbytes(slots * len(sequence.start_rows))


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """Blocks as they come, with consecutive keys."""

    keys: np.ndarray  # i64[M]
    previous_key: np.ndarray  # i64[M]
    lane: np.ndarray  # i32[M]
    chain: np.ndarray  # i32[M]
    number: np.ndarray  # i64[M]
    weights_version: np.ndarray  # i64[M]


@final
class BlockIndex:
    """Tables of the blocks and lanes, and the sum tree of the starts. Not thread-safe."""

    def __init__(self, slots: int, lanes: int, sequence: SequenceSpec) -> None:
        self.slots = slots
        self.slot = SlotTable.empty(slots)
        self.lane = LaneTable.empty(lanes)
        self.starts_per_block = len(sequence.start_rows)
        self.tree = SumTree(slots * self.starts_per_block)
        self.next_key = 0  # of the next block to come
        self.live = 0  # blocks
        self.startable = 0  # sequences
        self._sequence, self._lanes = sequence, lanes
        self._start_rows = np.array(sequence.start_rows)
        self._needed = np.array([sequence.blocks_from(row) for row in sequence.start_rows])

    @property
    def nbytes(self) -> int:
        tables = [*vars(self.slot).values(), *vars(self.lane).values()]
        return sum(table.nbytes for table in tables) + self.tree.nbytes

    @property
    def oldest_key(self) -> int:
        """The oldest stored block's; `next_key` if the index is empty."""
        return max(0, self.next_key - self.slots)

    # --- blocks ---

    def admit(
        self, lane: np.ndarray, chain: np.ndarray, number: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the blocks to keep, and the key of the block before each in its chain.

        Blocks of an older chain than their lane's latest are left out. Raises ValueError for a
        block out of order.
        """
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
            heads[its_lane] = (its_chain, expected + 1, self.next_key + len(kept))
            kept.append(i)
            previous.append(last_key)
        return np.array(kept, np.int64), np.array(previous, np.int64)

    def _head(self, lane: int) -> tuple[int, int, int]:
        if not 0 <= lane < self._lanes:
            raise ValueError(f"Lane {lane} is not one of the {self._lanes} lanes 0 .. lanes-1.")
        table = self.lane
        return int(table.chain[lane]), int(table.expected[lane]), int(table.last_key[lane])

    def retire(self, slots: np.ndarray) -> None:
        """Forgets the blocks in these slots."""
        starts = (slots[:, None] * self.starts_per_block + np.arange(self.starts_per_block)).ravel()
        self.startable -= int((self.tree.get(starts) > 0).sum())
        self.live -= int((self.slot.key[slots] >= 0).sum())
        self.tree.set(starts, 0.0)
        self.slot.key[slots] = -1

    def publish(self, new: Arrivals) -> None:
        """Makes these blocks known, and links their chains to them."""
        slots, table = new.keys % self.slots, self.slot
        table.key[slots] = new.keys
        table.next_key[slots] = -1
        table.previous_key[slots] = new.previous_key
        table.lane[slots], table.chain[slots] = new.lane, new.chain
        table.number[slots], table.weights_version[slots] = new.number, new.weights_version
        linked = self.are_live(new.previous_key)
        table.next_key[new.previous_key[linked] % self.slots] = new.keys[linked]
        # A lane's blocks come in order, so of several in this part the last one stays.
        self.lane.chain[new.lane] = new.chain
        self.lane.expected[new.lane] = new.number + 1
        self.lane.last_key[new.lane] = new.keys
        self.next_key = int(new.keys[-1]) + 1
        self.live += len(slots)

    def are_live(self, block_keys: np.ndarray) -> np.ndarray:
        """bool[...]: which of these blocks are there."""
        live: np.ndarray = (block_keys >= 0) & (
            self.slot.key[block_keys % self.slots] == block_keys
        )
        return live

    # --- starts ---

    def completed(self, block_keys: np.ndarray) -> np.ndarray:
        """i64[m]: keys of the sequences whose last block is one of these, which have just come.

        In the order of these blocks, and of one block in the order of a chain's rows.
        """
        found, order = [], []
        for blocks in np.unique(self._needed)[::-1]:  # with more blocks it has started earlier
            begin, which = self._begins(block_keys, int(blocks))
            starts = np.flatnonzero(self._needed == blocks)
            found.append((begin[:, None] * self.starts_per_block + starts).ravel())
            order.append(np.repeat(which, len(starts)))
        if len(found) == 1:
            return found[0]
        return np.concatenate(found)[np.argsort(np.concatenate(order), kind="stable")]

    def _begins(self, block_keys: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """First blocks of windows of so many that end with these, and which of these it is."""
        first = self.slot.number[block_keys % self.slots] - (blocks - 1)
        which = np.flatnonzero((first >= 0) & (first % self._sequence.blocks_per_stride == 0))
        begin = block_keys[which]
        for _ in range(blocks - 1):
            begin = self.slot.previous_key[begin % self.slots]
            live = self.are_live(begin)
            begin, which = begin[live], which[live]
        return begin, which

    def start(self, keys: np.ndarray, leaves: np.ndarray) -> None:
        """Gives completed sequences their first leaves f64[n] > 0."""
        self.tree.set(keys % self.tree.size, leaves)
        self.startable += len(keys)

    def set_leaves(self, keys: np.ndarray, leaves: np.ndarray) -> int:
        """Sets f64[n] > 0 of i64[n] keys and answers how many were overwritten since: ignored."""
        self._check_keys(keys)
        live = self.are_live(keys // self.starts_per_block)
        at = keys[live] % self.tree.size
        if (self.tree.get(at) == 0).any():
            raise ValueError(
                f"Of the keys {keys[live].tolist()} some begin no startable sequence; "
                f"pass the keys of a sample."
            )
        self.tree.set(at, leaves[live])
        return int((~live).sum())

    def leaves(self, keys: np.ndarray) -> np.ndarray:
        """f64[n]: the leaf of each key; 0 where it cannot be drawn (any more)."""
        live = self.are_live(keys // self.starts_per_block)
        return np.where(live, self.tree.get(keys % self.tree.size), 0.0)

    def keys_at(self, leaves: np.ndarray) -> np.ndarray:
        """i64[n]: the keys whose leaves have these indices i64[n]."""
        slots, starts = np.divmod(leaves, self.starts_per_block)
        return self.slot.key[slots] * self.starts_per_block + starts

    def least_leaf(self) -> float:
        """The smallest one of a startable sequence."""
        leaves = self.tree.values
        return float(leaves[leaves > 0].min())

    def window(self, keys: np.ndarray) -> np.ndarray:
        """i64[n, blocks]: the block keys of each sequence, following the links.

        Where it touches fewer blocks than others may, its last one is repeated.
        """
        window = np.empty((len(keys), self._sequence.blocks), np.int64)
        window[:, 0] = keys // self.starts_per_block
        needed = self._needed[keys % self.starts_per_block]
        for block in range(1, self._sequence.blocks):
            onward = self.slot.next_key[window[:, block - 1] % self.slots]
            window[:, block] = np.where(block < needed, onward, window[:, block - 1])
        return window

    def windows(self, keys: np.ndarray, window: np.ndarray) -> Windows:
        """Finds where these sequences with their block keys lie."""
        return Windows(
            slots=window % self.slots, row=self._start_rows[keys % self.starts_per_block]
        )

    def weights_version(self, keys: np.ndarray) -> np.ndarray:
        """i64[n]: of each sequence's first block."""
        version: np.ndarray = self.slot.weights_version[keys // self.starts_per_block % self.slots]
        return version

    def _check_keys(self, keys: np.ndarray) -> None:
        wrong = keys[(keys < 0) | (keys >= self.next_key * self.starts_per_block)]
        if wrong.size:
            raise ValueError(
                f"Keys {wrong[:5].tolist()} were never given out: {self.next_key} blocks came; "
                f"pass the keys of a sample."
            )

    # --- saving ---

    def state(self) -> dict[str, Any]:
        """Copies of all tables, as far as slots were ever filled."""
        used = min(self.next_key, self.slots)
        parts: dict[str, Iterable[tuple[str, np.ndarray]]] = {
            "slot": [(name, array[:used]) for name, array in vars(self.slot).items()],
            "lane": vars(self.lane).items(),
        }
        tables = {
            f"{part}/{name}": array.copy() for part, named in parts.items() for name, array in named
        }
        leaves = self.tree.values[: used * self.starts_per_block].copy()
        return {"_next_key": self.next_key, **tables, "leaves": leaves}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved state."""
        self.slot.key[:] = -1
        for part, table in (("slot", self.slot), ("lane", self.lane)):
            for name, array in vars(table).items():
                saved = state[f"{part}/{name}"]
                array[: len(saved)] = saved
        self.load_leaves(state["leaves"])
        self.next_key = int(state["_next_key"])
        self.live = int((self.slot.key >= 0).sum())

    def load_leaves(self, leaves: np.ndarray) -> None:
        """Sets all leaves f64[slots * S], or the first ones; the rest are 0."""
        self.tree.load(leaves)
        self.startable = int((self.tree.values > 0).sum())

    def check_valid(self) -> tuple[bool, str]:
        """Says whether tables, links, tree and counters agree (slow: for tests)."""
        valid, reason = self.tree.check_valid()
        if not valid:
            return False, reason
        live = np.flatnonzero(self.slot.key >= 0)
        starts = np.flatnonzero(self.tree.values > 0)
        if self.live != len(live) or self.startable != len(starts):
            return False, "a counter is wrong"
        if (self.slot.key[live] % self.slots != live).any():
            return False, "a key lies in another's slot"
        if not self.are_live(self.window(self.keys_at(starts))).all():
            return False, "a start has lost a block"
        return self._check_links(live)

    def _check_links(self, live: np.ndarray) -> tuple[bool, str]:
        linked = live[self.slot.next_key[live] >= 0]
        following = self.slot.next_key[linked] % self.slots
        for name, step in (("lane", 0), ("chain", 0), ("number", 1)):
            values = getattr(self.slot, name)
            if (values[following] != values[linked] + step).any():
                return False, f"a link goes to another {name}"
        return True, ""
