"""Joining or starting the Ray cluster that a run acts on, and leaving it as it was found."""

from __future__ import annotations

import logging
import os
import signal
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_system_temp_dir
from ray._private.services import canonicalize_bootstrap_address

from rlx.cluster import token as ray_token
from rlx.cluster.node_watch import NodeWatch
from rlx.problems import ConfigError, refuse

log = logging.getLogger(__name__)

CONNECT_S = 10.0
NICENESS = "RAY_worker_niceness"  # of the processes that Ray starts
LEAST_STORE_BYTES = 256 * 1024**2


class Cluster:
    """A connection to Ray. Starts a cluster of this machine's cores if there is no address.

    address: None = this process's connection if it has one, else an own cluster on this machine;
    "auto" = the cluster that runs on this machine; "host:port" = that one.
    run: the folder of a run, whose status says so if Ray ends this process.
    Raises ConfigError where there is none, one of another version, or one that refuses the token.
    """

    def __init__(
        self,
        *,
        address: str | None,
        store_bytes: int,
        setting: str = "acting.address",
        run: Path | None = None,
    ) -> None:
        self.started_by_us = not ray.is_initialized()
        self.is_own = self.started_by_us and address is None
        self._tokens = ray_token.remember()
        if self.started_by_us:
            try:
                _start(store_bytes, setting) if address is None else _join(address, setting)
            except BaseException:
                ray_token.put_back(self._tokens)
                raise
        self._watch = NodeWatch(is_own=self.is_own, run=run)

    def check(self) -> None:
        """Raises NodeLost if this machine's Ray node, or the cluster, is gone; it never waits long.

        Whoever waits for something of the cluster calls it in each turn.
        """
        self._watch.check()

    @property
    def resources(self) -> Mapping[str, float]:
        """The resources of all nodes together, used or not."""
        return ray.cluster_resources()

    def put(self, value: Any) -> Any:
        """The object store's copy of a value, for calls of actors, which are given the value."""
        return ray.put(value)

    def close(self) -> None:
        """Leaves the cluster; ends it only if this run started it."""
        self._watch.close()
        if self.started_by_us and ray.is_initialized():
            ray.shutdown()
            ray_token.put_back(self._tokens)


def is_own(address: str | None) -> bool:
    """Says whether a connection with this address would start a cluster of this machine."""
    return address is None and not ray.is_initialized()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _quiet() -> dict[str, Any]:
    """The actors' output stays in their own log files; a failed actor's last lines are shown."""
    return {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}


def _start(store_bytes: int, setting: str) -> None:
    ray_token.for_own_cluster()
    with (
        _one_refusal(setting),
        _sigterm_not_inherited(),
        _workers_not_nice(),
        warnings.catch_warnings(),
    ):  # JAX warns of the fork; its child becomes Ray at once
        warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
        ray.init(
            address="local",  # whatever RAY_ADDRESS or another program's cluster says
            num_cpus=cores(),
            include_dashboard=False,
            object_store_memory=max(LEAST_STORE_BYTES, store_bytes),
            **_quiet(),
        )


@contextmanager
def _one_refusal(setting: str) -> Iterator[None]:
    """Refuses in one line what Ray says in a hundred where it cannot start."""
    try:
        yield
    except Exception as error:  # of whatever kind: files, sockets, processes
        ray.shutdown()
        raise _not_started(setting, error) from error


def _not_started(setting: str, error: Exception) -> ConfigError:
    folder = get_default_system_temp_dir()
    if "AF_UNIX" in str(error):
        says = f"Ray's sockets beneath {folder} would have names of more than 107 bytes; set "
        says += "RAY_TMPDIR to a folder with a short name"
        return refuse(setting, says, given="null")
    says = f"Ray cannot start here: {_one_line(error)}. It needs room in /dev/shm, and a folder "
    says += f"that can be written, which is {folder} now; RAY_TMPDIR sets another"
    return refuse(setting, says, given="null")


@contextmanager
def _sigterm_not_inherited() -> Iterator[None]:
    """Makes processes that are started meanwhile ignore SIGTERM.

    Batch systems send it to every process of a job. A driver whose Ray is gone is ended at once,
    before it can write a checkpoint; so it is the driver that ends Ray.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _workers_not_nice() -> Iterator[None]:
    """Starts worker processes at full priority: nice ones start slowly beside a busy learner."""
    if NICENESS in os.environ:
        yield
        return
    os.environ[NICENESS] = "0"
    try:
        yield
    finally:
        del os.environ[NICENESS]


def _join(address: str, setting: str) -> None:
    where = _found(setting) if address == "auto" else address
    _check_reachable(where, setting, given=address)
    ray_token.for_given_cluster(where, setting, given=address)
    try:
        ray.init(address=where, **_quiet())
    except ConnectionError as error:
        raise _nothing_there(setting, address, error) from error
    except (RuntimeError, ValueError) as error:
        raise _refused(address, setting, error) from error


def _found(setting: str) -> str:
    """Returns the host:port of the cluster that runs on this machine, as Ray finds it.

    Processes of a cluster that has died may be found, too; so what is found is then tried.
    """
    try:
        found: str = canonicalize_bootstrap_address("auto")
    except ConnectionError as error:
        raise _nothing_there(setting, "auto", error) from error
    return found


def _nothing_there(setting: str, address: str, error: Exception) -> ConfigError:
    says = "no Ray cluster is there; start one with 'ray start --head', or give null for an own"
    return refuse(setting, f"{says} ({_one_line(error)})", given=address)


def _check_reachable(address: str, setting: str, *, given: str) -> None:
    """Refuses an address where nothing listens, as Ray would try it for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise refuse(setting, "accepted: null, auto, host:port", given=given)
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, UnicodeError) as error:
        says = f"cannot be reached ({error}); tried {host} port {port} for {CONNECT_S:.0f} s"
        raise refuse(setting, says, given=given) from error


def _refused(address: str, setting: str, error: Exception) -> ConfigError:
    """The refusal of a cluster that Ray cannot join (another version, a missing token)."""
    line = _one_line(error)
    says = f"the cluster there refused this program: {line}"
    if "ersion" in line:
        says += "; install the same versions of ray and python on all machines"
    return refuse(setting, says, given=address)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
