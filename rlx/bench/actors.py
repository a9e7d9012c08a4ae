"""Ray actors against what their cores could do: `python -m rlx.bench what=acting acting=ray_pool`.

The roofline is EnvPool with the jitted policy in as many processes, started and bound to cores in
the same way, without rollouts, requests or a driver that takes them. It and the pool take turns.
`what=weights` measures from publishing to acting beside a bare call with as many bytes, and
`what=scaling acting=ray_pool` so many actors, one number after the other.
"""

from __future__ import annotations

import os
import pickle
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from time import perf_counter, sleep
from typing import Any

import jax
import numpy as np

from rlx.acting.plan import Plan
from rlx.acting.policy import prepare_process
from rlx.acting.ray_actors import RayActors
from rlx.acting.ray_pool import OpenRayPool, RayPool
from rlx.bench import measuring, pools
from rlx.cluster.cluster import Cluster
from rlx.cluster.faults import Restarts
from rlx.cluster.fleet import Answered, Deadlines, Fleet
from rlx.cluster.pickled import pickled
from rlx.cluster.whereabouts import Whereabouts, thread_limits, whereabouts
from rlx.config.build import build
from rlx.problems import RunFailed
from rlx.types import Weights

ACTORS = 2  # of the comparison with the roofline
SCALE = (1, 2, 4, 8, 32)
WARM_S = 2.0
SLICE_S = 5.0  # at most
ROUNDS = 3  # at least, where there is time for slices of half a second
VERSIONS = 40  # of weights, for the latency
VERSION_S = 0.4  # in which each must come to be used
STORE_BYTES = 2_000_000_000
CLOSE_S = 10.0
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

    def take(self, packed: bytes) -> int:
        """Bytes that have arrived."""
        return len(packed)


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

    def hand_over(self, packed: bytes, cluster: Cluster) -> float:
        """Milliseconds until all have these bytes, which are stored once, and have said so."""
        began, answers = perf_counter(), 0
        stored = cluster.put(packed)
        for slot in self._fleet.slots:
            self._fleet.request(slot.index, "take", stored)
        while answers < len(self._fleet.slots):
            answers += sum(isinstance(event, Answered) for event in self._fleet.poll(0.1))
        return 1000 * (perf_counter() - began)

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
    measuring.await_actors(pool)
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


def bench_pool(setup: measuring.Setup, seconds: float) -> list[dict[str, Any]]:
    """The pool against its roofline, and the wire."""
    with _made(setup) as (agent, family, _):
        return _against_roofline(setup, agent, family, seconds)


def bench_scaling(
    setup: measuring.Setup, seconds: float, *, actors: Sequence[int]
) -> list[dict[str, Any]]:
    """The scaling curve."""
    with _made(setup) as (agent, family, _):
        return _scaling(setup, agent, family, seconds, actors)


def bench_weights(setup: measuring.Setup, seconds: float) -> list[dict[str, Any]]:
    """The weights' latency."""
    with _made(setup) as (agent, family, cluster):
        return _latency(setup, agent, family, seconds, cluster)


@contextmanager
def _made(setup: measuring.Setup) -> Iterator[tuple[Any, Any, Cluster]]:
    """The setup's agent and environments, and a cluster that is closed after them."""
    agent, family = measuring.make_agent(setup), build(measuring.settings("env", setup.env), "env")
    with closing(Cluster(address=None, store_bytes=STORE_BYTES)) as cluster:
        yield agent, family, cluster


def _slice_s(seconds: float) -> float:
    return min(SLICE_S, max(measuring.SLICE_S, seconds / (2 * ROUNDS)))


def _against_roofline(
    setup: measuring.Setup, agent: Any, family: Any, seconds: float
) -> list[dict[str, Any]]:
    prefix, slice_s = f"acting/{setup.name}/ray_pool", _slice_s(seconds)
    rates: dict[str, list[float]] = {"roofline": [], "pool": []}
    with ExitStack() as ends:
        rooflines = ends.enter_context(closing(make_rooflines(agent, family, instances=ACTORS)))
        pool = make_pool(setup, agent, family, instances=ACTORS)
        ends.callback(pool.close, CLOSE_S)
        for _ in range(max(1, round(seconds / (2 * slice_s)))):
            rates["pool"].append(rate(pool, slice_s))
            sleep(_under_way_s(setup, rates["pool"][-1]))  # else they would take the cores
            rates["roofline"].append(rooflines.rate(slice_s))
        stats = pool.stats()
    compared = measuring.rows(
        rates, prefix=f"{prefix}/{ACTORS} actors", unit="env steps/s", roofline="roofline"
    )
    wire, packed = (stats[f"acting/wire_{name}"] or 0.0 for name in ("bytes_per_env_step", "ratio"))
    return [
        *compared,
        measuring.alone(f"{prefix}/wire", wire, "bytes/env step"),
        measuring.alone(f"{prefix}/uncompressed over wire", packed, ""),
    ]


def _under_way_s(setup: measuring.Setup, env_steps_per_s: float) -> float:
    """Seconds in which a pool that nobody collects from has made what it was asked for."""
    requests = ACTORS * measuring.settings("acting", "ray_pool")["requests_per_actor"]
    return pools.QUIET_S + requests * setup.request_env_steps / max(1.0, env_steps_per_s)


def _scaling(
    setup: measuring.Setup, agent: Any, family: Any, seconds: float, actors: Sequence[int]
) -> list[dict[str, Any]]:
    """The scaling curve; ratios are to the first number of actors."""
    found: list[dict[str, Any]] = []
    slice_s = _slice_s(seconds)
    for instances in actors:
        pool = make_pool(setup, agent, family, instances=instances)
        try:
            _receive(pool, WARM_S)
            own = statistics.median(_receive(pool, slice_s) / slice_s for _ in range(ROUNDS))
        finally:
            pool.close(CLOSE_S)
        first = found[0]["value"] if found else own
        name = f"scaling/{setup.name}/ray_pool/{instances} actors"
        found.append(measuring.alone(name, own, "env steps/s", own / first if first else None))
    return found


def _latency(
    setup: measuring.Setup, agent: Any, family: Any, seconds: float, cluster: Cluster
) -> list[dict[str, Any]]:
    """The time from publishing to acting, with requests of one env step a lane and no queue."""
    lanes = measuring.settings("acting", "ray_pool")["envs_per_actor"]
    changes = {"env_steps_per_request": lanes, "requests_per_actor": 1, "instances": ACTORS}
    packed = pickle.dumps(zero_weights(agent))
    bare_ms: list[float] = []
    own_ms: list[list[float]] = []
    with ExitStack() as ends:
        rooflines = ends.enter_context(closing(make_rooflines(agent, family, instances=ACTORS)))
        pool = make_pool(setup, agent, family, **changes)
        ends.callback(pool.close, CLOSE_S)
        assert isinstance(pool.source, RayActors)
        _receive(pool, WARM_S)
        rooflines.hand_over(packed, cluster)
        for version in range(1, 1 + min(VERSIONS, max(5, round(seconds / VERSION_S)))):
            bare_ms.append(rooflines.hand_over(packed, cluster))
            pool.source.latencies_s.clear()
            pool.publish(zero_weights(agent, version), 0)
            _receive(pool, VERSION_S)
            own_ms.append([1000 * latency_s for latency_s in pool.source.latencies_s])
    prefix = f"weights/{setup.name}/{len(packed) / 1e6:.1f} MB to {ACTORS} actors"
    return _latency_rows(prefix, bare_ms, own_ms)


def _latency_rows(
    prefix: str, bare_ms: Sequence[float], own_ms: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """Quantiles of all actors' times; a ratio is a bare call's time by the pool's, so below 1."""
    rounds = [
        (bare, statistics.median(own)) for bare, own in zip(bare_ms, own_ms, strict=True) if own
    ]
    if not rounds:
        raise RunFailed(f"no version of the weights was used within {VERSION_S} s of publishing")
    ratios = [bare / own for bare, own in rounds]
    bare, every = statistics.median(bare_ms), np.concatenate([own for own in own_ms if own])
    p50, p99 = np.percentile(every, (50, 99))
    return [
        measuring.alone(f"{prefix}/bare call, p50", bare, "ms"),
        measuring.compared(f"{prefix}/p50", p50, "ms", roofline=bare, ratios=ratios),
        measuring.alone(f"{prefix}/p99", p99, "ms"),
    ]
