"""Actors on Ray: `acting=ray_pool acting.instances=128`.

Checks the settings, joins the cluster, and leaves the rest to one of two ways of acting: in the
actors (`rlx.acting.ray_actors`) or for them (`rlx.acting.ray_server`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import numpy as np

from rlx import trees
from rlx.acting.plan import Plan, age_problems, carry_spec, make_plan, newest_only, row_spec
from rlx.acting.ray_actors import RayActors, Traffic
from rlx.acting.ray_resources import Placement, Resources, Room, check_store
from rlx.acting.ray_server import RayServer
from rlx.acting.remote import RemoteActor
from rlx.acting.remote_env import RemoteEnv
from rlx.acting.wire import Compression
from rlx.cluster.cluster import Cluster
from rlx.cluster.faults import Replaced, Restarts
from rlx.cluster.fleet import Deadlines, Fleet
from rlx.cluster.pickled import pickled
from rlx.interfaces import Agent, RunContext, ThinFamily
from rlx.machine import compiled
from rlx.problems import Problem
from rlx.types import OfTheRun, Range, Rollout, Weights


@dataclass(frozen=True, kw_only=True)
class RayPool:
    """The settings of a pool on Ray (an interfaces.PoolSettings); see conf/acting/ray_pool.yaml."""

    instances: Annotated[int, Range(ge=1)]
    envs_per_actor: Annotated[int, Range(ge=1)]
    env_steps_per_request: Annotated[int, Range(ge=1), OfTheRun(over="lanes")]
    requests_per_actor: Annotated[int, Range(ge=1)]
    sync: bool
    min_instances: Annotated[int, Range(ge=1), OfTheRun(over="actors")]
    inference: Literal["actor", "server"]
    max_batch: Annotated[int, Range(ge=1)]
    max_wait_ms: Annotated[float, Range(ge=0)]
    cpus_per_actor: Annotated[float, Range(ge=0)]
    gpus_per_actor: Annotated[float, Range(ge=0)]
    memory_per_actor: Annotated[int, Range(ge=1)] | None
    resources: dict[str, float]
    placement: Placement
    threads_per_actor: Annotated[int, Range(ge=1)]
    address: str | None
    compress: Compression
    weights_dtype: Literal["float32", "bfloat16"]
    max_weight_age_updates: Annotated[int, Range(ge=1)] | None
    max_in_flight_bytes: Annotated[int, Range(ge=1), OfTheRun()]
    ingest_threads: Annotated[int, Range(ge=1)]
    start_at_once: Annotated[int, Range(ge=1)]
    start_timeout_s: Annotated[float, Range(gt=0)]
    request_timeout_s: Annotated[float, Range(gt=0)]
    resource_timeout_s: Annotated[float, Range(gt=0)]
    grace_s: Annotated[float, Range(gt=0)]
    restarts: Restarts

    def round_problems(
        self, *, on_policy: bool, publish_every_updates: int | None
    ) -> Sequence[Problem]:
        """An on-policy agent acts in rounds, with its newest weights as they are."""
        if on_policy:
            accepted = {"sync": True, "inference": "actor", "weights_dtype": "float32"}
            return newest_only({name: getattr(self, name) for name in accepted}, accepted)
        if not self.sync:
            return age_problems(self.max_weight_age_updates, publish_every_updates)
        says = "is for on-policy agents, which learn in rounds; this one does not, set it to false"
        return [Problem(path="acting.sync", given="true", says=says)]

    def open(self, context: RunContext) -> OpenRayPool:
        """Joins the cluster and starts the actors; raises ConfigError for what it cannot have."""
        room = self.room
        room.check_settings(self.address)
        check_store(self.max_in_flight_bytes, self.address)
        plan = self._plan(context)
        arguments = (
            _env_arguments(plan) if self.is_served else _actor_arguments(plan, self.compress)
        )
        store_bytes = 2 * self.max_in_flight_bytes
        cluster = Cluster(address=self.address, store_bytes=store_bytes, run=context.output_dir)
        try:
            room.check_cluster(cluster)
            fleet = self._fleet(arguments, context.chain, cluster.check)
            source = self._source(fleet, plan, context)
        except BaseException:
            cluster.close()
            raise
        return OpenRayPool(cluster=cluster, fleet=fleet, source=source)

    @property
    def is_served(self) -> bool:
        """Says whether one policy acts for all actors."""
        return self.inference == "server"

    @property
    def least(self) -> int:
        """Actors that the run cannot do without: a round needs them all."""
        return self.instances if self.sync else self.min_instances

    @property
    def room(self) -> Room:
        """Collects what the actors ask of the cluster."""
        each = Resources(
            cpus=self.cpus_per_actor,
            gpus=self.gpus_per_actor,
            memory=self.memory_per_actor,
            custom=self.resources,
            placement=self.placement,
            threads=self.threads_per_actor,
        )
        return Room(each=each, instances=self.instances, least=self.least)

    @property
    def deadlines(self) -> Deadlines:
        """Says how long the fleet waits."""
        return Deadlines(
            prepare_s=self.start_timeout_s,
            request_s=self.request_timeout_s,
            resource_s=self.resource_timeout_s,
            grace_s=self.grace_s,
        )

    @property
    def ahead(self) -> int:
        """Requests under way of each actor, or of a server."""
        # With a limit on the weights' age no request waits behind another while they grow older.
        return 1 if self.max_weight_age_updates or self.sync else self.requests_per_actor

    def traffic(self, plan: Plan, round_blocks: int | None) -> Traffic:
        """Says what travels, in as many requests at once as `max_in_flight_bytes` allows."""
        most_env_steps = _most_env_steps(plan, self.env_steps_per_request, round_blocks)
        return Traffic(
            want_env_steps=self.env_steps_per_request,
            want_blocks=round_blocks if self.sync else None,
            most_env_steps=most_env_steps,
            per_actor=self.ahead,
            most=max(1, self.max_in_flight_bytes // _rollout_bytes(plan, most_env_steps)),
            weights_dtype=self.weights_dtype,
            max_age=self.max_weight_age_updates,
            ingest_threads=self.ingest_threads,
        )

    def _plan(self, context: RunContext) -> Plan:
        return make_plan(
            context,
            instances=self.instances,
            envs_per_actor=self.envs_per_actor,
            device="learner" if self.is_served or self.gpus_per_actor else "cpu",
        )

    def _fleet(self, arguments: Arguments, first_chain: int, check: Callable[[], None]) -> Fleet:
        each, several = self.room.each, jax.process_count() > 1
        return Fleet(
            check=check,
            cls=RemoteEnv if self.is_served else RemoteActor,
            arguments=arguments,
            count=self.instances,
            least=self.least,
            first_chain=first_chain,
            options=each.options(),
            # Fleets of several learner processes do not know which cores the others took.
            threads=None if each.gpus or several else each.threads,
            free_answers=1 if self.is_served else 0,  # of `reset`
            at_once=self.start_at_once,
            restarts=self.restarts,
            deadlines=self.deadlines,
        )

    def _source(self, fleet: Fleet, plan: Plan, context: RunContext) -> RayActors | RayServer:
        if not self.is_served:
            traffic = self.traffic(plan, context.round_blocks)
            return RayActors(fleet=fleet, traffic=traffic, env_steps=context.env_steps)
        return RayServer(
            fleet=fleet,
            plan=plan,
            want_env_steps=self.env_steps_per_request,
            ahead=self.ahead,
            max_batch=self.max_batch,
            max_wait_s=self.max_wait_ms / 1000,
            max_age=self.max_weight_age_updates,
            chain=context.chain,
            env_steps=context.env_steps,
        )


class OpenRayPool:
    """An interfaces.ActingPool whose actors may fail, and come and go with their machines."""

    def __init__(self, *, cluster: Cluster, fleet: Fleet, source: RayActors | RayServer) -> None:
        self._cluster, self._fleet, self.source = cluster, fleet, source

    @property
    def burst_env_steps(self) -> int:
        """Env steps of one full round of requests."""
        return self.source.burst_env_steps

    @property
    def chain(self) -> int:
        """The newest of any lane."""
        return self.source.chain

    def collect(self, timeout_s: float, updates: int) -> list[Rollout]:
        """Returns what has arrived, or the first thing that does within `timeout_s`."""
        return self.source.collect(timeout_s, updates)

    def publish(self, weights: Weights, env_steps: int) -> None:
        """The next requests bring these."""
        self.source.publish(weights, env_steps)

    def reopen(self) -> None:
        raise RuntimeError("checkpoint.exact needs acting=local")

    def replaced(self) -> list[Replaced]:
        """Gives the actors that act again, since the last call."""
        return self._fleet.replaced()

    def stats(self) -> dict[str, float | None]:
        """Actors, restarts by cause, and what the way of acting says of itself."""
        failures = self._fleet.failures()
        return {
            "acting/actors_ready": float(self._fleet.ready),
            "acting/actors_wanted": float(len(self._fleet.slots)),
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
    packed, compile_cache = pickled(plan), compiled.is_kept()
    return lambda index, chain: {
        "plan": packed,
        "index": index,
        "chain": chain,
        "compression": compression,
        "compile_cache": compile_cache,
    }


def _env_arguments(plan: Plan) -> Arguments:
    """(index, chain) -> the keywords of `RemoteEnv`."""
    family = plan.family
    needs_jax = family.needs_jax if isinstance(family, ThinFamily) else True
    each = [plan.family_of(index) for index in range(plan.instances)]
    for own in {str(own): own for own in each if own is not family}.values():
        plan.check_spaces(own.spec())
    once = {id(own): pickled(own) for own in each}  # most families are one for all actors
    return lambda index, chain: {
        "family": once[id(each[index])],
        "seeds": plan.seeds(index, chain),
        "without_jax": not needs_jax,
    }


def _most_env_steps(plan: Plan, want_env_steps: int, want_blocks: int | None) -> int:
    """The most env steps of a request: it ends with a step of all lanes, or a block of each."""
    if want_blocks is not None:
        return want_blocks * plan.envs_per_actor * plan.agent.sequence.block_rows
    return want_env_steps + plan.envs_per_actor - 1


def _rollout_bytes(plan: Plan, most_env_steps: int) -> int:
    """The most bytes of a rollout: a request may finish one block of each lane."""
    rows = max(most_env_steps, plan.envs_per_actor * plan.agent.sequence.block_rows)
    return rows * row_bytes(plan.agent)


def row_bytes(agent: Agent) -> int:
    """The bytes of one env step on the wire, uncompressed."""
    row = trees.flatten(row_spec(agent.spec, agent.acting_spec)).values()
    carry = trees.flatten(carry_spec(agent)).values()
    sizes = [int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in row]
    carries = [int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in carry]
    return sum(sizes) + sum(carries) // agent.sequence.block_rows + 1
