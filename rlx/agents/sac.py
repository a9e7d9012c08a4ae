"""SAC: soft actor-critic with twin critics and a learnt temperature (Haarnoja et al. 2018).

Off-policy, from sequence replay, with continuous actions (squashed by tanh between their bounds) or
one discrete action (Christodoulou 2019). A network with a recurrent core makes it recurrent: the
bodies are unrolled from stored states, after a burn-in, as in R2D2.

DEPARTS: both critics read one body; with a body of no layers they share nothing, as in the paper.
DEPARTS: sums of n rewards have no entropies between them, and are not corrected for older policies;
`n_step: 1` is the paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from rlx import ops, trees
from rlx.agents import common, normalizing, q_learning, targets
from rlx.agents import policy_gradient as pg
from rlx.agents.optimizers import Optimizer
from rlx.interfaces import Network
from rlx.networks.actions import middle_and_half
from rlx.networks.distributions import Categorical, Distribution, Normal, is_bounded
from rlx.networks.policies import ActionValue, Policy
from rlx.networks.separate import Separate
from rlx.types import (
    Array,
    Batch,
    BoxSpec,
    Carry,
    DiscreteSpec,
    EnvSpec,
    NetInput,
    Params,
    QActing,
    Range,
    Row,
    Runtime,
    TrainState,
    UpdateOutput,
)

trees.register()

POLICY, CRITICS = "policy", ("first", "second")  # the names of the heads
NOISE = "noise"  # of acting, beside the recurrent states in a carry
DISCRETE_SHARE = 0.7  # of the largest entropy; with the paper's 0.98 two actions stay random


@dataclass(frozen=True, kw_only=True, eq=False)
class SAC:
    """The algorithm as settings and pure functions; an interfaces.Agent with priorities."""

    burn_in: Annotated[int, Range(ge=0)]  # rows unrolled without gradient
    unroll: Annotated[int, Range(ge=1)]  # trained rows T
    n_step: Annotated[int, Range(ge=1)]
    stride: Annotated[int, Range(ge=1)] | None  # None: a start at every row, or at every block's
    block_rows: Annotated[int, Range(ge=1)]
    discount: Annotated[float, Range(ge=0, le=1)]
    reward: common.Reward
    normalize_observation: bool
    stored_state: bool  # False: sequences start from a zero recurrent state (an ablation)
    separate_critic: bool  # False: one body, which the critics' errors alone move
    temperature: Annotated[float, Range(ge=1e-30)]  # at first, or always
    learn_temperature: bool
    target_entropy: float | None  # None: -size of boxes, 0.7 ln A of A choices
    target_rate: Annotated[float, Range(gt=0, le=1)]
    noise_correlation: Annotated[float, Range(ge=0, lt=1)]  # of acting's noise, from row to row
    policy: Policy
    critic: ActionValue
    actor_optimizer: Optimizer
    critic_optimizer: Optimizer
    temperature_optimizer: Optimizer
    network: Runtime[Network]
    spec: Runtime[EnvSpec]

    on_policy = False
    samples = True
    acting_spec = q_learning.Q_ACTING
    sequence = property(q_learning.sequence_of)

    def __post_init__(self) -> None:
        action = self.spec.action
        if not isinstance(action, BoxSpec | DiscreteSpec):
            raise ValueError(
                f"agent sac acts with one discrete action or with real numbers; {self.spec.id} has "
                f"{action}. Choose agent=ppo, a2c or impala."
            )
        if isinstance(action, BoxSpec) and not is_bounded(action):
            raise ValueError(
                f"sac acts between bounds, and actions of {self.spec.id} have no bounds to lie "
                "between; choose agent=ppo, a2c or impala, with agent.policy.squash=false."
            )
        if isinstance(action, BoxSpec) and not self.policy.squash:
            raise ValueError("agent.policy.squash=false: sac acts between bounds; set it to true.")
        if self.noise_correlation and not isinstance(action, BoxSpec):
            raise ValueError(
                f"agent.noise_correlation={self.noise_correlation:g}: a discrete action has no "
                "noise to correlate; set it to 0.0."
            )
        common.require_starts(self.sequence, self.network)

    @property
    def body(self) -> Network:
        """One body with all heads, or one of the actor and one of the critics."""
        if not self.separate_critic:
            return self.network
        return Separate(network=self.network, bodies={"actor": (POLICY,), "critic": CRITICS})

    def aimed_entropy(self, mask: Array | None = None) -> Array | float:
        """The entropy that the temperature is learnt for; of each row where a mask is given.

        A box's is the paper's -size for actions between -1 and 1, in the units of the bounds. One
        choice's is a share of the largest entropy, of the actions that mask bool[..., A] allows.
        """
        if self.target_entropy is not None:
            return self.target_entropy
        if isinstance(self.spec.action, DiscreteSpec):
            if mask is None:
                return DISCRETE_SHARE * math.log(self.spec.action.n)
            return DISCRETE_SHARE * jnp.log(mask.sum(axis=-1))
        assert isinstance(self.spec.action, BoxSpec)
        _, half = middle_and_half(self.spec.action, 1)
        return float(np.log(half).sum()) - len(half)

    # --- beginning and acting --------------------------------------------------------------------

    def init(self, key: Array) -> TrainState:
        """Fresh parameters, and the critics' copy as target; `key` is consumed."""
        init_key, state_key = jax.random.split(key)
        heads = {POLICY: self.policy, **dict.fromkeys(CRITICS, self.critic)}
        action = self.spec.action.array
        taken = (jnp.zeros((1, 1, *action.shape), action.dtype),)
        network = self.body.init(init_key, heads, **dict.fromkeys(CRITICS, taken))
        params = {"network": network, "log_temperature": jnp.log(jnp.asarray(self.temperature))}
        parts = self.parts(params)
        optimizers = self.optimizers()
        return TrainState(
            params=params,
            target_params=parts["critic"],
            opt_state={name: optimizers[name].build().init(parts[name]) for name in parts},
            statistics=normalizing.begin(
                self.spec, observation=self.normalize_observation, reward=False
            ),
            updates=jnp.zeros((), jnp.int32),
            gradient_steps=jnp.zeros((), jnp.int32),
            key=state_key,
        )

    def initial_carry(self, batch: int) -> Carry:
        """The carry before an episode's first row, for `batch` lanes."""
        carry = self.body.initial_carry(batch)
        if not self.noise_correlation:
            return carry
        assert isinstance(self.spec.action, BoxSpec)
        return with_noise(carry, jnp.zeros((batch, len(self.spec.action.low))))

    def acting_params(self, state: TrainState) -> Params:
        """All parameters: the critics give first priorities, and have recurrent states."""
        return {**state.params, "statistics": state.statistics}

    def act(
        self, params: Params, inputs: NetInput, carry: Carry, key: Array, exploration: Array
    ) -> tuple[Array, QActing, Carry]:
        """Maps inputs [N, ...] to (action [N, *], its value and that of the state, carry).

        exploration: f32[N], the share of actions that are drawn. `key` is consumed.
        """
        rewarded = common.transform_inputs(common.add_time(inputs), self.reward)
        seen = normalizing.scaled_inputs(params["statistics"], rewarded)
        core, before = self.without_noise(carry)
        features, carry = self.body.apply(params["network"], seen, replace(carry, core=core))
        now = jax.tree.map(lambda x: x[0], features)
        policy = self.policy_of(params["network"], now, common.allowed(inputs, self.spec))
        if before is None:
            draw = pg.drawn(policy, key, exploration)
        else:
            draw, noise = self.drawn_after(before, inputs.first, policy, key, exploration)
            carry = with_noise(carry, noise)
        action = policy.action(draw)
        temperature = jnp.exp(params["log_temperature"])
        q = self.least(params["network"], now, action)
        if isinstance(policy, Categorical):
            soft = expected(policy, q - temperature * policy.log_probabilities())
            q = common.take_action(q, action)
        else:
            soft = q - temperature * policy.log_probability(draw)
        return action, QActing(q=q, q_max=soft), carry

    def drawn_after(
        self, before: Array, first: Array, policy: Distribution, key: Array, exploration: Array
    ) -> tuple[Array, Array]:
        """(draws as pg.drawn gives them, their noise f32[N, D]), after the noise of the row before.

        Each row's noise is standard normal, so a draw is one of the policy; only the draws of an
        episode hang together: c e + sqrt(1 - c^2) e' after e, with fresh e'. That is the noise of
        Ornstein and Uhlenbeck (Lillicrap et al. 2016) in the units of the policy's deviation.
        """
        assert isinstance(policy, Normal)
        c = self.noise_correlation
        draw_key, explore_key = jax.random.split(key)
        fresh = jax.random.normal(draw_key, before.shape)
        noise = jnp.where(first[:, None], fresh, c * before + math.sqrt(1 - c * c) * fresh)
        draw = common.explore(explore_key, policy.mode(), policy.at(noise), exploration)
        return draw, noise

    def without_noise(self, carry: Carry) -> tuple[Any, Array | None]:
        """(the bodies' recurrent states, the noise f32[N, D] of the row before or None)."""
        if not self.noise_correlation:
            return carry.core, None
        return carry.core["body"], carry.core[NOISE]

    def initial_priorities(self, rows: Row) -> np.ndarray:
        """f32[M, T] of acting time: what follows is worth what the next action was worth."""
        settings = {"n": self.n_step, "gamma": self.discount, "reward": self.reward}
        return targets.acting_priorities(
            rows, self.burn_in, self.unroll, **settings, rescale_epsilon=None
        )

    # --- learning --------------------------------------------------------------------------------

    def update(
        self, state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, UpdateOutput]:
        """One gradient step of critics, actor and temperature on this device's share."""
        rewarded = common.transform_inputs(common.batch_inputs(batch), self.reward)
        seen = normalizing.scaled_inputs(state.statistics, rewarded)
        carry = batch.carry if self.stored_state else common.zero_core(batch.carry)
        core, _ = self.without_noise(carry)
        inputs, _ = self.body.stack_frames(seen, carry)
        rows = common.window(common.time_major(batch.rows), self.burn_in, None)
        key, next_key = common.keys(state, axis_name)
        target_features, _ = self.body.unroll(state.target_params, inputs, core)
        target_features = common.window(target_features, self.burn_in, None)

        def loss(params: Params) -> Any:
            features = common.features_after(
                self.body, params["network"], inputs, core, self.burn_in
            )
            mask = common.allowed(common.window(inputs, self.burn_in, None), self.spec)
            target = (state.target_params, target_features)
            mean = pg.mean_of(rows.valid[: self.unroll], axis_name)
            return self.loss(params, features, mask, target, rows, batch.importance, mean, key)

        grads, value, (priorities, told) = common.gradients(loss, state.params, axis_name)
        metrics = {
            **common.mean_over_devices(told, axis_name),
            "learner/loss": value,
            **common.grad_norms(grads),
        }
        own = common.window(rewarded, self.burn_in, self.burn_in + self.unroll)
        state = replace(
            self.stepped(state, grads),
            statistics=normalizing.observed(
                state.statistics, own, None, rows.valid[: self.unroll], axis_name
            ),
            key=next_key,
        )
        return state, UpdateOutput(priorities=priorities, metrics=metrics)

    def loss(
        self,
        params: Params,
        features: Any,
        mask: Array | None,
        target: tuple[Params, Any],
        rows: Row,
        importance: Array,
        mean: pg.Per,
        key: Array,
    ) -> tuple[Array, tuple[Array, common.Metrics]]:
        """The sum of three losses, none of which moves another's parameters.

        features: [T + n, B, F] of each body; target: the critics' target parameters and features;
        mean: over the valid trained rows of all devices.
        """
        network, log_temperature = params["network"], params["log_temperature"]
        temperature = jax.lax.stop_gradient(jnp.exp(log_temperature))
        trained = common.window(rows, 0, self.unroll)
        read = features if self.separate_critic else jax.lax.stop_gradient(features)
        policy = self.policy_over(network, read, mask)
        draw = policy.draw(key)
        aim = jax.lax.stop_gradient(self.aims(policy, draw, target, temperature, rows))
        now = common.window(features, 0, self.unroll)
        errors = [self.taken(network, name, now, trained.action) - aim for name in CRITICS]
        per_row = jnp.stack([0.5 * jnp.square(error) for error in errors]).sum(axis=0)
        critic_loss = jnp.mean(importance * targets.per_sequence(per_row, trained.valid, "mean"))
        fixed = jax.lax.stop_gradient((network, now))
        cost, entropy = self.actor_cost(policy, draw, fixed, temperature)
        actor_loss = mean(cost)
        wanted = self.aimed_entropy(None if mask is None else mask[: self.unroll])
        gap = jax.lax.stop_gradient(mean(entropy - wanted))
        temperature_loss = log_temperature * gap if self.learn_temperature else 0.0
        td = jnp.stack([jnp.abs(error) for error in errors]).mean(axis=0)
        least = jnp.minimum(*errors) + aim
        metrics = targets.value_metrics(least, td, trained) | {
            "learner/critic_loss": critic_loss,
            "learner/actor_loss": actor_loss,
            "learner/entropy": mean(entropy),
            "learner/temperature": temperature,
        }
        priorities = targets.row_priorities(td, trained.valid)
        return critic_loss + actor_loss + temperature_loss, (priorities, metrics)

    def aims(
        self,
        policy: Distribution,
        draw: Array,
        target: tuple[Params, Any],
        temperature: Array,
        rows: Row,
    ) -> Array:
        """The critics' targets f32[T, B]; none is made of the value of the first row itself."""
        params, features = target
        q = self.least(params, common.window(features, 1, None), policy.action(draw)[1:])
        if isinstance(policy, Categorical):
            later = Categorical(policy.logits[1:])
            soft = expected(later, q - temperature * later.log_probabilities())
        else:
            soft = q - temperature * policy.log_probability(draw)[1:]
        value = jnp.concatenate([jnp.zeros_like(soft[:1]), soft])
        reward = ops.transform_reward(rows.reward, self.reward, jnp)
        return ops.n_step_return(
            reward, rows.discount, rows.valid, value, n=self.n_step, gamma=self.discount, xp=jnp
        )

    def actor_cost(
        self, policy: Distribution, draw: Array, fixed: tuple[Params, Any], temperature: Array
    ) -> tuple[Array, Array]:
        """(what the actor minimises, its entropy or an estimate of it), f32[T, B]."""
        if isinstance(policy, Categorical):
            policy = Categorical(policy.logits[: self.unroll])
            logs = policy.log_probabilities()
            cost = expected(policy, temperature * logs - self.least(*fixed, draw[: self.unroll]))
            return cost, -expected(policy, logs)
        logs = policy.log_probability(draw)[: self.unroll]
        q = self.least(*fixed, policy.action(draw)[: self.unroll])
        return temperature * logs - q, -logs

    def stepped(self, state: TrainState, grads: Params) -> TrainState:
        """The state after a step of each optimiser, and of the target towards the critics."""
        parts, slopes, optimizers = self.parts(state.params), self.parts(grads), self.optimizers()
        new, opt_state = {}, {}
        for name, own in parts.items():
            new[name], opt_state[name] = common.step_optimizer(
                optimizers[name].build(), own, state.opt_state[name], slopes[name]
            )
        params = {
            "network": {**new["actor"], **new["critic"]},
            "log_temperature": new["temperature"],
        }
        return replace(
            state,
            params=params,
            target_params=common.soft_target(new["critic"], state.target_params, self.target_rate),
            opt_state=opt_state,
            updates=state.updates + 1,
            gradient_steps=state.gradient_steps + 1,
        )

    # --- parts -----------------------------------------------------------------------------------

    def parts(self, params: Params) -> dict[str, Any]:
        """The parameters, or their gradients, by the optimiser that moves them."""
        network = params["network"]
        actor = "actor" if self.separate_critic else POLICY
        return {
            "actor": {actor: network[actor]},
            "critic": {name: part for name, part in network.items() if name != actor},
            "temperature": params["log_temperature"],
        }

    def optimizers(self) -> dict[str, Optimizer]:
        return {
            "actor": self.actor_optimizer,
            "critic": self.critic_optimizer,
            "temperature": self.temperature_optimizer,
        }

    def policy_of(self, network: Params, features: Any, mask: Array | None) -> Distribution:
        """The policy for features [..., F]; mask: bool[..., A]."""
        parameters = self.body.read(network, POLICY, self.policy, features)
        return self.policy.distribution(parameters, self.spec.action, mask)

    def policy_over(self, network: Params, features: Any, mask: Array | None) -> Distribution:
        """The policy of rows [T + n, B], whose gradient is that of the T trained rows alone.

        The others only give the targets their actions; a gradient of theirs would be 0 and cost.
        """
        trained = common.window(features, 0, self.unroll)
        later = jax.lax.stop_gradient((network, common.window(features, self.unroll, None)))
        read = [
            self.body.read(params, POLICY, self.policy, rows)
            for params, rows in ((network, trained), later)
        ]
        return self.policy.distribution(jnp.concatenate(read), self.spec.action, mask)

    def values_of(self, network: Params, name: str, features: Any, action: Array) -> Array:
        """One critic's values: f32[...] of a box's action, f32[..., A] of all choices."""
        return self.body.read(network, name, self.critic, features, action)

    def taken(self, network: Params, name: str, features: Any, action: Array) -> Array:
        """One critic's value f32[...] of the action taken."""
        values = self.values_of(network, name, features, action)
        discrete = isinstance(self.spec.action, DiscreteSpec)
        return common.take_action(values, action) if discrete else values

    def least(self, network: Params, features: Any, action: Array) -> Array:
        """The smaller value of the two critics, elementwise."""
        first, second = (self.values_of(network, name, features, action) for name in CRITICS)
        return jnp.minimum(first, second)


def with_noise(carry: Carry, noise: Array) -> Carry:
    """The carry with the noise f32[N, D] of its row beside the recurrent states."""
    return replace(carry, core={"body": carry.core, NOISE: noise})


def expected(policy: Categorical, values: Array) -> Array:
    """The mean of values [..., A] over the policy's actions, f32[...]."""
    probabilities = jnp.exp(policy.log_probabilities())
    return (probabilities * jnp.where(probabilities > 0, values, 0.0)).sum(axis=-1)
