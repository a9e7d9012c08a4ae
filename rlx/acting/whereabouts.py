"""Where a process is, and what keeps its libraries to a few threads."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Whereabouts:
    """Where an actor's process is."""

    pid: int
    host: str
    log: str  # the file that its standard error goes to, on that host; '' if none
    cores: tuple[int, ...]  # that it may run on


def whereabouts() -> Whereabouts:
    """Of this process."""
    stderr = "/proc/self/fd/2"
    log = os.readlink(stderr) if os.path.exists(stderr) else ""
    return Whereabouts(
        pid=os.getpid(),
        host=socket.gethostname(),
        log=log if log.startswith("/") and os.path.isfile(log) else "",
        cores=tuple(sorted(os.sched_getaffinity(0))),
    )


def thread_limits(threads: int) -> dict[str, str]:
    """Environment variables that keep XLA, BLAS and OpenMP to so many threads, on the CPU."""
    count = str(threads)
    multi = "true" if threads > 1 else "false"
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={multi}",
        "NPROC": count,  # the size of XLA's thread pools
        "OMP_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
    }
