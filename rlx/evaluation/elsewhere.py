"""Evaluations in other environments than the training's (`evaluation.env`, `evaluation.others`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlx.acting.plan import same_spaces, spaces_of
from rlx.config.build import build
from rlx.config.marks import merged
from rlx.evaluation.playing import Evaluation
from rlx.interfaces import EnvFamily
from rlx.problems import ConfigError, refuse
from rlx.types import EnvSpec

PER_ACTOR = "per_actor"  # the setting of environments that differ from actor to actor
Families = Mapping[str, EnvFamily]  # by the name of the evaluation; '' is the run's own


def families(
    evaluation: Evaluation, env: Mapping[str, Any], training: EnvFamily, spec: EnvSpec
) -> Families:
    """The families of all evaluations; raises ConfigError where the agent cannot act in one.

    env: the settings of the group; training: the family that they made, and spec its own.
    """
    found = {"": changed(env, evaluation.env, training, spec)}
    for name, other in evaluation.others.items():
        where = f"evaluation.others.{name}"
        check_name(name, where)
        found[name] = changed(env, other.env, training, spec, f"{where}.env")
    return found


def changed(
    env: Mapping[str, Any],
    changes: Mapping[str, Any],
    training: EnvFamily,
    spec: EnvSpec,
    where: str = "evaluation.env",
) -> EnvFamily:
    """The family of changed settings, or the training's where nothing changes."""
    if not changes:
        return training
    if _of_actors(changes):
        says = "an evaluation has no actors (per_actor); give the settings themselves"
        raise refuse(where, says)
    try:
        family: EnvFamily = build(merged(env, changes), "env")
        own = family.spec()
    except ConfigError as error:
        raise ConfigError([_named(problem, where) for problem in error.problems]) from error
    except ValueError as error:
        raise refuse(where, str(error)) from error
    if not same_spaces(own, spec):
        says = f"the agent cannot act there: it has {spaces_of(own)}, the run {spaces_of(spec)}"
        raise refuse(where, says)
    return family


def _of_actors(changes: Mapping[str, Any]) -> bool:
    """Says whether settings are given by the actor, at any depth."""
    inner = (value for value in changes.values() if isinstance(value, Mapping))
    return bool(changes.get(PER_ACTOR)) or any(_of_actors(value) for value in inner)


def check_name(name: Any, where: str) -> None:
    """Raises ConfigError for a name of an evaluation that metrics and files cannot have."""
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise refuse(where, "a name of letters, digits and _ is needed", given=str(name))


def _named(problem: Any, where: str) -> Any:
    path = problem.path
    return replace(problem, path=f"{where}{path[3:]}" if path.startswith("env") else where)
