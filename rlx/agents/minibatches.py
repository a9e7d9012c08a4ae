"""Epochs of minibatches inside one compiled update.

Sequences of a recurrent network stay whole, with their stored state; rows of any other network are
shuffled one by one. Each device shuffles its own share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlx.agents import common
from rlx.agents.optimizers import Optimizer
from rlx.problems import show
from rlx.types import Array, Params, TrainState, UpdateOutput

KL = "learner/kl"  # the metric that an early stop looks at
Loss = Callable[[Params, Any, Any, Array], tuple[Array, common.Metrics]]


def check_share(agent: Any, sequences: int) -> None:
    """Raises ValueError unless a device's share of a batch divides into the minibatches."""
    recurrent, count = agent.network.is_recurrent, agent.minibatches
    units, of = (sequences, "blocks") if recurrent else (sequences * agent.unroll, "rows")
    if units % count:
        raise ValueError(
            f"agent.minibatches={count} does not divide the {units} {of} of a device's batch; "
            f"give a divisor of {units}, or another learner.batch_size."
        )


def learn(
    loss: Loss,
    optimizer: Optimizer,
    state: TrainState,
    rows: Any,
    core: Any,
    *,
    epochs: int,
    minibatches: int,
    is_recurrent: bool,
    most_kl: float | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, UpdateOutput]:
    """`epochs * minibatches` gradient steps; metrics are means over those that were made.

    loss: (params, rows [T, b, ...], core [b, ...], key) -> (loss, metrics). rows: [T, B, ...]; of
    a network without memory they come as [1, b, ...], core as it is given. most_kl: the first
    minibatch with more of `learner/kl`, and all after it, change nothing.
    """
    if not is_recurrent:
        rows = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), rows)
    units = jax.tree.leaves(rows)[0].shape[1]
    chain, (key, next_key) = optimizer.build(), jax.random.split(state.key)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

    def part(index: Array | None) -> tuple[Any, Any]:
        if index is None:
            return rows, core
        some = jax.tree.map(lambda x: x[:, index], rows)
        return some, jax.tree.map(lambda x: x[index], core) if is_recurrent else core

    def step(made: Any, index: Array | None, key: Array) -> tuple[Any, Any]:
        params, opt_state, stopped = made
        own = part(index)
        grads, value, told = common.gradients(lambda p: loss(p, *own, key), params, axis_name)
        told = {
            **common.mean_over_devices(told, axis_name),
            "learner/loss": value,
            "learner/grad_norm": optax.tree.norm(grads),
        }
        if most_kl is not None:
            stopped = stopped | (told[KL] > most_kl)
        new = common.step_optimizer(chain, params, opt_state, grads)
        kept = jax.tree.map(lambda x, old: jnp.where(stopped, old, x), new, (params, opt_state))
        return (*(kept if most_kl is not None else new), stopped), told

    def guarded(made: Any, given: tuple[Array | None, Array]) -> tuple[Any, Any]:
        """The step, unless an earlier one has stopped the epochs; with how many were computed."""
        if most_kl is None:
            made, told = step(made, *given)
            return made, (told, jnp.ones(()))
        shapes = jax.eval_shape(step, made, *given)[1]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        made, told, computed = jax.lax.cond(
            made[2],
            lambda: (made, zeros, jnp.zeros(())),
            lambda: (*step(made, *given), jnp.ones(())),
        )
        return made, (told, computed)

    made = (state.params, state.opt_state, jnp.zeros((), bool))
    steps = epochs * minibatches
    order_key, loss_key = jax.random.split(key)
    keys = jax.random.split(loss_key, steps)
    if minibatches == 1:
        made, (told, computed) = jax.lax.scan(lambda m, k: guarded(m, (None, k)), made, keys)
    else:
        orders = [jax.random.permutation(k, units) for k in jax.random.split(order_key, epochs)]
        index = jnp.stack(orders).reshape(steps, -1)
        made, (told, computed) = jax.lax.scan(guarded, made, (index, keys))
    params, opt_state, stopped = made
    count = computed.sum()
    metrics = {name: x.sum() / count for name, x in told.items()}
    gradient_steps = count.astype(jnp.int32) - stopped  # the one that stopped made none
    metrics["learner/gradient_steps"] = gradient_steps.astype(jnp.float32)
    state = replace(
        state,
        params=params,
        opt_state=opt_state,
        updates=state.updates + 1,
        gradient_steps=state.gradient_steps + gradient_steps,
        key=next_key,
    )
    return state, UpdateOutput(priorities=None, metrics=metrics)


def require_minibatches(epochs: int, minibatches: int, most_kl: float | None) -> None:
    """Raises ValueError for a limit that nothing could reach."""
    if most_kl is not None and epochs * minibatches == 1:
        raise ValueError(
            f"agent.most_kl={show(most_kl)} stops epochs, but there is one gradient step only, of "
            "the policy that acted; set it to null."
        )
