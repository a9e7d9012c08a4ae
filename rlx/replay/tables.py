"""What a ring of blocks knows of its slots and lanes beside the rows themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(kw_only=True)
class SlotTable:
    """What is known of the block in each slot; key -1 where there is none."""

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

    @staticmethod
    def nbytes_per_slot() -> int:
        return 5 * 8 + 2 * 4


@dataclass(kw_only=True)
class LaneTable:
    """Where each lane's latest chain stands."""

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

    @staticmethod
    def nbytes_per_lane() -> int:
        return 4 + 2 * 8
