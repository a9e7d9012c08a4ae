"""Ray actors that act for themselves: each has its own copy of the policy and ships blocks.

One thread sends requests, watches the fleet and fetches answers; a few more unpack them; `collect`
hands them to the training loop in the order of each actor's blocks.

The next request is sent when an earlier one has been collected. At any time at most
`requests_per_actor` requests per actor are under way, in the actor, the object store or here, so a
slow learner makes the actors wait and nothing piles up.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, time
from typing import Any, Literal

import numpy as np
import ray

from rlx.acting.acting_thread import Orders
from rlx.acting.wire import Answer, narrowed, unpack
from rlx.cluster.faults import ActingFailed
from rlx.cluster.fleet import Answered, Fleet, Lost, Ready
from rlx.problems import RunFailed
from rlx.types import Rollout, Weights

POLL_S = 0.005  # between two looks at what the loop has taken
IDLE_S = 0.05
KEPT_VERSIONS = 100  # of which it is known when they were published
RECENT = 100  # latencies that the metric is the median of
SILENT_S = 900.0  # without any rollout although actors are ready: something is wrong


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """These settings say what travels between actors and learner, and how much of it at once.

    With `want_blocks` each actor makes one request with each version of the weights, for so many
    blocks of each lane; the replacement of one that is lost on the way makes its part with the
    same weights.
    """

    want_env_steps: int  # of a request
    want_blocks: int | None
    most_env_steps: int  # that a request may answer
    per_actor: int  # requests under way for each actor
    most: int  # for all together
    weights_dtype: Literal["float32", "bfloat16"]
    max_age: int | None  # updates; no request is sent with older weights
    ingest_threads: int  # that unpack rollouts


class RayActors:
    """Rollouts of a fleet of `rlx.acting.remote.RemoteActor`."""

    def __init__(self, *, fleet: Fleet, traffic: Traffic, env_steps: int) -> None:
        """env_steps: made by the run so far."""
        self._fleet, self._traffic = fleet, traffic
        self._orders = Orders(env_steps)
        self._unpackers = ThreadPoolExecutor(traffic.ingest_threads, thread_name_prefix="unpack")
        self._arrived: queue.SimpleQueue[tuple[int, int, Future[Answer]]] = queue.SimpleQueue()
        self._failed: BaseException | None = None
        self._lock = threading.Lock()  # of what follows, which the loop and the thread share
        self._published_s: dict[int, float] = {}  # version -> when; the newest few
        self._used: list[int] = [-1] * len(fleet.slots)  # the version each actor acts with
        self.latencies_s: deque[float] = deque(maxlen=1000)  # from publishing to an actor's use
        self._collected: deque[tuple[int, int]] = deque()  # (actor, life) of requests taken
        self._counts: Counter[str] = Counter()
        # The thread's own:
        self._reference: tuple[int, Any] | None = None  # version, in the object store
        self._life = [-1] * len(fleet.slots)  # the chain of each ready actor's life
        self._under_way = [0] * len(fleet.slots)  # requests, those not collected yet too
        self._answered = [-1] * len(fleet.slots)  # the version that each actor's last answer is of
        self._idle: deque[int] = deque()  # actors that may be sent a request, longest idle first
        self._last_sign_s = monotonic()  # an answer arrived, or a request was sent
        self._stop, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray actors", daemon=True)
        self._thread.start()

    # --- the loop's side -------------------------------------------------------------------------

    @property
    def burst_env_steps(self) -> int:
        """Env steps of one full round of requests."""
        requests = min(len(self._fleet.slots) * self._traffic.per_actor, self._traffic.most)
        return requests * self._traffic.most_env_steps

    @property
    def chain(self) -> int:
        """The number of the newest life of any actor."""
        return max(slot.chain for slot in self._fleet.slots)

    def collect(self, timeout_s: float, updates: int) -> list[Rollout]:
        """The rollouts that have arrived, or the first to arrive within `timeout_s`."""
        self._orders.note(updates=updates)
        if self._failed is not None:
            raise self._failed
        rollouts: list[Rollout] = []
        there = self._arrived.qsize()  # not what arrives meanwhile: that might never end
        while len(rollouts) < max(1, there):
            try:
                arrived = self._arrived.get(timeout=0.0 if there else max(timeout_s, 1e-6))
            except queue.Empty:
                self._check_silence()
                break
            rollouts.append(self._received(*arrived))
            self._wake.set()
        return rollouts

    def publish(self, weights: Weights, env_steps: int) -> None:
        """Publishes the weights; the next requests bring them."""
        self._orders.publish(weights, env_steps)
        self._wake.set()
        with self._lock:
            self._published_s[weights.version] = time()
            while len(self._published_s) > KEPT_VERSIONS:
                del self._published_s[next(iter(self._published_s))]

    def stats(self) -> dict[str, float | None]:
        """Metrics since the start: what was lost, bytes on the wire, the weights' latency."""
        with self._lock:
            counts, latencies_s = Counter(self._counts), list(self.latencies_s)[-RECENT:]
            used = [version for version in self._used if version >= 0]
        updates = self._orders.read()[2]
        env_steps, total_s = max(1, counts["env_steps"]), max(1e-9, counts["total_s"])
        return {
            "acting/lost_env_steps_at_most": float(counts["lost_env_steps"]),
            "acting/wire_bytes_per_env_step": counts["wire_bytes"] / env_steps,
            "acting/wire_ratio": counts["raw_bytes"] / max(1, counts["wire_bytes"]),
            "weights/used_age_updates": updates - float(np.mean(used)) if used else None,
            "weights/publish_to_used_s": float(np.median(latencies_s)) if latencies_s else None,
            "time/acting_env": counts["env_s"] / total_s,
            "time/acting_policy": counts["policy_s"] / total_s,
        }

    def close(self, timeout_s: float) -> None:
        """Stops asking and ends the actors."""
        self._stop.set()
        self._thread.join(timeout_s)
        self._unpackers.shutdown(wait=False, cancel_futures=True)
        with suppress(Exception):  # the cluster may be gone
            self._fleet.close()

    def _received(self, index: int, life: int, unpacked: Future[Answer]) -> Rollout:
        answer = unpacked.result()
        rollout: Rollout = answer.rollout
        self._orders.note(env_steps=rollout.env_steps)
        with self._lock:
            self._collected.append((index, life))
            self._counts["env_steps"] += rollout.env_steps
            self._counts["raw_bytes"] += answer.raw_bytes
            self._counts["wire_bytes"] += answer.wire_bytes
            for name, seconds in rollout.timings.items():
                self._counts[name] += seconds  # type: ignore[assignment]
            self._note_version(index, answer)
        return rollout

    def _note_version(self, index: int, answer: Answer) -> None:
        """Notes how long ago the weights were published that this actor used for the first time."""
        version = answer.weights_version
        if version != self._used[index] and version in self._published_s:
            self._used[index] = version
            latency_s = answer.weights_taken_s - self._published_s[version]
            self.latencies_s.append(max(0.0, latency_s))  # clocks of two hosts may differ

    def _check_silence(self) -> None:
        if self._fleet.ready and monotonic() - self._last_sign_s > SILENT_S:
            raise ActingFailed(f"no rollout for {SILENT_S:.0f} s although actors are ready")

    # --- the thread's side -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._take_back()
                self._send_requests()
                for event in self._fleet.poll(POLL_S):
                    self._handle(event)
                if not any(slot.requests for slot in self._fleet.slots):
                    self._wake.wait(IDLE_S)  # there was nothing that `poll` could wait for
                    self._wake.clear()
        except RunFailed as error:
            self._failed = error
        except BaseException as error:
            self._failed = ActingFailed(f"acting on Ray ended by {type(error).__name__}: {error}")
            self._failed.__cause__ = error

    def _handle(self, event: Ready | Answered | Lost) -> None:
        index = event.index
        if isinstance(event, Ready):
            self._life[index] = event.chain
            self._under_way[index] = 0
            self._idle.extend([index] * self._traffic.per_actor)
        elif isinstance(event, Answered):
            self._last_sign_s = monotonic()
            self._answered[index] = event.value.weights_version
            unpacked = self._unpackers.submit(_unpack, event.value)
            self._arrived.put((index, self._life[index], unpacked))
        else:
            with self._lock:
                self._counts["lost_env_steps"] += event.requests * self._traffic.most_env_steps
                self._used[index] = -1
            self._life[index] = -1
            self._under_way[index] = 0
            self._idle = deque(i for i in self._idle if i != index)

    def _take_back(self) -> None:
        """Lets actors whose answers the loop has taken be asked again, if their life goes on."""
        with self._lock:
            collected, self._collected = self._collected, deque()
        for index, life in collected:
            if self._life[index] == life:
                self._under_way[index] -= 1
                self._idle.append(index)

    def _send_requests(self) -> None:
        weights, env_steps, updates = self._orders.read()
        if weights is None or not self._idle:
            return
        max_age = self._traffic.max_age
        if max_age is not None and updates - weights.version > max_age:
            return  # until newer ones are published
        reference = self._stored(weights)
        asked = (reference, env_steps, self._traffic.want_env_steps, self._traffic.want_blocks)
        for index in self._may_be_asked(weights.version):
            if sum(self._under_way) >= self._traffic.most:
                return
            self._idle.remove(index)
            self._under_way[index] += 1
            self._last_sign_s = monotonic()
            self._fleet.request(index, "collect", *asked)

    def _may_be_asked(self, version: int) -> list[int]:
        """Idle actors, the longest idle first; of a round those that have not made their part."""
        if self._traffic.want_blocks is None:
            return list(self._idle)
        return [index for index in self._idle if self._answered[index] != version]

    def _stored(self, weights: Weights) -> Any:
        """The object store's one copy of this version."""
        if self._reference is None or self._reference[0] != weights.version:
            self._reference = (
                weights.version,
                ray.put(narrowed(weights, self._traffic.weights_dtype)),
            )
        return self._reference[1]


def _unpack(answer: Answer) -> Answer:
    return Answer(
        rollout=unpack(answer.rollout),
        raw_bytes=answer.raw_bytes,
        wire_bytes=answer.wire_bytes,
        weights_version=answer.weights_version,
        weights_taken_s=answer.weights_taken_s,
    )
