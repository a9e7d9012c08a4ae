"""Reads what gymnasium's spaces say of observations and actions."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from rlx.envs.actions import Start
from rlx.envs.observations import Source, leaf_name
from rlx.types import (
    ActionSpec,
    BoxSpec,
    Categories,
    DiscreteSpec,
    MultiDiscreteSpec,
)

MOST = 2**31 - 1  # actions are int32


def read_sources(space: Any, path: tuple[Any, ...] = ()) -> list[Source]:
    """The arrays of an observation space; dicts and tuples are flattened, nested or not.

    An element of a Tuple has its index for a name: "0", "camera/1".
    """
    if isinstance(space, gymnasium.spaces.Dict):
        return [s for key, part in space.items() for s in read_sources(part, (*path, key))]
    if isinstance(space, gymnasium.spaces.Tuple):
        return [s for i, part in enumerate(space) for s in read_sources(part, (*path, i))]
    name = leaf_name([str(key) for key in path])
    dtype = getattr(space, "dtype", None)
    shape = getattr(space, "shape", None)
    if dtype is None or shape is None or np.dtype(dtype).kind not in "biuf":
        shown = " ".join(str(space).split())[:100]
        return [Source(name=name, path=path, shape=(), dtype="object", unreadable=shown)]
    low, high, categories = _range(space)
    return [
        Source(
            name=name,
            path=path,
            shape=tuple(int(size) for size in shape),
            dtype=np.dtype(dtype).name,
            low=low,
            high=high,
            categories=categories,
        )
    ]


def _range(space: Any) -> tuple[float, float, Categories | None]:
    """(the least and the largest value that a space declares, its categories)."""
    spaces = gymnasium.spaces
    if isinstance(space, spaces.Discrete):
        first, count = int(space.start), int(space.n)
        return first, first + count - 1, Categories(first=(first,), counts=(count,))
    if isinstance(space, spaces.MultiDiscrete):
        first, counts = space.start.ravel().tolist(), space.nvec.ravel().tolist()
        last = [a + n - 1 for a, n in zip(first, counts, strict=True)]
        categories = Categories(first=tuple(first), counts=tuple(counts))
        return min(first, default=0), max(last, default=0), categories
    if isinstance(space, spaces.MultiBinary):
        return 0, 1, None
    if isinstance(space, spaces.Box) and space.low.size:
        return space.low.min().item(), space.high.max().item(), None
    return -np.inf, np.inf, None


def action_spec(env_id: str, space: Any) -> tuple[ActionSpec, Start]:
    """The action's spec and the number of the first action."""
    spaces = gymnasium.spaces
    if isinstance(space, spaces.Discrete) and int(space.n) > MOST:
        raise ValueError(f"env.id={env_id!r} takes {space}; accepted: at most {MOST:,} choices")
    if isinstance(space, spaces.Discrete):
        return DiscreteSpec(n=int(space.n)), int(space.start)
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        counts = MultiDiscreteSpec(counts=tuple(space.nvec.tolist()))
        return counts, tuple(space.start.tolist())
    if isinstance(space, spaces.MultiBinary) and len(space.shape) == 1:
        return MultiDiscreteSpec(counts=(2,) * space.shape[0]), 0
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":
        low, high = space.low.ravel().tolist(), space.high.ravel().tolist()
        return BoxSpec(shape=tuple(space.shape), low=tuple(low), high=tuple(high)), 0
    found = " ".join(str(space).split())  # arrays print over several lines
    raise ValueError(
        f"env.id={env_id!r} takes {found}; accepted: Discrete, MultiDiscrete and MultiBinary of "
        "one axis, and Box of floats"
    )
