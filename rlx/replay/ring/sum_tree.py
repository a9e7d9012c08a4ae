"""A sum tree: draws an index with probability proportional to its value, many at a time.

The tree is wide (32 children per node), because a level costs NumPy calls and not additions: a
million leaves are four levels. Values are float64 and a parent is always recomputed as the sum of
its children, never changed by a difference, so no history can make it drift.
"""

from __future__ import annotations

from typing import final

import numpy as np

_SHIFT = 5
_CHILDREN = 1 << _SHIFT


@final
class SumTree:
    """Non-negative float64 values at indices 0 .. size-1, all 0 at first. Not thread-safe."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"A sum tree needs size >= 1, got {size}.")
        self.size = size
        # _levels[0] holds the leaves, the last level is the root's children: f64[nodes, children]
        self._levels = [np.zeros(shape) for shape in _level_shapes(size)]
        self._flat = [level.reshape(-1) for level in self._levels]

    @property
    def nbytes(self) -> int:
        return sum(level.nbytes for level in self._levels)

    @property
    def total(self) -> float:
        """The sum of all values."""
        return float(self._levels[-1].sum())

    @property
    def values(self) -> np.ndarray:
        """f64[size]: a read-only view of all values."""
        view = self._flat[0][: self.size]
        view.flags.writeable = False
        return view

    def get(self, indices: np.ndarray) -> np.ndarray:
        """f64[n] of i64[n]."""
        return self._flat[0][self._checked(indices)]

    def set(self, indices: np.ndarray, values: np.ndarray | float) -> None:
        """Sets i64[n] to f64[n] (or all to one value); of an index given twice the last wins."""
        nodes = self._checked(indices)
        if nodes.size == 0:
            return
        values = np.asarray(values, np.float64)
        if not (values.min() >= 0 and values.max() < np.inf):  # false for NaN too
            raise ValueError(f"Sum tree values must be finite and >= 0, got {_offender(values)}.")
        self._flat[0][nodes] = values
        for children, parents in zip(self._levels, self._flat[1:], strict=False):
            nodes = nodes >> _SHIFT
            parents[nodes] = children[nodes].sum(axis=1)

    def load(self, values: np.ndarray) -> None:
        """Sets the first len(values) indices and zeroes the others; rebuilds all parents."""
        self._flat[0][:] = 0.0
        self.set(np.arange(len(values)), values)
        for children, parents in zip(self._levels, self._flat[1:], strict=False):
            parents[: len(children)] = children.sum(axis=1)

    def find(self, targets: np.ndarray) -> np.ndarray:
        """i64[n]: for each target in [0, total) the first index whose running sum exceeds it.

        An index of value 0 is never found, also where rounding puts a target at the total.
        """
        remaining = np.asarray(targets, np.float64)
        if remaining.size == 0:
            return np.zeros(0, np.int64)
        if not self.total > 0:
            raise ValueError("Nothing can be found in a sum tree of zeros; set a value first.")
        if not remaining.min() >= 0:
            raise ValueError(f"Targets must lie in [0, {self.total}), got {remaining.min()}.")
        nodes = np.zeros(len(remaining), np.int64)
        for level in reversed(self._levels):
            nodes, remaining = _descend(level, nodes, remaining)
        return nodes

    def check_valid(self) -> tuple[bool, str]:
        """Says whether every parent is exactly the sum of its children and the padding is 0."""
        if not (np.isfinite(self._flat[0]).all() and (self._flat[0] >= 0).all()):
            return False, "a value is negative or not finite"
        if self._flat[0][self.size :].any():
            return False, "a leaf beyond the size is not 0"
        for depth, (children, parents) in enumerate(
            zip(self._levels, self._flat[1:], strict=False)
        ):
            wrong = np.flatnonzero(parents[: len(children)] != children.sum(axis=1))
            if wrong.size:
                return False, f"node {wrong[0]} of level {depth + 1} is not its children's sum"
        return True, ""

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < self.size):
            raise ValueError(
                f"Sum tree indices must lie in [0, {self.size}), "
                f"got {indices.min()} .. {indices.max()}."
            )
        return indices


def sum_tree_nbytes(size: int) -> int:
    """Bytes of a tree of that size, without making one."""
    return sum(8 * nodes * children for nodes, children in _level_shapes(size))


def _level_shapes(size: int) -> list[tuple[int, int]]:
    """[nodes, children] per level, leaves first."""
    shapes = [(-(-size // _CHILDREN), _CHILDREN)]
    while shapes[-1][0] > 1:
        shapes.append((-(-shapes[-1][0] // _CHILDREN), _CHILDREN))
    return shapes


def _descend(
    level: np.ndarray, nodes: np.ndarray, remaining: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One level down: (child i64[n], what of the target remains inside that child f64[n])."""
    running = np.zeros((len(nodes), _CHILDREN + 1))
    np.cumsum(level[nodes], axis=1, out=running[:, 1:])
    # Rounding may leave a target at or above its node's sum: it belongs to the last child > 0.
    remaining = np.minimum(remaining, np.nextafter(running[:, -1], 0.0))
    child = (running[:, 1:] <= remaining[:, None]).sum(axis=1)
    remaining = remaining - running[np.arange(len(nodes)), child]
    return (nodes << _SHIFT) + child, remaining


def _offender(values: np.ndarray) -> float:
    return float(values[~((values >= 0) & (values < np.inf))].ravel()[0])
