import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from rlx import ops

MAGNITUDES = np.concatenate([np.logspace(-6, 6, 20001), -np.logspace(-6, 6, 20001)])


def exact_rescale(x, epsilon=1e-3):
    x = np.asarray(x, np.longdouble)
    return np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + epsilon * x


def exact_unrescale(x, epsilon=1e-3):
    x, e = np.asarray(x, np.longdouble), np.longdouble(epsilon)
    root = (np.sqrt(1 + 4 * e * (np.abs(x) + 1 + e)) - 1) / (2 * e)
    return np.sign(x) * (root**2 - 1)


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize(
    ("function", "exact"), [(ops.rescale, exact_rescale), (ops.unrescale, exact_unrescale)]
)
def test_rescaling_keeps_float32_digits(function, exact, xp):
    x = MAGNITUDES.astype(np.float32)
    got = np.asarray(function(xp.asarray(x), np.float32(1e-3), xp), np.longdouble)
    error = np.abs(got - exact(x)) / np.abs(exact(x))
    assert got.dtype == np.longdouble
    assert error.max() < 1e-6


def test_the_usual_inverse_would_fail_this_bar():
    """rlax's form of `unrescale` loses three digits near 0, so ours is another one."""
    x = MAGNITUDES.astype(np.float32)
    usual = np.asarray(rlax.signed_parabolic(jnp.asarray(x), 1e-3), np.longdouble)
    error = np.abs(usual - exact_unrescale(x)) / np.abs(exact_unrescale(x))
    assert error.max() > 1e-4


def test_rescaling_round_trip_and_zero():
    x = MAGNITUDES
    np.testing.assert_allclose(ops.unrescale(ops.rescale(x, 1e-3, np), 1e-3, np), x, rtol=1e-12)
    assert ops.rescale(np.zeros(1), 1e-3, np) == 0
    assert ops.unrescale(np.zeros(1), 1e-3, np) == 0


def oracle_return(reward, discount, valid, value, t, n, gamma):
    """One row's n-step return, walked forward in plain Python."""
    total, factor = 0.0, 1.0
    for k in range(n):
        if not valid[t + k]:
            return total + factor * value[t + k]
        total += factor * reward[t + k]
        factor *= gamma * discount[t + k]
    return total + factor * value[t + n]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("terminated", [True, False])
def test_n_step_return_with_an_end_at_every_position(n, terminated):
    rows, gamma = 6, 0.9
    rng = np.random.default_rng(n)
    for ends in [(), *[(i,) for i in range(rows + n)], *[(i, i + 2) for i in range(rows + n - 2)]]:
        reward, value = rng.normal(size=(2, rows + n))
        discount, valid = np.ones(rows + n), np.ones(rows + n, bool)
        for end in ends:  # x_end is an episode's last observation
            valid[end], reward[end], discount[end] = False, 0, 0
            if end and terminated:
                discount[end - 1] = 0
        expected = [oracle_return(reward, discount, valid, value, t, n, gamma) for t in range(rows)]
        for xp in (np, jnp):
            got = ops.n_step_return(
                *(xp.asarray(x)[:, None] for x in (reward, discount, valid, value)),
                n=n,
                gamma=gamma,
                xp=xp,
            )
            np.testing.assert_allclose(
                np.asarray(got)[:, 0], expected, rtol=1e-12 if xp is np else 1e-5, atol=1e-6
            )


def test_n_step_return_equals_rlax_within_an_episode():
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 10)).astype(np.float32)
    ones = np.ones(10, np.float32)
    got = ops.n_step_return(reward, ones, ones > 0, value, n=3, gamma=0.9, xp=np)
    expected = rlax.n_step_bootstrapped_returns(
        jnp.asarray(reward[:-1]), jnp.asarray(0.9 * ones[:-1]), jnp.asarray(value[1:]), 3
    )
    np.testing.assert_allclose(got, expected[:7], rtol=1e-5)


def test_masked_mean_and_rewards():
    x = np.array([[1.0, 5.0, 9.0], [3.0, 7.0, 11.0]])
    mask = np.array([[True, False, True], [True, False, False]])
    np.testing.assert_array_equal(ops.masked_mean(x, mask, np), [2.0, 0.0, 9.0])
    reward = np.array([-3.0, 0.5])
    np.testing.assert_array_equal(ops.transform_reward(reward, "clip", np), [-1, 0.5])
    np.testing.assert_array_equal(ops.transform_reward(reward, "tanh", np), np.tanh(reward))
    assert ops.transform_reward(reward, "raw", np) is reward
