"""Running mean and variance, as an agent keeps them in `TrainState.statistics`.

A batch holds rows of every actor, so what is observed in updates is merged over the actors; over
the devices the moments are merged exactly (Chan, Golub & LeVeque 1983): any split of the rows
into devices gives the moments of all rows together.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlx import trees
from rlx.types import Array, record


@record
class Moments:
    """The moments of all rows that were observed."""

    count: Array  # f32[]: rows
    mean: Array  # f32[*]
    spread: Array  # f32[*]: sum of squared differences from the mean


trees.register()


def nothing(shape: tuple[int, ...] = ()) -> Moments:
    """Moments before the first row."""
    return Moments(count=jnp.zeros(()), mean=jnp.zeros(shape), spread=jnp.zeros(shape))


def observe(
    moments: Moments, x: Array, mask: Array | None = None, axis_name: str | None = None
) -> Moments:
    """The moments after rows x [..., *] of all devices; mask bool[...]: which count (None: all)."""
    leading = x.ndim - moments.mean.ndim
    rows = x.reshape(-1, *x.shape[leading:]).astype(jnp.float32)
    kept = jnp.ones(len(rows), bool) if mask is None else mask.reshape(-1)
    kept = kept.reshape(-1, *[1] * moments.mean.ndim)
    count = _sum(kept.sum().astype(jnp.float32), axis_name)
    mean = _sum(jnp.where(kept, rows, 0).sum(axis=0), axis_name) / jnp.maximum(1, count)
    squared = jnp.where(kept, jnp.square(rows - mean[None]), 0).sum(axis=0)
    return merge(moments, Moments(count=count, mean=mean, spread=_sum(squared, axis_name)))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the rows of both, merged exactly."""
    count = a.count + b.count
    share = b.count / jnp.maximum(1, count)
    difference = b.mean - a.mean
    return Moments(
        count=count,
        mean=a.mean + difference * share,
        spread=a.spread + b.spread + jnp.square(difference) * a.count * share,
    )


def normalize(moments: Moments, x: Array, limit: float | None = 10.0) -> Array:
    """(x - mean) / deviation of x [..., *], clipped to +-limit; x itself before the second row."""
    variance = moments.spread / jnp.maximum(1, moments.count)
    known = moments.count > 1
    mean = jnp.where(known, moments.mean, 0)
    scale = jnp.where(known, jax.lax.rsqrt(variance + 1e-8), 1)
    extra = (1,) * (x.ndim - mean.ndim)
    scaled = (x - mean.reshape(extra + mean.shape)) * scale.reshape(extra + scale.shape)
    return scaled if limit is None else jnp.clip(scaled, -limit, limit)


def _sum(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)
