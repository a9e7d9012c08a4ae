"""Where a ring keeps the leaves of its blocks: in memory, in a mapped file, or compressed.

A leaf of the rows is [slots, K, ...] for blocks of K rows, one of the carry [slots, ...]. Nothing
here knows of keys, lanes or priorities; the ring sees to it that no slot is read while it is
written.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import lz4.block
import numpy as np

from rlx import trees
from rlx.problems import refuse
from rlx.replay.available import available_bytes
from rlx.types import ArraySpec, Carry, Leaves, Row

OBSERVATION = "inputs/observation/"
WORTH_THREADS = 4 << 20  # bytes of a batch; below that handing over costs more than it saves
WORTH_COMPRESSING = 4096  # bytes of a block's leaf
PROBE_BLOCKS = 32  # or a hundredth of all: by those, and by twice as many each time, it is known
# how well frames compress


@dataclass(frozen=True, kw_only=True)
class Storing:
    """How a replay keeps its rows (settings of conf/replay)."""

    storage: Literal["memory", "mmap", "device"] = "memory"
    compress: Literal["none", "lz4"] = "none"
    gather_threads: int = 1
    folder: str | Path | None = None  # of the mapped file; None: the system's for temporary files
    device: Any = None  # a jax.Device, where storage is "device"; None: the first one
    shards: int = 1  # rings of this kind in the same memory


class Storage(Protocol):
    """The leaves of `slots` blocks."""

    in_place: bool  # windows are copied into given buffers (`gather`), else into new ones (`take`)

    @property
    def nbytes(self) -> int:
        """Taken now, in memory or on the disk."""

    def write(self, begin: int, rows: Leaves, carry: Leaves) -> None:
        """Blocks [M, ...] into the slots from `begin` on, and on from 0 at the ring's end."""

    def gather(self, slots: np.ndarray, rows: Leaves, carry: Leaves) -> None:
        """Copies windows out: slots i64[n, blocks] -> rows [n, L, ...], carry [n, ...]."""

    def take(self, slots: np.ndarray, length: int) -> tuple[Leaves, Leaves]:
        """The same, as new arrays."""

    def scalars(self, slots: np.ndarray, length: int) -> Leaves:
        """The rows [n, length, ...] of windows i64[n, blocks] without observations."""

    def blocks(self, slots: np.ndarray) -> tuple[Leaves, Leaves]:
        """Copies of whole blocks i64[n]: rows [n, K, ...], carry [n, ...]."""


def make_storage(
    storing: Storing, *, row_spec: Row, carry_spec: Carry, slots: int, block_rows: int
) -> Storage:
    """The storage of these settings; raises ValueError where they cannot be had."""
    rows: dict[str, ArraySpec] = trees.flatten(row_spec)
    carry: dict[str, ArraySpec] = trees.flatten(carry_spec)
    if storing.storage == "device":
        if storing.compress != "none":
            raise ValueError(f"replay.compress={storing.compress} needs replay.storage=memory.")
        from rlx.replay.device import DeviceArrays  # loads JAX

        return DeviceArrays(rows, carry, slots, block_rows, storing.device)
    spread = Spread(storing.gather_threads)
    if storing.compress == "lz4":
        if storing.storage != "memory":
            raise ValueError("replay.compress=lz4 needs replay.storage=memory.")
        images = frames(rows, block_rows)
        if not images:
            raise ValueError(
                "replay.compress=lz4 is for images (uint8 observations of "
                f"{WORTH_COMPRESSING} bytes a block or more); there are none: set none."
            )
        others = {p: leaf for p, leaf in rows.items() if p not in images}
        plain = Arrays(others, carry, slots, block_rows, np.zeros, Spread(1))
        images_spec = {p: rows[p] for p in images}
        return Compressed(plain, images_spec, slots, block_rows, spread, storing.shards)
    allocate = np.zeros if storing.storage == "memory" else MappedFile(storing.folder).zeros
    return Arrays(rows, carry, slots, block_rows, allocate, spread)


def frames(rows: Mapping[str, ArraySpec], block_rows: int) -> set[str]:
    """The leaves that are worth compressing: images."""
    return {
        path
        for path, leaf in rows.items()
        if leaf.dtype == "uint8" and block_rows * leaf_nbytes(leaf) >= WORTH_COMPRESSING
    }


def leaf_nbytes(leaf: ArraySpec) -> int:
    """Of one row or carry."""
    return int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize


class MappedFile:
    """Arrays in a file without a name, which is gone with the process, however it ends.

    All space is reserved at once: a full disk is an error here and not a crash hours later.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = None if folder is None else Path(folder)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Like np.zeros. Raises ValueError if the disk has no room."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder, prefix="rlx-replay-") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, nbytes))
                return np.memmap(file, dtype=dtype, mode="r+", shape=shape)
        except OSError as error:
            where = self._folder or tempfile.gettempdir()
            raise ValueError(
                f"replay.storage=mmap needs {nbytes / 1e9:.2f} GB in {where} "
                f"({error.strerror}); lower replay.capacity or give another replay.folder."
            ) from error


class Spread:
    """Does one piece of work for parts of a batch in a few threads (NumPy's copies take no GIL)."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "gather") if threads > 1 else None

    def over(self, n: int, nbytes: int, work: Callable[[slice], None]) -> None:
        """Calls `work` for slices that make up 0 .. n; one of them in this thread."""
        if self._pool is None or nbytes < WORTH_THREADS or n < self._threads:
            work(slice(0, n))
            return
        edges = [n * i // self._threads for i in range(self._threads + 1)]
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        rest = [self._pool.submit(work, part) for part in parts[1:]]
        work(parts[0])
        for future in rest:
            future.result()


class Arrays:
    """One array per leaf."""

    in_place = True

    def __init__(
        self,
        rows: Mapping[str, ArraySpec],
        carry: Mapping[str, ArraySpec],
        slots: int,
        block_rows: int,
        allocate: Callable[[tuple[int, ...], Any], np.ndarray],
        spread: Spread,
    ) -> None:
        self.rows = {p: allocate((slots, block_rows, *s.shape), s.dtype) for p, s in rows.items()}
        self.carry = {p: allocate((slots, *s.shape), s.dtype) for p, s in carry.items()}
        self._slots, self._block_rows, self._spread = slots, block_rows, spread

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.rows.values(), *self.carry.values()))

    def write(self, begin: int, rows: Leaves, carry: Leaves) -> None:
        pairs = [(self.rows[path], leaf) for path, leaf in rows.items()]
        pairs += [(self.carry[path], leaf) for path, leaf in carry.items()]
        for data, leaf in pairs:
            first = min(len(leaf), self._slots - begin)
            data[begin : begin + first] = leaf[:first]
            data[: len(leaf) - first] = leaf[first:]

    def gather(self, slots: np.ndarray, rows: Leaves, carry: Leaves) -> None:
        length = next(iter(rows.values())).shape[1]
        index = self._row_index(slots, length)

        def work(part: slice) -> None:
            for path, out in rows.items():
                _take(self.rows[path], index[part], out[part])
            for path, out in carry.items():
                np.take(self.carry[path], slots[part, 0], axis=0, out=out[part], mode="clip")

        self._spread.over(len(slots), sum(out.nbytes for out in rows.values()), work)

    def take(self, slots: np.ndarray, length: int) -> tuple[Leaves, Leaves]:
        raise TypeError("the host's windows are copied into buffers: see gather")

    def scalars(self, slots: np.ndarray, length: int) -> Leaves:
        index = self._row_index(slots, length)
        return {
            path: _take(data, index)
            for path, data in self.rows.items()
            if not path.startswith(OBSERVATION)
        }

    def blocks(self, slots: np.ndarray) -> tuple[Leaves, Leaves]:
        rows = {path: data[slots] for path, data in self.rows.items()}
        return rows, {path: data[slots] for path, data in self.carry.items()}

    def _row_index(self, slots: np.ndarray, length: int) -> np.ndarray:
        """i64[n, length]: where the rows lie in the leaves seen as [slots * K, ...]."""
        index = slots[:, :, None] * self._block_rows + np.arange(self._block_rows)
        return index.reshape(len(slots), -1)[:, :length]


def _take(data: np.ndarray, index: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """[n, L, ...] of data [slots, K, ...] by row index; mode "clip" copies without a buffer."""
    flat = data.reshape(-1, *data.shape[2:])
    return np.take(flat, index, axis=0, out=out, mode="clip")


class Compressed:
    """Frames compressed block by block (LZ4), everything else as it is."""

    in_place = True

    def __init__(
        self,
        plain: Arrays,
        images: Mapping[str, ArraySpec],
        slots: int,
        block_rows: int,
        spread: Spread,
        shards: int,
    ) -> None:
        self.plain = plain
        self._slots, self._spread, self._shards = slots, spread, shards
        self._shapes = {p: (block_rows, *leaf.shape) for p, leaf in images.items()}
        self._frames: dict[str, list[bytes]] = {p: [b""] * slots for p in images}
        self._frame_bytes = 0
        self._written = 0  # blocks
        self._probe = max(PROBE_BLOCKS, slots // 100)

    @property
    def nbytes(self) -> int:
        return self.plain.nbytes + self._frame_bytes

    def write(self, begin: int, rows: Leaves, carry: Leaves) -> None:
        self.plain.write(begin, {p: x for p, x in rows.items() if p not in self._frames}, carry)
        for path, kept in self._frames.items():
            leaf = np.ascontiguousarray(rows[path])
            packed: list[bytes] = [b""] * len(leaf)

            def pack(part: slice, leaf: np.ndarray = leaf, packed: list[bytes] = packed) -> None:
                for i in range(part.start, part.stop):
                    packed[i] = lz4.block.compress(leaf[i], store_size=True)

            self._spread.over(len(leaf), leaf.nbytes, pack)
            for i, data in enumerate(packed):
                slot = (begin + i) % self._slots
                self._frame_bytes += len(data) - len(kept[slot])
                kept[slot] = data
        self._written += len(leaf)
        if self._probe <= self._written < 2 * self._slots:
            self._check_fits(self._written)
            self._probe = 2 * self._written

    def _check_fits(self, written: int) -> None:
        """What all shards will take, as far as this one's first blocks tell; raises ConfigError."""
        part = min(written, self._slots) / self._slots
        taken = self._shards * self._frame_bytes
        whole = int(taken / part)
        untouched = int(self._shards * self.plain.nbytes * (1.0 - part))  # allocated, not taken yet
        free = available_bytes() + taken - untouched
        if whole > free:
            raise refuse(
                "replay.capacity",
                f"its frames will take about {whole / 1e9:.2f} GB compressed, {free / 1e9:.2f} GB "
                "are available; lower it, or set replay.storage=mmap replay.compress=none",
            )

    def gather(self, slots: np.ndarray, rows: Leaves, carry: Leaves) -> None:
        others = {p: x for p, x in rows.items() if p not in self._frames}
        self.plain.gather(slots, others, carry)
        for path in self._frames:
            out = rows[path]

            def work(part: slice, path: str = path, out: np.ndarray = out) -> None:
                for i in range(part.start, part.stop):
                    self._unpack(path, slots[i], out[i])

            self._spread.over(len(slots), out.nbytes, work)

    def take(self, slots: np.ndarray, length: int) -> tuple[Leaves, Leaves]:
        raise TypeError("the host's windows are copied into buffers: see gather")

    def scalars(self, slots: np.ndarray, length: int) -> Leaves:
        return self.plain.scalars(slots, length)

    def blocks(self, slots: np.ndarray) -> tuple[Leaves, Leaves]:
        rows, carry = self.plain.blocks(slots)
        for path, shape in self._shapes.items():
            out = np.empty((len(slots), *shape), np.uint8)
            for i, slot in enumerate(slots):
                self._unpack(path, slot[None], out[i])
            rows[path] = out
        return rows, carry

    def _unpack(self, path: str, slots: np.ndarray, out: np.ndarray) -> None:
        """The rows [L, ...] of one window of slots i64[blocks]."""
        at, shape, kept = 0, self._shapes[path], self._frames[path]
        for slot in slots.tolist():
            rows = min(shape[0], len(out) - at)
            if rows <= 0:
                return
            block = np.frombuffer(lz4.block.decompress(kept[slot]), np.uint8).reshape(shape)
            out[at : at + rows] = block[:rows]
            at += rows
