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
import optax

from rlx import ops, trees
from rlx.agents import common
from rlx.interfaces import Network
from rlx.networks.recurrent import zero_core
from rlx.optimizers import Adam
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
    Range,
    Row,
    Runtime,
    SequenceSpec,
    TrainState,
    UpdateOutput,
)

trees.register()


@dataclass(frozen=True, kw_only=True, eq=False)
class R2D2:
    """The algorithm as settings and pure functions; an interfaces.Agent."""

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
    optimizer: Adam
    network: Runtime[Network]
    spec: Runtime[EnvSpec]

    def __post_init__(self) -> None:
        if not isinstance(self.spec.action, DiscreteSpec):
            raise ValueError(
                f"agent r2d2 acts in discrete action spaces; {self.spec.id} has a box of shape "
                f"{self.spec.action.shape}. Choose a discrete environment."
            )
        if self.stride % self.block_rows:
            raise ValueError(
                f"agent.stride={self.stride} must be a multiple of "
                f"agent.block_rows={self.block_rows}: sequences start where a carry is stored."
            )

    @property
    def sequence(self) -> SequenceSpec:
        return SequenceSpec(
            burn_in=self.burn_in,
            unroll=self.unroll,
            n_step=self.n_step,
            stride=self.stride,
            block_rows=self.block_rows,
        )

    @property
    def replay_kind(self) -> str:
        return "sequence"

    @property
    def acting_spec(self) -> QActing:
        scalar = ArraySpec(shape=(), dtype="float32")
        return QActing(q=scalar, q_max=scalar)

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
        action = common.epsilon_greedy(key, q, exploration)
        acting = QActing(q=common.take_action(q, action), q_max=q.max(axis=-1))
        return action, acting, carry

    def values(self, params: Params, inputs: NetInput, carry: Carry) -> tuple[Array, Carry]:
        """inputs [N, ...] -> (Q of every action f32[N, A], carry)."""
        inputs = self._transformed(common.add_time(inputs))
        q, carry = self.network.apply(params, inputs, carry)
        return q[0], carry

    def first_td(self, rows: Row) -> np.ndarray:
        """f32[M, T] from the Q-values of acting time, the online network as its own target.

        rows: scalars [M, L] (observation {}). Equal to the learner's TD errors when its online
        and target parameters are those that acted. -1 where a row is not valid.
        """
        trained = slice(self.burn_in, None)
        reward, discount, valid, q, q_max = (
            np.swapaxes(np.asarray(x)[:, trained], 0, 1)
            for x in (rows.reward, rows.discount, rows.valid, rows.acting.q, rows.acting.q_max)
        )
        target = self._targets(reward, discount, valid, q_max, np)
        td = np.abs(target - q[: self.unroll])
        return np.where(valid[: self.unroll], td, -1).astype(np.float32).T

    # --- learning --------------------------------------------------------------------------------

    def init(self, key: Array) -> TrainState:
        """`key` is consumed."""
        init_key, state_key = jax.random.split(key)
        params = self.network.init(init_key)
        return TrainState(
            params=params,
            target_params=params,
            opt_state=self._optimizer().init(params),
            updates=jnp.zeros((), jnp.int32),
            key=state_key,
        )

    def update(
        self, state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, UpdateOutput]:
        """One gradient step on this device's share of the batch."""
        rows = common.time_major(batch.rows)
        carry = batch.carry if self.stored_state else zero_core(batch.carry)
        inputs, _ = self.network.stack_frames(self._transformed(rows.inputs), carry)
        target_q, _ = self.network.unroll(state.target_params, inputs, carry.core)

        def loss(params: Params) -> tuple[Array, Any]:
            q = self._trained_q(params, inputs, carry.core)
            return self._loss(q, rows, target_q, batch.importance)

        grads, value, (td, metrics) = common.gradients(loss, state.params, axis_name)
        params, opt_state = common.step_optimizer(self._optimizer(), state, grads)
        updates = state.updates + 1
        metrics = {
            **common.mean_over_devices(metrics, axis_name),
            "learner/loss": value,
            "learner/grad_norm": optax.tree.norm(grads),
        }
        target = common.periodic_target(
            params, state.target_params, updates, self.target_period_updates
        )
        state = TrainState(
            params=params,
            target_params=target,
            opt_state=opt_state,
            updates=updates,
            key=state.key,
        )
        return state, UpdateOutput(td=td, metrics=metrics)

    def _trained_q(self, params: Params, inputs: NetInput, core: Any) -> Array:
        """f32[T + n, B, A], after the burn-in: no gradient crosses its edge."""
        if self.burn_in:
            _, core = self.network.unroll(params, common.window(inputs, 0, self.burn_in), core)
            core = jax.lax.stop_gradient(core)
        q, _ = self.network.unroll(params, common.window(inputs, self.burn_in, None), core)
        return q

    def _loss(
        self, q: Array, rows: Row, target_q: Array, importance: Array
    ) -> tuple[Array, tuple[Array, dict[str, Array]]]:
        """Importance-weighted 0.5 d^2: mean over a sequence's valid rows, mean over the batch."""
        rows = common.window(rows, self.burn_in, None)  # T + n rows
        target_q = target_q[self.burn_in :]

        best = jnp.argmax(q if self.double_q else target_q, axis=-1)
        value = common.take_action(target_q, best)
        target = self._targets(rows.reward, rows.discount, rows.valid, value, jnp)

        trained = common.window(rows, 0, self.unroll)
        q_taken = common.take_action(q[: self.unroll], trained.action)
        td = jax.lax.stop_gradient(target) - q_taken  # [T, B]
        squared = jnp.where(trained.valid, 0.5 * jnp.square(td), 0.0)
        per_sequence = squared.sum(axis=0)
        if self.loss_over_time == "mean":
            per_sequence /= jnp.maximum(1, trained.valid.sum(axis=0))
        metrics = self._metrics(q_taken, td, trained)
        absolute = jnp.where(trained.valid, jnp.abs(td), -1.0)
        return jnp.mean(importance * per_sequence), (absolute.T, metrics)

    def _targets(self, reward: Array, discount: Array, valid: Array, q: Array, xp: Any) -> Array:
        """h(n-step return of h^-1(q)): all [T + n, B] -> [T, B]."""
        reward = ops.transform_reward(reward, self.reward, xp)
        epsilon = self.rescale_epsilon
        value = q if epsilon is None else ops.unrescale(q, epsilon, xp)
        target = ops.n_step_return(
            reward, discount, valid, value, n=self.n_step, gamma=self.discount, xp=xp
        )
        return target if epsilon is None else ops.rescale(target, epsilon, xp)

    def _metrics(self, q: Array, td: Array, rows: Row) -> dict[str, Array]:
        def mean(x: Array) -> Array:
            return ops.masked_mean(x.ravel(), rows.valid.ravel(), jnp)

        drift = jnp.where(rows.valid[0], jnp.abs(q[0] - rows.acting.q[0]), 0)
        return {
            "learner/q_mean": mean(q),
            "learner/td_mean": mean(jnp.abs(td)),
            "learner/q_drift": drift.mean(),
        }

    def _transformed(self, inputs: NetInput) -> NetInput:
        return replace(
            inputs, prev_reward=ops.transform_reward(inputs.prev_reward, self.reward, jnp)
        )

    def _optimizer(self) -> optax.GradientTransformation:
        return self.optimizer.build()
