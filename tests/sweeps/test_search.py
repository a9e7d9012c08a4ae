"""Search with Optuna: Hydra's grammar, a study that goes on, trials that fail or are pruned."""

import json
import warnings

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

optuna = pytest.importorskip("optuna", reason="the extra 'optuna' is not installed")

from optuna.distributions import (  # noqa: E402
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from rlx.sweeps.jobs import Job  # noqa: E402
from rlx.sweeps.search import Search, as_text, distribution, figures  # noqa: E402
from rlx.sweeps.sweeping import Refused  # noqa: E402

LR = "agent.optimizer.learning_rate=tag(log,interval(1e-5,1e-2))"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=tag(log,interval(1e-5,1e-2))", FloatDistribution(1e-5, 1e-2, log=True)),
        ("a=interval(0.9,1)", FloatDistribution(0.9, 1.0)),
        ("a=int(interval(1,10))", IntDistribution(1, 10)),
        ("a=tag(log,int(interval(1,100)))", IntDistribution(1, 100, log=True)),
        ("a=range(1,10,2)", IntDistribution(1, 9, step=2)),
        ("a=range(1,10)", IntDistribution(1, 9)),
        ("a=range(0,1,0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("a=mlp_lstm,mlp_gru", CategoricalDistribution(["mlp_lstm", "mlp_gru"])),
        ("a=shuffle(c,a,b)", CategoricalDistribution(["a", "b", "c"])),
        ("a=shuffle(range(1,5))", IntDistribution(1, 4)),
        ("a=choice(1,2.5)", CategoricalDistribution(["1", "2.5"])),
        ("a='x y',b", CategoricalDistribution(["'x y'", "b"])),
        ("a=[1,2],[3]", CategoricalDistribution(["[1,2]", "[3]"])),
    ],
)
def test_hydras_grammar_says_what_is_searched(text, expected):
    assert distribution(OverridesParser.create().parse_override(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a=interval(5,1)",
        "a=tag(log,interval(0,1))",
        "a=interval(0,inf)",
        "a=range(5,1)",
        "a=range(1,5,0)",
        "a=tag(log,range(1,100,5))",
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(text):
    with pytest.raises(Refused, match=r"^rlx: a=.* cannot be searched: "):
        distribution(OverridesParser.create().parse_override(text))


def search(folder, *arguments, **changes) -> Search:
    settings = {
        "n_trials": 6,
        "batch": 2,
        "metric": "evaluation_return",
        "direction": "maximize",
        "sampler": "tpe",
        "pruner": "none",
        "seed": 0,
        "max_failures": None,
    }
    given = list(arguments or (LR, "agent.n_step=range(1,6)", "total_env_steps=100"))
    return Search(folder=folder, arguments=given, loader=None, **(settings | changes))


class Launcher:
    """Takes the place of Hydra's launchers: each job's return is its n_step."""

    def __init__(self, failing: tuple[int, ...] = (), dies_at: int | None = None) -> None:
        self.numbers, self.overrides = [], []
        self._failing, self._dies_at = failing, dies_at

    def __call__(self, batch, first) -> list[JobReturn]:
        out = []
        for number, overrides in enumerate(batch, start=first):
            if number == self._dies_at:
                raise KeyboardInterrupt
            self.numbers.append(number)
            self.overrides.append(overrides)
            value = float(dict(text.partition("=")[::2] for text in overrides)["agent.n_step"])
            failed = number in self._failing
            status = JobStatus.FAILED if failed else JobStatus.COMPLETED
            summary = {"state": "finished", "evaluation_return": value}
            out.append(JobReturn(status=status, _return_value=summary))
        return out


def states(folder) -> list[str]:
    study = optuna.load_study(study_name="rlx", storage=f"sqlite:///{folder / 'study.db'}")
    return [trial.state.name for trial in study.trials]


def test_a_search_that_is_left_goes_on_with_its_trials(tmp_path):
    first = Launcher(failing=(1,), dies_at=3)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path).run(first)
    assert states(tmp_path) == ["COMPLETE", "FAIL", "FAIL", "FAIL"]
    second = Launcher()
    found = search(tmp_path).run(second)
    assert second.numbers == [4, 5]  # no folder of before is used again, and six are enough
    best = max(first.overrides[:1] + second.overrides, key=lambda given: given[2])
    assert f"agent.n_step={found['best']['agent.n_step']}" == best[2]
    assert all(given[0] == "total_env_steps=100" for given in second.overrides)
    assert (tmp_path / "search.png").stat().st_size > 10_000
    third = Launcher()
    assert search(tmp_path).run(third) == found
    assert not third.numbers


def test_a_search_that_goes_on_draws_other_trials(tmp_path):
    first, second = Launcher(), Launcher()
    search(tmp_path, sampler="random", n_trials=3).run(first)
    search(tmp_path, sampler="random", n_trials=6).run(second)
    assert len({tuple(given) for given in first.overrides + second.overrides}) == 6


def test_a_search_in_which_nothing_could_begin_is_forgotten(tmp_path):
    def refuse(batch, first):
        raise Refused("rlx: agent.n_stp: no such setting")

    with pytest.raises(Refused):
        search(tmp_path, "agent.n_stp=1,2").run(refuse)
    right = Launcher()
    search(tmp_path, "agent.n_step=3,4").run(right)
    assert right.numbers == list(range(6))
    with pytest.raises(Refused):
        search(tmp_path, "agent.n_step=3,4", n_trials=8).run(refuse)
    assert states(tmp_path) == ["COMPLETE"] * 6 + ["FAIL"] * 2


def test_the_last_of_two_values_counts_and_is_handed_on_as_it_was_written(tmp_path):
    given = [LR, "agent.n_step=range(1,6)", "agent.n_step=2", "~tags", "a='x, y'"]
    launcher = Launcher()
    search(tmp_path, *given, n_trials=1).run(launcher)
    assert launcher.overrides[0][:3] == ["agent.n_step=2", "~tags", "a='x, y'"]
    assert len(launcher.overrides[0]) == 4


def test_a_study_lies_in_any_folder(tmp_path):
    folder = tmp_path / "a {b} 50%20 c?d=1 [é]"
    search(folder, n_trials=1).run(Launcher())
    assert (folder / "study.db").exists()


def test_values_of_a_file_are_written_as_on_the_command_line():
    config = OmegaConf.create({"a": None, "b": [1, None, "x"], "c": "range(1,3)", "d": True})
    assert [as_text(v) for v in config.values()] == ["null", '[1, null, "x"]', "range(1,3)", "true"]


def test_another_search_in_the_same_folder_is_refused(tmp_path):
    search(tmp_path).run(Launcher())
    with pytest.raises(Refused, match=r"was begun with .*range\(1,6\).* where now .*range\(1,9\)"):
        search(tmp_path, LR, "agent.n_step=range(1,9)", "total_env_steps=100")
    with pytest.raises(Refused, match="direction=minimize: this study was begun with maximize"):
        search(tmp_path, direction="minimize")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"direction": "up"}, "hydra.sweeper.direction=up: accepted: maximize, minimize"),
        ({"sampler": "cma"}, "hydra.sweeper.sampler=cma: accepted: tpe, random, gp"),
        ({"pruner": "x"}, "hydra.sweeper.pruner=x: accepted: none, median, hyperband"),
        ({"n_trials": 0}, "hydra.sweeper.n_trials=0: must be an integer of at least 1"),
        ({"batch": 1.5}, "hydra.sweeper.batch=1.5: must be an integer of at least 1"),
        ({"max_failures": "x"}, "hydra.sweeper.max_failures=x: must be an integer of at least 0"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, says):
    with pytest.raises(Refused, match=says):
        search(tmp_path, **changes)


def test_a_search_of_nothing_is_refused(tmp_path):
    with pytest.raises(Refused, match="nothing is searched"):
        search(tmp_path, "seed=1")


def test_a_metric_that_is_no_number_fails_the_trial(tmp_path):
    with pytest.raises(Refused, match="no trial came to its end"):
        search(tmp_path, n_trials=2, metric="state").run(Launcher())
    assert states(tmp_path) == ["FAIL"] * 2


def test_too_many_failures_end_a_search(tmp_path):
    with pytest.raises(Refused, match=r"2 trials failed \(hydra.sweeper.max_failures=1\)"):
        search(tmp_path, max_failures=1).run(Launcher(failing=(0, 1, 2, 3)))
    assert states(tmp_path) == ["FAIL", "FAIL"]


def test_a_trial_that_falls_behind_is_hopeless(tmp_path):
    study = search(tmp_path, pruner="median", batch=1, n_trials=8)
    verdicts = []

    def launch(batch, first) -> list[JobReturn]:
        own = {"folder": tmp_path / str(first), "sweep": tmp_path}
        job = Job(number=first, overrides=(), command=(), **own)
        job.folder.mkdir()
        value = 1.0 if first == 7 else 10.0
        early = {"env_steps": 50, "evaluation/return_mean": 0.0}
        rows = [early, {"env_steps": 100, "evaluation/return_mean": None}]
        rows += [{"env_steps": 200, "evaluation/return_mean": value}]
        assert not study.is_hopeless(job)  # it has written nothing yet
        (job.folder / "metrics.jsonl").write_text(json.dumps(early) + "\n")
        assert not study.is_hopeless(job)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (job.folder / "metrics.jsonl").write_text(text + '{"env_st')
        verdicts.append(study.is_hopeless(job))
        state = "pruned" if verdicts[-1] else "finished"
        summary = {"state": state, "evaluation_return": value}
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=summary)]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The reported value is ignored")
        study.run(launch)
    assert verdicts == [False] * 7 + [True]
    assert states(tmp_path) == ["COMPLETE"] * 7 + ["PRUNED"]


def test_a_pruned_trial_has_no_value_in_the_figure(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "rlx.sweeps.search._draw_history", lambda axes, study, done: drawn.append(done)
    )
    found = optuna.create_study(direction="maximize")
    for number in range(2):
        trial = found.ask({"x": FloatDistribution(0, 1)})
        trial.report(10.0 + number, 1)
        state = optuna.trial.TrialState.PRUNED if number else None
        found.tell(trial, None if number else 1.0, state=state)
    figures(found, tmp_path)
    assert [trial.value for trial in drawn[0]] == [1.0]
