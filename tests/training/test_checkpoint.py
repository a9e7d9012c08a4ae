"""Checkpoints on real files: exact, atomic under kill -9, and checked when read."""

import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import yaml

from rlx.replay.files.segments import write_segment
from rlx.replay.files.snapshots import Snapshots
from rlx.replay.uniform import Uniform
from rlx.training import checkpoint as c
from rlx.training import checkpoint_files as files
from rlx.training import checkpoint_state as state_files
from rlx.trees import register
from rlx.types import TrainState
from tests.replay.replay_streams import (
    IN_MEMORY,
    all_blocks,
    carry_spec,
    making,
    rollout,
    row_spec,
    sequence_spec,
)

SETTINGS = c.Checkpoint(every_env_steps=1, keep=2, replay=True, exact=False)
WARNINGS = "rlx.training.checkpoint"


def train_state(seed: int = 0, width: int = 8, key: Any = None) -> TrainState:
    register()
    rng = np.random.default_rng(seed)
    core = {
        "w": rng.standard_normal((4, width)).astype(np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    params = {"core": core, "half": jnp.asarray(rng.standard_normal(3), jnp.bfloat16)}
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3), optax.identity())
    opt_state = optimiser.init(jax.tree.map(jnp.asarray, params))
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(seed, x.dtype), opt_state)
    return TrainState(
        params=params,
        target_params=jax.tree.map(lambda x: x * 2, params),
        opt_state=opt_state,
        statistics={},
        updates=jnp.int32(2**31 - 1 - seed),
        gradient_steps=jnp.int32(2**31 - 1 - seed),
        key=jax.random.key(seed) if key is None else key,
    )


def bits(tree: Any) -> Any:
    """(structure, [(dtype, shape, bytes)]) of a tree, typed keys among its leaves."""
    leaves, structure = jax.tree.flatten(tree)
    found = []
    for leaf in leaves:
        about = str(leaf.dtype), leaf.shape
        typed = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found.append((*about, np.asarray(jax.random.key_data(leaf) if typed else leaf).tobytes()))
    return structure, found


def save_some(run: Path, *env_steps: int, settings: c.Checkpoint = SETTINGS) -> c.Checkpointer:
    """Checkpoints whose contents tell their env steps."""
    checkpointer = c.Checkpointer(run, settings)
    for n in env_steps:
        replay_state = {"keys": np.arange(n), "chains": {"lane": n}}
        checkpointer.save(n, state=train_state(n), meta={"n": n}, replay_state=replay_state)
    return checkpointer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_yaml_lists_every_setting_and_no_other() -> None:
    node = yaml.safe_load((Path(__file__).parents[2] / "conf/checkpoint/default.yaml").read_text())
    assert node.pop("_target_") == "rlx.training.checkpoint.Checkpoint"
    assert set(node) == {field.name for field in dataclasses.fields(c.Checkpoint)}
    c.Checkpoint(**node)


def test_importing_is_cheap() -> None:
    code = "import sys, rlx.training.checkpoint; print({'jax', 'orbax', 'rich'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"


# --- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["seed=[1,2]", "{a}", "a*", "what?", "two words", "back\\slash", "per%20cent", "ü\n"]
)
def test_any_name_of_a_folder_will_do(tmp_path: Path, name: str) -> None:
    checkpointer = save_some(tmp_path / name / "run [1]", 5, 6)
    restored = checkpointer.restore(train_state(), checkpointer.paths()[0])
    assert bits(restored.state) == bits(train_state(5))
    assert restored.replay_state == {"keys": pytest.approx(np.arange(5)), "chains": {"lane": 5}}


def test_a_state_that_is_not_read_as_it_was_written_is_no_checkpoint(
    tmp_path: Path, monkeypatch
) -> None:
    checkpointer = save_some(tmp_path, 5)

    # A disk that loses what it was given: the state's file is there, and it is cut, or older.
    def lost(path: Path, arrays: Any, about: Any) -> None:
        write_segment(path, arrays, about)
        path.write_bytes(path.read_bytes()[:-1000])

    def older(path: Path, arrays: Any, about: Any) -> None:
        shutil.copy(checkpointer.paths()[0] / "state.npz", path)

    for write, says in ((lost, "no segment"), (older, ".* is read as another than was written")):
        monkeypatch.setattr(state_files, "write_segment", write)
        with pytest.raises(c.CheckpointError, match=rf"state\.npz: {says}"):
            checkpointer.save(6, state=train_state(6), meta={})
    assert [path.name for path in checkpointer.paths()] == ["000000000005"]


def test_an_unreadable_state_is_passed_over_and_named_where_it_is_the_last(
    tmp_path, caplog
) -> None:
    checkpointer = save_some(tmp_path, 1, 2)
    for path in checkpointer.paths()[::-1]:
        (path / "state.npz").write_bytes(b"")
        forge(path)
        if path.name.endswith("2"):
            assert checkpointer.restore(train_state()).env_steps == 1
            assert "000000000002/state.npz: no segment" in caplog.text
    with pytest.raises(c.CheckpointError, match=r"state\.npz: no segment .*No other"):
        checkpointer.restore(train_state())


def forge(checkpoint: Path, **changes: Any) -> None:
    """Gives a checkpoint a manifest whose sums are right and whose content is another."""
    path = checkpoint / "manifest.json"
    body = json.loads(path.read_text())["body"] | changes
    for name in body["files"] if isinstance(body["files"], dict) else ():
        if (checkpoint / name).is_file():
            body["files"][name] = files._fingerprint(checkpoint / name)
    path.write_text(json.dumps({"sha256": files._body_sha256(body), "body": body}))


@pytest.mark.parametrize(
    "changes",
    [{"files": []}, {"files": {}}, {"files": {"x": 1}}, {"segments": {}}, {"segments": [1]},
     {"segments": [{"file": "../../x", "nbytes": 1, "last_key": 1}]},
     {"segments": [{"file": "x", "nbytes": 1}]}, {"segments": [{"file": "x", "last_key": 1}]},
     {"env_steps": "1"}, {"env_steps": 1}, {"score": "best"}],
    ids=str,
)  # fmt: skip
def test_a_manifest_of_other_kinds_is_damaged_whatever_its_sum(tmp_path, changes) -> None:
    checkpointer = save_some(tmp_path, 1, 2)
    first, second = checkpointer.paths()
    forge(second, **changes)
    assert checkpointer.restore(train_state()).path == first
    checkpointer.save(3, state=train_state(), meta={})
    checkpointer.keep_best(train_state(), {"env_steps": 3}, 1.0)
    assert checkpointer.best().name.endswith("3")


@pytest.mark.parametrize(
    ("name", "content"),
    [("leaves.json", "[1]"), ("leaves.json", '{"params": 1}'), ("meta.json", "[1]"),
     ("meta.json", "[" * 50_000), ("meta.json", '{"n": ' + "9" * 400 + "}"),
     ("replay.json", '{"keys": {"__array__": "../../../etc/passwd", "dtype": null}}'),
     ("replay.json", "[]"), ("replay/0000.npy", "no array"), ("replay/0000.npy", ""),
     ("state.npz", "no archive"), ("state.npz", "")],
)  # fmt: skip
def test_files_of_a_checkpoint_that_hold_anything_are_damaged(tmp_path, name, content) -> None:
    checkpointer = save_some(tmp_path, 1, 2)
    path = checkpointer.paths()[1]
    (path / name).write_text(content)
    forge(path)
    assert checkpointer.restore(train_state()).env_steps == 1


KEY = np.zeros(2, np.uint32)


@pytest.mark.parametrize(
    "changes",
    [
        {"w": np.zeros((3, 2), "f")}, {"w": np.zeros((2, 3))}, {"w": np.zeros(6, "V4")},
        {"more": KEY}, {"key": KEY[:1]}, {"key": KEY.astype("f")}, {"key": np.zeros((5, 2), "u4")},
        {"key": np.array("text")}, {"w": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_of_other_arrays_is_damaged_whatever_its_sum(tmp_path, changes) -> None:
    state = {"w": np.ones((2, 3), "f"), "key": jax.random.key(3)}
    checkpointer = c.Checkpointer(tmp_path, SETTINGS)
    for n in (1, 2):
        checkpointer.save(n, state=state, meta={})
    path = checkpointer.paths()[1]
    arrays = {"w": state["w"], "key": KEY} | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    write_segment(path / "state.npz", arrays, {})
    forge(path)
    assert checkpointer.restore(state).env_steps == 1


@pytest.mark.parametrize(
    ("leaf", "changes"),
    [
        ("key", {"key": "nonsense"}), ("key", {"key": 5}), ("key", {"key": None}),
        ("w", {"key": "fry"}), ("w", {"shape": "[2, 3]"}), ("w", {"shape": [-2, -3]}),
        ("w", {"dtype": "", "shape": "float32[2, 3]"}), ("w", {"dtype": 5}),
    ],
    ids=str,
)  # fmt: skip
def test_leaves_that_are_described_as_others_are_refused(tmp_path, leaf, changes) -> None:
    state = {"w": np.ones((2, 3), "f"), "key": jax.random.key(3)}
    checkpointer = c.Checkpointer(tmp_path, SETTINGS)
    path = checkpointer.save(1, state=state, meta={}) / "leaves.json"
    leaves = json.loads(path.read_text())
    path.write_text(json.dumps(leaves | {leaf: leaves[leaf] | changes}))
    forge(path.parent)
    with pytest.raises(c.CheckpointError, match=r"damaged|expected"):
        checkpointer.restore(state)


def test_a_state_that_is_not_listed_is_not_read(tmp_path, caplog) -> None:
    checkpointer = save_some(tmp_path, 1, 2)
    first, second = checkpointer.paths()
    (second / "state").mkdir()  # as in a checkpoint of format 2
    assert checkpointer.restore(train_state()).env_steps == 2
    body = json.loads((second / "manifest.json").read_text())["body"]
    del body["files"]["state.npz"]
    forge(second, files=body["files"])
    assert checkpointer.restore(train_state()).path == first
    assert f"{second}/manifest.json: missing or damaged" in caplog.text


def test_a_part_of_format_2_without_a_state_is_read(tmp_path) -> None:
    checkpointer = c.Checkpointer(tmp_path, SETTINGS)  # of a learner process other than the first
    path = checkpointer.save(1, state={}, meta={"n": 1})
    (path / "state.npz").unlink()
    forge(path, format=2, files={"leaves.json": {"bytes": 0}, "meta.json": {"bytes": 0}})
    assert checkpointer.restore({}).meta == {"n": 1}


@pytest.mark.parametrize("content", ["[1]", '{"checkpoint": [1]}', '{"checkpoint": 5}', "[" * 9999,
                                     '{"checkpoint": "../elsewhere"}'])  # fmt: skip
def test_a_best_file_that_holds_anything_names_no_checkpoint(tmp_path, content) -> None:
    checkpointer = save_some(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "best.json").write_text(content)
    assert checkpointer.restore(train_state(), "best").env_steps == 2


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "raw"])
def test_the_state_comes_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    key = jax.random.PRNGKey(3) if kind == "raw" else jax.random.key(3, impl=kind)
    state = train_state(7, key=key)
    checkpointer = c.Checkpointer(tmp_path, SETTINGS)
    checkpointer.save(5, state=state, meta={})
    like = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state))
    for expected in (train_state(1, key=key), like):
        restored = checkpointer.restore(expected)
        assert bits(restored.state) == bits(state)
    assert isinstance(restored.state.params["core"]["w"], np.ndarray)
    draws = [jax.random.normal(k, (3,)).tolist() for k in (restored.state.key, key)]
    assert draws[0] == draws[1]


def test_meta_and_replay_come_back_as_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    meta = {"quota": {"trained": 2**70, "ratio": 0.1 + 0.2, "nan": float("nan")}, "seen": None,
            "rng": rng.bit_generator.state, "count": np.int64(4)}  # fmt: skip
    replay_state = {
        "frames": {"a": rng.integers(0, 256, (40, 999, 31), np.uint8), "b": np.zeros((0, 2))},
        "turned": np.asfortranarray(rng.standard_normal((3, 4))),
        "sliced": np.arange(100, dtype=np.int64)[::7],
        "half": np.arange(5).astype(ml_dtypes.bfloat16),
        "pairs": [[1, np.float32([1.5])], [2, np.float32([2.5])]],
        "rng": rng.bit_generator.state,
        "account": 1e300,
    }  # fmt: skip
    checkpointer = c.Checkpointer(tmp_path, SETTINGS)
    path = checkpointer.save(5, state=train_state(), meta=meta, replay_state=replay_state)
    restored = checkpointer.restore(train_state())
    assert (restored.path, restored.env_steps) == (path, 5)
    assert repr(restored.meta) == repr(meta | {"count": 4})
    found = restored.replay_state
    assert found is not None
    for name in ("turned", "sliced", "half"):
        assert bits(found[name]) == bits(replay_state[name])
    assert bits(found["frames"]) == bits(replay_state["frames"])
    assert repr(found["pairs"]) == repr(replay_state["pairs"])
    assert (found["rng"], found["account"]) == (replay_state["rng"], 1e300)


def test_restored_arrays_can_be_written_without_touching_the_checkpoint(tmp_path: Path) -> None:
    checkpointer = c.Checkpointer(tmp_path, SETTINGS)
    big = np.ones(files.MAP_BYTES, np.uint8)
    checkpointer.save(1, state=train_state(), meta={}, replay_state={"big": big})
    for _ in range(2):
        found = checkpointer.restore(train_state()).replay_state
        assert found is not None
        np.testing.assert_array_equal(found["big"], big)
        found["big"][:] = 7


def test_without_a_replay(tmp_path: Path) -> None:
    checkpointer = save_some(tmp_path, 1)
    assert checkpointer.restore(train_state(), with_replay=False).replay_state is None
    for path in checkpointer.paths()[0].glob("replay*/*.npy"):
        path.unlink()
    restored = checkpointer.restore(train_state(), with_replay=False)
    assert bits(restored.state) == bits(train_state(1))
    path = checkpointer.save(2, state=train_state(), meta={})
    assert not (path / "replay").exists()
    assert checkpointer.restore(train_state()).replay_state is None


def test_a_big_replay_is_saved_and_restored_beside_little_else(tmp_path: Path) -> None:
    frames = np.zeros((128, 1 << 20), np.uint8)
    state = train_state()
    checkpointer = c.Checkpointer(tmp_path, SETTINGS)
    checkpointer.save(1, state=state, meta={})  # imports and compiles what it needs
    tracemalloc.start()
    checkpointer.save(2, state=state, meta={}, replay_state={"frames": frames})
    saving = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    restored = checkpointer.restore(state)
    restoring = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert restored.replay_state is not None
    assert restored.replay_state["frames"].shape == frames.shape
    assert max(saving, restoring) < frames.nbytes / 2


TWO_DEVICES = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rlx.training.checkpoint import Checkpoint, Checkpointer
assert jax.device_count() == 2
mesh = Mesh(np.array(jax.devices()), "d")
place = lambda spec: jax.device_put(np.arange(8, dtype=np.uint32), NamedSharding(mesh, spec))
state = {"split": place(PartitionSpec("d")), "copied": place(PartitionSpec())}
settings = Checkpoint(every_env_steps=1, keep=1, replay=False, exact=False)
Checkpointer(sys.argv[1], settings).save(1, state=state, meta={})
"""


def test_a_state_of_two_devices_is_restored_on_one(tmp_path: Path) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", TWO_DEVICES, str(tmp_path)], check=True, env=environment)
    like = {"split": np.zeros(8, np.uint32), "copied": np.zeros(8, np.uint32)}
    state = c.Checkpointer(tmp_path, None).restore(like).state
    for leaf in state.values():
        np.testing.assert_array_equal(leaf, np.arange(8, dtype=np.uint32), strict=True)


# --- what stays ----------------------------------------------------------------------------------


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpointer = c.Checkpointer(tmp_path, SETTINGS)
    scores = {10: 1.0, 20: 5.0, 30: 5.0, 40: None, 50: float("nan"), 60: 4.0}
    for n, score in scores.items():
        checkpointer.save(n, state=train_state(n), meta={"n": n})
        if score is not None:
            checkpointer.keep_best(train_state(n + 1), {"env_steps": n}, score)
    assert [int(path.name) for path in checkpointer.paths()] == [50, 60]
    kept = ["000000000050", "000000000060", "best-000000000030"]
    assert names(tmp_path / "checkpoints") == kept
    best = checkpointer.restore(train_state(), "best")
    assert bits(best.state) == bits(train_state(31))
    assert (best.meta, best.env_steps) == ({"env_steps": 30}, 30)
    assert checkpointer.restore(train_state()).meta == {"n": 60}
    assert checkpointer.restore(train_state(), checkpointer.paths()[0]).meta == {"n": 50}
    checkpointer.keep_best(train_state(60), {"env_steps": 60}, 6.0)
    assert names(tmp_path / "checkpoints")[-1] == "best-000000000060"


def test_a_scored_checkpoint_of_an_earlier_rlx_is_kept_until_a_better_one(tmp_path: Path) -> None:
    checkpointer = save_some(tmp_path, 1)
    (old,) = checkpointer.paths()
    body = json.loads((old / "manifest.json").read_text())["body"] | {"score": 3.0}
    manifest = {"sha256": files._body_sha256(body), "body": body}
    (old / "manifest.json").write_text(json.dumps(manifest))
    save_some(tmp_path, 2, 3, 4)
    checkpointer.keep_best(train_state(4), {"env_steps": 4}, 2.0)
    assert checkpointer.restore(train_state(), "best").env_steps == 1
    checkpointer.keep_best(train_state(4), {"env_steps": 4}, 4.0)
    save_some(tmp_path, 5)
    assert checkpointer.restore(train_state(), "best").env_steps == 4
    assert [int(path.name) for path in checkpointer.paths()] == [4, 5]


def test_a_best_of_another_history_is_set_aside(tmp_path: Path) -> None:
    checkpointer = save_some(tmp_path, 1, 2, 3)
    checkpointer.keep_best(train_state(3), {"env_steps": 3}, 9.0)
    save_some(tmp_path, 2)
    assert checkpointer.best() is None
    assert "best-000000000003" in names(tmp_path / "checkpoints/discarded")
    assert checkpointer.segments_kept() == set()


def test_best_without_a_score_is_the_latest(tmp_path: Path, caplog) -> None:
    checkpointer = save_some(tmp_path, 1, 2)
    assert checkpointer.restore(train_state(), "best").env_steps == 2
    assert "no checkpoint has a score" in caplog.text
    assert checkpointer.best() is None


def test_a_run_that_went_back_sets_its_other_history_aside(tmp_path: Path) -> None:
    save_some(tmp_path, 100, 200, 300, settings=dataclasses.replace(SETTINGS, keep=5))
    checkpointer = save_some(tmp_path, 150)
    assert checkpointer.restore(train_state()).env_steps == 150
    assert [int(path.name) for path in checkpointer.paths()] == [100, 150]
    aside = tmp_path / "checkpoints/discarded"
    assert names(aside) == ["000000000200", "000000000300"]
    assert checkpointer.restore(train_state(), aside / "000000000300").meta == {"n": 300}


def test_what_was_set_aside_keeps_its_replay_while_the_other_history_goes_on(tmp_path) -> None:
    """A snapshot is written, as the run writes it, with each checkpoint; the ring holds 40."""
    sequence = sequence_spec(block_rows=2, length=5)
    settings: dict[str, Any] = {"capacity": 80, "ratio": None, "min_sequences": 1, "lanes": 2}
    specs = {"sequence": sequence, "row_spec": row_spec(), "carry_spec": carry_spec()}

    def replay() -> Uniform:
        return making(Uniform, seed=0, **settings, **specs, **IN_MEMORY)

    def go_on(run: c.Checkpointer, snapshots: Snapshots, mine: Uniform, to: int) -> None:
        blocks = [(k % 2, 0, k // 2) for k in range(mine.rings[0].next_key, to)]
        mine.add(rollout(blocks, sequence))
        segments, state = snapshots.complete(mine), mine.state()
        run.save(to, state=train_state(), meta={}, replay_state=state, segments=segments)
        snapshots.forget(run.segments_kept())

    run, mine = c.Checkpointer(tmp_path, SETTINGS), replay()
    snapshots = Snapshots(run.segments_folder)
    for to in (10, 20, 50):
        go_on(run, snapshots, mine, to)
    expected = mine.state()
    back, other = run.restore(train_state(), run.paths()[0]), replay()
    other.restore(back.replay_state, back.replay_blocks())
    run, snapshots = (
        c.Checkpointer(tmp_path, SETTINGS),
        Snapshots(run.segments_folder, back.segments),
    )
    for to in (30, 90, 150, 200):  # all that it began with is overwritten, and forgotten
        go_on(run, snapshots, other, to)
    aside = run.restore(train_state(), run.folder / "discarded/000000000050")
    again = replay()
    again.restore(aside.replay_state, aside.replay_blocks())
    assert again.rings[0].check_valid() == (True, "")
    for name, value in expected.items():
        assert np.array_equal(value, again.state()[name]), name
    for blocks, its in zip(*(all_blocks(x)[0] for x in (mine, again)), strict=True):
        assert all(np.array_equal(leaf, its.leaves[path]) for path, leaf in blocks.leaves.items())


def test_saving_the_same_env_step_again_replaces_it(tmp_path: Path) -> None:
    checkpointer = save_some(tmp_path, 5)
    checkpointer.save(5, state=train_state(9), meta={"n": "again"})
    assert checkpointer.restore(train_state()).meta == {"n": "again"}
    assert names(tmp_path / "checkpoints") == ["000000000005"]


# --- kills and damage ----------------------------------------------------------------------------

SAVER = """
import sys, numpy as np
from rlx.training.checkpoint import Checkpoint, Checkpointer
settings = Checkpoint(every_env_steps=1, keep=2, replay=True, exact=False)
checkpointer = Checkpointer(sys.argv[1], settings)
like = {"w": np.zeros(100_000, np.int64), "v": np.zeros((50, 50), np.int64)}
n = checkpointer.restore(like).env_steps if checkpointer.paths() else 0
while True:
    n += 1
    state = {name: leaf + n for name, leaf in like.items()}
    replay = {"a": np.full(300_000, n), "b": np.full(10, n)}
    checkpointer.save(n, state=state, meta={"n": n}, replay_state=replay)
    checkpointer.keep_best(state, {"env_steps": n}, float(n % 7))
    print(n, flush=True)
"""


def test_kill_9_in_the_middle_of_saves_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    chance = random.Random(1)
    like = {"w": np.zeros(100_000, np.int64), "v": np.zeros((50, 50), np.int64)}
    last, interrupted = 0, 0
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(chance.randint(1, 4)):
            assert int(child.stdout.readline()) == last + 1
            last += 1
        time.sleep(chance.uniform(0, 0.12))
        child.send_signal(signal.SIGKILL)
        told = child.stdout.read().split()
        child.wait()
        child.stdout.close()
        last = int(told[-1]) if told else last
        left = names(tmp_path / "checkpoints")
        interrupted += any(name.startswith(".") for name in left)
        paths = c.Checkpointer(tmp_path, None).paths()
        assert int(paths[-1].name) in (last, last + 1)  # renamed, not yet told
        last = int(paths[-1].name)
        for path in paths:
            check_uniform(c.Checkpointer(tmp_path, None).restore(like, path))
        if (best := c.Checkpointer(tmp_path, None).best()) is not None:
            restored = c.Checkpointer(tmp_path, None).restore(like, best)
            assert all((leaf == restored.env_steps).all() for leaf in restored.state.values())
        assert names(tmp_path / "checkpoints") == left  # a reader changes nothing
    assert interrupted >= 3
    c.Checkpointer(tmp_path, SETTINGS)
    assert not [n for n in names(tmp_path / "checkpoints") if n.startswith(".")]


def check_uniform(restored: c.Restored) -> None:
    replay_state = restored.replay_state
    assert replay_state is not None
    assert restored.meta == {"n": restored.env_steps}
    for leaf in [*restored.state.values(), *replay_state.values()]:
        assert (leaf == restored.env_steps).all()


def test_a_kill_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    path = save_some(tmp_path, 5).paths()[0]
    path.rename(path.with_name(f".old-{path.name}"))
    assert c.Checkpointer(tmp_path, SETTINGS).restore(train_state()).meta == {"n": 5}
    assert names(tmp_path / "checkpoints") == [path.name]


def test_a_kill_while_deleting_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch) -> None:
    checkpointer = save_some(tmp_path, 1, 2)

    def killed(path: Path, **options: Any) -> None:
        if path.exists():
            (path / "manifest.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(c.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save(3, state=train_state(), meta={})
    monkeypatch.undo()
    assert [checkpointer.restore(train_state(), p).env_steps for p in checkpointer.paths()] == [
        2,
        3,
    ]
    c.Checkpointer(tmp_path, SETTINGS)
    assert [name for name in names(tmp_path / "checkpoints") if name.startswith(".")] == []


def test_a_failing_save_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    checkpointer = save_some(tmp_path, 5)
    before = names(tmp_path / "checkpoints")

    def full(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files, "write_state", full)
    with pytest.raises(OSError, match="disk full"):
        checkpointer.save(6, state=train_state(), meta={})
    assert names(tmp_path / "checkpoints") == before


KINDS = ["state.npz", "leaves.json", "meta.json", "replay.json", "replay/*.npy", "manifest.json"]


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_is_named_and_the_previous_checkpoint_restored(
    tmp_path: Path, caplog, how: str
) -> None:
    state = train_state(1)
    checkpointer = save_some(tmp_path, 1, 2)
    whole = {
        path: path.read_bytes() for path in checkpointer.paths()[1].rglob("*") if path.is_file()
    }
    for kind in KINDS:
        damaged = sorted(checkpointer.paths()[1].glob(kind))[0]
        if how == "flip":
            flip_a_bit(damaged)
        elif how == "cut":
            damaged.write_bytes(whole[damaged][:-1])
        else:
            damaged.unlink()
        with caplog.at_level(logging.WARNING, WARNINGS):
            caplog.clear()
            restored = checkpointer.restore(state)
        # The manifest's last byte is a newline, which says nothing.
        if not (how == "cut" and kind == "manifest.json"):
            assert f"{damaged}: " in caplog.text
            assert (restored.env_steps, bits(restored.state)) == (1, bits(state)), kind
            with pytest.raises(c.CheckpointError, match=damaged.name):
                checkpointer.restore(state, checkpointer.paths()[1])
        damaged.write_bytes(whole[damaged])
    assert checkpointer.restore(state).env_steps == 2


def test_any_flipped_bit_of_the_manifest_is_seen(tmp_path: Path) -> None:
    checkpointer = save_some(tmp_path, 1)
    path = checkpointer.paths()[0] / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(c.CheckpointError, match=r"manifest\.json"):
            checkpointer.restore(train_state())


def test_an_error_when_no_good_checkpoint_is_left(tmp_path: Path) -> None:
    checkpointer = save_some(tmp_path, 1, 2)
    for path in checkpointer.paths():
        flip_a_bit(path / "meta.json")
    with pytest.raises(c.CheckpointError, match=r"000001/meta\.json: damaged.*No other checkpoint"):
        checkpointer.restore(train_state())


def test_the_best_is_found_where_no_other_is_left(tmp_path: Path) -> None:
    checkpointer = save_some(tmp_path, 1)
    checkpointer.keep_best(train_state(3), {"env_steps": 3}, 1.0)
    shutil.rmtree(checkpointer.paths()[0])
    assert checkpointer.restore(train_state(), "best").env_steps == 3
    with pytest.raises(c.CheckpointError, match="no checkpoint of a run is there"):
        checkpointer.restore(train_state())


def test_a_best_with_a_damaged_manifest_is_named(tmp_path: Path, caplog) -> None:
    checkpointer = save_some(tmp_path, 1)
    checkpointer.keep_best(train_state(3), {"env_steps": 3}, 1.0)
    (manifest,) = (tmp_path / "checkpoints").glob("best-*/manifest.json")
    manifest.write_text(manifest.read_text()[:100])
    assert checkpointer.restore(train_state(), "best").env_steps == 1
    assert f"{manifest}: missing or damaged" in caplog.text


def test_a_damaged_best_falls_back_to_the_latest(tmp_path: Path) -> None:
    checkpointer = c.Checkpointer(tmp_path, SETTINGS)
    for n, score in ((1, 9.0), (2, 1.0), (3, 2.0)):
        checkpointer.save(n, state=train_state(n), meta={})
        checkpointer.keep_best(train_state(n), {"env_steps": n}, score)
    flip_a_bit(checkpointer.best() / "meta.json")
    assert checkpointer.restore(train_state(), "best").env_steps == 3


# --- what is refused -----------------------------------------------------------------------------


def test_another_network_is_told_by_its_first_differing_leaves(tmp_path: Path) -> None:
    checkpointer = save_some(tmp_path, 1)
    with pytest.raises(c.CheckpointError) as error:
        checkpointer.restore(train_state(width=16))
    text = str(error.value)
    assert "params/core/w is float32[4, 8], expected float32[4, 16]" in text
    assert "another network" in text
    assert "\n" not in text
    other = dataclasses.replace(train_state(), params={"new": np.zeros(2)})
    with pytest.raises(c.CheckpointError) as error:
        checkpointer.restore(other)
    text = str(error.value)
    assert "params/new is missing, expected float64[2]" in text
    assert "params/core/w is float32[4, 8], expected missing" in text
    many = {f"w{i}": np.zeros(2) for i in range(20)}
    with pytest.raises(c.CheckpointError, match=r"; and [0-9]+ more"):
        checkpointer.restore(dataclasses.replace(train_state(), params=many))
    rbg = train_state(key=jax.random.key(0, impl="rbg"))
    with pytest.raises(c.CheckpointError, match=r"key is key<fry>\[\], expected key<rbg>\[\]"):
        checkpointer.restore(rbg)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(c.CheckpointError, match="no checkpoint of a run is there"):
            c.Checkpointer(folder, None).restore(train_state())
    with pytest.raises(c.CheckpointError, match=r"no manifest\.json; give 'latest', 'best' or"):
        c.Checkpointer(tmp_path, None).restore(train_state(), "lates")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    checkpointer = c.Checkpointer(tmp_path, SETTINGS)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"env_steps": -1}, "env_steps=-1: must be 0 or more"),
        ({"meta": {"lanes": {3: 4}}}, "meta/lanes: key 3 must be a string"),
        ({"meta": {"x": object()}}, "object .*: no JSON value"),
        ({"replay_state": {"a": {"b": np.array([None])}}}, "replay_state/a/b: .*Python objects"),
        ({"replay_state": {"a": {"__array__": 1}}}, "'__array__' is taken"),
        ({"state": {"a/b": np.ones(1), "a": {"b": np.ones(1)}}}, "two leaves .* one path"),
    ]
    for wrong, message in cases:
        right: dict[str, Any] = {"env_steps": 1, "state": {"w": np.ones(1)}, "meta": {}}
        with pytest.raises(c.CheckpointError, match=message):
            checkpointer.save(**right | wrong)
    assert checkpointer.paths() == []
    with pytest.raises(c.CheckpointError, match="opened for reading"):
        c.Checkpointer(tmp_path, None).save(1, state={}, meta={})


def test_a_pickle_in_a_checkpoint_is_never_read(tmp_path: Path) -> None:
    checkpointer = save_some(tmp_path, 1)
    folder = checkpointer.paths()[0]
    np.save(folder / "replay/0000.npy", np.array([{"evil": 1}]), allow_pickle=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    body = manifest["body"]
    body["files"]["replay/0000.npy"] = files._fingerprint(folder / "replay/0000.npy")
    forged = {"sha256": files._body_sha256(body), "body": body}
    (folder / "manifest.json").write_text(json.dumps(forged))
    with pytest.raises(c.CheckpointError, match=r"0000\.npy: cannot be read .*allow_pickle=False"):
        checkpointer.restore(train_state())
