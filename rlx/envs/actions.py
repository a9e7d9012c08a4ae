"""Actions of both environment families: their checks, and how environments take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlx.types import ActionSpec, Array, BoxSpec, MultiDiscreteSpec

Start = int | tuple[int, ...]  # the number of the first action (of each choice); 0 of a box


class Actions:
    """The actions of one environment, as agents give them and as the environment takes them.

    rlx counts actions from 0 and has float32 in boxes. Out of its bounds a box action is clipped:
    neither EnvPool nor gymnasium does it (MuJoCo's motors are limited, but the cost of control is
    that of the whole action), and agents that sample go beyond them.
    """

    def __init__(self, spec: ActionSpec, *, start: Start = 0, dtype: Any = None) -> None:
        """dtype: the environment's own; None: that of the rows."""
        self._spec, self._dtype = spec, np.dtype(dtype or spec.array.dtype)
        # In the environment's dtype: 0.1 of float32 is beyond a box of float64 to 0.1.
        shape = (1, *spec.array.shape)
        if isinstance(spec, BoxSpec):
            self._low = _within(spec.low, self._dtype, np.inf).reshape(shape)
            self._high = _within(spec.high, self._dtype, -np.inf).reshape(shape)
        elif isinstance(spec, MultiDiscreteSpec):
            self._counts = np.asarray(spec.counts, np.uint32)
        self._start = np.asarray(start, self._dtype)
        self._begins_at_0 = not self._start.any()
        if self._start.ndim:
            self._start = self._start.reshape(shape)

    def check(self, action: np.ndarray) -> None:
        """Raises ValueError unless action is int32[n], int32[n, k] or float32[n, *] as the spec is.

        Integers have to be in range, floats finite. EnvPool itself accepts anything.
        """
        array = self._spec.array
        if (
            not isinstance(action, np.ndarray)
            or action.dtype != array.dtype
            or action.shape[1:] != array.shape
            or action.ndim == 0
        ):
            shape = ", ".join(map(str, ("n", *array.shape)))
            raise ValueError(
                f"action is {describe(action)}; give numpy {array.dtype}[{shape}], one per lane"
            )
        if isinstance(self._spec, BoxSpec):
            _check_finite(action)
        elif isinstance(self._spec, MultiDiscreteSpec):
            self._check_choices(action)
        # Seen as uint32 a negative action is huge: one reduction checks both ends.
        elif action.size and np.maximum.reduce(action.view(np.uint32)) >= self._spec.n:
            raise ValueError(
                f"action has values {action.min()} .. {action.max()}; "
                f"accepted: 0 .. {self._spec.n - 1}"
            )

    def _check_choices(self, action: np.ndarray) -> None:
        if (np.ascontiguousarray(action).view(np.uint32) >= self._counts).any():
            each = ", ".join(f"0 .. {count - 1}" for count in self._counts.tolist())
            low, high = action.min(axis=0).tolist(), action.max(axis=0).tolist()
            raise ValueError(f"action has values {low} .. {high}; accepted: {each}")

    def outward(self, action: Array) -> Array:
        """A copy of action [n, *], of NumPy or JAX, as the environment takes it."""
        action = action.astype(self._dtype)
        if isinstance(self._spec, BoxSpec):
            return action.clip(self._low, self._high)
        return action if self._begins_at_0 else action + self._start


def _within(bounds: Sequence[float], dtype: Any, inwards: float) -> np.ndarray:
    """The bounds in a dtype, in which the nearest number may lie beyond them."""
    exact = np.asarray(bounds, np.float64)
    near = exact.astype(dtype)
    if not np.issubdtype(dtype, np.floating):
        return near
    beyond = near < exact if inwards > 0 else near > exact
    return np.where(beyond, np.nextafter(near, np.asarray(inwards, dtype)), near)


def _check_finite(action: np.ndarray) -> None:
    if not np.isfinite(action).all():
        raise ValueError("action has values that are not finite; the agent's parameters may be NaN")


def describe(value: Any) -> str:
    """'int64[32]' for an array, else the type's name."""
    if not isinstance(value, np.ndarray):
        return type(value).__name__
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
