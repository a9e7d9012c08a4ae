"""Heads: features f32[..., F] -> action values f32[..., A]."""

from __future__ import annotations

from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp

from rlx.types import Array, Range


class Head(nn.Module, kw_only=True):
    """What a network accepts as its head: `__call__(x, actions, dtype) -> [..., actions]`."""


class Dueling(Head, kw_only=True):
    """V + A - mean A, one hidden layer each (Wang et al. 2016)."""

    hidden: Annotated[int, Range(ge=1)]

    @nn.compact
    def __call__(self, x: Array, actions: int, dtype: Any) -> Array:
        value = nn.relu(nn.Dense(self.hidden, dtype=dtype, name="value_hidden")(x))
        value = nn.Dense(1, dtype=dtype, name="value")(value).astype(jnp.float32)
        advantage = nn.relu(nn.Dense(self.hidden, dtype=dtype, name="advantage_hidden")(x))
        advantage = nn.Dense(actions, dtype=dtype, name="advantage")(advantage)
        advantage = advantage.astype(jnp.float32)
        return value + advantage - advantage.mean(axis=-1, keepdims=True)


class Plain(Head, kw_only=True):
    """One hidden layer (none if `hidden` is null) and a linear layer."""

    hidden: Annotated[int, Range(ge=1)] | None

    @nn.compact
    def __call__(self, x: Array, actions: int, dtype: Any) -> Array:
        if self.hidden is not None:
            x = nn.relu(nn.Dense(self.hidden, dtype=dtype, name="hidden")(x))
        return nn.Dense(actions, dtype=dtype, name="q")(x).astype(jnp.float32)
