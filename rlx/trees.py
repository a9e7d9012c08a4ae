"""Trees of arrays without JAX: nested dicts, tuples and records, and names for their leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from rlx import types


def children(tree: Any) -> dict[str, Any] | None:
    """The named children of a node, or None for a leaf; as in JAX, None is a node without any."""
    names = types.RECORDS.get(type(tree))
    if names is not None:
        return {name: getattr(tree, name) for name in names}
    if isinstance(tree, np.ndarray):  # by far the most common leaf; the tests below are slower
        return None
    if isinstance(tree, Mapping):
        return {key: tree[key] for key in sorted(tree)}
    if isinstance(tree, tuple | list):
        return {str(i): child for i, child in enumerate(tree)}
    return {} if tree is None else None


def rebuild(like: Any, parts: Mapping[str, Any]) -> Any:
    """A node of the kind of `like` with these children."""
    if isinstance(like, Mapping):
        return dict(parts)
    if isinstance(like, tuple | list):
        return type(like)(parts.values())
    return type(like)(**parts)


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Applies `function` to every leaf (and the leaves at the same place of the other trees)."""
    parts = children(tree)
    if parts is None:
        return function(tree, *others)
    others_parts = [children(other) or {} for other in others]
    return rebuild(
        tree,
        {k: tree_map(function, v, *[o[k] for o in others_parts]) for k, v in parts.items()},
    )


def empty(spec: Any, *leading: int) -> Any:
    """Uninitialised arrays [*leading, *] in the structure of `spec`."""
    return tree_map(lambda s: np.empty((*leading, *s.shape), s.dtype), spec)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by path, such as {"inputs/observation/image": ...}."""
    parts = children(tree)
    if parts is None:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, child in parts.items():
        flat |= flatten(child, f"{prefix}/{name}" if prefix else name)
    return flat


def unflatten(like: Any, flat: Mapping[str, Any], prefix: str = "") -> Any:
    """The inverse of `flatten`; `like` gives the structure, its leaves are not used."""
    parts = children(like)
    if parts is None:
        return flat[prefix]
    return rebuild(
        like,
        {k: unflatten(v, flat, f"{prefix}/{k}" if prefix else k) for k, v in parts.items()},
    )


# --- names by patterns ---------------------------------------------------------------------------


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Says whether the last pattern that fits the name chooses it.

    `*` and `?` fit any characters, `/` among them; a pattern that begins with `!` takes names out.
    """
    chosen = False
    for pattern in patterns:
        if fnmatchcase(name, pattern.removeprefix("!")):
            chosen = not pattern.startswith("!")
    return chosen


def check_patterns(patterns: Sequence[str], names: Iterable[str], key: str) -> None:
    """Raises ValueError for a pattern that fits no name; key: of the setting they stand in."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in names):
            parts = sorted({name.partition("/")[0] for name in names})
            says = f"no parameter has such a name; accepted: patterns such as {parts[0]}/*"
            raise ValueError(f"{key}: {pattern!r}: {says} (the parts are {', '.join(parts)}).")
    if patterns and not any(matches_any(name, patterns) for name in names):
        says = "they choose no parameter; begin with '*' to take some out of all"
        raise ValueError(f"{key}: {list(patterns)}: {says}.")


_registered: set[type] = set()


def register() -> None:
    """Makes JAX pytrees of all records; call it where JAX is loaded. Safe to call again."""
    import jax

    for cls, names in types.RECORDS.items():
        if cls not in _registered:
            jax.tree_util.register_dataclass(cls, data_fields=list(names), meta_fields=[])
            _registered.add(cls)
