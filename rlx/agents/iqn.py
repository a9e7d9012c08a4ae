"""IQN: implicit quantile networks (Dabney et al., ICML 2018), with or without memory.

The network is a function of a fraction tau, too: cosines of tau, embedded, times the features that
come out of the core; the head maps the product to the quantile of each action at tau. The loss is
the quantile Huber loss between `fractions` drawn ones and `target_fractions` of the next state's
action. That action, as those of acting, has the largest mean over `acting_fractions` drawn ones
(or fixed ones, without `acting_draws`), which a risk measure may distort. All else is DQN's
(`rlx.agents.dqn`).

A row's priority is the absolute error of the means, as it can be known at acting time, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rlx import trees
from rlx.agents import common, q_learning
from rlx.agents.munchausen import Munchausen
from rlx.agents.optimizers import Optimizer
from rlx.agents.quantiles import midpoints
from rlx.interfaces import Network
from rlx.networks.heads import ActionHead, Fractions, Head
from rlx.types import Array, EnvSpec, Params, Range, Runtime, SequenceSpec, TrainState

trees.register()

FRACTIONS = "fractions"  # the name of the embedding among the parameters


@dataclass(frozen=True, kw_only=True)
class Risk:
    """A distortion of the fractions by which actions are chosen."""

    measure: Literal["cvar", "power"]
    level: Annotated[float, Range(ge=-10, le=10)]  # eta

    def __post_init__(self) -> None:
        if self.measure == "cvar" and not 0 < self.level <= 1:
            raise ValueError(
                f"agent.risk.level={self.level} with measure=cvar; accepted: above 0, at most 1 "
                "(the share of the worst returns that count)."
            )

    def distorted(self, fractions: Array) -> Array:
        """beta(tau): eta tau (cvar); tau^(1 / (1 + |eta|)), or its mirror for eta < 0 (power)."""
        if self.measure == "cvar":
            return self.level * fractions
        exponent = 1 / (1 + abs(self.level))
        if self.level >= 0:
            return fractions**exponent
        return 1 - (1 - fractions) ** exponent


class Draws(NamedTuple):
    """Holds what an update draws, for the online network and the target network."""

    fractions: Array  # f32[T, B, N]
    target_fractions: Array  # f32[T + n, B, N']
    choice: tuple[Array, Array]  # keys of the fractions that actions are chosen by
    noise: tuple[Array, Array]  # keys of noisy layers


@dataclass(frozen=True, kw_only=True, eq=False)
class IQN:
    """The algorithm as settings and pure functions; an interfaces.Agent with priorities."""

    fractions: Annotated[int, Range(ge=1)]  # N, of the online network in the loss
    target_fractions: Annotated[int, Range(ge=1)]  # N', of the target network
    acting_fractions: Annotated[int, Range(ge=1)]  # K, to choose an action
    acting_draws: bool  # False: those are fixed, the middles of K equal parts
    stratified: bool  # drawn fractions lie one in each of so many equal parts
    cosines: Annotated[int, Range(ge=1)]  # of a fraction
    risk: Risk | None  # None: actions are chosen by the mean
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

    initial_carry = q_learning.initial_carry
    acting_params = q_learning.acting_params
    expected = q_learning.mean
    remember = q_learning.remember
    values = q_learning.values
    act = q_learning.act
    initial_priorities = q_learning.initial_priorities
    update = q_learning.update

    def __post_init__(self) -> None:
        common.require_discrete("iqn", self.spec)
        common.require_starts(self.sequence, self.network)
        q_learning.require_whole(self)

    @property
    def sequence(self) -> SequenceSpec:
        return q_learning.sequence_of(self)

    def heads(self) -> dict[str, Head]:
        return {q_learning.HEAD: self.head, FRACTIONS: Fractions(cosines=self.cosines)}

    def init(self, key: Array) -> TrainState:
        """Gives `q_learning.init` examples of fractions, which their head reads."""
        return q_learning.init(self, key, **{FRACTIONS: (jnp.zeros((1, 1, 1)),)})

    def outputs(
        self, params: Params, features: Array, key: Array | None = None, noise: Array | None = None
    ) -> Array:
        """Quantiles f32[..., A, K] to choose actions by, at drawn or at fixed fractions."""
        count = self.acting_fractions
        if key is None or not self.acting_draws:  # one embedding for all features
            fractions = midpoints(count, features.ndim)
        else:
            fractions = self.drawn(key, (*features.shape[:-1], count))
        if self.risk is not None:
            fractions = self.risk.distorted(fractions)
        return self.quantiles(params, features, fractions, noise)

    def quantiles(
        self, params: Params, features: Array, fractions: Array, noise: Array | None
    ) -> Array:
        """Quantiles f32[..., A, N] of features [..., F]; fractions: [..., N], or [1, ..., 1, N]."""
        joined = self.network.read(params, FRACTIONS, self.heads()[FRACTIONS], features, fractions)
        found = self.network.read(params, q_learning.HEAD, self.head, joined, noise)
        return jnp.swapaxes(found, -1, -2)

    def loss(
        self, params: Params, features: Array, replayed: q_learning.Replayed
    ) -> q_learning.Loss:
        """Importance-weighted: mean or sum of a sequence's valid rows, mean over the batch."""
        draws = self.draws(replayed.key, features.shape[:-1])
        noise, other_noise = draws.noise
        q = self.expected(self.outputs(params, features, draws.choice[0], noise))
        other, other_features = replayed.target_params, replayed.target_features
        target_q = self.expected(self.outputs(other, other_features, draws.choice[1], other_noise))
        found = self.quantiles(params, features[: self.unroll], draws.fractions, noise)
        taken = common.take_action(found, replayed.rows.action[: self.unroll])
        target = self.quantiles(other, other_features, draws.target_fractions, other_noise)
        return q_learning.quantile_regression(
            self, taken, draws.fractions, target, q, target_q, replayed
        )

    def drawn(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Fractions [..., N] of this shape: uniform over 0 .. 1, or each over a part of its own."""
        uniform, count = jax.random.uniform(key, shape), shape[-1]
        if not self.stratified:
            return uniform
        drawn = midpoints(count, len(shape)) + (uniform - 0.5) / count
        return jnp.clip(drawn, 0.0, 1.0)  # rounding goes beyond, where a power is no number

    def draws(self, key: Array, shape: tuple[int, ...]) -> Draws:
        """Draws what an update needs for features [T + n, B, F] of this leading shape."""
        keys = jax.random.split(key, 6)
        return Draws(
            fractions=self.drawn(keys[0], (self.unroll, *shape[1:], self.fractions)),
            target_fractions=self.drawn(keys[1], (*shape, self.target_fractions)),
            choice=(keys[2], keys[3]),
            noise=(keys[4], keys[5]),
        )
