"""GAE, lambda returns and V-trace equal loops over their definitions, with every kind of end."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from rlx.agents.impala import Impala
from rlx.agents.returns import td_sums
from tests.agents.actor_critics import made

pytestmark = pytest.mark.usefixtures("quickly_compiled")

GAMMA = 0.9
PLAIN, TERMINAL, RESET = range(3)  # a row; one whose episode terminates; an episode's last input


def may_follow(first: int, second: int) -> bool:
    """A termination is followed by the row of its last observation, which itself ends nothing."""
    return second == RESET if first == TERMINAL else True


def every_end(length: int) -> np.ndarray:
    """The kinds i[T, B] of all sequences that there can be; truncations are resets after PLAIN."""
    all_of_them = itertools.product(range(3), repeat=length)
    found = [kinds for kinds in all_of_them if all(map(may_follow, kinds, kinds[1:]))]
    return np.asarray(found).T


class Sequences:
    """Random numbers around given ends: rows [T, B], values [T + 1, B], weights [T, B]."""

    def __init__(self, kinds: np.ndarray, seed: int = 0) -> None:
        rng, (length, size) = np.random.default_rng(seed), kinds.shape
        self.valid = kinds != RESET
        self.discount = (kinds == PLAIN).astype(np.float32)
        # An environment gives no reward at a reset; here it has one, which nothing may read.
        self.reward = rng.normal(size=kinds.shape).astype(np.float32)
        self.value = rng.normal(size=(length + 1, size)).astype(np.float32)
        self.ratio = np.exp(rng.normal(size=kinds.shape)).astype(np.float32)

    @property
    def rows(self) -> Any:
        return SimpleNamespace(discount=jnp.asarray(self.discount), valid=jnp.asarray(self.valid))

    def sums(self, decay: float, **weights: Any) -> np.ndarray:
        value, reward = jnp.asarray(self.value), jnp.asarray(self.reward)
        weights = {name: jnp.asarray(x) for name, x in weights.items()}
        return np.asarray(
            td_sums(self.rows, reward, value, gamma=GAMMA, decay=decay, **weights), np.float64
        )

    def cut(self, rows: slice, columns: slice = slice(None)) -> Sequences:
        """Some of the rows or columns."""
        found = Sequences.__new__(Sequences)
        for name in ("valid", "discount", "reward", "ratio"):
            setattr(found, name, getattr(self, name)[rows, columns])
        begin, end, _ = rows.indices(len(self.valid))
        found.value = self.value[begin : end + 1, columns]
        return found

    def each(self, of: Any) -> np.ndarray:
        """f64[T, B] of a function of (b, t)."""
        length, size = self.valid.shape
        return np.asarray([[of(b, t) for b in range(size)] for t in range(length)], np.float64)

    def delta(self, b: int, t: int) -> float:
        value, reward = self.value[:, b].astype(float), float(self.reward[t, b])
        return reward + GAMMA * float(self.discount[t, b]) * value[t + 1] - value[t]

    def end(self, b: int, t: int) -> int:
        """The first row from t on that is not valid, or the sequence's end."""
        while t < len(self.valid) and self.valid[t, b]:
            t += 1
        return t


def n_step(it: Sequences, b: int, t: int, n: int) -> float:
    """The sum of n rewards and the value of what follows, 0 after a termination."""
    total, factor = 0.0, 1.0
    for k in range(t, t + n):
        total += factor * float(it.reward[k, b])
        factor *= GAMMA * float(it.discount[k, b])
    return total + factor * float(it.value[t + n, b])


def advantage(it: Sequences, decay: float, b: int, t: int) -> float:
    """Equation 16 of Schulman et al. (2016), of one episode."""
    total, factor = 0.0, 1.0
    for k in range(t, it.end(b, t)):
        total += factor * it.delta(b, k)
        factor *= GAMMA * decay * float(it.discount[k, b])
    return total


def lambda_return(it: Sequences, decay: float, b: int, t: int) -> float:
    """(1 - lambda) sum lambda^(n-1) G^(n), whose last term has all the weight that is left."""
    most = it.end(b, t) - t
    if most == 0:
        return float(it.value[t, b])
    found = [n_step(it, b, t, n) for n in range(1, most + 1)]
    weights = [(1 - decay) * decay**n for n in range(most - 1)] + [decay ** (most - 1)]
    return sum(weight * one for weight, one in zip(weights, found, strict=True))


def v_trace(it: Sequences, rho: float, c: float, decay: float, b: int, t: int) -> float:
    """Equation 1 of Espeholt et al. (2018): V(x_s) + sum gamma^(t-s) (prod c_i) rho_t delta_t."""
    total, factor = float(it.value[t, b]), 1.0
    for k in range(t, it.end(b, t)):
        ratio = float(it.ratio[k, b])
        total += factor * min(rho, ratio) * it.delta(b, k)
        factor *= GAMMA * decay * min(c, ratio) * float(it.discount[k, b])
    return total


def test_every_place_of_an_end_is_there():
    kinds = every_end(5)
    assert kinds.shape == (5, 99)  # f(n) = 2 f(n-1) + f(n-2), f(0) = 1, f(1) = 3
    for t in range(5):
        assert {PLAIN, TERMINAL, RESET} <= set(kinds[t])


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_sums_are_the_advantages_of_gae_with_every_end_at_every_row(decay):
    it = Sequences(every_end(5))
    sums = it.sums(decay)
    np.testing.assert_allclose(sums, it.each(lambda b, t: advantage(it, decay, b, t)), atol=1e-5)
    np.testing.assert_array_equal(sums[~it.valid], 0)


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_values_and_sums_are_lambda_returns_with_every_end_at_every_row(decay):
    it = Sequences(every_end(5), seed=1)
    expected = it.each(lambda b, t: lambda_return(it, decay, b, t))
    np.testing.assert_allclose(it.value[:-1] + it.sums(decay), expected, atol=1e-5)


@pytest.mark.parametrize(("rho", "c", "decay"), [(1.0, 1.0, 1.0), (2.0, 0.7, 0.8), (9.0, 9.0, 1.0)])
def test_values_and_weighted_sums_are_v_traces_with_every_end_at_every_row(rho, c, decay):
    it = Sequences(every_end(5), seed=2)
    weights = {"rho": np.minimum(rho, it.ratio), "c": np.minimum(c, it.ratio)}
    expected = it.each(lambda b, t: v_trace(it, rho, c, decay, b, t))
    np.testing.assert_allclose(it.value[:-1] + it.sums(decay, **weights), expected, atol=2e-5)


def test_a_truncated_episode_is_bootstrapped_from_its_own_last_observation():
    """Its number is made by hand; the next episode's first value, 50, is nowhere in it."""
    it = Sequences(np.asarray([[PLAIN], [RESET], [PLAIN]]))
    it.reward[:, 0], it.value[:, 0] = [1, 7, 3], [10, 20, 50, 30]
    expected = [1 + GAMMA * 20 - 10, 0, 3 + GAMMA * 30 - 50]
    np.testing.assert_allclose(it.sums(1.0)[:, 0], expected, rtol=1e-6)
    it.discount[0] = 0  # terminated
    np.testing.assert_allclose(it.sums(1.0)[0, 0], 1 - 10, rtol=1e-6)


# --- identities ----------------------------------------------------------------------------------


def test_with_lambda_1_they_telescope_to_monte_carlo():
    it = Sequences(every_end(5), seed=3)
    expected = it.each(lambda b, t: n_step(it, b, t, it.end(b, t) - t))
    np.testing.assert_allclose(it.value[:-1] + it.sums(1.0), expected, atol=1e-5)


def test_on_policy_v_trace_is_a_lambda_return():
    it = Sequences(every_end(4), seed=4)
    ones = np.ones_like(it.ratio)
    np.testing.assert_array_equal(it.sums(0.8, rho=ones, c=ones), it.sums(0.8))


@pytest.mark.parametrize("decay", [0.6, 1.0])
def test_a_sequence_in_two_parts_is_the_whole_if_the_second_ones_return_is_the_bootstrap(decay):
    """The parts give the whole for lambda = 1; for less a part ends in a value, of other weight."""
    it = Sequences(every_end(5), seed=5)
    whole = it.value[:-1] + it.sums(decay)
    second = it.cut(slice(2, 5))
    returns = second.value[:-1] + second.sums(decay)
    np.testing.assert_allclose(returns, whole[2:], atol=1e-6)
    first = it.cut(slice(0, 2))
    first.value = np.concatenate([first.value[:2], returns[:1].astype(np.float32)])
    same = np.isclose(first.value[:-1] + first.sums(decay), whole[:2], atol=1e-5)
    assert same.all() == (decay == 1.0)


def test_a_sequence_in_two_parts_at_a_reset_is_the_whole_for_any_lambda():
    it = Sequences(every_end(5), seed=6)
    whole, parts = it.sums(0.6), [it.cut(slice(0, 2)).sums(0.6), it.cut(slice(2, 5)).sums(0.6)]
    apart = np.concatenate(parts)
    at_a_reset = ~it.valid[2]
    assert 0 < at_a_reset.sum() < len(at_a_reset)
    np.testing.assert_array_equal(apart[:, at_a_reset], whole[:, at_a_reset])
    assert not np.allclose(apart[:, ~at_a_reset], whole[:, ~at_a_reset])


def test_a_batch_in_two_halves_is_the_whole():
    it = Sequences(every_end(4), seed=7)
    middle = it.valid.shape[1] // 2
    halves = [it.cut(slice(None), some).sums(0.7) for some in (slice(middle), slice(middle, None))]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), it.sums(0.7))


# --- rlax, which knows no resets -----------------------------------------------------------------


def terminations() -> Sequences:
    rng = np.random.default_rng(8)
    return Sequences(np.where(rng.random((7, 20)) < 0.3, TERMINAL, PLAIN), seed=8)


def over_sequences(function: Any, *arrays: Any) -> Any:
    """One of rlax's functions of one sequence, for [T, B]."""
    return jax.vmap(function, in_axes=1, out_axes=1)(*map(jnp.asarray, arrays))


def test_advantages_equal_rlax():
    it = terminations()
    known = over_sequences(
        lambda r, d, v: rlax.truncated_generalized_advantage_estimation(r, d, 0.7, v),
        *(it.reward, GAMMA * it.discount, it.value),
    )
    np.testing.assert_allclose(it.sums(0.7), known, atol=1e-5)


def test_lambda_returns_equal_rlax():
    it = terminations()
    known = over_sequences(
        lambda r, d, v: rlax.lambda_returns(r, d, v, 0.7),
        *(it.reward, GAMMA * it.discount, it.value[1:]),
    )
    np.testing.assert_allclose(it.value[:-1] + it.sums(0.7), known, atol=1e-5)


def test_v_trace_equals_rlax():
    """rlax cuts off c at 1, gives errors of V, and weights its advantages."""
    it = terminations()
    given = (it.value[:-1], it.value[1:], it.reward, GAMMA * it.discount, it.ratio)
    errors = over_sequences(lambda *x: rlax.vtrace(*x, 0.7, clip_rho_threshold=2.0), *given)
    weights = {"rho": np.minimum(2.0, it.ratio), "c": np.minimum(1.0, it.ratio)}
    np.testing.assert_allclose(it.sums(0.7, **weights), errors, atol=1e-5)
    known = over_sequences(
        lambda *x: rlax.vtrace_td_error_and_advantage(
            *x, 1.0, clip_rho_threshold=2.0, clip_pg_rho_threshold=2.0
        ),
        *given,
    )
    agent = made(Impala, discount=GAMMA, most_rho=2.0)
    arrays = map(jnp.asarray, (it.reward, it.value, it.ratio))
    target, unweighted = agent.v_trace(it.rows, *arrays)
    np.testing.assert_allclose(target, known.errors + it.value[:-1], atol=1e-5)
    np.testing.assert_allclose(weights["rho"] * unweighted, known.pg_advantage, atol=2e-5)
