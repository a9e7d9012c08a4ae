"""Cores: features over time, with resets inside the unroll; and the stack of frames.

A core reads x f32[T, B, F] and first bool[T, B], and starts from a carry [B, ...]. The projection
of the inputs is one product over all T * B rows; only the recurrent product is inside the scan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlx.networks.layers import Activation, dense
from rlx.types import Array, Range


class Core(nn.Module, kw_only=True):
    """A core of a network has `__call__(x, first, carry, dtype)` and `initial_carry(batch)`."""

    def initial_carry(self, batch: int) -> Any:
        raise NotImplementedError


Step = Callable[[Any, Array, Array], Any]  # (carry, x_t, h @ kernel) -> carry


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_with_resets(
    step: Step, kernel: Array, carry: Any, x: Array, first: Array
) -> tuple[Array, Any]:
    """Steps over time; where `first`, the carry is zero *before* the row is read.

    x [T, B, F], first bool[T, B], carry of [B, units] with "h" -> (h [T, B, units], last carry).
    The gradient of `kernel` is one product over all rows: inside the scan it would be added up,
    a whole kernel for each row.
    """
    return _scan(step, kernel, carry, x, first)


def _scan(
    step: Step, kernel: Array, carry: Any, x: Array, first: Array, added: Array | None = None
) -> tuple[Array, Any]:
    def reset_and_step(carry: Any, row: tuple[Array, Array, Array | None]) -> tuple[Any, Array]:
        x_t, first_t, added_t = row
        carry = jax.tree.map(lambda c: jnp.where(first_t[:, None], 0.0, c), carry)
        product = carry["h"] @ kernel
        carry = step(carry, x_t, product if added_t is None else product + added_t)
        return carry, carry["h"]

    carry, h = jax.lax.scan(reset_and_step, carry, (x, first, added))
    return h, carry


def _scan_forward(
    step: Step, kernel: Array, carry: Any, x: Array, first: Array
) -> tuple[tuple[Array, Any], Any]:
    def scan(carry: Any, x: Array, added: Array) -> tuple[Array, Any]:
        return _scan(step, kernel, carry, x, first, added)

    nothing = jnp.zeros((*x.shape[:2], kernel.shape[1]), kernel.dtype)  # its gradient: h @ kernel's
    (h, last), pull_back = jax.vjp(scan, carry, x, nothing)
    before = jnp.concatenate([carry["h"][None], h[:-1]])
    return (h, last), (pull_back, jnp.where(first[..., None], 0.0, before))


def _scan_backward(step: Step, kept: Any, grads: tuple[Array, Any]) -> tuple[Any, ...]:
    pull_back, before = kept
    of_carry, of_x, of_product = pull_back(grads)
    of_kernel = jnp.einsum("tbu,tbf->uf", before, of_product)
    return of_kernel, of_carry, of_x, np.zeros(before.shape[:2], jax.dtypes.float0)


scan_with_resets.defvjp(_scan_forward, _scan_backward)


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

        return scan_with_resets(_lstm_step, kernel, carry, gates, first)


def _lstm_step(carry: Any, gates: Array, product: Array) -> Any:
    i, f, g, o = jnp.split(gates + product, 4, axis=-1)
    c = nn.sigmoid(f + 1) * carry["c"] + nn.sigmoid(i) * jnp.tanh(g)
    return {"c": c, "h": nn.sigmoid(o) * jnp.tanh(c)}


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

        return scan_with_resets(_gru_step, kernel, carry, gates, first)


def _gru_step(carry: Any, gates: Array, product: Array) -> Any:
    r_x, z_x, n_x = jnp.split(gates, 3, axis=-1)
    r_h, z_h, n_h = jnp.split(product, 3, axis=-1)
    z = nn.sigmoid(z_x + z_h)
    n = jnp.tanh(n_x + nn.sigmoid(r_x + r_h) * n_h)
    return {"h": (1 - z) * n + z * carry["h"]}


class Feedforward(Core, kw_only=True):
    """A core without memory beyond the stack of frames: one dense layer instead of a recurrence.

    `units` of None leaves the layer out, so that heads read the torso's features as they are.
    """

    units: Annotated[int, Range(ge=1)] | None
    activation: Activation
    layer_norm: bool  # before the activation

    def initial_carry(self, batch: int) -> tuple[()]:
        return ()

    @nn.compact
    def __call__(self, x: Array, first: Array, carry: Any, dtype: Any) -> tuple[Array, Any]:
        if self.units is not None:
            x = dense(self.units, self.activation, x, dtype, layer_norm=self.layer_norm)
        return x.astype(jnp.float32), ()


def stack_frames(frames: Array, first: Array, carried: Array) -> tuple[Array, Array]:
    """Stacks single frames over time, without a scan.

    frames [T, B, C, H, W]; first bool[T, B]; carried [B, S-1, C, H, W], oldest first.
    Returns the stack [T, B, S*C, H, W], oldest first, and the carry after the last row. At an
    episode's first row every place takes the new frame (as EnvPool fills its own stack).
    """
    depth, rows = carried.shape[1] + 1, jnp.arange(first.shape[0])[:, None]
    began = jax.lax.cummax(jnp.where(first, rows, -depth), axis=0)  # the episode's first row
    seen = [jnp.maximum(rows - k, began) for k in range(depth - 1, -1, -1)]
    index = jnp.stack(seen, axis=-1) + depth - 1  # [T, B, S], into the frames with those carried
    every = jnp.concatenate([jnp.moveaxis(carried, 1, 0), frames])
    stack = every[index, jnp.arange(first.shape[1])[:, None]]  # [T, B, S, C, H, W]
    return stack.reshape(*first.shape, -1, *frames.shape[3:]), stack[-1, :, 1:]


def initial_frames(
    stack: Mapping[str, int], shapes: Mapping[str, tuple[tuple[int, ...], str]], batch: int
) -> dict[str, Array]:
    """Zeros [batch, S-1, *] per stacked leaf; `first` replaces them before they are read."""
    return {
        leaf: jnp.zeros((batch, depth - 1, *shapes[leaf][0]), shapes[leaf][1])
        for leaf, depth in stack.items()
    }
