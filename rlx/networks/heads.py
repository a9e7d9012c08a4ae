"""Heads: what an agent reads from a body's features f32[..., F].

A head is called with the features, the environment's action spec, the dtype to compute in, and
whatever further inputs the agent gives it (quantile fractions, a key for noise, an action).
"""

from __future__ import annotations

from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp

from rlx.types import Array, DiscreteSpec, Range


class Head(nn.Module, kw_only=True):
    """A head of an agent has `__call__(features, action, dtype, *further)`."""


class Dueling(Head, kw_only=True):
    """Action values f32[..., A]: V + A - mean A, one hidden layer each (Wang et al. 2016)."""

    hidden: Annotated[int, Range(ge=1)]

    @nn.compact
    def __call__(self, x: Array, action: DiscreteSpec, dtype: Any) -> Array:
        value = nn.relu(nn.Dense(self.hidden, dtype=dtype, name="value_hidden")(x))
        value = nn.Dense(1, dtype=dtype, name="value")(value).astype(jnp.float32)
        advantage = nn.relu(nn.Dense(self.hidden, dtype=dtype, name="advantage_hidden")(x))
        advantage = nn.Dense(action.n, dtype=dtype, name="advantage")(advantage)
        advantage = advantage.astype(jnp.float32)
        return value + advantage - advantage.mean(axis=-1, keepdims=True)


class Plain(Head, kw_only=True):
    """Action values f32[..., A]: one hidden layer (none if `hidden` is null), a linear layer."""

    hidden: Annotated[int, Range(ge=1)] | None

    @nn.compact
    def __call__(self, x: Array, action: DiscreteSpec, dtype: Any) -> Array:
        if self.hidden is not None:
            x = nn.relu(nn.Dense(self.hidden, dtype=dtype, name="hidden")(x))
        return nn.Dense(action.n, dtype=dtype, name="q")(x).astype(jnp.float32)
