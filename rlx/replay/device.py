"""A ring's leaves in the memory of the learner's device (`replay=device_prioritized`).

Blocks are written in place (donated buffers) and windows are gathered there: of a sample only the
slots' numbers cross the bus. What first priorities are computed from stays on the host as well.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlx.replay.available import available_bytes
from rlx.replay.storage import OBSERVATION, Arrays, Spread, leaf_nbytes
from rlx.types import ArraySpec, Leaves


class DeviceArrays:
    """One array per leaf on a device; an rlx.replay.storage.Storage."""

    in_place = False

    def __init__(
        self,
        rows: Mapping[str, ArraySpec],
        carry: Mapping[str, ArraySpec],
        slots: int,
        block_rows: int,
        device: jax.Device | None = None,
    ) -> None:
        """device: None is the first one. Raises ValueError if it has not that much memory."""
        self._device = device or jax.local_devices()[0]
        self._slots = slots
        shapes = {f"rows/{p}": ((slots, block_rows, *s.shape), s) for p, s in rows.items()}
        shapes |= {f"carry/{p}": ((slots, *s.shape), s) for p, s in carry.items()}
        block = block_rows * sum(map(leaf_nbytes, rows.values()))
        nbytes = slots * (block + sum(map(leaf_nbytes, carry.values())))
        _check_fits(nbytes, self._device)
        with jax.default_device(self._device):
            self._leaves = {p: jax.numpy.zeros(shape, s.dtype) for p, (shape, s) in shapes.items()}
        scalars = {p: s for p, s in rows.items() if not p.startswith(OBSERVATION)}
        self._scalars = Arrays(scalars, {}, slots, block_rows, np.zeros, Spread(1))
        # A write donates the arrays: nobody may be about to read them.
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self._leaves.values()) + self._scalars.nbytes

    def write(self, begin: int, rows: Leaves, carry: Leaves) -> None:
        scalars = {p: x for p, x in rows.items() if not p.startswith(OBSERVATION)}
        self._scalars.write(begin, scalars, {})
        blocks = {f"rows/{p}": x for p, x in rows.items()}
        blocks |= {f"carry/{p}": x for p, x in carry.items()}
        count = len(next(iter(blocks.values())))
        slots = (begin + np.arange(count)) % self._slots
        size = 1 << (count - 1).bit_length()  # compiled for 1, 2, 4, ... blocks only
        at = np.full(size, self._slots, np.int32)  # outside: dropped
        at[:count] = slots
        blocks = jax.device_put({p: _padded(x, size) for p, x in blocks.items()}, self._device)
        with self._lock:
            self._leaves = _write(self._leaves, blocks, at)

    def gather(self, slots: np.ndarray, rows: Leaves, carry: Leaves) -> None:
        raise TypeError("what lies on a device is not copied into the host's buffers")

    def take(self, slots: np.ndarray, length: int) -> tuple[Leaves, Leaves]:
        """Windows i64[n, blocks] -> rows [n, length, ...] and carry [n, ...], on the device."""
        with self._lock:
            found = _take(self._leaves, slots.astype(np.int32), length)
        return _below(found, "rows/"), _below(found, "carry/")

    def scalars(self, slots: np.ndarray, length: int) -> Leaves:
        return self._scalars.scalars(slots, length)

    def blocks(self, slots: np.ndarray) -> tuple[Leaves, Leaves]:
        with self._lock:
            found = {p: leaf[slots.astype(np.int32)] for p, leaf in self._leaves.items()}
        host = {p: np.asarray(leaf) for p, leaf in found.items()}
        return _below(host, "rows/"), _below(host, "carry/")


def side_by_side(parts: Sequence[jax.Array]) -> jax.Array:
    """Parts [B / D, ...] that lie on D devices as one array [B, ...], where they lie."""
    (share,) = {part.shape for part in parts}
    mesh = Mesh(np.array([part.device for part in parts]), ("devices",))
    whole = (len(parts) * share[0], *share[1:])
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    return jax.make_array_from_single_device_arrays(whole, sharding, list(parts))


def _check_fits(nbytes: int, device: jax.Device) -> None:
    stats = device.memory_stats()
    free = stats["bytes_limit"] - stats["bytes_in_use"] if stats else available_bytes()
    if nbytes > free:
        raise ValueError(
            f"replay=device_prioritized takes {nbytes / 1e9:.2f} GB on {device}, which has "
            f"{free / 1e9:.2f} GB left; lower replay.capacity, or use replay=prioritized."
        )


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    if len(x) == size:
        return x
    padded = np.zeros((size, *x.shape[1:]), x.dtype)
    padded[: len(x)] = x
    return padded


@functools.partial(jax.jit, donate_argnums=0)
def _write(leaves: Leaves, blocks: Leaves, at: Any) -> Leaves:
    return {p: leaf.at[at].set(blocks[p], mode="drop") for p, leaf in leaves.items()}


@functools.partial(jax.jit, static_argnums=2)
def _take(leaves: Leaves, slots: Any, length: int) -> Leaves:
    """Whole blocks are copied, then what is beyond the window is cut off."""

    def window(leaf: Any) -> Any:
        some = leaf[slots]  # [n, blocks, K, ...]
        return some.reshape(len(slots), -1, *leaf.shape[2:])[:, :length]

    return {
        p: window(leaf) if p.startswith("rows/") else leaf[slots[:, 0]]
        for p, leaf in leaves.items()
    }


def _below(leaves: Leaves, name: str) -> Leaves:
    return {p.removeprefix(name): leaf for p, leaf in leaves.items() if p.startswith(name)}
