"""Batches drawn ahead in a thread, so that the loop need not wait for their copies."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from rlx.types import Batch, Sample

WAIT_S = 60.0  # for a batch, while sequences are startable
SPARE = 2  # batches that are not overwritten: the one taken last, and that of the update before
LOOK_S = 0.05


class Prefetcher:
    """Keeps up to `ahead` samples ready.

    A sample's priorities are those of at most `ahead` samples before it. Its arrays are overwritten
    after two more have been taken: an update may still read the one before.
    """

    def __init__(
        self,
        *,
        ahead: int,
        draw: Callable[[Batch], Sample],
        make_buffers: Callable[[], Batch],
        may_draw: Callable[[], bool],
    ) -> None:
        self.lag = 0  # updates begun between the drawing of the last sample and its use
        self._draw, self._may_draw = draw, may_draw
        self._room = threading.Semaphore(ahead)
        self._ready: queue.SimpleQueue[tuple[Sample, int] | BaseException] = queue.SimpleQueue()
        self._buffers = [make_buffers() for _ in range(ahead + SPARE)]
        self._taken = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def take(self) -> Sample:
        """The oldest sample; raises what ended the thread, or TimeoutError."""
        try:
            found = self._ready.get(timeout=WAIT_S)
        except queue.Empty:
            raise TimeoutError(f"replay.prefetch: no batch was drawn for {WAIT_S:.0f} s") from None
        if isinstance(found, BaseException):
            raise found
        sample, taken = found
        self.lag = self._taken - max(0, taken - 1)  # the newest one taken is not trained on yet
        self._taken += 1
        self._room.release()
        return sample

    def close(self) -> None:
        """Ends the thread; what is ready is dropped."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        drawn = 0
        try:
            while not self._stop.is_set():
                if not self._may_draw():
                    self._stop.wait(LOOK_S)
                elif self._room.acquire(timeout=LOOK_S):
                    taken = self._taken
                    sample = self._draw(self._buffers[drawn % len(self._buffers)])
                    drawn += 1
                    self._ready.put((sample, taken))
        except BaseException as error:
            self._ready.put(error)
