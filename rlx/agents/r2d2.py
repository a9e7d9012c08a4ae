"""R2D2: recurrent replay distributed DQN (Kapturowski et al., ICLR 2019).

Ingredients: stored recurrent state and burn-in (section 3); double Q-learning with n-step targets,
value rescaling and a target network (2.3); dueling LSTM fed with the previous action and reward
(2.3); sequence priorities eta max + (1 - eta) mean of absolute n-step TD errors (2.3), here kept by
the replay; a ladder of fixed epsilons (Ape-X), here in `rlx.acting.exploration`.

DEPARTS: a sequence may run over an episode's end (the paper's never do): the carry is reset inside
the unroll and n-step sums stop there, so each row has the value it would have in a sequence of its
own episode; nothing is padded and no short episode is lost.
DEPARTS: the last n - 1 trained rows have full n-step targets too: the sequence carries n more rows
(the paper is silent; rlpyt does the same).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlx import trees
from rlx.agents import common
from rlx.interfaces import Network
from rlx.networks.heads import Head
from rlx.optimizers import Adam
from rlx.types import (
    Array,
    Batch,
    Carry,
    EnvSpec,
    NetInput,
    Params,
    QActing,
    Range,
    Row,
    Runtime,
    SequenceSpec,
    TrainState,
    UpdateOutput,
)

trees.register()

HEAD = "head"  # its name among the parameters


@dataclass(frozen=True, kw_only=True, eq=False)
class R2D2:
    """The algorithm as settings and pure functions; an interfaces.Agent with priorities."""

    burn_in: Annotated[int, Range(ge=0)]  # rows unrolled without gradient
    unroll: Annotated[int, Range(ge=1)]  # trained rows T
    n_step: Annotated[int, Range(ge=1)]
    stride: Annotated[int, Range(ge=1)]  # rows from one sequence's start to the next one's
    block_rows: Annotated[int, Range(ge=1)]
    discount: Annotated[float, Range(ge=0, le=1)]
    double_q: bool
    rescale_epsilon: Annotated[float, Range(ge=0)] | None  # None: values are not rescaled
    reward: Literal["raw", "clip", "tanh"]  # applied to reward and previous reward alike
    stored_state: bool  # False: sequences start from a zero recurrent state (an ablation)
    loss_over_time: Literal["mean", "sum"]
    target_period_updates: Annotated[int, Range(ge=1)]
    head: Head
    optimizer: Adam
    network: Runtime[Network]
    spec: Runtime[EnvSpec]

    on_policy = False
    samples = False
    acting_spec = common.Q_ACTING

    def __post_init__(self) -> None:
        common.require_discrete("r2d2", self.spec)
        common.require_starts(self.sequence, self.network)

    @property
    def sequence(self) -> SequenceSpec:
        return SequenceSpec(
            burn_in=self.burn_in,
            unroll=self.unroll,
            n_step=self.n_step,
            stride=self.stride,
            block_rows=self.block_rows,
        )

    # --- acting ----------------------------------------------------------------------------------

    def initial_carry(self, batch: int) -> Carry:
        return self.network.initial_carry(batch)

    def acting_params(self, state: TrainState) -> Params:
        return state.params

    def act(
        self, params: Params, inputs: NetInput, carry: Carry, key: Array, exploration: Array
    ) -> tuple[Array, QActing, Carry]:
        """inputs [N, ...], epsilon f32[N] -> (action i32[N], its Q and the largest Q, carry)."""
        q, carry = self.values(params, inputs, carry)
        action, acting = common.act_by_values(q, inputs, self.spec, key, exploration)
        return action, acting, carry

    def values(self, params: Params, inputs: NetInput, carry: Carry) -> tuple[Array, Carry]:
        """inputs [N, ...] -> (Q of every action f32[N, A], carry)."""
        inputs = common.transform_inputs(common.add_time(inputs), self.reward)
        features, carry = self.network.apply(params, inputs, carry)
        return self._q(params, features)[0], carry

    def initial_priorities(self, rows: Row) -> np.ndarray:
        """f32[M, T] from the Q-values of acting time of rows [M, L] (observation {})."""
        return common.acting_priorities(rows, self.burn_in, self.unroll, **self._target_settings)

    # --- learning --------------------------------------------------------------------------------

    def init(self, key: Array) -> TrainState:
        """`key` is consumed."""
        init_key, state_key = jax.random.split(key)
        params = self.network.init(init_key, {HEAD: self.head})
        return common.new_state(params, self.optimizer.build(), state_key, target_params=params)

    def update(
        self, state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, UpdateOutput]:
        """One gradient step on this device's share of the batch."""
        inputs, core = common.stacked_inputs(
            self.network, batch, reward=self.reward, stored_state=self.stored_state
        )
        features, _ = self.network.unroll(state.target_params, inputs, core)
        target_q = self._q(state.target_params, features)[self.burn_in :]
        rows = common.window(common.time_major(batch.rows), self.burn_in, None)

        def loss(params: Params) -> tuple[Array, Any]:
            after = common.features_after(self.network, params, inputs, core, self.burn_in)
            mask = common.allowed(common.window(inputs, self.burn_in, None), self.spec)
            return self._loss(self._q(params, after), rows, target_q, mask, batch.importance)

        state, output = common.gradient_step(loss, self.optimizer.build(), state, axis_name)
        target = common.periodic_target(
            state.params, state.target_params, state.updates, self.target_period_updates
        )
        return replace(state, target_params=target), output

    def _q(self, params: Params, features: Array) -> Array:
        q: Array = self.network.read(params, HEAD, self.head, features)
        return q

    def _loss(
        self, q: Array, rows: Row, target_q: Array, mask: Array | None, importance: Array
    ) -> tuple[Array, tuple[Array, common.Metrics]]:
        """Importance-weighted 0.5 d^2: mean over a sequence's valid rows, mean over the batch.

        q, target_q: f32[T + n, B, A].
        """
        best = jnp.argmax(common.masked(q if self.double_q else target_q, mask), axis=-1)
        value = common.take_action(target_q, best)
        target = common.value_targets(rows, value, **self._target_settings)
        trained = common.window(rows, 0, self.unroll)
        q_taken = common.take_action(q[: self.unroll], trained.action)
        td = jax.lax.stop_gradient(target) - q_taken  # [T, B]
        losses = common.per_sequence(0.5 * jnp.square(td), trained.valid, self.loss_over_time)
        metrics = common.value_metrics(q_taken, td, trained)
        return jnp.mean(importance * losses), (common.row_priorities(td, trained.valid), metrics)

    @property
    def _target_settings(self) -> dict[str, Any]:
        return {
            "n": self.n_step,
            "gamma": self.discount,
            "reward": self.reward,
            "rescale_epsilon": self.rescale_epsilon,
        }
