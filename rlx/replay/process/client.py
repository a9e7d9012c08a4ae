"""A replay in a process of its own (`replay.where=process`).

The run's side is `ReplayProcess`, a Replay. Calls and their small answers travel over a socket;
batches lie in memory that both processes have mapped, so of a sample only the number of its buffer,
the keys and the importance are sent. Snapshots copy blocks over a second socket, beside the calls.

The process sees the end of the run by its sockets, however the run ends, and ends too. Signals are
the run's: it saves the replay when it is told to stop.
"""

from __future__ import annotations

import logging
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import IO, Any

import numpy as np

from rlx import trees
from rlx.interfaces import Ring
from rlx.problems import RunFailed
from rlx.replay.process.wire import Drew, Made, receive, send
from rlx.types import Batch, Blocks, Rollout, Sample

log = logging.getLogger(__name__)

CALL_S = 120.0  # for an answer, and for the other side to take or give more of a message
LONG_S = 1800.0  # for one that moves the whole replay, or makes it
CLOSE_S = 300.0  # for the last of what is recorded
END_S = 30.0
MOST_TOLD = 64  # answers that are left waiting in the socket


class ReplayLost(RunFailed):
    """The replay's process is gone, or does not answer; what it held is lost."""


class ReplayProcess:
    """The replay that `make` answers, in another process; see Replay for what it does.

    With `ahead` that process draws so many batches before they are asked for. A sample's arrays are
    overwritten after two more have been taken.
    """

    is_recorded = False

    def __init__(self, make: Callable[[], Any], *, ahead: int, batch_size: int) -> None:
        """Raises what `make` raises. It must be picklable: made of things in modules."""
        try:
            order = pickle.dumps((make, ahead, batch_size), protocol=5)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                "where=process sends the agent's initial_priorities to another process: "
                f"{error}; define the agent in a module, or set replay.where=thread."
            ) from error
        calls, its_calls = socket.socketpair()
        copies, its_copies = socket.socketpair()
        with _memory_file() as memory:
            fds = [its_calls.fileno(), its_copies.fileno(), memory.fileno()]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlx.replay.process.server", *map(str, fds)],
                pass_fds=fds,
                start_new_session=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": _path()},
            )
            its_calls.close()
            its_copies.close()
            self._calls = Caller(self._process, calls)
            self._copies = Caller(self._process, copies)
            try:
                made: Made = self._calls.call(order, deadline_s=LONG_S)[0]
                for line in made.said:
                    log.info(line)
                plan = self._call("buffers")
                self._memory = mmap.mmap(memory.fileno(), 0)
            except BaseException:
                self._kill()
                raise
        self._buffers: list[Batch] = [
            trees.tree_map(lambda at: at.of(self._memory), batch) for batch in plan
        ]
        self.ratio = made.ratio
        self.min_sequences = made.min_sequences
        self.min_env_steps = made.min_env_steps
        self.capacity = made.capacity
        self.needs_priorities = made.needs_priorities
        self.rings: list[Ring] = [
            RemoteRing(self._copies, number, nbytes)
            for number, nbytes in enumerate(made.block_nbytes)
        ]

    def _call(self, name: str, *given: Any, deadline_s: float = CALL_S, **feed: Any) -> Any:
        answer, self._status = self._calls.call((name, given), deadline_s=deadline_s, **feed)
        return answer

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def startable(self) -> int:
        return self._status.startable

    @property
    def has_enough(self) -> bool:
        return self._status.has_enough

    @property
    def rows(self) -> int:
        return self._status.rows

    @property
    def env_steps(self) -> int:
        return self._status.env_steps

    @property
    def nbytes(self) -> int:
        return self._status.nbytes

    def add(self, rollout: Rollout) -> None:
        """Returns when the blocks are in the replay."""
        self._call("add", rollout)

    def sample(self, batch_size: int) -> Sample:
        """The arrays lie in memory that is used again two samples later."""
        drew: Drew = self._call("sample", batch_size)
        own = self._buffers[drew.buffer]
        return Sample(
            batch=replace(own, importance=drew.importance),
            keys=drew.keys,
            weights_version=drew.weights_version,
            least_scaled_probability=drew.least_scaled_probability,
            importance_exponent=drew.importance_exponent,
        )

    def update_priorities(self, keys: np.ndarray, priorities: np.ndarray) -> None:
        """See the replay's own; what it raises is raised by the next call."""
        self._calls.tell(("update_priorities", (keys, priorities)))

    def change(self, values: Mapping[str, float]) -> None:
        """See the replay's own."""
        self._calls.tell(("change", (dict(values),)))

    def flush(self) -> None:
        """Writes what is recorded; it is on the disk when this returns."""
        self._call("flush", deadline_s=LONG_S)

    def stats(self) -> dict[str, float]:
        """The replay's own metrics."""
        stats: dict[str, float] = self._call("stats")
        return stats

    def state(self) -> dict[str, Any]:
        """Everything but the blocks."""
        state: dict[str, Any] = self._call("state", deadline_s=LONG_S)
        return state

    def restore(self, state: Mapping[str, Any], blocks: Sequence[Iterable[Blocks]]) -> None:
        """Goes on from a saved state; the blocks are sent as they are read."""
        feed = [iter(ring) for ring in blocks]
        self._call("restore", dict(state), len(feed), deadline_s=LONG_S, feed=feed)

    def close(self) -> None:
        """Ends the process, and with it what was recorded."""
        try:
            with suppress(ReplayLost):
                self._call("close", deadline_s=CLOSE_S)
        finally:
            self._kill()

    def _kill(self) -> None:
        """It has nothing left to write: kills it if it does not end by itself."""
        self._calls.close()
        self._copies.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_S)


class Caller:
    """One socket to the process: a question, then its answer. For any thread."""

    def __init__(self, process: subprocess.Popen[bytes], own: socket.socket) -> None:
        self._process = process
        _bound(own)
        self._wire = Connection(own.detach())
        self._lock = threading.Lock()
        self._told: list[str] = []  # whose answers are still to come

    def tell(self, message: tuple[str, Any]) -> None:
        """Asks without waiting: a waiting thread wakes late where all cores are busy.

        What the process raises is raised by the next call.
        """
        with self._lock, self._alive():
            while len(self._told) >= MOST_TOLD:
                self._hear(CALL_S)
            send(self._wire, message)
            self._told.append(message[0])

    def call(
        self, message: Any, *, deadline_s: float = CALL_S, feed: Sequence[Iterator[Any]] = ()
    ) -> Any:
        """The answer. Raises what the process raised, or ReplayLost.

        feed: what it takes one by one while it works on the question.
        """
        what = message[0] if isinstance(message, tuple) else "its beginning"
        with self._lock, self._alive():
            while self._told:
                self._hear(deadline_s)
            send(self._wire, message)
            while (answer := self._await(what, deadline_s))[0] == "next":
                send(self._wire, self._next(feed[answer[1]]))
            return self._value(*answer)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Closes the wire for good if a call fails: later answers could not be told apart."""
        if self._wire.closed:
            raise ReplayLost(f"the replay's process {self._process.pid} is closed")
        try:
            yield
        except BlockingIOError as error:  # the socket's own deadline
            self._wire.close()
            raise ReplayLost(
                f"the replay's process {self._process.pid} has not gone on with a message for "
                f"{CALL_S:.0f} s"
            ) from error
        except (EOFError, ConnectionError) as error:
            self._wire.close()
            raise ReplayLost(self._ended()) from error

    def _next(self, feed: Iterator[Any]) -> Any:
        try:
            return next(feed, None)
        except BaseException:
            self._wire.close()  # the process waits for what cannot be had
            raise

    def _hear(self, deadline_s: float) -> None:
        """The oldest answer to what was told."""
        self._value(*self._await(self._told.pop(0), deadline_s))

    def _value(self, kind: str, value: Any) -> Any:
        if kind == "raised":
            raise value
        return value

    def _await(self, what: str, deadline_s: float) -> Any:
        if not self._wire.poll(deadline_s):
            self._wire.close()
            raise ReplayLost(
                f"the replay's process {self._process.pid} has not answered {what} for "
                f"{deadline_s:.0f} s"
            )
        return receive(self._wire)

    def _ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        code = self._process.returncode
        if code is not None and code < 0:
            why = f"was ended by {signal.Signals(-code).name}"
            why += " (is the machine's memory full?)" if code == -signal.SIGKILL else ""
        else:
            why = f"ended with status {code}"
        return f"the replay's process {self._process.pid} {why}"

    def close(self) -> None:
        self._wire.close()


@dataclass(frozen=True)
class RemoteRing:
    """The blocks of one ring, over the second socket; a Ring."""

    _copies: Caller
    _number: int
    block_nbytes: float

    @property
    def oldest_key(self) -> int:
        return int(self._copies.call(("oldest_key", (self._number,))))

    @property
    def next_key(self) -> int:
        return int(self._copies.call(("next_key", (self._number,))))

    def blocks_after(self, key: int, most: int) -> tuple[Blocks, int]:
        """See BlockRing.blocks_after."""
        found: tuple[Blocks, int] = self._copies.call(("blocks_after", (self._number, key, most)))
        return found


def _bound(own: socket.socket) -> None:
    """No write or read of it lasts for ever: CALL_S without a byte are a BlockingIOError."""
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        own.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(CALL_S), 0))  # a timeval


def _memory_file() -> IO[bytes]:
    """A file without a name that is memory, where the system has such; gone with its users."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("rlx-batches"), "r+b")
    return tempfile.TemporaryFile(prefix="rlx-batches-")


def _path() -> str:
    """Modules are found as they are here."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)
