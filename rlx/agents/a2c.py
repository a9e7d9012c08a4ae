"""A2C: advantage actor-critic, synchronous (Mnih et al., ICML 2016, without its threads).

One gradient step on each round of rows, of the policy gradient with a learnt baseline, an entropy
bonus, and advantages by GAE (Schulman et al. 2016; `gae_lambda: 1` is the paper's n-step return).
A network with a recurrent core makes it recurrent: blocks are unrolled from their stored state.

DEPARTS: the paper's optimiser is RMSProp; `agent.optimizer` may be it, and is Adam by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax

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
    Runtime,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class A2C:
    """The algorithm as settings and pure functions; an interfaces.Agent that is on-policy."""

    burn_in: Annotated[int, Range(ge=0)]  # rows of each block unrolled without gradient
    unroll: Annotated[int, Range(ge=1)]  # trained rows T
    discount: Annotated[float, Range(ge=0, le=1)]
    gae_lambda: Annotated[float, Range(ge=0, le=1)]
    reward: common.Reward
    normalize_observation: bool
    normalize_reward: bool
    normalize_advantage: bool
    rescale_epsilon: Annotated[float, Range(ge=0)] | None  # None: values are not rescaled
    separate_critic: bool  # False: one body for policy and value
    value_coefficient: Annotated[float, Range(ge=0)]
    entropy: Annotated[float, Range(ge=0)]  # the bonus's coefficient
    final_entropy: Annotated[float, Range(ge=0)] | None  # after decay_env_steps
    decay_env_steps: Annotated[int, Range(ge=1, le=2**31 - 1)] | None
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
    update = pg.update_once

    def __post_init__(self) -> None:
        pg.require_whole(self)

    def loss(
        self, params: Params, read: pg.Read, key: Array, axis_name: str | None
    ) -> tuple[Array, common.Metrics]:
        """-log pi * advantage, the value's squared error, and the entropy's bonus."""
        rows, mean = read.rows, pg.mean_of(read.rows.valid, axis_name)
        policy, head = pg.outputs(self, params, read.inputs, read.core, self.burn_in, self.unroll)
        values = jax.lax.stop_gradient(pg.worth(self, head))
        advantage = td_sums(rows, read.reward, values, gamma=self.discount, decay=self.gae_lambda)
        value_losses = pg.value_loss(self, head[:-1], advantage + values[:-1])
        if self.normalize_advantage:
            advantage = pg.normalized_advantage(advantage, rows.valid, axis_name)
        log_probability = policy.log_probability(pg.draws(rows))
        total, metrics = pg.whole_loss(
            self,
            gain=log_probability * advantage,
            entropy=policy.entropy(key),
            value_losses=value_losses,
            mean=mean,
            progress=read.progress,
        )
        log_ratio = log_probability - rows.acting.log_probability
        return total, metrics | {
            "learner/ratio_error": pg.ratio_error(log_ratio, rows.valid, axis_name),
            "learner/value_mean": mean(values[:-1]),
        }
