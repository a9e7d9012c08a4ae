"""A number of Ray actors that are kept alive: started in waves, watched, replaced.

A fleet knows nothing of environments or weights: its owner sends requests and gets events. Only
one thread calls it.

Ray restarts nothing by itself (`max_restarts=0`, `max_task_retries=0`): a new process is a new life
with a new chain of blocks, and only the fleet may begin one. A life goes

    pending (no process yet) -> preparing -> ready -> gone -> resting -> pending ...
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal

import ray
from ray import exceptions as ray_errors

from rlx.cluster.faults import ActingFailed, Cause, History, Replaced, Restarts, same_error
from rlx.cluster.logs import LastLines, last_lines_of
from rlx.cluster.whereabouts import Whereabouts
from rlx.problems import ConfigError, RunFailed, refuse

log = logging.getLogger(__name__)

SILENCE_S = 15.0  # between two lines that say who is still awaited
FIRST_ALONE_S = 20.0  # the others wait so long for what the first actor compiles
FETCH_S = 30.0  # for an answer that is there
MOST_REPLACED = 1000  # that nobody asks for
AWAY_S = 1.0  # between two polls; more of it is not held against the actors

State = Literal["pending", "preparing", "ready", "resting"]


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """The fleet waits so long, in seconds."""

    prepare_s: float  # for a process to open its environments and compile
    request_s: float  # for the answer to a request, since the answer before it
    resource_s: float  # for the cluster to have room for `least` actors at the start
    grace_s: float  # with fewer than `least` actors ready, after the start


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Event: an actor begins a life and may be sent requests."""

    index: int
    chain: int


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Event: the answer to this actor's oldest request."""

    index: int
    value: Any


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Event: a life is over, and its unanswered requests are lost."""

    index: int
    requests: int
    cause: Cause


Event = Ready | Answered | Lost


@dataclass(kw_only=True)
class Slot:
    """One actor through all its lives."""

    index: int
    chain: int  # of the life that is, or comes next
    history: History
    state: State = "resting"
    handle: Any = None
    where: Whereabouts | None = None
    cores: tuple[int, ...] | None = None
    ready_s: float = 0.0  # when this or the last life became ready
    due_s: float = 0.0  # resting: when the next life begins; else: when the head must be answered
    requests: deque[Any] = field(default_factory=deque)  # references, the oldest first
    answers: int = 0  # in this life


class Fleet:
    """`count` Ray actors of one class.

    `check()`: raises NodeLost where the cluster is gone (Cluster.check).
    `arguments(index, chain)`: keywords of the class for a life, small and without references.
    `threads`: cores that each actor's process is bound to; None: to none in particular.
    `free_answers`: so many of a life prove nothing yet, as of environments that were only reset.
    Raises ConfigError for options that Ray cannot take.
    """

    def __init__(
        self,
        *,
        check: Callable[[], None],
        cls: type,
        arguments: Callable[[int, int], Mapping[str, Any]],
        count: int,
        least: int,
        first_chain: int,
        options: Mapping[str, Any],
        threads: int | None,
        free_answers: int = 0,
        at_once: int,
        restarts: Restarts,
        deadlines: Deadlines,
    ) -> None:
        self._check, self._remote = check, ray.remote(cls)
        self._free_answers = free_answers
        self._options = {
            **options,
            "max_restarts": 0,
            "max_task_retries": 0,
            "enable_task_events": False,  # Ray would keep a record of each request
        }
        _check_options(self._remote, self._options)
        self._arguments, self._least, self._threads = arguments, least, threads
        self._at_once, self._deadlines = at_once, deadlines
        self.slots = [
            Slot(index=i, chain=first_chain, history=History(restarts=restarts))
            for i in range(count)
        ]
        self._load: dict[tuple[str, int], int] = {}  # (host, core) -> actors bound to it
        self._began_s = monotonic()
        self._enough_s = monotonic()  # when there were last enough actors
        self._polled_s = monotonic()
        self._was_enough = False
        self._said_s = monotonic()
        self._events: deque[Event] = deque()
        self._replaced: deque[Replaced] = deque(maxlen=MOST_REPLACED)
        self._last_lines = LastLines()

    # --- what the owner calls --------------------------------------------------------------------

    @property
    def ready(self) -> int:
        return sum(slot.state == "ready" for slot in self.slots)

    def failures(self) -> dict[Cause, int]:
        """The number of ended lives, by cause."""
        causes: tuple[Cause, ...] = ("raised", "died", "hung", "lost_object")
        return {c: sum(slot.history.counts[c] for slot in self.slots) for c in causes}

    def replaced(self) -> list[Replaced]:
        """Gives the actors that act again, since the last call; for any one thread."""
        return [self._replaced.popleft() for _ in range(len(self._replaced))]

    def request(self, index: int, method: str, *arguments: Any) -> None:
        """Sends a request to a ready actor; it is answered after those before it."""
        slot = self.slots[index]
        if not slot.requests:
            slot.due_s = monotonic() + self._deadlines.request_s
        slot.requests.append(getattr(slot.handle, method).remote(*arguments))

    def poll(self, timeout_s: float) -> list[Event]:
        """The events since the last call; waits up to `timeout_s` for one.

        Raises ActingFailed or NodeLost when the fleet can't go on.
        """
        self._check()  # before each call of Ray's that might end this process
        self._forgive(monotonic() - self._polled_s)
        self._begin_lives()
        for slot, reference in self._answered(timeout_s):
            began_s = monotonic()
            self._take(slot, reference)
            self._forgive(monotonic() - began_s)
        self._end_overdue()
        self._check_enough()
        self._polled_s = monotonic()
        events, self._events = list(self._events), deque()
        return events

    def close(self) -> None:
        """Kills every actor; does not wait for them."""
        for slot in self.slots:
            self._kill(slot)
        self._last_lines.close()

    def _forgive(self, seconds: float) -> None:
        """Moves all deadlines by a time in which nobody looked at what was answered."""
        if seconds > AWAY_S:
            self._enough_s += seconds
            for slot in self.slots:
                slot.due_s += seconds

    # --- lives -----------------------------------------------------------------------------------

    def _begin_lives(self) -> None:
        """Starts the lives that are due: first one alone, whose compiled code the others find."""
        starting = sum(slot.state in ("pending", "preparing") for slot in self.slots)
        alone = not self._was_enough and monotonic() - self._began_s < FIRST_ALONE_S
        most = 1 if alone and not self.ready else self._at_once
        for slot in self.slots:
            if starting >= most:
                return
            if slot.state == "resting" and slot.due_s <= monotonic():
                starting += 1
                self._begin(slot)

    def _begin(self, slot: Slot) -> None:
        arguments = self._arguments(slot.index, slot.chain)
        slot.handle = self._remote.options(**self._options).remote(**arguments)
        slot.requests.append(slot.handle.hello.remote())
        slot.state, slot.due_s = "pending", math.inf  # until there is room for it
        slot.answers = 0

    def _take(self, slot: Slot, reference: Any) -> None:
        """Takes an answer, or the error in its place."""
        self._check()
        try:
            value = ray.get(reference, timeout=FETCH_S)
        except ray_errors.RayError as error:
            cause = cause_of(error)
            # Without pid and address, which differ between actors that raise the same.
            raised = repr(error.cause) if isinstance(error, ray_errors.RayTaskError) else ""
            own = getattr(error, "cause", None)  # what says all in a line needs no traceback
            says = str(own if isinstance(own, RunFailed | ConfigError) else error)
            self._fail(slot, cause, says, raised)
            return
        slot.requests.popleft()
        if slot.state == "pending":
            self._prepare(slot, value)
        elif slot.state == "preparing":
            slot.state, slot.ready_s = "ready", monotonic()
            self._events.append(Ready(index=slot.index, chain=slot.chain))
            if slot.history.failures:
                cause = slot.history.failures[-1][1]
                self._replaced.append(Replaced(actor=slot.index, chain=slot.chain, cause=cause))
        else:
            slot.due_s = monotonic() + self._deadlines.request_s
            slot.answers += 1
            if slot.answers > self._free_answers:
                slot.history.note_answer()
            self._events.append(Answered(index=slot.index, value=value))

    def _prepare(self, slot: Slot, where: Whereabouts) -> None:
        slot.where, slot.cores = where, self._least_loaded(where)
        for core in slot.cores or ():
            self._load[where.host, core] = self._load.get((where.host, core), 0) + 1
        slot.requests.append(slot.handle.prepare.remote(slot.cores))
        slot.state, slot.due_s = "preparing", monotonic() + self._deadlines.prepare_s

    def _least_loaded(self, where: Whereabouts) -> tuple[int, ...] | None:
        """The cores of that host with the fewest actors on them; the last ones first."""
        if self._threads is None or self._threads >= len(where.cores):
            return None
        by_load = sorted(where.cores, key=lambda c: (self._load.get((where.host, c), 0), -c))
        return tuple(sorted(by_load[: self._threads]))

    def _answered(self, timeout_s: float) -> list[tuple[Slot, Any]]:
        """The oldest requests that have been answered; waits for one of them."""
        heads = {slot.requests[0]: slot for slot in self.slots if slot.requests}
        if not heads:
            return []
        done, rest = ray.wait(list(heads), num_returns=1, timeout=timeout_s)
        if done and rest:
            more, _ = ray.wait(rest, num_returns=len(rest), timeout=0)
            done += more
        return [(heads[reference], reference) for reference in done]

    def _end_overdue(self) -> None:
        now = monotonic()
        for slot in self.slots:
            if slot.state in ("preparing", "ready") and slot.requests and slot.due_s < now:
                doing = "request" if slot.state == "ready" else "start"
                limit = (
                    self._deadlines.request_s if doing == "request" else self._deadlines.prepare_s
                )
                self._fail(slot, "hung", f"no answer to its {doing} within {limit:.0f} s")

    def _fail(self, slot: Slot, cause: Cause, error: str, raised: str = "") -> None:
        """Ends a life; the next one begins after a while, unless that has gone too far."""
        where = slot.where
        if slot.state == "ready":
            self._events.append(Lost(index=slot.index, requests=len(slot.requests), cause=cause))
        self._kill(slot)
        wait = slot.history.note_failure(monotonic(), cause, raised)
        slot.state, slot.due_s = "resting", monotonic() + wait
        slot.chain += 1
        log.warning("actor %d: %s; replaced in %.1f s", slot.index, _first_line(error), wait)
        self._give_up_if_hopeless(slot, error, where)
        self._last_lines.tell(slot.index, where)

    def _give_up_if_hopeless(self, slot: Slot, error: str, where: Whereabouts | None) -> None:
        why = slot.history.too_much()
        if not why and same_error([s.history for s in self.slots]):
            why = "raised what every other actor raised"
        if why:
            lines = last_lines_of(where)
            tail = f"; the last lines of its log:\n{lines}" if lines else ""
            raise ActingFailed(f"actor {slot.index} {why}: {error}{tail}")

    def _kill(self, slot: Slot) -> None:
        if slot.handle is not None:
            ray.kill(slot.handle, no_restart=True)
        for core in slot.cores or ():
            assert slot.where is not None
            self._load[slot.where.host, core] -= 1
        slot.handle, slot.where, slot.cores = None, None, None
        slot.requests.clear()

    # --- enough ----------------------------------------------------------------------------------

    def _check_enough(self) -> None:
        """Logs which actors are awaited; raises if too few have been ready for too long."""
        now, ready = monotonic(), self.ready
        if ready >= self._least:
            self._enough_s, self._was_enough = now, True
        if ready < len(self.slots) and now - self._said_s > SILENCE_S:
            self._said_s = now
            log.warning("%s", self._report())
        limit = self._deadlines.grace_s if self._was_enough else self._deadlines.resource_s
        preparing = sum(slot.state == "preparing" for slot in self.slots)  # has its own deadline
        if now - self._enough_s > limit and ready + preparing < self._least:
            key = "grace_s" if self._was_enough else "resource_timeout_s"
            raise ActingFailed(
                f"fewer than acting.min_instances={self._least} actors for acting.{key}="
                f"{limit:.0f} s. {self._report()}"
            )

    def _report(self) -> str:
        """'37/128 actors ready; ...'."""
        waiting = [s.index for s in self.slots if s.state == "pending"]
        resting = [s.index for s in self.slots if s.state == "resting"]
        text = f"{self.ready}/{len(self.slots)} actors ready"
        if waiting:
            asked = {k: v for k, v in self._options.items() if k in ASKED and v}
            have = ", ".join(f"{k} {v:g}" for k, v in _amounts(ray.cluster_resources()))
            free = ", ".join(f"{k} {v:g}" for k, v in _amounts(ray.available_resources()))
            text += f"; each asks for {asked}; the cluster has {have or 'no node'}"
            text += f", free {free or 'nothing'}"
            text += f"; waiting for room: {_some(waiting)}"
        if resting:
            text += f"; to be started: {_some(resting)}"
        return text


def _check_options(remote: Any, options: Mapping[str, Any]) -> None:
    """Ray says what it cannot take only when an actor is made, or here."""
    try:
        remote.options(**options)
    except (ValueError, TypeError, OverflowError) as error:
        line = " ".join(str(error).split())[:300]
        raise refuse("acting", f"Ray cannot give actors what is asked for: {line}") from error


ASKED = ("num_cpus", "num_gpus", "memory", "resources", "label_selector")


def _amounts(resources: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """The resources that a person asks for, without Ray's own entries."""
    for name, amount in sorted(resources.items()):
        if not name.startswith(("node:", "accelerator_type:")) and "object_store" not in name:
            yield name, amount


def _some(numbers: list[int], most: int = 8) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"


def cause_of(error: Exception) -> Cause:
    """The cause why a request brought no answer."""
    if isinstance(error, ray_errors.RayTaskError):
        return "raised"
    lost = (
        ray_errors.ObjectLostError,
        ray_errors.ObjectStoreFullError,
        ray_errors.GetTimeoutError,  # it is there, but cannot be fetched
    )
    return "lost_object" if isinstance(error, lost) else "died"


def _first_line(text: str) -> str:
    """The most telling line: the last one of a traceback, else the first."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return "unknown"
    return lines[-1] if "Traceback" in text or "ray::" in lines[0] else lines[0]
