"""What agents share: functions, never a base class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlx.types import Array, NetInput, Params, Row, TrainState


def gradients(
    loss: Callable[[Params], tuple[Array, Any]], params: Params, axis_name: str | None
) -> tuple[Params, Array, Any]:
    """(gradients, loss, aux): averaged over the devices, which all hold equal shares of a batch."""
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
    if axis_name is not None:
        grads, value = jax.lax.pmean((grads, value), axis_name)
    return grads, value, aux


def mean_over_devices(metrics: dict[str, Array], axis_name: str | None) -> dict[str, Array]:
    """Each scalar averaged over the devices."""
    return metrics if axis_name is None else jax.lax.pmean(metrics, axis_name)


def epsilon_greedy(key: Array, q: Array, epsilon: Array) -> Array:
    """i32[N] from q f32[N, A] and epsilon f32[N]; `key` is consumed."""
    explore_key, action_key = jax.random.split(key)
    explore = jax.random.uniform(explore_key, epsilon.shape) < epsilon
    random = jax.random.randint(action_key, epsilon.shape, 0, q.shape[-1])
    return jnp.where(explore, random, jnp.argmax(q, axis=-1)).astype(jnp.int32)


def take_action(values: Array, action: Array) -> Array:
    """values [..., A] at action [...]."""
    return jnp.take_along_axis(values, action[..., None], axis=-1)[..., 0]


def time_major(rows: Row) -> Row:
    """[B, L, ...] -> [L, B, ...]."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), rows)


def window(tree: Any, start: int, stop: int | None) -> Any:
    """Rows start .. stop-1 of every leaf [L, ...]."""
    return jax.tree.map(lambda x: x[start:stop], tree)


def add_time(inputs: NetInput) -> NetInput:
    """[N, ...] -> [1, N, ...]: acting is an unroll of one row."""
    return jax.tree.map(lambda x: x[None], inputs)


def step_optimizer(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Params
) -> tuple[Params, Any]:
    """(params, opt_state) after one step."""
    changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return optax.apply_updates(state.params, changes), opt_state


def periodic_target(params: Params, target: Params, updates: Array, period: int) -> Params:
    """A copy of `params` every `period` updates, else `target`."""
    due = updates % period == 0
    return jax.tree.map(lambda new, old: jnp.where(due, new, old), params, target)
