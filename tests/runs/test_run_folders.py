"""A run's folder says its settings now, its state, and where runs are."""

from __future__ import annotations

import ast
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

import rlx
from rlx import diff, evaluate, export
from rlx.config import moved
from rlx.config.documents import parse_yaml
from rlx.problems import ConfigError
from rlx.results import reading as results
from rlx.results.live import LiveRuns
from rlx.runs.folders import (
    RunFolder,
    find,
    next_resume,
    number,
    parse_settings,
    settings_now,
)
from tests.conftest import SMALL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a run that a test may go on with or spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def command(name: str, *arguments: str | Path, status: int = 0, cwd: Path = ROOT) -> str:
    """The output of `python -m rlx.NAME`, errors included."""
    line = [sys.executable, "-m", f"rlx.{name}", *map(str, arguments)]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_run_of_an_earlier_rlx_is_loaded_and_resumed(run):
    saved = run / ".hydra" / "config.yaml"
    text = saved.read_text()
    assert "rlx.evaluation.playing.Evaluation" in text
    saved.write_text(text.replace("rlx.evaluation.playing.Evaluation", "rlx.evaluate.Evaluation"))
    assert rlx.load(run).cfg.evaluation["_target_"] == "rlx.evaluation.playing.Evaluation"
    command("train", f"resume={run}", "total_env_steps=600", "evaluation.final_episodes=0")
    now = yaml.safe_load((run / ".hydra" / "resume-1" / "config.yaml").read_text())
    assert (now["evaluation"]["_target_"], now["seed"]) == ("rlx.evaluation.playing.Evaluation", 0)
    assert now["total_env_steps"] == 600
    assert "rlx.evaluate.Evaluation" in saved.read_text()  # what the run began with stays


# --- settings ------------------------------------------------------------------------------------

QUICK = ("evaluation.final_episodes=0", "logging.console=off")


def watched(run: Path) -> dict[str, Any]:
    (found,) = LiveRuns(run.parent).all()
    return found


def test_what_a_resume_changed_stays_changed_for_every_reader(run):
    changed = ("env.max_episode_steps=7", "agent.optimizer.learning_rate=2e-3", "tags=[again]")
    command("train", f"resume={run}", "total_env_steps=600", *changed, *QUICK)
    command("train", f"resume={run}", "total_env_steps=700", *QUICK)  # says nothing of the rest
    now = settings_now(run)
    assert (now["total_env_steps"], now["env"]["max_episode_steps"]) == (700, 7)
    assert (now["agent"]["optimizer"]["learning_rate"], now["tags"]) == (2e-3, ["again"])
    loaded = rlx.load(run)
    assert loaded.cfg.env.max_episode_steps == 7
    assert loaded.family.max_episode_steps == 7
    evaluate.main([f"run={run}", f"episodes={now['evaluation']['final_episodes'] or 20}"])
    assert max(RunFolder(run).evaluations[-1]["returns"]) <= 7  # CartPole pays 1 per env step
    export.main([f"run={run}"])
    (found,) = results.read(run)
    assert found.settings["env.max_episode_steps"] == 7
    assert diff.read_settings(run)["env.max_episode_steps"] == 7
    assert watched(run)["total_env_steps"] == 700
    assert {*changed, "total_env_steps=700"} <= set(watched(run)["overrides"])
    assert "total_env_steps=600" not in watched(run)["overrides"]


def test_a_resume_from_python_keeps_its_settings_as_one_by_command_does(run):
    def resume(**changes: Any) -> None:
        cfg = rlx.load(run).cfg
        cfg.evaluation.final_episodes = 0
        cfg.resume = str(run)
        for key, value in changes.items():
            cfg[key] = value
        rlx.run(cfg)

    resume(total_env_steps=600)
    assert settings_now(run)["total_env_steps"] == 600
    resume()  # changes nothing
    assert next_resume(run).name == "resume-2"
    with pytest.raises(ConfigError):
        resume(seed=-1)
    with pytest.raises(ConfigError, match="prefetch"):  # refused when it starts
        resume(deterministic=True, replay={**rlx.load(run).cfg.replay, "prefetch": 1})
    assert next_resume(run).name == "resume-2"
    assert rlx.load(run).cfg.total_env_steps == 600


def test_settings_that_cannot_be_read_are_one_line_that_names_the_file(run, capsys):
    later = next_resume(run) / "config.yaml"
    later.parent.mkdir()
    for content in ("a: [1", "[1]", "", "a: !!python/object/apply:os.getcwd []"):
        later.write_text(content)
        with pytest.raises(ConfigError, match=rf"run={later}: cannot be read \(.*\); restore"):
            rlx.load(run)
    (line,) = command("train", f"resume={run}", status=2).splitlines()
    assert f"resume={later}: cannot be read" in line
    for module in (evaluate, export):
        with pytest.raises(SystemExit, match="2"):
            module.main([f"run={run}"])
        (line,) = capsys.readouterr().err.splitlines()
        assert f"run={later}: cannot be read" in line


def test_numbers_and_interpolations_are_read_as_hydra_reads_them():
    text = b"a: 1e-3\nb: ${c.d}\nc: {d: [1, x]}\ne: 2.5E+3\nf: 1e\ng: '1e5'"
    assert parse_settings(text) == {
        "a": 0.001,
        "b": [1, "x"],
        "c": {"d": [1, "x"]},
        "e": 2500.0,
        "f": "1e",
        "g": "1e5",
    }
    assert parse_settings(b"a: ${nope}") == {"a": "${nope}"}
    assert parse_settings(text, resolve=False)["b"] == "${c.d}"
    assert parse_yaml(b"x: 10\ny: 0.5\nz: 1e5") == {"x": 10, "y": 0.5, "z": 1e5}


# --- states --------------------------------------------------------------------------------------


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("status", "state", "note"),
    [
        (None, "starting", ""),
        ({"state": [1]}, "starting", ""),
        ({"state": "running"}, "running", ""),
        ({"state": "running", "pid": "gone"}, "died", "is gone; resume="),
        ({"state": "starting", "pid": "gone"}, "died", "is gone; resume="),
        ({"state": "running", "pid": "gone", "host": "elsewhere"}, "running", ""),
        ({"state": "running", "updated_at": "2026-01-01T00:00:00+00:00"}, "silent", "told nothing"),
        ({"state": "finished", "pid": "gone"}, "finished", ""),
        ({"state": "interrupted"}, "interrupted", ""),
        ({"state": "failed", "error": "OSError: x"}, "failed", "OSError: x"),
    ],
)
def test_all_readers_tell_the_same_state(run, status, state, note):
    (run / ".hydra" / "config.yaml").touch()
    (run / "status.json").unlink()
    if status is not None:
        told = {"pid": os.getpid(), "host": platform.node()}
        told |= {"updated_at": datetime.now(UTC).isoformat()} | status
        told |= {"pid": gone()} if told["pid"] == "gone" else {}
        (run / "status.json").write_text(json.dumps(told))
    found_state, found_note = RunFolder(run).state()
    assert found_state == state
    assert found_note == note or (note and note in found_note)
    (read,) = results.read(run)
    assert (read.state, read.error or "") == (state, found_note)
    assert (watched(run)["state"], watched(run)["note"]) == (state, found_note)
    assert diff.describe(run)["result"]["state"] == state


def test_a_run_that_never_said_anything_has_died_after_a_while(run):
    (run / "status.json").unlink()
    os.utime(run / ".hydra" / "config.yaml", (0, 0))
    assert RunFolder(run).state()[0] == "died"


# --- folders and files ---------------------------------------------------------------------------


def test_runs_are_found_where_hydra_puts_them_and_none_inside_another(tmp_path):
    marked = ("2026-11-20/12-00-00", "multi/2026/10", "multi/2026/9", "a", "a/learners/0", ".b/run")
    for name in marked:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "status.json").write_text("{}")
    for name in ("c/.hydra", "d"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "c" / ".hydra" / "config.yaml").write_text("")
    (tmp_path / "d" / "metrics.jsonl").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in find(tmp_path)]
    assert names == ["a", "c", "d", "multi/2026/9", "multi/2026/10", "2026-11-20/12-00-00"]
    assert find(tmp_path / "a") == [tmp_path / "a"]
    assert [read.name for read in results.read(tmp_path)] == names
    assert [one["name"] for one in LiveRuns(tmp_path).all()] == names


def test_a_file_is_read_again_when_it_changed_and_not_before(run):
    folder, path = RunFolder(run), run / "summary.json"
    assert folder.summary is folder.summary
    before = path.stat()
    path.write_text(json.dumps(folder.summary | {"updates": 77}, indent=2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert folder.summary["updates"] == 77
    path.unlink()
    assert folder.summary == {}


def test_the_tenth_resume_is_newer_than_the_second_and_odd_names_are_none(run):
    for name, steps in (
        ("2", 22),
        ("10", 1010),
        ("9", 99),
        ("\u00b2", 5),
        ("11x", 6),
        ("12", None),
    ):
        folder = run / ".hydra" / f"resume-{name}"
        folder.mkdir()
        if steps is not None:
            (folder / "config.yaml").write_text(f"total_env_steps: {steps}\n")
    assert settings_now(run) == {"total_env_steps": 1010, **moved.ADDED_ROOT}
    assert next_resume(run).name == "resume-13"


HOSTILE = """hydra:
  job:
    env_set: {PATH: BIN, RLX_WAS_HERE: "1"}
  callbacks:
    evil: {_target_: evil.Callback}
  job_logging:
    handlers: {evil: {class: evil.Handler}}
"""


def test_hydras_section_and_groups_in_a_runs_folder_are_never_used(run, tmp_path):
    binaries, told = tmp_path / "bin", tmp_path / "told"
    binaries.mkdir()
    (binaries / "git").write_text(f"#!/bin/sh\necho $RLX_WAS_HERE > {told}\n")
    (binaries / "git").chmod(0o755)
    (run / "evil.py").write_text(f"open({str(told)!r}, 'w').write('imported')\n")
    config = run / ".hydra" / "config.yaml"
    hostile = HOSTILE.replace("BIN", f"{binaries}:{os.environ['PATH']}")
    config.write_text("# @package _global_\n" + hostile + config.read_text())
    for group in ("job_logging", "output", "env", "help"):
        (run / ".hydra" / "hydra" / group).mkdir(parents=True)
        for name in ("rlx", "default"):
            (run / ".hydra" / "hydra" / group / f"{name}.yaml").write_text("evil: 1\n")
    command("train", f"resume={run}", "total_env_steps=600", "evaluation.final_episodes=0")
    evaluate.main([f"run={run}", "episodes=1"])
    assert "hydra" not in rlx.load(run).cfg
    assert not told.exists()
    saved = yaml.safe_load((run / ".hydra" / "resume-1" / "hydra.yaml").read_text())
    assert "evil" not in str(saved["hydra"]["job_logging"])


def test_groups_in_a_runs_settings_are_refused(run):
    config = run / ".hydra" / "config.yaml"
    config.write_text("defaults: [agent: r2d2]\n" + config.read_text())
    (line,) = command("train", f"resume={run}", status=2).splitlines()
    assert f"resume={config}: names groups" in line


def test_a_module_that_only_a_run_names_is_not_imported(run, tmp_path):
    told, config = tmp_path / "told", run / ".hydra" / "config.yaml"
    (run / "evil_envs.py").write_text(f"open({str(told)!r}, 'w').write('imported')\n")
    settings = yaml.safe_load(config.read_text())
    settings["env"] = {
        **OmegaConf.to_container(rlx.compose(["env=gymnasium"]).env),
        "id": "evil_envs:CartPole-v1",
    }
    config.write_text(yaml.safe_dump(settings))
    lines = [
        *("evaluate", f"run={run}", "episodes=1"),
        *("export", f"run={run}"),
        *("train", f"resume={run}"),
    ]
    for name, *arguments in (lines[:3], lines[3:5], lines[5:]):
        (line,) = command(name, *arguments, status=2, cwd=run).splitlines()
        assert "so evil_envs is not imported" in line
    assert not told.exists()
    with pytest.raises(ConfigError, match=r"import it first \(Python\), write allow=evil_envs"):
        rlx.load(run)
    # Named by the user, the module is imported; the checkpoint is of another environment.
    command("evaluate", f"run={run}", "episodes=1", "allow=evil_envs", status=2, cwd=run)
    assert told.read_text() == "imported"
    told.unlink()
    named = "env.id=evil_envs:CartPole-v1"
    command("train", f"resume={run}", named, status=2, cwd=run)
    assert told.read_text() == "imported"


def test_paths_in_settings_stay_where_the_run_was_begun(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    given = ("replay.record=rec", "replay.storage=mmap", "replay.folder=map")
    where = ("hydra.run.dir=out", "hydra.job.chdir=true")
    said = command("train", *SMALL, *given, *where, cwd=tmp_path)
    assert f"replay.record is {tmp_path}/rec" in said
    whole = {"record": f"{tmp_path}/rec", "folder": f"{tmp_path}/map"}
    first = settings_now(tmp_path / "out")["replay"]
    assert {name: first[name] for name in whole} == whole
    command("train", "resume=../out", "total_env_steps=900", "replay.folder=here", cwd=other)
    now = settings_now(tmp_path / "out")["replay"]
    assert now["record"] == whole["record"]
    assert now["folder"] == f"{other}/here"
    assert next_resume(tmp_path / "out").name == "resume-2"
    assert sorted(path.name for path in other.iterdir()) == ["here"]
    runs = {path.name.partition("-")[0] for path in (tmp_path / "rec").glob("*.npz")}
    assert len(runs) == 2


def test_only_finite_numbers_are_numbers():
    odd = [True, "1", None, float("nan"), float("inf"), 10**400]
    assert [number(value) for value in odd] == [None] * 6
    assert number(3) == 3


def test_it_loads_neither_jax_nor_pandas():
    code = "import sys, rlx.runs.folders; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not set(ast.literal_eval(done.stdout)) & {"jax", "pandas", "numpy", "hydra", "omegaconf"}
