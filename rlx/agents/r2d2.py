"""R2D2: recurrent replay distributed DQN (Kapturowski et al., ICLR 2019).

Ingredients: stored recurrent state and burn-in (section 3); double Q-learning with n-step targets,
value rescaling and a target network (2.3); a dueling LSTM (2.3) that is fed with the previous
action and reward (appendix); sequence priorities eta max + (1 - eta) mean of absolute n-step TD
errors (2.3), here kept by the replay; a ladder of fixed epsilons (Ape-X), here in
`rlx.acting.exploration`.

DEPARTS: a sequence may run over an episode's end (the paper's never do): the carry is reset inside
the unroll and n-step sums stop there, so each row has the value it would have in a sequence of its
own episode; nothing is padded and no short episode is lost.
DEPARTS: the last n - 1 trained rows have full n-step targets too: the sequence carries n more rows
(the paper is silent; rlpyt does the same).
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
        common.require_discrete("r2d2", self.spec)
        common.require_starts(self.sequence, self.network)
        q_learning.require_whole(self)

    @property
    def sequence(self) -> SequenceSpec:
        return q_learning.sequence_of(self)
