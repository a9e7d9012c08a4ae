"""A trained agent in plain Python, for any one environment or any N side by side.

The caller keeps what the network needs of the step before (`State`), so there is nothing to reset
and no state that two environments could share. `act_in_lanes` is the same as a pure function
of dicts of arrays: `rlx.export` writes it to a file.
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlx import trees
from rlx.acting.actor import network_input
from rlx.envs.actions import Actions, describe
from rlx.envs.observations import NARROWED, Leaf, RawSpaces
from rlx.interfaces import Agent
from rlx.types import Array, DiscreteSpec, Params

trees.register()

CARRY = "carry/"  # begins the names of the carry's leaves in a state

Arrays = dict[str, Array]


# --- pure ----------------------------------------------------------------------------------------


def state_shapes(agent: Agent, lanes: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a state of so many lanes; they may have any values where `first`."""
    one = trees.flatten(jax.eval_shape(lambda: agent.initial_carry(1)))
    carry = {CARRY + name: (leaf.shape[1:], leaf.dtype) for name, leaf in one.items()}
    action = agent.spec.action.array
    leaves = {"action": (action.shape, action.dtype), "time": ((), "int32"), **carry}
    return {
        name: jax.ShapeDtypeStruct((lanes, *shape), dtype)
        for name, (shape, dtype) in leaves.items()
    }


def act_in_lanes(
    agent: Agent,
    raw_spaces: RawSpaces,
    params: Params,
    observation: Mapping[str, Array],
    reward: Array,
    first: Array,
    state: Mapping[str, Array],
    key: Array,
    epsilon: Array,
) -> tuple[Array, Arrays]:
    """observation [N, *] as the environment gives it, reward f32[N], first bool[N], epsilon f32[N].

    Returns (action [N, *] as the environment takes it, state). `state` and `reward` of a lane are
    not read where it is `first`; `key` is consumed.
    """
    like = jax.eval_shape(lambda: agent.initial_carry(1))
    carry = {name.removeprefix(CARRY): x for name, x in state.items() if name.startswith(CARRY)}
    inputs = network_input(
        observation={
            leaf.source.name: leaf.read(observation[leaf.source.name]) for leaf in raw_spaces.leaves
        },
        reward=reward,
        first=first,
        last_action=state["action"],
        last_time=state["time"],
        action=agent.spec.action,
        xp=jnp,
    )
    action, _, new = agent.act(params, inputs, trees.unflatten(like, carry), key, epsilon)
    after = {CARRY + name: x for name, x in trees.flatten(new).items()}
    taken = Actions(agent.spec.action, start=raw_spaces.action_start).outward(action)
    return taken, {"action": action, "time": inputs.time, **after}


# --- what is given -------------------------------------------------------------------------------


def read_observation(raw_spaces: RawSpaces, given: Any) -> tuple[dict[str, np.ndarray], int | None]:
    """Returns (leaves [N, *], N), or ([1, *], None) if unbatched; ValueError if neither."""
    flat = _by_name(raw_spaces, given)
    arrays, lanes = {}, set()
    for leaf in raw_spaces.leaves:
        name = leaf.source.name
        array = np.asarray(flat[name])
        fits = len(leaf.source.shape)
        shaped = array.shape[array.ndim - fits :] == leaf.source.shape and array.ndim <= fits + 1
        if not shaped or array.dtype.name not in accepted_dtypes(leaf) or 0 in array.shape[:1]:
            raise ValueError(
                f"observation{_at(raw_spaces, name)} is {describe(array)}; {_accepted(leaf)}"
            )
        lanes.add(len(array) if array.ndim > fits else None)
        leaf.check(array)
        array = array.astype(leaf.spec.dtype, copy=False)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"observation{_at(raw_spaces, name)} has numbers that are not finite")
        arrays[name] = array if array.ndim > fits else array[None]
    if len(lanes) > 1:
        described = ", ".join(f"{name} {describe(np.asarray(flat[name]))}" for name in arrays)
        raise ValueError(
            f"observation has {described}; give all leaves of one lane, or all of N lanes"
        )
    return arrays, lanes.pop()


def accepted_dtypes(leaf: Leaf) -> list[str]:
    """The dtypes that a leaf may have: the environment's, rlx's, and 64 bits that rlx narrows."""
    wide = [name for name, stored in NARROWED.items() if stored == leaf.spec.dtype]
    return sorted({leaf.source.dtype, leaf.spec.dtype, *wide})


def _by_name(raw_spaces: RawSpaces, given: Any) -> dict[str, Any]:
    """The arrays by leaf name; refuses other names than the environment's."""
    names = [leaf.source.name for leaf in raw_spaces.leaves]
    known = {*names, *raw_spaces.ignored}
    is_tuple = isinstance(given, tuple) and any(name.split("/")[0] == "0" for name in known)
    if not isinstance(given, Mapping) and not is_tuple:
        if len(names) == 1 and not raw_spaces.ignored:
            return {names[0]: given}
        described = describe(given)
        raise ValueError(f"observation is {described}; give a dict of {', '.join(names)}")
    flat = _flat(given, known)
    missing = [name for name in names if name not in flat]
    unknown = [name for name in flat if name not in names and name not in raw_spaces.ignored]
    if missing or unknown:
        raise ValueError(
            f"observation has {', '.join(flat) or 'no leaves'}; accepted: a dict of "
            f"{', '.join(names)}" + _ignored(raw_spaces)
        )
    return flat


def _ignored(raw_spaces: RawSpaces) -> str:
    return f" ({', '.join(raw_spaces.ignored)} may be there, too)" if raw_spaces.ignored else ""


def _flat(given: Any, known: Collection[str], prefix: str = "") -> dict[str, Any]:
    """The leaves of dicts and tuples by name; a tuple that is a known leaf is its value."""
    flat: dict[str, Any] = {}
    for key, value in given.items() if isinstance(given, Mapping) else enumerate(given):
        name = f"{prefix}{key}"
        has_parts = isinstance(value, Mapping) or (isinstance(value, tuple) and name not in known)
        flat |= _flat(value, known, f"{name}/") if has_parts else {name: value}
    return flat


def _at(raw_spaces: RawSpaces, name: str) -> str:
    return "" if len(raw_spaces.leaves) == 1 else f" {name!r}"


def _accepted(leaf: Leaf) -> str:
    shape = ", ".join(map(str, leaf.source.shape))
    batch = ", ".join(map(str, ("N", *leaf.source.shape)))
    dtype = leaf.source.dtype
    other = [name for name in accepted_dtypes(leaf) if name != dtype]
    also = f" (or {other[0]})" if other else ""
    return f"accepted: {dtype}[{shape}], or {dtype}[{batch}] of N environments{also}"


# --- in use --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class State:
    """An agent remembers this of an episode, or of N; it is opaque and never changed."""

    leaves: Mapping[str, Array]
    key: Array
    lanes: int | None  # None: of one unbatched environment
    player: Player


class Player:
    """Acts with one checkpoint's parameters, on the CPU; compiled once for each number of lanes."""

    def __init__(self, *, agent: Agent, raw_spaces: RawSpaces, params: Params) -> None:
        self._agent, self._raw_spaces = agent, raw_spaces
        self._device = jax.local_devices(backend="cpu")[0]
        self._params = jax.device_put(params, self._device)
        self._compiled = jax.jit(functools.partial(_act_and_split, agent, raw_spaces))

    def act(
        self,
        observation: Any,
        state: State | None,
        *,
        reward: Any = None,
        first: Any = None,
        greedy: bool | None = None,
        epsilon: float | None = None,
        seed: int | None = None,
    ) -> tuple[Any, State]:
        """Chooses actions as `rlx.api.Loaded.act` says."""
        arrays, lanes = read_observation(self._raw_spaces, observation)
        n = 1 if lanes is None else lanes
        exploration = self._exploration(greedy, epsilon)
        if seed is not None and not (_is_number(seed, "iu") and -(2**63) <= seed < 2**63):
            raise ValueError(f"seed is {seed!r}; accepted: a whole number of 64 bits")
        with jax.default_device(self._device):
            if state is None:
                _refuse_of_no_episode(reward=reward, first=first)
                state = self._begin(lanes, seed)
                rewards, firsts = np.zeros(n, np.float32), np.ones(n, bool)
            else:
                self._check_state(state, lanes, seed)
                rewards, firsts = _rewards(reward, lanes), _firsts(first, lanes)
            each = np.full(n, exploration, np.float32)
            action, leaves, key = self._compiled(
                self._params, arrays, rewards, firsts, state.leaves, state.key, each
            )
        after = State(leaves=leaves, key=key, lanes=lanes, player=self)
        return self._outward(np.asarray(action), lanes), after

    def _outward(self, action: np.ndarray, lanes: int | None) -> Any:
        """The action as the caller gets it: an int or one array where nothing was batched."""
        if lanes is not None:
            return action
        return int(action[0]) if isinstance(self._agent.spec.action, DiscreteSpec) else action[0]

    def _exploration(self, greedy: bool | None, epsilon: float | None) -> float:
        """The amount of exploration: 0 is greedy, 1 is as the agent samples."""
        if not (greedy is None or isinstance(greedy, bool)):
            raise ValueError(f"greedy is {greedy!r}; accepted: True, False, or None")
        if epsilon is None:
            if greedy is False and not self._agent.samples:
                name = type(self._agent).__name__
                raise ValueError(
                    f"greedy is False, but {name} has no distribution to draw from; "
                    "give epsilon= for random actions"
                )
            return 1.0 if greedy is False else 0.0
        if not (_is_number(epsilon, "fiu") and 0 <= epsilon <= 1):
            raise ValueError(f"epsilon is {epsilon!r}; accepted: 0 .. 1")
        if greedy is not None and greedy != (epsilon == 0):
            raise ValueError(f"greedy={greedy} and epsilon={epsilon:g} contradict; give one")
        return float(epsilon)

    def _begin(self, lanes: int | None, seed: int | None) -> State:
        shapes = state_shapes(self._agent, 1 if lanes is None else lanes)
        leaves = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
        key = jax.random.PRNGKey(secrets.randbits(31) if seed is None else seed)
        # On the device, as the states that follow are: else it would be compiled twice.
        leaves, key = jax.device_put((leaves, key), self._device)
        return State(leaves=leaves, key=key, lanes=lanes, player=self)

    def _check_state(self, state: Any, lanes: int | None, seed: int | None) -> None:
        if not isinstance(state, State):
            raise ValueError(f"state is {describe(state)}; give what act returned, or None")
        if state.player is not self:
            raise ValueError("state is of another run or checkpoint; begin with state=None")
        if state.lanes != lanes:
            raise ValueError(
                f"state is of {_count(state.lanes)}, observation of {_count(lanes)}; "
                "keep a state for each, or begin with state=None"
            )
        if seed is not None:
            raise ValueError(f"seed is {seed}, with a state; give it where state=None")


def _act_and_split(
    agent: Agent,
    raw_spaces: RawSpaces,
    params: Params,
    observation: Arrays,
    reward: Array,
    first: Array,
    state: Arrays,
    key: Array,
    epsilon: Array,
) -> tuple[Array, Arrays, Array]:
    key, used = jax.random.split(key)
    action, state = act_in_lanes(
        agent, raw_spaces, params, observation, reward, first, state, used, epsilon
    )
    return action, state, key


def _is_number(value: Any, kinds: str) -> bool:
    """Says whether the value is one number of these NumPy kinds."""
    return np.ndim(value) == 0 and np.asarray(value).dtype.kind in kinds


def _count(lanes: int | None) -> str:
    return "one unbatched environment" if lanes is None else f"a batch of {lanes}"


def _refuse_of_no_episode(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is given without a state; an episode begins, leave it out")


def _rewards(reward: Any, lanes: int | None) -> np.ndarray:
    """The rewards of the last actions, f32[N]."""
    wanted = "a number" if lanes is None else f"{lanes} numbers"
    if reward is None:
        begin = " (where an episode begins: state=None)" if lanes is None else ""
        raise ValueError(f"reward is missing; give {wanted}, what the last action earned{begin}")
    array = np.asarray(reward)
    shape: Sequence[int] = () if lanes is None else (lanes,)
    if array.dtype.kind not in "fiu" or array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"reward is {_shown(array)}; give {wanted}, what the last action earned")
    return array.astype(np.float32).reshape(-1)


def _firsts(first: Any, lanes: int | None) -> np.ndarray:
    """The lanes that begin an episode with this observation, bool[N]."""
    if lanes is None:
        if first is not None:
            raise ValueError("first is for batches; one environment begins with state=None")
        return np.zeros(1, bool)
    array = np.asarray(first)
    if first is None or array.dtype != bool or array.shape != (lanes,):
        given = "missing" if first is None else describe(array)
        raise ValueError(f"first is {given}; give bool[{lanes}]: where an episode begins here")
    return array


def _shown(array: np.ndarray) -> str:
    scalar = array.ndim == 0 and array.dtype.kind in "fiu" and not math.isfinite(array)
    return str(array) if scalar else describe(array)
