"""Ray actors against what their cores could do: `python -m rlx.bench what=acting acting=ray_pool`.

The roofline is EnvPool with the jitted policy in as many processes, started and bound to cores in
the same way, without rollouts, requests or a driver that takes them. It and the pool take turns.
"""

from __future__ import annotations

import os
import pickle
from time import perf_counter, sleep
from typing import Any

import jax
import numpy as np

from rlx.acting.plan import Plan
from rlx.acting.policy import prepare_process
from rlx.acting.ray_actors import RayActors
from rlx.acting.ray_pool import OpenRayPool, RayPool
from rlx.bench import measuring
from rlx.cluster.cluster import Cluster
from rlx.cluster.faults import Restarts
from rlx.cluster.fleet import Answered, Deadlines, Fleet
from rlx.cluster.pickled import pickled
from rlx.cluster.whereabouts import Whereabouts, thread_limits, whereabouts
from rlx.config.build import build
from rlx.types import Weights

ACTORS = 2  # of the comparison with the roofline
SCALE = (1, 2, 4, 8, 32)
WARM_S = 2.0
SLICE_S = 5.0
VERSIONS = 40  # of weights, for the latency
STORE_BYTES = 2_000_000_000
DEADLINES = Deadlines(prepare_s=300.0, request_s=300.0, resource_s=300.0, grace_s=300.0)
NO_RESTARTS = Restarts(
    window_s=600.0, max_raised=1, max_fruitless=1, first_wait_s=1.0, longest_wait_s=1.0
)


class Roofline:
    """EnvPool's own `step` and the policy, in a process like an actor's."""

    def __init__(self, *, plan: bytes, index: int) -> None:
        self._plan, self._index = plan, index

    def hello(self) -> Whereabouts:
        return whereabouts()

    def prepare(self, cores: tuple[int, ...] | None) -> None:
        if cores is not None:
            os.sched_setaffinity(0, cores)
        prepare_process(compile_cache=True, on_cpu=True)
        plan: Plan = pickle.loads(self._plan)
        policy = plan.policy(self._index, 0)
        policy.take(zero_weights(plan.agent))
        self._work = measuring.raw_stepping(plan.family, plan.envs_per_actor, policy)
        self._work()

    def run(self, seconds: float) -> float:
        """Env steps per second, measured over `seconds`."""
        done, began = 0.0, perf_counter()
        while perf_counter() - began < seconds:
            done += self._work()
        return done / (perf_counter() - began)


def zero_weights(agent: Any, version: int = 0) -> Weights:
    """Acting parameters of zeros."""
    params = jax.eval_shape(lambda: agent.acting_params(agent.init(jax.random.PRNGKey(0))))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
    return Weights(version=version, params=zeros)


class Rooflines:
    """A fleet of rooflines, all measured at once."""

    def __init__(self, plan: Plan) -> None:
        packed = pickled(plan)
        self._fleet = Fleet(
            check=lambda: None,
            cls=Roofline,
            arguments=lambda index, life: {"plan": packed, "index": index},
            count=plan.instances,
            least=plan.instances,
            first_chain=0,
            options={"num_cpus": 0, "runtime_env": {"env_vars": dict(thread_limits(1))}},
            threads=1,
            at_once=8,
            restarts=NO_RESTARTS,
            deadlines=DEADLINES,
        )
        while self._fleet.ready < plan.instances:
            self._fleet.poll(0.1)

    def rate(self, seconds: float) -> float:
        """Env steps per second of all rooflines together."""
        for slot in self._fleet.slots:
            self._fleet.request(slot.index, "run", seconds)
        rates: list[float] = []
        while len(rates) < len(self._fleet.slots):
            rates += [e.value for e in self._fleet.poll(0.1) if isinstance(e, Answered)]
        return sum(rates)

    def close(self) -> None:
        self._fleet.close()


def make_rooflines(agent: Any, family: Any, *, instances: int) -> Rooflines:
    """Makes that many rooflines, all ready, each with the lanes of an actor of `make_pool`."""
    return Rooflines(
        Plan(
            family=family,
            agent=agent,
            exploration=build(measuring.settings("exploration", "ladder"), "exploration"),
            seed=0,
            instances=instances,
            envs_per_actor=measuring.settings("acting", "ray_pool")["envs_per_actor"],
            device="cpu",
        )
    )


def make_pool(setup: measuring.Setup, agent: Any, family: Any, **changes: Any) -> OpenRayPool:
    """The pool of conf/acting/ray_pool.yaml with these settings changed, all actors ready."""
    made: RayPool = build(
        measuring.settings("acting", "ray_pool")
        | {"cpus_per_actor": 0.0, "env_steps_per_request": setup.request_env_steps}
        | changes,
        "acting",
    )
    pool = made.open(measuring.context(agent, family))
    pool.publish(zero_weights(agent), 0)
    while pool.stats()["acting/actors_ready"] != pool.stats()["acting/actors_wanted"]:
        sleep(0.2)  # those that are ready fill what may be under way and leave the cores to others
    return pool


def rate(pool: OpenRayPool, seconds: float) -> float:
    """Env steps per second that reach the loop, once rollouts flow."""
    _receive(pool, WARM_S)
    return _receive(pool, seconds) / seconds


def _receive(pool: OpenRayPool, seconds: float) -> int:
    done, began = 0, perf_counter()
    while (left := seconds - (perf_counter() - began)) > 0:
        done += sum(rollout.env_steps for rollout in pool.collect(left, 0))
    return done


def bench_ray(setup: measuring.Setup, seconds: float) -> list[dict[str, Any]]:
    """The pool against its roofline, the scaling curve, the wire and the weights' latency."""
    agent, family = measuring.make_agent(setup), build(measuring.settings("env", setup.env), "env")
    cluster = Cluster(address=None, store_bytes=STORE_BYTES)
    try:
        prefix = f"acting/{setup.name}/ray_pool"
        found = _against_roofline(setup, agent, family, seconds, prefix)
        found += _scaling(setup, agent, family, prefix)
        found += _latency(setup, agent, family, prefix)
        return found
    finally:
        cluster.close()


def _against_roofline(
    setup: measuring.Setup, agent: Any, family: Any, seconds: float, prefix: str
) -> list[dict[str, Any]]:
    rooflines = make_rooflines(agent, family, instances=ACTORS)
    pool = make_pool(setup, agent, family, instances=ACTORS)
    rates: dict[str, list[float]] = {"roofline": [], "pool": []}
    for _ in range(max(1, round(seconds / (2 * SLICE_S)))):
        rates["roofline"].append(rooflines.rate(SLICE_S))
        rates["pool"].append(rate(pool, SLICE_S))
    stats = pool.stats()
    rooflines.close()
    pool.close(10.0)
    compared = measuring.rows(
        rates, prefix=f"{prefix}/{ACTORS} actors", unit="env steps/s", roofline="roofline"
    )
    return [
        *compared,
        _row(f"{prefix}/wire", stats["acting/wire_bytes_per_env_step"], "bytes/env step"),
        _row(f"{prefix}/uncompressed over wire", stats["acting/wire_ratio"], ""),
    ]


def _scaling(setup: measuring.Setup, agent: Any, family: Any, prefix: str) -> list[dict[str, Any]]:
    """The scaling curve; ratios are to one actor."""
    found: list[dict[str, Any]] = []
    for instances in SCALE:
        pool = make_pool(setup, agent, family, instances=instances)
        found.append(_row(f"{prefix}/{instances} actors", rate(pool, SLICE_S), "env steps/s"))
        pool.close(10.0)
        found[-1]["ratio"] = found[-1]["value"] / found[0]["value"]
    return found


def _latency(setup: measuring.Setup, agent: Any, family: Any, prefix: str) -> list[dict[str, Any]]:
    """The time from publishing to acting, with requests of one env step a lane and no queue."""
    lanes = measuring.settings("acting", "ray_pool")["envs_per_actor"]
    changes = {"env_steps_per_request": lanes, "requests_per_actor": 1, "instances": ACTORS}
    pool = make_pool(setup, agent, family, **changes)
    megabytes = sum(x.nbytes for x in jax.tree.leaves(zero_weights(agent).params)) / 1e6
    assert isinstance(pool.source, RayActors)
    _receive(pool, WARM_S)
    pool.source.latencies_s.clear()  # the first one is the actors' start
    for version in range(1, VERSIONS + 1):
        pool.publish(zero_weights(agent, version), 0)
        _receive(pool, 0.4)
    latencies_ms = 1000 * np.array(pool.source.latencies_s)
    pool.close(10.0)
    name = f"{prefix}/{megabytes:.1f} MB of weights to {ACTORS} actors"
    return [_row(f"{name}, p{p}", float(np.percentile(latencies_ms, p)), "ms") for p in (50, 99)]


def _row(name: str, value: float | None, unit: str) -> dict[str, Any]:
    return {"name": name, "value": 0.0 if value is None else value, "unit": unit, "ratio": 1.0}
