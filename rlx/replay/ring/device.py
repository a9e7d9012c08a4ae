"""A ring's leaves in the memory of the learner's device (`replay=device_prioritized`).

Blocks are written in place (donated buffers) and windows are gathered there: of a sample only the
slots' numbers cross the bus. What first priorities are computed from stays on the host as well.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlx.machine.memory import available_bytes
from rlx.replay.ring.block_spec import (
    CARRY,
    FIRST,
    FRAMES,
    INPUTS,
    NEXT,
    OBSERVATION,
    ROWS,
    BlockSpec,
    Windows,
)
from rlx.replay.ring.storage import Arrays
from rlx.types import Leaves


class DeviceArrays:
    """One array per leaf on a device; an rlx.replay.ring.storage.Storage."""

    in_place = False

    def __init__(self, spec: BlockSpec, slots: int, device: jax.Device | None = None) -> None:
        """device: None is the first one. Raises ValueError if it has not that much memory."""
        self._device = device or jax.local_devices()[0]
        self._spec, self._slots = spec, slots
        _check_fits(slots * spec.nbytes, self._device)
        with jax.default_device(self._device):
            self._leaves = {
                path: jax.numpy.zeros((slots, *leaf.shape), leaf.dtype)
                for path, leaf in spec.stored.items()
            }
        self._scalars = Arrays(spec, slots, only=spec.scalars)
        # A write donates the arrays: nobody may be about to read them.
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self._leaves.values()) + self._scalars.nbytes

    def write(self, begin: int, leaves: Leaves) -> None:
        self._scalars.write(begin, leaves)
        count = len(leaves[FIRST])
        slots = (begin + np.arange(count)) % self._slots
        size = 1 << (count - 1).bit_length()  # compiled for 1, 2, 4, ... blocks only
        at = np.full(size, self._slots, np.int32)  # outside: dropped
        at[:count] = slots
        blocks = jax.device_put({p: _padded(x, size) for p, x in leaves.items()}, self._device)
        with self._lock:
            self._leaves = _write(self._leaves, blocks, at)

    def gather(self, windows: Windows, out: Leaves) -> None:
        raise TypeError("what lies on a device is not copied into the host's buffers")

    def take(self, windows: Windows) -> Leaves:
        """Windows as new arrays on the device: rows/, next/ and carry/."""
        spec, length = self._spec, self._spec.sequence.length
        slots = windows.slots.astype(np.int32)
        if not spec.starts_inside:
            with self._lock:
                return _take_blocks(self._leaves, slots, length)
        places = spec.places(windows)
        at_end = np.zeros(len(windows), bool)
        at_end[places.at_end] = True
        last = slots[:, 0].copy()
        last[places.at_end] = places.last_slot
        where = {"rows": places.rows, "next": places.following}
        before = self._scalars.frames_before(windows)
        with self._lock:
            return _take_rows(
                self._leaves,
                {name: place.astype(np.int32) for name, place in where.items()},
                {path: place.astype(np.int32) for path, place in before.items()},
                {"first": slots[:, 0], "last": last, "at_end": at_end},
            )

    def scalars(self, windows: Windows) -> Leaves:
        return self._scalars.scalars(windows)

    def blocks(self, slots: np.ndarray) -> Leaves:
        with self._lock:
            found = {p: leaf[slots.astype(np.int32)] for p, leaf in self._leaves.items()}
        return {p: np.asarray(leaf) for p, leaf in found.items()}


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
def _take_blocks(leaves: Leaves, slots: Any, length: int) -> Leaves:
    """Windows from blocks' first rows: whole blocks are copied, then what is beyond is cut off."""
    found = {p: leaf[slots[:, 0]] for p, leaf in leaves.items() if p.startswith(CARRY)}
    for path, leaf in leaves.items():
        if path.startswith(ROWS):
            some = leaf[slots]  # [n, blocks, K, ...]
            rows = some.reshape(len(slots), -1, *leaf.shape[2:])
            found[path] = rows[:, :length]
            if path.startswith(INPUTS):
                after = NEXT + path.removeprefix(INPUTS)
                stored = leaves.get(after)
                found[after] = rows[:, length] if stored is None else stored[slots[:, -1]]
    return found


@jax.jit
def _take_rows(leaves: Leaves, where: Leaves, before: Leaves, ends: Leaves) -> Leaves:
    """Windows from any row: see BlockSpec.places and .frames_before."""
    found = {}
    for path, leaf in leaves.items():
        if path.startswith(CARRY):
            name = OBSERVATION + path.removeprefix(FRAMES)
            found[path] = _frames(leaf, leaves[name], ends["first"], before[path])
        elif path.startswith(ROWS):
            rows = leaf.reshape(-1, *leaf.shape[2:])
            found[path] = rows[where["rows"]]
            if path.startswith(INPUTS):
                after, following = NEXT + path.removeprefix(INPUTS), rows[where["next"]]
                found[after] = _ends(leaves.get(after), following, ends)
    return found


def _frames(carry: Any, rows: Any, slots: Any, before: Any) -> Any:
    """[n, S-1, ...]: frames of the rows, or below 0 of the carry."""
    count = carry.shape[1]
    of_rows = rows[slots[:, None], jax.numpy.maximum(before, 0)]
    of_carry = carry[slots[:, None], jax.numpy.minimum(before, -1) + count]
    return _where(before >= 0, of_rows, of_carry)


def _ends(stored: Any, following: Any, ends: Leaves) -> Any:
    if stored is None:
        return following
    return _where(ends["at_end"], stored[ends["last"]], following)


def _where(condition: Any, a: Any, b: Any) -> Any:
    """Chooses along the leading axes."""
    return jax.numpy.where(
        condition.reshape(*condition.shape, *[1] * (a.ndim - condition.ndim)), a, b
    )
