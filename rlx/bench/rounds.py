"""Whole rounds of an on-policy agent beside acting alone and updates alone, in one process.

`python -m rlx.bench what=rounds` runs the loop's own stages. What acting and updates allow together
is the rate of one after the other, `1 / (1 / acting + 1 / updates)`; the three take turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlx.bench import measuring
from rlx.config.build import check, plain
from rlx.config.composing import compose
from rlx.problems import refuse
from rlx.training.assemble import assemble
from rlx.training.stages import Stages
from rlx.types import Rollout

WAIT_S = 60.0  # for a round
ALLOWED = "acting, then updates"
QUIET = ("evaluation.every_env_steps=null", "logging.tensorboard=false", "logging.console=off")


def bench_rounds(run: Sequence[str], seconds: float, *, name: str) -> list[dict[str, Any]]:
    """The rates of one run in env steps/s; run: its overrides, of an on-policy agent.

    Raises ConfigError if the agent is another.
    """
    cfg = compose([*run, *QUIET])
    check(cfg)
    with (
        tempfile.TemporaryDirectory() as folder,
        assemble(plain(cfg), Path(folder), resume=False) as parts,
        assemble(plain(cfg), Path(folder), resume=False) as other,  # its lanes act alone
    ):
        if not parts.agent.on_policy:
            says = "its agent does not learn in rounds; give one of a2c, ppo or pqn"
            raise refuse("experiment", says, given=name)
        rates = _rates(Stages(parts), Stages(other), seconds)
    rates[ALLOWED] = one_after_the_other(rates)
    return measuring.rows(rates, prefix=f"rounds/{name}", unit="env steps/s", roofline=ALLOWED)


def _rates(stages: Stages, other: Stages, seconds: float) -> dict[str, list[float]]:
    learner, replay = other.parts.learner, other.parts.replay
    other.publish()
    first = _round(other)
    for rollout in first:
        replay.add(rollout)
    made = np.zeros(learner.batch_size, np.uint32)
    batch = learner.put(replace(replay.sample(learner.batch_size).batch, env_steps=made))
    env_steps = sum(rollout.env_steps for rollout in first)
    stages.publish()

    def acting() -> float:
        other.publish()
        return sum(rollout.env_steps for rollout in _round(other))

    def updates() -> float:
        jax.block_until_ready(learner.update(batch))
        return env_steps

    def whole() -> float:
        before = stages.count.env_steps
        until_updated(stages)
        return stages.count.env_steps - before

    return measuring.measure({"acting": acting, "updates": updates, "whole": whole}, seconds)


def until_updated(stages: Stages) -> None:
    """Takes the loop's turns until the learner has started an update; raises what fails in one."""
    updated = stages.parts.learner.updates
    while stages.parts.learner.updates == updated:
        stages.act()
        stages.agree()
        stages.learn()
        if stages.failure is not None:
            raise stages.failure


def one_after_the_other(rates: dict[str, list[float]]) -> list[float]:
    """Rates that acting alone and updates alone allow where they take turns, of each round."""
    pairs = zip(rates["acting"], rates["updates"], strict=True)
    return [1 / (1 / acting + 1 / updates) for acting, updates in pairs]


def _round(stages: Stages) -> list[Rollout]:
    """The rollouts of one round, which nobody learns from."""
    parts, blocks, found = stages.parts, 0, []
    while blocks < parts.learner.batch_size:
        rollouts = parts.pool.collect(WAIT_S, parts.learner.updates)
        blocks += sum(len(rollout.lane) for rollout in rollouts)
        found += rollouts
    return found
