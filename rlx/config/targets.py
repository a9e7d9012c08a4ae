"""Decides what a `_target_` may name.

A target counts by what it resolves to, never by its spelling: a public class that was defined in
an allowed package and has the role its place asks for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
import types
from typing import Any

from rlx.config.moved import MOVED
from rlx.problems import did_you_mean, nearest

_allowed = {"rlx."}

# Where classes were that the settings of saved runs may still name -> where they are.


def allow(prefix: str) -> None:
    """Lets `_target_` name classes of another package: `rlx.allow("mypkg.")`.

    An installed package does the same by an entry point of the group "rlx.allow" whose value is
    its name. No configuration can.
    """
    if not prefix.endswith(".") or not all(p.isidentifier() for p in prefix[:-1].split(".")):
        raise ValueError(f"rlx.allow takes a package and a dot, such as 'mypkg.'; got {prefix!r}.")
    _allowed.add(prefix)


def allowed_here() -> frozenset[str]:
    """The prefixes that `allow` was told of in this process, for another one of the run."""
    return frozenset(_allowed)


@functools.cache
def _installed() -> frozenset[str]:
    points = importlib.metadata.entry_points(group="rlx.allow")
    return frozenset(f"{point.value}." for point in points)


def _prefixes(*also: str) -> tuple[str, ...]:
    return tuple(sorted({*_allowed, *_installed(), *also}))


def may_import(module: str) -> bool:
    """Says whether a module is imported though only a run's own settings name it."""
    return module in sys.modules or f"{module}.".startswith(_prefixes())


def resolve(target: Any, *also: str) -> tuple[type | None, str]:
    """The class that a target resolves to, or why there is none.

    Only modules of an allowed package are imported, and only what stands in the module counts.
    also: further prefixes that are allowed in this place.
    """
    prefixes = _prefixes(*also)
    accepted = f"accepted: a public class under {' or '.join(prefixes)}"
    if not isinstance(target, str) or not target.startswith(prefixes):
        package = str(target).partition(".")[0]
        way = f"rlx.allow('{package}.') or an entry point allows it (docs/extending.md)"
        return None, f"not allowed; {accepted}; {way}"
    if target in MOVED:
        return None, f"moved; write {MOVED[target]}"
    module_name, _, name = target.rpartition(".")
    try:
        members = vars(importlib.import_module(module_name))
    except (ImportError, ValueError) as error:
        return None, f"cannot be imported ({error}){_near_module(module_name)}"
    if name not in members:
        known = [key for key, member in members.items() if _is_allowed(member, prefixes)]
        return None, f"no such class; {did_you_mean(name, known, module_name + '.')}"
    if not _is_allowed(members[name], prefixes):
        return None, f"not allowed: it is {full_name(members[name])}; {accepted}"
    return members[name], ""


def _is_allowed(found: Any, prefixes: tuple[str, ...]) -> bool:
    name = full_name(found)
    public = not any(part.startswith(("_", "<")) for part in name.split("."))
    return isinstance(found, type) and public and name.startswith(prefixes)


def full_name(found: Any) -> str:
    """Names the place where a class or function was defined, whatever name led to it."""
    if isinstance(found, types.ModuleType):
        return found.__name__
    named = found if hasattr(found, "__qualname__") else type(found)
    return f"{named.__module__}.{named.__qualname__}"


def _near_module(name: str) -> str:
    parent, _, last = name.rpartition(".")
    folders = getattr(sys.modules.get(parent), "__path__", [])
    near = nearest(last, [module.name for module in pkgutil.iter_modules(folders)])
    return f"; did you mean {parent}.{near}?" if near else ""


def load(name: str) -> Any:
    """A class or function of rlx's own by its dotted name; never one from a configuration."""
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(module), cls)


def fits(cls: type, role: type) -> bool:
    """A subclass of the role or, if the role is a Protocol, a class with all its members."""
    if getattr(cls, "_is_protocol", False):
        return False
    if not getattr(role, "_is_protocol", False):
        return issubclass(cls, role)
    return not _missing_members(cls, role)


def lacks(cls: type, roles: tuple[type, ...]) -> str:
    """Says what keeps a class from a role, where that can be said."""
    if getattr(cls, "_is_protocol", False):
        return ": it is only an interface"
    if len(roles) > 1 or not getattr(roles[0], "_is_protocol", False):
        return ""
    missing = _missing_members(cls, roles[0])
    says = f": it has no {', '.join(sorted(missing))}"
    stated = missing & {*vars(roles[0]).get("__annotations__", {})}
    return f"{says} (annotate in the class's body what __init__ sets)" if stated else says


def _missing_members(cls: type, protocol: type) -> set[str]:
    wanted = {*vars(protocol), *vars(protocol).get("__annotations__", {})}
    declared = (name for base in cls.__mro__ for name in vars(base).get("__annotations__", {}))
    known = {*dir(cls), *declared, *inspect.signature(cls).parameters}
    return {name for name in wanted - known if not name.startswith("_")}
