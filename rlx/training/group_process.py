"""One of several learner processes, whose methods are called over the wire (`rlx.training.group`).

JAX starts in `join`, after the environment variables of the process have been set.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ray.util import get_node_ip_address

from rlx.config.targets import allow
from rlx.interfaces import Peers
from rlx.machine import xla
from rlx.problems import RunFailed
from rlx.runs import provenance
from rlx.training.shares import log_file

FORMAT = "%(levelname)-7s %(name)s: %(message)s"
QUIET = ("absl", "jax", "orbax")  # these report their own internals at INFO


class LearnerProcess:
    """Process `rank` of `count`, for one life of the group."""

    def __init__(self, *, rank: int, count: int, output_dir: str, allowed: Collection[str]) -> None:
        """output_dir: the run's folder, which all processes must see.

        allowed: prefixes of targets that the process which began the run was told of.
        """
        for prefix in allowed:
            allow(prefix)
        self._rank, self._count, self._output_dir = rank, count, Path(output_dir)
        self._stop = threading.Event()

    def hello(self) -> tuple[str, int]:
        """(host:port that the others can find it at, its process id)."""
        self._log()
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{get_node_ip_address()}:{free.getsockname()[1]}", os.getpid()

    def join(self, coordinator: str, timeout_s: float, settings: Mapping[str, Any]) -> None:
        """Returns when all processes have come to the first one's address."""
        xla.prepare(settings)
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator,
            self._count,
            self._rank,
            initialization_timeout=int(timeout_s),
            cluster_detection_method="deactivate",  # a batch system's ranks are not these
        )

    def run(self, settings: Mapping[str, Any], resume: bool, peers: Peers) -> dict[str, Any]:
        """Trains this process's share of a run to the end; returns its summary."""
        from rlx.training.assemble import assemble
        from rlx.training.loop import train

        try:
            with assemble(settings, self._output_dir, resume=resume, peers=peers) as parts:
                if self._rank == 0:
                    provenance.save(self._output_dir)
                return train(parts, self._stop)
        except RunFailed as error:
            raise RunFailed(str(error)) from None  # of a kind that travels

    def stop(self) -> None:
        """Ends the run as a signal ends one: with a checkpoint, all processes together."""
        self._stop.set()

    def _log(self) -> None:
        path = log_file(self._output_dir, self._rank)
        path.parent.mkdir(exist_ok=True)
        logging.basicConfig(level=logging.INFO, format=FORMAT, filename=path, force=True)
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.WARNING)
