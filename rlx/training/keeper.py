"""Writes what a run keeps: evaluations, rows of metrics, checkpoints, status and summary."""

from __future__ import annotations

import copy
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlx.evaluation.playing import Purpose, told
from rlx.problems import RunFailed
from rlx.replay.files.snapshots import Snapshots
from rlx.runs import status
from rlx.runs.metrics import spread
from rlx.runs.progress import Progress
from rlx.training.checkpoint import Checkpointer
from rlx.training.stages import Stages
from rlx.types import Evaluated, TrainState

log = logging.getLogger(__name__)


class Stopped(Exception):
    """An evaluation was left because the run is to stop: episodes may have no end."""


@dataclass(frozen=True, kw_only=True)
class Evaluating:
    """Holds what is being evaluated: the score is claimed for this state and for no later one."""

    state: TrainState  # on the host
    meta: dict[str, Any]

    @property
    def updates(self) -> int:
        return int(self.meta["updates"])


class Keeper:
    """Keeps what the stages make, each thing on its own clock of env steps."""

    def __init__(self, stages: Stages) -> None:
        self._stages, self._parts = stages, stages.parts
        parts = self._parts
        self._evaluated: float | None = None  # the newest evaluation's mean return
        if parts.resumed:
            self._evaluated = parts.resumed.meta["evaluation_return"]
        self._evaluating: Evaluating | None = None  # beside the training
        self._owes_evaluation = False  # one was due, and the run was stopped before its end
        self._heard_env_steps = 0  # up to which the clocks were heard
        self._row: dict[str, Any] = stages.metrics.last_row or {}
        self._checkpoints = Checkpointer(parts.output_dir, parts.checkpoint)
        self._snapshots = Snapshots(
            self._checkpoints.segments_folder, parts.resumed.segments if parts.resumed else ()
        )
        self._save_due = False
        self._has_ended = False  # what fails now is saved already
        self._progress = Progress(parts.total_env_steps, parts.logging)

    @property
    def is_writing(self) -> bool:
        """Says whether a snapshot of the replay is being written beside the training."""
        return self._snapshots.is_writing

    # --- while it runs ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Writes the status: the run runs."""
        if not (self._stages.finished() or getattr(self._parts.replay, "is_recorded", False)):
            log.info("acting begins; the policy is compiled first")
        status.write_status(self._parts.output_dir, "running", self._row)
        self._heard_env_steps = self._stages.count.env_steps
        if resumed := self._parts.resumed:
            self._owes_evaluation = resumed.meta.get("owes_evaluation", False)
        self._stages.hooks.call("on_begin")
        if self._parts.checkpoint.exact and self._parts.resumed is None:
            self.save()  # so that a run stopped before its first checkpoint has one, too

    def keep(self) -> None:
        """Evaluates, writes a row of metrics and saves what is due.

        It keeps nothing in the middle of an on-policy agent's round, whose blocks would be lost.
        """
        parts, stages = self._parts, self._stages
        if stages.in_a_round:
            return
        if self._evaluation_is_due():
            self._begin_to_evaluate()
        for name, other in parts.evaluation.others.items():
            if self._is_due(other.every_env_steps) and parts.peers.rank == 0:
                self._begin_another(name)
        with stages.left_to_the_end():
            self._take_evaluations()
        if self._is_due(parts.logging.every_env_steps) or self._row_is_late():
            self._write_row()
        if self._save_due and not any(news.is_writing for news in stages.news):
            self.save()
        if self._is_due(parts.checkpoint.every_env_steps):
            self._begin_to_save()
        self._heard_env_steps = stages.count.env_steps
        if self._progress.is_due:
            self._progress.update(self._live())

    def _is_due(self, every: int | None) -> bool:
        """Says whether a multiple of so many env steps was passed since `keep`; never if None."""
        now = self._stages.count.env_steps
        return every is not None and self._heard_env_steps // every != now // every

    def _row_is_late(self) -> bool:
        """Says whether a row is due by time: the last one is old, and something was done since."""
        every_s, stages = self._parts.logging.every_s, self._stages
        if every_s is None or stages.wall_s - self._row.get("wall_s", 0.0) < every_s:
            return False
        counts = ("env_steps", stages.count.env_steps), ("updates", self._parts.learner.updates)
        return any(self._row.get(name, 0) != now for name, now in counts)

    def _evaluation_is_due(self) -> bool:
        due = self._owes_evaluation or self._is_due(self._parts.evaluation.every_env_steps)
        return due and self._parts.peers.rank == 0

    # --- ends ------------------------------------------------------------------------------------

    def end(self, state: status.State) -> dict[str, Any]:
        """The last evaluation (not of an interrupted run), row, checkpoint and summary."""
        stages, learner = self._stages, self._parts.learner
        saved = self._finished_before() or self._end(state)
        self._has_ended = True
        self._progress.update(self._live())
        status.write_status(self._parts.output_dir, state, self._row)
        summary = status.write_summary(
            self._parts.output_dir,
            state=state,
            env_steps=stages.count.env_steps,
            frames=stages.count.frames,
            updates=learner.updates,
            wall_s=stages.wall_s,
            train_return=self._row.get("train/return_mean"),
            evaluation_return=self._evaluated,
            params_sha256=status.params_sha256(learner.state().params),
            checkpoint=saved,
        )
        stages.hooks.call("on_end", summary)
        return summary

    def _end(self, state: status.State) -> Path:
        """Evaluates, writes the last row and saves; returns the checkpoint."""
        self._stages.settle()
        self._say_if_nothing_was_learnt()
        evaluation = self._parts.evaluation
        if state == "finished" and self._parts.peers.rank == 0:
            if evaluation.final_episodes:
                self.evaluate(evaluation.final_episodes, "final")
            elif self._evaluation_is_due():
                self.evaluate(evaluation.episodes, "selection")
            for name in evaluation.others:
                self.evaluate_another(name, "final")
        if state == "interrupted":
            self._owes_evaluation = self._evaluation_is_due()
        self._write_row()
        if state == "interrupted" and self._parts.checkpoint.exact:
            # Resuming off the clock would part this run from an unstopped one.
            return self._checkpoints.paths()[-1]
        return self.save(finished=state == "finished")

    def _say_if_nothing_was_learnt(self) -> None:
        replay, learner = self._parts.replay, self._parts.learner
        if learner.updates == self._stages.first_update:
            says = "no update was made: the replay got %d env steps and has %d sequences to draw; "
            says += "learning begins at replay.min_env_steps=%d and replay.min_sequences=%d"
            if replay.ratio is not None:
                says += ", and each update waits for the env steps that replay.ratio asks for"
            begins = replay.min_env_steps, replay.min_sequences
            log.warning(says, replay.env_steps, replay.startable, *begins)

    def _finished_before(self) -> Path | None:
        """The checkpoint of a finished run that was resumed and had nothing left to do."""
        resumed = self._parts.resumed
        if resumed is None or not resumed.meta["finished"]:
            return None
        now = (self._stages.count.env_steps, self._parts.learner.updates)
        return resumed.path if now == (resumed.env_steps, resumed.meta["updates"]) else None

    def fail(self, error: BaseException) -> None:
        """Writes what went wrong where `status.json` is read; keeps what was learnt."""
        if isinstance(error, RunFailed) and error.is_worth_saving and not self._has_ended:
            log.error("%s; saving a checkpoint", error)
            with suppress(Exception):
                self.save()
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        state: status.State = "failed"
        if isinstance(error, KeyboardInterrupt):  # a second Ctrl-C: without a checkpoint
            state, line = "interrupted", "interrupted a second time: without a checkpoint"
        with suppress(OSError):  # which may be what went wrong
            status.write_status(self._parts.output_dir, state, self._row, error=line)

    def close(self) -> None:
        """Closes the run's files; actors are the parts' own."""
        try:
            self._progress.close()
        finally:
            self._stages.metrics.close()

    # --- checkpoints -----------------------------------------------------------------------------

    def _begin_to_save(self) -> None:
        """Saves, or begins to write the replay's blocks; the rest follows when they are written."""
        checkpoint = self._parts.checkpoint
        if checkpoint.replay and not checkpoint.exact:
            self._snapshots.write_ahead(self._parts.replay)
            self._save_due = True
            return
        self.save()
        if checkpoint.exact:
            self._stages.publish()

    def save(self, *, finished: bool = False) -> Path:
        """A checkpoint of everything.

        It changes no bit of the training, whenever it is made: priorities that the replay has not
        got yet are saved beside it. An exact run ends the update in flight and opens its
        environments anew, as one that resumes from here will.
        """
        if self._parts.checkpoint.exact:
            self._stages.settle()
        peers = self._parts.peers
        if peers.rank == 0:  # the others come first: what is saved here is there, too
            peers.exchange(None)
        self._save_due = False
        with self._stages.times.measure("checkpoint"):
            saved = self._write_checkpoint(finished)
        if peers.rank != 0:
            peers.exchange(None)
        peers.exchange(None)  # nobody goes on, or fails, before the first one's is in place
        self._stages.hooks.call("on_checkpoint", saved)
        return saved

    def _write_checkpoint(self, finished: bool) -> Path:
        parts, replay = self._parts, self._parts.replay
        replay.flush()
        keeps = parts.checkpoint.replay
        segments = self._snapshots.complete(replay) if keeps else []
        saved = self._checkpoints.save(
            self._stages.count.env_steps,
            state=parts.learner.state() if parts.peers.rank == 0 else {},
            meta=self._meta() | {"finished": finished},
            replay_state=replay.state() | self._stages.unsettled() if keeps else None,
            segments=segments,
        )
        self._snapshots.forget(self._checkpoints.segments_kept())
        if parts.checkpoint.exact and not finished:
            parts.pool.reopen()
        return saved

    def _meta(self) -> dict[str, Any]:
        """Collects what a checkpoint keeps beside the training state and the replay."""
        parts, stages = self._parts, self._stages
        return {
            "env_steps": stages.count.env_steps,
            "frames": stages.count.frames,
            "updates": parts.learner.updates,
            "wall_s": stages.wall_s,
            "chain": parts.pool.chain,
            "metrics": stages.metrics.state(),
            "quota": parts.quota.state(),
            "evaluation_return": self._evaluated,
            "owes_evaluation": self._owes_evaluation,
            "hooks": stages.hooks.states(),
            "total_env_steps": parts.total_env_steps,
            "processes": parts.peers.count,
        }

    # --- evaluations -----------------------------------------------------------------------------

    def _begin_to_evaluate(self) -> None:
        """Evaluates now, or has an evaluator do so beside the training."""
        parts, self._owes_evaluation = self._parts, False
        if parts.evaluator is not None:
            weights = parts.learner.publish().weights()
            if parts.evaluator.submit(weights, self._stages.count.env_steps):
                self._evaluating = self._now()
            return
        try:
            self.evaluate(parts.evaluation.episodes, "selection")
        except Stopped:  # `agree` will hear of it
            self._owes_evaluation = True

    def _now(self) -> Evaluating:
        meta = copy.deepcopy(self._meta()) | {"finished": False}
        return Evaluating(state=self._parts.learner.state(), meta=meta)

    def evaluate(self, episodes: int, purpose: Purpose) -> None:
        """Evaluates; the update in flight stays so: evaluating changes no bit of training."""
        with self._stages.times.measure("evaluation"):
            now = self._now()
            found = self._play("", episodes, purpose)
        self._note(found, now)

    def evaluate_another(self, name: str, purpose: Purpose) -> None:
        """Makes one of evaluation.others, which only the metrics tell of."""
        with self._stages.times.measure("evaluation"):
            found = self._play(name, self._parts.evaluation.others[name].episodes, purpose)
        self._note_another(found)

    def _begin_another(self, name: str) -> None:
        """Makes one of evaluation.others now, or has an evaluator do so beside the training."""
        parts = self._parts
        if parts.evaluator is not None:
            weights = parts.learner.publish().weights()
            parts.evaluator.submit(weights, self._stages.count.env_steps, name)
            return
        with suppress(Stopped):  # it is left out: `agree` will hear of the stop
            self.evaluate_another(name, "selection")

    def _play(self, name: str, episodes: int, purpose: Purpose) -> Evaluated:
        parts, count = self._parts, self._stages.count
        weights = parts.learner.publish().weights()
        played = parts.evaluation.play(
            agent=parts.agent,
            weights=weights,
            families=parts.evaluated,
            name=name,
            episodes=episodes,
            seed=parts.seed,
            purpose=purpose,
            watch=self._leave_if_stopped,
            cut=lambda cut: self._stages.note_cuts([cut]),
        )
        version, env_steps = weights.version, count.env_steps
        return told(played, weights_version=version, env_steps=env_steps, name=name)

    def _take_evaluations(self) -> None:
        """Notes what an evaluator beside the training has found."""
        for found in self._parts.evaluator.poll() if self._parts.evaluator else ():
            if found.name:
                self._stages.note_cuts(found.cuts)
                self._note_another(found)
                continue
            if self._evaluating is None or self._evaluating.updates != found.weights_version:
                continue  # of an evaluator that was lost meanwhile
            self._stages.note_cuts(found.cuts)
            self._note(found, self._evaluating)
            self._stages.metrics.record("evaluation/of_env_steps", found.env_steps)

    def _note(self, found: Evaluated, of: Evaluating) -> None:
        """Notes the mean return, and keeps what was evaluated if nothing before it was better."""
        metrics = self._stages.metrics
        self._evaluated = score = sum(found.returns) / len(found.returns)
        metrics.record_all(spread(found.returns, "evaluation/return"))
        metrics.record("evaluation/episodes", len(found.returns))
        metrics.record("evaluation/weights_version", of.updates)
        for task, return_ in zip(found.tasks, found.returns, strict=False):
            metrics.record(f"task/{task}/evaluation_return_mean", return_)
        with self._stages.times.measure("checkpoint"):
            self._checkpoints.keep_best(of.state, of.meta, score)
        self._stages.hooks.call("on_evaluation", found)

    def _note_another(self, found: Evaluated) -> None:
        metrics, group = self._stages.metrics, f"evaluation/{found.name}"
        metrics.record_all(spread(found.returns, f"{group}/return"))
        metrics.record(f"{group}/episodes", len(found.returns))
        metrics.record(f"{group}/of_env_steps", found.env_steps)
        self._stages.hooks.call("on_evaluation", found)

    def _leave_if_stopped(self, *_: object) -> None:
        if self._stages.stop.is_set():
            raise Stopped

    # --- rows ------------------------------------------------------------------------------------

    def _write_row(self) -> None:
        stages = self._stages
        with stages.times.measure("logging"):
            self._row = stages.metrics.row(
                stages.count.env_steps,
                stages.count.frames,
                self._parts.learner.updates,
                stages.wall_s,
                self._gauges() | stages.times.fractions(),
            )
            status.write_status(self._parts.output_dir, "running", self._row)

    def _gauges(self) -> dict[str, float | None]:
        parts = self._parts
        return {
            **parts.replay.stats(),
            **parts.pool.stats(),
            **(parts.evaluator.stats() if parts.evaluator else {}),
            "acting/cut_episodes": float(self._stages.cut_episodes),
            "acting/env_restarts": float(self._stages.env_restarts),
            "replay/ratio": parts.quota.ratio_so_far(parts.replay.env_steps),
            "learner/gradient_steps": float(parts.learner.gradient_steps),
            **({"learner/restarts": float(parts.peers.restarts)} if parts.peers.count > 1 else {}),
        }

    def _live(self) -> dict[str, Any]:
        return self._row | {
            **self._parts.pool.stats(),
            "env_steps": self._stages.count.env_steps,
            "updates": self._parts.learner.updates,
            "wall_s": self._stages.wall_s,
            "waiting_for": self._waiting_for(),
        }

    def _waiting_for(self) -> str | None:
        """Says what learning waits for; None where it has begun."""
        replay = self._parts.replay
        if self._parts.quota.is_open or self._parts.agent.on_policy:
            return None
        wanted = [
            (replay.min_env_steps, replay.env_steps, "env steps"),
            (replay.min_sequences, replay.startable, "sequences"),
        ]
        missing = [f"{n:,} {what}, {has:,} so far" for n, has, what in wanted if has < n]
        return f"{' and '.join(missing)} (replay)" if missing else None
