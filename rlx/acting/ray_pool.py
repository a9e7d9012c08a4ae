"""Actors on Ray: `acting=ray_pool acting.instances=128`.

One thread sends requests, watches the actors (`rlx.acting.ray_fleet`) and fetches answers; a few
more unpack them; `collect` hands them to the training loop in the order of each actor's blocks.

A request that has been collected is what allows the next one: at any time there are at most
`requests_per_actor` of them under way per actor, in the actor, the object store or here, so a slow
learner makes the actors wait and nothing piles up.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import monotonic, time
from typing import Annotated, Any, Literal

import numpy as np
import ray
from ray import cloudpickle

from rlx import trees
from rlx.acting.blocks import row_spec
from rlx.acting.faults import ActingFailed, Restarts
from rlx.acting.plan import Plan, carry_spec
from rlx.acting.ray_cluster import Cluster, cores
from rlx.acting.ray_fleet import Answered, Deadlines, Fleet, Lost, Ready
from rlx.acting.remote import RemoteActor, thread_limits
from rlx.acting.wire import Answer, Compression, narrowed, unpack
from rlx.interfaces import Agent, EnvFamily, Exploration
from rlx.problems import ConfigError, Problem, refuse
from rlx.types import Range, Rollout, Runtime, Weights

POLL_S = 0.02
SILENT_S = 900.0  # without any rollout although actors are ready: something is wrong
ACTOR_BYTES = 350_000_000  # of memory, measured on the default run: Python, JAX, EnvPool
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
        min_instances: Annotated[int, Range(ge=1)],
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
    ) -> None:
        """Settings: conf/acting/ray_pool.yaml. `chain`, `env_steps`: as in LocalPool."""
        self.env_steps_per_request = env_steps_per_request
        self._instances = instances
        self._first_chain = chain
        self._compression: Compression = compress
        self._weights_dtype = weights_dtype
        self._max_age = max_weight_age_updates
        # With a limit on the weights' age no request waits behind another while they grow older.
        self._per_actor = 1 if max_weight_age_updates else requests_per_actor
        plan = Plan(
            family=family,
            agent=agent,
            exploration=exploration,
            seed=seed,
            instances=instances,
            envs_per_actor=envs_per_actor,
            device="learner" if gpus_per_actor else "cpu",
        )
        request_bytes = env_steps_per_request * row_bytes(agent)
        self._most_requests = max(1, max_in_flight_bytes // request_bytes)
        wants = {"num_cpus": cpus_per_actor, "num_gpus": gpus_per_actor, "memory": memory_per_actor}
        _check_settings(instances, min_instances, address, wants)
        packed = _pickled(plan)
        self._cluster = Cluster(address=address, store_bytes=2 * max_in_flight_bytes)
        try:
            _check_cluster(self._cluster, instances, min_instances, wants, resources)
            self._fleet = Fleet(
                cls=RemoteActor,
                arguments=lambda index, life: {
                    "plan": packed,
                    "index": index,
                    "chain": life,
                    "compression": compress,
                    "cache": str(_cache_folder()),
                },
                count=instances,
                least=min_instances,
                first_chain=chain,
                options={
                    **{name: amount for name, amount in wants.items() if amount is not None},
                    "resources": dict(resources),
                    **_placement(placement),
                },
                environment=thread_limits(threads_per_actor) if not gpus_per_actor else {},
                threads=None if gpus_per_actor else threads_per_actor,
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
        self._unpackers = ThreadPoolExecutor(ingest_threads, thread_name_prefix="unpack")
        self._arrived: queue.SimpleQueue[tuple[int, int, Future[Answer]]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of what follows, which the loop and the thread share
        self._weights: Weights | None = None
        self._published_s: dict[int, float] = {}  # version -> when, until it was first used
        self._env_steps, self._updates = env_steps, 0
        self._collected: deque[int] = deque()  # actors whose request the loop has taken
        self._failed: BaseException | None = None
        self._counts: Counter[str] = Counter()
        self._latency_s = 0.0
        # The thread's own:
        self._reference: tuple[int, Any] | None = None  # version, in the object store
        self._lives: list[int] = [-1] * instances  # the chain of each ready actor's life
        self._open = [0] * instances  # requests under way, those not collected yet too
        self._idle: deque[int] = deque()  # actors that may be sent a request, longest idle first
        self._stop = threading.Event()
        self._last_arrival_s = monotonic()
        self._thread = threading.Thread(target=self._run, name="ray pool", daemon=True)
        self._thread.start()

    # --- the loop's side -------------------------------------------------------------------------

    @property
    def burst_env_steps(self) -> int:
        """Env steps of one full round of requests."""
        most = min(self._instances * self._per_actor, self._most_requests)
        return most * self.env_steps_per_request

    @property
    def chain(self) -> int:
        """The newest life of any actor."""
        return max(slot.chain for slot in self._fleet.slots)

    def collect(self, want_env_steps: int, timeout_s: float, updates: int) -> list[Rollout]:
        """What has arrived, or the first thing that does within `timeout_s`."""
        with self._lock:
            self._updates = updates
        rollouts = []
        wait = timeout_s
        while True:
            self._raise_failure()
            try:
                index, life, unpacked = self._arrived.get(timeout=max(wait, 1e-6))
            except queue.Empty:
                break
            rollouts.append(self._received(index, life, unpacked.result(), updates))
            wait = 0.0
        return rollouts

    def publish(self, weights: Weights, env_steps: int) -> None:
        """The next requests bring these."""
        with self._lock:
            self._weights, self._env_steps = weights, max(env_steps, self._env_steps)
            self._published_s[weights.version] = time()

    def reopen(self) -> None:
        raise RuntimeError("checkpoint.exact needs acting=local")

    def stats(self) -> dict[str, float]:
        """Actors, failures by cause, bytes on the wire, weights' latency; since the start."""
        failures = self._fleet.failures()
        with self._lock:
            counts = Counter(self._counts)
        env_steps = max(1, counts["env_steps"])
        total_s = max(1e-9, counts["total_s"])
        return {
            "acting/actors_ready": float(self._fleet.ready),
            "acting/actors_wanted": float(self._instances),
            "acting/restarts": float(sum(failures.values())),
            **{f"acting/restarts_{cause}": float(n) for cause, n in failures.items()},
            "acting/lost_env_steps_at_most": float(counts["lost_env_steps"]),
            "acting/wire_bytes_per_env_step": counts["wire_bytes"] / env_steps,
            "acting/wire_ratio": counts["raw_bytes"] / max(1, counts["wire_bytes"]),
            "weights/publish_to_used_s": self._latency_s,
            "time/acting_env": counts["env_s"] / total_s,
            "time/acting_policy": counts["policy_s"] / total_s,
        }

    def close(self, timeout_s: float) -> None:
        """Ends the actors, and Ray if this pool had started it."""
        self._stop.set()
        self._thread.join(timeout_s)
        self._unpackers.shutdown(wait=False, cancel_futures=True)
        with suppress(Exception):
            self._fleet.close()
        self._cluster.close()

    def _received(self, index: int, life: int, answer: Answer, updates: int) -> Rollout:
        rollout: Rollout = answer.rollout
        with self._lock:
            self._collected.append(index)
            self._env_steps += rollout.env_steps
            self._counts["env_steps"] += rollout.env_steps
            self._counts["raw_bytes"] += answer.raw_bytes
            self._counts["wire_bytes"] += answer.wire_bytes
            for name, seconds in rollout.timings.items():
                self._counts[name] += seconds  # type: ignore[assignment]
            published = self._published_s.pop(answer.weights_version, None)
            if published is not None:
                self._latency_s = max(0.0, answer.weights_taken_s - published)
            for version in [v for v in self._published_s if v < answer.weights_version]:
                del self._published_s[version]
        return rollout

    def _raise_failure(self) -> None:
        if self._failed is not None:
            raise self._failed
        if self._fleet.ready and monotonic() - self._last_arrival_s > SILENT_S:
            raise ActingFailed(f"no rollout for {SILENT_S:.0f} s although actors are ready")

    # --- the thread's side -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._take_back()
                self._send_requests()
                for event in self._fleet.poll(POLL_S):
                    self._heed(event)
                if not any(slot.requests for slot in self._fleet.slots):
                    self._stop.wait(POLL_S)
        except BaseException as error:
            self._failed = error

    def _heed(self, event: Ready | Answered | Lost) -> None:
        if isinstance(event, Ready):
            self._lives[event.index] = event.chain
            self._open[event.index] = 0
            self._idle.extend([event.index] * self._per_actor)
        elif isinstance(event, Answered):
            self._last_arrival_s = monotonic()
            unpacked = self._unpackers.submit(_unpack, event.value)
            self._arrived.put((event.index, self._lives[event.index], unpacked))
        else:
            with self._lock:
                self._counts["lost_env_steps"] += event.requests * self.env_steps_per_request
            self._lives[event.index] = -1
            self._idle = deque(i for i in self._idle if i != event.index)

    def _take_back(self) -> None:
        """Actors whose answers the loop has taken may be asked again."""
        with self._lock:
            collected, self._collected = self._collected, deque()
        for index in collected:
            if self._lives[index] >= 0 and self._open[index] > 0:
                self._open[index] -= 1
                self._idle.append(index)

    def _send_requests(self) -> None:
        with self._lock:
            weights, env_steps, updates = self._weights, self._env_steps, self._updates
        if weights is None or not self._idle:
            return
        if self._max_age is not None and updates - weights.version > self._max_age:
            return  # until newer ones are published
        reference = self._stored(weights)
        while self._idle and sum(self._open) < self._most_requests:
            index = self._idle.popleft()
            self._open[index] += 1
            self._fleet.request(index, "collect", reference, env_steps, self.env_steps_per_request)

    def _stored(self, weights: Weights) -> Any:
        """The one copy of this version in the object store."""
        if self._reference is None or self._reference[0] != weights.version:
            self._reference = weights.version, ray.put(narrowed(weights, self._weights_dtype))
        return self._reference[1]


def row_bytes(agent: Agent) -> int:
    """Of one env step on the wire, uncompressed."""
    row = trees.flatten(row_spec(agent.spec, agent.acting_spec)).values()
    carry = trees.flatten(carry_spec(agent)).values()
    sizes = [int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in row]
    carries = [int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in carry]
    return sum(sizes) + sum(carries) // agent.sequence.block_rows + 1


def _unpack(answer: Answer) -> Answer:
    return Answer(
        rollout=unpack(answer.rollout),
        raw_bytes=answer.raw_bytes,
        wire_bytes=answer.wire_bytes,
        weights_version=answer.weights_version,
        weights_taken_s=answer.weights_taken_s,
    )


def _pickled(plan: Plan) -> bytes:
    try:
        packed = cloudpickle.dumps(plan)
    except Exception as error:  # it is anybody's code
        line = " ".join(str(error).split())[:200]
        says = f"cannot be pickled for actors in other processes ({line}); use acting=local, or "
        raise refuse("env", says + "keep open files, locks and lambdas out of it") from error
    if len(packed) > LARGEST_PLAN:
        says = f"is {len(packed):,} bytes when pickled; actors take at most {LARGEST_PLAN:,}: "
        raise refuse("env", says + "let each environment load its data itself")
    return packed


def _cache_folder() -> Path:
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
    if address is None and not ray.is_initialized():
        _check_room(instances, {"CPU": float(cores())}, wants, own=True)


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
        _check_room(instances, have, wants, own=True)
    else:
        _check_room(min_instances, have, wants, own=False)


RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")


def _check_room(
    instances: int, have: Mapping[str, float], wants: Mapping[str, float | None], *, own: bool
) -> None:
    """Raises a ConfigError with the two nearest settings that fit, if so many actors don't."""
    cpus, total = wants["num_cpus"] or 0.0, have.get("CPU", 0.0)
    where = "this machine" if own else "the cluster"
    if own and cpus * instances > total:
        share = np.floor(total / instances * 100) / 100
        most = max(1, int(total // cpus)) if cpus <= total else 0
        fewer = f"acting.instances={most} with more acting.envs_per_actor" if most else ""
        smaller = f"acting.cpus_per_actor={max(share, 0.001):g}"
        says = f"{instances} actors ask for {cpus * instances:g} CPUs, {where} has {total:g}; "
        says += f"set {smaller}" + (f", or {fewer}" if fewer else "")
        raise refuse("acting.instances", says, given=str(instances))
