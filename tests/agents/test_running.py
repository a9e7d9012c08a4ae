"""Running moments equal NumPy's of all rows together, however the rows came."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx.agents import running


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal([100.0, -3.0], [0.5, 20.0], (n, 2))


def assert_moments_of(moments: running.Moments, x: np.ndarray) -> None:
    assert moments.count == len(x)
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(moments.spread / len(x), x.var(axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 1, 500), (3, 0, 64)])
def test_parts_are_merged_to_the_moments_of_all(sizes):
    moments, parts = running.nothing((2,)), [rows(n, n) for n in sizes]
    for part in parts:
        moments = running.observe(moments, jnp.asarray(part))
    assert_moments_of(moments, np.concatenate(parts))


def test_rows_outside_the_mask_do_not_count():
    x, mask = rows(60).reshape(6, 10, 2), np.random.default_rng(1).random((6, 10)) < 0.5
    poisoned = np.where(mask[..., None], x, np.nan)
    moments = running.observe(running.nothing((2,)), jnp.asarray(poisoned), jnp.asarray(mask))
    assert_moments_of(moments, x[mask])


def test_devices_together_observe_what_one_would():
    x = rows(64).astype(np.float32)
    over_devices = jax.vmap(
        functools.partial(running.observe, running.nothing((2,)), axis_name="devices"),
        axis_name="devices",
    )
    moments = over_devices(jnp.asarray(x).reshape(4, 16, 2))
    for device in range(4):
        assert_moments_of(jax.tree.map(lambda leaf, d=device: leaf[d], moments), x)


def test_normalized_rows_have_mean_0_and_deviation_1():
    x = rows(5000)
    moments = running.observe(running.nothing((2,)), jnp.asarray(x))
    scaled = np.asarray(running.normalize(moments, jnp.asarray(x)))
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(scaled.std(axis=0), 1, atol=1e-3)
    far = running.normalize(moments, jnp.asarray([1e6, -1e6], jnp.float32))
    np.testing.assert_array_equal(far, [10, -10])


def test_nothing_is_scaled_before_there_are_two_rows():
    x = jnp.asarray([3.0, -4.0])
    np.testing.assert_array_equal(running.normalize(running.nothing((2,)), x), x)
    one = running.observe(running.nothing((2,)), jnp.ones((1, 2)))
    np.testing.assert_array_equal(running.normalize(one, x), x)
