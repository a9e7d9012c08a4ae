"""Heads: what an agent reads from a body's features f32[..., F].

A head is called with the features, the environment's action spec, the dtype to compute in, and
whatever further inputs the agent gives it (a key for noise, quantile fractions, an action).
"""

from __future__ import annotations

from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlx.types import Array, DiscreteSpec, Range

Deviation = Annotated[float, Range(gt=0)] | None


class Head(nn.Module, kw_only=True):
    """A head of an agent has `__call__(features, action, dtype, *further)`."""


class ActionHead(Head, kw_only=True):
    """A head that gives each action one number, or as many as the agent asks for."""

    noise: Deviation  # noisy layers of this initial deviation (0.5 in the paper); None: plain ones
    outputs: int | None = None  # numbers of each action (atoms, quantiles), which the agent sets

    @property
    def width(self) -> int:
        return 1 if self.outputs is None else self.outputs

    def layer(self, units: int, name: str, x: Array, dtype: Any, key: Array | None) -> Array:
        """A linear layer, noisy where the head is and a key is given."""
        if self.noise is None:
            return nn.Dense(units, dtype=dtype, name=name)(x)
        return NoisyDense(units=units, noise=self.noise, dtype=dtype, name=name)(x, key)

    def shaped(self, x: Array, actions: int) -> Array:
        """f32[..., A * K] as [..., A, K]; [..., A] where each action has one number."""
        x = x.astype(jnp.float32)
        return x if self.outputs is None else x.reshape(*x.shape[:-1], actions, self.outputs)


class Dueling(ActionHead, kw_only=True):
    """V + A - mean A, one hidden layer each (Wang et al. 2016): f32[..., A] or [..., A, K]."""

    hidden: Annotated[int, Range(ge=1)]

    @nn.compact
    def __call__(
        self, x: Array, action: DiscreteSpec, dtype: Any, noise: Array | None = None
    ) -> Array:
        keys = [None] * 4 if noise is None else list(jax.random.split(noise, 4))
        value = nn.relu(self.layer(self.hidden, "value_hidden", x, dtype, keys[0]))
        value = self.layer(self.width, "value", value, dtype, keys[1])
        advantage = nn.relu(self.layer(self.hidden, "advantage_hidden", x, dtype, keys[2]))
        advantage = self.layer(action.n * self.width, "advantage", advantage, dtype, keys[3])
        over = -1 if self.outputs is None else -2
        advantage, value = self.shaped(advantage, action.n), self.shaped(value, 1)
        return value + advantage - advantage.mean(axis=over, keepdims=True)


class Plain(ActionHead, kw_only=True):
    """One hidden layer (none if `hidden` is null), a linear layer: f32[..., A] or [..., A, K]."""

    hidden: Annotated[int, Range(ge=1)] | None

    @nn.compact
    def __call__(
        self, x: Array, action: DiscreteSpec, dtype: Any, noise: Array | None = None
    ) -> Array:
        keys = [None] * 2 if noise is None else list(jax.random.split(noise))
        if self.hidden is not None:
            x = nn.relu(self.layer(self.hidden, "hidden", x, dtype, keys[0]))
        return self.shaped(self.layer(action.n * self.width, "q", x, dtype, keys[1]), action.n)


class Fractions(Head, kw_only=True):
    """Joins fractions to features (IQN, Dabney et al. 2018, equation 4).

    Features f32[..., F] and fractions f32[..., N], or [1, ..., 1, N] for all, give f32[..., N, F]:
    the features times relu(linear(cos(pi i tau), i = 1 .. cosines)).

    DEPARTS: the paper's sum runs over i = 0 .. n - 1, whose first cosine is 1 for every fraction;
    Dopamine's, which made the paper's scores, over 1 .. n.
    """

    cosines: Annotated[int, Range(ge=1)]

    @nn.compact
    def __call__(self, x: Array, action: Any, dtype: Any, fractions: Array) -> Array:
        i = jnp.arange(1, self.cosines + 1, dtype=jnp.float32)
        waves = jnp.cos(jnp.multiply.outer(fractions, jnp.pi * i)).astype(dtype)
        embedded = nn.relu(nn.Dense(x.shape[-1], dtype=dtype, name="embedding")(waves))
        return x[..., None, :].astype(dtype) * embedded


class NoisyDense(nn.Module, kw_only=True):
    """A linear layer whose weights have learnt, factorised noise.

    Fortunato et al. 2018, equations 10 and 11.
    """

    units: int
    noise: float  # the initial deviation, before it is divided by the root of the inputs
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """Without a key the noise is off, and the mean weights act; `key` is consumed."""
        inputs = x.shape[-1]
        bound, deviation = inputs**-0.5, self.noise * inputs**-0.5
        shapes = {"kernel": (inputs, self.units), "bias": (self.units,)}
        mean = {n: self.param(n, _uniform(bound), s, jnp.float32) for n, s in shapes.items()}
        constant = nn.initializers.constant(deviation)
        spread = {
            n: self.param(f"{n}_deviation", constant, s, jnp.float32) for n, s in shapes.items()
        }
        kernel, bias = mean["kernel"], mean["bias"]
        if key is not None:
            first, last = (
                _squeezed(jax.random.normal(k, (n,)))
                for k, n in zip(jax.random.split(key), (inputs, self.units), strict=True)
            )
            kernel = kernel + spread["kernel"] * jnp.outer(first, last)
            bias = bias + spread["bias"] * last
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        return y + bias.astype(self.dtype).reshape(*[1] * (x.ndim - 1), -1)


def _uniform(bound: float) -> Any:
    def made(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return made


def _squeezed(x: Array) -> Array:
    """f(x) = sign(x) sqrt(|x|)."""
    return jnp.sign(x) * jnp.sqrt(jnp.abs(x))
