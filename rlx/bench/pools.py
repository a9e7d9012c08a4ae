"""The pools of one process against EnvPool and the policy alone: `python -m rlx.bench what=acting`.

The roofline is EnvPool's own `step` with the jitted policy in a bare loop, with the same lanes on
the same device. A pool in threads acts on while others are measured, until the requests that it may
have under way are made; so it starts each slice afresh, and the others wait for it to be quiet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import perf_counter, sleep
from typing import Any

import jax
import numpy as np

from rlx.acting.policy import Policy
from rlx.bench import measuring
from rlx.config.build import build
from rlx.interfaces import ActingPool
from rlx.types import Weights

NAMES = {"local": "local pool", "threads": "thread pool"}
LANES = (1, 8, 32, 128)  # of the scaling
ROOFLINE = "envpool + policy"
QUIET_S = 1.0  # in which requests that are under way come to their end
THREADS_SLICE_S = 1.0
WAIT_S = 60.0  # for rollouts
CLOSE_S = 10.0


def bench_acting(
    setup: measuring.Setup, seconds: float, *, acting: str = "local", lanes: int | None = None
) -> list[dict[str, Any]]:
    """Raw EnvPool, EnvPool with the jitted policy (the roofline), the whole pool.

    acting: a name in NAMES. lanes: of the actor, if they are to be others than its file has.
    """
    own = measuring.settings("acting", acting)
    own |= {} if lanes is None else {"envs_per_actor": lanes}
    count, device = own["envs_per_actor"], own["device"]
    agent, family = measuring.make_agent(setup), build(measuring.settings("env", setup.env), "env")
    params = jax.tree.map(np.asarray, agent.acting_params(agent.init(jax.random.PRNGKey(0))))
    weights = Weights(version=0, params=params)
    policy = Policy(agent=agent, lanes=count, seed=0, path=("bench",), device=device)
    policy.take(weights)
    pool: ActingPool = build(own, "acting").open(measuring.context(agent, family))
    pool.publish(weights, 0)
    variants: dict[str, measuring.Work] = {
        "envpool": measuring.raw_stepping(family, count, None),
        ROOFLINE: measuring.raw_stepping(family, count, policy),
        NAMES[acting]: partial(collected, pool),
    }
    alone = acting == "local"  # acts only when it is asked to
    before = {} if alone else dict.fromkeys(variants, quiet) | {NAMES[acting]: partial(warm, pool)}
    slice_s = None if alone else min(THREADS_SLICE_S, max(measuring.SLICE_S, seconds / 6))
    try:
        rates = measuring.measure(variants, seconds, before=before, slice_s=slice_s)
    finally:
        pool.close(CLOSE_S)
    among = "" if lanes is None else f"/{lanes} lanes"
    prefix = f"acting/{setup.name}{among}"
    return measuring.rows(rates, prefix=prefix, unit="env steps/s", roofline=ROOFLINE)


def bench_lanes(
    setup: measuring.Setup, seconds: float, *, lanes: Sequence[int]
) -> list[dict[str, Any]]:
    """The local pool with so many lanes, one number after the other, each beside its roofline."""
    return [
        row | {"name": row["name"].replace("acting/", "scaling/", 1)}
        for each in lanes
        for row in bench_acting(setup, seconds, lanes=each)
    ]


def collected(pool: ActingPool, wait_s: float = WAIT_S) -> int:
    """The env steps of the rollouts that are there, or come within `wait_s`."""
    return sum(rollout.env_steps for rollout in pool.collect(wait_s, 0))


def warm(pool: ActingPool, seconds: float = QUIET_S) -> None:
    """Takes what was made before, and goes on until rollouts flow at the pool's own rate."""
    began = perf_counter()
    while (left := seconds - (perf_counter() - began)) > 0:
        collected(pool, left)


def quiet() -> None:
    """Waits until a pool that nobody collects from has nothing under way."""
    sleep(QUIET_S)
