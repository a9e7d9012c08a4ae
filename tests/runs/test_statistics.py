"""Rows of metrics beside their means: spreads, actions, parts of the gradient, names."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from rlx.runs.actions import Actions
from rlx.runs.folders import read_rows
from rlx.runs.metrics import Metrics, is_wall_clock
from rlx.runs.names import MEANINGS, meaning
from rlx.types import BoxSpec, DiscreteSpec, Episode, MultiDiscreteSpec
from tests.runs.test_metrics import SETTINGS
from tests.training.test_run import read, run

ROOT = Path(__file__).resolve().parents[2]


def episodes(*returns: float, task: str = "") -> list[Episode]:
    return [
        Episode(return_=r, env_steps=i + 1, frames=0, lane=0, task=task)
        for i, r in enumerate(returns)
    ]


def test_spreads_are_of_the_window_and_of_its_last_ten(tmp_path):
    settings = SETTINGS.__class__(**{**vars(SETTINGS), "window_episodes": 12})
    returns = [float(x) for x in np.random.default_rng(0).normal(size=20)]
    with Metrics(tmp_path, settings, None) as metrics:
        metrics.episodes(episodes(*returns))
        row = metrics.row(100, 100, 0, 1.0)
    window = returns[-12:]
    assert row["train/return_min"] == min(window)
    assert row["train/return_max"] == max(window)
    assert row["train/return_std"] == pytest.approx(np.std(window))
    assert row["train/return_mean_last_10"] == pytest.approx(np.mean(returns[-10:]))
    assert (row["train/length_min"], row["train/length_max"]) == (9, 20)


def test_before_the_first_episode_there_is_no_spread(tmp_path):
    with Metrics(tmp_path, SETTINGS, None) as metrics:
        row = metrics.row(100, 100, 0, 1.0)
    assert row["train/return_mean"] is None
    assert "train/return_min" not in row


def test_each_task_has_a_window_of_its_own_which_a_checkpoint_keeps(tmp_path):
    with Metrics(tmp_path / "a", SETTINGS, None) as metrics:
        metrics.episodes(episodes(1, 2, 3, 4, task="short"))
        metrics.episodes(episodes(10, task="long"))
        state = metrics.state()
        row = metrics.row(100, 100, 0, 1.0)
    assert row["task/short/return_mean"] == 3.0  # of the last three
    assert row["task/long/return_mean"] == 10.0
    assert row["task/short/length_mean"] == 3.0
    with Metrics(tmp_path / "b", SETTINGS, None) as metrics:
        metrics.restore(state)
        assert metrics.row(100, 100, 0, 1.0)["task/short/return_mean"] == 3.0


# --- actions -------------------------------------------------------------------------------------


def test_shares_of_choices():
    actions = Actions(DiscreteSpec(n=3))
    actions.add(np.array([0, 0, 2, 0], np.int32))
    state = actions.state()
    assert actions.take() == {
        "acting/action_share/0": 0.75, "acting/action_share/1": 0.0, "acting/action_share/2": 0.25
    }  # fmt: skip
    assert actions.take() == {}
    actions.add(np.array([1], np.int32))  # what was told before counts no more
    assert list(actions.take().values()) == [0.0, 1.0, 0.0]
    again = Actions(DiscreteSpec(n=3))
    again.restore(state)
    again.add(np.array([1, 1, 1, 1], np.int32))
    assert again.take()["acting/action_share/1"] == 0.5


def test_shares_of_several_choices_each():
    actions = Actions(MultiDiscreteSpec(counts=(2, 3)))
    actions.add(np.array([[0, 2], [1, 2], [1, 0]], np.int32))
    found = actions.take()
    assert found["acting/action_share/0/1"] == pytest.approx(2 / 3)
    assert found["acting/action_share/1/2"] == pytest.approx(2 / 3)
    assert found["acting/action_share/1/1"] == 0
    assert len(found) == 5


def test_mean_and_deviation_of_real_actions():
    spec = BoxSpec(shape=(2,), low=(-1.0, -1.0), high=(1.0, 1.0))
    drawn = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    actions = Actions(spec)
    actions.add(drawn[:20])
    actions.add(drawn[20:])
    found = actions.take()
    for i in range(2):
        assert found[f"acting/action_mean/{i}"] == pytest.approx(drawn[:, i].mean(), abs=1e-6)
        assert found[f"acting/action_std/{i}"] == pytest.approx(drawn[:, i].std(), abs=1e-6)


def test_of_very_many_choices_nothing_is_told():
    actions = Actions(DiscreteSpec(n=1000))
    actions.add(np.arange(1000, dtype=np.int32))
    assert actions.take() == {}


# --- rows of whole runs --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("statistics") / "run"
    run(folder, "evaluation.every_env_steps=600")
    return read_rows(folder / "metrics.jsonl")


def test_a_run_tells_its_actions_importance_priorities_and_gradients(rows):
    for row in rows:
        shares = [row[f"acting/action_share/{i}"] for i in (0, 1)]
        assert sum(shares) == pytest.approx(1)
        assert all(0 < share < 1 for share in shares)
    last = rows[-1]
    assert 0 < last["replay/importance_min"] <= last["replay/importance_mean"] <= 1
    least, mean, most = (last[f"replay/priority_{name}"] for name in ("min", "mean", "max"))
    assert 0 <= least <= mean <= most
    assert last["replay/priority_std"] <= most - least
    parts = [last[f"learner/grad_norm/{part}"] for part in ("torso", "core", "head")]
    assert max(parts) < last["learner/grad_norm"] < sum(parts)
    # They are means over updates, of which each has exactly this.
    assert np.sqrt(np.square(parts).sum()) == pytest.approx(last["learner/grad_norm"], rel=0.05)
    evaluated = [row for row in rows if row["evaluation/return_mean"] is not None]
    for row in evaluated:
        found = [row[f"evaluation/return_{name}"] for name in ("min", "mean", "max")]
        assert found == sorted(found)
        assert row["evaluation/episodes"] == 4


def test_rows_by_time_come_between_those_by_count(tmp_path, monkeypatch):
    run(tmp_path / "by count", "logging.every_env_steps=1200")
    run(tmp_path / "by time", "logging.every_env_steps=1200", "logging.every_s=0.001")
    count, time = (read_rows(tmp_path / f"by {n}" / "metrics.jsonl") for n in ("count", "time"))
    assert len(count) == 1
    assert len(time) > 5
    steps = [(row["env_steps"], row["updates"]) for row in time]
    assert steps == sorted(set(steps))
    sums = [read(tmp_path / f"by {n}", "summary.json")["params_sha256"] for n in ("count", "time")]
    assert sums[0] == sums[1]


# --- every name ----------------------------------------------------------------------------------


def test_every_name_of_a_row_is_explained(rows):
    """The names that agents with a policy tell: tests/training/test_policy_runs.py."""
    assert {name for row in rows for name in row if meaning(name) is None} == set()


GROUPS = "train|evaluation|acting|learner|replay|weights|time|task|schedule"


def literals() -> set[str]:
    """The names of metrics in rlx's own code; what is put into one is a `*`."""
    found = set()
    for path in (ROOT / "rlx").rglob("*.py"):
        if "bench" in path.parts or path.name in ("names.py", "hooking.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = ""
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            elif isinstance(node, ast.JoinedStr):
                text = "".join(v.value if isinstance(v, ast.Constant) else "*" for v in node.values)
            if re.fullmatch(rf"(?:{GROUPS})/[\w/.*-]*\w|(?:{GROUPS})/[\w/.*-]*\*", text):
                found.add(text)
    return found


# Files, and beginnings and prefixes of names.
OTHER_THAN_METRICS = {
    *("replay/*.npy", "acting/action", "evaluation/*", "evaluation/return", "time/*"),
    *("replay/demonstrations_", "replay/priority_", "train/return"),
}


def test_every_name_in_the_code_is_explained():
    found = literals() - OTHER_THAN_METRICS
    assert len(found) > 60
    assert {name for name in found if meaning(name) is None} == set()


def test_every_explained_name_is_in_the_code():
    """A name is there whole, or in words, of which it is put together."""
    code = [path for path in (ROOT / "rlx").rglob("*.py") if path.name != "names.py"]
    words = set(re.findall(r"[a-z]+", "\n".join(path.read_text() for path in code)))
    whole = literals()
    gone = [
        name
        for name in MEANINGS
        if "/" in name and name not in whole and not set(re.findall(r"[a-z]+", name)) <= words
    ]
    assert gone == []
    assert "nonesuch" not in words


def test_the_page_of_metrics_is_made_of_the_names():
    made = runpy.run_path(str(ROOT / "docs" / "make" / "metrics.py"))
    page = ROOT / "docs" / "metrics.md"
    assert page.read_text() == made["page"](), "run python docs/make/metrics.py --write"
    for name in MEANINGS:
        assert f"| `{name}` | " in page.read_text()


def test_only_names_of_a_clock_differ_between_runs_of_a_seed():
    assert is_wall_clock("time/acting")
    assert not any(is_wall_clock(n) for n in MEANINGS if n.startswith(("train/", "replay/")))
