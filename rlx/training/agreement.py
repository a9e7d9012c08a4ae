"""What the groups of a configuration must agree on, said before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlx.config.targets import resolve
from rlx.problems import refuse


def check_agreement(settings: Mapping[str, Any]) -> None:
    """What two groups must agree on."""
    local, replay = is_local(settings), settings["replay"]
    if local and replay.get("ratio", "its own") is None:
        says = "acting=local takes turns with the learner and needs a ratio; set replay.ratio=0.8"
        raise refuse("replay.ratio", says, given="null")
    checkpoint = settings["checkpoint"]
    if checkpoint["exact"] and not (local and checkpoint["replay"]):
        says = "the same bits need acting=local and checkpoint.replay=true; set both"
        raise refuse("checkpoint.exact", says, given="true")
    if checkpoint["exact"] and replay.get("prefetch"):
        says = "a thread draws when it can, which is never the same twice; set it to 0"
        raise refuse("replay.prefetch", says, given=str(replay["prefetch"]))
    batch_size = settings["learner"]["batch_size"]
    if batch_size % (shards := replay.get("shards") or 1):
        says = f"accepted: a divisor of {batch_size} (learner.batch_size), each gives an equal part"
        raise refuse("replay.shards", says, given=str(shards))
    if (warm_up := replay.get("min_env_steps", 0)) >= settings["total_env_steps"]:
        says = f"learning would never begin; accepted: below {settings['total_env_steps']} "
        raise refuse("replay.min_env_steps", says + "(total_env_steps)", given=str(warm_up))
    if "max_delay" in replay and replay["min_sequences"] < batch_size:  # each is drawn once
        says = f"accepted: {batch_size} (learner.batch_size) or more"
        raise refuse("replay.min_sequences", says, given=str(replay["min_sequences"]))
    oldest, every = (
        settings["acting"].get("max_weight_age_updates"),
        settings["learner"]["publish_every_updates"],
    )
    if oldest is not None and oldest < every:
        says = f"weights are published every {every} updates (learner.publish_every_updates): "
        says += f"actors would wait for ever; accepted: null or an int >= {every}"
        raise refuse("acting.max_weight_age_updates", says, given=str(oldest))
    answering, lanes = settings["env"].get("batch_size"), settings["acting"]["envs_per_actor"]
    if answering is not None and answering > lanes:
        says = f"accepted: 1 .. {lanes} (acting.envs_per_actor), or null for all lanes at once"
        raise refuse("env.batch_size", says, given=str(answering))


def is_local(settings: Mapping[str, Any]) -> bool:
    """Whether acting takes turns with learning, in this process."""
    return getattr(resolve(settings["acting"]["_target_"])[0], "takes_turns", False)
