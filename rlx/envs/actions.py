"""What both environment families share of actions: their checks."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlx.types import BoxSpec, DiscreteSpec


class Actions:
    """Checks actions at the speed of the hot path; EnvPool itself accepts any number."""

    def __init__(self, spec: DiscreteSpec | BoxSpec) -> None:
        self._spec = spec
        if isinstance(spec, BoxSpec):
            # Compared in float32, the dtype of the actions: 0.1 is a legal action of a box to 0.1.
            self._low = np.asarray(spec.low, np.float32).reshape(spec.shape)
            self._high = np.asarray(spec.high, np.float32).reshape(spec.shape)

    def check(self, action: np.ndarray) -> None:
        """Raises ValueError unless action is i32[n] (discrete) or f32[n, *] (box), in bounds."""
        if isinstance(self._spec, DiscreteSpec):
            self._check_discrete(action, self._spec.n)
        else:
            self._check_box(action, self._spec.shape)

    def _check_discrete(self, action: np.ndarray, n: int) -> None:
        if not isinstance(action, np.ndarray) or action.dtype != np.int32 or action.ndim != 1:
            raise ValueError(f"action is {describe(action)}; give numpy int32[n], one per lane")
        # Seen as uint32 a negative action is huge: one reduction checks both ends.
        if action.size and np.maximum.reduce(action.view(np.uint32)) >= n:
            raise ValueError(
                f"action has values {action.min()} .. {action.max()}; accepted: 0 .. {n - 1}"
            )

    def _check_box(self, action: np.ndarray, shape: tuple[int, ...]) -> None:
        if (
            not isinstance(action, np.ndarray)
            or action.dtype != np.float32
            or action.shape[1:] != shape
        ):
            wanted = ", ".join(map(str, ("n", *shape)))
            raise ValueError(f"action is {describe(action)}; give numpy float32[{wanted}]")
        # Written so that NaN, which compares false with everything, is refused too.
        if not ((action >= self._low) & (action <= self._high)).all():
            raise ValueError(
                f"action has values {action.min()} .. {action.max()}; accepted: "
                f"{self._low.min()} .. {self._high.max()}, each element in its own bounds"
            )


def describe(value: Any) -> str:
    """'int64[32]' for an array, else the type's name."""
    if not isinstance(value, np.ndarray):
        return type(value).__name__
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
