"""Decides when a failed actor starts again, and when failing has gone too far. Knows no Ray.

An actor may be killed as often as it likes: machines come and go. It must not raise the same
exception again and again, nor die again and again before it has ever answered: that is a bug, and
restarting hides it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Literal

from rlx.problems import RunFailed
from rlx.types import Range

Cause = Literal["raised", "died", "hung", "lost_object"]


class ActingFailed(RunFailed):
    """The pool cannot go on; says which actor, why, and what was in its log."""

    is_worth_saving = True


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """These settings say how actors are replaced."""

    window_s: Annotated[float, Range(gt=0)]  # failures older than this are forgotten
    max_raised: Annotated[int, Range(ge=1)]  # exceptions of one actor within the window, or
    # hangs in a row before any answer
    max_fruitless: Annotated[int, Range(ge=1)]  # deaths of one actor before it ever answered
    first_wait_s: Annotated[float, Range(ge=0)]  # before the first replacement, then doubled
    longest_wait_s: Annotated[float, Range(gt=0)]


@dataclass(kw_only=True)
class History:
    """The record of how one actor's lives ended."""

    restarts: Restarts
    failures: list[tuple[float, Cause, bool]] = field(default_factory=list)  # s, why, answered
    counts: Counter[Cause] = field(default_factory=Counter)  # of all time
    last_error: str = ""  # the last exception raised; '' once it has answered since
    answered: bool = False  # in this life
    hung_in_a_row: int = 0  # lives without any answer

    def note_answer(self) -> None:
        self.answered, self.last_error, self.hung_in_a_row = True, "", 0

    def note_failure(self, now_s: float, cause: Cause, error: str = "") -> float:
        """Notes the end of a life; returns the seconds to wait before the next one."""
        self.failures = [f for f in self.failures if now_s - f[0] < self.restarts.window_s]
        self.failures.append((now_s, cause, self.answered))
        self.counts[cause] += 1
        self.last_error = error
        self.hung_in_a_row += cause == "hung" and not self.answered
        in_a_row = next(
            (i for i, (_, _, answered) in enumerate(reversed(self.failures)) if answered),
            len(self.failures),
        )
        self.answered = False
        wait = self.restarts.first_wait_s * 2.0 ** max(0, in_a_row - 1)
        return min(wait, self.restarts.longest_wait_s)

    def too_much(self) -> str:
        """The reason why this actor is not started again; '' if it may be."""
        limits = self.restarts
        raised = sum(cause == "raised" for _, cause, _ in self.failures)
        if limits.max_raised <= raised:
            return f"raised {raised} times within {limits.window_s:.0f} s"
        if limits.max_raised <= self.hung_in_a_row:
            return f"hung {self.hung_in_a_row} times in a row without any answer"
        fruitless = sum(not answered for _, _, answered in self.failures)
        if limits.max_fruitless <= fruitless:
            return f"ended {fruitless} times within {limits.window_s:.0f} s without any answer"
        return ""


def same_error(histories: list[History]) -> str:
    """The exception that every one of at least two actors raised last; '' if there is none."""
    errors = {history.last_error for history in histories}
    return errors.pop() if len(histories) > 1 and len(errors) == 1 else ""


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """An actor that was lost acts again."""

    actor: int
    chain: int  # that its lanes begin
    cause: Cause  # of the loss
