"""Values against type annotations: does it fit, and what is accepted, in words."""

from __future__ import annotations

import collections.abc
import math
import types
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from rlx.problems import Problem, nearest, show
from rlx.types import Range

T = TypeVar("T")

SCALARS = (int, float, bool, str, types.NoneType)


def split(hint: Any) -> tuple[Any, list[Range]]:
    """The bare type and the limits written around it."""
    if get_origin(hint) is not Annotated:
        return hint, []
    inner, *extras = get_args(hint)
    return inner, [extra for extra in extras if isinstance(extra, Range)]


def marker(hint: Any, kind: type[T]) -> T | None:
    """The marker of this kind in an annotation, or in one of a union's."""
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    found = next((extra for extra in extras if isinstance(extra, kind)), None)
    if found is None and get_origin(hint) in (Annotated, Union, types.UnionType):
        inner = get_args(hint)[:1] if extras else get_args(hint)
        found = next((m for part in inner if (m := marker(part, kind)) is not None), None)
    return found


def choices(hint: Any) -> list[Any]:
    """The alternatives of a union, each with the limits that stand around the union."""
    inner, limits = split(hint)
    if not limits:
        return list(get_args(inner))
    return [Annotated[(choice, *limits)] for choice in get_args(inner)]


def is_class(hint: Any) -> bool:
    """True where a nested node stands: the value names a class of this type."""
    plain = (*SCALARS, Any, dict, list, tuple)
    return isinstance(hint, type) and get_origin(hint) is None and hint not in plain


def matches(value: Any, kind: Any, limits: list[Range]) -> bool:
    """Says whether a scalar is of this type and in its limits; an int is a float, a bool no int.

    Neither NaN nor infinity is a setting.
    """
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return any(value == arg and type(value) is type(arg) for arg in get_args(kind))
    if kind not in SCALARS:
        return False
    right_type = type(value) is kind or (kind is float and type(value) is int)
    if not right_type or (kind is float and not math.isfinite(value)):
        return False
    if not limits or value is None:
        return True
    return all(_within(value, limit) for limit in limits)


def _within(value: float, limit: Range) -> bool:
    return (
        (limit.ge is None or value >= limit.ge)
        and (limit.gt is None or value > limit.gt)
        and (limit.le is None or value <= limit.le)
        and (limit.lt is None or value < limit.lt)
    )


def wrong(value: Any, hint: Any, path: str) -> Problem:
    """The problem of a value that does not fit."""
    says = f"accepted: {describe(hint)}"
    if isinstance(value, collections.abc.Mapping) and (
        named := [c for c in choices(hint) if is_class(c)]
    ):
        targets = " or ".join(f"{each.__module__}.{each.__qualname__}" for each in named)
        says += f"; its _target_ says which class: {targets}"
    if " string" in says and (quoted := _quoted(value)):
        if type(value) is int and not says.startswith("accepted: a string"):
            quoted = f"[{quoted}]"  # a list is wanted
        says += f'; strings of digits are quoted: "{quoted}"'
    if isinstance(value, float) and value.is_integer() and " int" in says:
        says += f"; write {int(value):_}"
    if isinstance(value, str) and (near := nearest(value, _words(hint))):
        says += f"; did you mean {near}?"
    return Problem(path=path, given=show(value), says=says)


def _quoted(value: Any) -> str:
    """'0' of 0, ['0',x] of [0, x]; '' where there is no number to quote."""
    if type(value) is int:
        return f"'{value}'"
    if isinstance(value, list) and any(type(each) is int for each in value):
        return f"[{','.join(_quoted(each) or show(each) for each in value)}]"
    return ""


def _words(hint: Any) -> list[str]:
    inner, _ = split(hint)
    if get_origin(inner) is Literal:
        return [arg for arg in get_args(inner) if isinstance(arg, str)]
    return [word for choice in get_args(inner) for word in _words(choice)]


def describe(hint: Any) -> str:
    """A type in words: 'an int >= 1 or null'."""
    inner, limits = split(hint)
    origin, args = get_origin(inner) or inner, get_args(inner)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(choice) for choice in choices(hint))
    if origin is Literal:
        return " or ".join(show(arg) for arg in args)
    if origin in (list, tuple, collections.abc.Sequence):
        each = [describe(arg) for arg in args if arg is not Ellipsis]
        return f"a list, each {', then '.join(each) or 'anything'}"
    if origin in (dict, collections.abc.Mapping):
        return f"a mapping, each value {describe(args[1]) if args else 'anything'}"
    words = {int: "an int", float: "a float", bool: "true or false", str: "a string"}
    words |= {types.NoneType: "null", Any: "anything"}
    if inner not in words:
        return f"settings of {getattr(inner, '__name__', inner)}"
    return words[inner] + (_bounds(limits) if inner in (int, float) else "")


def _bounds(limits: list[Range]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    parts = [
        f"{sign} {value:,}" if isinstance(value, int) else f"{sign} {value:g}"
        for limit in limits
        for name, sign in signs.items()
        if (value := getattr(limit, name)) is not None
    ]
    return f" {' and '.join(parts)}" if parts else ""
