"""Actors on Ray: `acting=ray_pool acting.instances=128`.

Checks the settings, joins the cluster, and leaves the rest to one of two ways of acting: in the
actors (`rlx.acting.ray_actors`) or for them (`rlx.acting.ray_server`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import ray
from ray import cloudpickle

from rlx import trees
from rlx.acting.plan import Plan, carry_spec
from rlx.acting.ray_actors import RayActors
from rlx.acting.ray_server import RayServer
from rlx.acting.remote import RemoteActor
from rlx.acting.remote_env import RemoteEnv
from rlx.acting.wire import Compression
from rlx.acting.writer import row_spec
from rlx.cluster.cluster import Cluster, cores
from rlx.cluster.faults import Restarts
from rlx.cluster.fleet import Deadlines, Fleet
from rlx.cluster.whereabouts import thread_limits
from rlx.interfaces import Agent, EnvFamily, Exploration
from rlx.machine.memory import available_bytes
from rlx.problems import ConfigError, Problem, refuse
from rlx.types import Range, Rollout, Runtime, Weights

SHARE_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
LARGEST_PLAN = 1_000_000  # bytes, pickled


class RayPool:
    """An interfaces.ActingPool whose actors may fail, and come and go with their machines."""

    def __init__(
        self,
        *,
        instances: Annotated[int, Range(ge=1)],
        envs_per_actor: Annotated[int, Range(ge=1)],
        env_steps_per_request: Annotated[int, Range(ge=1)],
        requests_per_actor: Annotated[int, Range(ge=1)],
        sync: bool,
        min_instances: Annotated[int, Range(ge=1)],
        inference: Literal["actor", "server"],
        max_batch: Annotated[int, Range(ge=1)],
        max_wait_ms: Annotated[float, Range(ge=0)],
        cpus_per_actor: Annotated[float, Range(ge=0)],
        gpus_per_actor: Annotated[float, Range(ge=0)],
        memory_per_actor: Annotated[int, Range(ge=1)] | None,
        resources: dict[str, float],
        placement: Literal["PACK", "SPREAD"] | dict[str, str],
        threads_per_actor: Annotated[int, Range(ge=1)],
        address: str | None,
        compress: Compression,
        weights_dtype: Literal["float32", "bfloat16"],
        max_weight_age_updates: Annotated[int, Range(ge=1)] | None,
        max_in_flight_bytes: Annotated[int, Range(ge=1)],
        ingest_threads: Annotated[int, Range(ge=1)],
        start_at_once: Annotated[int, Range(ge=1)],
        start_timeout_s: Annotated[float, Range(gt=0)],
        request_timeout_s: Annotated[float, Range(gt=0)],
        resource_timeout_s: Annotated[float, Range(gt=0)],
        grace_s: Annotated[float, Range(gt=0)],
        restarts: Restarts,
        family: Runtime[EnvFamily],
        agent: Runtime[Agent],
        exploration: Runtime[Exploration],
        seed: Runtime[int],
        chain: Runtime[int],
        env_steps: Runtime[int],
        round_blocks: Runtime[int | None],
    ) -> None:
        """Settings: conf/acting/ray_pool.yaml. What the run supplies: as in LocalPool."""
        self.env_steps_per_request = env_steps_per_request
        self._instances = instances
        served, several = inference == "server", jax.process_count() > 1
        plan = Plan(
            family=family,
            agent=agent,
            exploration=exploration,
            seed=seed,
            instances=instances,
            envs_per_actor=envs_per_actor,
            device="learner" if served or gpus_per_actor else "cpu",
        )
        wants = {"num_cpus": cpus_per_actor, "num_gpus": gpus_per_actor, "memory": memory_per_actor}
        _check_settings(instances, min_instances, address, wants)
        _check_store(max_in_flight_bytes, address)
        arguments = _env_arguments(plan) if served else _actor_arguments(plan, compress)
        self._cluster = Cluster(address=address, store_bytes=2 * max_in_flight_bytes)
        try:
            _check_cluster(self._cluster, instances, min_instances, wants, resources)
            self._fleet = Fleet(
                cls=RemoteEnv if served else RemoteActor,
                arguments=arguments,
                count=instances,
                least=min_instances,
                first_chain=chain,
                options={
                    **{name: amount for name, amount in wants.items() if amount is not None},
                    "resources": dict(resources),
                    **_placement(placement),
                },
                environment=SHARE_GPU if gpus_per_actor else thread_limits(threads_per_actor),
                # Fleets of several learner processes do not know which cores the others took.
                threads=None if gpus_per_actor or several else threads_per_actor,
                free_answers=1 if served else 0,  # of `reset`
                at_once=start_at_once,
                restarts=restarts,
                deadlines=Deadlines(
                    prepare_s=start_timeout_s,
                    request_s=request_timeout_s,
                    resource_s=resource_timeout_s,
                    grace_s=grace_s,
                ),
            )
        except BaseException:
            self._cluster.close()
            raise
        # With a limit on the weights' age no request waits behind another while they grow older.
        ahead = 1 if max_weight_age_updates or sync else requests_per_actor
        self.source: RayActors | RayServer
        if served:
            self.source = RayServer(
                fleet=self._fleet,
                plan=plan,
                want_env_steps=env_steps_per_request,
                ahead=ahead,
                max_batch=max_batch,
                max_wait_s=max_wait_ms / 1000,
                max_age=max_weight_age_updates,
                chain=chain,
                env_steps=env_steps,
            )
        else:
            most_env_steps = _most_env_steps(plan, env_steps_per_request, round_blocks)
            self.source = RayActors(
                fleet=self._fleet,
                want_env_steps=env_steps_per_request,
                want_blocks=round_blocks if sync else None,
                most_env_steps=most_env_steps,
                per_actor=ahead,
                most=max(1, max_in_flight_bytes // _rollout_bytes(plan, most_env_steps)),
                weights_dtype=weights_dtype,
                max_age=max_weight_age_updates,
                ingest_threads=ingest_threads,
                env_steps=env_steps,
            )

    @property
    def burst_env_steps(self) -> int:
        """Env steps of one full round of requests."""
        return self.source.burst_env_steps

    @property
    def chain(self) -> int:
        """The newest of any lane."""
        return self.source.chain

    def collect(self, want_env_steps: int, timeout_s: float, updates: int) -> list[Rollout]:
        """What has arrived, or the first thing that does within `timeout_s`."""
        return self.source.collect(timeout_s, updates)

    def publish(self, weights: Weights, env_steps: int) -> None:
        """The next requests bring these."""
        self.source.publish(weights, env_steps)

    def reopen(self) -> None:
        raise RuntimeError("checkpoint.exact needs acting=local")

    def stats(self) -> dict[str, float | None]:
        """Actors, restarts by cause, and what the way of acting says of itself."""
        failures = self._fleet.failures()
        return {
            "acting/actors_ready": float(self._fleet.ready),
            "acting/actors_wanted": float(self._instances),
            "acting/restarts": float(sum(failures.values())),
            **{f"acting/restarts_{cause}": float(n) for cause, n in failures.items()},
            **self.source.stats(),
        }

    def close(self, timeout_s: float) -> None:
        """Ends the actors, and Ray if this pool had started it."""
        self.source.close(timeout_s)
        self._cluster.close()


Arguments = Callable[[int, int], Mapping[str, Any]]


def _actor_arguments(plan: Plan, compression: Compression) -> Arguments:
    """(index, chain) -> the keywords of `RemoteActor`."""
    packed, cache = pickled(plan), str(cache_folder())
    return lambda index, chain: {
        "plan": packed,
        "index": index,
        "chain": chain,
        "compression": compression,
        "cache": cache,
    }


def _env_arguments(plan: Plan) -> Arguments:
    """(index, chain) -> the keywords of `RemoteEnv`."""
    packed, needs_jax = pickled(plan.family), getattr(plan.family, "needs_jax", True)
    return lambda index, chain: {
        "family": packed,
        "seeds": plan.seeds(index, chain),
        "without_jax": not needs_jax,
    }


def _most_env_steps(plan: Plan, want_env_steps: int, want_blocks: int | None) -> int:
    """Of a request: it ends with a step of all lanes, or with a block of each of them."""
    if want_blocks is not None:
        return want_blocks * plan.envs_per_actor * plan.agent.sequence.block_rows
    return want_env_steps + plan.envs_per_actor - 1


def _rollout_bytes(plan: Plan, most_env_steps: int) -> int:
    """At most: a request may finish a block of every lane, which began before it."""
    rows = max(most_env_steps, plan.envs_per_actor * plan.agent.sequence.block_rows)
    return rows * row_bytes(plan.agent)


def row_bytes(agent: Agent) -> int:
    """Of one env step on the wire, uncompressed."""
    row = trees.flatten(row_spec(agent.spec, agent.acting_spec)).values()
    carry = trees.flatten(carry_spec(agent)).values()
    sizes = [int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in row]
    carries = [int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in carry]
    return sum(sizes) + sum(carries) // agent.sequence.block_rows + 1


def pickled(made_of: Any) -> bytes:
    """What actors are made of, to travel; ConfigError if it can't."""
    try:
        packed = cloudpickle.dumps(made_of)
    except Exception as error:  # it is anybody's code
        line = " ".join(str(error).split())[:200]
        says = f"cannot be pickled for actors in other processes ({line}); use acting=local, or "
        raise refuse("env", says + "keep open files, locks and lambdas out of it") from error
    if len(packed) > LARGEST_PLAN:
        says = f"is {len(packed):,} bytes when pickled; actors take at most {LARGEST_PLAN:,}: "
        raise refuse("env", says + "let each environment load its data itself")
    return packed


def cache_folder() -> Path:
    """Where the actors of a machine keep compiled policies, from run to run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rlx" / "xla"


def _placement(placement: str | Mapping[str, str]) -> dict[str, Any]:
    if isinstance(placement, str):
        return {"scheduling_strategy": {"PACK": "DEFAULT", "SPREAD": "SPREAD"}[placement]}
    return {"label_selector": dict(placement)}


def _check_settings(
    instances: int, min_instances: int, address: str | None, wants: Mapping[str, float | None]
) -> None:
    """What can be said before Ray is there."""
    if min_instances > instances:
        says = f"more than acting.instances={instances}; accepted: 1 .. {instances}"
        raise refuse("acting.min_instances", says, given=str(min_instances))
    gpus = wants["num_gpus"] or 0.0
    if gpus > 1 and gpus != int(gpus):
        says = "accepted: a share of one GPU (0 .. 1), or whole ones"
        raise refuse("acting.gpus_per_actor", says, given=f"{gpus:g}")
    if address is None and not ray.is_initialized():
        _check_room(instances, {"CPU": float(cores())}, wants)


def _check_store(max_in_flight_bytes: int, address: str | None) -> None:
    """That an own cluster's object store, of twice these bytes, fits in memory."""
    most = available_bytes() // 2
    if address is None and not ray.is_initialized() and max_in_flight_bytes > most:
        says = f"Ray's object store takes twice as much; at most {most} bytes fit here"
        raise refuse("acting.max_in_flight_bytes", says, given=str(max_in_flight_bytes))


def _check_cluster(
    cluster: Cluster,
    instances: int,
    min_instances: int,
    wants: Mapping[str, float | None],
    resources: Mapping[str, float],
) -> None:
    """What no waiting helps: a kind of resource that no node has, or an own machine's limits."""
    have = cluster.resources
    problems = []
    for name, amount in resources.items():
        if have.get(name, 0.0) < amount:
            offered = sorted(k for k in have if ":" not in k and k not in RAYS_OWN) or ["none"]
            says = f"no node offers it; the cluster's own resources: {', '.join(offered)}"
            problems.append(
                Problem(path=f"acting.resources.{name}", given=f"{amount:g}", says=says)
            )
    gpus = wants["num_gpus"] or 0.0
    if gpus * min_instances > have.get("GPU", 0.0):
        says = f"the cluster has {have.get('GPU', 0.0):g} GPUs, {min_instances} actors ask for "
        says += f"{gpus * min_instances:g}; set it to 0 (actors act on CPUs)"
        problems.append(Problem(path="acting.gpus_per_actor", given=f"{gpus:g}", says=says))
    if problems:
        raise ConfigError(problems)
    if cluster.is_own:
        _check_room(instances, have, wants)


RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")


def _check_room(
    instances: int, have: Mapping[str, float], wants: Mapping[str, float | None]
) -> None:
    """Refuses more than this machine has, with the two nearest settings that fit."""
    asked = (("num_cpus", "CPU", "cpus_per_actor"), ("memory", "memory", "memory_per_actor"))
    for want, resource, setting in asked:
        each, total = wants[want] or 0.0, have.get(resource, math.inf)
        if each * instances <= total:
            continue
        share = total / instances  # rounded down to something that reads well
        fits = f"{math.floor(share * 1000) / 1000:g}" if want == "num_cpus" else f"{int(share)}"
        says = f"{instances} actors ask for {each * instances:g} {resource}, this machine has "
        says += f"{total:g}; set acting.{setting}={fits}"
        if most := int(total // each):
            says += f", or acting.instances={most} with more acting.envs_per_actor"
        raise refuse("acting.instances", says, given=str(instances))
