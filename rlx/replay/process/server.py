"""The replay's side of `replay.where=process`: see rlx.replay.process.client."""

from __future__ import annotations

import logging
import mmap
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from rlx import trees
from rlx.replay.prefetch import SPARE, Prefetcher
from rlx.replay.process.wire import Drew, Made, Status, planned, receive, send
from rlx.types import Batch, Blocks, Sample

SWITCH_S = 0.0002  # a call need not wait for long while a batch is drawn


class Server:
    """Answers calls to one replay, until the other side is gone."""

    def __init__(self, calls: Connection, copies: Connection, memory: int) -> None:
        self._calls, self._copies, self._memory = calls, copies, memory
        self._replay: Any = None
        self._prefetcher: Prefetcher | None = None
        self._buffers: list[Batch] = []
        self._sampled = 0

    def run(self) -> None:
        with _log_lines() as said:
            if not self._answer(self._calls, partial(self._make, said)):
                return
        threading.Thread(target=self._serve_copies, daemon=True).start()
        while self._answer(self._calls, self._call):
            pass
        self._do_close()  # the other side may be gone without having said so

    def _answer(self, wire: Connection, work: Callable[[Any], Any]) -> bool:
        """One question; answers whether there may be another."""
        try:
            message = receive(wire)
        except (EOFError, OSError):
            return False
        try:
            answer = "done", work(message)
        except Exception as error:
            answer = "raised", _portable(error)
        with suppress(OSError):
            send(wire, answer)
            return answer[0] == "done" or self._replay is not None
        return False

    def _make(self, said: list[str], order: bytes) -> tuple[Made, None]:
        try:
            make, self._ahead, self._batch_size = pickle.loads(order)
        except (AttributeError, ImportError) as error:
            raise ValueError(
                f"where=process builds the replay in another process, which cannot import what the "
                f"agent gives it ({error}); define the agent in a module (not in __main__ or a "
                "notebook), or set replay.where=thread."
            ) from error
        replay = self._replay = make()
        return Made(
            ratio=replay.ratio,
            min_sequences=replay.min_sequences,
            min_env_steps=replay.min_env_steps,
            capacity=replay.capacity,
            needs_priorities=getattr(replay, "needs_priorities", False),
            block_nbytes=[ring.block_nbytes for ring in replay.rings],
            said=said,
        ), None

    def _call(self, message: Any) -> tuple[Any, Status]:
        name, given = message
        own = getattr(self, f"_do_{name}", None) or getattr(self._replay, name)
        answer, replay = own(*given), self._replay
        return answer, Status(
            startable=replay.startable,
            has_enough=replay.has_enough,
            rows=replay.rows,
            env_steps=replay.env_steps,
            nbytes=replay.nbytes,
        )

    def _do_buffers(self) -> list[Batch]:
        """Makes the batches' buffers; answers where they lie."""
        count = max(1, self._ahead) + SPARE
        plan, nbytes = planned([self._replay.buffers(self._batch_size) for _ in range(count)])
        os.posix_fallocate(self._memory, 0, nbytes)
        memory = mmap.mmap(self._memory, nbytes)
        self._buffers = [trees.tree_map(lambda at: at.of(memory), batch) for batch in plan]
        return plan

    def _do_sample(self, batch_size: int) -> Drew:
        if batch_size != self._batch_size:
            raise ValueError(f"batches have {self._batch_size} sequences always.")
        number = self._sampled % len(self._buffers)
        if self._ahead:
            self._prefetcher = self._prefetcher or self._begin_to_draw()
            sample = self._prefetcher.take()
        else:
            sample = self._draw(self._buffers[number])
        self._sampled += 1
        return Drew(
            buffer=number,
            importance=sample.batch.importance,
            keys=sample.keys,
            weights_version=sample.weights_version,
            least_scaled_probability=sample.least_scaled_probability,
            importance_exponent=sample.importance_exponent,
        )

    def _draw(self, buffers: Batch) -> Sample:
        sample: Sample = self._replay.sample(self._batch_size, buffers=buffers)
        return sample

    def _begin_to_draw(self) -> Prefetcher:
        """It fills the buffers in their order, again and again."""
        replay, buffers = self._replay, iter(self._buffers)
        return Prefetcher(
            ahead=self._ahead,
            draw=self._draw,
            make_buffers=lambda: next(buffers),
            may_draw=lambda: replay.startable >= replay.min_sequences,
        )

    def _do_stats(self) -> dict[str, float]:
        lag = self._prefetcher.lag if self._prefetcher else 0
        return {**self._replay.stats(), "replay/prefetch_lag_updates": float(lag)}

    def _do_restore(self, state: Mapping[str, Any], rings: int) -> None:
        self._replay.restore(state, [self._fed(ring) for ring in range(rings)])

    def _fed(self, ring: int) -> Iterator[Blocks]:
        """The blocks that the other side reads for this call, one after the other."""
        while True:
            send(self._calls, ("next", ring))
            blocks = receive(self._calls)
            if blocks is None:
                return
            yield blocks

    def _serve_copies(self) -> None:
        while self._answer(self._copies, self._copy):
            pass

    def _copy(self, message: Any) -> Any:
        name, (number, *given) = message
        found = getattr(self._replay.rings[number], name)
        return found(*given) if given else found

    def _do_close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._replay.close()


def _portable(error: Exception) -> Exception:
    """The error with this process's traceback as a note; as a RuntimeError if it cannot travel."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In the replay's process:\n{trace}")
    return error


@contextmanager
def _log_lines() -> Iterator[list[str]]:
    """Collects what is logged meanwhile; the run says it in its own log."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    root = logging.getLogger("rlx")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        root.removeHandler(handler)


def main() -> None:
    """Serves the replay of the process that started this one."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_S)
    calls, copies, memory = map(int, sys.argv[1:])
    Server(Connection(calls), Connection(copies), memory).run()


if __name__ == "__main__":
    main()
