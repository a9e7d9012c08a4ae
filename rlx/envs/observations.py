"""The observations of both environment families: their leaves, and which are read."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rlx.envs.actions import Start
from rlx.envs.images import Image, Picture, picture
from rlx.interfaces import Outward
from rlx.problems import show
from rlx.types import ActionSpec, Array, ArraySpec, BoxSpec, Categories, DiscreteSpec, EnvSpec

# 64-bit leaves become 32-bit: the replay and JAX's default hold no more, and doubling every stored
# observation for digits that the network never sees would be waste. Integers have to fit.
NARROWED = {"float64": "float32", "int64": "int32", "uint64": "uint32"}


def leaf_name(keys: Sequence[str]) -> str:
    """The name 'a/b' of keys from an observation's root; 'observation' if it is one array."""
    return "/".join(keys) or "observation"


def nearest(given: str, accepted: Iterable[str], count: int = 3) -> str:
    """The text 'nearest: a, b, c', or the number of names when none is near."""
    by_lower = {name.lower(): name for name in accepted}
    found = difflib.get_close_matches(given.lower(), list(by_lower), n=count, cutoff=0.5)
    if not found:
        return f"nothing near it among {len(by_lower)} names"
    return "nearest: " + ", ".join(by_lower[name] for name in found)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One array of an environment's observation, as the environment gives it."""

    name: str
    path: tuple[Any, ...]  # keys from the root of the raw answer; () when that is the array itself
    shape: tuple[int, ...]
    dtype: str
    low: float = -np.inf  # the least value that it declares
    high: float = np.inf
    categories: Categories | None = None
    unreadable: str = ""  # what it is instead of numbers; refused only if it is selected


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of an observation, as the rest of rlx sees it."""

    source: Source
    components: tuple[int, ...] | None
    scale: tuple[float, ...] | None
    picture: Picture | None = None

    @cached_property
    def spec(self) -> ArraySpec:
        """The spec of one lane's leaf."""
        if self.picture is not None:
            return ArraySpec(shape=self.picture.shape, dtype=self.picture.dtype)
        shape = self.source.shape if self.components is None else (len(self.components),)
        return ArraySpec(shape=shape, dtype=_carried(self.source))

    @cached_property
    def limits(self) -> tuple[int, int] | None:
        """The least and the largest integer that it can carry; None: whatever comes fits."""
        source, carried = self.source, np.dtype(self.spec.dtype)
        if np.dtype(source.dtype).kind not in "iu" or carried.kind == "f":
            return None
        found = (0, 1) if carried.kind == "b" else (np.iinfo(carried).min, np.iinfo(carried).max)
        own = np.iinfo(source.dtype)
        return None if found[0] <= own.min and own.max <= found[1] else found

    @cached_property
    def categories(self) -> Categories | None:
        """The categories of the components that are read."""
        found = self.source.categories
        if found is None or self.components is None:
            return found
        first = tuple(found.first[c] for c in self.components)
        return Categories(first=first, counts=tuple(found.counts[c] for c in self.components))

    def read(self, array: Array) -> Array:
        """The leaf's values from its source's array [n, *], of NumPy or JAX."""
        if self.picture is not None:
            return self.picture.read(array)
        if self.components is not None:
            array = array.take(np.asarray(self.components), axis=1)
        array = array.astype(self.spec.dtype)
        return array if self.scale is None else array * np.asarray(self.scale, np.float32)[None]

    def check(self, array: np.ndarray) -> None:
        """Raises ValueError for integers [n, *] that the leaf cannot carry."""
        if self.limits is None or not array.size:
            return
        low, high = self.limits
        if array.min() < low or array.max() > high:
            raise ValueError(
                f"the observation {self.source.name!r} has {array.min()} .. {array.max()}; "
                f"rlx carries it as {self.spec.dtype}, {low} .. {high}"
            )


def _carried(source: Source) -> str:
    """The dtype of at most 32 bits; raises ValueError for declared integers that do not fit."""
    dtype = np.dtype(source.dtype)
    if dtype.kind == "f" and dtype.itemsize > 4:
        return "float32"
    if source.dtype not in NARROWED:
        return source.dtype
    own = np.iinfo(dtype)  # where nothing is declared the values themselves are looked at
    low = 0 if source.low <= own.min else source.low
    high = 0 if source.high >= own.max else source.high
    for carried in ("int32", "uint32"):
        if np.iinfo(carried).min <= low and high <= np.iinfo(carried).max:
            return carried
    raise ValueError(
        f"env.observe reads {source.name!r}, which declares {source.dtype} from {source.low} to "
        f"{source.high}; rlx carries 32 bits: leave it out, or wrap the environment to scale it"
    )


@dataclass(frozen=True, kw_only=True)
class RawSpaces:
    """An environment itself gives and takes these, for agents that act without rlx's lanes."""

    leaves: tuple[Leaf, ...]  # those that the network reads
    ignored: tuple[str, ...]  # names of those that the settings leave out
    action_start: Start  # the number of the first action; rlx counts from 0


def raw_spaces(sources: Sequence[Source], leaves: Sequence[Leaf], action_start: Start) -> RawSpaces:
    """Describes what the environment gives, of all sources and those selected."""
    read = {leaf.source.name for leaf in leaves}
    ignored = tuple(source.name for source in sources if source.name not in read)
    return RawSpaces(leaves=tuple(leaves), ignored=ignored, action_start=action_start)


def raw_spaces_of(family: Any, spec: EnvSpec) -> RawSpaces:
    """A family's own account of it; for one that gives none, as rlx sees the environment."""
    if isinstance(family, Outward):
        own: RawSpaces = family.raw_spaces()
        return own
    sources = [
        Source(name=name, path=(), shape=leaf.shape, dtype=leaf.dtype)
        for name, leaf in sorted(spec.observation.items())
    ]
    leaves = [Leaf(source=source, components=None, scale=None) for source in sources]
    return raw_spaces(sources, leaves, 0)


def select(
    sources: Sequence[Source],
    *,
    observe: str | Sequence[str] | None,
    components: Sequence[int] | None,
    scale: Sequence[float] | None,
    action_mask: str | None,
    image: Image | None,
) -> tuple[Leaf, ...]:
    """The leaves that these settings ask for, sorted by name.

    The mask of actions is always among them, unscaled, whatever `observe` says.
    """
    by_name = {source.name: source for source in sources}
    if action_mask is not None:
        _check_name("action_mask", action_mask, by_name)
    names = _observed(by_name, observe, action_mask)
    _check_readable(sources, {*names, action_mask}, observe)
    if components is not None:
        _check_components([by_name[name] for name in names], components)
    columns = None if components is None else tuple(components)
    factors = None if scale is None else tuple(scale)
    leaves = [_leaf(by_name[name], columns, factors, image) for name in names]
    if factors is not None:
        _check_scale(leaves, factors)
    if action_mask is not None:
        leaves.append(Leaf(source=by_name[action_mask], components=None, scale=None))
    return tuple(sorted(leaves, key=lambda leaf: leaf.source.name))


def _leaf(
    source: Source,
    components: tuple[int, ...] | None,
    scale: tuple[float, ...] | None,
    image: Image | None,
) -> Leaf:
    found = None
    if image is not None and len(source.shape) == 3:
        found = picture(source.name, source.shape, source.dtype, source.low, source.high, image)
    return Leaf(source=source, components=components, scale=scale, picture=found)


def env_spec(
    env_id: str,
    leaves: Sequence[Leaf],
    action: ActionSpec,
    frames_per_env_step: int,
    action_mask: str | None,
) -> EnvSpec:
    """The spec of an environment whose observation has these leaves."""
    categories = {
        leaf.source.name: leaf.categories
        for leaf in leaves
        if leaf.categories is not None and leaf.source.name != action_mask
    }
    spec = EnvSpec(
        id=env_id,
        observation={leaf.source.name: leaf.spec for leaf in leaves},
        action=action,
        frames_per_env_step=frames_per_env_step,
        action_mask=action_mask,
        categories=categories,
        said=tuple(_said(leaves, categories)),
    )
    return check_mask(spec)


def _said(leaves: Sequence[Leaf], categories: Mapping[str, Categories]) -> Iterator[str]:
    """Says what a person should know of how the leaves are read, a line each."""
    for leaf in leaves:
        if leaf.picture is not None and leaf.picture.said:
            yield leaf.picture.said
    for name, found in categories.items():
        choices = " x ".join(map(str, found.counts[:4])) + (" x ..." if found.counts[4:] else "")
        yield f"{name!r} is a choice of {choices}; network.discrete says how it is read"


def _check_readable(
    sources: Sequence[Source], selected: Collection[str | None], observe: str | Sequence[str] | None
) -> None:
    """Raises ValueError for selected leaves that share a name, are no numbers, or are empty."""
    names = [source.name for source in sources]
    good = sorted({s.name for s in sources if not s.unreadable and 0 not in s.shape})
    for source in sources:
        given = f"env.observe={show(observe)} reads {source.name!r}, which"
        if source.name not in selected:
            continue
        if names.count(source.name) > 1:
            raise ValueError(f"{given} is there twice, by keys that read alike; rename one of them")
        instead = f"; set env.observe to some of: {', '.join(good) or '(none is left)'}"
        if source.unreadable:
            accepted = f"accepted: (dicts and tuples of) numeric arrays{instead}"
            raise ValueError(f"{given} is {source.unreadable}; {accepted}")
        if 0 in source.shape:
            raise ValueError(f"{given} has no elements {list(source.shape)}{instead}")


def _observed(
    by_name: Mapping[str, Source], observe: str | Sequence[str] | None, action_mask: str | None
) -> list[str]:
    """The names of the leaves that the network reads."""
    wanted = [observe] if isinstance(observe, str) else observe
    names = set(by_name if wanted is None else wanted) - {action_mask}
    if not by_name:
        raise ValueError("the environment's observation is empty; rlx needs at least one leaf.")
    if not names:
        beside = "" if action_mask is None else f" beside the mask {action_mask!r}"
        given = "null" if observe is None else observe
        raise ValueError(
            f"env.observe={given} selects nothing{beside}; give null for all, or of: "
            f"{_all(by_name)}"
        )
    for name in sorted(names):
        _check_name("observe", name, by_name)
    return sorted(names)


def _check_name(key: str, name: str, accepted: Iterable[str]) -> None:
    if name not in accepted:
        raise ValueError(
            f"env.{key}={name!r} is no leaf of this observation; accepted: {_all(accepted)}"
        )


def check_mask(spec: EnvSpec) -> EnvSpec:
    """Returns the spec; raises ValueError if its mask leaf cannot be a mask of actions."""
    if spec.action_mask is None:
        return spec
    given = f"env.action_mask={spec.action_mask!r}"
    if isinstance(spec.action, BoxSpec):
        raise ValueError(f"{given}: {spec.id!r} has no choices to forbid; give null")
    counts = (spec.action.n,) if isinstance(spec.action, DiscreteSpec) else spec.action.counts
    leaf = spec.observation[spec.action_mask]
    if leaf.shape != (sum(counts),) or np.dtype(leaf.dtype).kind not in "biu":
        raise ValueError(
            f"{given} is {leaf.dtype}{list(leaf.shape)}; accepted: a leaf of bools or integers "
            f"[{sum(counts)}], one for each action that can be chosen"
        )
    return spec


def _all(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _check_components(sources: Sequence[Source], components: Sequence[int]) -> None:
    given = f"env.components={list(components)}"
    if len(sources) != 1 or len(sources[0].shape) != 1:
        shapes = {source.name: source.shape for source in sources}
        raise ValueError(
            f"{given} needs one selected 1-D leaf, got {shapes}; set env.observe to one"
        )
    size = sources[0].shape[0]
    if not components or not all(0 <= c < size for c in components):
        raise ValueError(f"{given} must name elements 0 .. {size - 1} of {sources[0].name!r}")


def _check_scale(leaves: Sequence[Leaf], scale: Sequence[float]) -> None:
    found = {leaf.source.name: leaf.spec for leaf in leaves}
    fits = [spec.shape == (len(scale),) and spec.dtype == "float32" for spec in found.values()]
    if fits != [True]:
        described = {name: f"{spec.dtype}{list(spec.shape)}" for name, spec in found.items()}
        raise ValueError(
            f"env.scale={list(scale)} needs one selected float leaf of {len(scale)} elements, "
            f"got {described}"
        )


class ObservationReader:
    """Turns an environment's raw observations into flat dicts of the selected leaves."""

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._parts = [
            (
                leaf.source.name,
                leaf.source.path,
                None if leaf.components is None else np.asarray(leaf.components),
                None if leaf.scale is None else np.asarray(leaf.scale, np.float32),
                None if leaf.spec.dtype == leaf.source.dtype else leaf.spec.dtype,
                leaf,
            )
            for leaf in leaves
        ]

    def __call__(self, raw: Any) -> dict[str, np.ndarray]:
        """Returns {leaf: dtype[n, *]}; unchanged leaves are views, so treat all as read-only.

        Raises ValueError for integers that do not fit.
        """
        read = {}
        for name, path, components, scale, dtype, leaf in self._parts:
            array = raw
            for key in path:
                array = array[key]
            if leaf.limits is not None:
                leaf.check(array)
            if leaf.picture is not None:
                read[name] = np.ascontiguousarray(leaf.picture.read(array))
                continue
            if components is not None:
                array = array.take(components, axis=1)
            if dtype is not None:
                array = array.astype(dtype)
            read[name] = array if scale is None else array * scale
        return read
