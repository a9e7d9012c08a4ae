"""SAC's three losses, their gradients and its priorities equal float64 loops over the rows."""

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

from rlx.agents import common, sac
from rlx.agents.sac import SAC
from rlx.networks.policies import ActionValue
from rlx.types import Batch, BoxSpec, QActing
from tests import parts
from tests.agents import actor_critics as small
from tests.networks import formulas

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def made(net: Any, **changes: Any) -> SAC:
    settings: dict[str, Any] = {
        "burn_in": 2,
        "unroll": 4,
        "n_step": 2,
        "stride": None,
        "block_rows": 4 if net.is_recurrent else 1,
        "discount": 0.9,
        "reward": "raw",
        "normalize_observation": False,
        "stored_state": True,
        "separate_critic": True,
        "temperature": 0.3,
        "learn_temperature": True,
        "target_entropy": None,
        "target_rate": 0.25,
        "noise_correlation": 0.0,
        "policy": small.policy(squash=True),
        "critic": ActionValue(layers=(8,), activation="tanh", layer_norm=False),
        "actor_optimizer": small.Plainly(),
        "critic_optimizer": small.Plainly(),
        "temperature_optimizer": small.Plainly(),
        "network": net,
        "spec": net.spec,
    }
    return SAC(**settings | changes)


def random_state(agent: SAC) -> Any:
    """A state of random parameters at the agent's own first temperature."""
    state = parts.random_state(agent)
    params = {**state.params, "log_temperature": np.float32(math.log(agent.temperature))}
    return dataclasses.replace(state, params=params)


# --- the oracle ----------------------------------------------------------------------------------


def through(agent: SAC, params: Any, target: Any, batch: Batch, key: Any, weights: Any) -> Any:
    """(a sum with the losses' derivatives, what the networks say), in JAX.

    weights: the derivatives f32[T, B] by each critic's value of the action taken, and by what the
    actor minimises.
    """
    net, inputs = agent.body, common.transform_inputs(common.batch_inputs(batch), agent.reward)
    network, alpha = params["network"], jnp.exp(jax.lax.stop_gradient(params["log_temperature"]))

    def features(network: Any) -> Any:
        before, after = inputs, inputs
        carry = batch.carry
        if agent.burn_in:
            before = common.window(inputs, 0, agent.burn_in)
            after = common.window(inputs, agent.burn_in, None)
            _, carry = net.apply(jax.lax.stop_gradient(network), before, carry)
        return net.apply(network, after, carry)[0]

    seen, fixed = features(network), jax.lax.stop_gradient(features(network))
    parameters = net.read(network, "policy", agent.policy, seen if agent.separate_critic else fixed)
    mask = common.allowed(common.window(inputs, agent.burn_in, None), agent.spec)
    policy = agent.policy.distribution(parameters, agent.spec.action, mask)
    draw = jax.lax.stop_gradient(policy.draw(key))

    def critics(network: Any, features: Any, action: Any) -> Any:
        return [net.read(network, name, agent.critic, features, action) for name in sac.CRITICS]

    trained = common.window(seen, 0, agent.unroll)
    action = batch.rows.action.swapaxes(0, 1)[agent.burn_in :][: agent.unroll]
    now = critics(network, trained, action)
    if agent.spec.action == parts.MASKED.action:
        now = [common.take_action(q, action) for q in now]
        moving, odds = draw, policy.log_probabilities()
    else:  # a = mean + deviation * noise
        noise = jax.lax.stop_gradient((draw - policy.mean) / jnp.exp(policy.log_deviation))
        moving = policy.mean + jnp.exp(policy.log_deviation) * noise
        odds = policy.log_probability(moving)
    own = critics(jax.lax.stop_gradient(network), fixed, policy.action(moving))
    cost = alpha * odds - jnp.minimum(*own)
    if odds.ndim > 2:
        cost = (jnp.exp(odds) * jnp.where(odds < -1e30, 0.0, cost)).sum(axis=-1)
    total = sum((w * q).sum() for w, q in zip(weights, [*now, cost[: agent.unroll]], strict=True))
    after = critics(target, features(target), policy.action(draw))
    told = {"parameters": parameters, "draw": draw, "now": now, "own": own, "after": after}
    return total, {**told, "mask": jnp.ones((1,), bool) if mask is None else mask}


@dataclasses.dataclass
class Known:
    """The losses, and the derivatives that `through` needs."""

    critic: float
    actor: float
    entropy: float
    total: float
    by_temperature: float
    weights: Any
    td: np.ndarray  # [B, T], -1 where not valid


def soft(agent: SAC, it: Any, alpha: float, critics: Any, t: int, b: int) -> tuple[float, float]:
    """(the soft value of x_t by these critics, the entropy or an estimate of it)."""
    least = np.minimum(*(q[t, b] for q in critics))
    own, spec = it["parameters"][t, b].tolist(), agent.spec.action
    if isinstance(spec, BoxSpec):
        size = len(spec.low)
        log = formulas.box_log(it["draw"][t, b].tolist(), own[:size], own[size:], spec, True)
        return least - alpha * log, -log
    logs = formulas.log_softmax(own, it["mask"][t, b])
    pairs = [(q, x) for q, x in zip(least, logs, strict=True) if x > -math.inf]
    value = sum(math.exp(x) * (q - alpha * x) for q, x in pairs)
    return value, formulas.choice_entropy(logs)


def aim(agent: SAC, it: Any, rows: Any, alpha: float, t: int, b: int) -> float:
    """n rewards, or those until the episode's last observation, and the soft value of there."""
    total, factor, k = 0.0, 1.0, t
    while k < t + agent.n_step and rows.valid[k, b]:
        reward = float(rows.reward[k, b])
        reward = min(1, max(-1, reward)) if agent.reward == "clip" else reward
        total += factor * reward
        factor *= agent.discount * float(rows.discount[k, b])
        k += 1
    return total + factor * soft(agent, it, alpha, it["after"], k, b)[0]


def wanted(agent: SAC, it: Any, t: int, b: int) -> float:
    """The entropy that a row should have: less of it where fewer actions are allowed."""
    if agent.spec.action_mask is None or agent.target_entropy is not None:
        return agent.aimed_entropy()
    return 0.7 * math.log(it["mask"][t, b].sum())


def known(agent: SAC, it: Any, batch: Batch, log_temperature: float) -> Known:
    """Critics learn a mean over sequences of means over rows; the others one over all rows."""
    rows = common.window(common.time_major(batch.rows), agent.burn_in, None)
    alpha, size, shape = math.exp(log_temperature), len(batch.importance), it["now"][0].shape
    losses, weights, td = np.zeros(size), np.zeros((3, *shape)), np.full(shape, -1.0)
    valid, costs, entropies, gaps = rows.valid[: agent.unroll], [], [], []
    for b, t in itertools.product(range(size), range(agent.unroll)):
        if not valid[t, b]:
            continue
        to, count = aim(agent, it, rows, alpha, t, b), valid[:, b].sum()
        errors = [q[t, b] - to for q in it["now"]]
        losses[b] += sum(e**2 / 2 for e in errors) / count
        td[t, b] = sum(map(abs, errors)) / 2
        value, entropy = soft(agent, it, alpha, it["own"], t, b)
        costs.append(-value)
        entropies.append(entropy)
        gaps.append(entropy - wanted(agent, it, t, b))
        weights[:2, t, b] = np.asarray(errors) * batch.importance[b] / count / size
        weights[2, t, b] = 1 / valid.sum()
    critic, actor = float((batch.importance * losses).mean()), float(np.mean(costs))
    gap = float(np.mean(gaps)) if agent.learn_temperature else 0.0
    return Known(
        critic=critic,
        actor=actor,
        entropy=float(np.mean(entropies)),
        total=critic + actor + log_temperature * gap,
        by_temperature=gap,
        weights=jnp.asarray(weights, jnp.float32),
        td=td.T,
    )


CASES = [
    (small.WIDE, "none", {"n_step": 1, "burn_in": 0}),
    (small.WIDE, "lstm", {"n_step": 3, "separate_critic": False}),
    (parts.MASKED, "lstm", {}),
    (
        parts.MASKED,
        "none",
        {"separate_critic": False, "learn_temperature": False, "reward": "clip", "burn_in": 0},
    ),
]


@pytest.mark.parametrize(("spec", "core", "changes"), CASES)
def test_losses_gradients_and_priorities_equal_the_float64_oracle(spec, core, changes):
    agent = made(parts.network(spec, core), **changes)
    state, batch = random_state(agent), small.batch(agent, 8)
    chained = jax.jit(jax.grad(partial(through, agent), has_aux=True))
    key, nothing = jax.random.split(state.key)[0], jnp.zeros((3, agent.unroll, 8))
    said = chained(state.params, state.target_params, batch, key, nothing)[1]
    it = jax.tree.map(lambda x: np.asarray(x, float if x.dtype != bool else bool), said)
    expected = known(agent, it, batch, float(state.params["log_temperature"]))
    update = jax.jit(agent.update)
    after, output = update(state, batch)
    told = output.metrics
    assert told["learner/critic_loss"] == pytest.approx(expected.critic, rel=1e-4)
    assert told["learner/actor_loss"] == pytest.approx(expected.actor, rel=1e-4)
    assert told["learner/entropy"] == pytest.approx(expected.entropy, rel=1e-4)
    assert told["learner/loss"] == pytest.approx(expected.total, rel=1e-4)
    assert told["learner/temperature"] == pytest.approx(0.3)
    np.testing.assert_allclose(output.priorities, expected.td, rtol=1e-4, atol=1e-4)
    by_chain = chained(state.params, state.target_params, batch, key, expected.weights)[0]
    by_chain["log_temperature"] = expected.by_temperature
    moved = jax.tree.map(lambda old, new: np.asarray(old) - new, state.params, after.params)
    scale = 3e-4 * small.norm(by_chain)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=scale), moved, by_chain
    )
    critics = agent.parts(after.params)["critic"]
    target = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, state.target_params, critics)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), after.target_params, target
    )
    no_errors, _ = update(state, dataclasses.replace(batch, importance=0 * batch.importance))
    assert_the_actor_alone_moved(agent, state, no_errors, after)


def assert_the_actor_alone_moved(agent: SAC, before: Any, without: Any, after: Any) -> None:
    """Without the critics' errors they stay, and the shared body, and the others move as before."""
    was, now, then = (agent.parts(state.params) for state in (before, without, after))
    jax.tree.map(np.testing.assert_array_equal, now["critic"], was["critic"])
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), now["actor"], then["actor"]
    )
    assert small.norm(jax.tree.map(lambda a, b: a - b, now["actor"], was["actor"])) > 0
    assert now["temperature"] == then["temperature"]
    assert (now["temperature"] != was["temperature"]) == agent.learn_temperature


# --- temperature ---------------------------------------------------------------------------------


def test_the_entropy_aimed_at():
    """It is -size in units in which the bounds are -1 and 1: of wider ones it is larger."""
    assert made(parts.network(parts.BOX)).aimed_entropy() == -2
    wide = made(parts.network(small.WIDE))
    assert wide.aimed_entropy() == pytest.approx(math.log(2.5) + math.log(0.25) - 2)
    choice = made(parts.network(parts.MASKED))
    assert choice.aimed_entropy() == pytest.approx(0.7 * math.log(4))
    mask = jnp.asarray([[True, False, True, False], [False, True, False, False]])
    np.testing.assert_allclose(choice.aimed_entropy(mask), [0.7 * math.log(2), 0], rtol=1e-6)
    assert made(parts.network(small.WIDE), target_entropy=-0.4).aimed_entropy() == -0.4


def test_a_sequence_without_a_valid_row_does_not_move_the_temperature():
    """Uniform replay draws such ones; half of the sequences are, and the step is that of the rest.

    Their entropy once was a 0 in the mean that is compared with the target.
    """
    agent = made(parts.network(parts.VECTOR, "none"), unroll=1, n_step=1, burn_in=0)
    state, batch = random_state(agent), small.batch(agent, 8)
    valid, update = np.arange(8)[:, None] % 2 == 0, jax.jit(agent.update)

    def gap(batch: Batch) -> float:
        after, _ = update(state, batch)
        return float(state.params["log_temperature"] - after.params["log_temperature"])

    some = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, valid=valid))
    twice = jax.tree.map(lambda x: np.repeat(x[::2], 2, axis=0), some)
    assert gap(some) == pytest.approx(gap(twice), rel=1e-4)


# --- acting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [small.WIDE, parts.MASKED], ids=lambda spec: spec.id)
def test_acting_keeps_the_least_value_of_the_action_and_the_soft_value_of_the_state(spec):
    agent = made(parts.network(spec, "none"), burn_in=0)
    state, batch = random_state(agent), small.batch(agent, 32)
    inputs = jax.tree.map(lambda x: x[:, 0], batch.rows.inputs)
    params, exploring = agent.acting_params(state), np.ones(32, np.float32)
    carry = agent.initial_carry(32)
    action, kept, _ = jax.jit(agent.act)(params, inputs, carry, jax.random.PRNGKey(1), exploring)
    features, _ = agent.body.apply(state.params["network"], common.add_time(inputs), carry)
    q = [
        agent.values_of(state.params["network"], n, features, action[None])[0] for n in sac.CRITICS
    ]
    own = agent.body.read(state.params["network"], "policy", agent.policy, features)[0]
    it = {"parameters": np.asarray(own, float)[None], "mask": None}
    if isinstance(spec.action, BoxSpec):
        low, high = np.asarray(spec.action.low), np.asarray(spec.action.high)
        assert ((np.asarray(action) >= low) & (np.asarray(action) <= high)).all()
        unit = 2 * (np.asarray(action, float) - low) / (high - low) - 1
        it["draw"] = np.arctanh(np.clip(unit, -1 + 1e-7, 1 - 1e-7))[None]
        near = (np.abs(unit) < 0.99).all(axis=-1)  # where its draw can be read off
    else:
        it["mask"] = np.asarray(common.allowed(inputs, spec))[None]
        assert np.take_along_axis(it["mask"][0], np.asarray(action)[:, None], -1).all()
        near = np.ones(32, bool)
    assert near.sum() > 8
    critics = [np.asarray(one, float)[None] for one in q]
    for b in np.flatnonzero(near):
        value, _ = soft(agent, it, agent.temperature, critics, 0, b)
        least = np.minimum(*(one[0, b] for one in critics))
        least = least if isinstance(spec.action, BoxSpec) else least[action[b]]
        assert kept.q[b] == pytest.approx(least, rel=1e-4, abs=1e-5)
        assert kept.q_max[b] == pytest.approx(value, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("core", ["none", "lstm"])
def test_noise_hangs_together_within_an_episode_and_is_standard_normal(core):
    """A draw of the policy at each row; after the first row of an episode nothing is left."""
    c, lanes = 0.8, 4000
    agent = made(parts.network(parts.BOX, core), burn_in=0, noise_correlation=c)
    params = agent.acting_params(random_state(agent))
    carry, noise = agent.initial_carry(lanes), []
    exploring, act = np.ones(lanes, np.float32), jax.jit(agent.act)
    one = jax.tree.map(lambda x: x[:1, 0], small.batch(agent, 1).rows.inputs)
    for t in range(4):
        first = np.full(lanes, t in (0, 3))
        inputs = jax.tree.map(lambda x: np.repeat(x, lanes, axis=0), one)
        inputs = dataclasses.replace(inputs, first=first)
        action, _, after = act(params, inputs, carry, jax.random.PRNGKey(t), exploring)
        bare = dataclasses.replace(carry, core=carry.core["body"])
        noise.append(noise_of(agent, params, inputs, bare, action))
        np.testing.assert_allclose(noise[-1], after.core["noise"], atol=2e-2)
        carry = after
    for own in noise:
        np.testing.assert_allclose(own.mean(axis=0), 0, atol=0.06)  # 4 deviations
        np.testing.assert_allclose(own.std(axis=0), 1, atol=0.05)

    def found(s: int, t: int) -> float:
        return np.corrcoef(noise[s][:, 0], noise[t][:, 0])[0, 1]

    assert [found(0, 1), found(1, 2), found(0, 2)] == pytest.approx([c, c, c * c], abs=0.04)
    assert found(2, 3) == pytest.approx(0, abs=0.06)
    assert np.corrcoef(noise[1].T)[0, 1] == pytest.approx(0, abs=0.06)  # the box's two elements


def noise_of(agent: SAC, params: Any, inputs: Any, carry: Any, action: Any) -> np.ndarray:
    """The noise of actions: a = tanh(mean + deviation * noise) in units of the bounds."""
    network = params["network"]
    features, _ = agent.body.apply(network, common.add_time(inputs), carry)
    own = np.asarray(agent.body.read(network, "policy", agent.policy, features)[0], float)
    low, high = np.asarray(agent.spec.action.low), np.asarray(agent.spec.action.high)
    unit = 2 * (np.asarray(action, float) - low) / (high - low) - 1
    mean, log_deviation = np.split(own, 2, axis=-1)
    return (np.arctanh(np.clip(unit, -1 + 1e-7, 1 - 1e-7)) - mean) / np.exp(log_deviation)


def test_the_mode_is_played_without_noise_and_the_learner_does_not_read_it():
    plain = made(parts.network(parts.BOX, "lstm"))
    agent = dataclasses.replace(plain, noise_correlation=0.8)
    state, batch = random_state(plain), small.batch(plain, 4)
    noisy = dataclasses.replace(
        batch, carry=sac.with_noise(batch.carry, np.ones((4, 2), np.float32))
    )
    (one, told), (two, same) = plain.update(state, batch), agent.update(state, noisy)
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    np.testing.assert_array_equal(told.priorities, same.priorities)
    inputs, key = jax.tree.map(lambda x: x[:, 0], batch.rows.inputs), jax.random.PRNGKey(0)
    params, never = plain.acting_params(state), np.zeros(4, np.float32)
    action, _, _ = plain.act(params, inputs, batch.carry, key, never)
    other, _, _ = agent.act(params, inputs, noisy.carry, key, never)
    np.testing.assert_array_equal(action, other)


@pytest.mark.parametrize("n_step", [1, 3])
def test_first_priorities_equal_a_loop(n_step):
    agent = made(parts.network(parts.MASKED), n_step=n_step, reward="clip")
    batch, rng = small.batch(agent, 16), np.random.default_rng(5)
    size, length = batch.rows.valid.shape
    numbers = rng.normal(size=(2, size, length + 1)).astype(np.float32)
    rows = jax.tree.map(lambda x: np.concatenate([x, x[:, -1:]], axis=1), batch.rows)
    rows = dataclasses.replace(rows, acting=QActing(q=numbers[0], q_max=numbers[1]))
    found, expected = agent.initial_priorities(rows), np.full((size, agent.unroll), -1.0)
    for b, t in itertools.product(range(size), range(agent.unroll)):
        total, factor, k = 0.0, 1.0, t + agent.burn_in
        if not rows.valid[b, k]:
            continue
        begin = k
        while k < begin + n_step and rows.valid[b, k]:
            total += factor * min(1.0, max(-1.0, float(rows.reward[b, k])))
            factor *= agent.discount * float(rows.discount[b, k])
            k += 1
        expected[b, t] = abs(total + factor * numbers[1, b, k] - numbers[0, b, begin])
    np.testing.assert_allclose(found, expected, atol=1e-5)


# --- devices, settings ---------------------------------------------------------------------------


def over_devices(agent: SAC, state: Any, halves: Any) -> Any:
    update = partial(agent.update, axis_name="devices")
    return jax.jit(jax.vmap(update, in_axes=(None, 0), axis_name="devices"))(state, halves)


def test_two_devices_make_of_their_halves_what_one_makes_of_the_whole():
    """Nothing is drawn of discrete actions, so all is the same."""
    agent = made(parts.network(parts.MASKED, "none"), burn_in=0, normalize_observation=True)
    state, batch = random_state(agent), small.batch(agent, 8)
    one, told = jax.jit(agent.update)(state, batch)
    halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
    two, told_two = over_devices(agent, state, halves)
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-6)
    for device in range(2):
        mine = jax.tree.map(lambda x, d=device: x[d], two)
        for name in ("params", "target_params", "statistics"):
            jax.tree.map(close, getattr(mine, name), getattr(one, name))
        own = {name: x[device] for name, x in told_two.metrics.items()}
        close(own["learner/actor_loss"], told.metrics["learner/actor_loss"])
        close(own["learner/loss"], told.metrics["learner/loss"])
    close(told_two.priorities.reshape(8, -1), told.priorities)


def test_each_device_draws_for_its_own_share():
    agent = made(parts.network(small.WIDE, "none"), burn_in=0)
    state, batch = random_state(agent), small.batch(agent, 4)
    same = jax.tree.map(lambda x: np.stack([x, x]), batch)
    _, told = over_devices(agent, state, same)
    assert not np.allclose(told.priorities[0], told.priorities[1])


@pytest.mark.parametrize(
    ("spec", "changes", "says"),
    [
        (parts.CHOICES, {}, "acts with one discrete action or with real numbers"),
        (parts.BOX, {"policy": small.policy(squash=False)}, "set it to true"),
        (parts.MASKED, {"noise_correlation": 0.5}, "has no noise to correlate; set it to 0.0"),
        (
            dataclasses.replace(
                parts.BOX, action=BoxSpec(shape=(1,), low=(-math.inf,), high=(1.0,))
            ),
            {},
            "no bounds to lie between; choose agent=ppo",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(spec, changes, says):
    with pytest.raises(ValueError, match=says):
        made(parts.network(spec), **changes)
