"""The options of EnvPool's environments: which there are, and what they may be."""

from __future__ import annotations

from typing import Annotated, Any

from rlx.config.hints import describe, matches
from rlx.envs.observations import nearest
from rlx.types import Range

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


# The ranges of options that EnvPool does not check itself: beyond them it computes nonsense,
# or its compiled code ends the process. Names that end alike are of one kind.
SMALL = Range(ge=1, le=4096)  # pixels, cells and repetitions
SHARE = Range(ge=0, le=1)
RANGES: dict[str, Range] = {
    "frame_skip": SMALL,
    "action_repeat": SMALL,
    "noop_max": Range(ge=1, le=1_000_000),
    "img_height": Range(ge=16, le=4096),
    "img_width": Range(ge=16, le=4096),
    "height": Range(ge=2, le=4096),
    "width": Range(ge=1, le=4096),
    "repeat_action_probability": SHARE,
    "mode": Range(ge=-1),
    "difficulty": Range(ge=-1),
}
ENDINGS: dict[str, Range] = {
    "_prob": SHARE,
    "_probability": SHARE,
    "_dt": Range(gt=0),
    "_size": SMALL,
    "_dim": SMALL,
    "_length": SMALL,
    "_rooms": SMALL,
    "_steps": Range(ge=0),
}
INT32 = Range(ge=-(2**31), le=2**31 - 1)


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
        elif wrong := _out_of_range(name, value):
            found.append(f"{given}; accepted: {wrong}")
    return found


def _fits(value: Any, default: Any) -> bool:
    """Says whether a value is of the default's type; an int is accepted for a float."""
    if isinstance(default, list | tuple):
        return isinstance(value, list | tuple)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def untried(options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The options beside the defaults of which no range says all: a child process tries them."""
    return {k: v for k, v in options.items() if k not in RANGES and v != defaults.get(k)}


def _out_of_range(name: str, value: Any) -> str:
    """Says what is accepted, if a number (or one of a row) is not; '' if all are well."""
    limits = RANGES.get(name)
    if limits is None:
        limits = next((r for end, r in ENDINGS.items() if name.endswith(end)), Range())
    for number in value if isinstance(value, list | tuple) else [value]:
        kind: Any = type(number)
        for limit in (limits, *((INT32,) if kind is int else ())):
            if kind in (int, float) and not matches(number, kind, [limit]):
                return describe(Annotated[kind, limit])
    return ""
