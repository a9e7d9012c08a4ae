"""Rows, their truncation on resume, the stopwatch, and the small JSON files."""

import dataclasses
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import timeit
from contextlib import nullcontext
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from rlx.machine.packages import import_package, is_installed
from rlx.runs import files, status, times
from rlx.runs import folders as run_folders
from rlx.runs import metrics as m
from rlx.types import Episode

SETTINGS = m.Logging(
    every_env_steps=100,
    every_s=None,
    window_episodes=3,
    tensorboard=False,
    wandb=None,
    console="off",
    console_every_s=1.0,
)


def episode(return_: float, env_steps: int = 10) -> Episode:
    return Episode(return_=return_, env_steps=env_steps, frames=4 * env_steps, lane=0)


def write_rows(folder: Path, *env_steps: int, resume: int | None = None) -> None:
    with m.Metrics(folder, SETTINGS, resume) as metrics:
        for n in env_steps:
            metrics.row(n, 4 * n, n // 2, n / 10)


def steps(path: Path) -> list[int]:
    return [row["env_steps"] for row in run_folders.read_rows(path)]


class Late:
    """Stands for an array of an accelerator: says when it is read."""

    platform = "gpu"

    def __init__(self, value: float) -> None:
        self.value, self.reads, self.copies = value, 0, 0

    def devices(self) -> set:
        return {self}

    def copy_to_host_async(self) -> None:
        self.copies += 1

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self.reads += 1
        return np.asarray(self.value, dtype=dtype)


def test_yaml_lists_every_setting_and_no_other() -> None:
    node = yaml.safe_load((Path(__file__).parents[2] / "conf/logging/default.yaml").read_text())
    assert node.pop("_target_") == "rlx.runs.metrics.Logging"
    assert set(node) == {field.name for field in dataclasses.fields(m.Logging)}
    m.Logging(**node)


# --- rows ----------------------------------------------------------------------------------------


def test_a_row_has_every_name_in_order_and_equals_its_line(tmp_path: Path) -> None:
    with m.Metrics(tmp_path, SETTINGS, None) as metrics:
        metrics.record_all({"learner/loss": jnp.float32(2), "learner/q_drift": 0.5})
        metrics.record("learner/loss", np.array([3.0, 5.0]))
        row = metrics.row(200, 800, 100, 4.0, {"time/acting": 0.7, "replay/fill": np.float32(0.5)})
    assert list(row)[: len(m.NAMES)] == list(m.NAMES)
    assert run_folders.read_rows(tmp_path / m.METRICS_FILE) == [row]
    known = {name: value for name, value in row.items() if value is not None}
    assert known == {
        "env_steps": 200,
        "frames": 800,
        "updates": 100,
        "wall_s": 4.0,
        "train/episodes": 0,
        "acting/env_steps_per_s": 50.0,
        "learner/updates_per_s": 25.0,
        "learner/loss": 3.0,
        "learner/q_drift": 0.5,
        "time/acting": 0.7,
        "replay/fill": 0.5,
    }


def test_means_are_over_the_interval_and_episodes_over_the_window(tmp_path: Path) -> None:
    with m.Metrics(tmp_path, SETTINGS, None) as metrics:
        metrics.episodes([episode(1.0, 2), episode(2.0, 4)])
        metrics.record("learner/loss", 7.0)
        first = metrics.row(1, 4, 0, 1.0)
        metrics.episodes([episode(3.0, 6), episode(7.0, 8)])
        second = metrics.row(2, 8, 3, 1.25)
    rates = ("acting/env_steps_per_s", "learner/updates_per_s")
    assert [[row[name] for name in rates] for row in (first, second)] == [[1.0, 0.0], [4.0, 12.0]]
    assert (first["train/return_mean"], first["learner/loss"]) == (1.5, 7.0)
    assert (second["train/return_mean"], second["train/length_mean"]) == (4.0, 6.0)
    assert (second["train/episodes"], second["learner/loss"]) == (4, None)


RETURN = "train/return_mean"


@pytest.mark.parametrize(
    ("epsilon", "rung"),
    [
        (0.0, "0-0.01"),
        (0.0099, "0-0.01"),
        (0.01, "0.01-0.05"),  # as float32 it is less than 0.01
        (0.0499, "0.01-0.05"),
        (0.05, "0.05-0.2"),
        (0.1999, "0.05-0.2"),
        (0.2, "0.2-1"),
        (1.0, "0.2-1"),
    ],
)
def test_an_epsilon_is_of_the_rung_that_it_lies_in(epsilon: float, rung: str) -> None:
    assert m.rung_of(float(np.float32(epsilon))) == f"{RETURN}/epsilon_{rung}"


def test_returns_are_told_by_rung_of_those_in_the_window_that_have_episodes(
    tmp_path: Path,
) -> None:
    def told(*given: tuple[float, float]) -> dict[str, float]:
        episodes = [episode(return_) for return_, _ in given]
        for each, (_, epsilon) in zip(episodes, given, strict=True):
            each.epsilon = epsilon
        metrics.episodes(episodes)
        at = 1 + (metrics.last_row or {"env_steps": 0})["env_steps"]
        row = metrics.row(at, at, 0, float(at))
        return {name: row[name] for name in row if name.startswith(f"{RETURN}/")}

    with m.Metrics(tmp_path, SETTINGS, None) as metrics:  # whose window has three episodes
        assert told() == {}
        low, high = f"{RETURN}/epsilon_0-0.01", f"{RETURN}/epsilon_0.2-1"
        assert told((1.0, 0.4), (2.0, 0.001), (6.0, 1.0)) == {low: 2.0, high: 3.5}
        assert told((5.0, 0.0), (9.0, 0.0)) == {low: 7.0, high: 6.0}
        assert told((8.0, 0.0)) == {low: 22 / 3}
        assert m.rungs_in([high, "x", low]) == [low, high]


def test_a_window_that_an_earlier_rlx_saved_has_no_rungs(tmp_path: Path) -> None:
    with m.Metrics(tmp_path, SETTINGS, None) as metrics:
        metrics.restore({"episodes": 2, "window": [[3.0, 10], [5.0, 20]], "means": {}})
        row = metrics.row(1, 1, 0, 1.0)
        assert metrics.state()["window"] == [[3.0, 10], [5.0, 20]]
        metrics.episodes([episode(7.0)])
        assert metrics.state()["window"][-1] == [7.0, 10, 0.0]
    assert (row[RETURN], row["train/length_mean"]) == (4.0, 15.0)
    assert m.rungs_in(row) == []


def test_not_finite_becomes_null(tmp_path: Path) -> None:
    with m.Metrics(tmp_path, SETTINGS, None) as metrics:
        metrics.record("learner/loss", jnp.float32(jnp.nan))
        metrics.row(1, 4, 0, 0.0, {"learner/grad_norm": math.inf})
    text = (tmp_path / m.METRICS_FILE).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    row = json.loads(text)
    assert row["learner/loss"] is row["learner/grad_norm"] is row["acting/env_steps_per_s"] is None


def test_recording_never_reads_a_device_array(tmp_path: Path) -> None:
    values = [Late(float(i)) for i in range(10)]
    with m.Metrics(tmp_path, SETTINGS, None) as metrics:
        for value in values:
            metrics.record("learner/loss", value)
        assert [value.reads for value in values] == [0] * 10
        assert metrics.row(1, 4, 0, 1.0)["learner/loss"] == 4.5
    assert [value.reads for value in values] == [1] * 10
    assert [value.copies for value in values] == [1] * 10


def test_pending_values_are_bounded_and_only_old_ones_are_read(tmp_path: Path) -> None:
    values = [Late(float(i)) for i in range(3 * m.PENDING_LIMIT)]
    with m.Metrics(tmp_path, SETTINGS, None) as metrics:
        for value in values:
            metrics.record("learner/loss", value)
        assert sum(not value.reads for value in values) <= m.PENDING_LIMIT
        assert not any(value.reads for value in values[-m.PENDING_LIMIT // 2 :])
        expected = np.mean([value.value for value in values])
        assert metrics.row(1, 4, 0, 1.0)["learner/loss"] == expected


def test_two_runs_write_the_same_bytes_aside_from_the_clock(tmp_path: Path) -> None:
    lines = []
    for run in ("a", "b"):
        with m.Metrics(tmp_path / run, SETTINGS, None) as metrics:
            metrics.episodes([episode(0.1), episode(0.2)])
            names = ["learner/loss", "z", "a"] if run == "a" else ["a", "learner/loss", "z"]
            for name in names:
                metrics.record(name, jnp.float32(1 / 3))
            clock = {"time/acting": time.perf_counter(), "evaluation/wall_s": time.perf_counter()}
            metrics.row(10, 40, 5, time.perf_counter(), clock)
        row = run_folders.read_rows(tmp_path / run / m.METRICS_FILE)[0]
        lines.append((json.dumps(row), json.dumps(m.without_wall_clock(row))))
    assert lines[0][0] != lines[1][0]
    assert lines[0][1] == lines[1][1]
    assert "env_steps" in m.without_wall_clock(row)


def test_rows_come_in_order(tmp_path: Path) -> None:
    with m.Metrics(tmp_path, SETTINGS, None) as metrics:
        metrics.row(10, 40, 0, 1.0)
        with pytest.raises(ValueError, match="env_steps=9 after one at 10"):
            metrics.row(9, 40, 0, 1.0)


def test_tensorboard_gets_every_finite_value_at_its_env_step(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, tensorboard=True)
    with m.Metrics(tmp_path, settings, None) as metrics:
        metrics.episodes([episode(5.0)])
        metrics.row(123, 492, 7, 1.0)
        metrics.row(456, 1824, 9, 2.0)
    assert [s for s, v in board_values(tmp_path, "train/return_mean") if v == 5.0] == [123, 456]
    rung = board_values(tmp_path, "train/return_mean/epsilon_0-0.01")
    assert rung == [(123, 5.0), (456, 5.0)]
    assert board_values(tmp_path, "updates") == [(123, 7.0), (456, 9.0)]
    assert board_values(tmp_path, "learner/loss") == []


def board_values(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) from the event files; records are length u64, crc u32, data, crc u32."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            values = event.summary.value
            found += [(event.step, value.simple_value) for value in values if value.tag == name]
    return found


# --- resume --------------------------------------------------------------------------------------


def test_resume_moves_later_rows_away_and_continues(tmp_path: Path) -> None:
    write_rows(tmp_path, 100, 200, 300, 400)
    write_rows(tmp_path, 250, 350, resume=200)
    assert steps(tmp_path / m.METRICS_FILE) == [100, 200, 250, 350]
    assert steps(tmp_path / m.DISCARDED_FILE) == [300, 400]
    write_rows(tmp_path, 300, resume=250)
    assert steps(tmp_path / m.DISCARDED_FILE) == [300, 400, 350]
    assert sorted(path.name for path in tmp_path.iterdir()) == [m.DISCARDED_FILE, m.METRICS_FILE]


def test_a_new_run_in_an_old_folder_loses_no_row(tmp_path: Path) -> None:
    write_rows(tmp_path, 100, 200)
    write_rows(tmp_path, 50)
    assert steps(tmp_path / m.METRICS_FILE) == [50]
    assert steps(tmp_path / m.DISCARDED_FILE) == [100, 200]


def test_a_kill_between_the_two_files_loses_and_doubles_nothing(tmp_path: Path, monkeypatch):
    write_rows(tmp_path, 100, 200, 300)
    real = files.write_whole

    def killed(path: Path, data: bytes) -> None:
        if path.name == m.METRICS_FILE:
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(m, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        m.Metrics(tmp_path, SETTINGS, 100)
    monkeypatch.undo()
    write_rows(tmp_path, resume=100)
    assert steps(tmp_path / m.METRICS_FILE) == [100]
    assert steps(tmp_path / m.DISCARDED_FILE) == [200, 300]


@pytest.mark.parametrize("cut", [1, 5, 100])
def test_a_half_written_last_line_is_skipped_and_repaired(tmp_path: Path, cut: int) -> None:
    write_rows(tmp_path, 100, 200, 300)
    path = tmp_path / m.METRICS_FILE
    path.write_bytes(path.read_bytes()[:-cut])
    whole = [100, 200, 300] if cut == 1 else [100, 200]  # 1: only the newline is missing
    assert steps(path) == whole
    write_rows(tmp_path, 400, resume=300)
    assert steps(path) == [*whole, 400]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path, 100, 200, 300)
    path = tmp_path / m.METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"env_st\n' + lines[2])
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*delete this line"):
        run_folders.read_rows(path)


def test_state_continues_the_window_and_the_open_interval(tmp_path: Path) -> None:
    def feed(metrics: m.Metrics, part: int) -> None:
        metrics.episodes([episode(0.1 + part), episode(0.7)])
        metrics.record("learner/loss", jnp.float32(0.1 * (part + 1)))

    with m.Metrics(tmp_path / "whole", SETTINGS, None) as metrics:
        feed(metrics, 0)
        metrics.row(100, 400, 50, 1.0)
        feed(metrics, 1)
        feed(metrics, 2)
        expected = metrics.row(200, 800, 100, 3.0)
    with m.Metrics(tmp_path / "parts", SETTINGS, None) as metrics:
        feed(metrics, 0)
        metrics.row(100, 400, 50, 1.0)
        feed(metrics, 1)
        state = json.loads(json.dumps(metrics.state()))
        metrics.row(180, 720, 90, 9.0)  # made after the checkpoint
    with m.Metrics(tmp_path / "parts", SETTINGS, 150) as metrics:
        metrics.restore(state)
        feed(metrics, 2)
        assert metrics.row(200, 800, 100, 3.0) == expected


WRITER = """
import sys, time
from rlx.runs import metrics as m, status
settings = m.Logging(every_env_steps=1, every_s=None, window_episodes=3,
                     tensorboard=False, wandb=None, console="off", console_every_s=1.0)
metrics = m.Metrics(sys.argv[1], settings, 0)
for n in range(10**9):
    metrics.row(n, n, n, float(n), {"x" * 2000: 1})
    if n % 100 == 0:
        status.write_status(sys.argv[1], "running", metrics.last_row)
    if n == 200:
        print("going", flush=True)
        time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("pause_s", [0, 60])
def test_after_kill_9_rows_and_status_can_be_read(tmp_path: Path, pause_s: int) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), str(pause_s)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "going\n"
    time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    rows = steps(tmp_path / m.METRICS_FILE)
    assert rows == list(range(len(rows)))
    assert rows[-1] == 200 if pause_s else rows[-1] > 200
    status = json.loads((tmp_path / run_folders.STATUS_FILE).read_text())
    assert rows[-1] - 200 < status["env_steps"] <= rows[-1]


# --- stages --------------------------------------------------------------------------------------


def test_fractions_tell_where_the_time_went_and_start_anew() -> None:
    stages = times.StageTimes()
    with stages.measure("acting"):
        time.sleep(0.06)
    with stages.measure("sample"):
        time.sleep(0.02)
    time.sleep(0.02)
    found = stages.fractions()
    assert set(found) == {f"time/{name}" for name in times.STAGES}
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["time/acting"] == pytest.approx(0.6, abs=0.1)
    assert found["time/sample"] == pytest.approx(0.2, abs=0.1)
    assert found["time/other"] == pytest.approx(0.2, abs=0.1)
    time.sleep(0.01)
    assert stages.fractions()["time/acting"] == 0


def test_a_stage_that_is_running_counts_to_both_intervals() -> None:
    stages = times.StageTimes()
    with stages.measure("logging"):
        time.sleep(0.03)
        assert stages.fractions()["time/logging"] > 0.9
        time.sleep(0.03)
    time.sleep(0.03)
    assert 0.3 < stages.fractions()["time/logging"] < 0.7


def test_a_stage_ends_with_an_exception() -> None:
    stages = times.StageTimes()
    with pytest.raises(KeyError), stages.measure("acting"):
        raise KeyError
    time.sleep(0.02)
    assert stages.fractions()["time/acting"] < 0.1


def test_measuring_costs_less_than_two_microseconds() -> None:
    stages = times.StageTimes()

    def measured() -> None:
        with stages.measure("acting"):
            pass

    assert min(timeit.repeat(measured, number=10_000, repeat=5)) / 10_000 < 2e-6


def test_an_unknown_stage_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'act': must be one of acting, replay_add"):
        times.StageTimes().measure("act")


def test_the_bottleneck_names_the_stage_and_the_setting() -> None:
    text = times.bottleneck({"env_steps": 5, "time/acting": 0.71, "time/sample": 0.2})
    assert text.startswith("acting 71 % of the time: the environments are the bottleneck; try ")
    assert "acting.envs_per_actor" in text
    assert times.bottleneck({"env_steps": 5}) == ""


# --- whole files ---------------------------------------------------------------------------------


def test_write_json_is_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"a": float("nan"), "b": [np.int64(3), Path("c")]})
    assert json.loads(path.read_text()) == {"a": None, "b": [3, "c"]}

    def full(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text())["a"] is None


def test_status_and_summary(tmp_path: Path) -> None:
    row = {"env_steps": 9, "updates": 3, "acting/env_steps_per_s": 5.0, "learner/loss": 1.0}
    status.write_status(tmp_path, "failed", row, "ValueError: no")
    found = json.loads((tmp_path / run_folders.STATUS_FILE).read_text())
    assert (found["pid"], found["host"]) == (os.getpid(), platform.node())
    assert found["updated_at"].endswith("+00:00")
    told = ("state", "env_steps", "updates", "frames", "env_steps_per_s", "error")
    assert [found[k] for k in told] == ["failed", 9, 3, None, 5.0, "ValueError: no"]
    with pytest.raises(ValueError, match="state='done': must be one of starting, running"):
        status.write_status(tmp_path, "done")  # type: ignore[arg-type]
    counters = {"env_steps": 9, "frames": 36, "updates": 3, "wall_s": 1.5}
    summary = status.write_summary(
        tmp_path, state="finished", **counters, train_return=1.0, evaluation_return=math.nan,
        params_sha256="ab", checkpoint=tmp_path,
    )  # fmt: skip
    assert json.loads((tmp_path / run_folders.SUMMARY_FILE).read_text()) == summary
    assert summary["evaluation_return"] is None
    assert summary["checkpoint"] == str(tmp_path)


def test_params_sha256_sees_names_dtypes_shapes_and_bits() -> None:
    w = np.arange(6, dtype=np.float32)
    base = {"b": {"w": w}, "a": jnp.ones(2)}
    assert status.params_sha256(base) == status.params_sha256(
        {"a": np.ones(2, np.float32), "b": {"w": w}}
    )
    flipped = w.copy()
    flipped.view(np.uint32)[3] ^= 1
    others = [w.reshape(2, 3), w.view(np.int32), flipped]
    digests = {status.params_sha256(base), status.params_sha256({"b": {"v": w}, "a": jnp.ones(2)})}
    digests |= {status.params_sha256(base | {"b": {"w": other}}) for other in others}
    assert len(digests) == 5


WANDB = """
import sys
from rlx.runs import metrics as m, status
settings = m.Logging(every_env_steps=1, every_s=None, window_episodes=3,
                     tensorboard=False, wandb="mine", console="off", console_every_s=1.0)
resumed = int(sys.argv[2]) if len(sys.argv) > 2 else None
with m.Metrics(sys.argv[1], settings, resumed) as metrics:
    metrics.record("mine/number", 4.25)
    metrics.row((resumed or 0) + 7, 28, 3, 1.0)
"""


def test_weights_and_biases_gets_the_rows_offline_and_goes_on_after_a_resume(tmp_path) -> None:
    pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    ids = []
    for resumed in ([], ["7"]):
        command = [sys.executable, "-c", WANDB, str(tmp_path), *resumed]
        subprocess.run(command, check=True, timeout=120, env=environment)
        ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] == ids[1]
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert files
    assert all(b"mine/number" in file.read_bytes() for file in files)


def test_weights_and_biases_that_is_not_installed_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(m, "is_installed", lambda name: False)
    with pytest.raises(
        ValueError, match=r"logging.wandb=mine, but wandb .* pip install 'rlx\[wandb"
    ):
        dataclasses.replace(SETTINGS, wandb="mine")


@pytest.mark.parametrize("name", ["no_such_package", "a_folder", "a_package"])
def test_a_folder_is_no_package(tmp_path, monkeypatch, name) -> None:
    for folder in ("a_folder", "a_package"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a_package" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert is_installed(name) == (name == "a_package")
    with (
        nullcontext() if name == "a_package" else pytest.raises(ImportError, match="not installed")
    ):
        import_package(name)
