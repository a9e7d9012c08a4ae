"""A run folder of an earlier rlx (tests/golden) works in every command of today's."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlx
from rlx.problems import ConfigError
from rlx.results import reading as results
from rlx.runs.status import params_sha256
from rlx.watch import open_server

GOLDEN = Path(__file__).parent / "golden" / "run"
SUMMARY = json.loads((GOLDEN / "summary.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that one test may read and add to."""
    copy = tmp_path_factory.mktemp("golden") / "run"
    shutil.copytree(GOLDEN, copy)
    return copy


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A copy of its own for a test that goes on with the run."""
    shutil.copytree(GOLDEN, tmp_path / "run")
    return tmp_path / "run"


def command(*arguments: Any, status: int = 0) -> str:
    """The output of `python -m rlx.<arguments>`, together with its errors."""
    name, *rest = map(str, arguments)
    line = [sys.executable, "-m", f"rlx.{name}", *rest]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_its_parameters_are_read_bit_for_bit(folder):
    loaded = rlx.load(folder)
    assert params_sha256(loaded.params()) == SUMMARY["params_sha256"]
    assert params_sha256(loaded.params("best")) == SUMMARY["params_sha256"]


def test_its_state_is_read_without_log_lines_of_orbax(folder, caplog):
    with caplog.at_level(logging.INFO, "absl"), caplog.at_level(logging.INFO):
        rlx.load(folder).params()
    assert not [record for record in caplog.records if record.name == "absl"]


def test_its_state_is_read_from_a_folder_of_any_name_and_damage_is_named(tmp_path):
    run = tmp_path / "seed=[1,2] back\\slash"
    shutil.copytree(GOLDEN, run)
    assert params_sha256(rlx.load(run).params()) == SUMMARY["params_sha256"]
    (checkpoint,) = (run / "checkpoints").glob("0*")
    data = max((checkpoint / "state").glob("**/d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=rf"{data.name}: damaged"):
        rlx.load(run).params()


def test_it_acts_and_evaluates_from_python(folder):
    loaded = rlx.load(folder)
    action, state = loaded.act(np.zeros(4, np.float32))
    action, _ = loaded.act(np.zeros(4, np.float32), state, reward=1.0)
    assert action in (0, 1)
    # The evaluation that the folder holds is played again, but for rounding on another processor.
    (before,) = json.loads((folder / "evaluation.json").read_text())["evaluations"]
    again = loaded.evaluate(episodes=8, envs=before["envs"], seed=before["seed"])
    same = [a == b for a, b in zip(again["returns"], before["returns"], strict=True)]
    assert sum(same) >= 6, (again["returns"], before["returns"])


def test_evaluate_adds_to_what_was_evaluated_before(own):
    command("evaluate", f"run={own}", "episodes=10")
    found = json.loads((own / "evaluation.json").read_text())
    assert [len(one["returns"]) for one in found["evaluations"]] == [8, 10]
    assert found["evaluations"][1]["updates"] == SUMMARY["updates"]


def test_export_writes_a_file_that_acts(folder):
    assert command("export", f"run={folder}").strip().endswith("agent.zip")
    assert (folder / "agent.zip").stat().st_size > 10_000


def test_report_tells_its_score(own, tmp_path):
    said = command("report", f"runs={own.parent}", f"out={tmp_path / 'report'}")
    assert "1 run: 1 finished" in said
    assert str(SUMMARY["evaluation_return"]) in said  # its evaluation.json has fewer episodes
    assert results.runs(own.parent).loc[0, "env_steps"] == SUMMARY["env_steps"]


def test_watch_shows_it(folder):
    with open_server(folder.parent, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with urllib.request.urlopen(f"{server.url}/api/runs", timeout=60) as answer:
            told = json.load(answer)
        server.shutdown()
    (run,) = told["runs"]
    assert (run["state"], run["env_steps"]) == ("finished", SUMMARY["env_steps"])


def test_resume_goes_on_with_its_replay_and_learner_and_diff_tells_what_changed(folder, own):
    assert "no setting differs" in command("diff", folder, folder)
    command("train", f"resume={own}", "total_env_steps=5000", "evaluation.final_episodes=2")
    told = command("diff", folder, own, status=1)
    assert "total_env_steps" in told
    assert "target_period_updates" not in told
    summary = json.loads((own / "summary.json").read_text())
    assert summary["env_steps"] >= 5000
    assert summary["updates"] > SUMMARY["updates"]
    rows = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    # The replay was restored: the account of trained rows goes on at once.
    assert rows[-1]["replay/ratio"] > 40


def test_settings_that_refer_to_renamed_ones_are_resumed_and_loaded(own):
    config = own / ".hydra" / "config.yaml"
    text = config.read_text()
    referring = text.replace(
        "warmup_updates: 0", "warmup_updates: ${agent.optimizer.decay_updates}"
    )
    assert referring != text
    config.write_text(referring)
    assert rlx.load(own).agent.optimizer.warmup_gradient_steps == 15000
    command("train", f"resume={own}", "total_env_steps=4200", "evaluation.final_episodes=2")
    assert json.loads((own / "summary.json").read_text())["env_steps"] >= 4200
