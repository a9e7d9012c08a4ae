"""Hydra node -> checked call.

A node names a class by `_target_` and lists every setting of it. `check` compares a whole
configuration with the classes' signatures and reports all problems at once, before anything
starts; `build` makes one object. A target counts by what it resolves to, never by its spelling:
a public class of an allowed package that has the role its place asks for. A configuration that
came with a run or a checkpoint is therefore only data.
"""

from __future__ import annotations

import collections.abc
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Union, get_args, get_origin

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlx.config.changing import Schedule
from rlx.config.hints import choices, describe, is_class, marker, matches, split, wrong
from rlx.config.targets import fits, full_name, lacks, load, resolve
from rlx.interfaces import Checked
from rlx.problems import ConfigError, Problem, Sources, did_you_mean, refuse, show
from rlx.types import AloneOnly, FromRun, Gathered, IsPath, Range

ROLES = {  # group -> the Protocol or class that its target must be
    "env": "rlx.interfaces.EnvFamily",
    "network": "rlx.interfaces.Network",
    "replay": "rlx.interfaces.Replay",
    "agent": "rlx.interfaces.Agent",
    "exploration": "rlx.interfaces.Exploration",
    "acting": "rlx.interfaces.PoolSettings",
    "learner": "rlx.training.learner.Learner",
    "evaluation": "rlx.evaluation.playing.Evaluation",
    "checkpoint": "rlx.training.checkpoint.Checkpoint",
    "logging": "rlx.runs.metrics.Logging",
}
NO_HOOK = "rlx.training.hooks.no_hook"  # says why a class is none of `hooks`
MISSING = "???"
NO_DEFAULT = inspect.Parameter.empty


@dataclass(frozen=True, kw_only=True)
class Root:
    """The keys that belong to no group; conf/config.yaml explains them."""

    seed: Annotated[int, Range(ge=0)]
    total_env_steps: Annotated[int, Range(ge=1)]
    stop_after_s: Annotated[float, Range(gt=0)] | None
    stop_after_updates: Annotated[int, Range(ge=1)] | None
    resume: str | None
    init_from: Annotated[str, IsPath()] | None
    init_params: list[str]
    deterministic: Annotated[bool, AloneOnly()]
    compile_cache: bool
    hooks: list[Any]  # each a node whose class has some of the methods of a hook
    schedules: list[dict[str, Any]]  # each the settings of a Schedule
    tags: list[str]


# --- the whole configuration ---------------------------------------------------------------------


def check(cfg: DictConfig | Mapping[str, Any], sources: Sources | None = None) -> None:
    """Raises a ConfigError with every problem of this configuration."""
    sources = sources or getattr(cfg, "__dict__", {}).get("_rlx_sources") or Sources()
    try:
        out = [*sources.clashes, *_problems(plain(cfg))]
    except ConfigError as error:  # cannot even be resolved
        out = error.problems
    if out:
        raise ConfigError([replace(p, source=p.source or sources.of(p.path)) for p in out])


def _problems(tree: Mapping[str, Any]) -> list[Problem]:
    out: list[Problem] = []
    found: list[Problem] = []
    root = {key: value for key, value in tree.items() if key not in ROLES}
    _read_settings(Root, root, "", out, also=ROLES)
    for number, node in enumerate(_items(root.get("hooks"))):
        found = []
        call = _read_node(node, (object,), f"hooks.{number}", found)
        if call is not None and (why := load(NO_HOOK)(call.cls)):
            path = f"hooks.{number}._target_"
            found.append(Problem(path=path, given=show(node["_target_"]), says=why))
        out += found if found or call is None else call.problems()
    for number, node in enumerate(_items(root.get("schedules"))):
        if isinstance(node, Mapping):
            _read_settings(Schedule, node, f"schedules.{number}", out)
    for group, role in ROLES.items():
        if group not in tree:
            out.append(Problem(path=group, says=f"missing; choose one with {group}=NAME"))
            continue
        found = []
        call = _read_node(tree[group], (load(role),), group, found)
        out += found if found or call is None else call.problems()
    return out


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration as dicts and lists, without Hydra's own section."""
    if not isinstance(cfg, DictConfig):
        return {str(key): unboxed(value) for key, value in cfg.items()}
    if "hydra" in cfg:
        cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    try:
        tree = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        says = str(error).splitlines()[0]
        if absent := re.search(r"Interpolation key '(.+)\.(\d+)' not found", says):
            says = f"it is element {absent[2]} of {absent[1]}, which has none; give {absent[1]} one"
        raise refuse(str(error.full_key), says) from error
    assert isinstance(tree, dict)
    return {str(key): unboxed(value) for key, value in tree.items()}


def unboxed(value: Any) -> Any:
    """The value with Python's numbers in the place of NumPy's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: unboxed(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(unboxed(child) for child in value)
    return value


def remember(cfg: DictConfig, sources: Sources) -> DictConfig:
    """Ties a composed configuration to its sources, beside its content: no key is added."""
    object.__setattr__(cfg, "_rlx_sources", sources)
    return cfg


def build(node: DictConfig | Mapping[str, Any], role: str | type, **runtime: Any) -> Any:
    """The object that a node describes; a class takes the `runtime` values it declares.

    `role` is a group ("agent") or the Protocol or class that the object must be.
    """
    return prepare(node, role).make(runtime)


def prepare(node: DictConfig | Mapping[str, Any], role: str | type, path: str = "") -> Call:
    """The call that a node describes, checked; `make` it here or, pickled, elsewhere.

    path: of the node in the configuration, where it is no group's.
    """
    path = path or (role if isinstance(role, str) else role.__name__)
    out: list[Problem] = []
    wanted = load(ROLES[role]) if isinstance(role, str) else role
    call = _read_node(plain(node), (wanted,), path, out)
    if out or call is None:
        raise ConfigError(out)
    return call


def build_schedules(nodes: Sequence[Mapping[str, Any]]) -> list[Schedule]:
    """The schedules of a run; `rlx.training.schedules` checks what they set."""
    calls = [prepare_as(Schedule, node, f"schedules.{i}") for i, node in enumerate(nodes)]
    return [call.make({}) for call in calls]


def prepare_as(cls: type, settings: Mapping[str, Any], path: str) -> Call:
    """The call of a class whose settings need no `_target_`, checked; path: of the settings."""
    out: list[Problem] = []
    call = Call(cls=cls, settings=_read_settings(cls, plain(settings), path, out), path=path)
    if out:
        raise ConfigError(out)
    return call


@dataclass(frozen=True, kw_only=True)
class Call:
    """A checked node: a class and its settings, not yet called."""

    cls: type
    settings: dict[str, Any]  # values, Calls, and lists and dicts of them
    path: str

    def gathered(self, cls: type) -> Call | None:
        """The settings that the class takes as an `Inline[cls]`, in a group of it as well."""
        given = [call for call in self.settings.values() if isinstance(call, Call)]
        found = (call if issubclass(call.cls, cls) else call.gathered(cls) for call in given)
        return next((call for call in found if call is not None), None)

    def make(self, runtime: Mapping[str, Any]) -> Any:
        """Calls the class; its ValueError is a problem of the settings."""
        given = {n: runtime[n] for n in runtime_names(self.cls) if n in runtime}
        if lacking := [n for n in runtime_names(self.cls, required=True) if n not in given]:
            raise TypeError(f"{self.path}: {self.cls.__name__} needs {lacking} from the run.")
        try:
            return self.cls(**_made(self.settings, runtime), **given)
        except ValueError as error:
            raise refuse(self.path, str(error)) from error

    def problems(self) -> list[Problem]:
        """The problems that the class itself finds in its settings, without values from the run."""
        inner = [p for call in _calls(self.settings) for p in call.problems()]
        if inner or not isinstance(self.cls, Checked) or self._needs_run():
            return inner
        try:
            texts = self.make({}).problems()
        except ConfigError as error:
            return error.problems
        return [Problem(path=self._named(text), says=text) for text in texts]

    def _named(self, text: str) -> str:
        """The setting that a text opens with ('env.id=Pnog: ...'), to name its source."""
        word = re.match(r"[\w.]*", text)
        named = word is not None and word[0].startswith(f"{self.path}.")
        return word[0].rstrip(".") if word and named else self.path

    def _needs_run(self) -> bool:
        inner = any(call._needs_run() for call in _calls(self.settings))
        return inner or bool(runtime_names(self.cls, required=True))


def _made(value: Any, runtime: Mapping[str, Any]) -> Any:
    if isinstance(value, Call):
        return value.make(runtime)
    if isinstance(value, dict):
        return {key: _made(child, runtime) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_made(child, runtime) for child in value)
    return value


def _calls(value: Any) -> Iterator[Call]:
    if isinstance(value, Call):
        yield value
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _calls(child)


# --- values --------------------------------------------------------------------------------------


def runtime_names(cls: type, *, required: bool = False) -> list[str]:
    """The parameters of a class that the run supplies (`Runtime[...]`)."""
    hints, params = _signature(cls)
    found = [name for name, hint in hints.items() if marker(hint, FromRun)]
    return [name for name in found if not required or params[name].default is NO_DEFAULT]


def setting_hints(cls: type) -> dict[str, Any]:
    """The keys that the YAML of a class sets, with their types.

    They are its parameters without default, and those of the classes that it takes `Inline`.
    """
    found: dict[str, Any] = {}
    for name, hint in _parameters(cls).items():
        own = setting_hints(_group(cls, name, hint)) if marker(hint, Gathered) else {name: hint}
        if twice := sorted(found.keys() & own.keys()):
            raise TypeError(f"{full_name(cls)}: {name} has {twice}, which another has, too.")
        found |= own
    return found


def _group(cls: type, name: str, hint: Any) -> type:
    """The class of an `Inline` parameter."""
    group = split(hint)[0]
    if not is_class(group):
        raise TypeError(f"{full_name(cls)}: {name} is Inline of {group}; give one class.")
    return group


def _parameters(cls: type) -> dict[str, Any]:
    """The parameters that come from the YAML, with their types; those with a default do not."""
    hints, params = _signature(cls)
    return {
        name: hint
        for name, hint in hints.items()
        if params[name].default is NO_DEFAULT and not marker(hint, FromRun)
    }


def _signature(cls: type) -> tuple[dict[str, Any], Mapping[str, inspect.Parameter]]:
    params = inspect.signature(cls).parameters
    made: Any = cls  # a dataclass has its types on the class, in the scope of each base
    annotated = cls if hasattr(cls, "__dataclass_fields__") else made.__init__
    hints = typing.get_type_hints(annotated, include_extras=True)
    if bare := [name for name in params if name not in hints]:
        raise TypeError(f"{full_name(cls)}: annotate {bare}; rlx.config reads the annotations.")
    return {name: hints[name] for name in params}, params


def _read_node(node: Any, roles: tuple[type, ...], path: str, out: list[Problem]) -> Call | None:
    names = " or ".join(role.__name__ for role in roles)
    if not isinstance(node, Mapping) or "_target_" not in node:
        says = f"accepted: settings with the _target_ of {names}"
        out.append(Problem(path=path, given=show(node), says=says))
        return None
    cls, why = resolve(node["_target_"])
    if cls is not None and not any(fits(cls, role) for role in roles):
        why = f"{full_name(cls)} is no {names}{lacks(cls, roles)}"
    if cls is None or why:
        out.append(Problem(path=f"{path}._target_", given=show(node["_target_"]), says=why))
        return None
    given = {key: value for key, value in node.items() if key != "_target_"}
    return Call(cls=cls, settings=_read_settings(cls, given, path, out), path=path)


def _read_settings(
    cls: type, given: Mapping[str, Any], path: str, out: list[Problem], also: Any = ()
) -> dict[str, Any]:
    """The settings as the constructor takes them; problems go to `out`."""
    hints, dot = setting_hints(cls), f"{path}." if path else ""
    for key in [key for key in given if key not in hints]:
        says = f"no such setting; {did_you_mean(str(key), [*hints, *also], dot)}"
        if key in runtime_names(cls):
            says = "comes from the run, not from a configuration; remove it"
        out.append(Problem(path=f"{dot}{key}", given=show(given[key]), says=says))
    for name in [name for name in hints if name not in given]:
        out.append(Problem(path=f"{dot}{name}", says=f"missing; give {describe(hints[name])}"))
    return _arguments(cls, given, path, out)


def _arguments(
    cls: type, given: Mapping[str, Any], path: str, out: list[Problem]
) -> dict[str, Any]:
    """Reads the constructor's arguments; an `Inline` parameter becomes the Call of its class."""
    found: dict[str, Any] = {}
    for name, hint in _parameters(cls).items():
        if marker(hint, Gathered):
            inner = _group(cls, name, hint)
            settings = _arguments(inner, given, path, out)
            found[name] = Call(cls=inner, settings=settings, path=path)
        elif name in given:
            found[name] = read_value(given[name], hint, f"{path}.{name}" if path else name, out)
    return found


def read_value(value: Any, hint: Any, path: str, out: list[Problem]) -> Any:
    """The value as a constructor takes it; a nested node becomes a Call; problems go to `out`."""
    inner, limits = split(hint)
    origin, args = get_origin(inner) or inner, get_args(inner)
    if value == MISSING:
        out.append(Problem(path=path, given=MISSING, says=f"missing; give {describe(hint)}"))
    elif value == "" and marker(hint, IsPath):  # which would be the folder one is in
        out.append(Problem(path=path, given="''", says="an empty path; give one, or null"))
    elif origin in (Union, types.UnionType):
        return _read_union(value, hint, path, out)
    elif isinstance(value, Mapping) and origin in (dict, collections.abc.Mapping):
        return _read_named(value, (*args, Any, Any)[1], path, out)
    elif isinstance(value, list | tuple) and origin in (list, tuple, collections.abc.Sequence):
        return _read_items(value, inner, path, out)
    elif is_class(inner):
        return _read_node(value, (inner,), path, out)
    elif not matches(value, inner, limits):
        out.append(wrong(value, hint, path))
    return float(value) if inner is float and type(value) is int else value


def _read_named(
    value: Mapping[Any, Any], hint: Any, path: str, out: list[Problem]
) -> dict[str, Any]:
    """The values of a mapping by their names, which are text."""
    for name in value:
        if not isinstance(name, str):
            says = "a name is text; put it in quotes"
            out.append(Problem(path=f"{path}.{name}", given=show(name), says=says))
    return {k: read_value(v, hint, f"{path}.{k}", out) for k, v in value.items()}


def _read_union(value: Any, hint: Any, path: str, out: list[Problem]) -> Any:
    classes = tuple(choice for choice in choices(hint) if is_class(choice))
    if classes and isinstance(value, Mapping) and "_target_" in value:
        return _read_node(value, classes, path, out)
    for choice in choices(hint):
        found: list[Problem] = []
        read = read_value(value, choice, path, found)
        if not found:
            return read
    out.append(wrong(value, hint, path))
    return value


def _read_items(value: Any, hint: Any, path: str, out: list[Problem]) -> Any:
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is not tuple or args[1:] == (Ellipsis,):
        args = (*args[:1], Any)[:1] * len(value)
    if len(args) != len(value):
        out.append(wrong(value, hint, path))
        return value
    pairs = enumerate(zip(value, args, strict=True))
    items = [read_value(v, h, f"{path}.{i}", out) for i, (v, h) in pairs]
    return items if origin is list else tuple(items)
