"""Agents share these functions; there is no base class.

Rows and batches come as [B, L, ...] and are made time-major, [L, B, ...], at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from rlx import ops
from rlx.interfaces import Network
from rlx.networks.distributions import choices, split_choices
from rlx.networks.recurrent import zero_core
from rlx.types import (
    Array,
    Batch,
    BoxSpec,
    Carry,
    DiscreteSpec,
    EnvSpec,
    NetInput,
    Params,
    SequenceSpec,
    TrainState,
    UpdateOutput,
)

Metrics = dict[str, Array]
Reward = Literal["raw", "clip", "tanh"]  # what becomes of rewards, and of previous ones alike

# --- actions -------------------------------------------------------------------------------------


def require_discrete(agent: str, spec: EnvSpec) -> int:
    """The number of actions; raises ValueError for an environment without a single choice."""
    if isinstance(spec.action, DiscreteSpec):
        return spec.action.n
    raise ValueError(
        f"agent {agent} acts in discrete action spaces; {spec.id} has {spec.action}. "
        "Choose an environment with one discrete action."
    )


def allowed(inputs: NetInput, spec: EnvSpec) -> Array | None:
    """The actions that the environment's mask allows, bool[..., A]; None without a mask.

    Where the mask allows none of a choice (as after an episode's end) all of it are allowed.
    """
    if spec.action_mask is None:
        return None
    mask = inputs.observation[spec.action_mask] != 0
    assert not isinstance(spec.action, BoxSpec)
    parts = split_choices(choices(spec.action), mask)
    return jnp.concatenate([part | ~part.any(axis=-1, keepdims=True) for part in parts], axis=-1)


def masked(values: Array, mask: Array | None) -> Array:
    """The values [..., A], set to their dtype's least where an action is not allowed."""
    return values if mask is None else jnp.where(mask, values, jnp.finfo(values.dtype).min)


def epsilon_greedy(key: Array, q: Array, epsilon: Array, mask: Array | None = None) -> Array:
    """Epsilon-greedy actions i32[N] from q f32[N, A] and epsilon f32[N]; `key` is consumed.

    mask: bool[N, A]; an action it does not allow is never drawn.
    """
    explore_key, action_key = jax.random.split(key)
    explore = jax.random.uniform(explore_key, epsilon.shape) < epsilon
    if mask is None:
        random = jax.random.randint(action_key, epsilon.shape, 0, q.shape[-1])
    else:
        random = jax.random.categorical(action_key, jnp.where(mask, 0.0, -jnp.inf))
    return jnp.where(explore, random, jnp.argmax(masked(q, mask), axis=-1)).astype(jnp.int32)


def take_action(values: Array, action: Array) -> Array:
    """The values [..., A] at action [...], as [...]; of values [..., A, K] they are [..., K]."""
    index = action.reshape(*action.shape, *[1] * (values.ndim - action.ndim))
    return jnp.take_along_axis(values, index, axis=action.ndim).squeeze(action.ndim)


def explore(key: Array, mode: Array, sample: Array, exploration: Array) -> Array:
    """Actions [N, *]: each lane's sample with probability exploration f32[N], else its mode.

    It is for agents that sample; `key` is consumed.
    """
    draws = jax.random.uniform(key, exploration.shape) < exploration
    return jnp.where(draws.reshape(-1, *[1] * (mode.ndim - 1)), sample, mode)


# --- unrolling -----------------------------------------------------------------------------------


def require_starts(sequence: SequenceSpec, network: Network) -> None:
    """Raises ValueError where sequences would start at rows that cannot be unrolled from."""
    stride, block_rows = sequence.stride, sequence.block_rows
    if stride % block_rows == 0:
        return
    given = f"agent.stride={stride} must be a multiple"
    if network.is_recurrent:
        raise ValueError(
            f"{given} of agent.block_rows={block_rows}: sequences of a recurrent network start "
            "where a carry is stored."
        )
    if block_rows % stride:
        raise ValueError(f"{given} or a divisor of agent.block_rows={block_rows}.")


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
    """All network inputs of a batch, [L + 1, B, ...]: those of the rows, then `next`."""

    def joined(rows: Array, after: Array) -> Array:
        return jnp.concatenate([jnp.swapaxes(rows, 0, 1), after[None]])

    inputs: NetInput = jax.tree.map(joined, batch.rows.inputs, batch.next)
    return inputs


def transform_inputs(inputs: NetInput, reward: str) -> NetInput:
    """The inputs with the agent's transform of rewards on the previous rewards."""
    return replace(inputs, prev_reward=ops.transform_reward(inputs.prev_reward, reward, jnp))


def stacked_inputs(
    network: Network, batch: Batch, *, reward: str, stored_state: bool
) -> tuple[NetInput, Any]:
    """Returns (inputs as `unroll` takes them, the recurrent state before them)."""
    carry: Carry = batch.carry if stored_state else zero_core(batch.carry)
    inputs, _ = network.stack_frames(transform_inputs(batch_inputs(batch), reward), carry)
    return inputs, carry.core


def features_after(
    network: Network,
    params: Params,
    inputs: NetInput,
    core: Any,
    burn_in: int,
    trained: int | None = None,
) -> Array:
    """The features of the rows after the burn-in; no gradient flows into the burn-in.

    trained: of so many rows after it a loss may ask for a gradient, and of the later ones, which
    only choose actions of targets, for none; None: of all rows. The features are the same.
    """
    if burn_in:
        _, core = network.unroll(params, window(inputs, 0, burn_in), core)
        core = jax.lax.stop_gradient(core)
    if trained is None:
        return network.unroll(params, window(inputs, burn_in, None), core)[0]
    end = burn_in + trained
    features, core = network.unroll(params, window(inputs, burn_in, end), core)
    params, core = jax.lax.stop_gradient((params, core))
    later, _ = network.unroll(params, window(inputs, end, None), core)
    return jnp.concatenate([features, later])


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


def keys(state: TrainState, axis_name: str | None) -> tuple[Array, Array]:
    """(the key of this update, of which each device has its own; the next state's)."""
    key, next_key = jax.random.split(state.key)
    if axis_name is not None:  # each device draws for its own share
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    return key, next_key


def gradients(
    loss: Callable[[Params], tuple[Array, Any]], params: Params, axis_name: str | None
) -> tuple[Params, Array, Any]:
    """Returns (gradients, loss, aux), averaged over the devices, which have equal batch shares."""
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
    if axis_name is not None:
        grads, value = jax.lax.pmean((grads, value), axis_name)
    return grads, value, aux


def mean_over_devices(metrics: Metrics, axis_name: str | None) -> Metrics:
    """Each scalar averaged over the devices."""
    return metrics if axis_name is None else jax.lax.pmean(metrics, axis_name)


def grad_norms(grads: Params) -> Metrics:
    """The global norm of gradients, and that of each part: what stands at the top of the tree."""
    parts = {f"learner/grad_norm/{name}": optax.tree.norm(part) for name, part in grads.items()}
    return {"learner/grad_norm": optax.tree.norm(grads), **parts}


def step_optimizer(
    optimizer: optax.GradientTransformation, params: Params, opt_state: Any, grads: Params
) -> tuple[Params, Any]:
    """Returns (params, opt_state) after one step."""
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
        **grad_norms(grads),
    }
    state = replace(
        state,
        params=params,
        opt_state=opt_state,
        updates=state.updates + 1,
        gradient_steps=state.gradient_steps + 1,
    )
    return state, UpdateOutput(priorities=priorities, metrics=metrics)


def hard_target(params: Params, target: Params, due: Array) -> Params:
    """A copy of `params` where it is due, else `target`."""
    return jax.tree.map(lambda new, old: jnp.where(due, new, old), params, target)


def soft_target(params: Params, target: Params, rate: float) -> Params:
    """`rate` of the way from `target` to `params`, leaf by leaf."""
    return jax.tree.map(lambda new, old: old + rate * (new - old), params, target)
