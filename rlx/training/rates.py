"""Says where a learning rate comes to 0 long before the run ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlx.config.targets import resolve
from rlx.interfaces import Agent

MOST_IDLE = 0.1  # of a run, without a word


def idle_ends(agent: Agent, settings: Mapping[str, Any], processes: int) -> Iterator[str]:
    """A line for each optimiser whose rate is 0 in more than the last tenth of a run.

    settings: of one of so many learner processes.
    """
    replay, total = settings["replay"], settings["total_env_steps"]
    if getattr(resolve(replay["_target_"])[0], "is_recorded", False):  # it makes no env steps
        return
    if any(each["setting"] == "replay.ratio" for each in settings["schedules"]):
        return  # the updates of the run are not known
    rows = settings["learner"]["batch_size"] * processes * agent.sequence.unroll
    steps_of_update = getattr(agent, "epochs", 1) * getattr(agent, "minibatches", 1)
    per_env_step = steps_of_update * (replay.get("ratio") or 1.0) / rows  # a queue's rows: once
    begin = (replay.get("min_env_steps") or 0) * processes
    for name, own in getattr(agent, "__dict__", {}).items():  # an agent may have slots
        if (steps := getattr(own, "gradient_steps_to_zero", None)) is None:
            continue
        last = begin + steps / per_env_step
        if last < (1 - MOST_IDLE) * total:
            yield (
                f"agent.{name}.decay_gradient_steps={own.decay_gradient_steps}: the rate is 0 "
                f"after about {last:,.0f} of total_env_steps={total:,}, so nothing is learnt by "
                f"it then; raise it, or give agent.{name}.final_learning_rate"
            )
