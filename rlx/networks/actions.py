"""Actions as networks read them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from rlx.types import Array, DiscreteSpec


def encode_action(action: Array, spec: Any, dtype: Any) -> Array:
    """[..., size]: one-hot for a discrete action; "none" (-1) is all zeros."""
    if not isinstance(spec, DiscreteSpec):
        raise ValueError(f"{spec} cannot be read; set network.prev_action=false")
    return nn.one_hot(action, spec.n, dtype=dtype)
