"""The last lines that an actor wrote, on whatever machine it was."""

from __future__ import annotations

import logging
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlx.cluster.whereabouts import Whereabouts

log = logging.getLogger(__name__)

LINES = 20
LINES_BYTES = 16_384  # they are looked for at the end of the file only
READ_S = 5.0  # for another machine to answer


def last_lines(path: str) -> str:
    """The last lines of a log file on this machine; '' if it can't be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - LINES_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    own = [line for line in lines if not line.startswith(":actor_name:")]
    return "\n".join(own[-LINES:])


def last_lines_of(where: Whereabouts | None) -> str:
    """The last lines of an actor's log, which its node reads if it is another machine."""
    if where is None or not where.log:
        return ""
    if where.host == socket.gethostname():
        return last_lines(where.log)
    return _from_node(where)


def _from_node(where: Whereabouts) -> str:
    with suppress(Exception):  # it may be gone with all its logs
        alive = [n for n in ray.nodes() if n["Alive"]]
        node = next(n["NodeID"] for n in alive if n["NodeManagerHostname"] == where.host)
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        read = ray.remote(last_lines).options(
            num_cpus=0, max_retries=0, enable_task_events=False, scheduling_strategy=there
        )
        return ray.get(read.remote(where.log), timeout=READ_S)
    return ""


class LastLines:
    """Puts failed actors' last lines into the run's log, in a thread of its own."""

    def __init__(self) -> None:
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="actors' logs")

    def tell(self, index: int, where: Whereabouts | None) -> None:
        self._reader.submit(_tell, index, where)

    def close(self) -> None:
        """Waits for the log being read: Ray must not be called after its shutdown."""
        self._reader.shutdown(wait=True, cancel_futures=True)


def _tell(index: int, where: Whereabouts | None) -> None:
    if lines := last_lines_of(where):
        log.info("the last lines of actor %d's log:\n%s", index, lines)
