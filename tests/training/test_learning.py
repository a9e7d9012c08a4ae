"""Small runs that have to learn: the whole path, from environment to greedy evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rlx
from rlx.runs.folders import read_rows


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    quiet = ["logging.console=off", "logging.tensorboard=false", "checkpoint.replay=false"]
    return rlx.run(rlx.compose([*overrides, *quiet]), folder)


def test_catch_is_learnt(tmp_path):
    """A random paddle gets -0.6 on average, a perfect one 1."""
    summary = run(tmp_path, "experiment=catch", "total_env_steps=15_000", "seed=1")
    assert summary["evaluation_return"] > 0.8


def test_hidden_velocities_are_remembered(tmp_path):
    """Without memory the pole falls after about 60 env steps (experiments/recurrence)."""
    summary = run(tmp_path, "total_env_steps=40_000", "evaluation.every_env_steps=10_000")
    found = [row["evaluation/return_mean"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert max(value for value in found if value is not None) > 150
    assert summary["updates"] > 2000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_default_run_solves_its_task(tmp_path, seed):
    """About 70 s each; at least four of the five seeds must pass 450 (see README.md)."""
    assert run(tmp_path, f"seed={seed}")["evaluation_return"] >= 450


@pytest.mark.slow
@pytest.mark.xdist_group("in turn")  # as all tests with Ray
@pytest.mark.parametrize(
    "overrides",
    [
        ["acting=threads"],
        ["acting=ray_pool", "acting.instances=2"],
        ["acting=ray_pool", "acting.instances=2", "acting.inference=server"],
    ],
    ids=["threads", "ray_pool", "server"],
)
def test_other_pools_solve_it_too(tmp_path, overrides):
    """Two to four minutes each."""
    assert run(tmp_path, "seed=0", *overrides)["evaluation_return"] >= 450
