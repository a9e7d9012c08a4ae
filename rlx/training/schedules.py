"""Settings that change while a run trains: `schedules` (docs/configuration.md#schedules).

A scheduled setting of the agent is an argument of the compiled update and no constant of it, so
nothing is compiled again. Its values travel in the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import flax.linen as nn
import jax
import numpy as np
from jax.interpreters import partial_eval

from rlx.config.build import setting_hints
from rlx.config.changing import GROUP, Schedule, replace_settings
from rlx.config.hints import choices, matches, split
from rlx.interfaces import Agent, ReplayContext
from rlx.problems import did_you_mean, first_line, refuse, show
from rlx.replay.ring.block_spec import BlockSpec
from rlx.types import Batch, TrainState, UpdateOutput

Update = Callable[..., tuple[TrainState, UpdateOutput]]


def check_schedules(
    schedules: Sequence[Schedule], agent: Agent, context: ReplayContext, sequences: int
) -> None:
    """Raises ConfigError for a schedule that the agent's update cannot follow, or does not read.

    sequences: of a device's share of the batch.
    """
    for number, schedule in enumerate(schedules):
        where = f"schedules.{number}"
        if [other.setting for other in schedules].count(schedule.setting) > 1:
            raise refuse(f"{where}.setting", "has two schedules", given=schedule.setting)
        hint = _hint(agent, schedule, f"{where}.setting")
        for _, value in schedule.points:
            if not matches(value, *split(hint)):
                says = f"{value:g} is no value of {schedule.setting}"
                raise refuse(f"{where}.points", says, given=show(schedule.points))
        try:
            is_read = _is_read(agent, schedule, context, sequences)
        except (jax.errors.JAXTypeError, TypeError, ValueError) as error:
            says = f"decides how the update is compiled, so it cannot change ({first_line(error)})"
            raise refuse(f"{where}.setting", says, given=schedule.setting) from error
        if not is_read:
            says = "no update reads it with these settings, so a schedule would change nothing"
            raise refuse(f"{where}.setting", says, given=schedule.setting)


def _hint(agent: Agent, schedule: Schedule, where: str) -> Any:
    """The type of a scheduled setting; raises ConfigError if it is no float of the agent."""
    node: Any = agent
    known = _floats(agent)
    if not schedule.setting.startswith(GROUP) or schedule.path not in known:
        names = [f"{GROUP}{name}" for name in known]
        says = f"no number of the agent that can change; {did_you_mean(schedule.setting, names)}"
        raise refuse(where, says, given=schedule.setting)
    *parents, name = schedule.path.split(".")
    for parent in parents:
        node = getattr(node, parent)
    hint = setting_hints(type(node))[name]
    several = choices(hint) if get_args(split(hint)[0]) else [hint]
    return next(kind for kind in several if split(kind)[0] is float)


def _floats(node: Any, prefix: str = "") -> list[str]:
    """The paths of an agent's settings that are floats now."""
    found = []
    for name in setting_hints(type(node)):
        value = getattr(node, name)
        if type(value) is float:
            found.append(f"{prefix}{name}")
        elif dataclasses.is_dataclass(value) and not isinstance(value, type | nn.Module):
            found += _floats(value, f"{prefix}{name}.")
    return found


def following(agent: Agent) -> Update:
    """The agent's update, which takes scheduled settings from the batch."""
    return partial(_followed, agent)


def _followed(
    agent: Agent, state: TrainState, batch: Batch, *, axis_name: str | None = None
) -> tuple[TrainState, UpdateOutput]:
    assert batch.scheduled is not None
    values = {path: value[0] for path, value in batch.scheduled.items()}
    own: Agent = replace_settings(agent, values)
    return own.update(state, replace(batch, scheduled=None), axis_name=axis_name)


def scheduled(schedules: Sequence[Schedule], size: int, **now: Any) -> dict[str, np.ndarray] | None:
    """The values now, f32[size] by path, as a batch has them; None without schedules."""
    if not schedules:
        return None
    return {s.path: np.full(size, s.value(**now), np.float32) for s in schedules}


def _is_read(agent: Agent, schedule: Schedule, context: ReplayContext, sequences: int) -> bool:
    """Traces an update that follows a schedule; says whether anything depends on its value."""
    spec = BlockSpec(sequence=context.sequence, row=context.row_spec, carry=context.carry_spec)
    batch = replace(spec.buffers(sequences), env_steps=np.zeros(sequences, np.uint32))
    state = jax.eval_shape(lambda: agent.init(jax.random.PRNGKey(0)))

    def update(value: Any, state: TrainState, batch: Batch) -> Any:
        own: Agent = replace_settings(agent, {schedule.path: value})
        return own.update(state, batch)

    traced = jax.make_jaxpr(update)(np.float32(schedule.points[0][1]), state, batch).jaxpr
    _, used = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return bool(used[0])
