"""Checks what replays need of the other groups' settings (interfaces.Agrees)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlx.problems import Problem


def ring_clashes(settings: Mapping[str, Any]) -> list[Problem]:
    """Checks a replay that is drawn from: rings give equal parts, and learning begins in time."""
    replay, found = settings["replay"], []
    batch_size, total = settings["learner"]["batch_size"], settings["total_env_steps"]
    if batch_size % (shards := replay["shards"] or 1):
        says = f"accepted: a divisor of {batch_size} (learner.batch_size), each gives an equal part"
        found.append(Problem(path="replay.shards", given=str(shards), says=says))
    if (warm_up := replay["min_env_steps"]) >= total:
        says = f"learning would never begin; accepted: below {total} (total_env_steps)"
        found.append(Problem(path="replay.min_env_steps", given=str(warm_up), says=says))
    return found


def queue_clashes(settings: Mapping[str, Any]) -> list[Problem]:
    """Checks a replay that gives sequences once: a whole batch waits when learning begins."""
    least, batch_size = settings["replay"]["min_sequences"], settings["learner"]["batch_size"]
    if least >= batch_size:
        return []
    says = f"accepted: {batch_size} (learner.batch_size) or more"
    return [Problem(path="replay.min_sequences", given=str(least), says=says)]
