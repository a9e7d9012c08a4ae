"""Sums of TD errors over time: GAE, lambda returns and V-trace are one recursion."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlx.types import Array, Row


def td_sums(
    rows: Row,
    reward: Array,
    value: Array,
    *,
    gamma: float,
    decay: float,
    rho: Array | None = None,
    c: Array | None = None,
) -> Array:
    """The sums f32[T, ...] of weighted TD errors from each row on.

    rows: of their scalars discount and valid [T, ...]; reward [T, ...]; value [T + 1, ...] of x_t
    and of what follows the last row. rho and c (None: 1) are V-trace's weights [T, ...].

        delta_t = rho_t (r_{t+1} + gamma discount_t value_{t+1} - value_t)
        sum_t   = delta_t + gamma decay discount_t c_t sum_{t+1},  sum_T = 0

    It is the advantage of GAE (Schulman et al. 2016, equation 16). value + sum is the
    lambda return, and with rho and c the target v_s of V-trace (Espeholt et al. 2018, equation 1).
    A row that is not valid has a sum of 0: its observation is an episode's last one. So a
    truncated episode is bootstrapped from it, a terminated one has discount 0 before it, and
    nothing passes an end.
    """
    delta = reward + gamma * rows.discount * value[1:] - value[:-1]
    delta = jnp.where(rows.valid, delta if rho is None else rho * delta, 0.0)
    onward = jnp.where(rows.valid, gamma * decay * rows.discount, 0.0)
    onward = onward if c is None else onward * c

    def back(later: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        own, share = row
        total = own + share * later
        return total, total

    _, sums = jax.lax.scan(back, jnp.zeros_like(delta[0]), (delta, onward), reverse=True)
    return sums
