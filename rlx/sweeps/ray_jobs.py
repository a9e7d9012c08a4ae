"""The jobs of a sweep as Ray tasks: `hydra/launcher=rlx_ray`.

A task only starts the job's own process and waits for it, so that a job is the same program here as
on one machine. All machines must see the sweep's folder and have rlx in the same Python.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any

import ray
from omegaconf import DictConfig
from ray.exceptions import RayError, TaskCancelledError

from rlx.cluster.cluster import Cluster
from rlx.cluster.node_watch import NodeLost
from rlx.problems import refuse
from rlx.sweeps.jobs import CONSOLE_FILE, POLL_S, Job
from rlx.sweeps.sweeping import GPU_SHARE

OWN_STORE_BYTES = 1 << 30  # of a cluster that is started for the sweep


class SweepCluster:
    """The cluster that one sweep's jobs run on, and the resources of each job."""

    def __init__(
        self,
        *,
        check: Callable[[], None],
        cpus: float,
        gpus: float,
        resources: Mapping[str, float],
        environment: Mapping[str, str],
        grace_s: float,
    ) -> None:
        self._check, self._cpus, self._gpus = check, cpus, gpus
        self._environment, self._grace_s = dict(environment), grace_s
        if 0 < gpus < 1:
            fraction = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{GPU_SHARE * gpus:.3f}"}
            self._environment = fraction | self._environment
        self._address = ray.get_runtime_context().gcs_address
        self._task: Any = ray.remote(
            num_cpus=cpus, num_gpus=gpus, resources=dict(resources), max_retries=0
        )(_run)

    def start(self, job: Job, slot: int) -> RayTask:
        """Hands a job to Ray; which of its machines is idle decides where it runs."""
        given = job.command, str(job.folder), os.getcwd(), self._environment, self._grace_s
        return RayTask(self._task.remote(*given), self._check)

    def join(self, cfg: DictConfig) -> list[str]:
        """Overrides that make a job's actors and learner processes come to this cluster."""
        out = []
        if "address" in cfg.acting and cfg.acting.address is None:
            out.append(f"acting.address='{self._address}'")
        if cfg.learner.processes > 1 and cfg.learner.group.address is None:
            out.append(f"learner.group.address='{self._address}'")
        return out

    def room(self, cfgs: Sequence[DictConfig]) -> int:
        """Counts the jobs that the cluster's CPUs hold at once, with their actors; at least 1."""
        need = max(self._cpus + _needs(cfg) for cfg in cfgs)
        cpus = ray.cluster_resources().get("CPU", 1.0)
        return max(1, int(cpus // need)) if need else len(cfgs)


@contextmanager
def cluster_of_sweep(address: str | None, **shares: Any) -> Iterator[SweepCluster]:
    """Joins the cluster, or starts one of this machine's cores, which ends with the sweep."""
    cluster = Cluster(
        address=address, store_bytes=OWN_STORE_BYTES, setting="hydra.launcher.address"
    )
    try:
        asked = {f"resources.{key}": (key, value) for key, value in shares["resources"].items()}
        asked["gpus_per_job"] = "GPU", shares["gpus"]
        if cluster.is_own:  # another one's machines may be on their way
            asked["cpus_per_job"] = "CPU", shares["cpus"]
        _refuse_unmet(asked)
        yield SweepCluster(check=cluster.check, **shares)
    finally:
        cluster.close()


def _needs(cfg: DictConfig) -> float:
    """CPUs that a run's actors and learner processes take of the cluster."""
    actors = cfg.acting.get("instances", 0) * cfg.acting.get("cpus_per_actor", 0)
    learners = cfg.learner.processes if cfg.learner.processes > 1 else 0
    return float(actors + learners * cfg.learner.group.cpus_per_learner)


def _refuse_unmet(asked: Mapping[str, tuple[str, float]]) -> None:
    """Raises ConfigError for a job's resources that all machines together have not got.

    Ray would let it wait for them without an end.
    """
    have = ray.cluster_resources()
    for name, (resource, amount) in asked.items():
        if amount > have.get(resource, 0.0):
            says = f"a run would never begin; the cluster has {have.get(resource, 0.0):g} in all"
            raise refuse(f"hydra.launcher.{name}", says, given=f"{amount:g}")


class RayTask:
    """A job under way in a task, as rlx.sweeps.jobs sees it."""

    def __init__(self, ref: Any, check: Callable[[], None]) -> None:
        """check: raises NodeLost where the cluster is gone."""
        self._ref, self._check = ref, check

    def poll(self) -> int | str | None:
        try:
            self._check()
        except NodeLost as error:
            return f"was lost ({error}); it isn't started again"
        if not ray.wait([self._ref], timeout=0)[0]:
            return None
        try:
            status: int = ray.get(self._ref)
        except TaskCancelledError:
            return "was stopped before its end"
        except RayError as error:
            return f"was lost ({type(error).__name__}); it isn't started again"
        return status

    def stop(self) -> None:
        ray.cancel(self._ref)

    def kill(self) -> None:
        ray.cancel(self._ref, force=True)


def _run(
    command: tuple[str, ...],
    folder: str,
    cwd: str,
    environment: Mapping[str, str],
    grace_s: float,
) -> int:
    """Runs a job within its task; the exit status. The job's process ends with this one."""
    # ray.cancel interrupts by it; of a sweep that a script started with &, Ray inherits "ignored".
    signal.signal(signal.SIGINT, signal.default_int_handler)
    become = [sys.executable, "-m", "rlx.machine.tied", str(os.getpid()), ""]
    with (Path(folder) / CONSOLE_FILE).open("ab") as console:
        process = subprocess.Popen(
            [*become, sys.executable, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=_without_ray(os.environ) | dict(environment),
            cwd=cwd,
            start_new_session=True,
        )
    try:
        while (status := process.poll()) is None:
            sleep(POLL_S)  # a cancelled task wakes up only in Python
        return status
    except BaseException:
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _without_ray(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what makes a process a Ray worker, as the job is its own program.

    What lets it into the cluster stays.
    """

    def is_for_jobs(key: str) -> bool:
        return not key.startswith("RAY_") or key.startswith("RAY_AUTH")

    return {key: value for key, value in environment.items() if is_for_jobs(key)}
