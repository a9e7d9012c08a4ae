"""The options of EnvPool's environments: which there are, and what they may be."""

from __future__ import annotations

from typing import Any

from rlx.envs.observations import nearest

# Names of EnvPool's own configuration that `options` may not set, and what to do instead.
RESERVED = {
    "num_envs": "lanes come from acting.envs_per_actor",
    "batch_size": "set env.batch_size",
    "num_threads": "set env.threads",
    "seed": "set the root key seed",
    "env_seed": "set the root key seed",
    "max_episode_steps": "set env.max_episode_steps",
    "stack_num": "frames are single here; set network.stack",
    "frame_stack": "frames are single here; set network.stack",
    "max_num_players": "environments have one player",
    "task": "set env.id",
    "base_path": "set the variable ENVPOOL_ASSETS_PATH",
    "gym_reset_return_info": "it is always on",
}
STACKS = ("stack_num", "frame_stack")


def option_problems(env_id: str, options: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    accepted = [name for name in defaults if name not in RESERVED]
    found = []
    for name, value in options.items():
        if name in STACKS and name in defaults and value == 1:
            continue  # says what holds anyway
        given = f"env.options.{name}={value!r}"
        if name in RESERVED:
            found.append(f"{given} is not set here: {RESERVED[name]}")
        elif name not in defaults:
            found.append(f"{given} is no option of {env_id}; {nearest(name, accepted)}")
        elif not _fits(value, defaults[name]):
            kind = type(defaults[name]).__name__
            found.append(f"{given} is of type {type(value).__name__}; accepted: {kind}")
    return found


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of the default's type; an int is accepted for a float."""
    if isinstance(default, list | tuple):
        return isinstance(value, list | tuple)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)
