"""IMPALA: actor-critic whose V-trace corrects for older weights (Espeholt et al., ICML 2018).

Actors go on with the weights they have, and rows are learnt from when they come. Truncated
importance weights, made of the recorded probabilities of the actions, correct what the lag changes.
With `clip` the policy's loss is PPO's on V-trace's advantages, as in APPO (RLlib).
`on_policy: true` makes rounds instead: then every weight is 1 and the targets are lambda returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp

from rlx.agents import common
from rlx.agents import policy_gradient as pg
from rlx.agents.optimizers import Optimizer
from rlx.agents.returns import td_sums
from rlx.interfaces import Network
from rlx.networks.policies import Policy, Value
from rlx.types import (
    Array,
    EnvSpec,
    Params,
    Range,
    Row,
    Runtime,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Impala:
    """The algorithm as settings and pure functions; an interfaces.Agent."""

    on_policy: bool  # True: rounds; False: actors go on with older weights
    burn_in: Annotated[int, Range(ge=0)]  # rows unrolled without gradient
    unroll: Annotated[int, Range(ge=1)]  # trained rows T
    discount: Annotated[float, Range(ge=0, le=1)]
    trace_lambda: Annotated[float, Range(ge=0, le=1)]  # a factor of the traces c
    most_rho: Annotated[float, Range(gt=0)]  # where the weights of TD errors are cut off
    most_c: Annotated[float, Range(gt=0)]  # where the traces are cut off
    reward: common.Reward
    normalize_observation: bool
    normalize_reward: bool
    normalize_advantage: bool
    rescale_epsilon: Annotated[float, Range(ge=0)] | None  # None: values are not rescaled
    separate_critic: bool  # False: one body for policy and value
    clip: Annotated[float, Range(gt=0)] | None  # of the ratio (APPO); None: the policy gradient
    value_coefficient: Annotated[float, Range(ge=0)]
    entropy: Annotated[float, Range(ge=0)]  # the bonus's coefficient
    final_entropy: Annotated[float, Range(ge=0)] | None  # after decay_env_steps
    decay_env_steps: Annotated[int, Range(ge=1, le=2**31 - 1)] | None
    policy: Policy
    value: Value
    optimizer: Optimizer
    network: Runtime[Network]
    spec: Runtime[EnvSpec]

    samples = True
    clashes = staticmethod(pg.clashes)
    sequence = property(pg.sequence_of)
    acting_spec = property(pg.acting_spec)

    init = pg.init
    initial_carry = pg.initial_carry
    acting_params = pg.acting_params
    act = pg.act
    update = pg.update_once

    def __post_init__(self) -> None:
        pg.require_whole(self)
        if self.most_c > self.most_rho:
            raise ValueError(
                f"agent.most_c={self.most_c:g} is above agent.most_rho={self.most_rho:g}; V-trace "
                "needs it to be at most that."
            )

    def loss(
        self, params: Params, read: pg.Read, key: Array, axis_name: str | None
    ) -> tuple[Array, common.Metrics]:
        """The policy's loss on V-trace's advantages, the value's error, and the entropy's bonus."""
        rows, mean = read.rows, pg.mean_of(read.rows.valid, axis_name)
        policy, head = pg.outputs(self, params, read.inputs, read.core, self.burn_in, self.unroll)
        log_probability = policy.log_probability(pg.draws(rows))
        log_ratio = log_probability - rows.acting.log_probability
        ratio = pg.ratio_of(jax.lax.stop_gradient(log_ratio))
        values = jax.lax.stop_gradient(pg.worth(self, head))
        target, advantage = self.v_trace(rows, read.reward, values, ratio)
        if self.normalize_advantage:
            advantage = pg.normalized_advantage(advantage, rows.valid, axis_name)
        if self.clip is None:
            gain = jnp.minimum(self.most_rho, ratio) * advantage * log_probability
        else:
            gain, _ = pg.clipped_gain(log_ratio, advantage, self.clip)
        total, metrics = pg.whole_loss(
            self,
            gain=gain,
            entropy=policy.entropy(key),
            value_losses=pg.value_loss(self, head[:-1], target),
            mean=mean,
            progress=read.progress,
        )
        return total, metrics | {
            "learner/kl": pg.divergence(jax.lax.stop_gradient(log_ratio), mean),
            "learner/ratio_error": pg.ratio_error(log_ratio, rows.valid, axis_name),
            "learner/rho": mean(jnp.minimum(self.most_rho, ratio)),
            "learner/value_mean": mean(values[:-1]),
        }

    def v_trace(self, rows: Row, reward: Array, values: Array, ratio: Array) -> tuple[Array, Array]:
        """(targets v_t of the values, advantages r + gamma v_{t+1} - V(x_t)), f32[T, B] each.

        values: [T + 1, B]; ratio: [T, B], pi(a|x) / mu(a|x). The advantages are not weighted.
        """
        sums = td_sums(
            rows,
            reward,
            values,
            gamma=self.discount,
            decay=self.trace_lambda,
            rho=jnp.minimum(self.most_rho, ratio),
            c=jnp.minimum(self.most_c, ratio),
        )
        after = values[1:].at[:-1].add(sums[1:])
        advantage = reward + self.discount * rows.discount * after - values[:-1]
        return values[:-1] + sums, advantage
