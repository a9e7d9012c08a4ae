"""QR-DQN: quantile regression (Dabney et al., AAAI 2018), with or without memory.

The head gives K quantiles of the return of each action, at the middles of K equal parts of 0 .. 1.
Actions are chosen by their means. The loss is the quantile Huber loss against the quantiles of the
next state's action, which has the largest mean. Everything else is DQN's (`rlx.agents.dqn`).

A row's priority is the absolute error of the means, as it can be known at acting time, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax

from rlx import trees
from rlx.agents import common, q_learning
from rlx.agents.munchausen import Munchausen
from rlx.agents.optimizers import Optimizer
from rlx.agents.quantiles import midpoints
from rlx.interfaces import Network
from rlx.networks.heads import ActionHead
from rlx.types import Array, EnvSpec, Params, Range, Runtime, SequenceSpec

trees.register()


@dataclass(frozen=True, kw_only=True, eq=False)
class QRDQN:
    """The algorithm as settings and pure functions; an interfaces.Agent with priorities."""

    quantiles: Annotated[int, Range(ge=1)]  # K of each action
    kappa: Annotated[float, Range(ge=0)] | None  # where the loss becomes linear; None: nowhere
    burn_in: Annotated[int, Range(ge=0)]  # rows unrolled without gradient
    unroll: Annotated[int, Range(ge=1)]  # trained rows T
    n_step: Annotated[int, Range(ge=1)]
    stride: Annotated[int, Range(ge=1)] | None  # None: a start at every row, or at every block's
    block_rows: Annotated[int, Range(ge=1)]
    discount: Annotated[float, Range(ge=0, le=1)]
    double_q: bool
    rescale_epsilon: Annotated[float, Range(ge=0)] | None  # None: values are not rescaled
    reward: common.Reward
    stored_state: bool  # False: sequences start from a zero recurrent state
    loss_over_time: Literal["mean", "sum"]
    munchausen: Munchausen | None
    target_period_updates: Annotated[int, Range(ge=1, le=2**31 - 1)] | None  # one of these three
    target_period_env_steps: Annotated[int, Range(ge=1, le=2**32 - 1)] | None
    target_rate: Annotated[float, Range(gt=0, le=1)] | None
    head: ActionHead
    optimizer: Optimizer
    network: Runtime[Network]
    spec: Runtime[EnvSpec]

    on_policy = False
    samples = property(q_learning.is_noisy)
    acting_spec = property(q_learning.acting_spec)

    init = q_learning.init
    initial_carry = q_learning.initial_carry
    acting_params = q_learning.acting_params
    outputs = q_learning.outputs
    expected = q_learning.mean
    remember = q_learning.remember
    values = q_learning.values
    act = q_learning.act
    initial_priorities = q_learning.initial_priorities
    update = q_learning.update

    def __post_init__(self) -> None:
        common.require_discrete("qr_dqn", self.spec)
        common.require_starts(self.sequence, self.network)
        q_learning.require_whole(self)

    @property
    def sequence(self) -> SequenceSpec:
        return q_learning.sequence_of(self)

    def heads(self) -> dict[str, ActionHead]:
        return {q_learning.HEAD: self.head.copy(outputs=self.quantiles)}

    def loss(
        self, params: Params, features: Array, replayed: q_learning.Replayed
    ) -> q_learning.Loss:
        """Importance-weighted: mean or sum of a sequence's valid rows, mean over the batch."""
        online, target = jax.random.split(replayed.key)
        found = self.outputs(params, features, noise=online)  # [T + n, B, A, K]
        other = self.outputs(replayed.target_params, replayed.target_features, noise=target)
        q, target_q = self.expected(found), self.expected(other)
        action = replayed.rows.action[: self.unroll]
        taken = common.take_action(found[: self.unroll], action)
        return q_learning.quantile_regression(
            self, taken, midpoints(self.quantiles), other, q, target_q, replayed
        )
