"""Reads `env.wrappers`: which classes a configuration may name, with which keywords.

A wrapper counts by the same rule as every `_target_` (`rlx.config.targets`), with gymnasium's own
allowed beside rlx's and the user's. Those of gymnasium's that break what rlx needs of an
environment are refused by name.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
from gymnasium import wrappers as gymnasiums

from rlx.config.targets import full_name, resolve
from rlx.problems import did_you_mean, show

PREFIX = "gymnasium.wrappers."
LIKE = "{_target_: gymnasium.wrappers.NAME, and its keywords}"

VIDEOS = "videos are made by evaluations (docs/using.md); leave it out"
FUNCTION = "it takes a function, which no configuration holds; write a wrapper of your own"
STATISTICS = "its running statistics are in no checkpoint, and each lane has others"
INSTEAD: Mapping[type, str] = {  # and classes that inherit from them
    gymnasiums.Autoreset: "rlx resets the lanes, and sees each episode's last observation; "
    "leave it out",
    gymnasiums.RecordEpisodeStatistics: "rlx counts episodes beneath all wrappers, and reads no "
    "infos; leave it out",
    gymnasiums.RecordVideo: VIDEOS,
    gymnasiums.RenderCollection: VIDEOS,
    gymnasiums.HumanRendering: VIDEOS,
    gymnasiums.NormalizeObservation: f"{STATISTICS}; set env.scale, or take RescaleObservation",
    gymnasiums.NormalizeReward: f"{STATISTICS}; set agent.reward or agent.rescale_epsilon",
}
FUNCTIONS = (  # and no classes that inherit from them
    gymnasiums.TransformObservation,
    gymnasiums.TransformAction,
    gymnasiums.TransformReward,
)
SKIPS = ("frame_skip", "_skip")  # attributes of wrappers that step their environment so often


@dataclass(frozen=True, kw_only=True)
class Wrapping:
    """One wrapper of the list."""

    cls: type
    keywords: Mapping[str, Any]
    at: str  # env.wrappers.0


def problems(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says what is wrong with the list, a line each; makes no environment."""
    return [says for i, node in enumerate(nodes) for says in _problems(node, _at(i))]


def _at(i: int) -> str:
    return f"env.wrappers.{i}"


def _problems(node: Mapping[str, Any], at: str) -> Iterator[str]:
    if "_target_" not in node:
        yield f"{at}={show(node)}; accepted: {LIKE}"
        return
    target = node["_target_"]
    cls, why = resolve(target, PREFIX)
    if cls is not None:
        why = _unfit(cls)
    if cls is None or why:
        yield f"{at}._target_={show(target)}: {why}"
        return
    yield from _keyword_problems(cls, node, at)


def _unfit(cls: type) -> str:
    """Says why a class cannot be a wrapper of rlx's lanes; '' if it can."""
    if not issubclass(cls, gymnasium.Wrapper):
        return f"{full_name(cls)} is no gymnasium.Wrapper; accepted: a class that inherits from it"
    if cls in FUNCTIONS:
        return FUNCTION
    return next((why for kind, why in INSTEAD.items() if issubclass(cls, kind)), "")


def _keyword_problems(cls: type, node: Mapping[str, Any], at: str) -> Iterator[str]:
    try:
        parameters = list(inspect.signature(cls).parameters.values())[1:]  # without `env`
    except (TypeError, ValueError):  # of whatever kind its constructor is
        return
    kinds = inspect.Parameter
    named = [p for p in parameters if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    takes_any = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    names = [p.name for p in named]
    for key in node:
        if key not in names and key != "_target_" and not takes_any:
            yield f"{at}.{key}: no such keyword; {did_you_mean(str(key), names, f'{at}.')}"
    for parameter in named:
        if parameter.default is kinds.empty and parameter.name not in node:
            yield f"{at}.{parameter.name}: missing; {cls.__name__} takes {', '.join(names)}"


def read(nodes: Sequence[Mapping[str, Any]], *, sent: bool) -> list[Wrapping]:
    """The wrappers of a list without problems.

    sent: whether another process has checked it, which may allow more than this one.
    Raises ValueError for a module that cannot be imported here.
    """
    found = []
    for i, node in enumerate(nodes):
        cls = _imported(node["_target_"]) if sent else resolve(node["_target_"], PREFIX)[0]
        assert cls is not None
        keywords = {key: _as_tuple(value) for key, value in node.items() if key != "_target_"}
        found.append(Wrapping(cls=cls, keywords=keywords, at=_at(i)))
    return found


def _imported(target: str) -> type:
    module, _, name = target.rpartition(".")
    try:
        cls: type = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"env.wrappers: {target} was found where the run was started, not in this process of "
            f"its actors ({error}); install its package there"
        ) from error
    return cls


def _as_tuple(value: Any) -> Any:
    """A configuration has lists; gymnasium's wrappers want shapes as tuples."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def wrapped(env: Any, wrappers: Sequence[Wrapping]) -> Any:
    """The environment in its wrappers, the first one innermost; ValueError if one refuses it."""
    for wrapping in wrappers:
        try:
            env = wrapping.cls(env, **wrapping.keywords)
        except (Exception, SystemExit) as error:  # it is anybody's code
            line = str(error).strip().split("\n")[0] or type(error).__name__
            raise ValueError(f"{wrapping.at} ({wrapping.cls.__name__}): {line}") from error
    return env


def has_pictures(wrappers: Sequence[Wrapping]) -> bool:
    """Says whether observations are pictures that the environment draws."""
    return any(issubclass(w.cls, gymnasiums.AddRenderObservation) for w in wrappers)


def said(wrappers: Sequence[Wrapping]) -> list[str]:
    """Says what a person should know of the list, a line each."""
    return [
        f"{w.at} stacks frames, so each is stored as often; network.stack stores images once"
        for w in wrappers
        if issubclass(w.cls, gymnasiums.FrameStackObservation)
    ]


def skips(layers: Sequence[Any]) -> list[Any]:
    """The steps of what lies beneath that each of these wrappers makes, where it tells so."""
    found = [vars(layer)[name] for layer in layers for name in SKIPS if name in vars(layer)]
    repeats = [layer for layer in layers if type(layer).__name__ == "RepeatAction"]
    return found + [layer.num_repeats for layer in repeats]


def frames_per_env_step(env_id: str, env: Any, beneath: Any) -> int:
    """The frames of an env step: ALE's own skip times those of the wrappers.

    beneath: the layer under `env.wrappers`. Wrappers that a registered id brings along count
    above ALE only; an environment without an emulator has a frame for each of its steps.
    """
    layers, layer, above = [], env, env is not beneath
    is_ale = hasattr(env.unwrapped, "ale")
    while isinstance(layer, gymnasium.Wrapper):
        above = above and layer is not beneath
        if above or is_ale:
            layers.append(layer)
        layer = layer.env
    own = [getattr(env.unwrapped, "_frameskip", 1)] if is_ale else []
    found = [*own, *skips(layers)]
    if not all(isinstance(skip, int) for skip in found):
        raise ValueError(
            f"env.id={env_id!r} skips {found} frames, by chance; set env.kwargs.frameskip to a "
            "number, or env.frames_per_env_step to what is to be counted"
        )
    return math.prod(found)
