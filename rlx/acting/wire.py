"""Rollouts and weights as they travel between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lz4.block
import ml_dtypes  # noqa: F401  # gives NumPy the dtype bfloat16
import numpy as np

from rlx import trees
from rlx.types import Rollout, Weights

Compression = Literal["none", "lz4"]
STATISTICS = "statistics"  # of an agent's acting parameters
WORTH_COMPRESSING = 4096  # bytes; smaller arrays cost more than they give


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A compressed array. `data` is an array, not bytes: arrays travel without a copy."""

    data: np.ndarray  # u8[compressed bytes]
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An actor sends this back for a request."""

    rollout: Any  # a Rollout, some leaves of its rows Packed
    raw_bytes: int  # of the arrays, before
    wire_bytes: int  # and after compression
    weights_version: int  # acted with at the end of this request
    weights_taken_s: float  # time.time() when those were taken up


def pack(rollout: Rollout, compression: Compression) -> tuple[Rollout, int, int]:
    """Returns (the rollout to send, its arrays' bytes before, and after)."""
    if compression == "none":
        raw = nbytes(rollout)
        return rollout, raw, raw
    packed = replace_arrays(rollout, _pack_array)
    return packed, nbytes(rollout), nbytes(packed)


def unpack(rollout: Rollout) -> Rollout:
    """Inverts `pack`, whatever the compression."""
    return replace_arrays(rollout, _unpack_array)


def replace_arrays(rollout: Rollout, function: Any) -> Rollout:
    """The same rollout with other rows and carries; the rest is too small to matter."""
    return Rollout(
        rows=trees.tree_map(function, rollout.rows),
        carry=trees.tree_map(function, rollout.carry),
        next=rollout.next,
        lane=rollout.lane,
        chain=rollout.chain,
        number=rollout.number,
        weights_version=rollout.weights_version,
        episodes=rollout.episodes,
        env_steps=rollout.env_steps,
        frames=rollout.frames,
        timings=rollout.timings,
        cuts=rollout.cuts,
    )


def nbytes(rollout: Rollout) -> int:
    """Bytes of all arrays."""
    parts = (rollout.rows, rollout.carry, rollout.next, rollout.lane, rollout.number)
    return sum(_nbytes(leaf) for part in parts for leaf in trees.flatten(part).values())


def _nbytes(leaf: Any) -> int:
    return int(leaf.data.nbytes if isinstance(leaf, Packed) else leaf.nbytes)


def _pack_array(array: np.ndarray) -> Any:
    """Compresses arrays of bytes (emulator frames shrink about tenfold), but no floats."""
    if array.dtype != np.uint8 or array.nbytes < WORTH_COMPRESSING:
        return array
    data = lz4.block.compress(np.ascontiguousarray(array), store_size=True)
    return Packed(data=np.frombuffer(data, np.uint8), shape=array.shape, dtype="uint8")


def _unpack_array(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, Packed):
        return leaf
    data = lz4.block.decompress(leaf.data)
    return np.frombuffer(data, leaf.dtype).reshape(leaf.shape)


def narrowed(weights: Weights, dtype: str) -> Weights:
    """The parameters as they travel: float32 leaves in `dtype`, but running statistics as they are.

    Statistics are what `params["statistics"]` holds: rounded means would shift what is read.
    """
    if dtype == "float32":
        return weights

    def narrow(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype) if x.dtype == np.float32 else x

    params = trees.tree_map(narrow, weights.params)
    if isinstance(params, Mapping) and STATISTICS in params:
        params = {**params, STATISTICS: weights.params[STATISTICS]}
    return Weights(version=weights.version, params=params)


def widened(weights: Weights) -> Weights:
    """The parameters as they are used: the inverse of `narrowed`."""

    def widen(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32) if x.dtype.name == "bfloat16" else x

    return Weights(version=weights.version, params=trees.tree_map(widen, weights.params))
