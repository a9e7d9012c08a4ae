"""Agents with action values share these functions: acting, targets, errors, updates.

Those whose first argument is `agent` do as methods, too: an agent with the settings of
`ValueAgent` writes `act = q_learning.act` in its body. What may be its own: the `outputs` of its
heads, their `expected` values, what it keeps from acting time (`remember`), and its `loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlx.agents import common, targets
from rlx.agents.munchausen import Munchausen
from rlx.agents.optimizers import Optimizer
from rlx.agents.quantiles import quantile_loss
from rlx.interfaces import Network
from rlx.problems import show
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
    SoftActing,
    TrainState,
    UpdateOutput,
)

SCALAR = ArraySpec(shape=(), dtype="float32")
Q_ACTING = QActing(q=SCALAR, q_max=SCALAR)
SOFT_ACTING = SoftActing(q=SCALAR, q_max=SCALAR, bonus=SCALAR)
BEGAN = "target_env_steps"  # a statistic: of the run when the period began, mod 2^32
HEAD = "head"  # the name of an agent's only head among the parameters


class ActingAgent(Protocol):
    """Acting by action values needs these settings of an agent."""

    @property
    def network(self) -> Network: ...
    @property
    def spec(self) -> EnvSpec: ...
    @property
    def reward(self) -> str: ...
    @property
    def samples(self) -> bool: ...

    def outputs(
        self, params: Params, features: Array, key: Array | None = None, noise: Array | None = None
    ) -> Array:
        """Gives what the heads say of features [..., F]: f32[..., A], or f32[..., A, K].

        key: of fractions that are drawn; None: they are fixed ones. noise: key of noisy layers;
        None: it is off.
        """

    def expected(self, outputs: Array) -> Array: ...  # the values to act by, f32[..., A]
    def remember(self, outputs: Array, action: Array, mask: Array | None) -> Any:
        """The record of acting time, of outputs [N, ...] and action i32[N]."""


class ValueAgent(ActingAgent, Protocol):
    """Learning action values needs these settings, too."""

    @property
    def head(self) -> Any: ...
    @property
    def optimizer(self) -> Optimizer: ...
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
    def rescale_epsilon(self) -> float | None: ...  # of h(x); None: values are not rescaled
    @property
    def stored_state(self) -> bool: ...  # sequences start from it, else from zeros
    @property
    def double_q(self) -> bool: ...
    @property
    def munchausen(self) -> Munchausen | None: ...
    @property
    def target_period_updates(self) -> int | None: ...
    @property
    def target_period_env_steps(self) -> int | None: ...
    @property
    def target_rate(self) -> float | None: ...
    @property
    def loss_over_time(self) -> str: ...

    def heads(self) -> Mapping[str, Any]: ...  # by their names among the parameters
    def loss(self, params: Params, features: Array, replayed: Replayed) -> Loss:
        """Returns (loss, (row priorities f32[B, T] or None, metrics)) of features [T + n, B, F]."""


class QuantileAgent(ValueAgent, Protocol):
    """Values that are means of quantiles."""

    @property
    def kappa(self) -> float | None: ...


class ErrorAgent(ValueAgent, Protocol):
    """Values that are single numbers."""

    @property
    def error(self) -> str: ...


Loss = tuple[Array, tuple[Array | None, common.Metrics]]


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """Sequences after their burn-in, time-major; the last n rows' features have no gradient."""

    rows: Row  # [T + n - 1 or more, B], inputs included
    mask: Array | None  # bool[T + n, B, A]: allowed actions; None: all
    importance: Array  # f32[B]
    key: Array  # of what is drawn in this update
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


def require_whole(agent: ValueAgent) -> None:
    """Raises ValueError where settings of the agent exclude each other."""
    names = ("target_period_updates", "target_period_env_steps", "target_rate")
    given = {name: getattr(agent, name) for name in names}
    if sum(value is not None for value in given.values()) != 1:
        shown = ", ".join(f"agent.{name}={show(value)}" for name, value in given.items())
        raise ValueError(
            f"{shown}: give one of them (copies of the parameters after so many updates or env "
            "steps, or a step towards them with each update), and null for the others."
        )
    if agent.munchausen is None:
        return
    if agent.double_q:
        raise ValueError(
            "agent.munchausen has a policy of the target network, so nothing is chosen by the "
            "online one; set agent.double_q=false."
        )
    if agent.rescale_epsilon is not None:
        raise ValueError(
            "agent.munchausen adds logarithms of probabilities to rewards, which are not rescaled; "
            "set agent.rescale_epsilon=null."
        )


def init(agent: ValueAgent, key: Array, **further: tuple[Array, ...]) -> TrainState:
    """Fresh parameters of body and heads, and their copy as target; `key` is consumed.

    further: by the head's name, examples [1, 1, ...] of what it reads beside the features.
    """
    init_key, state_key = jax.random.split(key)
    params = agent.network.init(init_key, agent.heads(), **further)
    counted = {} if agent.target_period_env_steps is None else {BEGAN: jnp.zeros((), jnp.uint32)}
    return common.new_state(
        params, agent.optimizer.build(), state_key, target_params=params, statistics=counted
    )


def heads(agent: Any) -> dict[str, Any]:
    """The agent's only head."""
    return {HEAD: agent.head}


def outputs(
    agent: Any,
    params: Params,
    features: Array,
    key: Array | None = None,
    noise: Array | None = None,
) -> Array:
    """Gives what the only head says of features [..., F] (`ValueAgent.outputs`)."""
    del key
    found: Array = agent.network.read(params, HEAD, agent.heads()[HEAD], features, noise)
    return found


def expected(agent: Any, outputs: Array) -> Array:
    """The Q of every action, which are the head's outputs."""
    del agent
    return outputs


def mean(agent: Any, outputs: Array) -> Array:
    """The Q of every action, f32[..., A], from samples or quantiles of it f32[..., A, K]."""
    del agent
    return outputs.mean(axis=-1)


def values(
    agent: ActingAgent, params: Params, inputs: NetInput, carry: Carry
) -> tuple[Array, Carry]:
    """Maps inputs [N, ...] to (Q of every action f32[N, A], carry)."""
    features, carry = _acting_features(agent, params, inputs, carry)
    return agent.expected(agent.outputs(params, features)), carry


def _acting_features(
    agent: ActingAgent, params: Params, inputs: NetInput, carry: Carry
) -> tuple[Array, Carry]:
    inputs = common.transform_inputs(common.add_time(inputs), agent.reward)
    features, carry = agent.network.apply(params, inputs, carry)
    return features[0], carry


def is_noisy(agent: Any) -> bool:
    """Says whether the agent samples: by noisy layers, instead of by epsilon."""
    return agent.head.noise is not None


def act(
    agent: ActingAgent,
    params: Params,
    inputs: NetInput,
    carry: Carry,
    key: Array,
    exploration: Array,
) -> tuple[Array, Any, Carry]:
    """Maps inputs [N, ...] to (action i32[N], the agent's record of it, carry).

    exploration: epsilon f32[N]; with noisy layers the share of actions that are chosen with noise,
    which each lane draws anew. `key` is consumed.
    """
    features, carry = _acting_features(agent, params, inputs, carry)
    draws, noise = jax.random.split(jax.random.fold_in(key, 2))  # 0, 1: epsilon_greedy's split
    outputs = agent.outputs(params, features, draws)
    q, mask = agent.expected(outputs), common.allowed(inputs, agent.spec)
    if agent.samples:
        noisy = agent.expected(
            jax.vmap(lambda x, key: agent.outputs(params, x, draws, key))(
                features, jax.random.split(noise, len(features))
            )
        )
        best, sample = (jnp.argmax(common.masked(x, mask), axis=-1) for x in (q, noisy))
        action = common.explore(jax.random.fold_in(key, 0), best, sample, exploration)
    else:
        action = common.epsilon_greedy(key, q, exploration, mask)
    return action, agent.remember(outputs, action, mask), carry


def remember(agent: ValueAgent, outputs: Array, action: Array, mask: Array | None) -> Any:
    """The Q of the action and the largest Q; with Munchausen the soft value, and the bonus."""
    q = agent.expected(outputs)
    taken = common.take_action(q, action)
    if agent.munchausen is None:
        return QActing(q=taken, q_max=common.masked(q, mask).max(axis=-1))
    pi, scaled = agent.munchausen.policy(q, mask)
    bonus = agent.munchausen.bonus(scaled, action)
    return SoftActing(q=taken, q_max=(pi * (q - scaled)).sum(axis=-1), bonus=bonus)


def acting_spec(agent: Any) -> QActing | SoftActing:
    """The spec of what `remember` gives."""
    return Q_ACTING if agent.munchausen is None else SOFT_ACTING


def initial_priorities(agent: ValueAgent, rows: Row) -> np.ndarray:
    """f32[M, T] from the Q-values of acting time of rows [M, L] (observation {})."""
    return targets.acting_priorities(rows, agent.burn_in, agent.unroll, **target_settings(agent))


def target_settings(agent: ValueAgent) -> dict[str, Any]:
    """The agent's settings as keywords of `targets.value_targets`."""
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
    net = agent.network
    inputs, core = common.stacked_inputs(
        net, batch, reward=agent.reward, stored_state=agent.stored_state
    )
    target_features, _ = net.unroll(state.target_params, inputs, core)
    key, next_key = common.keys(state, axis_name)
    replayed = Replayed(
        rows=common.window(common.time_major(batch.rows), agent.burn_in, None),
        mask=common.allowed(common.window(inputs, agent.burn_in, None), agent.spec),
        importance=batch.importance,
        key=key,
        target_params=state.target_params,
        target_features=target_features[agent.burn_in :],
    )

    def loss(params: Params) -> Loss:
        features = common.features_after(net, params, inputs, core, agent.burn_in, agent.unroll)
        return agent.loss(params, features, replayed)

    state, output = common.gradient_step(loss, agent.optimizer.build(), state, axis_name)
    return replace(followed(agent, state, batch, axis_name), key=next_key), output


def followed(
    agent: ValueAgent, state: TrainState, batch: Batch, axis_name: str | None
) -> TrainState:
    """The state with the target parameters after a gradient step.

    They are a copy every so often, or a step towards the parameters. Raises ValueError if env steps
    are to be counted and the batch does not say how many there were.
    """
    params, target = state.params, state.target_params
    if agent.target_rate is not None:
        return replace(state, target_params=common.soft_target(params, target, agent.target_rate))
    if agent.target_period_updates is not None:
        due = state.gradient_steps % agent.target_period_updates == 0
        return replace(state, target_params=common.hard_target(params, target, due))
    if batch.env_steps is None:
        raise ValueError("agent.target_period_env_steps needs a batch with env_steps")
    made = batch.env_steps.max()
    if axis_name is not None:
        made = jax.lax.pmax(made, axis_name)
    assert agent.target_period_env_steps is not None
    period, began = jnp.uint32(agent.target_period_env_steps), state.statistics[BEGAN]
    ended = (made - began) // period  # differences are right beyond 2^32, too
    target = common.hard_target(params, target, ended > 0)
    return replace(state, target_params=target, statistics={BEGAN: began + ended * period})


def td_loss(agent: ErrorAgent, params: Params, features: Array, replayed: Replayed) -> Loss:
    """Importance-weighted 0.5 d^2 of TD errors d, or |d| - 0.5 beyond 1 (Huber).

    It is a mean or a sum over a sequence's valid rows, and a mean over the batch.
    """
    td, q, trained = td_errors(agent, params, features, replayed)
    per_row = 0.5 * jnp.square(td) if agent.error == "squared" else optax.huber_loss(td)
    losses = targets.per_sequence(per_row, trained.valid, agent.loss_over_time)
    priorities = targets.row_priorities(td, trained.valid)
    metrics = targets.value_metrics(q, td, trained)
    return jnp.mean(replayed.importance * losses), (priorities, metrics)


def td_errors(
    agent: ValueAgent, params: Params, features: Array, replayed: Replayed
) -> tuple[Array, Array, Row]:
    """Returns (TD errors f32[T, B], Q of the taken actions [T, B], trained rows)."""
    online, target = jax.random.split(replayed.key)
    q = agent.expected(agent.outputs(params, features, noise=online))
    target_q = agent.expected(
        agent.outputs(replayed.target_params, replayed.target_features, noise=target)
    )
    return errors(agent, q, target_q, replayed)


def errors(
    agent: ValueAgent, q: Array, target_q: Array, replayed: Replayed
) -> tuple[Array, Array, Row]:
    """`td_errors` of q and target_q f32[T + n, B, A]."""
    value, bonus = bootstrap(agent, target_q, q, target_q, replayed)
    target = targets.value_targets(replayed.rows, value, bonus=bonus, **target_settings(agent))
    trained = common.window(replayed.rows, 0, agent.unroll)
    taken = common.take_action(q[: agent.unroll], trained.action)
    return jax.lax.stop_gradient(target) - taken, taken, trained


def bootstrap(
    agent: ValueAgent, outputs: Array, q: Array, target_q: Array, replayed: Replayed
) -> tuple[Array, Array | None]:
    """(what a state is worth, what its action adds to the reward f32[T + n - 1, B] or None).

    outputs: of the target network, f32[T + n, B, A] or [T + n, B, A, K]; the worth is [T + n, B] or
    [T + n, B, K]: the outputs of the best action, by q (double) or target_q [T + n, B, A]; with
    Munchausen their mean over the policy.
    """
    if agent.munchausen is None:
        best = jnp.argmax(common.masked(q if agent.double_q else target_q, replayed.mask), axis=-1)
        return common.take_action(outputs, best), None
    pi, scaled = agent.munchausen.policy(target_q, replayed.mask)
    rows = len(replayed.rows.action)
    bonus = agent.munchausen.bonus(scaled[:rows], replayed.rows.action)
    if outputs.ndim > pi.ndim:
        pi, scaled = pi[..., None], scaled[..., None]
    return (pi * (outputs - scaled)).sum(axis=q.ndim - 1), bonus


def quantile_regression(
    agent: QuantileAgent,
    taken: Array,
    fractions: Array,
    target_outputs: Array,
    q: Array,
    target_q: Array,
    replayed: Replayed,
) -> Loss:
    """The loss of the taken actions' quantiles f32[T, B, N], at fractions [N] or [T, B, N].

    target_outputs: f32[T + n, B, A, M] of the target network. q, target_q: f32[T + n, B, A], the
    means by which actions are chosen, and of which the priorities are the errors.
    """
    td, taken_q, trained = errors(agent, q, target_q, replayed)
    worth, bonus = bootstrap(agent, target_outputs, q, target_q, replayed)
    target = targets.spread_targets(replayed.rows, worth, bonus, **target_settings(agent))
    losses = quantile_loss(taken, fractions, jax.lax.stop_gradient(target), agent.kappa)
    losses = targets.per_sequence(losses, trained.valid, agent.loss_over_time)
    priorities = targets.row_priorities(td, trained.valid)
    metrics = targets.value_metrics(taken_q, td, trained)
    return jnp.mean(replayed.importance * losses), (priorities, metrics)
