"""Quantile regression: the loss of agents that learn quantiles of the return."""

from __future__ import annotations

import jax.numpy as jnp

from rlx.types import Array


def midpoints(count: int, ndim: int = 1) -> Array:
    """The middles of `count` equal parts of 0 .. 1, f32[1, ..., 1, K] of so many dimensions."""
    middles = (jnp.arange(count, dtype=jnp.float32) + 0.5) / count
    return middles.reshape(*[1] * (ndim - 1), count)


def quantile_loss(taken: Array, fractions: Array, target: Array, kappa: float | None) -> Array:
    """The quantile Huber loss [...] of quantiles f32[..., N] and targets f32[..., M].

    Of u = target_j - taken_i it is |tau_i - 1{u < 0}| L_kappa(u) / kappa, summed over i and
    averaged over j (Dabney et al. 2018a, equation 10). fractions: tau, [..., N] or [N].
    kappa: where the loss becomes linear; 0: |tau - 1{u < 0}| |u|, without a quadratic part;
    None: |tau - 1{u < 0}| 0.5 u^2 everywhere, so what is learnt are expectiles.
    """
    error = target[..., None, :] - taken[..., :, None]  # [..., N, M]
    size = jnp.abs(error)
    if kappa is None:
        size = 0.5 * error**2
    elif kappa > 0:
        size = jnp.where(size <= kappa, 0.5 * error**2 / kappa, size - 0.5 * kappa)
    fractions = fractions.reshape(*[1] * (taken.ndim - fractions.ndim), *fractions.shape)
    weight = jnp.abs(fractions[..., :, None] - (error < 0))
    return (weight * size).mean(axis=-1).sum(axis=-1)
