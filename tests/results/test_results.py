"""Runs as tables, from a real sweep with a failed run in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlx.results import figures as report_figures
from rlx.results import reading as results
from rlx.results import study, tables
from rlx.runs.folders import read_rows


def begun(folder: Path, state: str | None = None, **settings) -> Path:
    """Makes what a run leaves that was killed early: its configuration, and perhaps a state."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(settings))
    if state:
        (folder / "status.json").write_text(json.dumps({"state": state, "error": None}))
    return folder


def copied(run: Path, folder: Path) -> Path:
    """A run's folder without its checkpoints, to be changed."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    return folder


def test_every_row_of_every_run_is_there_with_what_varies(sweep):
    table = results.load(sweep)
    assert list(table)[:5] == ["run", "state", "exploration", "seed", "env_steps"]
    assert sorted(set(table["run"])) == ["0", "1", "2", "3"]
    for run, exploration, seed in (("0", "ladder", 0), ("1", "ladder", 1), ("2", "constant", 0)):
        rows, mine = read_rows(sweep / run / "metrics.jsonl"), table[table["run"] == run]
        assert len(rows) == 8
        assert mine["env_steps"].tolist() == [row["env_steps"] for row in rows]
        assert mine["learner/loss"].dropna().tolist() == [
            row["learner/loss"] for row in rows if row["learner/loss"] is not None
        ]
        assert set(mine["exploration"]) == {exploration}
        assert set(mine["seed"]) == {seed}
        assert set(mine["state"]) == {"finished"}


def test_a_runs_own_folder_is_a_table_of_that_run(sweep):
    table = results.load(sweep / "2")
    assert set(table["run"]) == {"2"}
    assert list(table)[:3] == ["run", "state", "env_steps"]  # nothing varies in one run


def test_failed_runs_are_listed_with_their_error(sweep):
    table = results.runs(sweep).set_index("run")
    assert table["state"].tolist() == ["finished", "finished", "finished", "failed"]
    assert table.loc["3", "error"].startswith("NonFinite: ")
    summary = json.loads((sweep / "0" / "summary.json").read_text())
    assert table.loc["0", "evaluation"] == summary["evaluation_return"]
    assert table.loc["0", "training"] == summary["train_return"]
    assert table.loc["0", "env_steps"] == summary["env_steps"]
    assert 0 < table.loc["3", "env_steps"] < summary["env_steps"]


def test_the_newest_evaluation_counts(sweep, tmp_path):
    run = copied(sweep / "0", tmp_path / "run")
    (run / "evaluation.json").write_text('{"evaluations": [{"mean": 1.0}, {"mean": 2.5}]}')
    assert results.runs(tmp_path)["evaluation.json"].tolist() == [2.5]


def test_runs_without_a_process_or_a_state_are_listed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    died = begun(tmp_path / "a", "running", seed=0)
    os.utime(begun(tmp_path / "b", seed=1) / ".hydra" / "config.yaml", (0, 0))
    working = begun(tmp_path / "c" / "10", "running", seed=2)
    begun(tmp_path / "c" / "9", "interrupted", seed=3)
    for folder, pid in ((died, ended.pid), (working, os.getpid())):
        path = folder / "status.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": pid}))
    table = results.runs(tmp_path)
    assert table["run"].tolist() == ["a", "b", "c/9", "c/10"]
    assert table["state"].tolist() == ["died", "died", "interrupted", "running"]
    assert f"process {ended.pid} is gone" in table["error"][0]
    assert "left no status.json" in table["error"][1]
    assert len(results.load(tmp_path)) == 4  # without metrics, but there


def test_a_damaged_metrics_file_is_told_and_hides_no_run(sweep, tmp_path):
    run = copied(sweep / "0", tmp_path / "run")
    (run / "metrics.jsonl").write_bytes(b"{broken\n" + (run / "metrics.jsonl").read_bytes())
    table = results.runs(tmp_path)
    assert "line 1: not a row of metrics" in table["error"][0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", None),
        (".hydra/config.yaml", "[1]"),
        (".hydra/hydra.yaml", "[1]"),
        (".hydra/hydra.yaml", "hydra:"),
        (".hydra/hydra.yaml", "hydra: {runtime: {choices: {agent: [1]}}}"),
        (".hydra/overrides.yaml", "5"),
        (".hydra/overrides.yaml", "[1, [2]]"),
        ("evaluation.json", '{"evaluations": [3]}'),
        ("evaluation.json", '{"evaluations": {"a": 3}}'),
        ("summary.json", '{"evaluation_return": NaN, "train_return": "x"}'),
    ],
)
def test_files_that_hold_anything_hide_no_run(tmp_path, name, content):
    run, _ = (begun(tmp_path / which, "finished", seed=1) for which in "ab")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).mkdir() if content is None else (run / name).write_text(content)
    table = results.runs(tmp_path)
    assert table["run"].tolist() == ["a", "b"]
    assert table[["evaluation.json", "evaluation", "training"]].isna().all(axis=None)
    assert (table["error"][0] is not None) == (content is None)


def test_a_folder_that_may_not_be_read_hides_no_other(sweep, tmp_path, closed):
    copied(sweep / "0", tmp_path / "open")
    assert results.runs(tmp_path)["run"].tolist() == ["open"]


def test_settings_are_those_of_the_last_resume(tmp_path):
    run = begun(tmp_path / "run", total_env_steps=10)
    for number in (2, 10):
        later = run / ".hydra" / f"resume-{number}" / "config.yaml"
        later.parent.mkdir()
        later.write_text(f"total_env_steps: {number}\nresume: {run}\n")
    (found,) = results.read(tmp_path)
    assert found.settings["total_env_steps"] == 10


def test_settings_that_change_nothing_that_is_learnt_make_no_groups(tmp_path):
    for number, kept in enumerate((True, False)):
        begun(tmp_path / str(number), seed=number, compile_cache=kept, resume=str(number))
    assert results.varying(results.read(tmp_path)) == ["seed"]


def test_settings_that_follow_from_a_choice_are_left_out_unless_named(tmp_path):
    for number, name in enumerate(("mlp", "gru")):
        run = begun(tmp_path / name, network={"core": {"units": number}}, rate=number, seed=number)
        choices = {"hydra": {"runtime": {"choices": {"network": name, "hydra/env": name}}}}
        (run / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(choices))
        (run / ".hydra" / "overrides.yaml").write_text(f"- +rate={number}\n- network={name}\n")
    assert results.varying(results.read(tmp_path)) == ["network", "rate", "seed"]
    resume = run / ".hydra" / "resume-1"
    resume.mkdir()
    shutil.copy(run / ".hydra" / "config.yaml", resume)
    (resume / "overrides.yaml").write_text("- resume=x\n- network.core.units=64\n")
    varying = results.varying(results.read(tmp_path))
    assert varying == ["network", "network.core.units", "rate", "seed"]
    (tmp_path / "gru" / ".hydra" / "hydra.yaml").unlink()
    assert results.varying(results.read(tmp_path)) == ["network.core.units", "rate", "seed"]


def test_lists_that_vary_can_be_grouped_by(tmp_path):
    begun(tmp_path / "a", layers=[8], same=[1])
    begun(tmp_path / "b", layers=[8, 8], same=[1])
    table = results.runs(tmp_path)
    assert table.groupby("layers").size().to_dict() == {"[8]": 1, "[8, 8]": 1}
    assert "same" not in table


def test_a_folder_without_runs_and_a_missing_pandas_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has no run in it"):
        results.load(tmp_path)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'rlx\[report\]'"):
        results.load(tmp_path)


@pytest.mark.parametrize("name", ["wall_s", "updates", "frames"])
@pytest.mark.parametrize("is_there", [True, False])
def test_rows_of_another_version_make_tables_without_what_they_lack(
    sweep, tmp_path, name, is_there
):
    run = copied(sweep / "0", tmp_path / "run")
    rows = [{k: v for k, v in row.items() if k != name} for row in read_rows(run / "metrics.jsonl")]
    rows = [row | {name: None} if is_there else row for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = study.study(tmp_path)
    (speed,) = tables.speed(given)
    assert np.isnan(speed["updates/s"]) == (name != "frames")
    assert np.isnan(speed["env steps/s"]) == (name == "wall_s")
    assert report_figures.learning(given, "frames") is None
