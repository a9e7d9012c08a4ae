"""Heads of agents with a policy: the policy, the value of a state, the value of an action."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlx.networks.actions import encode_action
from rlx.networks.distributions import Distribution, Normal, choices, of_logits
from rlx.networks.heads import Head
from rlx.networks.layers import Activation, hidden_layers
from rlx.types import ActionSpec, Array, BoxSpec, Range

LOG_DEVIATIONS = (-20.0, 2.0)  # beyond them float32 loses a density's digits (SAC's own limits)
Units = tuple[Annotated[int, Range(ge=1)], ...]


class Policy(Head, kw_only=True):
    """The parameters of a distribution over actions, f32[..., P]; `distribution` makes it of them.

    Of discrete actions they are logits. Of a box they are means and logarithms of deviations, in
    units in which its bounds are -1 and 1; an element without two bounds keeps its own unit.
    """

    layers: Units  # of hidden layers
    activation: Activation
    gain: Annotated[float, Range(gt=0)]  # of the last layer's orthogonal weights
    deviation: Literal["free", "state"]  # of boxes: one number for all states, or read from each
    initial_deviation: Annotated[float, Range(ge=1e-8, le=7)]  # within LOG_DEVIATIONS
    squash: bool  # tanh, for boxes with two bounds; else the environment is given clipped actions

    @nn.compact
    def __call__(self, x: Array, action: ActionSpec, dtype: Any) -> Array:
        x = hidden_layers(self.layers, self.activation, x, dtype)
        if not isinstance(action, BoxSpec):
            return _last(sum(choices(action)), self.gain, "logits", x, dtype)
        size, log_initial = len(action.low), math.log(self.initial_deviation)
        mean = _last(size, self.gain, "mean", x, dtype)
        if self.deviation == "state":
            log_deviation = _last(size, self.gain, "log_deviation", x, dtype) + log_initial
        else:
            begin = nn.initializers.constant(log_initial)
            free = self.param("log_deviation", begin, (size,), jnp.float32)
            log_deviation = jnp.broadcast_to(free, mean.shape)
        return jnp.concatenate([mean, log_deviation], axis=-1)

    def distribution(
        self, parameters: Array, action: ActionSpec, mask: Array | None
    ) -> Distribution:
        """The distribution of parameters [..., P]; mask: bool[..., P], the allowed choices."""
        if isinstance(action, BoxSpec):
            mean, log_deviation = jnp.split(parameters, 2, axis=-1)
            log_deviation = _within(log_deviation, *LOG_DEVIATIONS)
            return Normal(mean, log_deviation, box=action, squashed=self.squash)
        if mask is not None:
            parameters = jnp.where(mask, parameters, jnp.finfo(parameters.dtype).min)
        return of_logits(action, parameters)


class Value(Head, kw_only=True):
    """The value of a state, f32[...]."""

    layers: Units  # of hidden layers
    activation: Activation

    @nn.compact
    def __call__(self, x: Array, action: ActionSpec, dtype: Any) -> Array:
        x = hidden_layers(self.layers, self.activation, x, dtype)
        return _last(1, 1.0, "value", x, dtype)[..., 0]


class ActionValue(Head, kw_only=True):
    """The value of an action: f32[...] of a box's action [..., *], f32[..., A] of all choices."""

    layers: Units  # of hidden layers
    activation: Activation
    layer_norm: bool  # after each hidden layer, before its activation

    @nn.compact
    def __call__(
        self, x: Array, action: ActionSpec, dtype: Any, taken: Array | None = None
    ) -> Array:
        """taken: the box's action; of one choice all values are given, whichever is taken."""
        if isinstance(action, BoxSpec):
            assert taken is not None
            x = jnp.concatenate([x, encode_action(taken, action, x.dtype)], axis=-1)
        x = hidden_layers(self.layers, self.activation, x, dtype, layer_norm=self.layer_norm)
        if isinstance(action, BoxSpec):
            return _last(1, 1.0, "value", x, dtype)[..., 0]
        return _last(sum(choices(action)), 1.0, "value", x, dtype)


def _within(x: Array, low: float, high: float) -> Array:
    """x, clipped; the gradient is that of x, so that what lies beyond a limit can come back."""
    return x + jax.lax.stop_gradient(jnp.clip(x, low, high) - x)


def _last(units: int, gain: float, name: str, x: Array, dtype: Any) -> Array:
    """A linear layer with orthogonal weights; it runs inside a module's call."""
    begin: Callable[..., Any] = nn.initializers.orthogonal(gain)
    return nn.Dense(units, dtype=dtype, kernel_init=begin, name=name)(x).astype(jnp.float32)
