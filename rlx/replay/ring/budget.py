"""The memory that a ring of blocks takes, known before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from rlx.replay.ring.block_spec import BlockSpec, leaf_nbytes
from rlx.replay.ring.index import LANE_NBYTES, index_nbytes
from rlx.replay.ring.storage import Storing, images


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A ring will take this; it is known before anything is allocated."""

    rows: int  # capacity, rounded down to whole blocks
    blocks: int  # slots of the ring
    sequences: int  # startable at least, once the ring is full and lanes run evenly
    bytes_per_row: float  # carries, keys, links and the sum tree included
    total_bytes: int
    memory_bytes: int  # of them; without what lies on the disk, or frames before compression

    def __str__(self) -> str:
        total = (
            f"{self.rows:,} rows of {self.bytes_per_row:.0f} bytes, {self.total_bytes / 1e9:.2f} GB"
        )
        if self.memory_bytes == self.total_bytes:
            return total
        return f"{total}, of which {self.memory_bytes / 1e9:.2f} GB are sure to be in memory"

    def check(self, available_bytes: int) -> None:
        """Raises ValueError if the ring does not fit."""
        if self.memory_bytes <= available_bytes:
            return
        per_row = self.memory_bytes / self.rows
        fits = max(0, int(available_bytes / per_row))
        raise ValueError(
            f"A replay of {self.rows} rows takes {self.memory_bytes / 1e9:.2f} GB of memory "
            f"({per_row:.0f} bytes per row), {available_bytes / 1e9:.2f} GB are available: at most "
            f"about {fits} rows fit; lower replay.capacity, or see replay.storage and .compress."
        )

    def check_min_sequences(self, min_sequences: int) -> None:
        """Raises ValueError if so many can never be startable: learning would never begin."""
        if min_sequences > self.sequences:
            raise ValueError(
                f"replay.min_sequences={min_sequences}, but a full replay of {self.rows} rows "
                f"has about {self.sequences} startable: lower it or raise replay.capacity."
            )


def budget(
    *,
    capacity_rows: int,
    spec: BlockSpec,
    lanes: int,
    storing: Storing | None = None,
    shards: int = 1,
) -> Budget:
    """The budget of `shards` equal rings with so many rows and lanes in all.

    Raises ValueError for settings that could never give a sample.
    """
    spec.check()
    sequence = spec.sequence
    blocks = capacity_rows // shards // sequence.block_rows * shards
    least = 2 * lanes * sequence.blocks
    if lanes < 1 or blocks < least:
        raise ValueError(
            f"capacity={capacity_rows} rows are {blocks} blocks; {lanes} lanes with "
            f"{sequence.blocks} blocks per sequence need at least 2 * {lanes} * {sequence.blocks} "
            f"= {least} blocks: raise replay.capacity to {least * sequence.block_rows} rows."
        )
    tables = shards * index_nbytes(blocks // shards, sequence) + lanes * LANE_NBYTES
    total, rows = blocks * spec.nbytes + tables, blocks * sequence.block_rows
    starts_per_lane = (blocks // lanes - sequence.blocks + 1) // sequence.blocks_per_stride
    return Budget(
        rows=rows,
        blocks=blocks,
        sequences=lanes * starts_per_lane * len(sequence.start_rows),
        bytes_per_row=total / rows,
        total_bytes=total,
        memory_bytes=total - blocks * _bytes_elsewhere(storing or Storing(), spec),
    )


def _bytes_elsewhere(storing: Storing, spec: BlockSpec) -> int:
    """Bytes of a block that are no claim on memory; what LZ4 makes of frames is not known yet."""
    if storing.storage in ("mmap", "device"):
        return spec.nbytes
    if storing.compress == "lz4":
        return sum(leaf_nbytes(spec.stored[path]) for path in images(spec))
    return 0
