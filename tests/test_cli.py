"""The command line: `python -m rlx.train`, in processes of its own, with stand-ins for conf/."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlx import api, train
from rlx.config import paths
from rlx.results import reading as results
from rlx.runs import files
from rlx.runs.folders import find_run
from tests import standins

ROOT = Path(__file__).resolve().parent.parent
DRIVER = """
import sys
from pathlib import Path
from rlx.config import paths
from rlx.runs.folders import find_run
from tests import standins
standins.install()
folder = Path(sys.argv.pop(1))
paths.config_dir = lambda: folder
from rlx import train
train.main()
"""


@pytest.fixture
def conf(tmp_path):
    return standins.write_conf(tmp_path / "conf")


def command(conf: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DRIVER, str(conf), *arguments],
        cwd=conf.parent,
        env={**os.environ, "PYTHONPATH": standins.search_path(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def seeds(folder: Path) -> list[int]:
    return sorted(json.loads(f.read_text())["seed"] for f in folder.rglob("result.json"))


# --- single runs ---------------------------------------------------------------------------------


def test_a_run_leaves_its_configuration_in_its_folder(conf):
    done = command(conf, "seed=4", "hydra.run.dir=out")
    assert (done.returncode, done.stderr) == (0, "")
    out = conf.parent / "out"
    assert seeds(out) == [4]
    assert {"config.yaml", "hydra.yaml", "overrides.yaml"} <= set(os.listdir(out / ".hydra"))
    assert (out / "env.json").exists()
    assert find_run(out) == out


def test_bad_overrides_end_with_status_2_and_a_line_each(conf):
    done = command(conf, "acting=ray_pol", "acting.instnaces=3", "seed=[1")
    assert done.returncode == 2
    assert [line.split(" (")[0] for line in done.stderr.splitlines()] == [
        "rlx: seed=[1",
        "rlx: acting=ray_pol",
        "rlx: acting.instnaces=3",
    ]
    assert os.listdir(conf.parent) == ["conf"]  # nothing was started


def prepared(monkeypatch, conf: Path, *argv: str) -> list[str] | str:
    """Runs `prepare` on a command line, in this process."""
    monkeypatch.chdir(conf.parent)
    monkeypatch.setattr(paths, "config_dir", lambda: conf)
    monkeypatch.setattr(train, "check", lambda cfg: None)
    try:
        return train.prepare(list(argv))
    except api.ConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    "flag", ["--help", "--hydra-help", "-c=job", "-i=defaults", "--shell-completion"]
)
def test_hydras_own_flags_are_left_to_hydra(conf, monkeypatch, flag):
    assert prepared(monkeypatch, conf, flag, "sede=3") == [flag, "sede=3"]


def test_a_sweep_is_left_to_hydra(conf, monkeypatch):
    assert prepared(monkeypatch, conf, "-m", "seed=0,1") == ["-m", "seed=0,1"]
    assert prepared(monkeypatch, conf, "-m", "seed=0,[") == ["-m", "seed=0,["]  # it shows where


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("agent=a2c,ppo agent.unrol=4,8", "did you mean agent.unroll"),
        ("agent=a2c,ppo agent.epochs=2", r"agent.epochs.* \(the job of agent=a2c\)$"),
        ("agent=ppo,a2c agent.epochs=2", r"agent.epochs.* \(the job of agent=a2c\)$"),
        ("seed=range(0,3) agent=ppo,pppo", "agent=pppo"),
        ("agent=ppo agent.optimizer.learning_rate=interval(1e-4,1e-3) sede=1", "did you mean seed"),
    ],
)
def test_what_a_job_of_a_sweep_does_not_have_is_told_before_it(given, says):
    with pytest.raises(api.ConfigError, match=says):
        train.prepare(["-m", *given.split()])


def test_config_dir_is_checked_too(conf, monkeypatch):
    mine = conf.parent / "mine" / "acting"
    mine.mkdir(parents=True)
    (mine / "mine.yaml").write_text("defaults: [local, _self_]\n")
    argv = ["--config-dir", str(mine.parent), "acting=mine"]
    assert prepared(monkeypatch, conf, *argv) == argv
    assert "did you mean acting=mine" in prepared(monkeypatch, conf, *argv[:2], "acting=mind")


def test_a_relative_config_path_is_refused(conf, monkeypatch):
    said = prepared(monkeypatch, conf, "--config-path", "conf")
    assert said.startswith("--config-path=conf: give an absolute path; or --config-dir")


def test_pickles_are_refused(conf, monkeypatch):
    said = prepared(monkeypatch, conf, "--experimental-rerun", "x.pickle")
    assert said == "--experimental-rerun: reads a pickle; write resume=DIR instead"


def test_used_and_impossible_folders_are_refused_before_hydra_writes(conf, monkeypatch):
    (conf.parent / "old").mkdir()
    (conf.parent / "old" / "env.json").write_text("{}")
    assert prepared(monkeypatch, conf, "hydra.run.dir=old") == (
        "output_dir=old: holds a run already; continue it with resume=old, or give another folder"
    )
    (conf.parent / "file").write_text("")
    said = prepared(monkeypatch, conf, "hydra.run.dir=file/run")
    assert said.startswith("hydra.run.dir=file/run: cannot be made: ")
    assert "file is not a folder that can be written; give another" in said
    for more in ((), ("resume=auto",)):  # root may write anywhere, but not there
        said = prepared(monkeypatch, conf, "hydra.run.dir=/proc/run", *more)
        assert said.startswith("hydra.run.dir=/proc/run: cannot be made")


def test_a_problem_found_while_running_is_a_line_and_a_bug_a_traceback(conf):
    done = command(conf, "seed=99")
    assert (done.returncode, done.stderr) == (
        2,
        "rlx: replay.capacity=4000000: 28 GB are too many\n",
    )
    done = command(conf, "seed=13")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError: unlucky" in done.stderr


def test_a_run_that_cannot_go_on_is_a_line_and_the_way_on_from_its_checkpoint(conf):
    done = command(conf, "seed=14", "hydra.run.dir=out")
    assert (done.returncode, done.stderr) == (
        1,
        "rlx: the replay is lost\n"
        f"rlx: resume={conf.parent / 'out'} goes on from the last checkpoint\n",
    )


def test_the_full_error_of_a_problem_can_be_had(conf):
    done = command(conf, "seed=-1", HYDRA_FULL_ERROR="1")
    assert "Traceback" in done.stderr
    assert "seed=-1 (command line): accepted: an int >= 0" in done.stderr


# --- sweeps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hydra.searchpath=[file:///nope]", "hydra.searchpath=file:///nope: no such folder"),
        ("hydra.searchpath=[pkg://nope.conf]", "hydra.searchpath=pkg://nope.conf: no such folder"),
        ("hydra.searchpath=nope", "hydra.searchpath=nope: accepted: a list"),
        ("hydra.searchpath=[[]]", "hydra.searchpath=[[]]: accepted: a list"),
        ("hydra.run.dir='${nope}'", "hydra.run.dir: Interpolation key 'nope' not found"),
        ("hydra.run.dir=" + "a" * 5000, "hydra.run.dir=aaa"),
        ("hydra.job.name='${nope}'", "hydra.job.name: Interpolation key 'nope' not found"),
        ("a" * 300 + "=1", "aaa"),
        ("env=" + "a" * 300, "env=aaa"),
        ("seed='" + "ab" * 5000 + "'", "seed=abab"),
        ("se\ned=1", "se\\ned=1"),
        ("seed='\n\x1b[31m'", "seed=\\n\\x1b[31m"),
    ],
)
def test_whatever_an_override_holds_it_is_a_short_line(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(api.ConfigError) as refused:
        train.prepare([text])
    (line,) = str(refused.value).splitlines()
    assert line.startswith(says)
    assert line.isprintable()
    assert len(line) < 1000
    assert os.listdir(tmp_path) == []


def test_ctrl_c_while_libraries_are_imported_is_a_line(tmp_path):
    for wait_s in (0.15, 0.5, 1.0):
        line = [sys.executable, "-m", "rlx.train"]
        process = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        time.sleep(wait_s)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=120)[1]
        assert "Traceback" not in errors or "site" in errors  # before rlx is there at all
        assert process.returncode != 0


IN_THE_COLLECTOR = """
import gc, os, signal, sys

def callback(phase, info):
    if {module!r} in sys.modules and not callback.done:
        callback.done = True
        os.kill(os.getpid(), signal.SIGINT)

callback.done = False
gc.callbacks.append(callback)
"""


@pytest.mark.parametrize("module", ["rlx.config", "jax", "envpool", "rlx.training.learner"])
def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost(tmp_path, module):
    (tmp_path / "sitecustomize.py").write_text(IN_THE_COLLECTOR.format(module=module))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, "-m", "rlx.train", "total_env_steps=256", "hydra.run.dir=out"]
    done = subprocess.run(
        line, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stderr.endswith("rlx: interrupted\n")
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("name", "is_ours"), [("rlx-train", True), ("rlx-mine.py", False), ("mine.py", False)]
)
def test_only_rlxs_own_commands_change_how_ctrl_c_is_told(tmp_path, name, is_ours):
    (tmp_path / name).write_text("import sys, rlx\nprint(sys.excepthook is not sys.__excepthook__)")
    line = [sys.executable, str(tmp_path / name), "rlx-a", "rlx.b"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{is_ours}\n"


def test_in_a_sweep_one_bad_job_lets_the_others_run(conf):
    done = command(conf, "-m", "seed=1,-1,13,2")
    assert seeds(conf.parent / "multirun") == [1, 2]
    assert done.returncode == 1
    assert "seed=-1 (command line): accepted: an int >= 0" in done.stderr


def test_an_interrupted_job_ends_the_sweep(conf):
    done = command(conf, "-m", "seed=1,15,2")
    assert seeds(conf.parent / "multirun") == [1, 15]
    assert done.returncode == 130
    assert done.stderr.endswith("rlx: interrupted\n")
    assert "Traceback" not in done.stderr


# --- resume --------------------------------------------------------------------------------------


def test_resume_keeps_the_runs_configuration_and_folder(conf):
    assert command(conf, "seed=4", "acting=ray_pool", "hydra.run.dir=my out").returncode == 0
    out = conf.parent / "my out"
    first = (out / ".hydra" / "config.yaml").read_text()
    done = command(conf, "resume='my out'", "total_env_steps=5", "+agent.stack.image=4")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads((out / "result.json").read_text())
    assert (result["seed"], result["total_env_steps"], result["resume"]) == (4, 5, str(out))
    assert (result["acting"]["instances"], result["agent"]["stack"]) == (128, {"image": 4})
    assert (out / ".hydra" / "config.yaml").read_text() == first
    assert (out / ".hydra" / "resume-1" / "config.yaml").exists()
    assert (out / "env-1.json").exists()
    assert command(conf, "resume='my out'").returncode == 0
    assert (out / ".hydra" / "resume-2").exists()
    done = command(conf, "resume='my out'", "acting.instnaces=3", "seed=x")
    assert done.returncode == 2
    assert "did you mean acting.instances?" in done.stderr


def test_a_refused_resume_leaves_no_settings_that_no_run_had(conf):
    assert command(conf, "hydra.run.dir=out", "total_env_steps=3").returncode == 0
    out = conf.parent / "out"
    with files.only_one(out):
        done = command(conf, "resume=out", "total_env_steps=5")
    assert done.returncode == 2
    assert "another process is at work in it" in done.stderr
    assert not list((out / ".hydra").glob("resume-*"))
    assert results.read(out)[0].settings["total_env_steps"] == 3


def test_resume_auto_keeps_the_settings_that_the_run_began_with(conf):
    given = ("hydra.run.dir=out", "resume=auto")
    assert command(conf, *given, "total_env_steps=3").returncode == 0
    out = conf.parent / "out"
    first = (out / ".hydra" / "config.yaml").read_text()
    assert command(conf, "--config-dir", str(conf), *given, "total_env_steps=5").returncode == 0
    assert (out / ".hydra" / "config.yaml").read_text() == first
    assert results.read(out)[0].settings["total_env_steps"] == 5
    with files.only_one(out):
        assert command(conf, *given, "total_env_steps=7").returncode == 2
    assert (out / ".hydra" / "config.yaml").read_text() == first
    assert results.read(out)[0].settings["total_env_steps"] == 5


def test_resume_refuses_other_groups_sweeps_and_folders_without_a_run(conf, monkeypatch):
    (conf.parent / "run" / ".hydra").mkdir(parents=True)
    (conf.parent / "run" / ".hydra" / "config.yaml").write_text("seed: 0\n")
    said = prepared(monkeypatch, conf, "resume=run", "acting=ray_pool", "+agent=iqn")
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "acting=ray_pool (command line)",
        "+agent=iqn (command line)",
    ]
    assert "a resumed run keeps its groups, its checkpoint was made with them" in said
    assert "leave -m and --config-* out" in prepared(monkeypatch, conf, "-m", "resume=run")
    assert prepared(monkeypatch, conf, "resume=nowhere").startswith(
        "resume=nowhere: no run is there (no .hydra/config.yaml); give the folder of one"
    )


def test_resume_auto_and_null_are_ordinary_values(conf, monkeypatch):
    assert prepared(monkeypatch, conf, "resume=auto") == ["resume=auto"]
    assert prepared(monkeypatch, conf, "resume=null") == ["resume=null"]


# --- wheel ---------------------------------------------------------------------------------------


def test_a_wheel_holds_conf_and_runs_from_another_folder(tmp_path):
    source = tmp_path / "source"
    for name in ("rlx", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "hatch_build.py"):
        shutil.copy(ROOT / name, source)
    (source / "README.md").write_text("rlx\n")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("rlx-*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    shutil.rmtree(source)
    code = "from rlx import train; from rlx.config import paths; "
    code += "print(paths.config_dir()); train.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--info", "searchpath"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": standins.search_path(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/site/rlx/conf\n")
    assert f"file://{tmp_path}/site/rlx/conf" in done.stdout
    assert (tmp_path / "site" / "rlx" / "conf" / "hydra" / "job_logging" / "rlx.yaml").exists()
    assert "rlx-train" in next((tmp_path / "site").glob("*.dist-info/entry_points.txt")).read_text()
