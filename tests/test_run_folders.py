"""What the folder of a run says: its settings now, its state, where runs are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rlx

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a run that a test may go on with or spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def command(name: str, *arguments: str | Path, status: int = 0) -> str:
    """What `python -m rlx.NAME` prints, errors included."""
    line = [sys.executable, "-m", f"rlx.{name}", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_run_of_an_earlier_rlx_is_loaded_and_resumed(run):
    saved = run / ".hydra" / "config.yaml"
    text = saved.read_text()
    assert "rlx.playing.Evaluation" in text
    saved.write_text(text.replace("rlx.playing.Evaluation", "rlx.evaluate.Evaluation"))
    assert rlx.load(run).cfg.evaluation["_target_"] == "rlx.playing.Evaluation"
    command("train", f"resume={run}", "total_env_steps=600", "evaluation.final_episodes=0")
    now = yaml.safe_load((run / ".hydra" / "resume-1" / "config.yaml").read_text())
    assert (now["evaluation"]["_target_"], now["seed"]) == ("rlx.playing.Evaluation", 0)
    assert now["total_env_steps"] == 600
    assert "rlx.evaluate.Evaluation" in saved.read_text()  # what the run began with stays
