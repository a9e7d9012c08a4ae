"""Pure array maths of value learning. `xp` is numpy or jax.numpy: both sides run the same code."""

from __future__ import annotations

from typing import Any

from rlx.types import Array


def rescale(x: Array, epsilon: float, xp: Any) -> Array:
    """h(x) = sign(x) (sqrt(|x| + 1) - 1) + epsilon x (R2D2, section 2.3), elementwise.

    Written without the difference of two nearly equal numbers, so float32 keeps its digits.
    """
    a = xp.abs(x)
    return xp.sign(x) * (a / (xp.sqrt(a + 1) + 1)) + epsilon * x


def unrescale(x: Array, epsilon: float, xp: Any) -> Array:
    """The inverse of `rescale`; relative error in float32 below 1e-6 (the usual form: 1e-3)."""
    a = xp.abs(x)
    s = xp.sqrt(1 + 4 * epsilon * (a + 1 + epsilon))
    u = 2 * a * (1 - 2 * epsilon / (s + 1 + 2 * epsilon)) / (s + 1)
    return xp.sign(x) * u * (u + 2)


def n_step_return(
    reward: Array, discount: Array, valid: Array, value: Array, *, n: int, gamma: float, xp: Any
) -> Array:
    """n-step returns of the first T of T + n - 1 (or more) consecutive rows.

    reward, discount, valid: [T + n - 1, ...] or longer; value: [T + n, ...]; row t holds
    r_{t+1}, 0 where t+1 is terminal, and the value of x_t. The sum stops at the first row that is
    not valid (an episode's last observation) and bootstraps from it: with discount 0 before it if
    the episode terminated. So a truncated episode is bootstrapped, a terminated one is not, and
    nothing passes an end.
    Returns [T, ...].
    """
    rows = value.shape[0] - n
    result = value[n:]
    for k in range(n - 1, -1, -1):
        step = slice(k, k + rows)
        onward = reward[step] + gamma * discount[step] * result
        result = xp.where(valid[step], onward, value[step])
    return result


def masked_mean(x: Array, mask: Array, xp: Any, axis: int = 0) -> Array:
    """Mean over the rows of the mask; 0 where there are none."""
    count = xp.maximum(1, xp.sum(mask, axis=axis))
    return xp.sum(xp.where(mask, x, 0), axis=axis) / count


def transform_reward(reward: Array, how: str, xp: Any) -> Array:
    """`how`: raw | clip (to [-1, 1]) | tanh."""
    if how == "clip":
        return xp.clip(reward, -1, 1)
    return xp.tanh(reward) if how == "tanh" else reward
