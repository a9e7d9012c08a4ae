"""Small agents with a policy, batches for them, and what their networks say of a batch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlx.agents import common
from rlx.agents import policy_gradient as pg
from rlx.agents.a2c import A2C
from rlx.agents.impala import Impala
from rlx.agents.ppo import PPO
from rlx.networks.policies import Policy, Value
from rlx.types import Batch, BoxSpec, EnvSpec, MultiDiscreteSpec, Row, TrainState
from tests import parts
from tests.networks import formulas

WIDE = EnvSpec(
    id="wide",
    observation=parts.VECTOR.observation,
    action=BoxSpec(shape=(2,), low=(-2.0, 0.0), high=(3.0, 0.5)),
    frames_per_env_step=1,
)
OWN: dict[type, dict[str, Any]] = {
    A2C: {"gae_lambda": 0.8},
    PPO: {
        "epochs": 1,
        "minibatches": 1,
        "gae_lambda": 0.8,
        "clip": 0.2,
        "final_clip": None,
        "value_clip": None,
        "most_kl": None,
    },
    Impala: {
        "on_policy": False,
        "trace_lambda": 1.0,
        "most_rho": 1.0,
        "most_c": 1.0,
        "clip": None,
    },
}


@dataclasses.dataclass(frozen=True)
class Plainly:
    """One step against the gradient, which is counted: parameters fall by their gradients."""

    def build(self) -> optax.GradientTransformation:
        return optax.chain(optax.scale(-1.0), optax.scale_by_schedule(lambda count: 1.0))


def policy(**changes: Any) -> Policy:
    settings: dict[str, Any] = {
        "layers": (),
        "activation": "tanh",
        "gain": 1.0,
        "deviation": "state",
        "initial_deviation": 1.0,
        "squash": False,
    }
    return Policy(**settings | changes)


def made(cls: type, net: Any = None, **changes: Any) -> Any:
    net = net or parts.network()
    settings: dict[str, Any] = {
        "burn_in": 3,
        "unroll": 5,
        "discount": 0.9,
        "reward": "raw",
        "normalize_observation": False,
        "normalize_reward": False,
        "normalize_advantage": False,
        "rescale_epsilon": None,
        "separate_critic": False,
        "value_coefficient": 0.5,
        "entropy": 0.02,
        "final_entropy": None,
        "decay_env_steps": None,
        "policy": policy(),
        "value": Value(layers=(), activation="tanh"),
        "optimizer": parts.adam(max_grad_norm=None),
        "network": net,
        "spec": net.spec,
    }
    return cls(**settings | OWN[cls] | changes)


def batch(agent: Any, size: int, *, seed: int = 0, env_steps: int | None = None) -> Batch:
    """Random sequences with ends of both kinds, in which masks are kept; the acting record is 0."""
    rng, spec = np.random.default_rng(seed), agent.spec
    length = agent.sequence.length + 1
    inputs = parts.inputs(spec, size, length, rng=rng)
    valid = np.ones((size, length), bool)
    valid[:, :-1] = ~inputs.first[:, 1:]
    terminated = rng.random((size, length)) < 0.5
    discount = np.ones((size, length), np.float32)
    discount[:, :-1] = np.where(~valid[:, 1:] & terminated[:, 1:], 0, 1)
    draw = parts.actions(spec, size, length, rng=rng)
    if spec.action_mask is not None:
        allowed = np.asarray(common.allowed(inputs, spec))
        draw = np.where(allowed, rng.random(allowed.shape), -1).argmax(-1).astype(np.int32)
    action, zeros = draw, np.zeros((size, length), np.float32)
    acting: Any = jax.tree.map(lambda _: zeros, agent.acting_spec)
    if isinstance(spec.action, BoxSpec):
        draw = draw / 2
        action = boxed(spec.action, draw, agent.policy.squash)
        if isinstance(acting, pg.BoxActing):
            acting = pg.BoxActing(log_probability=zeros, draw=draw)
    rows = Row(
        inputs=inputs,
        action=action,
        reward=np.where(valid, 2 * rng.normal(size=(size, length)), 0).astype(np.float32),
        discount=np.where(valid, discount, 0).astype(np.float32),
        valid=valid,
        acting=acting,
    )
    importance = rng.uniform(0.2, 1, size).astype(np.float32)
    found = parts.cut(rows, parts.random_carry(agent, size, rng), importance)
    count = None if env_steps is None else np.full(size, env_steps, np.uint32)
    return dataclasses.replace(found, env_steps=count)


def boxed(box: BoxSpec, draw: np.ndarray, squash: bool) -> np.ndarray:
    """The actions f32[..., *] that draws [..., D] make."""
    flat = draw.reshape(-1, draw.shape[-1]).tolist()
    actions = [formulas.box_action(one, box, squash) for one in flat]
    return np.asarray(actions, np.float32).reshape(*draw.shape[:-1], *box.shape)


def with_acting(batch: Batch, log_probability: np.ndarray) -> Batch:
    """The batch, whose actions had these log-probabilities f[B, L] when they were acted."""
    found = np.asarray(log_probability, np.float32)
    acting = dataclasses.replace(batch.rows.acting, log_probability=found)
    return dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, acting=acting))


def other_state(agent: Any, seed: int = 1) -> TrainState:
    """A random state whose parameters are not those of `parts.random_state`."""
    state, rng = parts.random_state(agent), np.random.default_rng(seed)
    moved = jax.tree.map(
        lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32), state.params
    )
    return dataclasses.replace(state, params=moved)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Returns the derivative of a loss by each of these numbers of each row, [T, B]."""

    log_probability: Any
    head: Any
    entropy: Any


jax.tree_util.register_dataclass(
    Weights, data_fields=["log_probability", "head", "entropy"], meta_fields=[]
)


@dataclasses.dataclass(frozen=True)
class Heard:
    """Holds what the network says of the rows after the burn-in, f64, and the rows themselves."""

    parameters: np.ndarray  # of the distributions: [T, B, P]
    head: np.ndarray  # [T + 1, B]
    mask: np.ndarray | None  # bool[T, B, A]
    rows: Row  # [T, B, ...]


def through(agent: Any, params: Any, batch: Batch, weights: Weights) -> Any:
    """(a sum that has these derivatives, (parameters, head)), in JAX; the burn-in is fixed."""
    net, burn_in = pg.body(agent), agent.burn_in
    inputs = common.transform_inputs(common.batch_inputs(batch), agent.reward)
    before, after = (common.window(inputs, *ends) for ends in ((0, burn_in), (burn_in, None)))
    carry = batch.carry
    if burn_in:
        _, carry = net.apply(jax.lax.stop_gradient(params), before, carry)
    features, _ = net.apply(params, after, carry)
    head = net.read(params, pg.VALUE, agent.value, features)
    parameters = net.read(params, pg.POLICY, agent.policy, features)[:-1]
    rows = common.window(common.time_major(batch.rows), burn_in, None)
    mask = common.allowed(rows.inputs, agent.spec)
    policy = agent.policy.distribution(parameters, agent.spec.action, mask)
    taken = rows.acting.draw if isinstance(rows.acting, pg.BoxActing) else rows.action
    total = (weights.log_probability * policy.log_probability(taken)).sum()
    total += (weights.head * head[:-1]).sum()
    total += (weights.entropy * policy.entropy(jax.random.PRNGKey(0))).sum()
    return total, (parameters, head)


class Chained:
    """The network of an agent, for losses whose derivatives by its outputs are known."""

    def __init__(self, agent: Any) -> None:
        self.agent = agent
        self.run = jax.jit(jax.grad(partial(through, agent), has_aux=True))

    def gradients(self, params: Any, batch: Batch, weights: Weights) -> Any:
        """The gradients of the parameters, by the chain rule."""
        as32 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights)
        return self.run(params, batch, as32)[0]

    def heard(self, params: Any, batch: Batch) -> Heard:
        nothing = np.zeros((self.agent.unroll, len(batch.importance)))
        weights = Weights(log_probability=nothing, head=nothing, entropy=nothing)
        parameters, head = self.run(params, batch, jax.tree.map(jnp.float32, weights))[1]
        rows = common.window(common.time_major(batch.rows), self.agent.burn_in, None)
        mask = common.allowed(rows.inputs, self.agent.spec)
        return Heard(
            parameters=np.asarray(parameters, np.float64),
            head=np.asarray(head, np.float64),
            mask=None if mask is None else np.asarray(mask),
            rows=jax.tree.map(np.asarray, rows),
        )


def log_probability(agent: Any, it: Heard, t: int, b: int) -> float:
    """ln pi of the action of a row, in float64."""
    own, spec = it.parameters[t, b].tolist(), agent.spec.action
    if isinstance(spec, BoxSpec):
        size, draw = len(spec.low), it.rows.acting.draw[t, b].astype(float).tolist()
        return formulas.box_log(draw, own[:size], own[size:], spec, agent.policy.squash)
    if isinstance(spec, MultiDiscreteSpec):
        total, begin = 0.0, 0
        for i, n in enumerate(spec.counts):
            logs = formulas.log_softmax(own[begin : begin + n], [True] * n)
            total, begin = total + logs[it.rows.action[t, b, i]], begin + n
        return total
    mask = [True] * len(own) if it.mask is None else it.mask[t, b]
    return formulas.log_softmax(own, mask)[it.rows.action[t, b]]


def entropy(agent: Any, it: Heard, t: int, b: int) -> float:
    """The entropy of a row's policy, in float64; not of squashed ones."""
    own, spec = it.parameters[t, b].tolist(), agent.spec.action
    if isinstance(spec, BoxSpec):
        return formulas.box_entropy(own[len(spec.low) :], spec)
    if isinstance(spec, MultiDiscreteSpec):
        ends = np.cumsum((0, *spec.counts))
        parted = itertools.pairwise(ends)
        each = [formulas.log_softmax(own[i:j], [True] * (j - i)) for i, j in parted]
        return sum(formulas.choice_entropy(logs) for logs in each)
    mask = [True] * len(own) if it.mask is None else it.mask[t, b]
    return formulas.choice_entropy(formulas.log_softmax(own, mask))


def h(x: float, epsilon: float | None) -> float:
    """R2D2's h; x itself where values are not rescaled."""
    if epsilon is None:
        return x
    return math.copysign(math.sqrt(abs(x) + 1) - 1, x) + epsilon * x


def inverse(y: float, epsilon: float | None) -> float:
    """The inverse of h, by bisection."""
    if epsilon is None:
        return y
    low, high = -1e3, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if h(middle, epsilon) < y else (low, middle)
    return (low + high) / 2


def norm(tree: Any) -> float:
    """The global norm of a tree, in float64."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return float(np.sqrt(sum(np.square(x).sum() for x in leaves)))
