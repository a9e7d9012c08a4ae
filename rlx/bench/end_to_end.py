"""A whole run with replay beside acting alone and updates alone: `python -m rlx.bench
what=end_to_end`.

The loop's own stages act and learn at the run's ratio. An update stands for the env steps that the
ratio allows it for, so all rates are in env steps/s. Acting and updates alone allow the rate of one
after the other, `1 / (1 / acting + 1 / updates)`, where they share the same cores; where they do
not, as on a GPU or with actors elsewhere, a run may be faster. The three take turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import numpy as np

from rlx.bench import measuring, pools
from rlx.bench.rounds import ALLOWED, QUIET, one_after_the_other, until_updated
from rlx.config.build import check, plain
from rlx.config.composing import compose
from rlx.problems import refuse
from rlx.training.assemble import assemble
from rlx.training.parts import Parts
from rlx.training.stages import Stages

RATIOS = {"cartpole": 4.0, "pong": 0.8}  # trained rows per env step: both sides have work
CAPACITY = 50_000  # rows
REQUEST_ENV_STEPS = 1024  # of a Ray actor at most: what is under way is learnt from in no time
SLICE_S = 2.0  # at most, of a pool that acts beside the learner


def bench_end_to_end(
    setup: measuring.Setup,
    seconds: float,
    *,
    acting: str = "local",
    batch: int | None = None,
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The rates of the setup's agent in env steps/s; raises ConfigError for one without a ratio."""
    cfg = compose([*_settings(setup, acting, batch), *overrides, *QUIET])
    check(cfg)
    with (
        tempfile.TemporaryDirectory() as folder,
        assemble(plain(cfg), Path(folder), resume=False) as parts,
        assemble(plain(cfg), Path(folder), resume=False) as other,  # its lanes act alone
    ):
        if parts.replay.ratio is None:
            says = "acting and updates each have a rate of their own; give a number"
            raise refuse("replay.ratio", says, given="null")
        rates = _rates(Stages(parts), Stages(other), seconds)
    rates[ALLOWED] = one_after_the_other(rates)
    prefix = f"end_to_end/{setup.name}/acting={acting}"
    return measuring.rows(rates, prefix=prefix, unit="env steps/s", roofline=ALLOWED)


def refuse_overrides(setups: Iterable[measuring.Setup], overrides: Sequence[str]) -> None:
    """Raises ConfigError for overrides that the runs of these setups could not have."""
    for setup in setups:
        compose([*_settings(setup, "local", None), *overrides, *QUIET])


def _settings(setup: measuring.Setup, acting: str, batch: int | None) -> list[str]:
    size = batch or measuring.CPU_BATCHES.get(setup.name, setup.batch_size)
    request = min(REQUEST_ENV_STEPS, setup.request_env_steps)
    remote = ["acting.cpus_per_actor=0", f"acting.env_steps_per_request={request}"]
    return [
        *(f"env={setup.env}", f"network={setup.network}", f"agent={setup.agent}"),
        *(f"acting={acting}", f"learner.batch_size={size}"),
        *(f"replay.ratio={RATIOS[setup.name]}", f"replay.capacity={CAPACITY}"),
        *(remote if acting == "ray_pool" else ()),
    ]


def _rates(stages: Stages, other: Stages, seconds: float) -> dict[str, list[float]]:
    learner = other.parts.learner
    for each in (stages, other):
        each.publish()
        measuring.await_actors(each.parts.pool)
    env_steps = _env_steps_of_an_update(other.parts)
    batch = _some_batch(other.parts)

    def updates() -> float:
        jax.block_until_ready(learner.update(batch))
        return env_steps

    def whole() -> float:
        until_updated(stages)
        return env_steps

    alone = stages.parts.takes_turns
    variants: Mapping[str, measuring.Work] = {
        "acting": partial(pools.collected, other.parts.pool),
        "updates": updates,
        "whole": whole,
    }
    before: Mapping[str, Callable[[], object]] = {
        "acting": partial(pools.warm, other.parts.pool),
        "updates": pools.quiet,
        "whole": partial(_warm, stages, whole),
    }
    return measuring.measure(
        variants,
        seconds,
        settle={"whole": stages.settle},
        before={} if alone else before,
        slice_s=None if alone else min(SLICE_S, max(measuring.SLICE_S, seconds / 6)),
    )


def _env_steps_of_an_update(parts: Parts) -> float:
    """Env steps for which the ratio allows one update."""
    assert parts.replay.ratio is not None
    return parts.learner.batch_size * parts.agent.sequence.unroll / parts.replay.ratio


def _some_batch(parts: Parts) -> Any:
    """A batch on the learner's device, from as few env steps as the run needs to begin."""
    replay, learner = parts.replay, parts.learner
    while replay.startable < max(replay.min_sequences, learner.batch_size):
        for rollout in parts.pool.collect(pools.WAIT_S, learner.updates):
            replay.add(rollout)
    made = np.zeros(learner.batch_size, np.uint32)
    return learner.put(replace(replay.sample(learner.batch_size).batch, env_steps=made))


def _warm(stages: Stages, whole: measuring.Work) -> None:
    """Goes on until what was made before is learnt from, and its last update has ended."""
    began = perf_counter()
    while perf_counter() - began < pools.QUIET_S:
        whole()
    stages.settle()  # else the slice would pay for an update that it does not count
