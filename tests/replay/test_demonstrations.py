"""Demonstrations beside new experience: shares, keys, priorities, state, and whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import rlx
from rlx import trees
from rlx.config.build import plain
from rlx.problems import ConfigError
from rlx.replay.demonstrations import Demonstrations
from rlx.replay.files.experience import rollouts
from rlx.runs.folders import read_rows
from rlx.training.assemble import build_agent, make_replay, replay_context
from tests.training.test_run import TINY, run

BATCH = 8


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded experience of a small run."""
    folder = tmp_path_factory.mktemp("record")
    run(folder / "run", f"replay.record={folder / 'rows'}")
    return folder / "rows"


def settings(record: Path, *overrides: str) -> list[str]:
    own = ["replay=demonstrations", f"replay.demonstrations.path={record}"]
    return [*TINY, *own, "replay.demonstrations.min_sequences=4", *overrides]


@pytest.fixture
def replay(record):
    """A replay whose own part has the same rows, their rewards raised by 1000."""
    given = plain(rlx.compose(settings(record, "learner.batch_size=8")))
    _, agent = build_agent(given)
    context = replay_context(agent, given["env"], 4, 0, ())
    made = make_replay(given["replay"], context, BATCH)
    for rollout in rollouts(record, context.row_spec, context.carry_spec):
        rows = rollout.rows
        made.add(trees.rebuild(rollout, trees.children(rollout) | {
            "rows": trees.rebuild(rows, trees.children(rows) | {"reward": rows.reward + 1000})
        }))  # fmt: skip
    yield made
    made.close()


def test_a_batch_has_its_share_of_each_and_says_which_is_which(replay):
    for _ in range(20):
        sample = replay.sample(BATCH)
        is_own = sample.keys >= 0
        assert is_own.tolist() == [True] * 6 + [False] * 2
        reward = sample.batch.rows.reward
        assert (reward[is_own] >= 999).all()
        assert (reward[~is_own] < 999).all()
        assert reward.shape[0] == len(sample.batch.importance) == BATCH
        assert sample.batch.next.first.shape == (BATCH,)
        assert all(leaf.shape[0] == BATCH for leaf in trees.flatten(sample.batch.carry).values())


def test_a_batch_is_overwritten_no_earlier_than_after_two_more(replay):
    first = replay.sample(BATCH).batch.rows.reward
    kept = first.copy()
    replay.sample(BATCH)
    replay.sample(BATCH)
    np.testing.assert_array_equal(first, kept)


def test_priorities_reach_the_replay_that_the_sequence_is_of(replay):
    """Sequences that were given a high priority are drawn from then on, in each part alone."""
    sample = replay.sample(BATCH)
    trained = sample.batch.rows.reward.shape[1]
    chosen = {False: int(sample.keys[0]), True: int(sample.keys[-1])}
    priorities = np.full((BATCH, trained), 1e-6, np.float32)
    for part in (0, -1):
        priorities[part] = 1e6
    replay.update_priorities(sample.keys, priorities)
    drawn = [replay.sample(BATCH).keys for _ in range(10)]
    own = np.concatenate([keys[keys >= 0] for keys in drawn])
    recorded = np.concatenate([keys[keys < 0] for keys in drawn])
    assert np.mean(own == chosen[False]) > 0.9
    assert np.mean(recorded == chosen[True]) > 0.9
    stats = replay.stats()
    assert stats["replay/priority_max"] > 1e5
    assert stats["replay/demonstrations_priority_max"] > 1e5


def test_counts_are_those_of_the_run_s_own(replay, record):
    rows, before = replay.rows, replay.env_steps
    assert before > 0
    assert replay.nbytes > replay._own.nbytes
    assert replay.startable == replay._own.startable
    assert len(replay.rings) == 1
    assert rows == replay._own.rows


@pytest.mark.parametrize(("share", "size"), [(0.01, 0), (0.99, 8)])
def test_a_share_that_gives_none_or_all_is_refused(share, size, record, tmp_path):
    with pytest.raises(ConfigError, match=rf"replay\.share={share}.*gives {size} of the 8"):
        rlx.run(
            rlx.compose(settings(record, f"replay.share={share}", "learner.batch_size=8")), tmp_path
        )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["replay.prefetch=1"], "replay.prefetch=1: both replays give their part"),
        (["replay.storage=device"], "replay.storage=device: a batch is put together"),
        (["replay.where=process"], "replay.where=process: both replays lie in the learner's"),
        (["replay.shards=2"], "replay.shards=2: the run's own part of a batch is drawn from one"),
        (
            ["replay.demonstrations.min_sequences=99999"],
            "replay.demonstrations: ",
        ),
        (["replay.min_env_steps=9999"], "replay.min_env_steps=9999: learning would never"),
        (["replay.demonstrations.path=/nowhere"], "/nowhere"),
        (["replay.demonstrations.path=null"], "replay.demonstrations: set its path to a folder"),
        (["network.core.units=6"], "recorded with another environment, network or agent"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(given, says, record, tmp_path):
    with pytest.raises(ConfigError) as caught:
        rlx.run(rlx.compose(settings(record, *given)), tmp_path)
    assert says in str(caught.value)


@pytest.mark.parametrize("exponent", [0.9, 0.0])
def test_a_run_learns_from_both_and_resumes(exponent, record, tmp_path):
    more = [f"replay.priority_exponent={exponent}"]
    first = rlx.run(rlx.compose(settings(record, *more)), tmp_path)
    assert first["updates"] > 0
    again = settings(record, *more, f"resume={tmp_path}", "total_env_steps=1600")
    last = rlx.run(rlx.compose(again), tmp_path)
    assert last["updates"] > first["updates"]
    row = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert row["replay/demonstrations_priority_mean"] > 0


def test_a_share_that_changes_counts_anew_and_may_come_to_none(replay):
    before = replay.sample(BATCH)
    for share, count in {0.5: 4, 0.0: 0, 0.125: 1}.items():
        replay.change({"share": share})
        for _ in range(4):
            sample = replay.sample(BATCH)
            assert (sample.keys < 0).sum() == count
            assert sample.batch.importance.shape == (BATCH,)
            own = sample.batch.rows.reward[sample.keys >= 0]
            assert (own >= 999).all()
        replay.update_priorities(sample.keys, np.ones(sample.batch.rows.reward.shape, np.float32))
    assert before.keys.shape == (BATCH,)


def test_each_part_is_told_its_own_numbers(replay):
    """An exponent of 0 corrects nothing: importance is 1, in that part alone."""
    sample = replay.sample(BATCH)
    uneven = np.arange(1, 1 + sample.batch.rows.reward.size, dtype=np.float32)
    replay.update_priorities(sample.keys, uneven.reshape(sample.batch.rows.reward.shape))
    for changed, is_told in {
        "demonstrations.importance_exponent": lambda keys: keys < 0,
        "importance_exponent": lambda keys: keys >= 0,
    }.items():
        replay.change({"importance_exponent": 0.9, "demonstrations.importance_exponent": 0.9})
        replay.change({changed: 0.0})
        drawn = [replay.sample(BATCH) for _ in range(20)]
        told = np.concatenate([s.batch.importance[is_told(s.keys)] for s in drawn])
        others = np.concatenate([s.batch.importance[~is_told(s.keys)] for s in drawn])
        assert (told == 1).all()
        assert (others < 0.99).any()


def test_a_share_falls_over_a_run(record, tmp_path):
    points = "{setting: replay.share, over: env_steps, points: [[0, 0.5], [600, 0]], between: step}"
    done = rlx.run(rlx.compose(settings(record, f"schedules=[{points}]")), tmp_path)
    assert done["updates"] > 10
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [rows[0]["schedule/replay.share"], rows[-1]["schedule/replay.share"]] == [0.5, 0.0]


def test_a_share_that_leaves_none_of_the_run_s_own_is_refused(record, tmp_path):
    points = "{setting: replay.share, over: env_steps, points: [[0, 0.9]], between: step}"
    with pytest.raises(ConfigError, match="a batch of 4 would have no sequence of the run's own"):
        rlx.run(rlx.compose(settings(record, f"schedules=[{points}]")), tmp_path)


def test_the_same_seed_gives_the_same_bits(record, tmp_path):
    sums = [
        rlx.run(rlx.compose(settings(record)), tmp_path / name)["params_sha256"] for name in "ab"
    ]
    assert sums[0] == sums[1]


def test_what_is_read_is_not_recorded_into(record, tmp_path, monkeypatch):
    monkeypatch.chdir(record.parent)
    into = f"replay.record={record.name}"
    with pytest.raises(ConfigError, match=r"replay\.record=.*: the demonstrations lie there"):
        rlx.run(rlx.compose(settings(record, into)), tmp_path)


def test_another_dataset_at_a_resume_is_refused(record, tmp_path):
    rlx.run(rlx.compose(settings(record)), tmp_path / "run")
    run(tmp_path / "more", f"replay.record={tmp_path / 'rows'}", "seed=3")
    resume = [f"resume={tmp_path / 'run'}", "total_env_steps=1600"]
    with pytest.raises(ConfigError, match="the dataset has changed since"):
        rlx.run(rlx.compose(settings(tmp_path / "rows", *resume)), tmp_path / "run")
    anew = [*resume, "checkpoint.replay=false"]
    done = rlx.run(rlx.compose(settings(tmp_path / "rows", *anew)), tmp_path / "run")
    assert done["env_steps"] >= 1600


def test_the_importance_of_demonstrations_may_be_annealed_over_the_run(record, tmp_path):
    annealed = [
        "replay.demonstrations.importance_exponent_final=1.0",
        "replay.demonstrations.anneal_env_steps=1000",
    ]
    made = []
    close = Demonstrations.close

    def noted(replay: Demonstrations) -> None:
        made.append(replay._recorded._all.importance_exponent)
        close(replay)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Demonstrations, "close", noted)
        rlx.run(rlx.compose(settings(record, *annealed)), tmp_path)
    assert made[-1] == 1.0
