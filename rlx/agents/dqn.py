"""DQN: deep Q-learning (Mnih et al., Nature 2015), with or without memory.

Ingredients: a target network copied every so many updates, replayed rows, a Huber loss (Mnih et
al.: the error clipped to [-1, 1]); double Q-learning (van Hasselt et al. 2016); dueling streams by
`agent.head` (Wang et al. 2016); n-step targets (Rainbow, section 3). A network with a recurrent
core makes it recurrent (DRQN, Hausknecht & Stone 2015), from stored states and a burn-in.

DEPARTS: a sample is a sequence of `unroll` rows instead of one row (`unroll: 1` is the paper's).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rlx import trees
from rlx.agents import common, q_learning
from rlx.agents.munchausen import Munchausen
from rlx.agents.optimizers import Optimizer
from rlx.interfaces import Network
from rlx.networks.heads import ActionHead
from rlx.types import EnvSpec, Range, Runtime, SequenceSpec

trees.register()


@dataclass(frozen=True, kw_only=True, eq=False)
class DQN:
    """The algorithm as settings and pure functions; an interfaces.Agent with priorities."""

    burn_in: Annotated[int, Range(ge=0)]  # rows unrolled without gradient
    unroll: Annotated[int, Range(ge=1)]  # trained rows T
    n_step: Annotated[int, Range(ge=1)]
    stride: Annotated[int, Range(ge=1)] | None  # None: a start at every row, or at every block's
    block_rows: Annotated[int, Range(ge=1)]
    discount: Annotated[float, Range(ge=0, le=1)]
    double_q: bool
    rescale_epsilon: Annotated[float, Range(ge=0)] | None  # None: values are not rescaled
    reward: common.Reward
    stored_state: bool  # False: sequences start from a zero recurrent state (an ablation)
    error: Literal["huber", "squared"]  # huber: linear beyond 1
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
    heads = q_learning.heads
    outputs = q_learning.outputs
    expected = q_learning.expected
    remember = q_learning.remember
    values = q_learning.values
    act = q_learning.act
    initial_priorities = q_learning.initial_priorities
    loss = q_learning.td_loss
    update = q_learning.update

    def __post_init__(self) -> None:
        common.require_discrete("dqn", self.spec)
        common.require_starts(self.sequence, self.network)
        q_learning.require_whole(self)

    @property
    def sequence(self) -> SequenceSpec:
        return q_learning.sequence_of(self)
