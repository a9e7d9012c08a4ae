"""PQN: Q-learning on rounds of rows, without replay or target network (Gallici et al. 2025).

Lambda returns of the greedy values are made once for each round; several epochs of minibatches
learn them. LayerNorm in the network keeps that stable, so `network.*.layer_norm` belongs to it.
A network with a recurrent core makes it recurrent: minibatches keep whole blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from rlx import ops, trees
from rlx.agents import common, minibatches, normalizing, q_learning
from rlx.agents import policy_gradient as pg
from rlx.agents.optimizers import Optimizer
from rlx.agents.returns import td_sums
from rlx.interfaces import Network
from rlx.networks.heads import ActionHead
from rlx.types import (
    Array,
    Batch,
    Carry,
    EnvSpec,
    NetInput,
    Params,
    QActing,
    Range,
    Runtime,
    SequenceSpec,
    TrainState,
    UpdateOutput,
    record,
)


@record
class Learnt:
    """The epochs learn from this, time-major; the inputs have the burn-in before the rows."""

    inputs: NetInput  # [burn_in + T, B]
    action: Array  # i32[T, B]
    valid: Array  # bool[T, B]
    target: Array  # f32[T, B], in h's scale where values are rescaled


trees.register()


@dataclass(frozen=True, kw_only=True, eq=False)
class PQN:
    """The algorithm as settings and pure functions; an interfaces.Agent that is on-policy."""

    burn_in: Annotated[int, Range(ge=0)]  # rows of each block unrolled without gradient
    unroll: Annotated[int, Range(ge=1)]  # trained rows T
    epochs: Annotated[int, Range(ge=1)]
    minibatches: Annotated[int, Range(ge=1)]
    discount: Annotated[float, Range(ge=0, le=1)]
    return_lambda: Annotated[float, Range(ge=0, le=1)]
    rescale_epsilon: Annotated[float, Range(ge=0)] | None  # None: values are not rescaled
    reward: common.Reward
    normalize_observation: bool
    head: ActionHead
    optimizer: Optimizer
    network: Runtime[Network]
    spec: Runtime[EnvSpec]

    on_policy = True
    samples = False
    munchausen = None
    acting_spec = property(q_learning.acting_spec)

    initial_carry = q_learning.initial_carry
    acting_params = pg.acting_params
    heads = q_learning.heads
    outputs = q_learning.outputs
    expected = q_learning.expected
    remember = q_learning.remember

    def __post_init__(self) -> None:
        common.require_discrete("pqn", self.spec)
        if self.head.noise is not None:
            raise ValueError("agent.head.noise: pqn explores by epsilon; set it to null.")

    @property
    def sequence(self) -> SequenceSpec:
        rows = self.burn_in + self.unroll
        return SequenceSpec(
            burn_in=self.burn_in, unroll=self.unroll, n_step=1, stride=rows, block_rows=rows
        )

    def check_share(self, sequences: int) -> None:
        """Raises ValueError unless a device's share of a batch divides into the minibatches."""
        minibatches.check_share(self, sequences)

    def init(self, key: Array) -> TrainState:
        """Fresh parameters; `key` is consumed."""
        init_key, state_key = jax.random.split(key)
        params = self.network.init(init_key, self.heads())
        statistics = normalizing.begin(
            self.spec, observation=self.normalize_observation, reward=False
        )
        return common.new_state(params, self.optimizer.build(), state_key, statistics=statistics)

    def act(
        self, params: Params, inputs: NetInput, carry: Carry, key: Array, exploration: Array
    ) -> tuple[Array, QActing, Carry]:
        """`q_learning.act` on inputs as the statistics have them."""
        seen = normalizing.scaled_inputs(params["statistics"], inputs)
        found: tuple[Array, QActing, Carry] = q_learning.act(
            self, params["network"], seen, carry, key, exploration
        )
        return found

    def values(self, params: Params, inputs: NetInput, carry: Carry) -> tuple[Array, Carry]:
        """`q_learning.values` on inputs as the statistics have them."""
        seen = normalizing.scaled_inputs(params["statistics"], inputs)
        return q_learning.values(self, params["network"], seen, carry)

    def update(
        self, state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, UpdateOutput]:
        """Epochs of minibatches on this device's share of the round."""
        rewarded = common.transform_inputs(common.batch_inputs(batch), self.reward)
        seen = normalizing.scaled_inputs(state.statistics, rewarded)
        inputs, _ = self.network.stack_frames(seen, batch.carry)
        core = batch.carry.core
        learnt, told = self.learnt(state.params, inputs, core, batch, axis_name)
        own = common.window(rewarded, self.burn_in, -1)
        statistics = normalizing.observed(state.statistics, own, None, learnt.valid, axis_name)

        def loss(params: Params, rows: Learnt, core: Any, key: Array) -> Any:
            del key
            return self.loss(params, rows, core, axis_name)

        state, output = minibatches.learn(
            loss,
            self.optimizer,
            state,
            learnt,
            core,
            epochs=self.epochs,
            minibatches=self.minibatches,
            is_recurrent=self.network.is_recurrent,
            axis_name=axis_name,
        )
        metrics = {**output.metrics, **common.mean_over_devices(told, axis_name)}
        state = replace(state, statistics=statistics)
        return state, UpdateOutput(priorities=None, metrics=metrics)

    def learnt(
        self, params: Params, inputs: NetInput, core: Any, batch: Batch, axis_name: str | None
    ) -> tuple[Learnt, common.Metrics]:
        """Returns what the epochs learn from, by the parameters that acted; and metrics of it."""
        burn_in, end = self.burn_in, self.burn_in + self.unroll
        rows = common.window(common.time_major(batch.rows), burn_in, end)
        features = common.features_after(self.network, params, inputs, core, burn_in)
        q = self.outputs(params, features)
        mask = common.allowed(common.window(inputs, burn_in, None), self.spec)
        best = common.masked(q, mask).max(axis=-1)
        value = best
        if self.rescale_epsilon is not None:
            value = ops.unrescale(best, self.rescale_epsilon, jnp)
        reward = ops.transform_reward(rows.reward, self.reward, jnp)
        sums = td_sums(rows, reward, value, gamma=self.discount, decay=self.return_lambda)
        target = value[:-1] + sums
        if self.rescale_epsilon is not None:
            target = ops.rescale(target, self.rescale_epsilon, jnp)
        drift = jnp.abs(common.take_action(q[0], rows.action[0]) - rows.acting.q[0])
        told = {"learner/q_drift": pg.mean_of(rows.valid[0], axis_name)(drift)}
        begin = 0 if self.network.is_recurrent else burn_in
        learnt = Learnt(
            inputs=common.window(inputs, begin, end),
            action=rows.action,
            valid=rows.valid,
            target=target,
        )
        return learnt, told

    def loss(
        self, params: Params, rows: Learnt, core: Any, axis_name: str | None
    ) -> tuple[Array, common.Metrics]:
        """0.5 (Q - target)^2, the mean over the valid rows of a minibatch [T, b]."""
        burn_in = self.burn_in if self.network.is_recurrent else 0
        features = common.features_after(self.network, params, rows.inputs, core, burn_in)
        q = common.take_action(self.outputs(params, features), rows.action)
        mean = pg.mean_of(rows.valid, axis_name)
        error = q - rows.target
        metrics = {"learner/q_mean": mean(q), "learner/td_mean": mean(jnp.abs(error))}
        return mean(0.5 * jnp.square(error)), metrics
