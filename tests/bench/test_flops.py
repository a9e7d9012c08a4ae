"""Counting the arithmetic of a trace, against what is known of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from rlx.bench.flops import count_flops

X, W = jnp.ones((4, 84, 84, 4)), jnp.ones((8, 8, 4, 32))
FORWARD = 2 * 4 * 20 * 20 * 8 * 8 * 4 * 32


def convolve(x, w):
    return lax.conv_general_dilated(
        x, w, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_a_convolution_and_its_gradients():
    assert count_flops(convolve, X, W) == FORWARD
    of_kernel = jax.grad(lambda w: jnp.square(convolve(X, w)).sum())
    assert count_flops(of_kernel, W) == 2 * FORWARD  # forward once, and the kernel's
    of_input = jax.grad(lambda x: jnp.square(convolve(x, W)).sum())
    assert count_flops(of_input, X) == pytest.approx(2 * FORWARD, rel=0.06)  # some edges, too


def test_a_loop_counts_as_often_as_it_runs_and_a_branch_as_the_cheapest():
    x, w = jnp.ones((8, 16)), jnp.ones((16, 16))

    def loop(x, w):
        x, _ = lax.scan(lambda x, _: (x @ w, None), x, length=5)
        return lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x)

    assert count_flops(jax.jit(loop), x, w) == 5 * 2 * 8 * 16 * 16


def test_batched_products_count_each():
    assert count_flops(jnp.matmul, jnp.ones((3, 8, 16)), jnp.ones((3, 16, 4))) == 3 * 2 * 8 * 16 * 4
