"""Calls the hooks of a run at their points (`rlx.training.hooks`)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from rlx.cluster.faults import Replaced
from rlx.config.documents import parse_json
from rlx.config.targets import full_name
from rlx.problems import RunFailed, first_line
from rlx.runs.files import as_float
from rlx.runs.metrics import NAMES, Metrics
from rlx.training.hooks import POINTS, Run
from rlx.training.parts import Counters, Parts
from rlx.types import Params

log = logging.getLogger(__name__)

MOST_STATE = 1_000_000  # characters of a hook's state
OWN_GROUPS = frozenset(name.partition("/")[0] for name in NAMES if "/" in name) | {
    *("schedule", "task", "time"),
}


REAL = (jnp.floating, jnp.integer, jnp.bool_)


class HookFailed(RunFailed):
    """A hook that raised; what was learnt is well.

    One that raised in `restore` is not saved: the checkpoint has what it could not take.
    """

    def __init__(self, says: str, *, is_worth_saving: bool = True) -> None:
        super().__init__(says)
        self.is_worth_saving = is_worth_saving


@dataclass(frozen=True, kw_only=True)
class HookedRun:
    """Shows hooks a run in progress (`rlx.training.hooks.Run`)."""

    parts: Parts
    count: Counters
    metrics: Metrics
    clock_s: Callable[[], float]
    finishing: Callable[[], None]

    @property
    def output_dir(self) -> Path:
        return self.parts.output_dir

    @property
    def rank(self) -> int:
        return self.parts.peers.rank

    @property
    def env_steps(self) -> int:
        return self.count.env_steps

    @property
    def frames(self) -> int:
        return self.count.frames

    @property
    def updates(self) -> int:
        return self.parts.learner.updates

    @property
    def wall_s(self) -> float:
        return self.clock_s()

    def record(self, name: str, value: Any) -> None:
        """Adds a value to a metric's mean; raises ValueError for a name that is rlx's."""
        group, slash, rest = name.partition("/")
        if not (slash and group and rest) or group in OWN_GROUPS:
            raise ValueError(
                f"{name!r}: a metric of your own is 'group/name', and the group is none of "
                f"{', '.join(sorted(OWN_GROUPS))}"
            )
        if not isinstance(value, jax.Array):  # which nobody overwrites
            value = as_float(value)
        elif not any(jnp.issubdtype(value.dtype, kind) for kind in REAL):
            raise ValueError(f"{name!r}: an array of {value.dtype} has no mean that is a number")
        self.metrics.record(name, value)

    def params(self) -> Params:
        """The acting parameters of now; waits for the update under way."""
        return self.parts.learner.publish().weights().params

    def finish(self) -> None:
        """Ends the run after this turn."""
        self.finishing()


@runtime_checkable
class Replaces(Protocol):
    """A pool that replaces actors which were lost."""

    def replaced(self) -> list[Replaced]:
        """Gives the actors that act again, since the last call."""


class Hooks:
    """The hooks of a run, in their order; one that raises is told to `failed`, and none follows."""

    def __init__(
        self, hooks: Sequence[Any], run: Run, failed: Callable[[HookFailed], None]
    ) -> None:
        self._hooks, self._run, self._failed = hooks, run, failed
        self._is_over = False
        self._saved: dict[int, dict[str, Any]] = {}  # the last good state of each hook
        self._of = {point: _told_of(point, hooks) for point in POINTS}

    def wants(self, point: str) -> bool:
        """Says whether any hook is told of this point."""
        return bool(self._of[point])

    def call(self, point: str, *given: Any) -> None:
        """Tells the hooks; points that none wants cost next to nothing."""
        for number, hook in self._of[point]:
            if self._is_over:
                return
            try:
                getattr(hook, point)(self._run, *given)
            except (Exception, SystemExit) as error:
                self._end(number, hook, point, error)

    def states(self) -> list[dict[str, Any]]:
        """Returns what a checkpoint keeps of each hook."""
        for number, hook in enumerate(self._hooks):
            try:
                self._saved[number] = _state_of(hook)
            except (Exception, SystemExit) as error:
                self._end(number, hook, "state", error)
        return [
            {"hook": full_name(type(hook)), "state": self._saved.get(number, {})}
            for number, hook in enumerate(self._hooks)
        ]

    def restore(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Gives the hooks what a checkpoint has of them, by their place in the list."""
        for number, hook in enumerate(self._hooks):
            before = saved[number] if number < len(saved) else {}
            if before.get("hook") != full_name(type(hook)) or not before.get("state"):
                continue
            self._saved[number] = dict(before["state"])
            try:
                hook.restore(before["state"])
            except (Exception, SystemExit) as error:
                self._end(number, hook, "restore", error)

    def _end(self, number: int, hook: Any, point: str, error: BaseException) -> None:
        if self._is_over:  # it is told already
            return
        self._is_over = True
        says = f"hooks.{number} ({full_name(type(hook))}) raised {type(error).__name__} in {point}"
        log.error("%s", says, exc_info=error)
        worth = point != "restore"
        self._failed(HookFailed(f"{says}: {first_line(error)}", is_worth_saving=worth))


def _state_of(hook: Any) -> dict[str, Any]:
    """The state of a hook; raises TypeError or ValueError for what a checkpoint cannot keep."""
    state = dict(hook.state()) if hasattr(type(hook), "state") else {}
    text = json.dumps(state, allow_nan=False)
    if parse_json(text.encode()) != state:
        raise TypeError("state() is not what JSON gives back; use strings as keys, and lists")
    if len(text) > MOST_STATE:
        raise ValueError(f"state() has {len(text):,} characters; at most {MOST_STATE:,} are kept")
    return state


def _told_of(point: str, hooks: Sequence[Any]) -> list[tuple[int, Any]]:
    return [(number, hook) for number, hook in enumerate(hooks) if hasattr(type(hook), point)]
