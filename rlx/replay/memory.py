"""The memory that a ring of blocks takes, and what there is: asked before allocating."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlx import trees
from rlx.replay.sum_tree import sum_tree_nbytes
from rlx.replay.tables import LaneTable, SlotTable
from rlx.types import ArraySpec, Carry, Row, SequenceSpec


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a ring will take, known before anything is allocated."""

    rows: int  # capacity, rounded down to whole blocks
    blocks: int  # slots of the ring
    sequences: int  # startable at least, once the ring is full and lanes run evenly
    bytes_per_row: float  # carries, keys, links and the sum tree included
    total_bytes: int

    def check(self, available_bytes: int) -> None:
        """Raises ValueError if the ring does not fit."""
        if self.total_bytes <= available_bytes:
            return
        fits = max(0, int(available_bytes / self.bytes_per_row))
        raise ValueError(
            f"A replay of {self.rows} rows takes {self.total_bytes / 1e9:.2f} GB "
            f"({self.bytes_per_row:.0f} bytes per row), {available_bytes / 1e9:.2f} GB are "
            f"available: at most about {fits} rows fit; lower replay.capacity."
        )

    def check_min_sequences(self, min_sequences: int) -> None:
        """Raises ValueError if so many can never be startable: learning would never begin."""
        if min_sequences > self.sequences:
            raise ValueError(
                f"replay.min_sequences={min_sequences}, but a full replay of {self.rows} rows "
                f"has about {self.sequences} startable: lower it or raise replay.capacity."
            )


def budget(
    *, capacity_rows: int, sequence: SequenceSpec, row_spec: Row, carry_spec: Carry, lanes: int
) -> Budget:
    """The budget of a ring; raises ValueError for settings that could never give a sample."""
    _check_sequence(sequence)
    blocks = capacity_rows // sequence.block_rows
    least = 2 * lanes * sequence.blocks
    if lanes < 1 or blocks < least:
        raise ValueError(
            f"capacity={capacity_rows} rows are {blocks} blocks; {lanes} lanes with "
            f"{sequence.blocks} blocks per sequence need at least 2 * {lanes} * {sequence.blocks} "
            f"= {least} blocks: raise replay.capacity to {least * sequence.block_rows} rows."
        )
    per_block = sequence.block_rows * _spec_nbytes(row_spec) + _spec_nbytes(carry_spec)
    per_block += SlotTable.nbytes_per_slot()
    total = blocks * per_block + sum_tree_nbytes(blocks) + lanes * LaneTable.nbytes_per_lane()
    rows = blocks * sequence.block_rows
    starts_per_lane = (blocks // lanes - sequence.blocks + 1) // sequence.blocks_per_stride
    return Budget(
        rows=rows,
        blocks=blocks,
        sequences=lanes * starts_per_lane,
        bytes_per_row=total / rows,
        total_bytes=total,
    )


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes this process may still take: MemAvailable or what its cgroups (v1, v2) leave.

    The smallest of those that can be read under `root`; sys.maxsize if none can.
    """
    meminfo = _named_numbers(root / "proc/meminfo").get("MemAvailable:")
    found = [] if meminfo is None else [meminfo * 1024]
    return min(found + list(_cgroup_headrooms(root)), default=sys.maxsize)


def _cgroup_headrooms(root: Path) -> Iterator[int]:
    """Bytes left in each cgroup above this process that has a limit."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            yield from _headroom((root / base).joinpath(*parts[:depth]), *names)


def _headroom(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int]:
    limit, usage = _lines(folder / limit_name), _lines(folder / usage_name)
    if limit and usage and limit[0].isdigit():
        cache = _named_numbers(folder / "memory.stat").get(cache_name, 0)  # given back on demand
        yield max(0, int(limit[0]) - int(usage[0]) + cache)


def _named_numbers(path: Path) -> dict[str, int]:
    """Lines of `name number ...`."""
    words = [line.split() for line in _lines(path)]
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _spec_nbytes(spec: Row | Carry) -> int:
    """Bytes of one row or carry."""
    leaves: list[ArraySpec] = list(trees.flatten(spec).values())
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def _check_sequence(sequence: SequenceSpec) -> None:
    if sequence.block_rows < 1 or sequence.length < 1:
        raise ValueError(f"A sequence needs block_rows >= 1 and length >= 1, got {sequence}.")
    if sequence.stride < 1 or sequence.stride % sequence.block_rows:
        raise ValueError(
            f"stride={sequence.stride} rows is not a multiple of "
            f"block_rows={sequence.block_rows}: sequences start at the first row of a block."
        )
