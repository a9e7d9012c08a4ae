"""Composing: YAML files and overrides -> one configuration, every problem, and who set what."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlx.config import paths
from rlx.config.build import ROLES, remember
from rlx.problems import ConfigError, Problem, Sources, did_you_mean, nearest, refuse

COMMAND_LINE = "command line"
AGENT = "override /agent"
MOST_COMPOSED = 32  # jobs of a sweep, before it starts
SEARCHPATH = "hydra.searchpath="
# Hydra 1.4 replaces version_base by a list of what `_target_`s may run.
HYDRA_14 = "execution_whitelist" in inspect.signature(hydra.main).parameters
VERSION: dict[str, Any] = {} if HYDRA_14 else {"version_base": "1.3"}
# ValueError: of a group that is set to null. OSError: of a name that no file can have.
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError)

_lock = threading.RLock()  # Hydra's state is one per process


def compose(
    overrides: Sequence[str] = (),
    config_name: str = "config",
    *,
    config_dir: Path | str | None = None,
    extra_dir: Path | str | None = None,
    keep_hydra: bool = False,
) -> DictConfig:
    """The configuration that the command line would give; works in Hydra jobs and in threads.

    `config_dir` replaces conf/, `extra_dir` is searched after it (as --config-dir is), and
    `keep_hydra` leaves Hydra's own section in. Raises ConfigError with every problem.
    """
    overrides = [*_searched(extra_dir), *overrides]
    _check_searchpath(overrides)
    with _hydra(config_dir) as loader:
        try:
            cfg = loader.load_configuration(config_name, overrides, RunMode.RUN, from_shell=False)
            sources = _sources(loader, config_name, overrides)
        except COMPOSE_ERRORS as error:
            raise _diagnose(loader, config_name, overrides, error) from error
    if not keep_hydra:
        with open_dict(cfg):
            del cfg["hydra"]
    return remember(cfg, sources)


def check_sweep(overrides: Sequence[str], config_name: str = "config", **where: Any) -> None:
    """Raises ConfigError, as `compose` does, if a job of a sweep names what its groups do not have.

    Every combination of files is composed, up to MOST_COMPOSED, with the first of each other value
    that is swept. Hydra composes all jobs, too, but its own message knows no key that is near.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        return  # Hydra shows the place
    lines = [found for override in parsed if (found := _each(override))]
    swept = {line for each in lines if len(each) > 1 for line in each}
    for job in itertools.islice(itertools.product(*lines), MOST_COMPOSED):
        try:
            compose(job, config_name, **where)
        except ConfigError as error:
            of = " ".join(line for line in job if line in swept)
            said = [replace(p, says=f"{p.says} (the job of {of})") for p in error.problems]
            raise ConfigError(said if of else error.problems) from error


def _each(override: Override) -> list[str]:
    """An override as some job has it: of each file of a group, else of its first value."""
    if not override.is_sweep_override() or override.input_line is None:
        return [str(override.input_line)]
    if not (override.is_choice_sweep() or override.is_range_sweep()):
        return []  # the sweeper knows its values
    key = override.get_key_element()
    found = [f"{key}={value}" for value in override.sweep_string_iterator()]
    return found if key in (*ROLES, "experiment") else found[:1]


def find_sources(
    overrides: Sequence[str], config_name: str = "config", config_dir: Path | str | None = None
) -> Sources:
    """Finds where the keys of a configuration that Hydra composed came from."""
    with _hydra(config_dir) as loader:
        return _sources(loader, config_name, list(overrides))


@contextlib.contextmanager
def _hydra(config_dir: Path | str | None) -> Iterator[ConfigLoader]:
    """Sets up a Hydra of our own for a moment, then restores the user's or the running job's."""
    folder = str(Path(config_dir or paths.config_dir()).resolve())
    with _lock:
        saved, job_name = GlobalHydra.instance().hydra, JobRuntime.instance().get("name")
        GlobalHydra.instance().hydra = None
        try:
            with hydra.initialize_config_dir(folder, job_name="train", **VERSION):
                yield GlobalHydra.instance().config_loader()
        finally:
            GlobalHydra.instance().hydra = saved
            JobRuntime.instance().set("name", job_name)


def _searched(extra_dir: Path | str | None) -> list[str]:
    if extra_dir is None:
        return []
    if not Path(extra_dir).is_dir():
        raise refuse(
            "--config-dir", "no such folder; give one that holds YAML groups", given=str(extra_dir)
        )
    return [search(extra_dir)]


def _check_searchpath(overrides: Sequence[str]) -> None:
    """Raises ConfigError for a search path in which Hydra would find nothing, and say nothing."""
    for text in overrides:
        if not text.startswith(SEARCHPATH) or (override := _parse(text, [])) is None:
            continue
        found = override.value()
        if not isinstance(found, list) or not all(isinstance(path, str) for path in found):
            says = "accepted: a list of folders and packages, as [file:///my/conf,pkg://mypkg.conf]"
            raise refuse(SEARCHPATH[:-1], says, given=text.removeprefix(SEARCHPATH))
        for path in found:
            if not _is_searchable(path):
                says = "no such folder or package; give one that holds YAML groups"
                raise refuse(SEARCHPATH[:-1], says, given=path)


def _is_searchable(path: str) -> bool:
    scheme, _, name = path.rpartition("://")
    try:
        if scheme == "pkg":
            return find_spec(name.replace("/", ".")) is not None
        return scheme in ("", "file") and os.path.isdir(name)
    except (ImportError, ValueError):
        return False


def search(*folders: Path | str) -> str:
    """The override that makes Hydra search these folders too."""
    return f"{SEARCHPATH}[{','.join(quote(f'file://{Path(f).resolve()}') for f in folders)}]"


def quote(text: str) -> str:
    """Quotes a string as one value of Hydra's override grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# --- where keys come from ------------------------------------------------------------------------


def _sources(loader: ConfigLoader, config_name: str, overrides: list[str]) -> Sources:
    listed = loader.compute_defaults_list(config_name, overrides, RunMode.RUN)
    names: dict[str, str] = {}
    experiments: dict[str, dict[str, Any]] = {}
    for default in listed.defaults:
        path = default.config_path or ""
        if path.startswith("hydra/") or (file := _file(loader, path, overrides)) is None:
            continue
        content: Any = OmegaConf.to_container(OmegaConf.load(file[0]))
        if path.startswith("experiment/"):
            experiments[file[1]] = content
        for key, is_leaf in _keys(content, (default.package or "").removeprefix("_global_")):
            names[key] = file[1] if is_leaf else names.get(key, file[1])
    for override in listed.config_overrides:
        key = override.key_or_group
        names = {k: v for k, v in names.items() if not k.startswith(f"{key}.")}
        names[key] = COMMAND_LINE
    choice = str(listed.overrides.known_choices.get("agent"))
    return Sources(names=names, clashes=tuple(_clashes(experiments, choice)))


def _file(loader: ConfigLoader, path: str, overrides: list[str]) -> tuple[Path, str] | None:
    """The file of an entry of the defaults list, and its name for messages."""
    folders = [Path(s.path) for s in loader.get_sources() if s.scheme() == "file"]
    extra = [o for o in overrides if o.startswith(SEARCHPATH)]
    for text in OverridesParser.create().parse_overrides(extra):
        found: Any = text.value()
        folders += [Path(str(p).removeprefix("file://")) for p in found or []]
    for folder in folders:
        if path and (folder / f"{path}.yaml").is_file():
            name = "conf" if folder == paths.config_dir() else str(folder)
            return folder / f"{path}.yaml", f"{name}/{path}.yaml"
    return None


def _keys(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, bool]]:
    """Every config path of a file, and whether it is a leaf."""
    if prefix:
        yield prefix, False
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from _keys(value, path)
        else:
            yield path, True


def _clashes(experiments: Mapping[str, dict[str, Any]], choice: str) -> Iterator[Problem]:
    """Experiments whose values for one agent would leak into another."""
    entries = [e for c in experiments.values() for e in c.get("defaults", [])]
    named = [
        e["override /agent"] for e in entries if isinstance(e, dict) and "override /agent" in e
    ]
    for file, content in experiments.items():
        if "agent" not in content or choice in named[-1:]:
            continue
        says = "sets agent values and must name their agent: add `- override /agent: NAME` to it"
        if named:
            says = f"sets values for agent={named[-1]}, but this run has agent={choice}; choose one"
        yield Problem(path="agent", source=file, says=says)


# --- what is wrong with overrides ----------------------------------------------------------------


def _diagnose(
    loader: ConfigLoader, config_name: str, overrides: list[str], error: Exception
) -> ConfigError:
    """The problems of each override, checked one by one: Hydra stops at the first problem."""
    out: list[Problem] = []
    parsed = [o for text in overrides if (o := _parse(text, out)) is not None]
    path = [text for o in parsed if (text := str(o.input_line)).startswith(SEARCHPATH)]
    groups = {o.key_or_group: _options(loader, config_name, o.key_or_group, path) for o in parsed}
    choices = [o for o in parsed if groups[o.key_or_group]]
    bad = [p for o in choices if (p := _bad_choice(o, groups[o.key_or_group])) is not None]
    good = [o for o in choices if o.key_or_group not in {p.path for p in bad}]
    out += bad
    try:
        lines = [*path, *[str(o.input_line) for o in good]]
        cfg = loader.load_configuration(config_name, lines, RunMode.RUN, from_shell=False)
    except COMPOSE_ERRORS as inner:
        return ConfigError([*out, _as_problem(inner)])
    tree = OmegaConf.to_container(cfg)
    for override in parsed:
        if override not in choices and not override.is_add() and not override.is_force_add():
            out += _unknown_key(override, tree)
    return ConfigError(out or [_as_problem(error)])


def _parse(text: str, out: list[Problem]) -> Override | None:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        why = str(error).splitlines()[0].rstrip(".")
        says = f"cannot be read ({why}); write key=value, with quotes around special characters"
        out.append(Problem(path=text, source=COMMAND_LINE, says=says))
        return None
    if override.is_sweep_override():
        says = "is several values; write -m first for one run of each, or [a,b] for a list"
        out.append(Problem(path=text, source=COMMAND_LINE, says=says))
        return None
    return override


def _options(loader: ConfigLoader, config_name: str, group: str, path: list[str]) -> list[str]:
    try:
        return list(loader.get_group_options(group, ObjectType.CONFIG, config_name, path))
    except (OSError, ValueError):  # no folder can have that name
        return []


def _bad_choice(override: Override, options: list[str]) -> Problem | None:
    group, given = override.key_or_group, override.value()
    if given is None and group in ROLES:
        given = "null"
    if not isinstance(given, str) or given in options:
        return None
    near = nearest(given, options)
    says = f"no such option; {f'did you mean {group}={near}? ' if near else ''}accepted: "
    return Problem(path=group, given=given, source=COMMAND_LINE, says=says + ", ".join(options))


def _unknown_key(override: Override, tree: Any) -> list[Problem]:
    """The first part of the key that the configuration has not, with the nearest one it has."""
    parts = override.key_or_group.split(".")
    for i, part in enumerate(parts):
        names = list(tree) if isinstance(tree, dict) else []
        if isinstance(tree, dict) and part not in tree:
            near = nearest(part, names)
            hint = ".".join([*parts[:i], near, *parts[i + 1 :]])
            says = f"did you mean {hint}?" if near else did_you_mean(part, names)
            path, given = override.key_or_group, override.get_value_element_as_str()
            if i and not names:  # an empty mapping takes any key, if it is added with a +
                says = f"write +{override.key_or_group}={override.get_value_element_as_str()}"
            says = f"no such {'setting' if i else 'key or group'}; {says}"
            return [Problem(path=path, given=given, source=COMMAND_LINE, says=says)]
        tree = tree[part] if isinstance(tree, dict) else None
    return []


def _as_problem(error: BaseException) -> Problem:
    """Hydra's own message on one line."""
    lines = [line.strip() for e in (error, error.__cause__) if e for line in str(e).splitlines()]
    return Problem(path="configuration", says="; ".join(filter(None, lines)))
