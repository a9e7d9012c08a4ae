"""Agents with action values share these functions: acting, targets, errors, updates.

Those whose first argument is `agent` do as methods, too: an agent with the settings of
`ValueAgent` writes `act = q_learning.act` in its body, and what is its own is its `loss`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlx import ops
from rlx.agents import common
from rlx.agents.optimizers import Adam
from rlx.interfaces import Network
from rlx.types import (
    Array,
    ArraySpec,
    Batch,
    Carry,
    EnvSpec,
    NetInput,
    Params,
    QActing,
    Row,
    SequenceSpec,
    TrainState,
    UpdateOutput,
)

Q_ACTING = QActing(
    q=ArraySpec(shape=(), dtype="float32"), q_max=ArraySpec(shape=(), dtype="float32")
)
HEAD = "head"  # the name of an agent's only head among the parameters


class ValueAgent(Protocol):
    """The settings that these functions need of an agent with action values."""

    @property
    def network(self) -> Network: ...
    @property
    def head(self) -> Any: ...
    @property
    def optimizer(self) -> Adam: ...
    @property
    def spec(self) -> EnvSpec: ...
    @property
    def burn_in(self) -> int: ...
    @property
    def unroll(self) -> int: ...
    @property
    def n_step(self) -> int: ...
    @property
    def stride(self) -> int | None: ...
    @property
    def block_rows(self) -> int: ...
    @property
    def discount(self) -> float: ...
    @property
    def reward(self) -> str: ...
    @property
    def rescale_epsilon(self) -> float | None:
        """The epsilon of h(x) (`ops.rescale`); None: values are not rescaled."""

    @property
    def stored_state(self) -> bool:
        """Says whether sequences start from the stored recurrent state, else from zeros."""

    def values(self, params: Params, inputs: NetInput, carry: Carry) -> tuple[Array, Carry]:
        """The values to act by, f32[N, A]; `values` of this module, or the agent's own."""

    @property
    def target_period_updates(self) -> int: ...

    def loss(self, params: Params, features: Array, replayed: Replayed) -> Loss:
        """Returns (loss, (row priorities f32[B, T] or None, metrics)) of features [T + n, B, F]."""


Loss = tuple[Array, tuple[Array | None, common.Metrics]]


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """Sequences after their burn-in, time-major, as a loss reads them."""

    rows: Row  # [T + n - 1 or more, B], inputs included
    mask: Array | None  # bool[T + n, B, A]: allowed actions; None: all
    importance: Array  # f32[B]
    target_params: Params
    target_features: Array  # f32[T + n, B, F]


# --- what agents with action values are ----------------------------------------------------------


def sequence_of(agent: ValueAgent) -> SequenceSpec:
    """The windows of the agent's settings; without a stride, one at each possible start row."""
    at_every = agent.block_rows if agent.network.is_recurrent else 1
    return SequenceSpec(
        burn_in=agent.burn_in,
        unroll=agent.unroll,
        n_step=agent.n_step,
        stride=at_every if agent.stride is None else agent.stride,
        block_rows=agent.block_rows,
    )


def initial_carry(agent: Any, batch: int) -> Carry:
    """The carry before an episode's first row, for `batch` lanes."""
    carry: Carry = agent.network.initial_carry(batch)
    return carry


def acting_params(agent: Any, state: TrainState) -> Params:
    """The parameters that act: the online ones."""
    del agent
    return state.params


def init(agent: ValueAgent, key: Array) -> TrainState:
    """Fresh parameters of a network with one head, and their copy as target; `key` is consumed."""
    init_key, state_key = jax.random.split(key)
    params = agent.network.init(init_key, {HEAD: agent.head})
    return common.new_state(params, agent.optimizer.build(), state_key, target_params=params)


def q_values(agent: ValueAgent, params: Params, features: Array) -> Array:
    """Maps features [..., F] to the Q of every action, f32[..., A]."""
    q: Array = agent.network.read(params, HEAD, agent.head, features)
    return q


def values(
    agent: ValueAgent, params: Params, inputs: NetInput, carry: Carry
) -> tuple[Array, Carry]:
    """Maps inputs [N, ...] to (Q of every action f32[N, A], carry)."""
    inputs = common.transform_inputs(common.add_time(inputs), agent.reward)
    features, carry = agent.network.apply(params, inputs, carry)
    return q_values(agent, params, features)[0], carry


def act(
    agent: ValueAgent,
    params: Params,
    inputs: NetInput,
    carry: Carry,
    key: Array,
    exploration: Array,
) -> tuple[Array, QActing, Carry]:
    """Maps inputs [N, ...], epsilon f32[N] to (action i32[N], its Q and the largest Q, carry).

    `key` is consumed.
    """
    q, carry = agent.values(params, inputs, carry)
    mask = common.allowed(inputs, agent.spec)
    action = common.epsilon_greedy(key, q, exploration, mask)
    acting = QActing(q=common.take_action(q, action), q_max=common.masked(q, mask).max(axis=-1))
    return action, acting, carry


def initial_priorities(agent: ValueAgent, rows: Row) -> np.ndarray:
    """f32[M, T] from the Q-values of acting time of rows [M, L] (observation {})."""
    return acting_priorities(rows, agent.burn_in, agent.unroll, **target_settings(agent))


def target_settings(agent: ValueAgent) -> dict[str, Any]:
    """The agent's settings as keywords of `value_targets`."""
    return {
        "n": agent.n_step,
        "gamma": agent.discount,
        "reward": agent.reward,
        "rescale_epsilon": agent.rescale_epsilon,
    }


def update(
    agent: ValueAgent, state: TrainState, batch: Batch, *, axis_name: str | None = None
) -> tuple[TrainState, UpdateOutput]:
    """One gradient step of `agent.loss` on this device's share of the batch."""
    inputs, core = common.stacked_inputs(
        agent.network, batch, reward=agent.reward, stored_state=agent.stored_state
    )
    target_features, _ = agent.network.unroll(state.target_params, inputs, core)
    replayed = Replayed(
        rows=common.window(common.time_major(batch.rows), agent.burn_in, None),
        mask=common.allowed(common.window(inputs, agent.burn_in, None), agent.spec),
        importance=batch.importance,
        target_params=state.target_params,
        target_features=target_features[agent.burn_in :],
    )

    def loss(params: Params) -> Loss:
        features = common.features_after(agent.network, params, inputs, core, agent.burn_in)
        return agent.loss(params, features, replayed)

    state, output = common.gradient_step(loss, agent.optimizer.build(), state, axis_name)
    target = common.periodic_target(
        state.params, state.target_params, state.gradient_steps, agent.target_period_updates
    )
    return replace(state, target_params=target), output


def td_errors(
    agent: ValueAgent, params: Params, features: Array, replayed: Replayed, *, double_q: bool
) -> tuple[Array, Array, Row]:
    """Returns (TD errors f32[T, B], Q of the taken actions [T, B], trained rows) of one head."""
    q = q_values(agent, params, features)
    target_q = q_values(agent, replayed.target_params, replayed.target_features)
    best = jnp.argmax(common.masked(q if double_q else target_q, replayed.mask), axis=-1)
    target = value_targets(
        replayed.rows, common.take_action(target_q, best), **target_settings(agent)
    )
    trained = common.window(replayed.rows, 0, agent.unroll)
    taken = common.take_action(q[: agent.unroll], trained.action)
    return jax.lax.stop_gradient(target) - taken, taken, trained


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
    """The scalars after the burn-in, time-major [L - burn_in, M]; inputs are dropped."""

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
    """Reduces losses [T, B] of valid rows to f32[B]; over_time: mean | sum."""
    total = jnp.where(valid, losses, 0.0).sum(axis=0)
    return total if over_time == "sum" else total / jnp.maximum(1, valid.sum(axis=0))


def row_priorities(td: Array, valid: Array) -> Array:
    """The priorities f32[B, T] from td [T, B]: absolute errors, -1 where a row is not valid."""
    return jnp.where(valid, jnp.abs(td), -1.0).T


def value_metrics(q: Array, td: Array, rows: Row) -> common.Metrics:
    """Metrics: means over the valid trained rows [T, B]."""

    def mean(x: Array) -> Array:
        return ops.masked_mean(x.ravel(), rows.valid.ravel(), jnp)

    drift = jnp.abs(q[0] - rows.acting.q[0])
    return {
        "learner/q_mean": mean(q),
        "learner/td_mean": mean(jnp.abs(td)),
        "learner/q_drift": ops.masked_mean(drift, rows.valid[0], jnp),
    }
