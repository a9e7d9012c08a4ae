"""Hydra's launchers of rlx: `hydra/launcher=rlx` and `hydra/launcher=rlx_ray`.

Hydra finds them by their place in this namespace and imports them at every start, so the rest is
imported when it is used. Settings: conf/hydra/launcher/.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ProcessLauncher(Launcher):
    """Runs each job in a process of its own on this machine, several at once."""

    def __init__(
        self,
        *,
        n_jobs: int | None,
        cpus_per_job: int | None,
        gpus: Sequence[str | int] | None,
        jobs_per_gpu: int,
        skip_done: bool,
        grace_s: float,
        environment: Mapping[str, Any],
    ) -> None:
        self._n_jobs, self._cpus_per_job = n_jobs, cpus_per_job
        self._gpus, self._jobs_per_gpu = gpus, jobs_per_gpu
        self._skip_done, self._grace_s, self._environment = skip_done, grace_s, environment

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from rlx.sweeps.sweeping import Sweep, refuse_settings

        refuse_settings("count", n_jobs=1 if self._n_jobs is None else self._n_jobs)
        cpus = 1 if self._cpus_per_job is None else self._cpus_per_job
        refuse_settings("count", cpus_per_job=cpus, jobs_per_gpu=self._jobs_per_gpu)
        refuse_settings("list", gpus=[] if self._gpus is None else self._gpus)
        refuse_settings("amount", grace_s=self._grace_s)
        refuse_settings("mapping", environment=self._environment)
        loader = hydra_context.config_loader
        self.sweep = Sweep(config, lambda given: loader.load_sweep_config(config, given))

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from rlx.sweeps.jobs import Job, LocalProcess, Running
        from rlx.sweeps.sweeping import share_of_cores, share_of_gpus, visible_gpus

        cores = sorted(os.sched_getaffinity(0))
        gpus = visible_gpus() if self._gpus is None else [str(gpu) for gpu in self._gpus]
        slots = self._n_jobs or len(gpus) * self._jobs_per_gpu or 1
        slots = min(slots, len(job_overrides))
        each = self._cpus_per_job or max(1, len(cores) // slots)
        given = {str(key): str(value) for key, value in self._environment.items()}

        def start(job: Job, slot: int) -> Running:
            environment = share_of_gpus(slot, gpus, self._jobs_per_gpu, slots) | given
            return LocalProcess(job, environment, share_of_cores(slot, cores, each))

        return self.sweep.launch(
            job_overrides,
            initial_job_idx,
            start,
            slots=lambda _: slots,
            grace_s=self._grace_s,
            skip_done=self._skip_done,
        )


class RayLauncher(Launcher):
    """Runs each job as a Ray task of its own; the job's actors join the same cluster."""

    def __init__(
        self,
        *,
        address: str | None,
        n_jobs: int | None,
        cpus_per_job: float,
        gpus_per_job: float,
        resources: Mapping[str, float],
        skip_done: bool,
        grace_s: float,
        environment: Mapping[str, Any],
    ) -> None:
        self._address, self._n_jobs = address, n_jobs
        self._cpus, self._gpus, self._resources = cpus_per_job, gpus_per_job, resources
        self._skip_done, self._grace_s, self._environment = skip_done, grace_s, environment

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from rlx.sweeps.sweeping import Sweep, refuse_settings

        refuse_settings("count", n_jobs=1 if self._n_jobs is None else self._n_jobs)
        amounts = {"cpus_per_job": self._cpus, "gpus_per_job": self._gpus}
        refuse_settings("amount", grace_s=self._grace_s, **amounts)
        refuse_settings("mapping", resources=self._resources, environment=self._environment)
        refuse_settings("amount", **{f"resources.{k}": v for k, v in self._resources.items()})
        loader = hydra_context.config_loader
        self.sweep = Sweep(config, lambda given: loader.load_sweep_config(config, given))

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from rlx.sweeps.ray_jobs import cluster_of_sweep
        from rlx.sweeps.sweeping import refused_in_lines

        with (
            refused_in_lines(),
            cluster_of_sweep(
                self._address,
                cpus=self._cpus,
                gpus=self._gpus,
                resources=self._resources,
                environment={str(key): str(value) for key, value in self._environment.items()},
                grace_s=self._grace_s,
            ) as cluster,
        ):
            return self.sweep.launch(
                job_overrides,
                initial_job_idx,
                cluster.start,
                slots=lambda cfgs: self._n_jobs or cluster.room(cfgs),
                grace_s=self._grace_s,
                skip_done=self._skip_done,
                also=cluster.join,
            )
