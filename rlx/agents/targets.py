"""Targets, errors and priorities of action values, in NumPy (acting) or JAX (learning)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlx import ops, trees
from rlx.agents import common
from rlx.types import Array, Row, SoftActing


def value_targets(
    rows: Row,
    value: Array,
    *,
    n: int,
    gamma: float,
    reward: str,
    rescale_epsilon: float | None,
    bonus: Array | None = None,
    xp: Any = jnp,
) -> Array:
    """h(n-step return of h^-1(value)): scalars of rows [T + n - 1, ...], value [T + n, ...].

    rescale_epsilon: of h (`ops.rescale`); None: h is the identity. bonus: [T + n - 1, ...], added
    to the rewards. Returns [T, ...].
    """
    raw = value if rescale_epsilon is None else ops.unrescale(value, rescale_epsilon, xp)
    rewards = ops.transform_reward(rows.reward, reward, xp)
    target = ops.n_step_return(
        rewards if bonus is None else rewards[: len(bonus)] + bonus,
        rows.discount,
        rows.valid,
        raw,
        n=n,
        gamma=gamma,
        xp=xp,
    )
    return target if rescale_epsilon is None else ops.rescale(target, rescale_epsilon, xp)


def spread_targets(rows: Row, value: Array, bonus: Array | None, **targets: Any) -> Array:
    """`value_targets` of each of K numbers: value [T + n, B, K] gives [T, B, K]."""
    bonus = None if bonus is None else bonus[..., None]
    return value_targets(widened(rows), value, bonus=bonus, **targets)


def widened(rows: Row) -> Row:
    """Rows whose rewards, discounts and flags are [..., 1], beside values [..., K]."""
    wide = {name: getattr(rows, name)[..., None] for name in ("reward", "discount", "valid")}
    return replace(rows, **wide)


def acting_priorities(rows: Row, burn_in: int, unroll: int, **targets: Any) -> np.ndarray:
    """f32[M, T] of scalars [M, L + 1]: absolute TD errors of acting time, -1 where not valid.

    The online network is its own target: equal to the learner's errors when its online and target
    parameters are those that acted. targets: the keywords of `value_targets`.

    DEPARTS: of a sequence that ends with a block the value after its last row is not known yet (it
    is acted on in the next block). The last row is given in its place (`interfaces.Prioritizing`),
    so its value is the bootstrap of the last trained row, until that row is trained on. All other
    rows, and all rows of other sequences, are exact.
    """
    rows = numpy_time_major(rows, burn_in)
    bonus = rows.acting.bonus if isinstance(rows.acting, SoftActing) else None
    target = value_targets(rows, rows.acting.q_max, bonus=bonus, **targets, xp=np)
    valid = rows.valid[:unroll]
    td = np.abs(target - rows.acting.q[:unroll])
    return np.where(valid, td, -1).astype(np.float32).T


def numpy_time_major(rows: Row, burn_in: int) -> Row:
    """The scalars after the burn-in, time-major [L - burn_in, M]; inputs are dropped."""

    def turned(x: Array) -> np.ndarray:
        return np.swapaxes(np.asarray(x)[:, burn_in:], 0, 1)

    return replace(
        rows,
        reward=turned(rows.reward),
        discount=turned(rows.discount),
        valid=turned(rows.valid),
        acting=trees.tree_map(turned, rows.acting),
    )


def per_sequence(losses: Array, valid: Array, over_time: str) -> Array:
    """Reduces losses [T, B] of valid rows to f32[B]; over_time: mean | sum."""
    total = jnp.where(valid, losses, 0.0).sum(axis=0)
    return total if over_time == "sum" else total / jnp.maximum(1, valid.sum(axis=0))


def row_priorities(td: Array, valid: Array) -> Array:
    """The priorities f32[B, T] from td [T, B]: absolute errors, -1 where a row is not valid."""
    return jnp.where(valid, jnp.abs(td), -1.0).T


def value_metrics(q: Array, td: Array, rows: Row) -> common.Metrics:
    """Metrics: means over the valid trained rows [T, B]."""

    def mean(x: Array) -> Array:
        return ops.masked_mean(x.ravel(), rows.valid.ravel(), jnp)

    drift = jnp.abs(q[0] - rows.acting.q[0])
    return {
        "learner/q_mean": mean(q),
        "learner/td_mean": mean(jnp.abs(td)),
        "learner/q_drift": ops.masked_mean(drift, rows.valid[0], jnp),
    }
