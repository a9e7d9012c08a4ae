"""Actions, and other choices, as networks read them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from rlx.types import ActionSpec, Array, BoxSpec, Categories, MultiDiscreteSpec


def encode_action(action: Array, spec: ActionSpec, dtype: Any) -> Array:
    """action [..., *] as [..., size]: one-hots side by side, or a box's elements.

    Elements between two finite bounds are scaled so that the bounds are -1 and 1; the others stay
    as they are. A choice of -1 is all zeros.
    """
    if isinstance(spec, BoxSpec):
        return _scale(_flat(action, spec), spec).astype(dtype)
    if isinstance(spec, MultiDiscreteSpec):
        parts = [nn.one_hot(action[..., i], n, dtype=dtype) for i, n in enumerate(spec.counts)]
        return jnp.concatenate(parts, axis=-1)
    return nn.one_hot(action, spec.n, dtype=dtype)


def encode_categories(leaf: Array, categories: Categories, dtype: Any) -> Array:
    """A leaf [n, *] of numbers of categories as [n, size]: one-hots side by side."""
    numbers = leaf.reshape(leaf.shape[0], len(categories.counts))
    numbers = numbers - np.asarray(categories.first, numbers.dtype)[None]
    return encode_action(numbers, MultiDiscreteSpec(counts=categories.counts), dtype)


def encode_previous(action: Array, first: Array, spec: ActionSpec, dtype: Any) -> Array:
    """`encode_action` of previous actions [..., *]; all zeros where `first` [...], for none.

    A box's actions are read as the environment took them: clipped to the bounds.
    """
    if not isinstance(spec, BoxSpec):
        return encode_action(action, spec, dtype)  # none is -1
    flat = _flat(action, spec)
    encoded = _scale(flat.clip(*_limits(spec, flat.ndim)), spec).astype(dtype)
    # 0.0, which stands for none, may be an action like any other.
    return jnp.where(first[..., None], 0, encoded)


def _flat(action: Array, spec: BoxSpec) -> Array:
    """[..., *] -> [..., size]."""
    leading = action.shape[: action.ndim - len(spec.shape)]
    return action.reshape(*leading, len(spec.low))


def _limits(spec: BoxSpec, ndim: int) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), f32[..., size] of so many axes."""
    shape = (*(1,) * (ndim - 1), len(spec.low))
    return (
        np.asarray(spec.low, np.float32).reshape(shape),
        np.asarray(spec.high, np.float32).reshape(shape),
    )


def middle_and_half(spec: BoxSpec, ndim: int) -> tuple[np.ndarray, np.ndarray]:
    """(middle, half the range) f32[..., size] of so many axes; (0, 1) without two finite bounds."""
    low, high = (limit.astype(np.float64) for limit in _limits(spec, ndim))
    bounded = np.isfinite(low) & np.isfinite(high) & (low < high)
    low, high = np.where(bounded, low, -1), np.where(bounded, high, 1)
    middle, half = (low + high) / 2, (high - low) / 2
    return middle.astype(np.float32), half.astype(np.float32)


def _scale(flat: Array, spec: BoxSpec) -> Array:
    middle, half = middle_and_half(spec, flat.ndim)
    return (flat - middle) / half
