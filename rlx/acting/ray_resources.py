"""Says what actors on Ray ask of the cluster, and whether it can ever have it.

Nothing here waits: what no waiting helps is refused, with the nearest settings that fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlx.cluster.cluster import Cluster, cores, is_own
from rlx.cluster.whereabouts import thread_limits
from rlx.machine.memory import available_bytes
from rlx.problems import ConfigError, Problem, refuse

Placement = Literal["PACK", "SPREAD"] | dict[str, str]

SHARE_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Each actor asks this of the cluster, and says where it wants to be."""

    cpus: float
    gpus: float
    memory: int | None  # bytes; None: not counted
    custom: Mapping[str, float]
    placement: Placement
    threads: int  # cores that its process is bound to

    def options(self) -> dict[str, Any]:
        """Ray's options of an actor."""
        wants = {"num_cpus": self.cpus, "num_gpus": self.gpus, "memory": self.memory}
        variables = SHARE_GPU if self.gpus else thread_limits(self.threads)
        return {
            **{name: amount for name, amount in wants.items() if amount is not None},
            "resources": dict(self.custom),
            "runtime_env": {"env_vars": dict(variables)},
            **_scheduling(self.placement),
        }


@dataclass(frozen=True, kw_only=True)
class Room:
    """The room that a number of actors needs, of which `least` must be there."""

    each: Resources
    instances: int
    least: int

    def check_settings(self, address: str | None) -> None:
        """Checks what can be said before Ray is there; raises ConfigError."""
        if self.least > self.instances:
            says = f"more than acting.instances={self.instances}; accepted: 1 .. {self.instances}"
            raise refuse("acting.min_instances", says, given=str(self.least))
        gpus = self.each.gpus
        if gpus > 1 and gpus != int(gpus):
            says = "accepted: a share of one GPU (0 .. 1), or whole ones"
            raise refuse("acting.gpus_per_actor", says, given=f"{gpus:g}")
        if is_own(address):
            self._check_machine({"CPU": float(cores())})

    def check_cluster(self, cluster: Cluster) -> None:
        """A kind of resource that no node has, or an own machine's limits; raises ConfigError."""
        have = cluster.resources
        if problems := [*self._custom_problems(have), *self._gpu_problems(have)]:
            raise ConfigError(problems)
        if cluster.is_own:
            self._check_machine(have)

    def _custom_problems(self, have: Mapping[str, float]) -> Iterator[Problem]:
        for name, amount in self.each.custom.items():
            if have.get(name, 0.0) < amount:
                offered = sorted(k for k in have if ":" not in k and k not in RAYS_OWN) or ["none"]
                says = f"no node offers it; the cluster's own resources: {', '.join(offered)}"
                yield Problem(path=f"acting.resources.{name}", given=f"{amount:g}", says=says)

    def _gpu_problems(self, have: Mapping[str, float]) -> Iterator[Problem]:
        gpus, there = self.each.gpus, have.get("GPU", 0.0)
        if gpus * self.least > there:
            says = f"the cluster has {there:g} GPUs, {self.least} actors ask for "
            says += f"{gpus * self.least:g}; set it to 0 (actors act on CPUs)"
            yield Problem(path="acting.gpus_per_actor", given=f"{gpus:g}", says=says)

    def _check_machine(self, have: Mapping[str, float]) -> None:
        """Refuses more than this machine has, with the two nearest settings that fit."""
        asked = (("CPU", "cpus_per_actor", self.each.cpus),
                 ("memory", "memory_per_actor", float(self.each.memory or 0)))  # fmt: skip
        for resource, setting, each in asked:
            total = have.get(resource, math.inf)
            if each * self.instances <= total:
                continue
            share = total / self.instances  # rounded down to something that reads well
            fits = f"{math.floor(share * 1000) / 1000:g}" if resource == "CPU" else f"{int(share)}"
            says = f"{self.instances} actors ask for {each * self.instances:g} {resource}, this "
            says += f"machine has {total:g}; set acting.{setting}={fits}"
            if most := int(total // each):
                says += f", or acting.instances={most} with more acting.envs_per_actor"
            raise refuse("acting.instances", says, given=str(self.instances))


def check_store(max_in_flight_bytes: int, address: str | None) -> None:
    """Refuses an own cluster whose object store, of twice these bytes, does not fit in memory."""
    most = available_bytes() // 2
    if is_own(address) and max_in_flight_bytes > most:
        says = f"Ray's object store takes twice as much; at most {most} bytes fit here"
        raise refuse("acting.max_in_flight_bytes", says, given=str(max_in_flight_bytes))


def _scheduling(placement: Placement) -> dict[str, Any]:
    if isinstance(placement, str):
        return {"scheduling_strategy": {"PACK": "DEFAULT", "SPREAD": "SPREAD"}[placement]}
    return {"label_selector": dict(placement)}
