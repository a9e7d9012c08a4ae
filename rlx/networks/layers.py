"""Dense layers as torsos, cores and heads share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlx.types import Array, Params

Activation = Literal["relu", "tanh"]
GAIN = math.sqrt(2)  # of orthogonal weights before an activation (Saxe et al. 2014, for ReLU)


def activate(x: Array, activation: str) -> Array:
    """The activation of that name, elementwise."""
    return nn.relu(x) if activation == "relu" else jnp.tanh(x)


def dense(
    units: int,
    activation: str,
    x: Array,
    dtype: Any,
    *,
    layer_norm: bool = False,
    begin: Callable[..., Any] | None = None,
) -> Array:
    """One layer: linear, LayerNorm where asked, activation; it runs inside a module's call."""
    begin = nn.linear.default_kernel_init if begin is None else begin
    x = nn.Dense(units, dtype=dtype, kernel_init=begin)(x)
    return activate(nn.LayerNorm(dtype=dtype)(x) if layer_norm else x, activation)


def hidden_layers(
    layers: Sequence[int], activation: str, x: Array, dtype: Any, *, layer_norm: bool = False
) -> Array:
    """The hidden layers of a head, with orthogonal weights."""
    for units in layers:
        begin = nn.initializers.orthogonal(GAIN)
        x = dense(units, activation, x, dtype, layer_norm=layer_norm, begin=begin)
    return x


def orthogonal(params: Params, key: Array) -> Params:
    """The parameters with every kernel drawn anew, orthogonal, with gain sqrt 2; `key` is consumed.

    Recurrent weights and biases stay: cores begin the former orthogonal on their own.
    """
    begin = nn.initializers.orthogonal(GAIN)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(key, max(1, len(leaves)))
    drawn = [
        begin(k, leaf.shape, leaf.dtype) if path[-1].key == "kernel" else leaf
        for (path, leaf), k in zip(leaves, keys, strict=True)
    ]
    return jax.tree_util.tree_unflatten(tree, drawn)
