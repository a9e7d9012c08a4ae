"""Agents with a policy and the value of a state share these functions: A2C, PPO, IMPALA.

Those whose first argument is `agent` do as methods, too: an agent with the settings of
`PolicyAgent` writes `act = policy_gradient.act` in its body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from rlx import ops, trees
from rlx.acting.exploration import least_amount
from rlx.acting.scheduled import scheduled_exploration
from rlx.agents import common, normalizing
from rlx.agents.optimizers import Optimizer
from rlx.config.build import build, build_schedules
from rlx.config.targets import resolve
from rlx.interfaces import Exploration, Network
from rlx.networks.distributions import Distribution, draw_spec, is_bounded
from rlx.networks.policies import Policy, Value
from rlx.networks.separate import Separate
from rlx.problems import Problem, show
from rlx.types import (
    Array,
    ArraySpec,
    Batch,
    BoxSpec,
    Carry,
    EnvSpec,
    NetInput,
    Params,
    Row,
    SequenceSpec,
    TrainState,
    UpdateOutput,
    record,
)

POLICY, VALUE = "policy", "value"  # the names of the heads
MOST_LOG_RATIO = 30.0
PROGRESS = "progress"  # a statistic: the part of `decay_env_steps` that is over, 0 .. 1


@record
class PolicyActing:
    """An agent with a policy keeps this from acting time."""

    log_probability: Array  # f32: of the action


@record
class BoxActing:
    """The same for real actions."""

    log_probability: Array  # f32: of the action
    draw: Array  # f32[D]: what the distribution drew, of which the action was made


trees.register()


class PolicyAgent(Protocol):
    """The settings that these functions need."""

    @property
    def network(self) -> Network: ...
    @property
    def spec(self) -> EnvSpec: ...
    @property
    def on_policy(self) -> bool: ...
    @property
    def burn_in(self) -> int: ...
    @property
    def unroll(self) -> int: ...
    @property
    def discount(self) -> float: ...
    @property
    def reward(self) -> str: ...
    @property
    def normalize_observation(self) -> bool: ...
    @property
    def normalize_reward(self) -> bool: ...
    @property
    def normalize_advantage(self) -> bool: ...
    @property
    def rescale_epsilon(self) -> float | None: ...
    @property
    def separate_critic(self) -> bool: ...
    @property
    def value_coefficient(self) -> float: ...
    @property
    def entropy(self) -> float: ...
    @property
    def final_entropy(self) -> float | None: ...
    @property
    def decay_env_steps(self) -> int | None: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def value(self) -> Value: ...
    @property
    def optimizer(self) -> Optimizer: ...


class SteppingAgent(PolicyAgent, Protocol):
    """An agent that makes one gradient step of each batch."""

    def loss(
        self, params: Params, read: Read, key: Array, axis_name: str | None
    ) -> tuple[Array, common.Metrics]:
        """Returns (loss, metrics) of this device's share."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """A batch as the learner reads it, time-major."""

    inputs: NetInput  # [burn_in + T + 1, B], as `unroll` takes them
    core: Any  # [B, ...]: the recurrent state before them
    rows: Row  # [T, B], after the burn-in
    reward: Array  # f32[T, B], as it is learnt
    progress: Array  # f32[]: of the schedules


Per = Callable[[Array], Array]  # the mean of f32[T, B] over the valid rows of all devices


# --- what such an agent is -----------------------------------------------------------------------


def require_whole(agent: PolicyAgent, **finals: float | None) -> None:
    """Raises ValueError where settings do not go together.

    finals: the final values that `decay_env_steps` leads to, by setting.
    """
    finals = {"final_entropy": agent.final_entropy, **finals}
    if agent.decay_env_steps is None and any(value is not None for value in finals.values()):
        shown = ", ".join(f"agent.{name}={show(value)}" for name, value in finals.items())
        raise ValueError(f"{shown}: say when by agent.decay_env_steps, or set null.")
    if agent.decay_env_steps is not None and all(value is None for value in finals.values()):
        raise ValueError(
            f"agent.decay_env_steps={agent.decay_env_steps} leads to nothing; give "
            f"{' or '.join(f'agent.{name}' for name in finals)}, or set it to null."
        )
    require_bounds(agent.policy, agent.spec)


def clashes(settings: Mapping[str, Any]) -> Sequence[Problem]:
    """Finds exploration whose actions are not drawn from the policy, as the loss takes them to be.

    settings: of the whole run (`interfaces.Agrees`).
    """
    replay, _ = resolve(settings["replay"]["_target_"])
    if getattr(replay, "is_recorded", False):  # nobody acts
        return []
    exploration: Exploration = build(settings["exploration"], "exploration", seed=settings["seed"])
    exploration = scheduled_exploration(exploration, build_schedules(settings["schedules"]))
    lanes = settings["acting"]["instances"] * settings["acting"]["envs_per_actor"]
    if least_amount(exploration, lanes, settings["total_env_steps"]) >= 1:
        return []
    says = "an agent that learns its policy needs actions that are drawn from it, an amount of 1; "
    return [Problem(path="exploration", says=says + "choose exploration=sample")]


def require_bounds(policy: Policy, spec: EnvSpec) -> None:
    """Raises ValueError where a policy is squashed into bounds that are not there."""
    if policy.squash and isinstance(spec.action, BoxSpec) and not is_bounded(spec.action):
        raise ValueError(
            f"agent.policy.squash=true, but actions of {spec.id} have no bounds to lie between; "
            "set it to false."
        )


def sequence_of(agent: PolicyAgent) -> SequenceSpec:
    """Blocks of an on-policy agent; else windows that start `unroll` rows apart."""
    rows = agent.burn_in + agent.unroll if agent.on_policy else agent.unroll
    return SequenceSpec(
        burn_in=agent.burn_in, unroll=agent.unroll, n_step=1, stride=rows, block_rows=rows
    )


def acting_spec(agent: Any) -> PolicyActing | BoxActing:
    """The spec of the record of acting time."""
    scalar, action = ArraySpec(shape=(), dtype="float32"), agent.spec.action
    if isinstance(action, BoxSpec):
        return BoxActing(log_probability=scalar, draw=draw_spec(action))
    return PolicyActing(log_probability=scalar)


def body(agent: PolicyAgent) -> Network:
    """One body with both heads, or one for each."""
    if not agent.separate_critic:
        return agent.network
    return Separate(network=agent.network, bodies={"actor": (POLICY,), "critic": (VALUE,)})


def init(agent: PolicyAgent, key: Array) -> TrainState:
    """Fresh parameters; `key` is consumed."""
    key, params_key = jax.random.split(key)
    params = body(agent).init(params_key, {POLICY: agent.policy, VALUE: agent.value})
    statistics = normalizing.begin(
        agent.spec, observation=agent.normalize_observation, reward=agent.normalize_reward
    )
    if agent.decay_env_steps is not None:
        statistics[PROGRESS] = jnp.zeros(())
    return common.new_state(params, agent.optimizer.build(), key, statistics=statistics)


def initial_carry(agent: PolicyAgent, batch: int) -> Carry:
    """The carry before an episode's first row, for `batch` lanes."""
    carry = body(agent).initial_carry(batch)
    if not agent.normalize_reward:
        return carry
    return normalizing.with_returns(carry, jnp.zeros(batch))


def acting_params(agent: Any, state: TrainState) -> Params:
    """The parameters, and the statistics by which observations are read."""
    del agent
    read_by = (normalizing.OBSERVATION, normalizing.RETURN)
    statistics = {name: state.statistics[name] for name in read_by if name in state.statistics}
    return {"network": state.params, "statistics": statistics}


def act(
    agent: PolicyAgent,
    params: Params,
    inputs: NetInput,
    carry: Carry,
    key: Array,
    exploration: Array,
) -> tuple[Array, PolicyActing | BoxActing, Carry]:
    """Maps inputs [N, ...] to (action [N, *], the agent's record of it, carry).

    exploration: f32[N], the share of actions that are drawn; the others are the mode. `key` is
    consumed.
    """
    net = body(agent)
    rewarded = common.transform_inputs(common.add_time(inputs), agent.reward)
    seen = normalizing.scaled_inputs(params["statistics"], rewarded)
    stacked, frames = net.stack_frames(seen, carry)
    core, returns = normalizing.without_returns(carry.core, agent.normalize_reward)
    features, core = net.unroll(params["network"], stacked, core)
    parameters = net.read(params["network"], POLICY, agent.policy, features)[0]
    mask = common.allowed(inputs, agent.spec)
    distribution = agent.policy.distribution(parameters, agent.spec.action, mask)
    draw = drawn(distribution, key, exploration)
    odds = distribution.log_probability(draw)
    kept: PolicyActing | BoxActing = PolicyActing(log_probability=odds)
    if isinstance(agent.spec.action, BoxSpec):
        kept = BoxActing(log_probability=odds, draw=draw)
    carry = Carry(core=core, frames=frames)
    if agent.normalize_reward:
        _, returns = normalizing.running_returns(returns, rewarded, agent.discount)
        carry = normalizing.with_returns(carry, returns)
    return distribution.action(draw), kept, carry


def drawn(distribution: Distribution, key: Array, exploration: Array) -> Array:
    """A draw of each of N lanes, or the mode, as exploration f32[N] says; `key` is consumed."""
    draw_key, explore_key = jax.random.split(key)
    sample = distribution.draw(draw_key)
    return common.explore(explore_key, distribution.mode(), sample, exploration)


# --- learning ------------------------------------------------------------------------------------


def read(
    agent: PolicyAgent, state: TrainState, batch: Batch, axis_name: str | None
) -> tuple[Read, TrainState]:
    """The batch as those statistics have it that acted, and the state that has observed it."""
    rewarded = common.transform_inputs(common.batch_inputs(batch), agent.reward)
    seen = normalizing.scaled_inputs(state.statistics, rewarded)
    inputs, _ = body(agent).stack_frames(seen, batch.carry)
    core, before = normalizing.without_returns(batch.carry.core, agent.normalize_reward)
    rows = common.window(common.time_major(batch.rows), agent.burn_in, agent.burn_in + agent.unroll)
    own = common.window(rewarded, agent.burn_in, None)
    returns = None
    if agent.normalize_reward:
        returns, _ = normalizing.running_returns(before, rewarded, agent.discount)
        returns = returns[agent.burn_in + 1 :]
    statistics = normalizing.observed(
        state.statistics, common.window(own, 0, -1), returns, rows.valid, axis_name
    )
    progress = jnp.zeros(())
    if agent.decay_env_steps is not None:
        assert batch.env_steps is not None
        made = batch.env_steps.max().astype(jnp.float32) / agent.decay_env_steps
        made = made if axis_name is None else jax.lax.pmax(made, axis_name)
        progress = jnp.clip(made, state.statistics[PROGRESS], 1.0)  # the count wraps at 2^32
        statistics[PROGRESS] = progress
    reward = normalizing.scaled_reward(
        statistics, ops.transform_reward(rows.reward, agent.reward, jnp)
    )
    found = Read(inputs=inputs, core=core, rows=rows, reward=reward, progress=progress)
    return found, replace(state, statistics=statistics)


def update_once(
    agent: SteppingAgent, state: TrainState, batch: Batch, *, axis_name: str | None = None
) -> tuple[TrainState, UpdateOutput]:
    """One gradient step of `agent.loss` on this device's share of the batch."""
    seen, state = read(agent, state, batch, axis_name)
    key, next_key = common.keys(state, axis_name)

    def loss(params: Params) -> tuple[Array, tuple[None, common.Metrics]]:
        total, metrics = agent.loss(params, seen, key, axis_name)
        return total, (None, metrics)

    state, output = common.gradient_step(loss, agent.optimizer.build(), state, axis_name)
    return replace(state, key=next_key), output


def outputs(
    agent: PolicyAgent, params: Params, inputs: NetInput, core: Any, burn_in: int, trained: int
) -> tuple[Distribution, Array]:
    """(the policy of the trained rows [T, B], what the value head gives after the burn-in)."""
    net = body(agent)
    features = common.features_after(net, params, inputs, core, burn_in)
    value = net.read(params, VALUE, agent.value, features)
    parameters = net.read(params, POLICY, agent.policy, common.window(features, 0, trained))
    mask = common.allowed(common.window(inputs, burn_in, burn_in + trained), agent.spec)
    return agent.policy.distribution(parameters, agent.spec.action, mask), value


def worth(agent: PolicyAgent, head: Array) -> Array:
    """The values of what the value head gives: h^-1 of it where values are rescaled."""
    epsilon = agent.rescale_epsilon
    return head if epsilon is None else ops.unrescale(head, epsilon, jnp)


def value_loss(agent: PolicyAgent, head: Array, target: Array) -> Array:
    """0.5 (v - target)^2 of each row, in h's scale where values are rescaled."""
    epsilon = agent.rescale_epsilon
    aim = target if epsilon is None else ops.rescale(target, epsilon, jnp)
    return 0.5 * jnp.square(head - aim)


def draws(rows: Row) -> Array:
    """The draws of acting time, [T, B, ...]."""
    found: Array = rows.acting.draw if isinstance(rows.acting, BoxActing) else rows.action
    return found


def mean_of(valid: Array, axis_name: str | None) -> Per:
    """The mean over the valid rows of all devices, of which each one gives its share."""
    count = valid.sum().astype(jnp.float32)
    count = count if axis_name is None else jax.lax.pmean(count, axis_name)
    return lambda x: jnp.where(valid, x, 0.0).sum() / jnp.maximum(count, 1e-6)


def normalized_advantage(advantage: Array, valid: Array, axis_name: str | None) -> Array:
    """Advantages with mean 0 and deviation 1 over the valid rows of all devices."""
    mean = mean_of(valid, axis_name)

    def over_all(x: Array) -> Array:
        own = mean(x)
        return own if axis_name is None else jax.lax.pmean(own, axis_name)

    centred = advantage - over_all(advantage)
    return centred / (jnp.sqrt(over_all(jnp.square(centred))) + 1e-8)


def scheduled(first: float, last: float | None, progress: Array) -> Array | float:
    """A setting on its way to its final value."""
    return first if last is None else first + (last - first) * progress


def whole_loss(
    agent: PolicyAgent,
    gain: Array,
    entropy: Array,
    value_losses: Array,
    mean: Per,
    progress: Array,
) -> tuple[Array, common.Metrics]:
    """The sum that is minimised, of f32[T, B] each, and its parts."""
    weight = scheduled(agent.entropy, agent.final_entropy, progress)
    parts = {
        "learner/policy_loss": -mean(gain),
        "learner/value_loss": mean(value_losses),
        "learner/entropy": mean(entropy),
    }
    loss = parts["learner/policy_loss"] + agent.value_coefficient * parts["learner/value_loss"]
    return loss - weight * parts["learner/entropy"], parts


def ratio_of(log_ratio: Array) -> Array:
    """The ratio of a logarithm, at most e^30: an infinite one would have no gradient."""
    return jnp.exp(jnp.minimum(log_ratio, MOST_LOG_RATIO))


def clipped_gain(log_ratio: Array, advantage: Array, limit: Array | float) -> tuple[Array, Array]:
    """(PPO's objective of each row; 1.0 where the clip has taken its gradient), f32[T, B].

    It is min(ratio A, clip(ratio, 1 - limit, 1 + limit) A) (Schulman et al. 2017, equation 7).
    """
    ratio = ratio_of(log_ratio)
    plain = ratio * advantage
    near = jnp.clip(ratio, 1 - limit, 1 + limit) * advantage
    return jnp.minimum(plain, near), (near < plain).astype(jnp.float32)


def divergence(log_ratio: Array, mean: Per) -> Array:
    """An estimate of KL(acting policy, policy of now), f32[]: the mean of ratio - 1 - log ratio.

    No row's term is negative, unlike -log ratio, of the same mean.
    """
    return mean(ratio_of(log_ratio) - 1 - log_ratio)


def ratio_error(log_ratio: Array, valid: Array, axis_name: str | None) -> Array:
    """The largest |ratio - 1| of all devices' valid rows, f32[]; 0 before a round's first step."""
    log_ratio = jax.lax.stop_gradient(log_ratio)
    largest = jnp.where(valid, jnp.abs(ratio_of(log_ratio) - 1), 0.0).max()
    return largest if axis_name is None else jax.lax.pmax(largest, axis_name)
