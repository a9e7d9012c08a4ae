"""Sees whether what holds this process to its Ray cluster still lives.

Ray ends a driver without a word when its raylet is gone, and a minute after the GCS server is; or
it lets it wait for a cluster that has no node left. A run looks for itself, and can still save.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from time import monotonic

import ray

from rlx.cluster import last_words
from rlx.problems import RunFailed

EVERY_S = 1.0
CONNECT_S = 2.0
GCS_AWAY_S = 20.0  # a GCS server that is started anew may be away; Ray ends drivers after 60 s


class NodeLost(RunFailed):
    """This machine's Ray node or the cluster's GCS server is gone; says which, and why."""

    is_worth_saving = True


class NodeWatch:
    """Watches this machine's raylet and the GCS server of the cluster that was joined."""

    def __init__(self, *, is_own: bool, run: Path | None) -> None:
        """is_own: this process started the cluster, and nothing will start its GCS server anew.

        run: the folder of a run, whose status says so if Ray ends this process; None: of no run.
        """
        self._gcs: str = ray.get_runtime_context().gcs_address
        node = ray._private.worker.global_worker.node
        self._raylet_pid, self._raylet = _process_behind(node.raylet_socket_name)
        self._log = Path(node.get_logs_dir_path()) / "raylet.out"
        self._gcs_away_s = 0.0 if is_own else GCS_AWAY_S
        self._looked_s = self._answered_s = monotonic()
        self._last_words = None
        if run is not None and self._raylet is not None:
            self._last_words = last_words.begin(self._raylet_pid, run.absolute(), self._log)

    def check(self) -> None:
        """Raises NodeLost; at the GCS server it looks once a second only."""
        if self._raylet is not None and last_words.wait(self._raylet, 0):
            why = last_words.why(self._raylet_pid, self._log)
            raise NodeLost(f"Ray's node on this machine is lost: {why}")
        now = monotonic()
        if now - self._looked_s < EVERY_S:
            return
        self._looked_s = now
        host, _, port = self._gcs.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
            self._answered_s = monotonic()
        except OSError as error:
            if (away_s := monotonic() - self._answered_s) >= self._gcs_away_s:
                says = f"the Ray cluster's GCS server at {self._gcs} is lost: no answer for "
                raise NodeLost(f"{says}{away_s:.0f} s ({error})") from error

    def close(self) -> None:
        """Ends what watches beside this process."""
        if self._last_words is not None:
            self._last_words.kill()
            self._last_words.wait()
            self._last_words = None
        if self._raylet is not None:
            os.close(self._raylet)
            self._raylet = None


def _process_behind(path: str) -> tuple[int, int | None]:
    """(pid, pidfd) of the process that listens there; (0, None) where the system cannot tell."""
    with suppress(OSError, AttributeError), socket.socket(socket.AF_UNIX) as to:
        to.settimeout(CONNECT_S)
        to.connect(path)
        told = to.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid = struct.unpack("3i", told)[0]
        return pid, os.pidfd_open(pid)
    return 0, None
