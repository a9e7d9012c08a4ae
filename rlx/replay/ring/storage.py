"""Keeps the leaves of a ring's blocks: in memory, in a mapped file, or compressed.

Leaves are named and shaped as in `block_spec`, with a first axis of slots. Nothing here
knows of keys, lanes or priorities; the ring sees to it that no slot is read while it is written.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import lz4.block
import numpy as np

from rlx.machine.memory import available_bytes
from rlx.problems import refuse
from rlx.replay.ring.block_spec import (
    FIRST,
    FRAMES,
    NEXT,
    OBSERVATION,
    ROWS,
    BlockSpec,
    Places,
    Windows,
    input_path,
    leaf_nbytes,
)
from rlx.types import Leaves

WORTH_THREADS = 4 << 20  # bytes of a batch; below that handing over costs more than it saves
WORTH_COMPRESSING = 4096  # bytes of a block's leaf
PROBE_BLOCKS = 32  # or a hundredth of all: by those, and by twice as many each time, it is known
# how well frames compress


@dataclass(frozen=True, kw_only=True)
class Storing:
    """One ring keeps its rows by these settings."""

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
        """Bytes taken now, in memory or on the disk."""

    def write(self, begin: int, leaves: Leaves) -> None:
        """Blocks [M, ...] into the slots from `begin` on, and on from 0 at the ring's end."""

    def gather(self, windows: Windows, out: Leaves) -> None:
        """Copies n windows out: rows/ [n, L, ...], next/ [n, ...] and carry/ [n, ...]."""

    def take(self, windows: Windows) -> Leaves:
        """The same, as new arrays."""

    def scalars(self, windows: Windows) -> Leaves:
        """Rows [n, L + 1] without observations.

        The last one is the row after the window's, or the window's last row once more where the
        window ends with a block.
        """

    def blocks(self, slots: np.ndarray) -> Leaves:
        """Copies of whole blocks i64[n]."""


def images(spec: BlockSpec) -> set[str]:
    """The leaves of rows that are worth compressing."""
    return {
        path
        for path, leaf in spec.stored.items()
        if path.startswith(OBSERVATION)
        and leaf.dtype == "uint8"
        and leaf_nbytes(leaf) >= WORTH_COMPRESSING
    }


class MappedFile:
    """Arrays in a file without a name, which is gone with the process, however it ends.

    All space is reserved at once: a full disk is an error here and not a crash hours later.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = None if folder is None else Path(folder)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Zeros in the file, like np.zeros. Raises ValueError if the disk has no room."""
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


Allocate = Callable[[tuple[int, ...], Any], np.ndarray]


class Arrays:
    """One array per leaf."""

    in_place = True

    def __init__(
        self,
        spec: BlockSpec,
        slots: int,
        *,
        allocate: Allocate = np.zeros,
        spread: Spread | None = None,
        only: Iterable[str] | None = None,
    ) -> None:
        """only: the paths to keep; None: all of the spec."""
        kept = spec.stored.keys() if only is None else set(only)
        self.leaves = {
            path: allocate((slots, *leaf.shape), leaf.dtype)
            for path, leaf in spec.stored.items()
            if path in kept
        }
        self._spec, self._slots, self._spread = spec, slots, spread or Spread(1)

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def write(self, begin: int, leaves: Leaves) -> None:
        for path, data in self.leaves.items():
            leaf = leaves[path]
            first = min(len(leaf), self._slots - begin)
            data[begin : begin + first] = leaf[:first]
            data[: len(leaf) - first] = leaf[first:]

    def gather(self, windows: Windows, out: Leaves) -> None:
        self.copy(windows, self._spec.places(windows), self.frames_before(windows), out)

    def copy(
        self, windows: Windows, places: Places, before: dict[str, np.ndarray], out: Leaves
    ) -> None:
        """`gather` of these leaves, given what of the windows they all need."""

        def work(part: slice) -> None:
            for path, leaf in out.items():
                if path.startswith(ROWS):
                    self._rows(path, places.rows[part], leaf[part])
                elif path.startswith(NEXT):
                    self._rows(input_path(path), places.following[part], leaf[part])
                elif path in before:
                    self._frames(path, windows.slots[part, 0], before[path][part], leaf[part])
                else:
                    slots = windows.slots[part, 0]
                    np.take(self.leaves[path], slots, axis=0, out=leaf[part], mode="clip")

        self._spread.over(len(windows), sum(leaf.nbytes for leaf in out.values()), work)
        if places.at_end.size:
            for path, leaf in out.items():
                if path.startswith(NEXT):
                    leaf[places.at_end] = self.leaves[path][places.last_slot]

    def frames_before(self, windows: Windows) -> dict[str, np.ndarray]:
        """See BlockSpec.frames_before."""
        if not self._spec.starts_inside:
            return {}
        return self._spec.frames_before(windows, self.leaves[FIRST][windows.slots[:, 0]])

    def take(self, windows: Windows) -> Leaves:
        raise TypeError("the host's windows are copied into buffers: see gather")

    def scalars(self, windows: Windows) -> Leaves:
        places = self._spec.places(windows)
        index = np.concatenate([places.rows, places.following[:, None]], axis=1)
        return {path: self._rows(path, index) for path in self._spec.scalars}

    def blocks(self, slots: np.ndarray) -> Leaves:
        return {path: data[slots] for path, data in self.leaves.items()}

    def _rows(self, path: str, index: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Rows by their places i64[...]; mode "clip" copies without a buffer."""
        data = self.leaves[path]
        flat = data.reshape(-1, *data.shape[2:])
        return np.take(flat, index, axis=0, out=out, mode="clip")

    def _frames(self, path: str, slots: np.ndarray, before: np.ndarray, out: np.ndarray) -> None:
        """Frames out [n, S-1, ...] of slots i64[n]; before i64[n, S-1]: see `frames_before`."""
        rows = self.leaves[self._spec.frames_of[path]]
        which, place = np.nonzero(before >= 0)
        out[which, place] = rows[slots[which], before[which, place]]
        which, place = np.nonzero(before < 0)
        out[which, place] = self.leaves[path][slots[which], before[which, place]]


class Compressed:
    """Frames compressed block by block (LZ4), everything else as it is."""

    in_place = True

    def __init__(self, spec: BlockSpec, slots: int, *, spread: Spread, shards: int) -> None:
        """shards: rings of this kind in the same memory."""
        packed = images(spec)
        self.plain = Arrays(spec, slots, only=spec.stored.keys() - packed)
        self._spec, self._slots, self._spread, self._shards = spec, slots, spread, shards
        self._shapes = {path: spec.stored[path].shape for path in packed}
        self._frames: dict[str, list[bytes]] = {path: [b""] * slots for path in packed}
        self._frame_bytes = 0
        self._written = 0  # blocks
        self._probe = max(PROBE_BLOCKS, slots // 100)

    @property
    def nbytes(self) -> int:
        return self.plain.nbytes + self._frame_bytes

    def write(self, begin: int, leaves: Leaves) -> None:
        self.plain.write(begin, leaves)
        for path, kept in self._frames.items():
            for i, data in enumerate(self._pack(np.ascontiguousarray(leaves[path]))):
                slot = (begin + i) % self._slots
                self._frame_bytes += len(data) - len(kept[slot])
                kept[slot] = data
        self._written += len(leaves[FIRST])
        if self._probe <= self._written < 2 * self._slots:
            self._check_fits(self._written)
            self._probe = 2 * self._written

    def _pack(self, blocks: np.ndarray) -> list[bytes]:
        packed: list[bytes] = [b""] * len(blocks)

        def work(part: slice) -> None:
            for i in range(part.start, part.stop):
                packed[i] = lz4.block.compress(blocks[i], store_size=True)

        self._spread.over(len(blocks), blocks.nbytes, work)
        return packed

    def _check_fits(self, written: int) -> None:
        """Checks what all shards will take, as this one's first blocks tell; raises ConfigError."""
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

    def gather(self, windows: Windows, out: Leaves) -> None:
        places, before = self._spec.places(windows), self.plain.frames_before(windows)
        unpacked = {path: self._image(path, out, before) for path in self._frames}
        theirs = {p for image in unpacked.values() for p in (image.path, image.next, image.carry)}
        others = {path: leaf for path, leaf in out.items() if path not in theirs}
        self.plain.copy(windows, places, before, others)
        for image in unpacked.values():

            def work(part: slice, image: _Image = image) -> None:
                for i in range(part.start, part.stop):
                    self._unpack(image, i, windows.slots[i], int(windows.row[i]), out)

            self._spread.over(len(windows), out[image.path].nbytes, work)

    def take(self, windows: Windows) -> Leaves:
        raise TypeError("the host's windows are copied into buffers: see gather")

    def scalars(self, windows: Windows) -> Leaves:
        return self.plain.scalars(windows)

    def blocks(self, slots: np.ndarray) -> Leaves:
        leaves = self.plain.blocks(slots)
        for path, shape in self._shapes.items():
            out = np.empty((len(slots), *shape), np.uint8)
            for i, slot in enumerate(slots.tolist()):
                out[i] = self._block(path, slot)
            leaves[path] = out
        return leaves

    def _image(self, path: str, out: Leaves, before: dict[str, np.ndarray]) -> _Image:
        leaf = path.removeprefix(OBSERVATION)
        carry = FRAMES + leaf if FRAMES + leaf in before else None
        return _Image(
            path=path,
            next=f"{NEXT}observation/{leaf}",
            carry=carry,
            before=None if carry is None else before[carry],
        )

    def _block(self, path: str, slot: int) -> np.ndarray:
        packed = lz4.block.decompress(self._frames[path][slot])
        return np.frombuffer(packed, np.uint8).reshape(self._shapes[path])

    def _unpack(self, image: _Image, i: int, slots: np.ndarray, row: int, out: Leaves) -> None:
        """One window's rows [L, ...], the frame after them, and the carried ones before."""
        rows, at = out[image.path][i], 0
        for number, slot in enumerate(slots.tolist()):
            block = self._block(image.path, slot)
            if number == 0 and image.carry is not None and image.before is not None:
                carried = self.plain.leaves[image.carry][slot]
                for place, its in enumerate(image.before[i].tolist()):
                    out[image.carry][i, place] = block[its] if its >= 0 else carried[its]
            some = min(len(block) - row, len(rows) - at)
            rows[at : at + some] = block[row : row + some]
            at, row = at + some, row + some
            if at == len(rows):
                inside = row < len(block)
                out[image.next][i] = block[row] if inside else self.plain.leaves[image.next][slot]
                return
            row = 0


@dataclass(frozen=True, kw_only=True)
class _Image:
    """These paths say where an image's frames go in a batch."""

    path: str
    next: str
    carry: str | None  # None: carried frames are copied as they are
    before: np.ndarray | None  # i64[n, S-1]: see BlockSpec.frames_before
