"""Settings that change while a run trains: `schedules` (docs/configuration.md#schedules).

- A number of the agent is an argument of the compiled update and no constant of it, so nothing is
  compiled again. Its values travel in the batch.
- A number of the replay is told to the replay, and `replay.ratio` to the quota, once a turn.
- A number of the exploration follows the env steps with which each request comes to an actor
  (`rlx.acting.scheduled`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from typing import Any, Protocol, get_args

import flax.linen as nn
import jax
import numpy as np
from jax.interpreters import partial_eval

from rlx.acting.exploration import amounts
from rlx.config.build import build_schedules, setting_hints
from rlx.config.changing import Schedule, replace_settings
from rlx.config.hints import choices, matches, split
from rlx.config.targets import resolve
from rlx.interfaces import Agent, Exploration, Replay, ReplayContext
from rlx.problems import did_you_mean, first_line, refuse, show
from rlx.replay.ring.block_spec import BlockSpec
from rlx.training.quota import Quota
from rlx.types import Batch, TrainState, UpdateOutput

Hints = dict[str, Any]  # of settings that may change, by their paths in the configuration
RATIO = "ratio"  # of the replay's settings: the quota's


class Changing(Protocol):
    """A replay has these, if any of its numbers may change while it is used."""

    changeable: Collection[str]  # their paths among its settings; of the class

    def change(self, values: Mapping[str, float]) -> None:
        """Uses these values from now on; they are in the limits of the settings."""


# --- what can be followed ------------------------------------------------------------------------


def checked_schedules(
    settings: Mapping[str, Any], agent: Agent, exploration: Exploration
) -> list[Schedule]:
    """The schedules of a run; raises ConfigError for one that cannot be followed, or is idle."""
    schedules = build_schedules(settings["schedules"])
    hints = _changeable(settings, agent, exploration) if schedules else {}
    for number, schedule in enumerate(schedules):
        where = f"schedules.{number}.setting"
        if [other.setting for other in schedules].count(schedule.setting) > 1:
            raise refuse(where, "has two schedules", given=schedule.setting)
        if (hint := hints.get(schedule.setting)) is None:
            says = f"no number that can change; {did_you_mean(schedule.setting, list(hints))}"
            raise refuse(where, says, given=schedule.setting)
        for _, value in schedule.points:
            if not matches(value, *split(hint)):
                says = f"{value:g} is no value of {schedule.setting}"
                points = f"schedules.{number}.points"
                raise refuse(points, says, given=show([list(p) for p in schedule.points]))
        if why := _idle(schedule, settings, exploration):
            raise refuse(where, why, given=schedule.setting)
    return schedules


def _changeable(settings: Mapping[str, Any], agent: Agent, exploration: Exploration) -> Hints:
    """The types of all numbers of this run that may change."""
    found = {f"agent.{name}": hint for name, hint in _floats(agent).items()}
    found |= {f"exploration.{name}": hint for name, hint in _floats(exploration).items()}
    replay: Mapping[str, Any] = settings["replay"]
    for path in (*getattr(resolve(replay["_target_"])[0], "changeable", ()), RATIO):
        node, name = _inner(replay, path)
        if type(node.get(name)) in (int, float):  # a number with a fraction may be written without
            cls, _ = resolve(node["_target_"])
            assert cls is not None
            found[f"replay.{path}"] = _float(setting_hints(cls)[name])
    return found


def _inner(node: Mapping[str, Any], path: str) -> tuple[Mapping[str, Any], str]:
    """The settings that a path leads to, and its last name."""
    *parents, name = path.split(".")
    for parent in parents:
        node = node[parent]
    return node, name


def _floats(node: Any, prefix: str = "") -> Hints:
    """The types of the settings of a part that are floats now."""
    found: Hints = {}
    if not dataclasses.is_dataclass(node) or isinstance(node, type | nn.Module):
        return found
    for name, hint in setting_hints(type(node)).items():
        value = getattr(node, name, None)
        if type(value) is float:
            found[f"{prefix}{name}"] = _float(hint)
        else:
            found |= _floats(value, f"{prefix}{name}.")
    return found


def _float(hint: Any) -> Any:
    """The alternative of a type that a float is of."""
    several = choices(hint) if get_args(split(hint)[0]) else [hint]
    return next(kind for kind in several if split(kind)[0] is float)


def _idle(schedule: Schedule, settings: Mapping[str, Any], exploration: Exploration) -> str:
    """Says why a schedule of the replay or of the exploration would not be followed, or nothing."""
    replay = settings["replay"]
    nobody_acts = getattr(resolve(replay["_target_"])[0], "is_recorded", False)
    if schedule.group == "agent":  # see check_updates_read
        return ""
    if schedule.group == "exploration":
        if schedule.over != "env_steps":
            return (
                f"actors know the env steps of the run alone, no {schedule.over}; accepted: "
                "over: env_steps"
            )
        if nobody_acts:
            return "no actor runs, so nobody explores"
        return _idle_exploration(schedule, settings, exploration)
    node, name = _inner(replay, schedule.path)
    if name == RATIO:
        return ""
    if name == "share":
        batch = settings["learner"]["batch_size"]
        if max(round(value * batch) for _, value in schedule.points) == batch:
            return f"a batch of {batch} would have no sequence of the run's own"
        return ""
    if not node["priority_exponent"]:
        return "priority_exponent=0 draws uniformly, so nothing reads it"
    if name == "importance_exponent" and node["anneal_env_steps"] is not None:
        return "anneal_env_steps changes it already; set that and importance_exponent_final to null"
    return ""


def _idle_exploration(
    schedule: Schedule, settings: Mapping[str, Any], exploration: Exploration
) -> str:
    """Says so where no lane explores otherwise by any of the schedule's values, or nothing."""
    now: Any = reduce(getattr, schedule.path.split("."), exploration)
    values = {now, *(value for _, value in schedule.points)}
    lanes = settings["acting"]["instances"] * settings["acting"]["envs_per_actor"]
    total = settings["total_env_steps"]
    turns = (0, total // 2, total, *(int(place) for place, _ in schedule.points))
    found = set()
    for value in values:
        own = replace_settings(exploration, {schedule.path: value})
        found.add(b"".join(amounts(own, lanes, turn).tobytes() for turn in turns))
    if len(found) == 1 < len(values):
        return "no lane explores otherwise by it with these settings"
    return ""


def check_updates_read(
    schedules: Sequence[Schedule], agent: Agent, context: ReplayContext, sequences: int
) -> None:
    """Raises ConfigError for a setting of the agent that no update takes as an argument, or reads.

    An update is traced; sequences: of a device's share of the batch.
    """
    for number, schedule in enumerate(schedules):
        if schedule.group != "agent":
            continue
        where = f"schedules.{number}.setting"
        try:
            is_read = _is_read(agent, schedule, context, sequences)
        except (jax.errors.JAXTypeError, TypeError, ValueError) as error:
            says = f"decides how the update is compiled, so it cannot change ({first_line(error)})"
            raise refuse(where, says, given=schedule.setting) from error
        if not is_read:
            says = "no update reads it with these settings, so a schedule would change nothing"
            raise refuse(where, says, given=schedule.setting)


def _is_read(agent: Agent, schedule: Schedule, context: ReplayContext, sequences: int) -> bool:
    """Traces an update that follows a schedule; says whether anything depends on its value."""
    spec = BlockSpec(sequence=context.sequence, row=context.row_spec, carry=context.carry_spec)
    batch = dataclasses.replace(spec.buffers(sequences), env_steps=np.zeros(sequences, np.uint32))
    state = jax.eval_shape(lambda: agent.init(jax.random.PRNGKey(0)))

    def update(value: Any, state: TrainState, batch: Batch) -> Any:
        own: Agent = replace_settings(agent, {schedule.path: value})
        return own.update(state, batch)

    traced = jax.make_jaxpr(update)(np.float32(schedule.points[0][1]), state, batch).jaxpr
    _, used = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return bool(used[0])


# --- in a run ------------------------------------------------------------------------------------


def values_now(schedules: Sequence[Schedule], **now: Any) -> dict[str, float]:
    """The values of all scheduled settings, by their paths in the configuration.

    now: env_steps, updates and seconds.
    """
    return {schedule.setting: schedule.value(**now) for schedule in schedules}


def tell_replay(values: Mapping[str, float], replay: Replay, quota: Quota) -> None:
    """Gives the replay, and the quota, the values that are theirs."""
    own = _of("replay", values)
    if (ratio := own.pop(RATIO, None)) is not None:
        quota.change_ratio(ratio, replay.env_steps)
    if own:
        changing: Any = replay  # a Changing: only its own are scheduled
        changing.change(own)


def in_batch(values: Mapping[str, float], size: int) -> dict[str, np.ndarray] | None:
    """The agent's values as a batch has them, f32[size] by path; None without any."""
    own = _of("agent", values)
    return {path: np.full(size, value, np.float32) for path, value in own.items()} or None


def _of(group: str, values: Mapping[str, float]) -> dict[str, float]:
    prefix = f"{group}."
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def followed(
    agent: Agent, state: TrainState, batch: Batch, *, axis_name: str | None = None
) -> tuple[TrainState, UpdateOutput]:
    """The agent's update, which takes scheduled settings from the batch."""
    assert batch.scheduled is not None
    values = {path: value[0] for path, value in batch.scheduled.items()}
    own: Agent = replace_settings(agent, values)
    return own.update(state, dataclasses.replace(batch, scheduled=None), axis_name=axis_name)
