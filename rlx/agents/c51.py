"""C51: a categorical distribution of returns (Bellemare et al., ICML 2017), with or without memory.

The head gives each action logits of K atoms, evenly spaced from `lowest` to `highest`. Actions are
chosen by the mean. The target is the distribution of the next state's best action, moved by reward
and discount and projected onto the atoms; the loss is the cross-entropy, and so is a row's
priority. Everything else is DQN's (`rlx.agents.dqn`).

DEPARTS: Rainbow's priority (Hessel et al. 2018) is the Kullback-Leibler divergence, which is less
by the entropy of the target; Dopamine's is the cross-entropy.

DEPARTS: with Munchausen a state's distribution is the mixture over the policy, projected onto the
atoms before it is moved: its mean is exact, its variance grows by less than an atom's distance.
With value rescaling the atoms are rescaled returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlx import ops, trees
from rlx.agents import common, q_learning, targets
from rlx.agents.munchausen import Munchausen
from rlx.agents.optimizers import Optimizer
from rlx.interfaces import Network
from rlx.networks.heads import ActionHead
from rlx.types import (
    Array,
    ArraySpec,
    AtomsActing,
    EnvSpec,
    Params,
    Range,
    Row,
    Runtime,
    SequenceSpec,
)

trees.register()


@dataclass(frozen=True, kw_only=True, eq=False)
class C51:
    """The algorithm as settings and pure functions; an interfaces.Agent with priorities."""

    atoms: Annotated[int, Range(ge=2)]  # K
    lowest: float  # return of the first atom
    highest: float  # return of the last
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

    init = q_learning.init
    initial_carry = q_learning.initial_carry
    acting_params = q_learning.acting_params
    outputs = q_learning.outputs
    values = q_learning.values
    act = q_learning.act
    update = q_learning.update

    def __post_init__(self) -> None:
        common.require_discrete("c51", self.spec)
        common.require_starts(self.sequence, self.network)
        q_learning.require_whole(self)
        if not self.lowest < self.highest:
            raise ValueError(
                f"agent.lowest={self.lowest} must be below agent.highest={self.highest}: the atoms "
                "lie between them."
            )
        with np.errstate(over="ignore"):
            ends = np.asarray([self.lowest, self.highest], np.float32)
            step = float(ends[1] - ends[0]) / (self.atoms - 1)
            least = float(np.spacing(np.abs(ends).max()))
        if not least < step < np.inf:
            raise ValueError(
                f"agent.lowest={self.lowest} and agent.highest={self.highest}: {self.atoms} atoms "
                "between them cannot be told apart in float32; give a range of ordinary returns."
            )

    @property
    def sequence(self) -> SequenceSpec:
        return q_learning.sequence_of(self)

    @property
    def support(self) -> np.ndarray:
        """f32[K]: the atoms' returns."""
        return np.linspace(self.lowest, self.highest, self.atoms, dtype=np.float32)

    @property
    def acting_spec(self) -> AtomsActing:
        atoms = ArraySpec(shape=(self.atoms,), dtype="float32")
        return AtomsActing(
            q=q_learning.SCALAR, log_taken=atoms, worth=atoms, bonus=q_learning.SCALAR
        )

    def heads(self) -> dict[str, ActionHead]:
        return {q_learning.HEAD: self.head.copy(outputs=self.atoms)}

    def expected(self, outputs: Array) -> Array:
        """The means f32[..., A] of logits f32[..., A, K]."""
        return jax.nn.softmax(outputs) @ self.support

    def remember(self, outputs: Array, action: Array, mask: Array | None) -> AtomsActing:
        """Keeps what the first priority needs: the distributions of action and state."""
        q = self.expected(outputs)
        worth, scaled = self._worth(jax.nn.softmax(outputs), q, q, mask)
        bonus = None
        if self.munchausen is not None:
            bonus = self.munchausen.bonus(scaled, action)
        taken = common.take_action(jax.nn.log_softmax(outputs), action)
        return AtomsActing(
            q=common.take_action(q, action),
            log_taken=taken,
            worth=worth,
            bonus=jnp.zeros(len(action)) if bonus is None else bonus,
        )

    def _worth(
        self, probability: Array, q: Array, target_q: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """(a state's distribution f32[..., K], tau ln pi f32[..., A]) of actions' f32[..., A, K].

        q chooses the best action; with Munchausen target_q makes the policy.
        """
        if self.munchausen is None:
            best = jnp.argmax(common.masked(q, mask), axis=-1)
            return common.take_action(probability, best), jnp.zeros_like(q)
        pi, scaled = self.munchausen.policy(target_q, mask)
        moved = project(
            beside(self.support, probability) - scaled[..., None], probability, self.support, jnp
        )
        return (pi[..., None] * moved).sum(axis=-2), scaled

    def initial_priorities(self, rows: Row) -> np.ndarray:
        """f32[M, T] from the distributions of acting time of rows [M, L] (observation {}).

        The last row's distribution stands for the one after it, as in
        `targets.acting_priorities`.
        """
        rows = targets.numpy_time_major(rows, self.burn_in)
        worth = np.asarray(rows.acting.worth)
        target = self._target(rows, worth, self._bonus(rows.acting.bonus), np)
        crossed = -(target * rows.acting.log_taken[: self.unroll]).sum(axis=-1)
        return np.where(rows.valid[: self.unroll], crossed, -1).astype(np.float32).T

    def _bonus(self, bonus: Array) -> Array | None:
        return None if self.munchausen is None else bonus

    def _target(self, rows: Row, worth: Array, bonus: Array | None, xp: Any) -> Array:
        """f32[T, B, K]: states' distributions [T + n, B, K], n steps earlier, on the atoms."""
        settings = q_learning.target_settings(self) | {"xp": xp}
        positions = xp.broadcast_to(beside(self.support, worth), worth.shape)
        moved = targets.spread_targets(rows, positions, bonus, **settings)
        still = xp.zeros_like(rows.reward)[..., None]
        reached = ops.n_step_return(  # the distribution of the state that the sum ends in
            still, still + 1, rows.valid[..., None], worth, n=self.n_step, gamma=1.0, xp=xp
        )
        return project(moved, reached, self.support, xp)

    def loss(
        self, params: Params, features: Array, replayed: q_learning.Replayed
    ) -> q_learning.Loss:
        """Importance-weighted: mean or sum of a sequence's valid rows, mean over the batch."""
        online, target = jax.random.split(replayed.key)
        found = self.outputs(params, features, noise=online)  # [T + n, B, A, K]
        other = self.outputs(replayed.target_params, replayed.target_features, noise=target)
        q, target_q = self.expected(found), self.expected(other)
        rows, chooser = replayed.rows, q if self.double_q else target_q
        worth, scaled = self._worth(jax.nn.softmax(other), chooser, target_q, replayed.mask)
        bonus = None
        if self.munchausen is not None:
            bonus = self.munchausen.bonus(scaled[: len(rows.action)], rows.action)
        aim = jax.lax.stop_gradient(self._target(rows, worth, bonus, jnp))
        trained = common.window(rows, 0, self.unroll)
        log = jax.nn.log_softmax(common.take_action(found[: self.unroll], trained.action))
        crossed = -(aim * log).sum(axis=-1)
        losses = targets.per_sequence(crossed, trained.valid, self.loss_over_time)
        td, taken, _ = q_learning.errors(self, q, target_q, replayed)
        metrics = targets.value_metrics(taken, td, trained)
        priorities = targets.row_priorities(crossed, trained.valid)
        return jnp.mean(replayed.importance * losses), (priorities, metrics)


def beside(support: np.ndarray, like: Array) -> np.ndarray:
    """The atoms [K] with as many axes as `like` [..., K]."""
    return support.reshape(*[1] * (like.ndim - 1), -1)


def project(positions: Array, probability: Array, support: Array, xp: Any) -> Array:
    """Puts probabilities f32[..., K] at positions f32[..., K] onto evenly spaced atoms [K].

    Each gives its mass to the two atoms beside it, by nearness (equation 7); beyond the ends to the
    last one. No mass is lost, also where a position is an atom's.
    """
    last, step = len(support) - 1, support[1] - support[0]
    place = xp.clip((positions - support[0]) / step, 0, last)
    place = place[..., None, :]
    atoms = np.arange(len(support), dtype=np.float32).reshape(*[1] * (place.ndim - 2), -1, 1)
    near = xp.clip(1 - xp.abs(place - atoms), 0, 1)
    return (near * probability[..., None, :]).sum(axis=-1)
