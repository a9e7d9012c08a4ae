"""Search over settings with Optuna: `hydra/sweeper=rlx_optuna`.

Trial n is job n, in folder n of the sweep; the study is a file beside them. What a trial reports is
what its run writes into metrics.jsonl, so that runs know nothing of the search.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from rlx.machine.packages import import_package
from rlx.problems import show
from rlx.runs.folders import METRICS_FILE, number, read_rows
from rlx.sweeps.jobs import Job, say
from rlx.sweeps.sweeping import Refused

try:
    import_package("optuna")
    import optuna
except ImportError as error:
    raise Refused(
        "rlx: hydra/sweeper=rlx_optuna needs Optuna: pip install 'rlx[optuna]'"
    ) from error

STUDY, STUDY_FILE = "rlx", "study.db"
REPORTED = "evaluation/return_mean"
GIVEN = "overrides"  # the study's attribute that says what was searched
SAMPLERS = ("tpe", "random", "gp")
PRUNERS = ("none", "median", "hyperband")
Launch = Callable[[Sequence[Sequence[str]], int], Sequence[JobReturn]]


class Search:
    """One study, from the first trial or from where it was left."""

    def __init__(
        self,
        *,
        folder: Path,
        arguments: Sequence[str],
        loader: Any,
        n_trials: int,
        batch: int,
        metric: str,
        direction: str,
        sampler: str,
        pruner: str,
        seed: int,
        max_failures: int | None,
    ) -> None:
        """arguments: overrides; those with several values or an interval are searched."""
        _refuse("direction", direction, ("maximize", "minimize"))
        _refuse("sampler", sampler, SAMPLERS)
        _refuse("pruner", pruner, PRUNERS)
        _refuse_numbers(1, n_trials=n_trials, batch=batch)
        _refuse_numbers(0, seed=seed, max_failures=0 if max_failures is None else max_failures)
        self._folder, self._metric = folder, metric
        self._n_trials, self._batch, self._max_failures = n_trials, batch, max_failures
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))
        overrides = {o.get_key_element(): o for o in parsed}.values()  # the last one counts
        self._space = {
            o.get_key_element(): distribution(o) for o in overrides if o.is_sweep_override()
        }
        if not self._space:
            says = "nothing is searched; give intervals, ranges or choices, as "
            raise Refused(
                f"rlx: {says}'agent.optimizer.learning_rate=tag(log,interval(1e-5,1e-2))'"
            )
        self._fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
        self._study = self._open(direction, sampler, pruner, seed, sorted(arguments))
        self._trials: dict[int, Any] = {}  # under way, by number
        self._seen: dict[int, int] = {}  # bytes of metrics.jsonl that were read
        self._reported: dict[int, int] = {}  # env steps of the last report

    @property
    def searched(self) -> frozenset[str]:
        """The keys whose values are searched."""
        return frozenset(self._space)

    def run(self, launch: Launch) -> Any:
        """Asks for trials, runs them in batches, and reports their results."""
        self._forget_lost()
        while (left := self._n_trials - len(self._ended())) > 0:
            trials = [self._study.ask(self._space) for _ in range(min(self._batch, left))]
            self._trials = {trial.number: trial for trial in trials}
            overrides = [[*self._fixed, *_as_overrides(trial.params)] for trial in trials]
            try:
                returns = launch(overrides, trials[0].number)
            except Refused:
                self._forget_lost()
                if len(self._study.get_trials(deepcopy=False)) == len(trials):
                    self._forget_all()
                raise
            except BaseException:
                self._forget_lost()
                raise
            for trial, found in zip(trials, returns, strict=True):
                self._tell(trial, found)
            failed = len(self._in_state("FAIL"))
            if self._max_failures is not None and failed > self._max_failures:
                says = f"{failed} trials failed (hydra.sweeper.max_failures={self._max_failures})"
                raise Refused(f"rlx: {says}; {self._folder / 'runs.csv'} says why")
        return self._sum_up()

    def is_hopeless(self, job: Job) -> bool:
        """Reports a running trial's new evaluations; returns whether the pruner would end it."""
        path, trial = job.folder / METRICS_FILE, self._trials.get(job.number)
        if trial is None or not path.exists() or path.stat().st_size == self._seen.get(job.number):
            return False
        self._seen[job.number] = path.stat().st_size
        last = self._reported.get(job.number, -1)
        rows = [row for row in read_rows(path) if row.get(REPORTED) is not None]
        new_rows = [
            row for row in rows if row["env_steps"] > last
        ]  # Optuna warns of those of before
        for row in new_rows:
            trial.report(row[REPORTED], row["env_steps"])
            self._reported[job.number] = row["env_steps"]
        return bool(new_rows) and trial.should_prune()

    def _open(
        self, direction: str, sampler: str, pruner: str, seed: int, arguments: list[str]
    ) -> optuna.Study:
        self._folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage = optuna.storages.get_storage(_address(self._folder.absolute() / STUDY_FILE))
        study = optuna.create_study(
            storage=self._storage,
            study_name=STUDY,
            load_if_exists=True,
            direction=direction,
            pruner=_pruner(pruner),
        )
        # A study that goes on draws other numbers than those it began with.
        begun = len(study.get_trials(deepcopy=False))
        entropy = np.random.SeedSequence([seed, begun]).generate_state(1)[0]
        study.sampler = _sampler(sampler, int(entropy) if begun else seed)
        before = study.user_attrs.setdefault(GIVEN, arguments)
        if before != arguments:
            gone, new = sorted({*before} - {*arguments}), sorted({*arguments} - {*before})
            says = f"this study was begun with {gone} where now {new} is given; give the same"
            raise Refused(f"rlx: hydra.sweep.dir={self._folder}: {says}, or another folder")
        if study.direction.name.lower() != direction:
            says = f"this study was begun with {study.direction.name.lower()}"
            raise Refused(f"rlx: hydra.sweeper.direction={direction}: {says}")
        study.set_user_attr(GIVEN, arguments)
        return study

    def _tell(self, trial: Any, found: JobReturn) -> None:
        failed = found.status != JobStatus.COMPLETED
        summary = {} if failed else found.return_value
        value = number(summary.get(self._metric))
        if summary.get("state") == "pruned":
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        elif failed or value is None:
            if not failed:
                says = f"has no number {self._metric} in its summary: counted as failed"
                say(f"trial {trial.number} {says}")
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, float(value))

    def _forget_lost(self) -> None:
        """Trials that were under way when a search ended count as failed."""
        for trial in self._in_state("RUNNING"):
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def _forget_all(self) -> None:
        """Forgets a study in which nothing could begin, so that it may have other settings then."""
        optuna.delete_study(study_name=STUDY, storage=self._storage)

    def _ended(self) -> list[Any]:
        return [
            trial for trial in self._study.get_trials(deepcopy=False) if trial.state.is_finished()
        ]

    def _in_state(self, name: str) -> list[Any]:
        state = optuna.trial.TrialState[name]
        return self._study.get_trials(deepcopy=False, states=(state,))

    def _sum_up(self) -> dict[str, Any]:
        counts = {name: len(self._in_state(name)) for name in ("COMPLETE", "PRUNED", "FAIL")}
        states = ", ".join(f"{count} {name.lower()}" for name, count in counts.items() if count)
        if not counts["COMPLETE"]:
            raise Refused(f"rlx: no trial came to its end ({states}); {self._folder / 'runs.csv'}")
        best = self._study.best_trial
        won = f"best {best.value:.4g}: job {best.number}, {' '.join(_as_overrides(best.params))}"
        say(f"{sum(counts.values())} trials: {states}; {won}")
        for path in figures(self._study, self._folder):
            say(f"figure: {path}")
        return {"best_value": best.value, "best_job": best.number, "best": dict(best.params)}


def distribution(override: Override) -> optuna.distributions.BaseDistribution:
    """Optuna's distribution of the same values as a sweep in Hydra's grammar."""
    value: Any = override.value()
    try:
        return _distribution(override, value)
    except ValueError as error:
        says = f"cannot be searched: {str(error).rstrip('.')}"
        raise Refused(f"rlx: {override.input_line}: {says}") from None


def _distribution(override: Override, value: Any) -> optuna.distributions.BaseDistribution:
    log = isinstance(value, IntervalSweep | RangeSweep) and "log" in value.tags
    if isinstance(value, RangeSweep):
        if not value.step:
            raise ValueError("its step is 0")
        if log and (value.step != 1 or not isinstance(value.start, int)):
            raise ValueError("on a logarithmic scale a range has integers and step 1")
    if isinstance(value, IntervalSweep):
        low, high = value.start or 0, value.end or 0
        if isinstance(low, int) and isinstance(high, int):
            return optuna.distributions.IntDistribution(low, high, log=log)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("its ends must be finite")
        return optuna.distributions.FloatDistribution(float(low), float(high), log=log)
    texts = list(dict.fromkeys(override.sweep_string_iterator()))
    if not texts:
        raise ValueError("there is no value in it")
    if isinstance(value, RangeSweep):
        numbers = [float(text) for text in texts]
        low, high, step = min(numbers), max(numbers), abs(value.step)
        if all(isinstance(x, int) for x in (value.start, value.stop, value.step)):
            return optuna.distributions.IntDistribution(
                int(low), int(high), log=log, step=int(step)
            )
        return optuna.distributions.FloatDistribution(low, high, step=step)
    # The order says nothing here; a study that goes on must find the one it began with.
    return optuna.distributions.CategoricalDistribution(sorted(texts) if value.shuffle else texts)


def figures(study: optuna.Study, folder: Path) -> list[Path]:
    """History and importance of the settings as PNGs; none where matplotlib is not installed."""
    try:
        import matplotlib.figure
    except ImportError:
        say("no figures: pip install 'rlx[figures]'")
        return []
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    history, importance = figure.subplots(1, 2)
    _draw_history(history, study, done)
    _draw_importance(importance, study, done)
    path = folder / "search.png"
    figure.savefig(path, dpi=120)
    return [path]


def _draw_history(axes: Any, study: optuna.Study, done: Sequence[Any]) -> None:
    numbers, values = [t.number for t in done], [t.value for t in done]
    better = max if study.direction == optuna.study.StudyDirection.MAXIMIZE else min
    best = [better(values[: i + 1]) for i in range(len(values))]
    every = study.get_trials(deepcopy=False)
    pruned, failed = (
        [trial.number for trial in every if trial.state.name == state]
        for state in ("PRUNED", "FAIL")
    )
    axes.plot(numbers, values, "o", color="#4477aa", label="trial")
    axes.step(numbers, best, where="post", color="#222222", label="best so far")
    for name, which, mark in (("pruned", pruned, "v"), ("failed", failed, "x")):
        if which:
            low = min(values)
            axes.plot(which, [low] * len(which), mark, color="#cc6677", label=name)
    title = f"{len(done)} of {len(every)} trials have a value"
    axes.set(title=title, xlabel="trial", ylabel="value")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _draw_importance(axes: Any, study: optuna.Study, done: Sequence[Any]) -> None:
    axes.set(title="importance (PED-ANOVA)", xlabel="share")
    if len(done) < 4 or len({trial.value for trial in done}) < 2:
        axes.text(0.5, 0.5, "too few trials to tell", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    names = list(found)[::-1]
    axes.barh(names, [found[name] for name in names], color="#4477aa")


def _as_overrides(params: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in params.items()]


def as_text(value: Any) -> str:
    """A value of a YAML file in the grammar of the command line."""
    if isinstance(value, str):
        return value
    return json.dumps(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)


def _address(path: Path) -> str:
    """A file as SQLAlchemy and Optuna take it, to whom some characters of a name mean more."""
    special = {ord(character): f"%{ord(character):02X}" for character in "%?{}"}
    return f"sqlite:///{str(path).translate(special)}"


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    # constant_liar: trials of a batch keep out of each other's way.
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _pruner(name: str) -> optuna.pruners.BasePruner:
    if name == "median":
        return optuna.pruners.MedianPruner()
    return optuna.pruners.HyperbandPruner() if name == "hyperband" else optuna.pruners.NopPruner()


def _refuse(name: str, given: str, accepted: Sequence[str]) -> None:
    if given not in accepted:
        says = f"accepted: {', '.join(accepted)}"
        raise Refused(f"rlx: hydra.sweeper.{name}={given}: {says}")


def _refuse_numbers(least: int, **given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            says = f"must be an integer of at least {least}"
            raise Refused(f"rlx: hydra.sweeper.{name}={show(value)}: {says}")
