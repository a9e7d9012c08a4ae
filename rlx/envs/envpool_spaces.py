"""Reads what EnvPool's specs say of observations and actions."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlx.envs.observations import Source, leaf_name
from rlx.types import ActionSpec, BoxSpec, Categories, DiscreteSpec, MultiDiscreteSpec


def read_sources(raw: Any) -> list[Source]:
    """The arrays of an observation; a single array has no name, whatever EnvPool calls it."""
    specs = {k: v for k, v in raw.state_array_spec.items() if k.split(":")[0] == "obs"}
    found = []
    for key, spec in specs.items():
        keys = key.replace(":", ".").split(".")[1:]
        found.append(
            Source(
                name=leaf_name(() if len(specs) == 1 else keys),
                path=(key,),
                # A leading -1 counts players, of which there is one: EnvPool drops that axis.
                shape=tuple(int(size) for size in spec.shape if size != -1),
                dtype=np.dtype(spec.dtype).name,
                **_range(spec),
            )
        )
    return found


def _range(spec: Any) -> dict[str, Any]:
    """The declared range, and the categories: one bounded integer is a choice, as EnvPool says."""
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        bounds = _bounds(spec, dtype)
        return {"low": float(bounds[0].min()), "high": float(bounds[1].max())}
    low, high = int(np.min(spec.minimum)), int(np.max(spec.maximum))
    found: dict[str, Any] = {"low": low, "high": high}
    if dtype.kind in "iu" and not [size for size in spec.shape if size != -1]:
        limits = np.iinfo(dtype)
        if limits.min < low <= high < limits.max:
            found["categories"] = Categories(first=(low,), counts=(high - low + 1,))
    return found


def action_spec(env_id: str, raw: Any) -> ActionSpec:
    actions = {k: v for k, v in raw.action_array_spec.items() if not k.endswith("env_id")}
    if raw.config.max_num_players > 1 or len(actions) != 1:
        raise ValueError(
            f"env.id={env_id!r} has {raw.config.max_num_players} players and the actions "
            f"{sorted(actions)}; accepted: one player, one action"
        )
    (spec,) = actions.values()
    shape = tuple(int(size) for size in spec.shape if size != -1)
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return _box_spec(spec, shape, dtype)
    first, last = np.broadcast_to(spec.minimum, shape), np.broadcast_to(spec.maximum, shape)
    if dtype.kind != "i" or len(shape) > 1 or first.any():
        raise ValueError(
            f"env.id={env_id!r} takes {dtype.name}{list(shape)} actions from {spec.minimum}; "
            "accepted: discrete ones from 0, one or a row of them, and boxes of floats"
        )
    counts = (last.astype(int) + 1).tolist()
    return MultiDiscreteSpec(counts=tuple(counts)) if shape else DiscreteSpec(n=counts)


def _box_spec(spec: Any, shape: tuple[int, ...], dtype: np.dtype) -> BoxSpec:
    low, high = _bounds(spec, dtype)
    return BoxSpec(
        shape=shape,
        low=tuple(np.broadcast_to(low, shape).ravel().tolist()),
        high=tuple(np.broadcast_to(high, shape).ravel().tolist()),
    )


def _bounds(spec: Any, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The bounds of floats; infinite where nobody gave any."""
    limits = np.finfo(dtype)  # EnvPool has the smallest positive (!) and largest number there
    low = np.where(np.equal(spec.minimum, limits.tiny), -np.inf, spec.minimum)
    return low, np.where(np.equal(spec.maximum, limits.max), np.inf, spec.maximum)
