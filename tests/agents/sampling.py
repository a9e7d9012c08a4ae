"""A small on-policy agent for tests: PPO's clipped ratio with a value baseline (Schulman 2017)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from rlx import trees
from rlx.agents import common
from rlx.agents.optimizers import Adam
from rlx.interfaces import Network
from rlx.networks.heads import Head
from rlx.types import (
    Array,
    ArraySpec,
    Batch,
    Carry,
    DiscreteSpec,
    EnvSpec,
    NetInput,
    Params,
    Range,
    Row,
    Runtime,
    SequenceSpec,
    TrainState,
    UpdateOutput,
    record,
)


@record
class Sampled:
    """Returns what the agent keeps from acting time."""

    log_probability: Array  # f32: of the action taken


trees.register()


class Linear(Head, kw_only=True):
    """f32[..., outputs]; as many as there are actions if `outputs` is None."""

    outputs: int | None

    @nn.compact
    def __call__(self, x: Array, action: DiscreteSpec, dtype: Any) -> Array:
        outputs = action.n if self.outputs is None else self.outputs
        return nn.Dense(outputs, dtype=dtype)(x).astype(jnp.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampling:
    """An interfaces.Agent that samples its actions and learns on-policy."""

    block_rows: Annotated[int, Range(ge=1)]
    discount: Annotated[float, Range(ge=0, le=1)]
    clip: Annotated[float, Range(gt=0)]
    epochs: Annotated[int, Range(ge=1)]
    entropy: Annotated[float, Range(ge=0)]
    policy: Head
    value: Head
    optimizer: Adam
    network: Runtime[Network]
    spec: Runtime[EnvSpec]

    on_policy = True
    samples = True
    acting_spec = Sampled(log_probability=ArraySpec(shape=(), dtype="float32"))

    @property
    def sequence(self) -> SequenceSpec:
        rows = self.block_rows
        return SequenceSpec(burn_in=0, unroll=rows, n_step=1, stride=rows, block_rows=rows)

    def init(self, key: Array) -> TrainState:
        key, params_key = jax.random.split(key)
        params = self.network.init(params_key, {"policy": self.policy, "value": self.value})
        return common.new_state(params, self.optimizer.build(), key)

    def initial_carry(self, batch: int) -> Carry:
        return self.network.initial_carry(batch)

    def acting_params(self, state: TrainState) -> Params:
        return state.params

    def act(
        self, params: Params, inputs: NetInput, carry: Carry, key: Array, exploration: Array
    ) -> tuple[Array, Sampled, Carry]:
        features, carry = self.network.apply(params, common.add_time(inputs), carry)
        logits = self.network.read(params, "policy", self.policy, features)[0]
        sample_key, explore_key = jax.random.split(key)
        sample = jax.random.categorical(sample_key, logits)
        action = common.explore(explore_key, jnp.argmax(logits, axis=-1), sample, exploration)
        log_probability = common.take_action(jax.nn.log_softmax(logits), action)
        return action.astype(jnp.int32), Sampled(log_probability=log_probability), carry

    def update(
        self, state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, UpdateOutput]:
        optimizer = self.optimizer.build()
        params, opt_state = state.params, state.opt_state
        metrics: dict[str, Array] = {}
        for _ in range(self.epochs):
            grads, _, told = common.gradients(lambda p: self._loss(p, batch), params, axis_name)
            params, opt_state = common.step_optimizer(optimizer, params, opt_state, grads)
            metrics = metrics or told  # before the first gradient step
        metrics = common.mean_over_devices(metrics, axis_name)
        state = replace(
            state,
            params=params,
            opt_state=opt_state,
            updates=state.updates + 1,
            gradient_steps=state.gradient_steps + self.epochs,
        )
        return state, UpdateOutput(priorities=None, metrics=metrics)

    def _loss(self, params: Params, batch: Batch) -> tuple[Array, dict[str, Array]]:
        inputs, rows = common.batch_inputs(batch), common.time_major(batch.rows)
        features, _ = self.network.apply(params, inputs, batch.carry)
        values = self.network.read(params, "value", self.value, features)[..., 0]
        logits = self.network.read(params, "policy", self.policy, features[: self.block_rows])
        log_probabilities = jax.nn.log_softmax(logits)
        taken = common.take_action(log_probabilities, rows.action)
        ratio = jnp.exp(taken - rows.acting.log_probability)
        returns = self._returns(jax.lax.stop_gradient(values), rows)
        values = values[: self.block_rows]
        advantage = returns - jax.lax.stop_gradient(values)
        clipped = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        gain = jnp.minimum(ratio * advantage, clipped * advantage)
        entropy = -(jnp.exp(log_probabilities) * log_probabilities).sum(axis=-1)
        losses = optax.l2_loss(values, returns) - gain - self.entropy * entropy
        loss = jnp.where(rows.valid, losses, 0).sum() / rows.valid.sum()
        return loss, {
            "learner/loss": loss,
            "learner/ratio_error": jnp.where(rows.valid, jnp.abs(ratio - 1), 0).max(),
            "learner/valid_rows": rows.valid.sum().astype(jnp.float32),
        }

    def _returns(self, values: Array, rows: Row) -> Array:
        """[T, B] from values [T + 1, B], which stand for what follows the block or a cut."""
        following, returns = values[-1], []
        for t in reversed(range(self.block_rows)):
            earned = rows.reward[t] + self.discount * rows.discount[t] * following
            following = jnp.where(rows.valid[t], earned, values[t])
            returns.append(following)
        return jnp.stack(returns[::-1])


YAML = """
defaults:
  - override /replay@_global_.replay: online
  - override /exploration@_global_.exploration: sample
_target_: tests.agents.sampling.Sampling
block_rows: 8
discount: 0.99
clip: 0.2
epochs: 2
entropy: 0.01
policy: {_target_: tests.agents.sampling.Linear, outputs: null}
value: {_target_: tests.agents.sampling.Linear, outputs: 1}
optimizer:
  _target_: rlx.agents.optimizers.Adam
  learning_rate: 3.0e-2
  b1: 0.9
  b2: 0.999
  epsilon: 1.0e-5
  max_grad_norm: null
  max_grad_norm_ratio: null
  warmup_gradient_steps: 0
  decay_gradient_steps: null
  decay: linear
  final_learning_rate: 0.0
"""
