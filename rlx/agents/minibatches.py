"""Epochs of minibatches inside one compiled update.

Sequences of a recurrent network stay whole, with their stored state; rows of any other network are
shuffled one by one. Each device shuffles its own share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

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


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One update's rows, and how its epochs go over them."""

    loss: Loss
    optimizer: optax.GradientTransformation
    rows: Any  # [T, B, ...]; [1, T * B, ...] of a network without memory
    core: Any  # [B, ...]
    is_recurrent: bool
    most_kl: float | None
    axis_name: str | None

    @property
    def units(self) -> int:
        """The sequences, or single rows, that are shuffled."""
        count: int = jax.tree.leaves(self.rows)[0].shape[1]
        return count

    def part(self, index: Array | None) -> tuple[Any, Any]:
        """(rows, core) of a minibatch; index: of its units, None for all."""
        if index is None:
            return self.rows, self.core
        rows = jax.tree.map(lambda x: x[:, index], self.rows)
        core = jax.tree.map(lambda x: x[index], self.core) if self.is_recurrent else self.core
        return rows, core


class _Made(NamedTuple):
    """The state between two minibatches."""

    params: Params
    opt_state: Any
    stopped: Array  # bool[]


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
    """`epochs * minibatches` gradient steps; metrics are means over those that were computed.

    loss: (params, rows [T, b, ...], core [b, ...], key) -> (loss, metrics). rows: [T, B, ...]; of
    a network without memory they come as [1, b, ...], core as it is given. most_kl: the first
    minibatch with more of `learner/kl`, and all after it, change nothing.
    """
    if not is_recurrent:
        rows = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), rows)
    plan = _Plan(
        loss=loss,
        optimizer=optimizer.build(),
        rows=rows,
        core=core,
        is_recurrent=is_recurrent,
        most_kl=most_kl,
        axis_name=axis_name,
    )
    key, next_key = common.keys(state, axis_name)
    order_key, loss_key = jax.random.split(key)
    index = _orders(order_key, plan.units, epochs, minibatches)
    each = (index, jax.random.split(loss_key, epochs * minibatches))
    begin = _Made(state.params, state.opt_state, jnp.zeros((), bool))
    made, (told, computed) = jax.lax.scan(partial(_unless_stopped, plan), begin, each)
    count = computed.sum()
    metrics = {name: x.sum() / count for name, x in told.items()}
    steps = count.astype(jnp.int32) - made.stopped  # the minibatch that stopped made none
    metrics["learner/steps_of_update"] = steps.astype(jnp.float32)
    state = replace(
        state,
        params=made.params,
        opt_state=made.opt_state,
        updates=state.updates + 1,
        gradient_steps=state.gradient_steps + steps,
        key=next_key,
    )
    return state, UpdateOutput(priorities=None, metrics=metrics)


def _orders(key: Array, units: int, epochs: int, minibatches: int) -> Array | None:
    """The units of each minibatch, [epochs * minibatches, b], each once in an epoch; None: all."""
    if minibatches == 1:
        return None
    orders = [jax.random.permutation(k, units) for k in jax.random.split(key, epochs)]
    return jnp.stack(orders).reshape(epochs * minibatches, -1)


def _unless_stopped(
    plan: _Plan, made: _Made, given: tuple[Array | None, Array]
) -> tuple[_Made, tuple[common.Metrics, Array]]:
    """A step, with its metrics and a 1; zeros where an earlier one has stopped the epochs."""
    if plan.most_kl is None:
        made, told = _step(plan, made, given)
        return made, (told, jnp.ones(()))
    shapes = jax.eval_shape(partial(_step, plan), made, given)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def compute() -> tuple[_Made, tuple[common.Metrics, Array]]:
        after, told = _step(plan, made, given)
        return after, (told, jnp.ones(()))

    return jax.lax.cond(made.stopped, lambda: (made, (zeros, jnp.zeros(()))), compute)


def _step(
    plan: _Plan, made: _Made, given: tuple[Array | None, Array]
) -> tuple[_Made, common.Metrics]:
    """One gradient step on a minibatch, which is not taken where its policy is too far off."""
    index, key = given
    rows, core = plan.part(index)
    grads, value, told = common.gradients(
        lambda params: plan.loss(params, rows, core, key), made.params, plan.axis_name
    )
    metrics = {
        **common.mean_over_devices(told, plan.axis_name),
        "learner/loss": value,
        **common.grad_norms(grads),
    }
    new = common.step_optimizer(plan.optimizer, made.params, made.opt_state, grads)
    if plan.most_kl is None:
        return _Made(new[0], new[1], made.stopped), metrics
    stopped = metrics[KL] > plan.most_kl
    old = (made.params, made.opt_state)
    params, opt_state = jax.tree.map(lambda x, y: jnp.where(stopped, y, x), new, old)
    return _Made(params, opt_state, stopped), metrics


def require_minibatches(epochs: int, minibatches: int, most_kl: float | None) -> None:
    """Raises ValueError for a limit that nothing could reach."""
    if most_kl is not None and epochs * minibatches == 1:
        raise ValueError(
            f"agent.most_kl={show(most_kl)} stops epochs, but there is one gradient step only, of "
            "the policy that acted; set it to null."
        )
