"""A replay's blocks on the disk for checkpoints: each is written once, ahead of the checkpoint.

Before a checkpoint a thread writes the blocks that came since the last one while training goes on;
the checkpoint itself then only adds the few that came meanwhile, and the tables. So what it holds
is the replay at one moment, exactly, and what it costs is the new blocks and not the whole ring.
"""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlx.interfaces import Ring
from rlx.replay.files.segments import SEGMENT_BYTES, SegmentError, read_segment, write_segment
from rlx.types import Blocks

KEY = "key"
WRITERS = 2  # files written at a time: one waits for the disk while the other is summed


class Saved(Protocol):
    """A snapshot needs this of a replay."""

    @property
    def rings(self) -> Sequence[Ring]: ...


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One file of blocks."""

    file: str
    nbytes: int
    last_key: int
    ring: int = 0  # of its replay


class Snapshots:
    """Writes blocks into `folder`; one replay, one run."""

    def __init__(self, folder: Path, segments: Sequence[Mapping[str, Any]] = ()) -> None:
        """`segments`: what `complete` had answered in the run that is resumed."""
        self.folder = folder
        self._segments = [Segment(**entry) for entry in segments]
        self._last_key: dict[int, int] = {}  # of each ring, written already
        for segment in self._segments:
            self._note(segment)
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def write_ahead(self, replay: Saved) -> None:
        """Begins to write what is new, in a thread; does nothing if one is at it."""
        if not self.is_writing:
            self._thread = threading.Thread(
                target=self._write_ahead, args=(replay,), name="snapshot", daemon=True
            )
            self._thread.start()

    def complete(self, replay: Saved) -> list[dict[str, Any]]:
        """Writes what is still missing; answers the segments that hold the replay's blocks.

        Nothing may be added meanwhile. Raises what kept the thread from writing.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        self._write_new(replay)
        oldest = [ring.oldest_key for ring in replay.rings]
        self._segments = [s for s in self._segments if s.last_key >= oldest[s.ring]]
        return [vars(segment) for segment in self._segments]

    def forget(self, kept: set[str] | None) -> None:
        """Deletes all segments but these and those of the last `complete`; None: keep all."""
        if kept is None or not self.folder.is_dir():
            return
        kept = kept | {segment.file for segment in self._segments}
        for path in self.folder.iterdir():
            if path.name.endswith((".npz", ".npz.tmp")) and path.name not in kept:
                path.unlink()

    def _write_ahead(self, replay: Saved) -> None:
        try:
            self._write_new(replay)
        except BaseException as error:
            self._failed = error

    def _write_new(self, replay: Saved) -> None:
        """Writes the blocks that are there now; others may come faster than they are written."""
        with ThreadPoolExecutor(WRITERS, "snapshot") as writers:
            for number, ring in enumerate(replay.rings):
                self._write_ring(number, ring, writers)

    def _write_ring(self, number: int, ring: Ring, writers: ThreadPoolExecutor) -> None:
        most, newest = max(1, int(SEGMENT_BYTES / ring.block_nbytes)), ring.next_key - 1
        last, written = self._last_key.get(number, -1), deque[Future[Segment]]()
        while last < newest:
            blocks, last = ring.blocks_after(last, most)
            if len(written) == WRITERS:  # no more copies at a time than that
                self._keep(written.popleft().result())
            if len(blocks.keys):
                written.append(writers.submit(self._write, number, blocks, last))
        while written:
            self._keep(written.popleft().result())
        self._last_key[number] = max(last, self._last_key.get(number, -1))

    def _keep(self, segment: Segment) -> None:
        self._segments.append(segment)
        self._note(segment)

    def _note(self, segment: Segment) -> None:
        self._last_key[segment.ring] = max(segment.last_key, self._last_key.get(segment.ring, -1))

    def _write(self, ring: int, blocks: Blocks, last: int) -> Segment:
        self.folder.mkdir(parents=True, exist_ok=True)
        # A run that goes back to an earlier checkpoint gives the same keys to other blocks.
        file = f"{int(blocks.keys[0]):012d}-{uuid.uuid4().hex[:8]}.npz"
        nbytes = write_segment(self.folder / file, _to_arrays(blocks), {"kind": "snapshot"})
        return Segment(file=file, nbytes=nbytes, last_key=last, ring=ring)


def read_blocks(folder: Path, segments: Sequence[Mapping[str, Any]]) -> list[Iterator[Blocks]]:
    """The blocks of each ring, a file at a time; reading them raises SegmentError."""
    named = [Segment(**entry) for entry in segments]
    rings = max((segment.ring for segment in named), default=0) + 1
    return [_read_ring(folder, [s for s in named if s.ring == ring]) for ring in range(rings)]


def _read_ring(folder: Path, segments: Sequence[Segment]) -> Iterator[Blocks]:
    for segment in segments:
        path = folder / segment.file
        arrays, about = read_segment(path)
        if about.get("kind") != "snapshot":
            raise SegmentError(f"{path}: of kind {about.get('kind')}, expected a snapshot.")
        yield _from_arrays(arrays)


def _to_arrays(blocks: Blocks) -> dict[str, np.ndarray]:
    return {KEY: blocks.keys, **blocks.leaves}


def _from_arrays(arrays: Mapping[str, np.ndarray]) -> Blocks:
    leaves = {path: leaf for path, leaf in arrays.items() if path != KEY}
    return Blocks(keys=arrays[KEY], leaves=leaves)
