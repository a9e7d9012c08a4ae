"""PPO: proximal policy optimisation with a clipped ratio (Schulman et al. 2017).

Several epochs of minibatches on each round of rows, inside one compiled update. Advantages are
GAE's (Schulman et al. 2016), made once for all epochs. A network with a recurrent core makes it
recurrent: minibatches keep whole blocks, each unrolled from its stored state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import jax.numpy as jnp

from rlx import trees
from rlx.agents import common, minibatches
from rlx.agents import policy_gradient as pg
from rlx.agents.optimizers import Optimizer
from rlx.agents.returns import td_sums
from rlx.interfaces import Network
from rlx.networks.policies import Policy, Value
from rlx.types import (
    Array,
    Batch,
    EnvSpec,
    NetInput,
    Params,
    Range,
    Runtime,
    TrainState,
    UpdateOutput,
    record,
)


@record
class Learnt:
    """The epochs learn from this, time-major; the inputs have the burn-in before the rows."""

    inputs: NetInput  # [burn_in + T, B]
    draw: Array  # [T, B, ...]
    log_probability: Array  # f32[T, B], of acting time
    valid: Array  # bool[T, B]
    advantage: Array  # f32[T, B]
    target: Array  # f32[T, B]: of the value
    head: Array  # f32[T, B]: what the value head gave before the first gradient step


trees.register()


@dataclass(frozen=True, kw_only=True, eq=False)
class PPO:
    """The algorithm as settings and pure functions; an interfaces.Agent that is on-policy."""

    burn_in: Annotated[int, Range(ge=0)]  # rows of each block unrolled without gradient
    unroll: Annotated[int, Range(ge=1)]  # trained rows T
    epochs: Annotated[int, Range(ge=1)]
    minibatches: Annotated[int, Range(ge=1)]
    discount: Annotated[float, Range(ge=0, le=1)]
    gae_lambda: Annotated[float, Range(ge=0, le=1)]
    reward: common.Reward
    normalize_observation: bool
    normalize_reward: bool
    normalize_advantage: bool  # in each minibatch
    rescale_epsilon: Annotated[float, Range(ge=0)] | None  # None: values are not rescaled
    separate_critic: bool  # False: one body for policy and value
    clip: Annotated[float, Range(gt=0)]  # of the ratio
    final_clip: Annotated[float, Range(gt=0)] | None  # after decay_env_steps
    value_clip: Annotated[float, Range(gt=0)] | None  # of the value's change; None: any
    value_coefficient: Annotated[float, Range(ge=0)]
    entropy: Annotated[float, Range(ge=0)]  # the bonus's coefficient
    final_entropy: Annotated[float, Range(ge=0)] | None  # after decay_env_steps
    decay_env_steps: Annotated[int, Range(ge=1, le=2**31 - 1)] | None
    most_kl: Annotated[float, Range(gt=0)] | None  # the epochs stop beyond it; None: never
    policy: Policy
    value: Value
    optimizer: Optimizer
    network: Runtime[Network]
    spec: Runtime[EnvSpec]

    on_policy = True
    samples = True
    clashes = staticmethod(pg.clashes)
    sequence = property(pg.sequence_of)
    acting_spec = property(pg.acting_spec)

    init = pg.init
    initial_carry = pg.initial_carry
    acting_params = pg.acting_params
    act = pg.act

    def __post_init__(self) -> None:
        pg.require_whole(self, final_clip=self.final_clip)
        minibatches.require_minibatches(self.epochs, self.minibatches, self.most_kl)

    def check_share(self, sequences: int) -> None:
        """Raises ValueError unless a device's share of a batch divides into the minibatches."""
        minibatches.check_share(self, sequences)

    def update(
        self, state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, UpdateOutput]:
        """Epochs of minibatches on this device's share of the round."""
        read, state = pg.read(self, state, batch, axis_name)
        learnt, told = self.learnt(state.params, read, axis_name)

        def loss(params: Params, rows: Learnt, core: Any, key: Array) -> Any:
            return self.loss(params, rows, core, key, read.progress, axis_name)

        state, output = minibatches.learn(
            loss,
            self.optimizer,
            state,
            learnt,
            read.core,
            epochs=self.epochs,
            minibatches=self.minibatches,
            is_recurrent=self.network.is_recurrent,
            most_kl=self.most_kl,
            axis_name=axis_name,
        )
        metrics = {**output.metrics, **common.mean_over_devices(told, axis_name)}
        return state, UpdateOutput(priorities=None, metrics=metrics)

    def learnt(
        self, params: Params, read: pg.Read, axis_name: str | None
    ) -> tuple[Learnt, common.Metrics]:
        """Returns what the epochs learn from, by the parameters that acted; and metrics of it."""
        rows, burn_in = read.rows, self.burn_in
        policy, head = pg.outputs(self, params, read.inputs, read.core, burn_in, self.unroll)
        values = pg.worth(self, head)
        advantage = td_sums(rows, read.reward, values, gamma=self.discount, decay=self.gae_lambda)
        mean = pg.mean_of(rows.valid, axis_name)
        log_ratio = policy.log_probability(pg.draws(rows)) - rows.acting.log_probability
        told = {
            "learner/ratio_error": pg.ratio_error(log_ratio, rows.valid, axis_name),
            "learner/value_mean": mean(values[:-1]),
        }
        begin = 0 if self.network.is_recurrent else burn_in  # no memory, no burn-in
        return Learnt(
            inputs=common.window(read.inputs, begin, burn_in + self.unroll),
            draw=pg.draws(rows),
            log_probability=rows.acting.log_probability,
            valid=rows.valid,
            advantage=advantage,
            target=advantage + values[:-1],
            head=head[:-1],
        ), told

    def loss(
        self,
        params: Params,
        rows: Learnt,
        core: Any,
        key: Array,
        progress: Array,
        axis_name: str | None,
    ) -> tuple[Array, common.Metrics]:
        """The clipped objective of a minibatch [T, b], the value's error, the entropy's bonus."""
        burn_in = self.burn_in if self.network.is_recurrent else 0
        policy, head = pg.outputs(self, params, rows.inputs, core, burn_in, len(rows.valid))
        mean = pg.mean_of(rows.valid, axis_name)
        log_ratio = policy.log_probability(rows.draw) - rows.log_probability
        advantage = rows.advantage
        if self.normalize_advantage:
            advantage = pg.normalized_advantage(advantage, rows.valid, axis_name)
        limit = pg.scheduled(self.clip, self.final_clip, progress)
        gain, clipped = pg.clipped_gain(log_ratio, advantage, limit)
        total, metrics = pg.whole_loss(
            self,
            gain=gain,
            entropy=policy.entropy(key),
            value_losses=self.value_losses(head, rows),
            mean=mean,
            progress=progress,
        )
        return total, metrics | {
            minibatches.KL: pg.divergence(log_ratio, mean),
            "learner/clipped": mean(clipped),
        }

    def value_losses(self, head: Array, rows: Learnt) -> Array:
        """The value's squared errors; with `value_clip` the larger one of it and of the clipped."""
        losses = pg.value_loss(self, head, rows.target)
        if self.value_clip is None:
            return losses
        near = rows.head + jnp.clip(head - rows.head, -self.value_clip, self.value_clip)
        return jnp.maximum(losses, pg.value_loss(self, near, rows.target))
