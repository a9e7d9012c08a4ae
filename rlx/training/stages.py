"""The three stages of the training loop: act, agree with the other learner processes, learn."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter
from types import MappingProxyType
from typing import Any

import numpy as np

from rlx.interfaces import Agent, PrioritizedReplay, Replay
from rlx.problems import RunFailed
from rlx.runs.metrics import Metrics
from rlx.runs.times import StageTimes
from rlx.training import nonfinite
from rlx.training.checkpoint_files import Restored
from rlx.training.hooking import HookedRun, Hooks, Replaces
from rlx.training.learner import Published
from rlx.training.parts import Counters, InFlight, Parts
from rlx.training.schedules import in_batch, tell_replay, values_now
from rlx.types import Cut, Episode, News, Rollout, Sample

log = logging.getLogger(__name__)

WAIT_S = 0.2  # for actors, before the loop looks at its clocks and signals again


def _prioritized(replay: Replay) -> PrioritizedReplay | None:
    """The replay, if updates give it priorities; else None."""
    if isinstance(replay, PrioritizedReplay) and replay.needs_priorities:
        return replay
    return None


def _without_priorities(agent: Agent) -> str:
    return (
        f"replay draws by priorities, which updates of {type(agent).__name__} do not give; choose "
        "replay=uniform or replay=online, or set replay.priority_exponent=0"
    )


def _spread_of(importance: Any) -> dict[str, Any]:
    """Metrics of the importance f32[B] of a batch; {} where it lies on a device."""
    if not isinstance(importance, np.ndarray):
        return {}
    return {"replay/importance_mean": importance.mean(), "replay/importance_min": importance.min()}


class Stages:
    """A run in progress: its stages, and what they share."""

    def __init__(self, parts: Parts, stop: threading.Event | None = None) -> None:
        self.parts = parts
        self.stop = stop or threading.Event()
        self.count = Counters()
        resumed_at = parts.resumed.env_steps if parts.resumed else None
        action = parts.agent.spec.action
        self.metrics = Metrics(parts.output_dir, parts.logging, resumed_at, action)
        self.times = StageTimes()
        self.failure: RunFailed | None = None  # of the actors, the evaluator or a hook
        self._finish = threading.Event()  # set by a hook
        self.news: Sequence[News] = ()  # everybody's, of the last `agree`
        self.in_a_round = False  # of an on-policy agent: blocks are made for the next update
        self._made = Counters()  # by this process's own actors since the last `agree`
        self._ended: list[Episode] = []  # since then
        self._collected: deque[Rollout] = deque()  # that the replay has no room for yet
        self._began = perf_counter()
        self.first_update = parts.learner.updates  # of this process
        self._in_flight: InFlight | None = None  # the last update, until it is settled
        self._published: Published | None = None  # of the update in flight
        self._prioritized = _prioritized(parts.replay)
        self._acting_version = 0
        self._taken_env_steps = 0  # when the weights that actors have, or get, were taken
        self._given_env_steps = 0  # when those that they have were
        self._settles_early = not parts.takes_turns
        self.cut_episodes = 0  # by answers that were not finite
        self.env_restarts = 0  # of environments that raised, within their actors
        self.hooks = Hooks(parts.hooks, self._seen_by_hooks(), self._fail)
        self._scheduled: Mapping[str, float] = {}  # values of now by their settings (schedules)
        if parts.resumed:
            self._resume(parts.resumed)

    def finished(self) -> bool:
        """Says whether the run is at its end, by what all learner processes know alike.

        An on-policy agent first learns from the round that has begun.
        """
        parts = self.parts
        if self.in_a_round:
            return False
        wall_s = max((news.wall_s for news in self.news), default=self.count.wall_s)
        return (
            self.count.env_steps >= parts.total_env_steps
            or any(news.finish for news in self.news)
            or (parts.stop_after_s is not None and wall_s >= parts.stop_after_s)
            or (
                parts.stop_after_updates is not None
                and parts.learner.updates >= parts.stop_after_updates
            )
        )

    def stopped(self) -> bool:
        """Says whether any process was asked to stop; several learn of it when they agree."""
        alone = self.parts.peers.count == 1
        return self.stop.is_set() if alone else any(news.stop for news in self.news)

    @property
    def wall_s(self) -> float:
        """Seconds of training, without the time the run was stopped."""
        return self.count.wall_s + perf_counter() - self._began

    # --- the three stages ------------------------------------------------------------------------

    def act(self) -> None:
        """Adds what the pool has ready, unless the learner is owed updates.

        All that Ray's actors or threads have made since comes at once; what the replay does not
        want yet waits here, and no more is collected before it is added.
        """
        self._settle_early()
        self._follow_schedules()
        replay, quota = self.parts.replay, self.parts.quota
        if replay.has_enough or not quota.may_act(replay.env_steps, replay.startable):
            return
        nothing_else_to_do = not quota.may_learn(replay.env_steps, replay.startable)
        if not self._collected:
            with self.times.measure("acting"):
                self._collect(WAIT_S if nothing_else_to_do else 0.0)
        with self.times.measure("replay_add"):
            while self._collected and not replay.has_enough:
                rollout = self._collected.popleft()
                replay.add(rollout)
                self.metrics.actions(rollout.rows)
                if self.hooks.wants("on_rollout"):
                    self.hooks.call("on_rollout", rollout)
                self._made.env_steps += rollout.env_steps
                self._made.frames += rollout.frames
                self._ended.extend(rollout.episodes)
                with self.left_to_the_end():
                    self.note_cuts(rollout.cuts)

    def agree(self, *, is_writing: bool = False) -> None:
        """Counts what was made by all learner processes, which do everything at the same count.

        is_writing: whether this one writes a snapshot of its replay.
        """
        replay, quota = self.parts.replay, self.parts.quota
        enough = replay.env_steps >= replay.min_env_steps
        if enough and replay.startable >= replay.min_sequences:
            quota.open(0 if self.parts.agent.on_policy else replay.env_steps)
        mine = News(
            env_steps=self._made.env_steps,
            frames=self._made.frames,
            episodes=tuple(self._ended),
            startable=replay.startable,
            may_learn=quota.may_learn(replay.env_steps, replay.startable),
            is_writing=is_writing,
            wall_s=self.wall_s,
            stop=self.stop.is_set(),
            finish=self._finish.is_set(),
        )
        self._made, self._ended = Counters(), []
        with self.times.measure("wait_peers"):
            self.news = self.parts.peers.exchange(mine)
        for news in self.news:
            self.count.env_steps += news.env_steps
            self.count.frames += news.frames
            self.metrics.episodes(news.episodes)
            if news.episodes:
                self.hooks.call("on_episodes", news.episodes)

    def learn(self) -> None:
        """Starts one update if all quotas allow it, then ends the one before it."""
        replay, quota, learner = self.parts.replay, self.parts.quota, self.parts.learner
        on_policy = self.parts.agent.on_policy
        may_learn = all(news.may_learn for news in self.news)
        self.in_a_round = on_policy and not may_learn
        if not may_learn:
            return
        self._settle_early()
        self._follow_schedules()  # by what all learner processes know alike
        with self.times.measure("sample"):
            sample = replay.sample(learner.batch_size)
        with self.times.measure("learner_put"):
            made = np.full(learner.batch_size, self.count.env_steps % 2**32, np.uint32)
            changing = in_batch(self._scheduled, learner.batch_size)
            batch = learner.put(replace(sample.batch, env_steps=made, scheduled=changing))
        self.metrics.record("learner/device_busy", float(learner.is_busy))
        if learner.updates == self.first_update:
            log.info("learning begins; the update is compiled first")
        with self.times.measure("learner_update"):
            output = learner.update(batch, self._largest_importance(sample))
        if self._prioritized is not None and output.priorities is None:
            raise RunFailed(_without_priorities(self.parts.agent))
        quota.trained(learner.batch_size * self.parts.agent.sequence.unroll)
        self.settle()
        self._in_flight = InFlight(
            keys=sample.keys,
            priorities=partial(learner.priorities, output),
            is_finite=partial(learner.is_finite, output),
            has_ended=partial(learner.has_ended, output),
            batch=sample.batch,
        )
        if on_policy or self._publishing_is_due():
            with self.times.measure("publish"):
                self._published = self._take_weights()
        if on_policy:  # the next round is made with these weights
            self.settle()
        age = learner.updates - sample.weights_version.mean()
        self.metrics.record_all(output.metrics)
        self.metrics.record_all(_spread_of(sample.batch.importance))
        self.metrics.record("replay/age_updates", age)
        self.metrics.record("weights/age_updates", learner.updates - self._acting_version)
        self.metrics.record("weights/age_env_steps", self.count.env_steps - self._given_env_steps)
        self.hooks.call("on_update", MappingProxyType(output.metrics))

    # --- details ---------------------------------------------------------------------------------

    def _follow_schedules(self) -> None:
        """Notes the values of now; the replay and the quota are told theirs."""
        if not (schedules := self.parts.schedules):
            return
        now = {"env_steps": self.count.env_steps, "updates": self.parts.learner.updates}
        seconds = max((news.wall_s for news in self.news), default=self.count.wall_s)  # of all
        values = values_now(schedules, **now, seconds=seconds)
        for name, value in values.items():
            self.metrics.record(f"schedule/{name}", value)
        if values != self._scheduled:
            self._scheduled = values
            tell_replay(values, self.parts.replay, self.parts.quota)

    def _collect(self, wait_s: float) -> None:
        """Takes what has arrived from the pool, or what comes first within `wait_s`."""
        pool = self.parts.pool
        with self.left_to_the_end():
            self._collected.extend(pool.collect(wait_s, self.parts.learner.updates))
        if self.hooks.wants("on_actor_replaced") and isinstance(pool, Replaces):
            for each in pool.replaced():
                self.hooks.call("on_actor_replaced", each)

    def note_cuts(self, cuts: Iterable[Cut]) -> None:
        """Keeps answers that were not finite; raises NonFiniteAnswer unless those are left out.

        Environments that raised, and were opened anew, are told and counted.
        """
        for cut in cuts:
            if cut.reopened:
                self.env_restarts += 1
                log.warning("an environment was opened anew: %s", cut)
                continue
            self.cut_episodes += 1
            path = nonfinite.keep_answer(self.parts.output_dir, cut)
            if self.parts.learner.on_nonfinite == "stop":
                raise nonfinite.NonFiniteAnswer(self.parts.agent.spec.id, cut, path)
            if path is not None:
                log.warning("an episode was cut: %s; see %s", cut, path)

    def settle(self) -> None:
        """Ends the update in flight: its priorities reach the replay, its weights the actors."""
        if (last := self._in_flight) is None:
            return
        self._in_flight = None
        with self.times.measure("wait_learner"):
            priorities = last.priorities()
        if not last.is_finite():
            self._leave_out(last)
        elif self._prioritized is not None and priorities is not None:
            with self.times.measure("sample"):
                self._prioritized.update_priorities(last.keys, priorities)
        if self._published is not None:
            self.publish(self._published)
            self._published = None

    def _settle_early(self) -> None:
        """Ends an update that is done already, where no seed promises when that is.

        The next batch is drawn by its priorities, and actors need not wait for the update after it.
        """
        last = self._in_flight
        if self._settles_early and last is not None and last.has_ended() and last.is_finite():
            self.settle()

    def publish(self, published: Published | None = None) -> None:
        """Gives the actors these weights, or those of now; waits for the update that makes them."""
        if published is None:
            published = self._take_weights()
        with self.times.measure("publish"):
            self.parts.pool.publish(published.weights(), self.count.env_steps)
        self._acting_version = published.version
        self._given_env_steps = self._taken_env_steps

    def _publishing_is_due(self) -> bool:
        return self.parts.learner.publishes(
            updates=self.parts.learner.updates,
            env_steps=self.count.env_steps,
            published_env_steps=self._taken_env_steps,
        )

    def _take_weights(self) -> Published:
        self._taken_env_steps = self.count.env_steps
        return self.parts.learner.publish()

    def unsettled(self) -> dict[str, Any]:
        """Priorities that the replay has not got yet, for a checkpoint; waits for their update."""
        last = self._in_flight
        if self._prioritized is None or last is None or not last.is_finite():
            return {}
        if (priorities := last.priorities()) is None:
            return {}
        return {"pending_keys": last.keys, "pending_td": priorities}

    @contextmanager
    def left_to_the_end(self) -> Iterator[None]:
        """Keeps what fails here, to be raised when all processes have stopped and can save."""
        try:
            yield
        except RunFailed as error:
            self._fail(error)

    def raise_failure(self) -> None:
        """Raises what failed in the stages or in a hook."""
        if self.failure is not None:
            raise self.failure

    def _fail(self, error: RunFailed) -> None:
        self.failure = error
        self.stop.set()

    def _largest_importance(self, sample: Sample) -> float | None:
        """The largest importance of this process's share of the batch; None if it is alone."""
        everyone, peers = [news.startable for news in self.news], self.parts.peers
        if peers.count == 1:
            return None
        # Each share gives an equal part of the batch, however many sequences it holds.
        more = sum(everyone) / (peers.count * everyone[peers.rank])
        return float((sample.least_scaled_probability * more) ** -sample.importance_exponent)

    def _leave_out(self, update: InFlight) -> None:
        """Keeps its batch for inspection; raises NonFinite unless such updates are left out."""
        path = nonfinite.keep_batch(self.parts.output_dir, update.keys, update.batch)
        if self.parts.learner.on_nonfinite == "stop":
            raise nonfinite.NonFinite(path)
        if path is not None:
            log.warning("an update was left out: loss or gradients are not finite; see %s", path)

    def _seen_by_hooks(self) -> HookedRun:
        return HookedRun(
            parts=self.parts,
            count=self.count,
            metrics=self.metrics,
            clock_s=lambda: self.wall_s,
            finishing=self._finish.set,
        )

    def _resume(self, resumed: Restored) -> None:
        meta, saved = resumed.meta, resumed.replay_state or {}
        for name in ("env_steps", "frames", "wall_s"):
            setattr(self.count, name, meta[name])
        self.metrics.restore(meta["metrics"])
        self.hooks.restore(meta.get("hooks", ()))
        if (pending := saved.get("pending_td")) is not None:
            self._in_flight = InFlight(
                keys=saved["pending_keys"],
                priorities=lambda: pending,
                is_finite=lambda: True,
                has_ended=lambda: True,
                batch=None,
            )
