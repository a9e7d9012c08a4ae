"""Differences between runs: real ones, one of them resumed with other settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlx import diff
from rlx.config import moved
from rlx.problems import ConfigError
from tests.training.test_run import ROOT, TINY

# They never begin to learn, so that nothing is compiled for that.
QUICK = [*TINY, "replay.min_sequences=900", "evaluation.final_episodes=0", "total_env_steps=200"]
RUNS = """
import shutil, sys
from rlx import train
folder, *quick = sys.argv[1:]
def run(*arguments):
    sys.argv[1:] = arguments
    train.main()
run(*quick, f"hydra.run.dir={folder}/a")
shutil.copytree(f"{folder}/a", f"{folder}/resumed")
run(f"resume={folder}/resumed", "total_env_steps=400", "agent.optimizer.learning_rate=2e-3")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    arguments = [sys.executable, "-c", RUNS, str(folder), *QUICK]
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of a run that a test may spoil."""
    return Path(shutil.copytree(runs / "a", tmp_path / "copied"))


def differing(section: str, a: Path, b: Path) -> dict[str, tuple[object, object]]:
    return {row.name: (row.a, row.b) for row in diff.compare(a, b) if row.section == section}


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlx.diff", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_of_a_resumed_run_the_settings_of_its_newest_part_count(runs):
    assert differing("configuration", runs / "a", runs / "resumed") == {
        "total_env_steps": (200, 400),
        "agent.optimizer.learning_rate": (1e-3, 2e-3),
    }
    result = differing("result", runs / "a", runs / "resumed")
    assert result["resumes"] == (0, 1)
    assert result["env_steps"][1] >= 400


def test_the_tenth_resume_is_newer_than_the_second(copied, runs):
    for number, steps in ((2, 22), (10, 1010), (9, 99)):
        folder = copied / ".hydra" / f"resume-{number}"
        folder.mkdir()
        (folder / "config.yaml").write_text(f"total_env_steps: {steps}\n")
    assert diff.read_settings(copied) == {"total_env_steps": 1010, **moved.ADDED_ROOT}


def test_code_versions_and_machine(copied, runs):
    env = json.loads((copied / "env.json").read_text())
    versions = env["versions"] | {"jax": "0.0.1", "envpool": None}
    changed = env | {"git": "0" * 40, "platform": "Elsewhere", "versions": versions, "gpu": "none"}
    (copied / "env.json").write_text(json.dumps(changed))
    (copied / "git.diff").write_text("diff --git a b\n--- a\n+++ b\n+one\n+two\n-three\n")
    assert differing("code", runs / "a", copied).keys() == {"git", "git.diff"}
    assert differing("versions", runs / "a", copied) == {
        name: (env["versions"][name], versions[name]) for name in ("jax", "envpool")
    }
    assert differing("machine", runs / "a", copied) == {
        "platform": (env["platform"], "Elsewhere"),
        "gpu": (diff.ABSENT, "none"),
    }
    assert "+2 -1 lines in 1 file" in diff.table(diff.compare(runs / "a", copied), 100)


def test_groups_are_side_by_side_and_what_one_run_has_not_is_absent(copied, runs):
    path = copied / ".hydra" / "config.yaml"
    text = path.read_text().replace("seed: 0", "seed: 1").replace("    units: 8\n", "")
    text = text.replace("rlx.networks.cores.LSTM", "rlx.networks.cores.GRU")
    path.write_text(text)
    rows = [row for row in diff.compare(runs / "a", copied) if row.section == "configuration"]
    assert [row.name for row in rows] == ["seed", "network.core._target_", "network.core.units"]
    assert (rows[2].a, rows[2].b) == (8, diff.ABSENT)


def test_the_table_fits_and_keeps_the_difference_in_sight(runs):
    long = "x" * 200
    row = diff.Difference(
        section="result", name="words", a=f"{long}one{long}", b=f"{long}two{long}"
    )
    for columns in (60, 80, 120):
        *_, line = diff.table([row], columns).splitlines()
        assert len(line) <= columns
        assert "one" in line
        assert "two" in line
    near = diff.Difference(section="configuration", name="rate", a=0.1, b=0.1 + 1e-12)
    assert "0.100000000001" in diff.table([near], 80)


def test_exit_status_says_whether_a_setting_differs(runs, copied):
    summary = json.loads((copied / "summary.json").read_text()) | {"updates": 7}
    (copied / "summary.json").write_text(json.dumps(summary))
    same = command(runs / "a", copied)
    assert (same.returncode, same.stderr) == (0, "")
    assert "no setting differs" in same.stdout
    assert same.stdout.split()[-3:] == ["updates", "0", "7"]
    other = command(runs / "a", runs / "resumed")
    assert (other.returncode, other.stderr) == (1, "")
    (line,) = (line for line in other.stdout.splitlines() if "learning_rate" in line)
    assert line.split() == ["agent.optimizer.learning_rate", "0.001", "0.002"]


def test_bad_input_is_one_line_and_status_2(copied, runs, monkeypatch, capsys):
    def told(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["rlx.diff", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            diff.main()
        assert left.value.code == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    assert "accepted: RUN_A RUN_B" in told(runs / "a")
    assert "no run is there" in told(runs / "a", runs)
    (copied / "summary.json").write_text("{")
    assert f"run={copied}/summary.json: cannot be read" in told(runs / "a", copied)
    (copied / ".hydra" / "config.yaml").write_text("a: [1")
    assert f"run={copied}/.hydra/config.yaml: cannot be read" in told(copied, runs / "a")
    with pytest.raises(ConfigError):
        diff.compare(copied, runs / "a")
