"""One gymnasium environment that answers as it declares, or says in one line what it did instead.

It is put around each environment of a vector. Only the leaves that are read come out of it, and no
infos: those may be of any kind. Whatever an environment raises becomes an EnvironmentFailed that
names the function and the lane.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import gymnasium
import numpy as np

from rlx.envs.actions import describe
from rlx.envs.observations import Source
from rlx.envs.true_episodes import TOLD, Beneath
from rlx.machine import signals
from rlx.problems import EnvironmentFailed
from rlx.seeding import spawn_int

REOPENED = "opened anew, as it had failed"  # the name of an info
STEP = "(observation, reward, terminated, truncated, info)"
RESET = "(observation, info)"


class OneLane:
    """Gives {leaf: array} of the sources that are read, each as declared, and empty infos.

    An environment that fails may be opened anew. Its lane then answers with a first observation,
    and the info REOPENED says what was wrong.
    """

    def __init__(
        self,
        env: Any,
        *,
        env_id: str,
        lane: int,
        sources: Sequence[Source],
        beneath: Beneath | None = None,
        reopen: Callable[[], tuple[Any, Beneath | None]] | None = None,
        restarts: int = 0,
    ) -> None:
        """beneath: what counts under wrappers; the observation then has its TOLD, too.

        reopen: makes the environment anew, at most `restarts` times in a row without an episode
        that ends.
        """
        self._env, self._beneath = env, beneath
        self._reopen, self._restarts = reopen, restarts
        self._seed, self._reopened, self._in_a_row = 0, 0, 0
        self._env_id, self._lane, self._sources = env_id, lane, sources
        parts = {s.name: _space(s) for s in sources}
        if beneath is not None:
            parts[TOLD] = gymnasium.spaces.Box(-np.inf, np.inf, (5,), np.float64)
        self.observation_space = gymnasium.spaces.Dict(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        """Resets with the seed, where there is one.

        The environment gets no options; with any the episode so far is not to be counted.
        """
        self._seed = self._seed if seed is None else seed
        if self._beneath is not None and options:
            self._beneath.forget()
        try:
            return self._reset(seed), {}
        except EnvironmentFailed as error:
            return self._anew(error)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        """Steps; an environment that fails, and may be opened anew, gives no reward and no end."""
        try:
            answer = self._step(action)
        except EnvironmentFailed as error:
            observation, info = self._anew(error)
            return observation, 0.0, False, False, info
        if answer[2] or answer[3]:
            self._in_a_row = 0
        return answer

    def _anew(self, error: EnvironmentFailed) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Opens the environment anew: (its first observation, an info); else raises the error."""
        first = error
        while self._reopen is not None and self._in_a_row < self._restarts:
            self._in_a_row += 1
            self._reopened += 1
            with suppress(Exception):  # it is broken
                self._env.close()
            try:
                self._env, self._beneath = self._call("open", self._reopen)
                seed = spawn_int(self._seed, "opened anew", self._reopened)
                return self._reset(seed), {REOPENED: first.says}
            except EnvironmentFailed as again:
                error = again
        raise error

    def _reset(self, seed: int | None) -> dict[str, np.ndarray]:
        given = {} if seed is None else {"seed": seed}
        answer = self._call("reset", lambda: self._env.reset(**given))
        if not isinstance(answer, tuple) or len(answer) != 2:
            self._fail("reset", f"returned {_shown(answer)}; return {RESET}")
        return self._observed("reset", answer[0])

    def _step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        if self._beneath is not None:
            self._beneath.begin_env_step()
        answer = self._call("step", lambda: self._env.step(action))
        if not isinstance(answer, tuple) or len(answer) != 5:
            self._fail("step", f"returned {_shown(answer)}; return {STEP}")
        observation, reward, terminated, truncated, _ = answer
        return (
            self._observed("step", observation),
            reward if type(reward) is float else self._number(reward),
            terminated if type(terminated) is bool else self._flag("terminated", terminated),
            truncated if type(truncated) is bool else self._flag("truncated", truncated),
            {},
        )

    def render(self) -> Any:
        return self._call("render", self._env.render)

    def _call(self, name: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            if _is_from_outside(error):
                raise
            says = f"raised {type(error).__name__}: {_first_line(error)}{_where(error)}"
            raise EnvironmentFailed(
                self._env_id, f"{name}() {says}{_hint(name, error)}", self._lane
            ) from error

    def _observed(self, name: str, observation: Any) -> dict[str, np.ndarray]:
        found = {}
        for source in self._sources:
            value, at = observation, ""
            for key in source.path:
                if not _has(value, key):
                    self._fail(name, f"returned no {source.name!r}, but {_shown(value)}{at}")
                value, at = value[key], f" at {key!r}"
            try:
                found[source.name] = as_declared(value, source)
            except (ValueError, TypeError, OverflowError) as error:
                what = "the observation" if not source.path else f"the leaf {source.name!r}"
                self._fail(name, f"returned {what} as {error}; declared: {_declared(source)}")
        if self._beneath is not None:
            found[TOLD] = self._beneath.told()
        return found

    def _number(self, reward: Any) -> float:
        array = _array(reward)
        if array is None or array.dtype.kind not in "biuf" or array.size != 1:
            self._fail("step", f"returned the reward {_shown(reward)}; return a number")
        try:
            return float(array.reshape(()))
        except OverflowError:  # an integer of hundreds of digits
            return float("inf")

    def _flag(self, name: str, flag: Any) -> bool:
        array = _array(flag)
        if array is None or array.size != 1 or array.dtype.kind not in "biu" or flag not in (0, 1):
            self._fail("step", f"returned {name} as {_shown(flag)}; return True or False")
        return bool(array.reshape(()))

    def _fail(self, name: str, says: str) -> NoReturn:
        raise EnvironmentFailed(self._env_id, f"{name}() {says}", self._lane)


def _has(value: Any, key: Any) -> bool:
    """Says whether an observation's part has this key, or this element of a Tuple."""
    if isinstance(key, int) and isinstance(value, tuple | list):
        return key < len(value)
    return isinstance(value, Mapping) and key in value


def as_declared(value: Any, source: Source) -> np.ndarray:
    """The value as an array of the source's shape and dtype; raises ValueError with what it is."""
    array = _array(value)
    if array is None or array.shape != source.shape or array.dtype.kind not in "biuf":
        raise ValueError(_shown(value))
    if array.dtype.name == source.dtype:
        return array
    wanted = np.dtype(source.dtype)
    if array.dtype.kind == "f" and wanted.kind != "f":
        raise ValueError(_shown(value))
    with np.errstate(over="ignore"):
        cast = array.astype(wanted)
    if wanted.kind != "f" and not np.array_equal(cast, array):
        raise ValueError(f"{_shown(value)} from {array.min()} to {array.max()}")
    return cast


def _space(source: Source) -> gymnasium.spaces.Box:
    """A space of any values of this shape and dtype."""
    dtype = np.dtype(source.dtype)
    low, high = -np.inf, np.inf
    if dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    elif dtype.kind == "b":
        low, high = 0, 1
    return gymnasium.spaces.Box(low, high, source.shape, dtype)


def _array(value: Any) -> np.ndarray | None:
    try:
        return np.asarray(value)
    except Exception:  # of whatever kind the value is
        return None


def _declared(source: Source) -> str:
    return f"{source.dtype}{list(source.shape)}"


def _shown(value: Any) -> str:
    """Says what a value is, in a few words."""
    if isinstance(value, np.ndarray | np.generic):
        return describe(np.asarray(value))
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, list):
        array = _array(value)
        return f"a list ({'of unequal parts' if array is None else describe(array)})"
    return f"{str(value)[:60]!s} ({type(value).__name__})"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


def _where(error: BaseException) -> str:
    """The line of the environment's own code that raised."""
    frames = traceback.extract_tb(error.__traceback__)[2:]  # without the wrapper's own
    own = [frame for frame in frames if "/gymnasium/" not in frame.filename]
    return f" ({own[-1].filename.rsplit('/', 1)[-1]}, line {own[-1].lineno})" if own else ""


def _hint(name: str, error: BaseException) -> str:
    text = str(error)
    if isinstance(error, TypeError) and name == "reset" and "seed" in text:
        return "; declare reset(self, *, seed=None, options=None)"
    if isinstance(error, ValueError | TypeError) and "unpack" in text:
        return f"; {name}() is to return {STEP if name == 'step' else RESET}"
    return ""


def _is_from_outside(error: BaseException) -> bool:
    """Says whether it is a person's Ctrl-C and no exception of the environment's own code."""
    if not isinstance(error, KeyboardInterrupt):
        return isinstance(error, EnvironmentFailed)
    if threading.current_thread() is not threading.main_thread():
        return False
    return signals.raises() or isinstance(error, signals.Interrupted)
