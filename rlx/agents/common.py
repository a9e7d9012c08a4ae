"""What agents share: functions, never a base class.

Rows and batches come as [B, L, ...] and are made time-major, [L, B, ...], at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlx import ops
from rlx.interfaces import Network
from rlx.networks.recurrent import zero_core
from rlx.types import (
    Array,
    ArraySpec,
    Batch,
    Carry,
    DiscreteSpec,
    EnvSpec,
    NetInput,
    Params,
    QActing,
    Row,
    SequenceSpec,
    TrainState,
    UpdateOutput,
)

Metrics = dict[str, Array]

# --- acting with action values -------------------------------------------------------------------

Q_ACTING = QActing(
    q=ArraySpec(shape=(), dtype="float32"), q_max=ArraySpec(shape=(), dtype="float32")
)


def require_discrete(agent: str, spec: EnvSpec) -> int:
    """The number of actions; raises ValueError for an environment without a single choice."""
    if isinstance(spec.action, DiscreteSpec):
        return spec.action.n
    raise ValueError(
        f"agent {agent} acts in discrete action spaces; {spec.id} has {spec.action}. "
        "Choose an environment with one discrete action."
    )


def allowed(inputs: NetInput, spec: EnvSpec) -> Array | None:
    """bool[..., A]: the actions that the environment's mask allows; None without a mask.

    Where it allows none (as after an episode's end) all are.
    """
    if spec.action_mask is None:
        return None
    mask = inputs.observation[spec.action_mask] != 0
    return mask | ~mask.any(axis=-1, keepdims=True)


def masked(values: Array, mask: Array | None) -> Array:
    """Values [..., A] at their dtype's least where an action is not allowed."""
    return values if mask is None else jnp.where(mask, values, jnp.finfo(values.dtype).min)


def epsilon_greedy(key: Array, q: Array, epsilon: Array, mask: Array | None = None) -> Array:
    """i32[N] from q f32[N, A] and epsilon f32[N]; `key` is consumed.

    mask: bool[N, A]; what it does not allow is never drawn.
    """
    explore_key, action_key = jax.random.split(key)
    explore = jax.random.uniform(explore_key, epsilon.shape) < epsilon
    if mask is None:
        random = jax.random.randint(action_key, epsilon.shape, 0, q.shape[-1])
    else:
        random = jax.random.categorical(action_key, jnp.where(mask, 0.0, -jnp.inf))
    return jnp.where(explore, random, jnp.argmax(masked(q, mask), axis=-1)).astype(jnp.int32)


def act_by_values(
    q: Array, inputs: NetInput, spec: EnvSpec, key: Array, epsilon: Array
) -> tuple[Array, QActing]:
    """q f32[N, A] -> (action i32[N], its Q and the largest Q); `key` is consumed."""
    mask = allowed(inputs, spec)
    action = epsilon_greedy(key, q, epsilon, mask)
    return action, QActing(q=take_action(q, action), q_max=masked(q, mask).max(axis=-1))


def take_action(values: Array, action: Array) -> Array:
    """values [..., A] at action [...]."""
    return jnp.take_along_axis(values, action[..., None], axis=-1)[..., 0]


# --- unrolling -----------------------------------------------------------------------------------


def require_starts(sequence: SequenceSpec, network: Network) -> None:
    """Raises ValueError where sequences would start at rows that cannot be unrolled from."""
    stride, block_rows = sequence.stride, sequence.block_rows
    if stride % block_rows == 0:
        return
    given = f"agent.stride={stride} must be a multiple"
    if block_rows % stride:
        raise ValueError(f"{given} or a divisor of agent.block_rows={block_rows}.")
    if network.is_recurrent:
        raise ValueError(
            f"{given} of agent.block_rows={block_rows}: sequences of a recurrent network start "
            "where a carry is stored."
        )


def time_major(tree: Any) -> Any:
    """[B, L, ...] -> [L, B, ...]."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)


def window(tree: Any, start: int, stop: int | None) -> Any:
    """Rows start .. stop-1 of every leaf [L, ...]."""
    return jax.tree.map(lambda x: x[start:stop], tree)


def add_time(inputs: NetInput) -> NetInput:
    """[N, ...] -> [1, N, ...]: acting is an unroll of one row."""
    return jax.tree.map(lambda x: x[None], inputs)


def batch_inputs(batch: Batch) -> NetInput:
    """All that the network reads of a batch, [L + 1, B, ...]; after the rows' comes `next`."""

    def joined(rows: Array, after: Array) -> Array:
        return jnp.concatenate([jnp.swapaxes(rows, 0, 1), after[None]])

    inputs: NetInput = jax.tree.map(joined, batch.rows.inputs, batch.next)
    return inputs


def transform_inputs(inputs: NetInput, reward: str) -> NetInput:
    """With the agent's transform of rewards on the previous ones, too."""
    return replace(inputs, prev_reward=ops.transform_reward(inputs.prev_reward, reward, jnp))


def stacked_inputs(
    network: Network, batch: Batch, *, reward: str, stored_state: bool
) -> tuple[NetInput, Any]:
    """(inputs as `unroll` takes them, the recurrent state before them)."""
    carry: Carry = batch.carry if stored_state else zero_core(batch.carry)
    inputs, _ = network.stack_frames(transform_inputs(batch_inputs(batch), reward), carry)
    return inputs, carry.core


def features_after(
    network: Network, params: Params, inputs: NetInput, core: Any, burn_in: int
) -> Array:
    """Features of the rows after the burn-in; no gradient crosses its edge."""
    if burn_in:
        _, core = network.unroll(params, window(inputs, 0, burn_in), core)
        core = jax.lax.stop_gradient(core)
    features, _ = network.unroll(params, window(inputs, burn_in, None), core)
    return features


# --- targets and errors of action values ---------------------------------------------------------


def value_targets(
    rows: Row,
    value: Array,
    *,
    n: int,
    gamma: float,
    reward: str,
    rescale_epsilon: float | None,
    xp: Any = jnp,
) -> Array:
    """h(n-step return of h^-1(value)): scalars of rows [T + n - 1, ...], value [T + n, ...].

    rescale_epsilon: of h (`ops.rescale`); None: h is the identity. Returns [T, ...].
    """
    raw = value if rescale_epsilon is None else ops.unrescale(value, rescale_epsilon, xp)
    target = ops.n_step_return(
        ops.transform_reward(rows.reward, reward, xp),
        rows.discount,
        rows.valid,
        raw,
        n=n,
        gamma=gamma,
        xp=xp,
    )
    return target if rescale_epsilon is None else ops.rescale(target, rescale_epsilon, xp)


def acting_priorities(rows: Row, burn_in: int, unroll: int, **targets: Any) -> np.ndarray:
    """f32[M, T] of scalars [M, L + 1]: absolute TD errors of acting time, -1 where not valid.

    The online network is its own target: equal to the learner's errors when its online and target
    parameters are those that acted. targets: the keywords of `value_targets`.

    DEPARTS: of a sequence that ends with a block the value after its last row is not known yet (it
    is acted on in the next block). The last row is given in its place (`interfaces.Prioritizing`),
    so its value is the bootstrap of the last trained row, until that row is trained on. All other
    rows, and all rows of other sequences, are exact.
    """
    rows = _numpy_time_major(rows, burn_in)
    target = value_targets(rows, rows.acting.q_max, **targets, xp=np)
    valid = rows.valid[:unroll]
    td = np.abs(target - rows.acting.q[:unroll])
    return np.where(valid, td, -1).astype(np.float32).T


def _numpy_time_major(rows: Row, burn_in: int) -> Row:
    """The scalars after the burn-in, [L - burn_in, M]; inputs are dropped."""

    def turned(x: Array) -> np.ndarray:
        return np.swapaxes(np.asarray(x)[:, burn_in:], 0, 1)

    return replace(
        rows,
        reward=turned(rows.reward),
        discount=turned(rows.discount),
        valid=turned(rows.valid),
        acting=QActing(q=turned(rows.acting.q), q_max=turned(rows.acting.q_max)),
    )


def per_sequence(losses: Array, valid: Array, over_time: str) -> Array:
    """f32[B] from losses [T, B] of valid rows; over_time: mean | sum."""
    total = jnp.where(valid, losses, 0.0).sum(axis=0)
    return total if over_time == "sum" else total / jnp.maximum(1, valid.sum(axis=0))


def row_priorities(td: Array, valid: Array) -> Array:
    """f32[B, T] from td [T, B]: absolute errors, -1 where a row is not valid."""
    return jnp.where(valid, jnp.abs(td), -1.0).T


def value_metrics(q: Array, td: Array, rows: Row) -> Metrics:
    """Means over the valid of the trained rows [T, B]."""

    def mean(x: Array) -> Array:
        return ops.masked_mean(x.ravel(), rows.valid.ravel(), jnp)

    drift = jnp.where(rows.valid[0], jnp.abs(q[0] - rows.acting.q[0]), 0)
    return {
        "learner/q_mean": mean(q),
        "learner/td_mean": mean(jnp.abs(td)),
        "learner/q_drift": drift.mean(),
    }


# --- gradients, optimisers, targets --------------------------------------------------------------


def new_state(
    params: Params, optimizer: optax.GradientTransformation, key: Array, **further: Any
) -> TrainState:
    """The state before the first update; further: `target_params`, `statistics`."""
    fields: Mapping[str, Any] = {"target_params": (), "statistics": {}, **further}
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        updates=jnp.zeros((), jnp.int32),
        gradient_steps=jnp.zeros((), jnp.int32),
        key=key,
        **fields,
    )


def gradients(
    loss: Callable[[Params], tuple[Array, Any]], params: Params, axis_name: str | None
) -> tuple[Params, Array, Any]:
    """(gradients, loss, aux): averaged over the devices, which all hold equal shares of a batch."""
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
    if axis_name is not None:
        grads, value = jax.lax.pmean((grads, value), axis_name)
    return grads, value, aux


def mean_over_devices(metrics: Metrics, axis_name: str | None) -> Metrics:
    """Each scalar averaged over the devices."""
    return metrics if axis_name is None else jax.lax.pmean(metrics, axis_name)


def step_optimizer(
    optimizer: optax.GradientTransformation, params: Params, opt_state: Any, grads: Params
) -> tuple[Params, Any]:
    """(params, opt_state) after one step."""
    changes, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, changes), opt_state


def gradient_step(
    loss: Callable[[Params], tuple[Array, tuple[Any, Metrics]]],
    optimizer: optax.GradientTransformation,
    state: TrainState,
    axis_name: str | None,
) -> tuple[TrainState, UpdateOutput]:
    """An update of one gradient step; the targets stay.

    loss: params -> (loss, (priorities, metrics)).
    """
    grads, value, (priorities, metrics) = gradients(loss, state.params, axis_name)
    params, opt_state = step_optimizer(optimizer, state.params, state.opt_state, grads)
    metrics = {
        **mean_over_devices(metrics, axis_name),
        "learner/loss": value,
        "learner/grad_norm": optax.tree.norm(grads),
    }
    state = replace(
        state,
        params=params,
        opt_state=opt_state,
        updates=state.updates + 1,
        gradient_steps=state.gradient_steps + 1,
    )
    return state, UpdateOutput(priorities=priorities, metrics=metrics)


def periodic_target(params: Params, target: Params, updates: Array, period: int) -> Params:
    """A copy of `params` every `period` updates, else `target`."""
    due = updates % period == 0
    return jax.tree.map(lambda new, old: jnp.where(due, new, old), params, target)


def soft_target(params: Params, target: Params, rate: float) -> Params:
    """`rate` of the way from `target` to `params`, leaf by leaf."""
    return jax.tree.map(lambda new, old: old + rate * (new - old), params, target)
