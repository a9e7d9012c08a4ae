"""Tells where a process is, and keeps its libraries to a few threads."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rlx.machine import xla

NICENESS = 15  # of actors that act, as Ray's own workers have


@dataclass(frozen=True, kw_only=True)
class Whereabouts:
    """This record says where an actor's process is."""

    pid: int
    host: str
    log: str  # the file that its standard error goes to, on that host; '' if none
    cores: tuple[int, ...]  # that it may run on


def whereabouts() -> Whereabouts:
    """The place of this process."""
    stderr = "/proc/self/fd/2"
    log = os.readlink(stderr) if os.path.exists(stderr) else ""
    return Whereabouts(
        pid=os.getpid(),
        host=socket.gethostname(),
        log=log if log.startswith("/") and os.path.isfile(log) else "",
        cores=tuple(sorted(os.sched_getaffinity(0))),
    )


def lower_priority() -> None:
    """Lowers this process's priority: it takes only the time that the learner leaves."""
    for thread in Path("/proc/self/task").glob("*"):  # niceness is each thread's own
        with suppress(OSError):  # it has ended, or is nicer already
            os.setpriority(os.PRIO_PROCESS, int(thread.name), NICENESS)


def thread_limits(threads: int) -> dict[str, str]:
    """Environment variables that keep XLA, BLAS and OpenMP to so many threads, on the CPU."""
    count = str(threads)
    multi = "true" if threads > 1 else "false"
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([f"--xla_cpu_multi_thread_eigen={multi}", *xla.fast_convolutions()]),
        "NPROC": count,  # the size of XLA's thread pools
        "OMP_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
    }
