"""A thread that acts, for the pools whose policies run in this process."""

from __future__ import annotations

import queue
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from time import monotonic

from rlx.acting.actor import Actor, are_done
from rlx.cluster.faults import ActingFailed
from rlx.problems import RunFailed
from rlx.types import Request, Rollout, Weights

Arrived = queue.SimpleQueue[tuple["ActingThread", list[Rollout]]]


class Orders:
    """The loop shares this with acting threads: the newest weights, the run's progress."""

    def __init__(self, env_steps: int) -> None:
        self._lock = threading.Lock()
        self._weights: Weights | None = None
        self._env_steps, self._updates = env_steps, 0

    def publish(self, weights: Weights, env_steps: int) -> None:
        with self._lock:
            self._weights, self._env_steps = weights, max(env_steps, self._env_steps)

    def note(self, *, updates: int | None = None, env_steps: int = 0) -> None:
        """Notes the learner's updates so far, and env steps that were added."""
        with self._lock:
            self._updates = self._updates if updates is None else updates
            self._env_steps += env_steps

    def read(self) -> tuple[Weights | None, int, int]:
        """Returns (weights, env steps, updates)."""
        with self._lock:
            return self._weights, self._env_steps, self._updates


class ActingThread:
    """Acts in turn for a few actors and puts their rollouts where the loop collects them.

    It makes `ahead` requests before it waits for `collected`. `realtime`: its environments go on
    without waiting; where `ahead` requests have not been collected the next one's blocks are
    dropped, and counted. `max_age`: it waits rather than begin a request with older weights.
    `want_blocks`: it makes one request with each version of the weights, for so many blocks of
    each lane, and waits for the next version.
    """

    def __init__(
        self,
        *,
        name: str,
        make_actors: Callable[[], Sequence[Actor]],
        orders: Orders,
        arrived: Arrived,
        want_env_steps: int,
        want_blocks: int | None = None,
        ahead: int,
        realtime: bool = False,
        max_age: int | None = None,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """`while_waiting` is called a few times a second while nothing is acted."""
        self.name = name
        self.failed: BaseException | None = None
        self.dropped_env_steps = 0
        self.busy_since_s: float | None = None  # with opening or stepping the environments
        self.chain = -1
        self._make_actors, self._orders, self._arrived = make_actors, orders, arrived
        self._want, self._realtime, self._max_age = want_env_steps, realtime, max_age
        self._want_blocks = want_blocks
        self._while_waiting = while_waiting
        self._free = threading.Semaphore(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def collected(self) -> None:
        """Notes that the loop has taken one request's rollouts: another request may be made."""
        self._free.release()

    def check(self, limit_s: float) -> None:
        """Raises ActingFailed if the thread has ended, or one step takes longer than the limit."""
        if self.failed is not None:
            raise self.failed
        since = self.busy_since_s
        if since is not None and monotonic() - since > limit_s:
            raise ActingFailed(
                f"{self.name}: its environments have not answered for {limit_s:.0f} s "
                "(acting.request_timeout_s)"
            )

    def stop(self) -> None:
        self._stop.set()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        actors: Sequence[Actor] = ()
        try:
            self.busy_since_s = monotonic()
            actors = self._make_actors()
            self.busy_since_s = None
            self.chain = max(actor.chain for actor in actors)
            while not self._stop.is_set():
                self._work(actors)
        except RunFailed as error:
            self.failed = error
        except BaseException as error:
            lines = "".join(traceback.format_exception(error))
            self.failed = ActingFailed(f"{self.name} ended by {type(error).__name__}: {lines}")
            self.failed.__cause__ = error
        finally:
            self.busy_since_s = None
            for actor in actors:
                actor.close()

    def _work(self, actors: Sequence[Actor]) -> None:
        weights, env_steps, updates = self._orders.read()
        if weights is None or self._too_old(weights, updates) or self._is_used(weights, actors):
            self._stop.wait(0.005)
            self._while_waiting()
            return
        may_keep = self._free.acquire(timeout=0 if self._realtime else 0.1)
        if not may_keep and not self._realtime:
            self._while_waiting()
            return
        is_new = any(actor.weights_version != weights.version for actor in actors)
        request = Request(
            weights=weights if is_new else None,
            env_steps=env_steps,
            want_env_steps=self._want,
            want_blocks=self._want_blocks,
        )
        rollouts = collect_in_turn(actors, request, self._goes_on)
        self.busy_since_s = None
        self.chain = max(actor.chain for actor in actors)
        if may_keep:
            self._arrived.put((self, rollouts))
            return
        self.dropped_env_steps += sum(rollout.env_steps for rollout in rollouts)
        for actor in actors:
            actor.new_chains()

    def _goes_on(self) -> bool:
        """Says whether to make the next step; it is called before each step of the environments."""
        self.busy_since_s = monotonic()
        return not self._stop.is_set()

    def _is_used(self, weights: Weights, actors: Sequence[Actor]) -> bool:
        """Says whether a round was made with these weights: the next round needs newer ones."""
        if self._want_blocks is None:
            return False
        return all(actor.weights_version == weights.version for actor in actors)

    def _too_old(self, weights: Weights, updates: int) -> bool:
        return self._max_age is not None and updates - weights.version > self._max_age


class Threads:
    """Several acting threads as one source of rollouts; they share orders and queue."""

    def __init__(
        self, threads: Sequence[ActingThread], *, orders: Orders, arrived: Arrived, limit_s: float
    ) -> None:
        """`limit_s`: the longest that a request may take."""
        self.threads = threads
        self._orders, self._arrived, self._limit_s = orders, arrived, limit_s
        self._seconds: Counter[str] = Counter()

    def collect(self, timeout_s: float, updates: int) -> list[Rollout]:
        """The rollouts that have arrived, or the first to arrive within `timeout_s`."""
        self._orders.note(updates=updates)
        rollouts: list[Rollout] = []
        while True:
            for thread in self.threads:
                thread.check(self._limit_s)
            try:
                thread, made = self._arrived.get(timeout=max(0.0 if rollouts else timeout_s, 1e-6))
            except queue.Empty:
                return rollouts
            thread.collected()
            self._orders.note(env_steps=sum(rollout.env_steps for rollout in made))
            rollouts += made
            for rollout in made:
                for name, seconds in rollout.timings.items():
                    self._seconds[name] += seconds  # type: ignore[assignment]

    def stats(self) -> dict[str, float]:
        """Shares of the time spent acting, since the run began."""
        total_s = max(1e-9, self._seconds["total_s"])
        return {
            "time/acting_env": self._seconds["env_s"] / total_s,
            "time/acting_policy": self._seconds["policy_s"] / total_s,
        }

    def close(self, timeout_s: float) -> None:
        for thread in self.threads:
            thread.stop()
        end = monotonic() + timeout_s
        for thread in self.threads:
            thread.join(max(0.0, end - monotonic()))


def collect_in_turn(
    actors: Sequence[Actor], request: Request, goes_on: Callable[[], bool]
) -> list[Rollout]:
    """Collects what was asked for from several actors together, or stops when `goes_on` is false.

    The host acts for one actor while the others' lanes step, so device and environments overlap.
    """
    for actor in actors:
        actor.begin(request)
    while not are_done(actors, request) and goes_on():
        for actor in actors:
            if not actor.rests:
                actor.advance()
    return [actor.end() for actor in actors]
