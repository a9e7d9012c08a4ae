"""Says which actions were taken between two rows of metrics: shares of choices, spread of boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rlx.types import ActionSpec, BoxSpec, DiscreteSpec, MultiDiscreteSpec

MOST = 64  # choices in all, or elements of a box: of more, a row tells nothing
GROUP = "acting/action"


class Actions:
    """Gathers actions and says what they were, without keeping them."""

    def __init__(self, spec: ActionSpec | None) -> None:
        """spec: of one action; None, or one of more than MOST choices: nothing is said."""
        self._spec = spec if spec is not None and _size(spec) <= MOST else None
        self._count = 0  # actions
        self._sums = np.zeros(0 if self._spec is None else _sums_of(self._spec))

    def add(self, action: np.ndarray) -> None:
        """Takes actions [n, *] as the spec says."""
        if self._spec is None or not len(action):
            return
        self._count += len(action)
        if isinstance(self._spec, BoxSpec):
            flat = action.reshape(len(action), -1).astype(np.float64)
            self._sums += np.concatenate([flat.sum(axis=0), np.square(flat).sum(axis=0)])
            return
        starts = np.cumsum([0, *_choices(self._spec)[:-1]])
        place = action.reshape(len(action), -1) + starts
        self._sums += np.bincount(place.ravel(), minlength=len(self._sums))

    def take(self) -> dict[str, float]:
        """Metrics of what was taken since the last call; {} where nothing was."""
        count, sums = self._count, self._sums
        self._count, self._sums = 0, np.zeros_like(sums)
        if self._spec is None or not count:
            return {}
        if isinstance(self._spec, BoxSpec):
            mean, square = np.split(sums / count, 2)
            deviation = np.sqrt(np.maximum(0.0, square - np.square(mean)))
            return _named(f"{GROUP}_mean", mean) | _named(f"{GROUP}_std", deviation)
        shares = np.split(sums / count, np.cumsum(_choices(self._spec))[:-1])
        if isinstance(self._spec, DiscreteSpec):
            return _named(f"{GROUP}_share", shares[0])
        return {
            name: share
            for i, of_choice in enumerate(shares)
            for name, share in _named(f"{GROUP}_share/{i}", of_choice).items()
        }

    def state(self) -> list[float]:
        """Returns what a checkpoint keeps."""
        return [self._count, *self._sums.tolist()]

    def restore(self, state: Sequence[float]) -> None:
        """Goes on from `state()`; one of another action space, or none, counts for nothing."""
        if len(state) == 1 + len(self._sums):
            self._count, self._sums = int(state[0]), np.array(state[1:], np.float64)


def _size(spec: ActionSpec) -> int:
    return math.prod(spec.shape) if isinstance(spec, BoxSpec) else sum(_choices(spec))


def _sums_of(spec: ActionSpec) -> int:
    return 2 * _size(spec) if isinstance(spec, BoxSpec) else _size(spec)


def _choices(spec: DiscreteSpec | MultiDiscreteSpec) -> tuple[int, ...]:
    return (spec.n,) if isinstance(spec, DiscreteSpec) else spec.counts


def _named(name: str, values: np.ndarray) -> dict[str, float]:
    return {f"{name}/{i}": float(value) for i, value in enumerate(values)}
