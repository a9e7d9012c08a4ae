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

from rlx.replay.segments import SEGMENT_BYTES, SegmentError, read_segment, write_segment
from rlx.types import Blocks

WRITERS = 2  # files written at a time: one waits for the disk while the other is summed


class Saved(Protocol):
    """What a snapshot needs of a replay."""

    @property
    def block_nbytes(self) -> float: ...
    @property
    def oldest_key(self) -> int: ...
    @property
    def next_key(self) -> int: ...
    def blocks_after(self, key: int, most: int) -> tuple[Blocks, int]: ...


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One file of blocks."""

    file: str
    nbytes: int
    last_key: int


class Snapshots:
    """Writes blocks into `folder`; one replay, one run."""

    def __init__(self, folder: Path, segments: Sequence[Mapping[str, Any]] = ()) -> None:
        """`segments`: what `complete` had answered in the run that is resumed."""
        self.folder = folder
        self._segments = [Segment(**entry) for entry in segments]
        self._last_key = max((segment.last_key for segment in self._segments), default=-1)
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
        self._segments = [s for s in self._segments if s.last_key >= replay.oldest_key]
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
        """What there is now: blocks may come faster than they can be written."""
        most, newest = max(1, int(SEGMENT_BYTES / replay.block_nbytes)), replay.next_key - 1
        last, written = self._last_key, deque[Future[Segment]]()
        with ThreadPoolExecutor(WRITERS, "snapshot") as writers:
            while last < newest:
                blocks, last = replay.blocks_after(last, most)
                if len(written) == WRITERS:  # no more copies at a time than that
                    self._note(written.popleft().result())
                if len(blocks.keys):
                    written.append(writers.submit(self._write, blocks, last))
            while written:
                self._note(written.popleft().result())
        self._last_key = max(self._last_key, last)

    def _note(self, segment: Segment) -> None:
        self._segments.append(segment)
        self._last_key = segment.last_key

    def _write(self, blocks: Blocks, last: int) -> Segment:
        self.folder.mkdir(parents=True, exist_ok=True)
        # A run that goes back to an earlier checkpoint gives the same keys to other blocks.
        file = f"{int(blocks.keys[0]):012d}-{uuid.uuid4().hex[:8]}.npz"
        nbytes = write_segment(self.folder / file, _to_arrays(blocks), {"kind": "snapshot"})
        return Segment(file=file, nbytes=nbytes, last_key=last)


def read_blocks(folder: Path, segments: Sequence[Mapping[str, Any]]) -> Iterator[Blocks]:
    """The blocks of these segments, a file at a time; raises SegmentError."""
    for segment in segments:
        path = folder / segment["file"]
        arrays, about = read_segment(path)
        if about.get("kind") != "snapshot":
            raise SegmentError(f"{path}: of kind {about.get('kind')}, expected a snapshot.")
        yield _from_arrays(arrays)


def _to_arrays(blocks: Blocks) -> dict[str, np.ndarray]:
    rows = {f"rows/{path}": leaf for path, leaf in blocks.rows.items()}
    carry = {f"carry/{path}": leaf for path, leaf in blocks.carry.items()}
    return {"key": blocks.keys, **rows, **carry}


def _from_arrays(arrays: Mapping[str, np.ndarray]) -> Blocks:
    def below(name: str) -> dict[str, np.ndarray]:
        return {p.removeprefix(name): x for p, x in arrays.items() if p.startswith(name)}

    return Blocks(keys=arrays["key"], rows=below("rows/"), carry=below("carry/"))
