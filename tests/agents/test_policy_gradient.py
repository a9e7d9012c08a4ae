"""The losses of A2C, PPO and IMPALA, and their gradients, equal float64 loops over the rows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx import trees
from rlx.agents import common
from rlx.agents import policy_gradient as pg
from rlx.agents.a2c import A2C
from rlx.agents.impala import Impala
from rlx.agents.minibatches import KL
from rlx.agents.ppo import PPO
from rlx.agents.running import Moments
from rlx.types import Batch, BoxSpec
from tests import parts
from tests.agents import actor_critics as small
from tests.agents.actor_critics import Chained, Heard, Weights

pytestmark = pytest.mark.usefixtures("quickly_compiled")

KEY = jax.random.PRNGKey(0)


# --- the oracle ----------------------------------------------------------------------------------


def between(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


@dataclasses.dataclass(frozen=True)
class Aims:
    """Holds what the rows [T, B] teach: advantages as they are used, and targets of the values."""

    advantage: np.ndarray
    target: np.ndarray
    value: np.ndarray  # [T + 1, B]


def aims(agent: Any, it: Heard, ratio: np.ndarray) -> Aims:
    """They are sums over later TD errors until the episode's end, which IMPALA weights."""
    rows, (length, size) = it.rows, it.rows.valid.shape
    value = np.vectorize(partial(small.inverse, epsilon=agent.rescale_epsilon))(it.head)
    off = isinstance(agent, Impala)
    rho, c = (
        np.minimum(most, ratio) for most in ((agent.most_rho, agent.most_c) if off else (1, 1))
    )
    if not off:
        rho, c = np.ones((2, length, size))
    decay = agent.trace_lambda if off else agent.gae_lambda
    sums, reward = np.zeros((length + 1, size)), rows.reward.astype(float)
    if agent.reward == "clip":
        reward = np.clip(reward, -1, 1)
    onward = agent.discount * rows.discount.astype(float)
    delta = reward + onward * value[1:] - value[:-1]
    for t, b in itertools.product(range(length), range(size)):
        k, factor = t, 1.0
        while k < length and rows.valid[k, b]:
            sums[t, b] += factor * rho[k, b] * delta[k, b]
            factor *= decay * onward[k, b] * c[k, b]
            k += 1
    target = value[:-1] + sums[:-1]
    advantage = sums[:-1]
    if off:  # r + gamma v_{t+1} - V(x_t)
        advantage = reward + onward * (value[1:] + sums[1:]) - value[:-1]
    if agent.normalize_advantage:
        valid = advantage[rows.valid]
        advantage = (advantage - valid.mean()) / valid.std()
    return Aims(advantage=advantage, target=target, value=value)


def clipped(ratio: float, advantage: float, limit: float) -> tuple[float, float]:
    """(PPO's objective of a row, its derivative by ln pi)."""
    plain, near = ratio * advantage, between(ratio, 1 - limit, 1 + limit) * advantage
    return (plain, plain) if plain <= near else (near, 0.0)


def gain(agent: Any, log: float, ratio: float, advantage: float, limit: Any) -> Any:
    """(what the policy's loss has of a row, its derivative by ln pi)."""
    if limit is not None:
        return clipped(ratio, advantage, limit)
    factor = min(agent.most_rho, ratio) if isinstance(agent, Impala) else 1.0
    return factor * advantage * log, factor * advantage


def value_loss(agent: Any, head: float, first: float, target: float) -> tuple[float, float]:
    """(half the squared error of a row, its derivative by the head's output)."""
    aim, most = small.h(target, agent.rescale_epsilon), getattr(agent, "value_clip", None)
    plain = (0.5 * (head - aim) ** 2, head - aim)
    if most is None:
        return plain
    near = first + between(head - first, -most, most)
    other = (0.5 * (near - aim) ** 2, near - aim if abs(head - first) < most else 0.0)
    return max(plain, other, key=lambda pair: pair[0])


def expected(agent: Any, now: Heard, first: Heard, progress: float) -> tuple[dict, Weights]:
    """(metrics, derivatives by what the network says now); first: what it said at the start."""
    rows, shape = now.rows, now.rows.valid.shape
    cells = list(itertools.product(*map(range, shape)))
    log = np.asarray([small.log_probability(agent, now, t, b) for t, b in cells]).reshape(shape)
    ratio = np.exp(log - rows.acting.log_probability.astype(float))
    own, limit = aims(agent, first, ratio), getattr(agent, "clip", None)
    if getattr(agent, "final_clip", None) is not None:
        limit = (1 - progress) * agent.clip + progress * agent.final_clip
    bonus = agent.entropy
    if agent.final_entropy is not None:
        bonus = (1 - progress) * agent.entropy + progress * agent.final_entropy
    by_log, by_head, by_entropy = np.zeros((3, *shape))
    total, count = dict.fromkeys(("policy", "value", "entropy", "kl", "clipped"), 0.0), 0
    for t, b in cells:
        if not rows.valid[t, b]:
            continue
        count += 1
        advantage, r = own.advantage[t, b], ratio[t, b]
        won, by_log[t, b] = gain(agent, log[t, b], r, advantage, limit)
        lost, by_head[t, b] = value_loss(agent, now.head[t, b], first.head[t, b], own.target[t, b])
        by_entropy[t, b] = -bonus
        total["policy"] -= won
        total["value"] += lost
        total["entropy"] += small.entropy(agent, now, t, b)
        total["kl"] += r - 1 - math.log(r)
        total["clipped"] += limit is not None and won < r * advantage
    told = {name: x / count for name, x in total.items()}
    told["loss"] = told["policy"] + agent.value_coefficient * told["value"]
    told["loss"] -= bonus * told["entropy"]
    told["value_mean"] = own.value[:-1][rows.valid].mean()
    told["ratio_error"] = np.abs(ratio[rows.valid] - 1).max()
    weights = Weights(
        log_probability=-by_log / count,
        head=agent.value_coefficient * by_head / count,
        entropy=by_entropy / count,
    )
    return told, weights


# --- losses --------------------------------------------------------------------------------------


def whole(agent: Any, state: Any, batch: Batch, params: Any) -> Any:
    """((loss, metrics), gradients) of the agent; PPO's epochs have come to these parameters."""
    read, _ = pg.read(agent, state, batch, None)

    def loss(params: Any) -> Any:
        if not isinstance(agent, PPO):
            return agent.loss(params, read, KEY, None)
        learnt, told = agent.learnt(state.params, read, None)
        total, metrics = agent.loss(params, learnt, read.core, KEY, read.progress, None)
        return total, {**told, **metrics}

    return jax.value_and_grad(loss, has_aux=True)(params)


ENDS = {"decay_env_steps": 100, "final_entropy": 0.3}
CASES = [
    (A2C, parts.MASKED, "lstm", {}),
    (A2C, small.WIDE, "none", {"normalize_advantage": True, "separate_critic": True}),
    (A2C, parts.CHOICES, "none", {"rescale_epsilon": 1e-2, "reward": "clip", **ENDS}),
    (Impala, parts.MASKED, "lstm", {"most_rho": 1.2, "most_c": 0.8, "trace_lambda": 0.9}),
    (Impala, small.WIDE, "none", {"clip": 0.2, "normalize_advantage": True, "burn_in": 0}),
    (Impala, parts.BOX, "lstm", {"entropy": 0.0, "separate_critic": True, "most_rho": 3.0}),
    (PPO, parts.MASKED, "lstm", {"separate_critic": True}),
    (PPO, small.WIDE, "none", {"value_clip": 0.1, "normalize_advantage": True}),
    (PPO, parts.CHOICES, "gru", {"final_clip": 0.05, "rescale_epsilon": 1e-2, **ENDS}),
]


def named(case: Any) -> str:
    return case.__name__ if isinstance(case, type) else ""


@pytest.mark.parametrize(("cls", "spec", "core", "changes"), CASES, ids=named)
def test_losses_and_gradients_equal_the_float64_oracle(cls, spec, core, changes):
    squash = spec is parts.BOX
    agent = small.made(
        cls, parts.network(spec, core), policy=small.policy(squash=squash), **changes
    )
    state, chained = parts.random_state(agent), Chained(agent)
    params = small.other_state(agent).params if cls is PPO else state.params
    batch = small.batch(agent, 8, env_steps=25 if "decay_env_steps" in changes else None)
    first = chained.heard(state.params, batch)
    batch = acted(agent, batch, first)
    (loss, told), gradients = jax.jit(partial(whole, agent))(state, batch, params)
    now = chained.heard(params, batch)
    known, weights = expected(agent, now, dataclasses.replace(first, rows=now.rows), 0.25)
    valid = now.rows.valid
    assert 0.5 < valid.mean() < 1
    assert (now.rows.discount[valid] == 0).any()
    assert loss == pytest.approx(known["loss"], rel=2e-4, abs=1e-5)
    names = ["policy_loss", "value_loss"] + ["entropy"] * (not squash)
    for name in names:
        at = known[name.removesuffix("_loss")]
        assert told[f"learner/{name}"] == pytest.approx(at, rel=2e-4, abs=1e-5)
    assert told["learner/value_mean"] == pytest.approx(known["value_mean"], rel=1e-4)
    if cls is not A2C:
        assert told[KL] == pytest.approx(known["kl"], rel=1e-3)
    if cls is PPO:
        assert told["learner/clipped"] == pytest.approx(known["clipped"])
        assert 0.1 < known["clipped"] < 0.9
    else:
        assert told["learner/ratio_error"] == pytest.approx(known["ratio_error"], rel=1e-3)
    by_chain = chained.gradients(params, batch, weights)
    scale = small.norm(by_chain)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=3e-4 * scale),
        gradients,
        by_chain,
    )


def acted(agent: Any, batch: Batch, it: Heard, spread: float = 0.4) -> Batch:
    """The batch of actors whose probabilities were somewhat other ones."""
    shape, logs = it.rows.valid.shape, np.zeros(batch.rows.valid.shape)
    for t, b in itertools.product(*map(range, shape)):
        logs[b, t + agent.burn_in] = small.log_probability(agent, it, t, b)
    return small.with_acting(
        batch, logs + spread * np.random.default_rng(9).normal(size=logs.shape)
    )


@pytest.mark.parametrize("separate", [True, False])
def test_only_a_shared_body_learns_from_the_values_and_no_burn_in_has_a_gradient(separate):
    agent = small.made(A2C, parts.network(parts.MASKED), separate_critic=separate)
    batch, state = small.batch(agent, 4), parts.random_state(agent)
    read, _ = pg.read(agent, state, batch, None)

    def value(params: Any) -> Any:
        return pg.outputs(agent, params, read.inputs, read.core, 3, 5)[1].sum()

    grads = jax.jit(jax.grad(value))(state.params)
    if separate:
        assert small.norm(grads["actor"]) == 0
        assert small.norm(grads["critic"]) > 0
    else:
        assert small.norm(grads["policy"]) == 0
        assert small.norm(grads["core"]) > 0


# --- acting and learning -------------------------------------------------------------------------


def play(agent: Any, params: Any, batch: Batch, exploration: float = 1.0) -> Batch:
    """The batch with actions, and what is kept of them, as the agent acts on its inputs."""
    rows, carry, kept = batch.rows, batch.carry, []
    inputs = jax.tree.map(np.array, parts.all_inputs(batch))
    act, size = jax.jit(agent.act), len(batch.importance)
    none = np.asarray(agent.spec.action.none)
    for t in range(rows.valid.shape[1]):
        row = trees.tree_map(lambda x, t=t: x[:, t], inputs)
        amount = np.full(size, exploration, np.float32)
        action, acting, carry = act(params, row, carry, jax.random.PRNGKey(t), amount)
        kept.append(jax.tree.map(np.asarray, (action, acting)))
        first = inputs.first[:, t + 1].reshape(-1, *[1] * (inputs.prev_action.ndim - 2))
        inputs.prev_action[:, t + 1] = np.where(first, none, kept[-1][0])
    action, acting = jax.tree.map(lambda *x: np.stack(x, axis=1), *kept)
    own = trees.tree_map(lambda x: x[:, :-1], inputs)
    rows = dataclasses.replace(rows, inputs=own, action=action, acting=acting)
    after = trees.tree_map(lambda x: x[:, -1], inputs)
    return dataclasses.replace(batch, rows=rows, next=after)


PLAYED = [
    (A2C, parts.MASKED, "lstm", {"separate_critic": True}),
    (PPO, small.WIDE, "none", {}),
    (Impala, parts.CHOICES, "none", {}),
]


@pytest.mark.parametrize(("cls", "spec", "core", "changes"), PLAYED, ids=named)
def test_the_ratio_is_1_in_the_first_epoch(cls, spec, core, changes):
    """The learner reads rows as they were acted on: masks, draws, carries and statistics."""
    changes = {**changes, "normalize_observation": True, "normalize_reward": True}
    agent = small.made(cls, parts.network(spec, core), policy=small.policy(squash=True), **changes)
    state, batch = parts.random_state(agent), small.batch(agent, 6)
    state = dataclasses.replace(state, statistics=seen_before(state.statistics))
    batch = play(agent, agent.acting_params(state), batch)
    _, output = jax.jit(agent.update)(state, batch)
    assert output.metrics["learner/ratio_error"] < 2e-5
    if isinstance(spec.action, BoxSpec):
        low, high = np.asarray(spec.action.low), np.asarray(spec.action.high)
        assert ((batch.rows.action >= low) & (batch.rows.action <= high)).all()
    if spec.action_mask is not None:
        allowed = np.asarray(common.allowed(batch.rows.inputs, spec))
        assert np.take_along_axis(allowed, batch.rows.action[..., None], -1).all()
    state = dataclasses.replace(state, statistics=seen_before(state.statistics, by=3.0))
    _, output = jax.jit(agent.update)(state, batch)
    assert output.metrics["learner/ratio_error"] > 1e-2


def seen_before(statistics: Any, by: float = 1.0) -> Any:
    """Statistics of 50 rows of variance 4, whose mean is 0.3 times `by`."""

    def moments(one: Moments) -> Moments:
        return Moments(
            count=np.float32(50),
            mean=np.full_like(one.mean, 0.3 * by),
            spread=np.full_like(one.spread, 200),
        )

    return jax.tree.map(moments, statistics, is_leaf=lambda x: isinstance(x, Moments))


def test_evaluations_take_the_mode():
    agent = small.made(A2C, parts.network(small.WIDE, "none"), burn_in=0)
    state, batch = parts.random_state(agent), small.batch(agent, 6)
    params = agent.acting_params(state)
    rows = play(agent, params, batch, exploration=0.0).rows
    heard = Chained(agent).heard(state.params, dataclasses.replace(batch, rows=rows))
    first = heard.parameters[0, :, :2]
    np.testing.assert_allclose(
        rows.action[:, 0], small.boxed(small.WIDE.action, first, False), atol=1e-4
    )


# --- schedules, devices --------------------------------------------------------------------------


def test_progress_goes_on_to_1_and_never_back():
    agent = small.made(A2C, parts.network(core="none"), burn_in=0, **ENDS)
    state, found = parts.random_state(agent), []
    for env_steps in (0, 30, 20, 250, 3):  # a count of 2^32 begins anew
        read, state = pg.read(agent, state, small.batch(agent, 2, env_steps=env_steps), None)
        found.append(float(read.progress))
    np.testing.assert_allclose(found, [0, 0.3, 0.3, 1, 1], rtol=1e-6)
    assert pg.scheduled(0.5, None, read.progress) == 0.5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"final_entropy": 0.1}, "say when by agent.decay_env_steps"),
        ({"decay_env_steps": 9}, "leads to nothing"),
        ({"policy": small.policy(squash=True)}, "no bounds to lie between"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, says):
    endless = BoxSpec(shape=(1,), low=(-math.inf,), high=(0.0,))
    net = parts.network(dataclasses.replace(parts.BOX, action=endless))
    with pytest.raises(ValueError, match=says):
        small.made(A2C, net, **changes)


@pytest.mark.parametrize("cls", [A2C, Impala])
def test_two_devices_make_of_their_halves_what_one_makes_of_the_whole(cls):
    agent = small.made(
        cls,
        parts.network(parts.MASKED, "none"),
        normalize_advantage=True,
        normalize_observation=True,
        normalize_reward=True,
        **ENDS,
    )
    state, batch = parts.random_state(agent), small.batch(agent, 8, env_steps=40)
    rows = batch.rows
    few = rows.valid & ((np.arange(8) < 4)[:, None] | (np.arange(8) % 3 == 0)[None])
    batch = dataclasses.replace(batch, rows=dataclasses.replace(rows, valid=few))
    batch = small.with_acting(batch, np.full(few.shape, -1.4))
    one, told = jax.jit(agent.update)(state, batch)
    halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
    update = partial(agent.update, axis_name="devices")
    two, told_two = jax.jit(jax.vmap(update, in_axes=(None, 0), axis_name="devices"))(state, halves)
    counts = few[:, agent.burn_in :].reshape(2, -1).sum(axis=1)
    assert counts[0] > 1.5 * counts[1]
    for device in range(2):
        mine = jax.tree.map(lambda x, d=device: x[d], two)
        for name in ("params", "opt_state", "statistics"):
            close(getattr(mine, name), getattr(one, name))
        close(told_two.metrics["learner/loss"][device], told.metrics["learner/loss"])
        close(told_two.metrics["learner/entropy"][device], told.metrics["learner/entropy"])


def close(x: Any, y: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), x, y)


@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_a_ratio_that_float32_has_not_leaves_numbers(advantage):
    """A ratio of e^200 is infinite in float32, and inf * 0 was its gradient beyond the clip."""

    def gain(log_ratio: Any) -> Any:
        return pg.clipped_gain(log_ratio, jnp.float32(advantage), 0.2)[0]

    value, slope = jax.value_and_grad(gain)(jnp.float32(200.0))
    assert np.isfinite([value, slope]).all()
    assert slope == 0
    assert np.isfinite(pg.divergence(jnp.float32(200.0), lambda x: x))


def test_an_update_is_a_step_of_the_optimiser_along_the_gradient():
    agent = small.made(A2C, parts.network(core="none"), burn_in=0)
    state, batch = parts.random_state(agent), small.batch(agent, 4)
    after, output = jax.jit(agent.update)(state, batch)
    (loss, _), grads = jax.jit(partial(whole, agent))(state, batch, state.params)
    expected = jax.tree.map(  # Adam's first one
        lambda x, g: x - 1e-3 * g / (jnp.abs(g) + 1e-3), state.params, grads
    )
    close(after.params, expected)
    assert output.metrics["learner/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert output.metrics["learner/grad_norm"] == pytest.approx(small.norm(grads), rel=1e-4)
    assert (int(after.updates), int(after.gradient_steps)) == (1, 1)
    assert not np.array_equal(after.key, state.key)
