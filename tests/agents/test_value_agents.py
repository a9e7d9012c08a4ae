"""C51, QR-DQN, IQN and DQN with every option, against their equations in float64, in loops."""

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

import rlx
from rlx import trees
from rlx.agents import common, q_learning
from rlx.agents.c51 import C51, project
from rlx.agents.dqn import DQN
from rlx.agents.iqn import IQN, Risk
from rlx.agents.munchausen import Munchausen
from rlx.agents.qr_dqn import QRDQN
from rlx.agents.quantiles import midpoints, quantile_loss
from rlx.networks.heads import Dueling, NoisyDense, Plain
from rlx.problems import ConfigError
from rlx.types import Batch, TrainState
from tests import parts

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SOFT = Munchausen(scale=0.9, temperature=0.3, lowest=-0.5)
OWN: dict[type, dict[str, Any]] = {
    DQN: {"error": "huber"},
    C51: {"atoms": 7, "lowest": -2.0, "highest": 3.0},
    QRDQN: {"quantiles": 5, "kappa": 1.0},
    IQN: {
        "fractions": 3,
        "target_fractions": 5,
        "acting_fractions": 4,
        "acting_draws": True,
        "stratified": False,
        "cosines": 6,
        "risk": None,
        "kappa": 1.0,
    },
}


def made(cls: type, net=None, **changes) -> Any:
    net = net or parts.network()
    settings = {
        "burn_in": 4,
        "unroll": 6,
        "n_step": 3,
        "stride": None,
        "block_rows": 4 if net.is_recurrent else 1,
        "discount": 0.97,
        "double_q": True,
        "rescale_epsilon": None,
        "reward": "raw",
        "stored_state": True,
        "loss_over_time": "mean",
        "munchausen": None,
        "target_period_updates": 10,
        "target_period_env_steps": None,
        "target_rate": None,
        "head": parts.HEAD,
        "optimizer": parts.adam(),
        "network": net,
        "spec": net.spec,
    }
    return cls(**settings | OWN[cls] | changes)


def one_network(agent: Any) -> TrainState:
    """Such a state, whose target network is the online one."""
    state = parts.random_state(agent)
    return dataclasses.replace(state, target_params=state.params)


@dataclasses.dataclass(frozen=True)
class Seen:
    """Holds what both networks say of the rows after the burn-in, f64, and the rows [B, ...]."""

    online: np.ndarray  # of the taken actions' loss: [B, T + n, A, ...]
    target: np.ndarray
    q: np.ndarray  # [B, T + n, A]: by which actions are chosen
    target_q: np.ndarray
    fractions: np.ndarray | None  # [B, T, N]
    mask: np.ndarray  # bool[B, T + n, A]
    rows: Any


def heard(agent: Any, state: TrainState, batch: Batch) -> tuple[Any, ...]:
    """(outputs, outputs that actions are chosen by, fractions or None, mask or None), in JAX."""
    inputs = common.transform_inputs(common.batch_inputs(batch), agent.reward)
    networks = state.params, state.target_params
    both = [
        agent.network.apply(params, inputs, batch.carry)[0][agent.burn_in :] for params in networks
    ]
    mask = common.allowed(common.window(inputs, agent.burn_in, None), agent.spec)
    if not isinstance(agent, IQN):
        outputs = [agent.outputs(p, features) for p, features in zip(networks, both, strict=True)]
        return outputs, outputs, None, mask
    draws = agent.draws(jax.random.split(state.key)[0], both[0].shape[:-1])
    choosing = [
        agent.outputs(params, features, key)
        for params, features, key in zip(networks, both, draws.choice, strict=True)
    ]
    padded = jnp.concatenate([draws.fractions, 0.5 + 0 * draws.fractions[: agent.n_step]])
    outputs = [
        agent.quantiles(state.params, both[0], padded, None),
        agent.quantiles(state.target_params, both[1], draws.target_fractions, None),
    ]
    return outputs, choosing, draws.fractions, mask


def seen(agent: Any, state: TrainState, batch: Batch) -> Seen:
    outputs, choosing, fractions, mask = jax.jit(partial(heard, agent))(state, batch)

    def turned(x: Any, dtype: Any = np.float64) -> np.ndarray:
        return np.swapaxes(np.asarray(x, dtype), 0, 1)

    q, target_q = (turned(means(agent, found)) for found in choosing)
    return Seen(
        online=turned(outputs[0]),
        target=turned(outputs[1]),
        q=q,
        target_q=target_q,
        fractions=None if fractions is None else turned(fractions),
        mask=np.ones(q.shape, bool) if mask is None else turned(mask, bool),
        rows=trees.tree_map(lambda x: np.asarray(x)[:, agent.burn_in :], batch.rows),
    )


def unrolled(agent: Any, params: Any, inputs: Any, carry: Any) -> Any:
    """The head's outputs [T, B, A, ...] of an unroll, of fixed fractions and without noise."""
    return agent.outputs(params, agent.network.apply(params, inputs, carry)[0])


def means(agent: Any, outputs: Any) -> np.ndarray:
    outputs = np.asarray(outputs, np.float64)
    if isinstance(agent, DQN):
        return outputs
    if isinstance(agent, C51):
        return (softmax(outputs) * np.linspace(agent.lowest, agent.highest, agent.atoms)).sum(-1)
    return outputs.mean(-1)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def policy(agent: Any, q: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pi, tau ln pi) [A]."""
    tau, pi, log = agent.munchausen.temperature, np.zeros(len(q)), np.zeros(len(q))
    total = sum(math.exp((q[a] - q[mask].max()) / tau) for a in range(len(q)) if mask[a])
    for a in range(len(q)):
        if mask[a]:
            log[a] = (q[a] - q[mask].max()) - tau * math.log(total)
            pi[a] = math.exp(log[a] / tau)
    return pi, log


def summed(agent: Any, it: Seen, b: int, start: int) -> tuple[float, float, int]:
    """(rewards until the end of the sum, the factor of what follows, the row that it ends in)."""
    total, factor, t = 0.0, 1.0, start
    while t < start + agent.n_step and it.rows.valid[b, t]:
        reward = float(it.rows.reward[b, t])
        reward = min(1, max(-1, reward)) if agent.reward == "clip" else reward
        if agent.munchausen is not None:
            _, log = policy(agent, it.target_q[b, t], it.mask[b, t])
            bonus = min(0.0, max(agent.munchausen.lowest, log[it.rows.action[b, t]]))
            reward += agent.munchausen.scale * bonus
        total += factor * reward
        factor *= agent.discount * float(it.rows.discount[b, t])
        t += 1
    return total, factor, t


def h(x: float, epsilon: float) -> float:
    return math.copysign(math.sqrt(abs(x) + 1) - 1, x) + epsilon * x


def inverse(y: float, epsilon: float) -> float:
    low, high = -1e3, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if h(middle, epsilon) < y else (low, middle)
    return (low + high) / 2


def moved(agent: Any, total: float, factor: float, value: float) -> float:
    epsilon = agent.rescale_epsilon
    if epsilon is None:
        return total + factor * value
    return h(total + factor * inverse(value, epsilon), epsilon)


def best(agent: Any, it: Seen, b: int, t: int) -> int:
    q = (it.q if agent.double_q else it.target_q)[b, t]
    return int(np.argmax(np.where(it.mask[b, t], q, -np.inf)))


def worth(agent: Any, it: Seen, b: int, t: int) -> np.ndarray:
    """Returns the worth of a state: a number, quantiles, or probabilities of atoms."""
    target = softmax(it.target[b, t]) if isinstance(agent, C51) else it.target[b, t]
    if agent.munchausen is None:
        return target[best(agent, it, b, t)]
    pi, log = policy(agent, it.target_q[b, t], it.mask[b, t])
    if isinstance(agent, C51):
        support = np.linspace(agent.lowest, agent.highest, agent.atoms)
        return sum(pi[a] * onto_atoms(agent, support - log[a], target[a]) for a in range(len(pi)))
    return sum(pi[a] * (target[a] - log[a]) for a in range(len(pi)))


def onto_atoms(agent: C51, positions: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Algorithm 1 of Bellemare et al., with all mass kept where a position is an atom."""
    step = (agent.highest - agent.lowest) / (agent.atoms - 1)
    found = np.zeros(agent.atoms)
    for position, p in zip(positions, probability, strict=True):
        place = (min(max(position, agent.lowest), agent.highest) - agent.lowest) / step
        place = round(place, 9)
        lower, upper = math.floor(place), math.ceil(place)
        if lower == upper:
            found[lower] += p
        else:
            found[lower] += p * (upper - place)
            found[upper] += p * (place - lower)
    return found


def row_loss(agent: Any, it: Seen, b: int, i: int) -> tuple[float, float]:
    """(loss, priority) of a valid row."""
    total, factor, t = summed(agent, it, b, i)
    action, value = it.rows.action[b, i], worth(agent, it, b, t)
    if isinstance(agent, DQN):
        td = moved(agent, total, factor, float(value)) - it.online[b, i, action]
        linear = agent.error == "huber" and abs(td) > 1
        return (abs(td) - 0.5 if linear else td**2 / 2), abs(td)
    if isinstance(agent, C51):
        support = np.linspace(agent.lowest, agent.highest, agent.atoms)
        positions = [moved(agent, total, factor, float(atom)) for atom in support]
        target = onto_atoms(agent, np.asarray(positions), value)
        crossed = -float((target * np.log(softmax(it.online[b, i, action]))).sum())
        return crossed, crossed
    fractions = it.fractions[b, i] if isinstance(agent, IQN) else None
    if fractions is None:
        fractions = [(k + 0.5) / agent.quantiles for k in range(agent.quantiles)]
    loss = 0.0
    for tau, own in zip(fractions, it.online[b, i, action], strict=True):
        for other in value:
            u = moved(agent, total, factor, float(other)) - own
            kappa = agent.kappa
            size = abs(u) if kappa is not None else u * u / 2
            if kappa:
                size = u * u / 2 / kappa if abs(u) <= kappa else abs(u) - kappa / 2
            loss += abs(tau - (u < 0)) * size / len(value)
    mean_worth = mean_of_worth(agent, it, b, t)
    return loss, abs(moved(agent, total, factor, mean_worth) - it.q[b, i, action])


def mean_of_worth(agent: Any, it: Seen, b: int, t: int) -> float:
    if agent.munchausen is None:
        return float(it.target_q[b, t, best(agent, it, b, t)])
    pi, log = policy(agent, it.target_q[b, t], it.mask[b, t])
    return float((pi * (it.target_q[b, t] - log)).sum())


CASES = [
    *((cls, "lstm", {}) for cls in OWN),
    *((cls, "none", {"double_q": False, "reward": "clip", "n_step": 1}) for cls in OWN),
    *((cls, "lstm", {"munchausen": SOFT, "double_q": False}) for cls in OWN),
    *((cls, "none", {"munchausen": SOFT, "double_q": False, "burn_in": 0}) for cls in OWN),
    *((cls, "lstm", {"rescale_epsilon": 1e-3}) for cls in OWN),
    *((cls, "lstm", {"loss_over_time": "sum"}) for cls in OWN),
    (DQN, "none", {"error": "squared", "rescale_epsilon": 1e-2}),
    *((cls, "lstm", {"kappa": 0.0}) for cls in (QRDQN, IQN)),
    *((cls, "lstm", {"kappa": None}) for cls in (QRDQN, IQN)),
    *((cls, "none", {"kappa": 0.3}) for cls in (QRDQN, IQN)),
    (IQN, "lstm", {"risk": Risk(measure="cvar", level=0.3)}),
    (QRDQN, "lstm", {"head": Plain(hidden=None, noise=None)}),
]


FREE = [*((cls, "none", {"burn_in": 0}) for cls in OWN)]


@pytest.mark.parametrize(
    ("spec", "cls", "core", "changes"),
    [*((parts.MASKED, *case) for case in CASES), *((parts.VECTOR, *case) for case in FREE)],
)
def test_loss_and_priorities_equal_the_float64_oracle(spec, cls, core, changes):
    agent = made(cls, parts.network(spec, core), **changes)
    batch, state = parts.batch(agent, 8), parts.random_state(agent)
    told_priorities, told_loss = parts.told(agent, state, batch)
    it = seen(agent, state, batch)
    losses, priorities = np.zeros((2, 8, agent.unroll))
    for b, i in itertools.product(range(8), range(agent.unroll)):
        priorities[b, i] = -1
        if it.rows.valid[b, i]:
            losses[b, i], priorities[b, i] = row_loss(agent, it, b, i)
    valid = it.rows.valid[:, : agent.unroll]
    assert 0.5 < valid.mean() < 1
    assert (it.rows.discount[it.rows.valid] == 0).any()
    np.testing.assert_allclose(told_priorities, priorities, atol=3e-5)
    found = losses.sum(axis=1)
    if agent.loss_over_time == "mean":
        found /= np.maximum(1, valid.sum(axis=1))
    np.testing.assert_allclose(told_loss, (batch.importance * found).mean(), rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"munchausen": SOFT, "double_q": False}])
@pytest.mark.parametrize("cls", list(OWN))
def test_first_priorities_equal_the_learners_when_all_networks_are_one(cls, changes):
    without_draws = {"acting_draws": False} if cls is IQN else {}
    agent = made(cls, parts.network(parts.MASKED), **changes, **without_draws)
    batch, state = parts.batch(agent, 16), one_network(agent)
    inputs = common.batch_inputs(batch)
    outputs = jax.jit(partial(unrolled, agent))(state.params, inputs, batch.carry)
    mask = common.allowed(inputs, agent.spec)
    action = np.concatenate([batch.rows.action, batch.rows.action[:, -1:]], axis=1).T
    flat = [x.reshape(-1, *x.shape[2:]) for x in (outputs, action, mask)]
    kept = trees.tree_map(
        lambda x: np.swapaxes(np.asarray(x).reshape(*action.shape, *x.shape[1:]), 0, 1),
        agent.remember(*flat),
    )
    rows = dataclasses.replace(batch.rows, acting=trees.tree_map(lambda x: x[:, :-1], kept))
    priorities, _ = parts.told(agent, state, dataclasses.replace(batch, rows=rows))
    longer = trees.tree_map(lambda x: np.concatenate([x, x[:, -1:]], axis=1), batch.rows)
    first = agent.initial_priorities(dataclasses.replace(longer, acting=kept))
    assert (first == -1).any()
    np.testing.assert_allclose(first, priorities, atol=3e-5)


# --- the traps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, -10.0, 10.0])
def test_projection_keeps_all_mass(shift):
    """Also where a moved atom falls on the grid, or beyond its ends."""
    support = np.linspace(-2, 3, 11, dtype=np.float32)
    probability = np.random.default_rng(0).dirichlet(np.ones(11), 4).astype(np.float32)
    found = project(support + np.float32(shift), probability, support, np)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    if shift == 0:
        np.testing.assert_allclose(found, probability, atol=1e-6)
    if abs(shift) == 10:
        np.testing.assert_allclose(found[:, 0 if shift < 0 else -1], 1, atol=1e-6)


def test_projection_equals_rlaxs():
    rlax = pytest.importorskip("rlax")
    rng = np.random.default_rng(1)
    support = np.linspace(-2, 3, 11, dtype=np.float32)
    positions = (3 * rng.normal(size=(32, 11))).astype(np.float32)
    probability = rng.dirichlet(np.ones(11), 32).astype(np.float32)
    known = jax.vmap(lambda z, p: rlax.categorical_l2_project(z, p, support))(
        np.sort(positions), probability
    )
    np.testing.assert_allclose(
        project(np.sort(positions), probability, support, np), known, atol=1e-5
    )


@pytest.mark.parametrize("kappa", [0.5, 1.0])
def test_quantile_loss_equals_rlaxs(kappa):
    """rlax does not divide by kappa."""
    rlax = pytest.importorskip("rlax")
    rng = np.random.default_rng(2)
    taken, target = (rng.normal(size=(32, n)).astype(np.float32) for n in (5, 7))
    tau = rng.uniform(size=(32, 5)).astype(np.float32)
    known = jax.vmap(lambda x, tau, y: rlax.quantile_regression_loss(x, tau, y, kappa))(
        taken, tau, target
    )
    np.testing.assert_allclose(
        quantile_loss(taken, tau, target, kappa), np.asarray(known) / kappa, rtol=1e-5
    )


def test_quantile_regression_finds_the_quantiles_of_a_known_distribution():
    """Returns are uniform in 0 .. 1, so their quantiles are the fractions themselves, in order."""
    samples = np.random.default_rng(3).uniform(size=(400, 64)).astype(np.float32)
    fractions, found = midpoints(9), np.zeros(9, np.float32)
    step = jax.jit(jax.grad(lambda x, y: quantile_loss(x, fractions, y, 0.0)))
    for i in range(2000):
        found = found - 0.5 / (1 + i / 50) * step(found, samples[i % 400])
    np.testing.assert_allclose(found, fractions, atol=0.02)
    assert (np.diff(found) > 0).all()


def test_a_batch_in_two_halves_has_the_mean_loss_of_the_whole():
    agent = made(QRDQN)
    batch, state = parts.batch(agent, 8), parts.random_state(agent)
    half = [trees.tree_map(lambda x, s=s: x[s], batch) for s in (slice(4), slice(4, None))]
    losses = [parts.told(agent, state, b)[1] for b in (batch, *half)]
    np.testing.assert_allclose(losses[0], np.mean(losses[1:]), rtol=1e-5)


def test_munchausens_bonus_is_clipped_to_the_lowest_and_0():
    soft = Munchausen(scale=0.9, temperature=0.03, lowest=-1.0)
    pi, scaled = soft.policy(np.float32([[0.0, 5.0]]), None)
    np.testing.assert_allclose(pi, [[0, 1]], atol=1e-6)
    np.testing.assert_allclose(scaled, [[-5, 0]], atol=1e-6)  # of Q / tau, not of Q
    assert soft.bonus(scaled, np.array([0]))[0] == np.float32(-0.9)
    assert soft.bonus(np.float32([[0.5, 0.0]]), np.array([0]))[0] == 0


@pytest.mark.parametrize("measure", ["cvar", "power"])
def test_risk_changes_what_is_chosen_and_nothing_else(measure):
    levels = {"cvar": [1.0, 0.25], "power": [0.0, -2.0, 2.0]}[measure]
    tau = np.linspace(0, 1, 11, dtype=np.float32)
    bent = [Risk(measure=measure, level=x).distorted(tau) for x in levels]
    np.testing.assert_allclose(bent[0], tau, atol=1e-6)
    assert (np.asarray(bent[1])[1:-1] < tau[1:-1]).all()  # averse to risk
    if measure == "power":
        assert (np.asarray(bent[2])[1:-1] > tau[1:-1]).all()
        np.testing.assert_allclose(np.asarray(bent[2]), tau ** (1 / 3), rtol=1e-5)
    with pytest.raises(ValueError, match="the share of the worst returns"):
        Risk(measure="cvar", level=0.0)


@pytest.mark.parametrize("risk", [None, Risk(measure="cvar", level=0.5)])
def test_acting_fractions_that_are_not_drawn_are_the_middles_of_equal_parts(risk):
    agent = made(IQN, parts.network(parts.MASKED), acting_draws=False, risk=risk)
    state, features = parts.random_state(agent), np.random.default_rng(4).normal(size=(3, 5, 8))
    middles = np.array([0.125, 0.375, 0.625, 0.875]) * (1.0 if risk is None else 0.5)
    each = np.broadcast_to(middles.astype(np.float32), (3, 5, 4))
    known = agent.quantiles(state.params, jnp.float32(features), jnp.asarray(each), None)
    for key in (None, *jax.random.split(jax.random.PRNGKey(0))):
        found = agent.outputs(state.params, jnp.float32(features), key)
        np.testing.assert_allclose(found, known, atol=1e-6)


def test_stratified_fractions_lie_one_in_each_part_and_are_uniform_in_it():
    agent = made(IQN, stratified=True, fractions=4, target_fractions=2, acting_fractions=8)
    draws, seen = agent.draws(jax.random.PRNGKey(0), (9, 2000)), []
    drawn = agent.drawn(jax.random.PRNGKey(1), (6, 2000, 8))
    for found, count in ((draws.fractions, 4), (draws.target_fractions, 2), (drawn, 8)):
        place = np.asarray(found, np.float64) * count - np.arange(count)
        assert (place >= -1e-6).all()
        assert (place < 1 + 1e-6).all()
        for each in place.reshape(-1, count).T:
            assert abs(each.mean() - 1 / 2) < 0.02
            assert abs(each.var() - 1 / 12) < 0.01
        seen.append(found.shape)
    assert seen == [(agent.unroll, 2000, 4), (9, 2000, 2), (6, 2000, 8)]


def test_stratified_fractions_reach_acting_and_all_of_the_loss(monkeypatch):
    agent, quantiles, given = made(IQN, stratified=True), IQN.quantiles, []

    def seen(self: Any, params: Any, features: Any, fractions: Any, noise: Any) -> Any:
        given.append(fractions)
        return quantiles(self, params, features, fractions, noise)

    monkeypatch.setattr(IQN, "quantiles", seen)
    batch, state = parts.batch(agent, 8), parts.random_state(agent)
    inputs = trees.tree_map(lambda x: x[:4, 0], batch.rows.inputs)
    key, epsilon = jax.random.PRNGKey(5), np.zeros(4, np.float32)

    @jax.jit
    def asked(state: TrainState, batch: Batch) -> list[Any]:
        agent.act(state.params, inputs, agent.initial_carry(4), key, epsilon)
        agent.update(state, batch)
        return given

    given = asked(state, batch)
    assert [x.shape[-1] for x in given] == [4, 4, 4, 3, 5]
    for fractions in given:
        count = fractions.shape[-1]
        place = np.asarray(fractions, np.float64) * count - np.arange(count)
        assert -1e-6 <= place.min() < place.max() <= 1 + 1e-6


# --- noisy layers --------------------------------------------------------------------------------

NOISY = Dueling(hidden=8, noise=0.5)


def test_a_noisy_layer_equals_its_equation():
    layer, rng = NoisyDense(units=3, noise=0.5, dtype=np.float32), np.random.default_rng(0)
    x, key = rng.normal(size=(4, 5)).astype(np.float32), jax.random.PRNGKey(7)
    params = layer.init(jax.random.PRNGKey(0), x)
    p = {name: np.asarray(v, np.float64) for name, v in params["params"].items()}
    bound = 5**-0.5
    assert (np.abs(p["kernel"]) <= bound).all()
    np.testing.assert_allclose(p["kernel_deviation"], 0.5 * bound, rtol=1e-6)
    np.testing.assert_allclose(p["bias_deviation"], 0.5 * bound, rtol=1e-6)
    first, last = jax.random.split(key)
    noise = [np.asarray(jax.random.normal(k, (n,)), float) for k, n in ((first, 5), (last, 3))]
    first, last = (np.sign(e) * np.sqrt(np.abs(e)) for e in noise)
    kernel = p["kernel"] + p["kernel_deviation"] * np.outer(first, last)
    bias = p["bias"] + p["bias_deviation"] * last
    np.testing.assert_allclose(layer.apply(params, x, key), x @ kernel + bias, rtol=1e-5)
    np.testing.assert_allclose(layer.apply(params, x), x @ p["kernel"] + p["bias"], rtol=1e-5)


@pytest.mark.parametrize("cls", list(OWN))
def test_noise_is_drawn_for_each_update_and_each_lane_and_is_off_in_evaluation(cls):
    agent = made(cls, parts.network(core="none"), head=NOISY, burn_in=0)
    assert agent.samples
    batch, state = parts.batch(agent, 64), parts.random_state(agent)

    @jax.jit
    def update(state: TrainState) -> tuple[Any, Any]:
        after, output = agent.update(state, batch)
        return after.key, output.metrics["learner/loss"]

    key, loss = update(state)
    assert loss != update(dataclasses.replace(state, key=key))[1]
    assert not np.array_equal(state.key, key)
    inputs = trees.tree_map(lambda x: np.repeat(x[:1, 0], 64, axis=0), batch.rows.inputs)
    carry, act = agent.initial_carry(64), jax.jit(lambda *given: agent.act(*given)[0])

    def actions(seed: int, amount: float) -> np.ndarray:
        exploration = np.full(64, amount, np.float32)
        return np.asarray(act(state.params, inputs, carry, jax.random.PRNGKey(seed), exploration))

    assert len(set(actions(0, 1.0).tolist())) > 1
    assert not np.array_equal(actions(0, 1.0), actions(1, 1.0))
    if cls is not IQN:  # which draws its fractions
        q, _ = jax.jit(agent.values)(state.params, inputs, carry)
        np.testing.assert_array_equal(actions(0, 0.0), np.asarray(q).argmax(-1))


@pytest.mark.parametrize("head", [Dueling(hidden=8, noise=None), NOISY])
def test_fractions_are_drawn_from_no_key_that_explores(head, monkeypatch):
    agent, outputs, drawn = made(IQN, head=head), IQN.outputs, []

    def seen(self: Any, params: Any, features: Any, key: Any = None, noise: Any = None) -> Any:
        drawn.append(key)
        return outputs(self, params, features, key, noise)

    def none_drawn(key: Any, *others: Any) -> Any:
        used.extend([key, *jax.random.split(key, 2 if head is not NOISY else 4)])
        return others[0].argmax(axis=-1).astype(np.int32) if head is not NOISY else others[0]

    used: list[Any] = []
    monkeypatch.setattr(IQN, "outputs", seen)
    monkeypatch.setattr(common, "explore" if head is NOISY else "epsilon_greedy", none_drawn)
    inputs = trees.tree_map(lambda x: x[:4, 0], parts.batch(agent, 8).rows.inputs)
    key = jax.random.PRNGKey(5)
    agent.act(
        parts.random_state(agent).params,
        inputs,
        agent.initial_carry(4),
        key,
        np.zeros(4, np.float32),
    )
    used += [child for parent in used for child in jax.random.split(parent)]
    assert not any(np.array_equal(drawn[0], other) for other in used)


def test_the_target_network_has_noise_of_its_own(monkeypatch):
    agent, drawn = made(DQN, head=NOISY), []

    def outputs(self: Any, params: Any, features: Any, key: Any = None, noise: Any = None) -> Any:
        drawn.append(noise)
        return q_learning.outputs(self, params, features, key, noise)

    monkeypatch.setattr(DQN, "outputs", outputs)
    jax.eval_shape(agent.update, parts.random_state(agent), parts.batch(agent, 8))
    online, target = drawn
    assert online is not None
    assert target is not None
    assert online is not target
    features, state = np.ones((1, 1, 8), np.float32), parts.random_state(agent)
    found = [
        agent.outputs(state.params, features, noise=key)
        for key in jax.random.split(jax.random.PRNGKey(1))
    ]
    assert not np.allclose(*found)


# --- targets -------------------------------------------------------------------------------------


def test_a_soft_target_moves_with_each_update_and_nothing_is_copied():
    soft = {"target_period_updates": None, "target_rate": 0.25}
    agent = made(DQN, parts.network(core="none"), burn_in=0, **soft)
    batch, state = parts.batch(agent, 8), parts.random_state(agent)
    after, _ = jax.jit(agent.update)(state, batch)
    expected = trees.tree_map(
        lambda new, old: old + 0.25 * (new - old), after.params, state.target_params
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        after.target_params,
        expected,
    )


def test_a_target_by_env_steps_is_copied_once_for_each_period_that_ended():
    by_env_steps = {"target_period_updates": None, "target_period_env_steps": 100}
    agent = made(DQN, parts.network(core="none"), burn_in=0, **by_env_steps)
    batch, state = parts.batch(agent, 8), parts.random_state(agent)
    update = jax.jit(agent.update)
    for before in (0, 2**32 - 100):  # counts go on beyond 32 bits
        state = dataclasses.replace(state, statistics={"target_env_steps": np.uint32(before)})
        copied = []
        for env_steps in (64, 99, 100, 150, 199, 320, 330, 399, 400):  # 320: two periods at once
            count = np.full(8, (before + env_steps) % 2**32, np.uint32)
            state, _ = update(state, dataclasses.replace(batch, env_steps=count))
            same = jax.tree.map(np.array_equal, state.target_params, state.params)
            assert len(set(jax.tree.leaves(same))) == 1
            copied.append(jax.tree.leaves(same)[0])
        assert copied == [False, False, True, False, False, True, False, False, True]
    with pytest.raises(ValueError, match="a batch with env_steps"):
        jax.eval_shape(agent.update, state, batch)


@pytest.mark.parametrize(
    ("cls", "changes", "says"),
    [
        (DQN, {"target_rate": 0.1}, "give one of them"),
        (DQN, {"target_period_updates": None}, "give one of them"),
        (IQN, {"target_period_env_steps": 9}, "give one of them"),
        (IQN, {"munchausen": SOFT}, "agent.double_q=false"),
        (QRDQN, {"munchausen": SOFT, "double_q": False, "rescale_epsilon": 1e-3}, "not rescaled"),
        (C51, {"lowest": 3.0}, "must be below agent.highest"),
        (C51, {"lowest": 1e8, "highest": 1e8 + 1}, "cannot be told apart in float32"),
        (C51, {"lowest": -1e60, "highest": 1e60}, "cannot be told apart in float32"),
        (C51, {"atoms": 10**11}, "cannot be told apart in float32"),  # which fit no memory
    ],
)
def test_settings_that_exclude_each_other_are_refused(cls, changes, says):
    with pytest.raises(ValueError, match=says):
        made(cls, **changes)


@pytest.mark.parametrize("name", ["dqn", "c51", "qr_dqn", "iqn", "r2d2"])
def test_counts_that_a_device_cannot_hold_are_refused(name):
    most = {
        "target_period_env_steps": 2**32 - 1,
        "target_period_updates": 2**31 - 1,
        "optimizer.warmup_gradient_steps": 2**31 - 1,
        "optimizer.decay_gradient_steps": 2**31 - 1,
    }
    for key, limit in most.items():
        with pytest.raises(ConfigError, match=f"{key}={limit + 1} .*: accepted: .* <= {limit:,}"):
            rlx.run(rlx.compose([f"agent={name}", f"agent.{key}={limit + 1}"]))


@pytest.mark.parametrize("cls", list(OWN))
def test_acting_and_unrolling_agree(cls):
    """A row at a time, the carry kept, gives what the unroll of the learner gives."""
    agent = made(cls, parts.network(parts.MASKED))
    batch, state = parts.batch(agent, 4), parts.random_state(agent)
    inputs, carry = common.batch_inputs(batch), batch.carry
    outputs = jax.jit(partial(unrolled, agent))(state.params, inputs, batch.carry)
    whole, values = agent.expected(outputs), jax.jit(agent.values)
    for t in range(3):
        row = trees.tree_map(lambda x, t=t: x[t], inputs)
        q, carry = values(state.params, row, carry)
        np.testing.assert_allclose(q, whole[t], atol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("cls", list(OWN))
def test_rows_that_only_choose_actions_of_targets_need_no_gradient(cls, soft, monkeypatch):
    """An update that keeps nothing of them for a gradient equals one that has theirs, too."""
    agent = made(cls, munchausen=SOFT if soft else None, double_q=not soft)
    batch, state = parts.batch(agent, 4), parts.random_state(agent)
    found, said = jax.jit(agent.update)(state, batch)
    asked, features_after = [], common.features_after

    def with_all_gradients(*given):
        *given, trained = given
        asked.append(trained)
        return features_after(*given)

    monkeypatch.setattr(common, "features_after", with_all_gradients)
    whole, says = jax.jit(agent.update)(state, batch)
    assert asked == [agent.unroll]
    np.testing.assert_allclose(said.priorities, says.priorities, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found.params, whole.params)


def test_later_rows_have_the_same_features_and_no_gradient():
    agent = parts.agent()
    batch, state = parts.batch(agent, 4), parts.random_state(agent)
    inputs, _ = agent.network.stack_frames(common.batch_inputs(batch), batch.carry)
    after = partial(common.features_after, agent.network)
    given = (inputs, batch.carry.core, agent.burn_in)
    whole = after(state.params, *given)
    np.testing.assert_allclose(after(state.params, *given, agent.unroll), whole, atol=1e-6)

    def later(params):
        return jnp.square(after(params, *given, agent.unroll)[agent.unroll :]).sum()

    assert all(not np.any(leaf) for leaf in jax.tree.leaves(jax.grad(later)(state.params)))
