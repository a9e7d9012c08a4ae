"""Optimisers as settings: optax chains neither pickle nor fit a signature, these do both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import optax

from rlx.types import Range


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam after an optional clip by the global norm, with an optional linear decay to zero."""

    learning_rate: Annotated[float, Range(gt=0, lt=1)]
    b1: Annotated[float, Range(ge=0, lt=1)]
    b2: Annotated[float, Range(ge=0, lt=1)]
    epsilon: Annotated[float, Range(gt=0)]
    max_grad_norm: Annotated[float, Range(gt=0)] | None  # None: no clipping
    decay_updates: Annotated[int, Range(ge=1)] | None  # None: constant rate

    def build(self) -> optax.GradientTransformation:
        rate: optax.ScalarOrSchedule = self.learning_rate
        if self.decay_updates is not None:
            rate = optax.linear_schedule(self.learning_rate, 0.0, self.decay_updates)
        adam = optax.adam(rate, b1=self.b1, b2=self.b2, eps=self.epsilon)
        if self.max_grad_norm is None:
            return adam
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), adam)
