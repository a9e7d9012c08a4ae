"""Lays the rows of N lanes into blocks of K rows, each lane at its own pace."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlx import trees
from rlx.types import ArraySpec, Carry, EnvSpec, NetInput, Row

Index = slice | np.ndarray  # of lanes: a slice if it is all of them in order, else intp[n]
Place = tuple[Any, Any]  # (lanes, row) that index [N, K, ...]; a slice where all lanes keep pace


def input_spec(spec: EnvSpec) -> NetInput:
    """The ArraySpecs of one network input."""

    def scalar(dtype: str) -> ArraySpec:
        return ArraySpec(shape=(), dtype=dtype)

    return NetInput(
        observation=dict(spec.observation),
        prev_action=spec.action.array,
        prev_reward=scalar("float32"),
        time=scalar("int32"),
        first=scalar("bool"),
    )


def row_spec(spec: EnvSpec, acting: Any) -> Row:
    """The ArraySpecs of one stored row."""
    return Row(
        inputs=input_spec(spec),
        action=spec.action.array,
        reward=ArraySpec(shape=(), dtype="float32"),
        discount=ArraySpec(shape=(), dtype="float32"),
        valid=ArraySpec(shape=(), dtype="bool"),
        acting=acting,
    )


def children(acting: Any) -> dict[str, np.ndarray]:
    """The arrays of the agent's record of acting time, by name."""
    return trees.children(acting) or {}


def empty(spec: Any, *leading: int) -> Any:
    """Uninitialised arrays [*leading, *] in the structure of `spec`."""
    return trees.tree_map(lambda s: np.empty((*leading, *s.shape), s.dtype), spec)


class BlockWriter:
    """The open blocks of N lanes: rows [N, K, ...] and the carry before each block's first row.

    A row is written in three parts: `open` with x_t, `decide` with a_t, `close` with r_{t+1} when
    the environment has answered. As long as every call is for all lanes in order they keep pace,
    and slices of whole rows are written, which is much cheaper than a place for each lane.
    """

    def __init__(self, *, lanes: int, block_rows: int, row: Row, carry: Carry) -> None:
        self._lanes, self._block_rows = lanes, block_rows
        self._row_spec, self._carry_spec = row, carry
        self._all, self._none = np.arange(lanes), np.arange(0)
        self._keep_pace = True  # and then the first lane's number holds for all
        self._filled = np.zeros(lanes, np.int64)  # rows closed in each lane's open block
        self._is_open = np.zeros(lanes, bool)  # a row that no answer has closed
        self._number = np.zeros(lanes, np.int64)
        self._version = np.full(lanes, -1, np.int64)
        self.nothing = empty(row, 0, block_rows), empty(carry, 0)  # no blocks, rightly structured
        self._renew()

    def next_starts(self, index: Index) -> np.ndarray:
        """The lanes among these whose next row opens a block, before this row is closed."""
        self._keep_pace = self._keep_pace and isinstance(index, slice)
        if self._keep_pace:
            starts = (self._filled.item(0) + self._is_open.item(0)) % self._block_rows == 0
            return self._all if starts else self._none
        open_rows = self._filled[index] + self._is_open[index]
        return self._all[index][open_rows % self._block_rows == 0]

    def begin(self, lane: np.ndarray, carry: Carry, version: int) -> None:
        """Notes the carry before the first row of these lanes' new blocks."""
        self._version[lane] = version
        for name, values in trees.flatten(carry).items():
            self._carry[name][lane] = values

    def place(self, index: Index) -> Place:
        """The places of these lanes' next rows."""
        if self._keep_pace:
            return index, self._filled.item(0)
        filled = self._filled[index]
        return self._all if isinstance(index, slice) else index, filled

    def open(self, index: Index, inputs: NetInput) -> Place:
        """Writes x_t; returns the place where `decide` puts the rest."""
        place, rows = self.place(index), self._rows.inputs
        for name, values in inputs.observation.items():
            rows.observation[name][place] = values
        rows.prev_action[place] = inputs.prev_action
        rows.prev_reward[place] = inputs.prev_reward
        rows.time[place] = inputs.time
        rows.first[place] = inputs.first
        self._is_open[index] = True
        return place

    def decide(self, place: Place, action: np.ndarray, acting: Any) -> None:
        """Writes a_t and the agent's record of acting time."""
        self._rows.action[place] = action
        for name, values in children(acting).items():
            self._acting[name][place] = values

    def close(
        self, index: Index, reward: np.ndarray, discount: np.ndarray, valid: np.ndarray
    ) -> np.ndarray:
        """Writes r_{t+1} into these lanes' open rows; returns the lanes whose block is now full."""
        place = self.place(index)
        self._rows.reward[place] = reward
        self._rows.discount[place] = discount
        self._rows.valid[place] = valid
        self._filled[index] += 1
        self._is_open[index] = False
        if self._keep_pace:
            return self._all if self._filled.item(0) == self._block_rows else self._none
        return self._all[index][self._filled[index] == self._block_rows]

    def take(self, lane: np.ndarray) -> tuple[Row, Carry, np.ndarray, np.ndarray]:
        """Takes these lanes' full blocks, in the order of `lane`, which may be any.

        Returns (rows [n, K, ...], carry [n, ...], number, weights version).
        """
        number, version = self._number[lane], self._version[lane]
        self._number[lane] += 1
        self._filled[lane] = 0
        if len(lane) == self._lanes and (lane == self._all).all():  # no need to copy them
            rows, carry = self._rows, trees.unflatten(self._carry_spec, self._carry)
            self._renew()
        else:
            rows = trees.tree_map(lambda x: x[lane], self._rows)
            carry = trees.unflatten(
                self._carry_spec, {name: x[lane] for name, x in self._carry.items()}
            )
        return rows, carry, number, version

    def restart(self, lane: np.ndarray) -> None:
        """Drops these lanes' open blocks; their next block is number 0."""
        self._keep_pace = False
        self._filled[lane] = 0
        self._is_open[lane] = False
        self._number[lane] = 0

    def renumber(self) -> None:
        """Gives the open blocks number 0."""
        self._number[:] = 0

    def _renew(self) -> None:
        self._rows: Row = empty(self._row_spec, self._lanes, self._block_rows)
        self._acting = children(self._rows.acting)
        self._carry: dict[str, np.ndarray] = trees.flatten(empty(self._carry_spec, self._lanes))
