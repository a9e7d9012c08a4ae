"""Recorded experience: what was delivered is read again, in order, or the file is named."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replay_streams import (
    IN_MEMORY,
    all_blocks,
    blocks_of,
    carry_spec,
    making,
    rollout,
    row_spec,
    sequence_spec,
)

from rlx import trees
from rlx.replay.dataset import Dataset
from rlx.replay.files import experience
from rlx.replay.files.experience import files, read, rollouts
from rlx.replay.prioritized import Prioritized
from rlx.replay.ring.block_spec import BlockSpec
from rlx.replay.ring.storage import Storing
from rlx.replay.ring.stores import make_storage
from rlx.types import Episode, NetInput, Rollout

SEQUENCE = sequence_spec(block_rows=2, length=5)
SHARED: dict[str, Any] = {
    "ratio": 1.0,
    "min_sequences": 1,
    "priority_exponent": 0.9,
    "priority_eta": 0.9,
    "priority_epsilon": 0.001,
    "importance_exponent": 0.6,
    "importance_exponent_final": None,
    "anneal_env_steps": None,
    "importance_scale": "batch",
    "initial_priority": "acting",
    "stratified": False,
    "sequence": SEQUENCE,
    "row_spec": row_spec(),
    "carry_spec": carry_spec(),
    "initial_priorities": lambda rows: rows.inputs.time[:, :1].astype(np.float32),
    "seed": 0,
}


def recording(folder: Path | None, capacity: int = 400, **changes: Any) -> Prioritized:
    record = None if folder is None else str(folder)
    keeping = IN_MEMORY | {"record": record}
    return making(Prioritized, capacity=capacity, lanes=2, **SHARED | keeping | changes)


def dataset(folder: Path, **changes: Any) -> Dataset:
    others = ("record", "shards", "min_env_steps", "devices", "where")
    keeping = {name: value for name, value in IN_MEMORY.items() if name not in others}
    return making(Dataset, path=str(folder), lanes=2, **SHARED | keeping | changes)


def delivered(begin: int, end: int, chain: int = 0) -> Rollout:
    """Blocks of two lanes taking turns, with an episode."""
    some = rollout([(k % 2, chain, k // 2) for k in range(begin, end)], SEQUENCE)
    following: NetInput = trees.tree_map(lambda x: x[:, 0], some.rows.inputs)
    episode = Episode(return_=float(begin), env_steps=3, frames=3, lane=1)
    return dataclasses.replace(some, next=following, episodes=(episode,))


def record(folder: Path, ends: list[int], chain: int = 0) -> Prioritized:
    replay = recording(folder)
    for begin, end in zip([0, *ends], ends, strict=False):
        replay.add(delivered(begin, end, chain))
    replay.close()
    return replay


def test_a_dataset_is_the_replay_that_was_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(experience, "SEGMENT_BYTES", 1000)
    expected = record(tmp_path, [3, 4, 30, 60])
    assert len(files(tmp_path)) == 2
    assert not list(tmp_path.glob(".*"))
    found = dataset(tmp_path)
    assert found.rows == expected.rows == 120
    assert found.startable == expected.startable
    for a, b in zip(blocks_of(expected._ring), blocks_of(found._all._ring), strict=True):
        for mine, its in ((a.leaves, b.leaves),):
            assert all(np.array_equal(leaf, its[path]) for path, leaf in mine.items())
    for _ in range(3):
        mine, its = expected.sample(8), found.sample(8)
        td = np.random.default_rng(0).random((8, 3), np.float32)
        for x, y in zip(trees.flatten(mine).values(), trees.flatten(its).values(), strict=True):
            assert np.array_equal(x, y)
        expected.update_priorities(mine.keys, td)
        found.update_priorities(its.keys, td)


def test_runs_of_one_folder_follow_each_other_without_being_spliced(tmp_path):
    record(tmp_path, [10])
    record(tmp_path, [6])
    record(tmp_path, [8], chain=3)
    chains = [r.chain.tolist() for r in rollouts(tmp_path, row_spec(), carry_spec())]
    assert chains == [[0] * 10, [1] * 6, [5] * 8]
    assert dataset(tmp_path).rows == 2 * 24
    assert np.load(files(tmp_path)[0])["episode/return"].tolist() == [0.0]


def test_another_experience_in_the_same_folder_is_refused(tmp_path):
    record(tmp_path, [10])
    with pytest.raises(ValueError, match=r"holds other experience \(carry/core/0 .*, here"):
        recording(tmp_path, carry_spec=carry_spec(units=7))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"no recorded experience: dataset\.json is missing"):
        recording(tmp_path / "other")


def test_a_dataset_of_another_network_or_block_is_refused(tmp_path):
    record(tmp_path, [10])
    with pytest.raises(ValueError, match=r"another environment, network or agent: carry/core/0"):
        dataset(tmp_path, carry_spec=carry_spec(units=7))
    other = sequence_spec(block_rows=3, length=5)
    with pytest.raises(ValueError, match="blocks of 2 rows, here 3"):
        dataset(tmp_path, sequence=other)
    with pytest.raises(ValueError, match=r"has 6 sequences, min_sequences=7"):
        dataset(tmp_path, min_sequences=7)


def test_experience_of_another_environment_is_told_by_the_file_that_has_it(tmp_path, caplog):
    pong = {"id": "Pong-v5", "scale": None, "options": {"reward_clip": True}}
    other = pong | {"id": "Breakout-v5", "scale": [1.0]}
    replay = recording(tmp_path, env=pong)
    replay.add(delivered(0, 10))
    replay.close()
    dataset(tmp_path, env=pong)
    record(tmp_path, [10])  # its settings are none, as an earlier rlx's
    dataset(tmp_path, env=pong | {"new": 3})  # nor had that one all of today's settings
    assert "was recorded with" not in caplog.text
    replay = recording(tmp_path, env=other)
    replay.add(delivered(0, 10))
    replay.close()
    first, _, last = files(tmp_path)
    for env, path, here in ((other, first, (pong, other)), (pong, last, (other, pong))):
        caplog.clear()
        dataset(tmp_path, env=env)
        (said,) = (r.getMessage() for r in caplog.records if "was recorded" in r.getMessage())
        ids, scales = ([x[name] for x in here] for name in ("id", "scale"))
        shown = ["null" if x is None else str(x) for x in scales]
        says = f"env.id={ids[0]}, here {ids[1]}; env.scale={shown[0]}, here {shown[1]}"
        assert said.startswith(f"{path} was recorded with {says}; its rows are read as if")


def test_a_saved_replay_tells_of_all_environments_that_its_rows_may_be_of():
    one, other = {"id": "Pong-v5", "scale": None}, {"id": "Pong-v5", "scale": [2.0]}
    replay, resumed, again = (recording(None, env=env) for env in (one, other, one))
    replay.add(delivered(0, 10))
    resumed.restore(replay.state(), all_blocks(replay))
    assert json.loads(resumed.state()["envs"]) == [one, other]
    again.restore(resumed.state(), all_blocks(resumed))
    assert json.loads(again.state()["envs"]) == [other, one]
    earlier = {name: value for name, value in replay.state().items() if name != "envs"}
    recording(None, env=other).restore(earlier, all_blocks(replay))


def spoil(folder: Path, how: str) -> str:
    """Changes one file; answers its name."""
    first, second = files(folder)[:2]
    if how == "byte":
        data = bytearray(second.read_bytes())
        data[len(data) // 2] ^= 255
        second.write_bytes(data)
    elif how == "short":
        second.write_bytes(second.read_bytes()[:-20])
    elif how == "gone":
        first.unlink()
        return first.name
    elif how == "foreign":
        np.savez(second, lane=np.zeros(3))
    elif how == "leaf":
        with np.load(second) as file:
            arrays = dict(file) | {"rows/reward": np.zeros((1, 2, 3))}
        np.savez(second, **arrays)
    elif how == "empty":
        second.write_bytes(b"")
    elif how in COLUMNS:
        with np.load(second) as file:
            arrays = dict(file)
        np.savez(second, **arrays | {how.split("=")[0]: COLUMNS[how](arrays)})
    elif how in ("leaves", "nested"):
        about = json.loads((folder / "dataset.json").read_text())
        leaves = {"leaves": {"rows/valid": 3}, "nested": "["}[how]
        text = json.dumps(about | {"leaves": leaves}).replace('"["', "[" * 50_000)
        (folder / "dataset.json").write_text(text)
        return "dataset.json"
    elif how == "about":
        (folder / "dataset.json").write_text("{")
        return "dataset.json"
    elif how == "format":
        about = json.loads((folder / "dataset.json").read_text()) | {"format": 9}
        (folder / "dataset.json").write_text(json.dumps(about))
        return "dataset.json"
    return second.name


COLUMNS = {
    "lane=floats": lambda a: a["lane"].astype(float),
    "lane=high": lambda a: a["lane"] + np.int32(99),
    "chain=short": lambda a: a["chain"][:-1],
    "chain=negative": lambda a: a["chain"] - np.int32(9),
    "number=text": lambda a: np.array(["x"] * len(a["number"])),
    "weights_version=square": lambda a: np.stack([a["weights_version"]] * 2),
    "episode/return=long": lambda a: np.zeros(len(a["episode/return"]) + 1),
    "episode/env_steps=scalar": lambda a: np.int64(3),
    "next/first=wide": lambda a: np.zeros((len(a["lane"]), 7), bool),
}
HOW = ["byte", "short", "gone", "foreign", "leaf", "about", "format", "empty", "leaves", "nested"]


@pytest.mark.parametrize("how", [*HOW, *COLUMNS])
def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path, monkeypatch, how):
    monkeypatch.setattr(experience, "SEGMENT_BYTES", 1000)
    record(tmp_path, [10, 20, 30])
    name = spoil(tmp_path, how)
    with pytest.raises(ValueError, match=name):
        list(read(tmp_path))
    with pytest.raises(ValueError, match=name):
        dataset(tmp_path)
    done = report(f"dataset={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert name in done.stderr


def report(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "rlx.report", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_report_says_what_is_in_it(tmp_path):
    record(tmp_path, [10, 20])
    record(tmp_path, [6])
    done = report(f"dataset={tmp_path}")
    assert done.returncode == 0, done.stderr
    told = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert told["runs"] == "2"
    assert told["blocks"] == "26 of 2 rows"
    assert told["env"].split(None, 1)[1] == "52 (0 rows are none)"
    assert told["lanes"] == "2 of 2, in 4 unbroken streams"
    assert told["episodes"].startswith("3; return mean 3.333, median 0, 0 .. 10; 3 env steps each")
    assert told["rows/reward"] == "float32[]"
    for arguments in ((), ("dataset=/nowhere",), ("data=x",)):
        assert report(*arguments).returncode == 2


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/x")):
        with pytest.raises(ValueError, match=r"replay\.record=.* cannot be written"):
            recording(folder)
        with pytest.raises(ValueError, match=r"replay\.storage=mmap needs 0\.00 GB in "):
            make_storage(
                Storing(storage="mmap", folder=folder),
                BlockSpec(sequence=SEQUENCE, row=row_spec(), carry=carry_spec()),
                slots=12,
            )


def test_what_was_flushed_survives_a_kill(tmp_path):
    replay = recording(tmp_path)
    replay.add(delivered(0, 5))
    replay.flush()
    replay.add(delivered(5, 9))
    assert [len(arrays["lane"]) for _, arrays, _ in read(tmp_path)] == [5]
    replay.close()
    assert [len(arrays["lane"]) for _, arrays, _ in read(tmp_path)] == [5, 4]


def test_a_folder_in_which_nothing_was_recorded_may_be_used_again(tmp_path):
    recording(tmp_path).close()
    (tmp_path / ".dataset.json").write_text("{")  # a kill in the middle
    recording(tmp_path, carry_spec=carry_spec(units=7)).close()
    (tmp_path / "my-notes.npz").write_text("not ours")
    with pytest.raises(ValueError, match="recorded nothing yet"):
        files(tmp_path)


def test_what_cannot_be_written_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(experience, "SEGMENT_BYTES", 1)
    replay = recording(tmp_path / "gone")
    for path in (tmp_path / "gone").iterdir():
        path.unlink()
    (tmp_path / "gone").rmdir()
    replay.add(delivered(0, 3))
    with pytest.raises(OSError, match="gone"):
        replay.close()


def test_a_stopped_training_from_a_dataset_goes_on(tmp_path):
    record(tmp_path, [40])
    replay, other = dataset(tmp_path), dataset(tmp_path, seed=7)
    replay.add(dataclasses.replace(delivered(0, 0), env_steps=30))
    sample = replay.sample(8)
    replay.update_priorities(sample.keys, np.full((8, 3), 5.0, np.float32))
    assert not replay.rings  # a snapshot has nothing to write
    other.restore(replay.state(), [])
    assert other.env_steps == 30
    assert np.array_equal(other.sample(8).keys, replay.sample(8).keys)
    (tmp_path / "other").mkdir()
    record(tmp_path / "other", [40])  # as many blocks, another record
    with pytest.raises(ValueError, match="the dataset has changed"):
        dataset(tmp_path / "other").restore(replay.state(), [])


@pytest.mark.parametrize(
    "changes",
    [{"stride": 4}, {"burn_in": 2}, {"unroll": 2, "burn_in": 3}, {"n_step": 3}],
    ids=lambda changes: next(iter(changes)),
)
def test_leaves_of_other_starts_are_not_taken_over(tmp_path, changes):
    record(tmp_path, [30, 60])
    saved = dataset(tmp_path).state()
    other = dataset(tmp_path, sequence=dataclasses.replace(SEQUENCE, **changes))
    with pytest.raises(ValueError, match=r"another layout \(sequence .*replay=false"):
        other.restore(saved, [])
    dataset(tmp_path).restore(saved, [])
    earlier = {name: value for name, value in saved.items() if name != "layout"}
    dataset(tmp_path).restore(earlier, [])


@pytest.mark.parametrize("lanes", ["4", 0, None, True])
def test_a_dataset_without_lanes_is_damaged(tmp_path, lanes):
    record(tmp_path, [10])
    about = json.loads((tmp_path / experience.FILE).read_text())
    (tmp_path / experience.FILE).write_text(json.dumps(about | {"lanes": lanes}))
    with pytest.raises(ValueError, match=r"damaged: leaves, block_rows or lanes are none"):
        dataset(tmp_path)
