"""Rounds: how acting and learning take turns for an on-policy agent.

Every lane makes the same number of blocks with one version of the weights and rests; the learner
makes one update of exactly these blocks and publishes; the next round begins. So a row is trained
on once, by the weights that made it, and nothing of other weights is in a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlx.config.build import build
from rlx.config.targets import resolve
from rlx.interfaces import Agent, Asynchronous, InRounds, TrainsOnce
from rlx.problems import ConfigError, Problem

Settings = Mapping[str, Any]


def blocks_of_a_round(settings: Settings, agent: Agent) -> int | None:
    """Blocks of each lane that make one batch; None for an agent that is not on-policy.

    Raises ConfigError, with a line for each setting that rounds cannot be made with.
    """
    if not agent.on_policy:
        _refuse_any(_pool_problems(settings, on_policy=False))
        return None
    _refuse_any([*_agent_problems(agent), *_acting_problems(settings), *_batch_problems(settings)])
    return settings["learner"]["batch_size"] // _lanes(settings)


def _refuse_any(problems: list[Problem]) -> None:
    if problems:
        raise ConfigError(problems)


def _lanes(settings: Settings) -> int:
    acting = settings["acting"]
    return acting["instances"] * acting["envs_per_actor"]


def _pool_problems(settings: Settings, *, on_policy: bool) -> list[Problem]:
    pool = build(settings["acting"], "acting")
    if not isinstance(pool, InRounds):
        return []
    every = settings["learner"]["publish_every_updates"]
    return list(pool.round_problems(on_policy=on_policy, publish_every_updates=every))


def _agent_problems(agent: Agent) -> list[Problem]:
    s = agent.sequence
    if s.n_step == 1 and s.length == s.stride == s.block_rows:
        return []
    given = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(s).items())
    says = "an on-policy agent's sequences are blocks: n_step=1 (from Batch.next), "
    says += "burn_in + unroll = stride = block_rows"
    return [Problem(path="agent", given=given, says=says)]


def _acting_problems(settings: Settings) -> list[Problem]:
    """Finds what would act with older weights, or learn from a part of the lanes."""
    wrong = _pool_problems(settings, on_policy=True)
    family = build(settings["env"], "env")
    if isinstance(family, Asynchronous) and family.batch_size is not None:
        says = "an on-policy agent's lanes answer together; set it to null"
        wrong.append(Problem(path="env.batch_size", given=str(family.batch_size), says=says))
    return wrong


def _batch_problems(settings: Settings) -> list[Problem]:
    """The problems of the batch and the replay: a batch is a round, and the replay holds one."""
    replay, lanes = settings["replay"], _lanes(settings)
    batch_size = settings["learner"]["batch_size"]
    cls, _ = resolve(replay["_target_"])
    if not (isinstance(cls, TrainsOnce) and cls.trains_once):
        says = "an on-policy agent trains once on each row; choose replay=online"
        return [Problem(path="replay", says=says)]
    if batch_size % lanes:
        low = max(lanes, batch_size - batch_size % lanes)
        says = f"an update takes one or more blocks of each of the {lanes} lanes (acting.instances "
        says += f"* acting.envs_per_actor); accepted: its multiples, nearest {low}"
        says += f" or {batch_size - batch_size % lanes + lanes}" if batch_size > lanes else ""
        return [Problem(path="learner.batch_size", given=str(batch_size), says=says)]
    if replay["min_sequences"] != batch_size:
        says = f"the replay of an on-policy agent holds one batch; accepted: {batch_size} "
        given = str(replay["min_sequences"])
        says += "(learner.batch_size)"
        return [Problem(path="replay.min_sequences", given=given, says=says)]
    return []
