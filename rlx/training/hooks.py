"""Callbacks: what a class of your own is told while a run trains (`hooks`, docs/hooks.md).

Hooks are called in the learner's process, in the thread of the training loop, which waits for
them. Each learner process makes its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlx.cluster.faults import Replaced
from rlx.config.targets import full_name
from rlx.problems import did_you_mean
from rlx.types import Episode, Evaluated, Params, Rollout

log = logging.getLogger(__name__)

PREFIX = "on_"  # of the names of all points


class Run(Protocol):
    """A hook sees this of the run that calls it."""

    @property
    def output_dir(self) -> Path:
        """The run's folder; of a later learner process, its own folder in that one."""

    @property
    def rank(self) -> int:
        """The number of this learner process: 0, or of several 0 .. count - 1."""

    @property
    def env_steps(self) -> int:
        """Env steps of the whole run, those before a resume too."""

    @property
    def frames(self) -> int: ...
    @property
    def updates(self) -> int: ...
    @property
    def wall_s(self) -> float:
        """Seconds of training, without the time in which the run was stopped."""

    def record(self, name: str, value: Any) -> None:
        """Adds a number, or the mean of an array, to the mean that the next row of metrics has.

        name: 'mine/height', in a group of your own. A value on a device is read when the row is
        written. Raises ValueError for a name that is rlx's.
        """

    def params(self) -> Params:
        """The acting parameters of now, as NumPy arrays; waits for the update under way."""

    def finish(self) -> None:
        """Ends the run after this turn as its last env step would: evaluated and saved."""


class Points(Protocol):
    """The methods that a hook may have; it needs one of them, and inherits from nothing.

    Its settings are annotated keyword-only parameters without defaults, like those of any part.
    What is given at a point is not to be changed. An exception ends the run with a checkpoint, and
    so does sys.exit; what is raised in `close` is only told, since the run is over by then.
    """

    def on_begin(self, run: Run) -> None:
        """The run begins or goes on: all its parts are there, and none has worked yet."""

    def on_rollout(self, run: Run, rollout: Rollout) -> None:
        """This process's actors made these blocks, which the replay has now."""

    def on_episodes(self, run: Run, episodes: Sequence[Episode]) -> None:
        """These episodes ended: one or more, of the actors of all learner processes."""

    def on_update(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """An update was started. metrics: arrays on the device; to read one waits for its end."""

    def on_evaluation(self, run: Run, evaluated: Evaluated) -> None:
        """An evaluation has ended, the run's own or one of evaluation.others, as its name says.

        Only the first learner process is told.
        """

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """A checkpoint is in its place."""

    def on_actor_replaced(self, run: Run, replaced: Replaced) -> None:
        """A Ray actor that was lost has been replaced and acts again."""

    def on_end(self, run: Run, summary: Mapping[str, Any]) -> None:
        """The run has finished, or was interrupted; its summary and last checkpoint are written."""

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the hook, ready for JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state()`, before `on_begin`; only where the checkpoint has something."""

    def close(self) -> None:
        """Frees what the hook holds; it is always called, after a failure too."""


POINTS = tuple(name for name in vars(Points) if name.startswith(PREFIX))


def no_hook(cls: type) -> str:
    """Says why a class is no hook; '' if it is one."""
    named = [name for name in dir(cls) if name.startswith(PREFIX)]
    for name in named:
        if name not in POINTS:
            return f"{cls.__qualname__}.{name} is no point of a run; {did_you_mean(name, POINTS)}"
    return "" if named else f"{cls.__qualname__} has none of a hook's methods: {', '.join(POINTS)}"


def close_hook(number: int, hook: Any) -> None:
    """Ends a hook. The run is over by then, so what it raises is told and no more."""
    try:
        getattr(hook, "close", lambda: None)()
    except (Exception, SystemExit) as error:
        says = "hooks.%d (%s) raised %s in close"
        log.error(says, number, full_name(type(hook)), type(error).__name__, exc_info=error)


@dataclass(frozen=True, kw_only=True)
class FinishAtScore:
    """Finishes the run after the first evaluation whose mean return is at least the score."""

    score: float

    def on_evaluation(self, run: Run, evaluated: Evaluated) -> None:
        mean = sum(evaluated.returns) / len(evaluated.returns)
        if not evaluated.name and mean >= self.score:
            run.finish()
