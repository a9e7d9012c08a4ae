"""Munchausen reinforcement learning (Vieillard et al., NeurIPS 2020), for any agent with values.

With pi = softmax(Q' / tau) of the target network's values Q', the reward of action a gets
alpha [tau ln pi(a)] clipped to [lowest, 0]. A state is worth sum_b pi(b) (Q'(b) - tau ln pi(b)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp

from rlx.agents import common
from rlx.types import Array, Range


@dataclass(frozen=True, kw_only=True)
class Munchausen:
    """The paper's settings: scale alpha, temperature tau, and the lowest scaled log-policy."""

    scale: Annotated[float, Range(ge=0, le=1)]
    temperature: Annotated[float, Range(gt=0)]
    lowest: Annotated[float, Range(le=0)]

    def policy(self, q: Array, mask: Array | None) -> tuple[Array, Array]:
        """(pi, tau ln pi) of q f32[..., A]; both are 0 where an action is not allowed."""
        logits = common.masked(q / self.temperature, mask)
        log = jax.nn.log_softmax(logits, axis=-1)
        pi, scaled = jnp.exp(log), self.temperature * log
        return (pi, scaled) if mask is None else (pi * mask, jnp.where(mask, scaled, 0.0))

    def bonus(self, scaled: Array, action: Array) -> Array:
        """alpha [tau ln pi(a)]: what action [...] adds to its reward."""
        taken = common.take_action(scaled, action)
        return self.scale * jnp.clip(taken, self.lowest, 0.0)
