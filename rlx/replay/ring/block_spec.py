"""Says what a ring keeps of a block, and how sequences lie over blocks.

Leaves are named by paths: `rows/...` [K, ...] for the K rows of a block, `carry/...` for the carry
before its first row, `next/...` for the input after its last one. That input is kept only where a
sequence may end with a block; elsewhere it is the following row's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from rlx import trees
from rlx.types import ArraySpec, Batch, Carry, Leaves, NetInput, Row, SequenceSpec

ROWS, CARRY, NEXT = "rows/", "carry/", "next/"
INPUTS = ROWS + "inputs/"
OBSERVATION = INPUTS + "observation/"
FRAMES = CARRY + "frames/"
FIRST = INPUTS + "first"
VALID = ROWS + "valid"


@dataclass(frozen=True, kw_only=True)
class Windows:
    """These arrays say where sequences begin and which blocks they touch."""

    slots: np.ndarray  # i64[n, blocks]; where one touches fewer, its last slot is repeated
    row: np.ndarray  # i64[n]: the first row within the first block

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, kw_only=True)
class Places:
    """These arrays say where the rows of windows lie in leaves seen as [slots * K, ...]."""

    rows: np.ndarray  # i64[n, L]
    following: np.ndarray  # i64[n]: the row after the last; the last itself where a block ends
    at_end: np.ndarray  # i64[m]: the windows that end with a block
    last_slot: np.ndarray  # i64[m]: that block's


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """The leaves of a block; `row` and `carry` have ArraySpec leaves."""

    sequence: SequenceSpec
    row: Row
    carry: Carry

    def check(self) -> None:
        """Raises ValueError for sequences that no ring can give."""
        sequence = self.sequence
        stride, block_rows = sequence.stride, sequence.block_rows
        if block_rows < 1 or sequence.length < 1:
            raise ValueError(f"A sequence needs block_rows >= 1 and length >= 1, got {sequence}.")
        if stride < 1 or (stride % block_rows and block_rows % stride):
            raise ValueError(
                f"stride={stride} rows is neither a multiple nor a divisor of "
                f"block_rows={block_rows}: sequences start at the same rows of every block."
            )
        if stride < block_rows and (other := self.carry_leaves.keys() - self.frames_of.keys()):
            raise ValueError(
                f"stride={stride} is below block_rows={block_rows}, but {min(other)} is stored for "
                "a block's first row only; set agent.stride to a multiple of agent.block_rows."
            )

    @cached_property
    def leaves(self) -> dict[str, ArraySpec]:
        """The specs by path: of one row, one carry and, if kept, one input after the last row."""
        kept = {"rows": self.row, "carry": self.carry}
        if self.sequence.ends_with_a_block:
            kept["next"] = self.row.inputs
        found: dict[str, ArraySpec] = trees.flatten(kept)
        return found

    @cached_property
    def stored(self) -> dict[str, ArraySpec]:
        """The same of whole blocks: [K, ...] for rows."""
        k = self.sequence.block_rows
        return {
            path: ArraySpec(shape=(k, *leaf.shape), dtype=leaf.dtype)
            if path.startswith(ROWS)
            else leaf
            for path, leaf in self.leaves.items()
        }

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one block, before compression."""
        return sum(map(leaf_nbytes, self.stored.values()))

    @cached_property
    def carry_leaves(self) -> dict[str, ArraySpec]:
        return {path: leaf for path, leaf in self.leaves.items() if path.startswith(CARRY)}

    @cached_property
    def frames_of(self) -> dict[str, str]:
        """Paths of the carried frames -> of the rows' leaves that such frames come from."""
        return {
            path: OBSERVATION + path.removeprefix(FRAMES)
            for path in self.carry_leaves
            if path.startswith(FRAMES)
        }

    @cached_property
    def scalars(self) -> dict[str, ArraySpec]:
        """All of a row but its observation."""
        return {p: s for p, s in self.leaves.items() if is_scalar(p)}

    @property
    def starts_inside(self) -> bool:
        """Says whether sequences start at other rows of a block than its first, too."""
        return len(self.sequence.start_rows) > 1

    def buffers(self, batch_size: int) -> Batch:
        """A batch of uninitialised arrays."""
        length = self.sequence.length

        def rows(leaf: ArraySpec) -> np.ndarray:
            return np.empty((batch_size, length, *leaf.shape), leaf.dtype)

        def one(leaf: ArraySpec) -> np.ndarray:
            return np.empty((batch_size, *leaf.shape), leaf.dtype)

        return Batch(
            rows=trees.tree_map(rows, self.row),
            next=trees.tree_map(one, self.row.inputs),
            carry=trees.tree_map(one, self.carry),
            importance=np.ones(batch_size, np.float32),
        )

    def trees_of(self, leaves: Leaves) -> tuple[Row, NetInput, Carry]:
        """(rows, next, carry) of a batch's leaves by path."""
        return (
            trees.unflatten(self.row, leaves, ROWS[:-1]),
            trees.unflatten(self.row.inputs, leaves, NEXT[:-1]),
            trees.unflatten(self.carry, leaves, CARRY[:-1]),
        )

    def scalar_rows(self, leaves: Leaves) -> Row:
        """A Row without observations of the leaves that `scalars` names."""
        like = replace(self.row, inputs=replace(self.row.inputs, observation={}))
        found: Row = trees.unflatten(like, leaves, ROWS[:-1])
        return found

    def places(self, windows: Windows) -> Places:
        """Finds where the rows of these windows lie."""
        if not self.starts_inside:
            blocks, rows, ends = self._places_from(np.zeros((), np.int64))
            slots, every = windows.slots[:, blocks], np.arange(len(windows) if ends else 0)
        else:
            blocks, rows, ends = self._places_from(windows.row[:, None])
            slots, every = np.take_along_axis(windows.slots, blocks, axis=1), np.flatnonzero(ends)
        places = slots * self.sequence.block_rows + rows
        return Places(
            rows=places[:, :-1],
            following=places[:, -1],
            at_end=every,
            last_slot=slots[every, -1],
        )

    def _places_from(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(block of the window, row of the block) of L + 1 rows, whether a block ends the window.

        Where one does, the last row is there twice.
        """
        position = row + np.arange(self.sequence.length + 1)
        ends = position[..., -1] % self.sequence.block_rows == 0
        position[..., -1] -= ends
        blocks, rows = np.divmod(position, self.sequence.block_rows)
        return blocks, rows, ends

    def frames_before(self, windows: Windows, first: np.ndarray) -> dict[str, np.ndarray]:
        """i64[n, S-1] by the path of carried frames; {} where all sequences start with a block.

        first: bool[n, K] of each window's first block. The stack of `rlx.networks.cores`
        before each window's first row, oldest first: rows of that block, or below 0 the frames of
        its own carry, whose newest one is -1. An episode's first frame stands for those before it.
        """
        if not self.starts_inside:
            return {}
        rows = np.arange(self.sequence.block_rows)
        found = {}
        for path in self.frames_of:
            count = self.carry_leaves[path].shape[0]
            seen = first & (rows < windows.row[:, None])
            began = np.where(seen, rows, -count).max(axis=1)
            places = windows.row[:, None] - np.arange(count, 0, -1)
            found[path] = np.maximum(places, began[:, None])
        return found


def is_scalar(path: str) -> bool:
    """Says whether a leaf is of rows, and no observation."""
    return path.startswith(ROWS) and not path.startswith(OBSERVATION)


def input_path(path: str) -> str:
    """The leaf of the rows that is like this one of `next/`."""
    return INPUTS + path.removeprefix(NEXT)


def leaf_nbytes(leaf: ArraySpec) -> int:
    """Bytes of one array."""
    return int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def block_leaves(rows: Row, carry: Carry, following: Any, spec: Mapping[str, Any]) -> Leaves:
    """The leaves of blocks [M, ...] by path; `next/` only where the spec has it."""
    kept: dict[str, Any] = {"rows": rows, "carry": carry}
    if any(path.startswith(NEXT) for path in spec):
        kept["next"] = following
    leaves: Leaves = trees.flatten(kept)
    return leaves


def checked_leaves(what: str, given: Leaves, stored: Mapping[str, ArraySpec], blocks: int) -> None:
    """Raises ValueError where leaves of blocks [M, ...] below `what` are not as they are stored."""
    leaves = {path: leaf for path, leaf in given.items() if path.startswith(what)}
    wanted = {path: spec for path, spec in stored.items() if path.startswith(what)}
    if leaves.keys() != wanted.keys():
        raise ValueError(
            f"A rollout has the leaves {sorted(leaves)}, the replay stores {sorted(wanted)}; both "
            "must come from one spec."
        )
    for path, leaf in leaves.items():
        want = wanted[path]
        if leaf.shape != (blocks, *want.shape) or leaf.dtype != want.dtype:
            raise ValueError(
                f"A rollout's leaf {path} is {leaf.dtype}{list(leaf.shape)}, the replay "
                f"stores {want.dtype}{[blocks, *want.shape]}; convert it where it is made."
            )


def checked_buffers(tree: Any, batch_size: int) -> Leaves:
    """The leaves of buffers for a batch, if they hold as many sequences."""
    leaves: Leaves = trees.flatten(tree)
    for path, leaf in leaves.items():
        if len(leaf) != batch_size:
            raise ValueError(
                f"Buffer {path} holds {len(leaf)} sequences, {batch_size} are asked for; "
                f"make it by buffers({batch_size})."
            )
    return leaves
