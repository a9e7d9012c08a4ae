"""An agent that samples actions of every kind, with a value that the learner fits to rewards.

It is what tests act with where actions are not discrete; it learns no better actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlx import trees
from rlx.agents import common
from rlx.agents.optimizers import Optimizer
from rlx.interfaces import Network
from rlx.networks.heads import Head
from rlx.types import (
    Array,
    ArraySpec,
    Batch,
    BoxSpec,
    Carry,
    DiscreteSpec,
    EnvSpec,
    MultiDiscreteSpec,
    NetInput,
    Params,
    Range,
    Runtime,
    SequenceSpec,
    TrainState,
    UpdateOutput,
    record,
)

trees.register()

HEAD = "value"


@record
class Valued:
    """Returns what the agent keeps from acting time."""

    value: Array  # f32: of the input, whatever the action


trees.register()


class Value(Head, kw_only=True):
    """One number f32[...] of features f32[..., F]."""

    hidden: Annotated[int, Range(ge=1)]

    @nn.compact
    def __call__(self, x: Array, action: Any, dtype: Any) -> Array:
        x = nn.tanh(nn.Dense(self.hidden, dtype=dtype)(x))
        return nn.Dense(1, dtype=dtype)(x)[..., 0].astype(jnp.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class RandomAgent:
    """An interfaces.Agent. A box's actions are normal ones beyond the bounds, too; at exploration 0
    they are a function of the value, so that the greedy action is one that depends on the inputs.
    """

    unroll: Annotated[int, Range(ge=1)]
    block_rows: Annotated[int, Range(ge=1)]
    head: Value
    optimizer: Optimizer
    network: Runtime[Network]
    spec: Runtime[EnvSpec]

    on_policy = False
    samples = True
    acting_spec = Valued(value=ArraySpec(shape=(), dtype="float32"))

    @property
    def sequence(self) -> SequenceSpec:
        return SequenceSpec(
            burn_in=0,
            unroll=self.unroll,
            n_step=1,
            stride=self.block_rows,
            block_rows=self.block_rows,
        )

    def initial_carry(self, batch: int) -> Carry:
        return self.network.initial_carry(batch)

    def acting_params(self, state: TrainState) -> Params:
        return state.params

    def act(
        self, params: Params, inputs: NetInput, carry: Carry, key: Array, exploration: Array
    ) -> tuple[Array, Valued, Carry]:
        value, carry = self.value(params, common.add_time(inputs), carry)
        share_key, key = jax.random.split(key)
        sampled = jax.random.uniform(share_key, exploration.shape) < exploration
        action = jnp.where(
            sampled.reshape(*sampled.shape, *(1 for _ in self.spec.action.array.shape)),
            sample(key, exploration.shape[0], self.spec.action),
            mode(value[0], self.spec.action),
        )
        return action, Valued(value=value[0]), carry

    def value(self, params: Params, inputs: NetInput, carry: Carry) -> tuple[Array, Carry]:
        """inputs [T, N, ...] -> (f32[T, N], carry)."""
        features, carry = self.network.apply(params, inputs, carry)
        return self.network.read(params, HEAD, self.head, features), carry

    def init(self, key: Array) -> TrainState:
        key, own = jax.random.split(key)
        params = self.network.init(own, {HEAD: self.head})
        return common.new_state(params, self.optimizer.build(), key)

    def update(
        self, state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, UpdateOutput]:
        """The value of each row learns its reward."""
        rows = common.time_major(batch.rows)

        def loss(params: Params) -> tuple[Array, Any]:
            value, _ = self.value(params, rows.inputs, batch.carry)
            return jnp.mean(jnp.square(value - rows.reward)), (None, {})

        return common.gradient_step(loss, self.optimizer.build(), state, axis_name)


def sample(key: Array, n: int, spec: Any) -> Array:
    """n actions of this spec."""
    if isinstance(spec, BoxSpec):
        return 2 * jax.random.normal(key, (n, *spec.shape))
    if isinstance(spec, MultiDiscreteSpec):
        return jax.random.randint(key, (n, len(spec.counts)), 0, jnp.asarray(spec.counts)[None])
    return jax.random.randint(key, (n,), 0, spec.n)


def mode(value: Array, spec: Any) -> Array:
    """Actions that depend on value f32[N] alone."""
    if isinstance(spec, BoxSpec):
        each = jnp.arange(1, len(spec.low) + 1, dtype=jnp.float32)[None]
        return 3 * jnp.sin(20 * value[:, None] * each).reshape(*value.shape, *spec.shape)
    whole = jnp.floor(1000 * jnp.abs(value)).astype(jnp.int32)
    if isinstance(spec, DiscreteSpec):
        return whole % spec.n
    counts = np.asarray(spec.counts, np.int32)[None]
    return whole[:, None] % counts
