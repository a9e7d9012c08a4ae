"""Carries what travels between a run and its replay in another process."""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from rlx import trees
from rlx.types import Batch

ALIGN = 64  # bytes


def send(wire: Connection, message: Any) -> None:
    """Pickles it; large arrays are written from where they lie."""
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=arrays.append)
    views = [array.raw() for array in arrays]
    wire.send_bytes(pickle.dumps((head, [view.nbytes for view in views])))
    for view in views:
        if view.nbytes:
            wire.send_bytes(view)


def receive(wire: Connection) -> Any:
    """The inverse; raises EOFError or OSError where the other side is gone."""
    head, sizes = pickle.loads(wire.recv_bytes())
    arrays = [np.empty(size, np.uint8) for size in sizes]
    for array in arrays:
        if array.nbytes:
            wire.recv_bytes_into(array)
    return pickle.loads(head, buffers=arrays)


@dataclass(frozen=True, kw_only=True)
class Status:
    """The loop asks for this in every turn; it is as of the last call."""

    startable: int
    has_enough: bool
    rows: int
    env_steps: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Made:
    """A replay's process says this of it once it is there."""

    ratio: float | None
    min_sequences: int
    min_env_steps: int
    capacity: int
    needs_priorities: bool
    block_nbytes: Sequence[float]  # of each ring
    said: Sequence[str]  # its log


@dataclass(frozen=True, kw_only=True)
class Drew:
    """A sample without its arrays."""

    buffer: int
    importance: np.ndarray
    keys: np.ndarray
    weights_version: np.ndarray
    least_scaled_probability: float
    importance_exponent: float


@dataclass(frozen=True, kw_only=True)
class ArrayAt:
    """An array in the shared memory."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    def of(self, memory: mmap.mmap) -> np.ndarray:
        count = int(np.prod(self.shape, dtype=np.int64))
        return np.frombuffer(memory, self.dtype, count, self.offset).reshape(self.shape)


def planned(batches: Sequence[Batch]) -> tuple[list[Batch], int]:
    """Plans where the arrays of these batches are to lie, and returns the bytes of all, too."""
    at = 0

    def place(x: np.ndarray) -> ArrayAt:
        nonlocal at
        place = ArrayAt(offset=at, shape=x.shape, dtype=x.dtype.name)
        at += -(-x.nbytes // ALIGN) * ALIGN
        return place

    return [trees.tree_map(place, batch) for batch in batches], at
