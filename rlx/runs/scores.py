"""Tells which evaluations of a run are its score: those of its own protocol.

The protocol is the settings' own: `evaluation.epsilon`, at least as many episodes as end the
training, and the newest parameters. An evaluation of a filmed episode, of an older checkpoint or of
the best one is worth having, and it is no score of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

JSON = Mapping[str, Any]


def differences(evaluation: JSON, settings: JSON, env_steps: int | None) -> list[str]:
    """Says what sets an evaluation apart from the run's own protocol; [] where nothing does.

    evaluation: an entry of evaluation.json; what it does not tell is taken to be as in the run.
    settings: the run's. env_steps: of its newest checkpoint; None: it is not known.
    """
    own = settings.get("evaluation")
    own = own if isinstance(own, Mapping) else {}
    found = []
    if isinstance(other := evaluation.get("other"), str):
        found.append(f"the environment of evaluation.others.{other}")
    epsilon, own_epsilon = _number(evaluation, "epsilon"), _number(own, "epsilon")
    if epsilon != own_epsilon and None not in (epsilon, own_epsilon):
        found.append(f"epsilon {epsilon}, the run's is {own_epsilon}")
    episodes = _number(evaluation, "episodes")
    own_episodes = _number(own, "final_episodes") or _number(own, "episodes")
    if episodes is not None and own_episodes is not None and episodes < own_episodes:
        found.append(f"{episodes} episodes, the run's are {own_episodes}")
    of_env_steps = _number(evaluation, "env_steps")
    if of_env_steps != env_steps and None not in (of_env_steps, env_steps):
        found.append(f"parameters of {of_env_steps} env steps, the newest are of {env_steps}")
    return found


def _number(values: JSON, name: str) -> float | None:
    value = values.get(name)
    return value if isinstance(value, int | float) else None
