"""The training loop: act, learn, keep. Read this after train.py.

With `acting=local` it is exactly sequential: the same seed gives the same bits. The host never
waits for the update it has just started, only for the one before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from rlx import metrics, nonfinite
from rlx.checkpoint import Checkpoint, Checkpointer, Restored
from rlx.evaluate import Evaluation
from rlx.interfaces import (
    ActingPool,
    Agent,
    EnvFamily,
    Evaluator,
    Peers,
    PrioritizedReplay,
    Replay,
)
from rlx.learner import Learner, Published
from rlx.problems import RunFailed
from rlx.progress import Progress
from rlx.replay.quota import Quota
from rlx.replay.snapshots import Snapshots
from rlx.signals import stop_on_signals
from rlx.types import Batch, Episode, News, Rollout, Sample

log = logging.getLogger(__name__)

T = TypeVar("T")

WAIT_S = 0.2  # for actors, before the loop looks at its clocks and signals again
CLOSE_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that a run is made of, built and checked."""

    output_dir: Path
    seed: int
    total_env_steps: int
    stop_after_s: float | None
    stop_after_updates: int | None
    family: EnvFamily
    agent: Agent
    pool: ActingPool
    replay: Replay
    quota: Quota
    learner: Learner
    evaluation: Evaluation
    evaluator: Evaluator | None  # beside the training; None: evaluations interrupt it
    checkpoint: Checkpoint
    logging: metrics.Logging
    peers: Peers
    resumed: Restored | None  # applied to learner, replay, quota and pool already

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the evaluator, the actors, whose cluster it may be in, and the replay."""
        with ExitStack() as ends:  # all of them, the last one first, whatever one may raise
            ends.callback(self.replay.close)
            ends.callback(self.pool.close, CLOSE_TIMEOUT_S)
            if self.evaluator is not None:
                ends.callback(self.evaluator.close)


@dataclass(kw_only=True)
class Counters:
    """How far the run is."""

    env_steps: int = 0
    frames: int = 0
    wall_s: float = 0.0  # before this process


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """An update that was started; asking what became of it waits for its end."""

    keys: np.ndarray  # i64[B] of its sequences
    priorities: Callable[[], np.ndarray | None]  # None: the agent keeps none
    is_finite: Callable[[], bool]
    batch: Batch | None  # None: of a run before this process


class Stopped(Exception):
    """An evaluation was left because the run is to stop: where episodes have no end it has none."""


class Alone:
    """The interfaces.Peers of a run with one learner process."""

    rank, count, restarts = 0, 1, 0

    def exchange(self, mine: T) -> Sequence[T]:
        return [mine]


def train(parts: Parts, stop: threading.Event | None = None) -> dict[str, Any]:
    """Runs to `total_env_steps`, or until `stop` (None: a signal); returns the summary."""
    with nullcontext(stop) if stop else stop_on_signals() as stop:
        loop = Loop(parts, stop)
        try:
            loop.begin()
            while not loop.finished() and not loop.stopped():
                loop.keep()  # before the others: what is due at the end is left to `end`
                loop.act()
                loop.agree()
                loop.learn()
            if loop.failure is not None:
                raise loop.failure
            with suppress(Stopped):
                if loop.finished():
                    return loop.end("finished")
            return loop.end("interrupted")
        except BaseException as error:
            loop.fail(error)
            raise
        finally:
            loop.close()


def _prioritized(replay: Replay) -> PrioritizedReplay | None:
    """The replay, if updates are to give it priorities."""
    takes = isinstance(replay, PrioritizedReplay) and replay.needs_priorities
    return replay if takes else None  # type: ignore[return-value]


def _without_priorities(agent: Agent) -> str:
    return (
        f"replay draws by priorities, which updates of {type(agent).__name__} do not give; choose "
        "replay=uniform or replay=online, or set replay.priority_exponent=0"
    )


class Loop:
    """One run in progress."""

    def __init__(self, parts: Parts, stop: threading.Event | None = None) -> None:
        self.parts = parts
        self._stop = stop or threading.Event()
        self.count = Counters()
        self._evaluated: float | None = None  # the newest evaluation's mean return
        self._score: float | None = None  # the same, until a checkpoint has it
        self._before = 0  # env steps at the last `keep`
        self.failure: RunFailed | None = None  # of the actors or the evaluator
        self._made = Counters()  # by this process's own actors since the last `agree`
        self._ended: list[Episode] = []  # since then
        self._news: Sequence[News] = ()  # everybody's, of the last `agree`
        self._began = perf_counter()
        self._in_flight: InFlight | None = None  # the last update, until its TD errors are applied
        self._published: Published | None = None
        self._acting_version = 0
        self._first_update = parts.learner.updates  # of this process
        self._stages = metrics.Stages()
        resumed_at = parts.resumed.env_steps if parts.resumed else None
        self._metrics = metrics.Metrics(parts.output_dir, parts.logging, resumed_at)
        self._row: dict[str, Any] = self._metrics.last_row or {}
        if parts.resumed:
            self._resume(parts.resumed)
        self._checkpoints = Checkpointer(parts.output_dir, parts.checkpoint)
        self._snapshots = Snapshots(
            self._checkpoints.segments_folder, parts.resumed.segments if parts.resumed else ()
        )
        self._prioritized = _prioritized(parts.replay)
        self._save_due = False
        self._progress = Progress(parts.total_env_steps, parts.logging)

    # --- the three stages ------------------------------------------------------------------------

    def begin(self) -> None:
        """Publishes the first weights."""
        metrics.write_status(self.parts.output_dir, "running", self._row)
        self._before = self.count.env_steps
        if self.parts.checkpoint.exact and self.parts.resumed is None:
            self.save()  # so that a run stopped before its first checkpoint has one, too
        self._publish(self.parts.learner.publish())

    def finished(self) -> bool:
        """By what all learner processes know, as all of them must see it at once."""
        parts = self.parts
        wall_s = max((news.wall_s for news in self._news), default=self.count.wall_s)
        return (
            self.count.env_steps >= parts.total_env_steps
            or (parts.stop_after_s is not None and wall_s >= parts.stop_after_s)
            or (
                parts.stop_after_updates is not None
                and parts.learner.updates >= parts.stop_after_updates
            )
        )

    def stopped(self) -> bool:
        """Whether any process was told to stop; several hear of it when they agree."""
        alone = self.parts.peers.count == 1
        return self._stop.is_set() if alone else any(news.stop for news in self._news)

    def act(self) -> None:
        """Adds what the pool has ready, unless the learner is owed updates."""
        pool, replay, quota = self.parts.pool, self.parts.replay, self.parts.quota
        if replay.has_enough or not quota.may_act(replay.env_steps, replay.startable):
            return
        nothing_else_to_do = not quota.may_learn(replay.env_steps, replay.startable)
        with self._stages.measure("acting"):
            rollouts: list[Rollout] = []
            with self._left_to_the_end():
                rollouts = pool.collect(
                    pool.env_steps_per_request,
                    WAIT_S if nothing_else_to_do else 0.0,
                    self.parts.learner.updates,
                )
        with self._stages.measure("replay_add"):
            for rollout in rollouts:
                replay.add(rollout)
                self._made.env_steps += rollout.env_steps
                self._made.frames += rollout.frames
                self._ended.extend(rollout.episodes)

    def agree(self) -> None:
        """Counts what was made by all learner processes, which do everything at the same count."""
        replay, quota = self.parts.replay, self.parts.quota
        enough = replay.env_steps >= replay.min_env_steps
        if enough and replay.startable >= replay.min_sequences:
            quota.open(replay.env_steps)
        mine = News(
            env_steps=self._made.env_steps,
            frames=self._made.frames,
            episodes=tuple(self._ended),
            startable=replay.startable,
            may_learn=quota.may_learn(replay.env_steps, replay.startable),
            is_writing=self._snapshots.is_writing,
            wall_s=self.wall_s,
            stop=self._stop.is_set(),
        )
        self._made, self._ended = Counters(), []
        with self._stages.measure("wait_peers"):
            self._news = self.parts.peers.exchange(mine)
        for news in self._news:
            self.count.env_steps += news.env_steps
            self.count.frames += news.frames
            self._metrics.episodes(news.episodes)

    def learn(self) -> None:
        """Starts one update if all quotas allow it, then ends the one before it."""
        replay, quota, learner = self.parts.replay, self.parts.quota, self.parts.learner
        if not all(news.may_learn for news in self._news):
            return
        with self._stages.measure("sample"):
            sample = replay.sample(learner.batch_size)
        with self._stages.measure("learner_put"):
            batch = learner.put(sample.batch)
        self._metrics.record("learner/device_busy", float(learner.is_busy))
        with self._stages.measure("learner_update"):
            output = learner.update(batch, self._largest_importance(sample))
        if self._prioritized is not None and output.priorities is None:
            raise RunFailed(_without_priorities(self.parts.agent))
        quota.trained(learner.batch_size * self.parts.agent.sequence.unroll)
        self._settle()
        self._in_flight = InFlight(
            keys=sample.keys,
            priorities=partial(learner.priorities, output),
            is_finite=partial(learner.is_finite, output),
            batch=sample.batch,
        )
        if learner.updates % learner.publish_every_updates == 0:
            with self._stages.measure("publish"):
                self._published = learner.publish()
        age = learner.updates - sample.weights_version.mean()
        self._metrics.record_all(output.metrics)
        self._metrics.record("replay/age_updates", age)
        self._metrics.record("weights/age_updates", learner.updates - self._acting_version)

    def _largest_importance(self, sample: Sample) -> float | None:
        """Of this process's share of the batch, as drawn from the shares of all; None if alone."""
        everyone, peers = [news.startable for news in self._news], self.parts.peers
        if peers.count == 1:
            return None
        # Each share gives an equal part of the batch, however many sequences it holds.
        more = sum(everyone) / (peers.count * everyone[peers.rank])
        return float((sample.least_scaled_probability * more) ** -sample.importance_exponent)

    def keep(self) -> None:
        """Evaluates, writes a row of metrics and saves, each on its own clock of env steps."""
        parts = self.parts
        if parts.peers.rank == 0 and self._rings(parts.evaluation.every_env_steps):
            if parts.evaluator is None:
                with suppress(Stopped):  # `agree` will hear of it
                    self._evaluate(parts.evaluation.episodes)
            else:
                parts.evaluator.submit(parts.learner.publish().weights(), self.count.env_steps)
        with self._left_to_the_end():
            self._heed_evaluator()
        if self._rings(parts.logging.every_env_steps):
            self._write_row()
        if self._save_due and not any(news.is_writing for news in self._news):
            self.save()
        if self._rings(parts.checkpoint.every_env_steps):
            self._begin_to_save()
        self._before = self.count.env_steps
        if self._progress.is_due:
            self._progress.update(self._live())

    def _begin_to_save(self) -> None:
        """Saves, or begins to write the replay's blocks; the rest follows when they are written."""
        checkpoint = self.parts.checkpoint
        if checkpoint.replay and not checkpoint.exact:
            self._snapshots.write_ahead(self.parts.replay)
            self._save_due = True
            return
        self.save()
        if checkpoint.exact:
            self._publish(self.parts.learner.publish())

    # --- ends ------------------------------------------------------------------------------------

    def end(self, state: metrics.State) -> dict[str, Any]:
        """The last evaluation (not of an interrupted run), row, checkpoint and summary."""
        saved = self._finished_before() or self._end(state)
        self._progress.update(self._live())
        metrics.write_status(self.parts.output_dir, state, self._row)
        return metrics.write_summary(
            self.parts.output_dir,
            state=state,
            env_steps=self.count.env_steps,
            frames=self.count.frames,
            updates=self.parts.learner.updates,
            wall_s=self.wall_s,
            train_return=self._row.get("train/return_mean"),
            evaluation_return=self._evaluated,
            params_sha256=metrics.params_sha256(self.parts.learner.state().params),
            checkpoint=saved,
        )

    def fail(self, error: BaseException) -> None:
        """Writes what went wrong where `status.json` is read; keeps what was learnt."""
        if isinstance(error, RunFailed) and error.is_worth_saving:
            log.error("%s; saving a checkpoint", error)
            with suppress(Exception):
                self.save()
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        state: metrics.State = "failed"
        if isinstance(error, KeyboardInterrupt):  # a second Ctrl-C: without a checkpoint
            state, line = "interrupted", "interrupted a second time: without a checkpoint"
        metrics.write_status(self.parts.output_dir, state, self._row, error=line)

    def close(self) -> None:
        """Closes its files; actors are the parts' own."""
        try:
            self._progress.close()
        finally:
            self._metrics.close()

    def save(self, *, finished: bool = False) -> Path:
        """A checkpoint of everything.

        It changes no bit of the training, whenever it is made: TD errors that the replay has not
        got yet are saved beside it. An exact run ends the update in flight and opens its
        environments anew, as one that resumes from here will.
        """
        if self.parts.checkpoint.exact:
            self._settle()
        peers = self.parts.peers
        if peers.rank == 0:  # the others come first: what is saved here is there, too
            peers.exchange(None)
        replay, score, keeps = self.parts.replay, self._score, self.parts.checkpoint.replay
        self._score = None  # an evaluation is the score of one checkpoint, the next one
        self._save_due = False
        with self._stages.measure("checkpoint"):
            replay.flush()
            segments = self._snapshots.complete(replay) if keeps else []
            saved = self._checkpoints.save(
                self.count.env_steps,
                state=self.parts.learner.state() if peers.rank == 0 else {},
                meta=self._meta() | {"finished": finished},
                replay_state=replay.state() | self._pending() if keeps else None,
                segments=segments,
                score=score,
            )
            self._snapshots.forget(self._checkpoints.segments_kept())
            if self.parts.checkpoint.exact and not finished:
                self.parts.pool.reopen()
        if peers.rank != 0:
            peers.exchange(None)
        peers.exchange(None)  # nobody goes on, or fails, before the first one's is in place
        return saved

    def _pending(self) -> dict[str, np.ndarray]:
        """The TD errors that are to be applied next."""
        last = self._in_flight
        if self._prioritized is None or last is None or not last.is_finite():
            return {}
        if (priorities := last.priorities()) is None:
            return {}
        return {"pending_keys": last.keys, "pending_td": priorities}

    @property
    def wall_s(self) -> float:
        """Seconds of training, without the time the run was stopped."""
        return self.count.wall_s + perf_counter() - self._began

    # --- details ---------------------------------------------------------------------------------

    @contextmanager
    def _left_to_the_end(self) -> Iterator[None]:
        """What fails here is raised when all processes have stopped, and can save."""
        try:
            yield
        except RunFailed as error:
            self.failure = error
            self._stop.set()

    def _rings(self, every: int | None) -> bool:
        """Whether a multiple of so many env steps was passed since `keep`; never if None."""
        return every is not None and self._before // every != self.count.env_steps // every

    def _end(self, state: metrics.State) -> Path:
        """Evaluates, writes the last row and saves; answers the checkpoint."""
        self._settle()
        self._say_if_nothing_was_learnt()
        evaluation = self.parts.evaluation
        if state == "finished" and self.parts.peers.rank == 0:
            if evaluation.final_episodes:
                self._evaluate(evaluation.final_episodes)
            elif self._rings(evaluation.every_env_steps):
                self._evaluate(evaluation.episodes)
        self._write_row()
        if state == "interrupted" and self.parts.checkpoint.exact:
            # Resuming off the clock would part this run from an unstopped one.
            return self._checkpoints.paths()[-1]
        return self.save(finished=state == "finished")

    def _say_if_nothing_was_learnt(self) -> None:
        replay, learner = self.parts.replay, self.parts.learner
        if learner.updates == self._first_update:
            log.warning(
                "no update was made: the replay got %d env steps and has %d sequences to draw; "
                "learning begins at replay.min_env_steps=%d and replay.min_sequences=%d",
                *(replay.env_steps, replay.startable, replay.min_env_steps, replay.min_sequences),
            )

    def _finished_before(self) -> Path | None:
        """The checkpoint of a finished run that was resumed and had nothing left to do."""
        resumed = self.parts.resumed
        if resumed is None or not resumed.meta["finished"]:
            return None
        done = (resumed.env_steps, resumed.meta["updates"])
        return resumed.path if done == (self.count.env_steps, self.parts.learner.updates) else None

    def _settle(self) -> None:
        """Ends the update in flight: its TD errors reach the replay, its weights the actors."""
        if (last := self._in_flight) is None:
            return
        self._in_flight = None
        with self._stages.measure("wait_learner"):
            priorities = last.priorities()
        if last.is_finite():
            if self._prioritized is not None and priorities is not None:
                with self._stages.measure("sample"):
                    self._prioritized.update_priorities(last.keys, priorities)
        else:
            self._heed_nonfinite(last)
        if self._published is not None:
            self._publish(self._published)
            self._published = None

    def _heed_nonfinite(self, update: InFlight) -> None:
        """Keeps its batch for inspection; raises NonFinite unless such updates are left out."""
        path = nonfinite.keep_batch(self.parts.output_dir, update.keys, update.batch)
        if self.parts.learner.on_nonfinite == "stop":
            raise nonfinite.NonFinite(path)
        if path is not None:
            log.warning("an update was left out: loss or gradients are not finite; see %s", path)

    def _publish(self, published: Published) -> None:
        with self._stages.measure("publish"):
            self.parts.pool.publish(published.weights(), self.count.env_steps)
        self._acting_version = published.version

    def _evaluate(self, episodes: int) -> None:
        """Leaves the update in flight alone: evaluating changes no bit of training."""
        with self._stages.measure("evaluation"):
            params = self.parts.learner.publish().weights()
            returns = self.parts.evaluation.returns(
                agent=self.parts.agent,
                weights=params,
                family=self.parts.family,
                episodes=episodes,
                seed=self.parts.seed,
                watch=self._heed_stop,
            )
        self._evaluated = self._score = sum(returns) / len(returns)
        self._metrics.record("evaluation/return_mean", self._evaluated)
        self._metrics.record("evaluation/weights_version", params.version)

    def _heed_evaluator(self) -> None:
        """Books what an evaluator beside the training has found."""
        evaluator = self.parts.evaluator
        if evaluator is None:
            return
        for result in evaluator.poll():
            self._evaluated = self._score = sum(result.returns) / len(result.returns)
            self._metrics.record("evaluation/return_mean", self._evaluated)
            self._metrics.record("evaluation/weights_version", result.weights_version)
            self._metrics.record("evaluation/of_env_steps", result.env_steps)

    def _heed_stop(self, *_: object) -> None:
        if self._stop.is_set():
            raise Stopped

    def _write_row(self) -> None:
        with self._stages.measure("logging"):
            extra = self._gauges() | self._stages.fractions()
            updates = self.parts.learner.updates
            row = self._metrics.row(
                self.count.env_steps, self.count.frames, updates, self.wall_s, extra
            )
            self._row = row
            metrics.write_status(self.parts.output_dir, "running", row)

    def _gauges(self) -> dict[str, float | None]:
        replay, quota, peers = self.parts.replay, self.parts.quota, self.parts.peers
        return {
            **replay.stats(),
            **self.parts.pool.stats(),
            **(self.parts.evaluator.stats() if self.parts.evaluator else {}),
            "replay/ratio": quota.ratio_so_far(replay.env_steps),
            "learner/gradient_steps": float(self.parts.learner.gradient_steps),
            **({"learner/restarts": float(peers.restarts)} if peers.count > 1 else {}),
        }

    def _live(self) -> dict[str, Any]:
        return self._row | {
            **self.parts.pool.stats(),
            "env_steps": self.count.env_steps,
            "updates": self.parts.learner.updates,
            "wall_s": self.wall_s,
        }

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the training state and the replay."""
        return {
            "env_steps": self.count.env_steps,
            "frames": self.count.frames,
            "updates": self.parts.learner.updates,
            "wall_s": self.wall_s,
            "chain": self.parts.pool.chain,
            "metrics": self._metrics.state(),
            "quota": self.parts.quota.state(),
            "evaluation_return": self._evaluated,
            "processes": self.parts.peers.count,
        }

    def _resume(self, resumed: Restored) -> None:
        meta = resumed.meta
        self.count = Counters(
            env_steps=meta["env_steps"], frames=meta["frames"], wall_s=meta["wall_s"]
        )
        self._evaluated = meta["evaluation_return"]
        self._metrics.restore(meta["metrics"])
        saved = resumed.replay_state or {}
        if (pending := saved.get("pending_td")) is not None:
            self._in_flight = InFlight(
                keys=saved["pending_keys"],
                priorities=lambda: pending,
                is_finite=lambda: True,
                batch=None,
            )
