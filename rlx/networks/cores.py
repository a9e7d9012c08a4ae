"""Cores: features over time, with resets inside the unroll; and the stack of frames.

A core reads x f32[T, B, F] and first bool[T, B], and starts from a carry [B, ...]. The projection
of the inputs is one product over all T * B rows; only the recurrent product is inside the scan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlx.types import Array, Range


class Core(nn.Module, kw_only=True):
    """What a network accepts: `__call__(x, first, carry, dtype)` and `initial_carry(batch)`."""

    def initial_carry(self, batch: int) -> Any:
        raise NotImplementedError


def scan_with_resets(
    step: Callable[[Any, Array], tuple[Any, Array]], carry: Any, x: Array, first: Array
) -> tuple[Array, Any]:
    """Scans over time; where `first`, the carry is zero *before* the row is read."""

    def reset_and_step(carry: Any, row: tuple[Array, Array]) -> tuple[Any, Array]:
        x_t, first_t = row
        carry = jax.tree.map(lambda c: jnp.where(first_t[:, None], 0.0, c), carry)
        return step(carry, x_t)

    carry, outputs = jax.lax.scan(reset_and_step, carry, (x, first))
    return outputs, carry


class LSTM(Core, kw_only=True):
    """Hochreiter & Schmidhuber's LSTM with a forget bias of 1; the state stays float32."""

    units: Annotated[int, Range(ge=1)]

    def initial_carry(self, batch: int) -> dict[str, Array]:
        zeros = jnp.zeros((batch, self.units), jnp.float32)
        return {"c": zeros, "h": zeros}

    @nn.compact
    def __call__(self, x: Array, first: Array, carry: Any, dtype: Any) -> tuple[Array, Any]:
        gates = nn.Dense(4 * self.units, dtype=dtype, name="input")(x).astype(jnp.float32)
        kernel = self.param(
            "recurrent", nn.initializers.orthogonal(), (self.units, 4 * self.units), jnp.float32
        )

        def step(carry: Any, gates_t: Array) -> tuple[Any, Array]:
            i, f, g, o = jnp.split(gates_t + carry["h"] @ kernel, 4, axis=-1)
            c = nn.sigmoid(f + 1) * carry["c"] + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            return {"c": c, "h": h}, h

        return scan_with_resets(step, carry, gates, first)


class GRU(Core, kw_only=True):
    """Cho et al. 2014, with the reset gate after the recurrent product."""

    units: Annotated[int, Range(ge=1)]

    def initial_carry(self, batch: int) -> dict[str, Array]:
        return {"h": jnp.zeros((batch, self.units), jnp.float32)}

    @nn.compact
    def __call__(self, x: Array, first: Array, carry: Any, dtype: Any) -> tuple[Array, Any]:
        gates = nn.Dense(3 * self.units, dtype=dtype, name="input")(x).astype(jnp.float32)
        kernel = self.param(
            "recurrent", nn.initializers.orthogonal(), (self.units, 3 * self.units), jnp.float32
        )

        def step(carry: Any, gates_t: Array) -> tuple[Any, Array]:
            r_x, z_x, n_x = jnp.split(gates_t, 3, axis=-1)
            r_h, z_h, n_h = jnp.split(carry["h"] @ kernel, 3, axis=-1)
            z = nn.sigmoid(z_x + z_h)
            n = jnp.tanh(n_x + nn.sigmoid(r_x + r_h) * n_h)
            h = (1 - z) * n + z * carry["h"]
            return {"h": h}, h

        return scan_with_resets(step, carry, gates, first)


class Feedforward(Core, kw_only=True):
    """No memory beyond the stack of frames: one dense layer in the place of the recurrence."""

    units: Annotated[int, Range(ge=1)]

    def initial_carry(self, batch: int) -> tuple[()]:
        return ()

    @nn.compact
    def __call__(self, x: Array, first: Array, carry: Any, dtype: Any) -> tuple[Array, Any]:
        return nn.relu(nn.Dense(self.units, dtype=dtype)(x)).astype(jnp.float32), ()


def stack_frames(frames: Array, first: Array, carried: Array) -> tuple[Array, Array]:
    """Stacks single frames over time, without a scan.

    frames [T, B, C, H, W]; first bool[T, B]; carried [B, S-1, C, H, W], oldest first.
    Returns the stack [T, B, S*C, H, W], oldest first, and the carry after the last row. At an
    episode's first row every place takes the new frame (as EnvPool fills its own stack).
    """
    depth = carried.shape[1] + 1
    start = first.reshape(first.shape + (1,) * (frames.ndim - 2))
    places = [frames]  # places[k][t]: the frame k steps before t
    for k in range(1, depth):
        before = jnp.concatenate([carried[None, :, depth - 1 - k], places[-1][:-1]], axis=0)
        places.append(jnp.where(start, frames, before))
    after = jnp.stack([places[k][-1] for k in range(depth - 2, -1, -1)], axis=1)
    return jnp.concatenate(places[::-1], axis=2), after


def initial_frames(
    stack: Mapping[str, int], shapes: Mapping[str, tuple[tuple[int, ...], str]], batch: int
) -> dict[str, Array]:
    """Zeros [batch, S-1, *] per stacked leaf; `first` replaces them before they are read."""
    return {
        leaf: jnp.zeros((batch, depth - 1, *shapes[leaf][0]), shapes[leaf][1])
        for leaf, depth in stack.items()
    }
