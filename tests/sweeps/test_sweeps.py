"""Sweeps: jobs in processes of their own, and what becomes of them."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.core.utils import JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.rlx.launcher import ProcessLauncher
from rlx.config.composing import compose, quote
from rlx.machine.signals import sigterm_interrupts, stop_on_signals
from rlx.problems import ConfigError
from rlx.runs.files import only_one
from rlx.sweeps import jobs
from rlx.sweeps.jobs import Job, LocalProcess, Outcome, run_jobs
from rlx.sweeps.sweeping import JobFailed, Refused, Sweep, share_of_cores, share_of_gpus
from tests.training.test_run import TINY

FINISHES = """
import json
json.dump({"state": "finished", "evaluation_return": %s}, open("summary.json", "w"))
"""
WAIT_S = 120.0


def job(folder: Path, number: int, code: str) -> Job:
    """A program in the place of a run."""
    own = folder / str(number)
    begin = f"import os; os.chdir({str(own)!r})\n"
    return Job(
        number=number,
        overrides=(f"seed={number}",),
        folder=own,
        sweep=folder,
        command=(sys.executable, "-c", begin + code),
    )


def local(job: Job, slot: int) -> LocalProcess:
    return LocalProcess(job, {"SLOT": str(slot)}, [])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def until(condition, what: str):
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {WAIT_S:.0f} s")


def test_a_job_that_fails_or_is_killed_loses_only_itself(tmp_path):
    made = [
        job(tmp_path, 0, FINISHES % 1.5),
        job(tmp_path, 1, "raise ValueError('the env broke')"),
        job(tmp_path, 2, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        job(tmp_path, 3, "pass"),  # ends well, and has nothing to show
        job(tmp_path, 4, FINISHES % 2.5),
    ]
    (tmp_path / "5").write_text("in the way")
    made.append(job(tmp_path, 5, FINISHES % 0))
    found = run_jobs(made, local, slots=2, grace_s=5)
    assert [one.state for one in found] == [
        *("finished", "failed", "failed", "failed", "finished", "not started"),
    ]
    assert found[0].summary["evaluation_return"] == 1.5
    assert found[1].error == "ended with status 1: ValueError: the env broke"
    assert found[2].error == "was killed by SIGKILL"
    assert found[3].error == "ended with status 0"
    rows = table(tmp_path)
    assert [row["seed"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert [row["evaluation_return"] for row in rows] == ["1.5", "", "", "", "2.5", ""]
    assert "the env broke" in (tmp_path / "1" / "console.log").read_text()


def test_slots_without_a_job_cost_nothing(tmp_path):
    assert run_jobs([job(tmp_path, 0, FINISHES % 1)], local, slots=10**12, grace_s=5)


def test_no_more_jobs_run_at_once_than_there_are_slots(tmp_path):
    mark = "import time, os; t = time.time(); time.sleep(0.4); "
    mark += "open('times', 'w').write(f'{t} {time.time()} {os.environ[\"SLOT\"]}')\n"
    made = [job(tmp_path, n, mark + FINISHES % n) for n in range(5)]
    run_jobs(made, local, slots=2, grace_s=5)
    times = [tuple(map(float, (one.folder / "times").read_text().split())) for one in made]
    for slot in (0.0, 1.0):  # of one slot, one after the other
        of_slot = sorted(t for t in times if t[2] == slot)
        assert of_slot
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(of_slot))


def test_done_jobs_are_left_and_hopeless_ones_ended(tmp_path):
    sleeps = "import time; open('on', 'w').close(); time.sleep(600)"
    made = [job(tmp_path, 0, "1 / 0"), job(tmp_path, 1, sleeps), job(tmp_path, 2, FINISHES % 1)]
    done = {0: Outcome(state="finished", summary={"evaluation_return": 7.0}, error=None)}
    found = run_jobs(
        made,
        local,
        slots=1,
        grace_s=5,
        done=done,
        watch=lambda one: (one.folder / "on").exists(),
    )
    assert [one.state for one in found] == ["finished", "pruned", "finished"]
    assert not (tmp_path / "0").exists()
    assert [row["evaluation_return"] for row in table(tmp_path)] == ["7.0", "", "1"]
    more = [job(tmp_path, 3, FINISHES % 4)]  # a later batch
    run_jobs(more, local, slots=1, grace_s=5)
    assert [row["job"] for row in table(tmp_path)] == ["0", "1", "2", "3"]


def test_what_an_earlier_run_left_tells_nothing_of_this_one(tmp_path):
    made = [job(tmp_path, 0, "print('no GPU'); raise SystemExit(2)"), job(tmp_path, 1, "pass")]
    for one in made:
        one.folder.mkdir()
        (one.folder / "status.json").write_text('{"error": "of yesterday"}')
        (one.folder / "summary.json").write_text('{"state": "finished"}')
        (one.folder / "console.log").write_text("of yesterday\n")
    found = run_jobs(made, local, slots=2, grace_s=5)
    assert [one.error for one in found] == ["ended with status 2: no GPU", "ended with status 0"]


def test_a_signal_without_a_name_ends_only_its_job(tmp_path):
    made = [job(tmp_path, 0, "import os; os.kill(os.getpid(), 40)"), job(tmp_path, 1, FINISHES % 1)]
    found = run_jobs(made, local, slots=1, grace_s=5)
    assert [one.error for one in found] == ["was killed by signal 40", None]


def test_a_table_that_is_broken_or_cannot_be_written_ends_no_sweep(tmp_path, capsys):
    text = "job,state,seed,folder\n7,finished,7,7\n8,finished,8,8,too,many\nx,y\n\xff\n"
    (tmp_path / "runs.csv").write_bytes(text.encode("latin-1"))
    run_jobs([job(tmp_path, 0, FINISHES % 1)], local, slots=1, grace_s=5)
    assert [row["job"] for row in table(tmp_path)] == ["0", "7", "8"]
    (tmp_path / "runs.csv").unlink()
    (tmp_path / "runs.csv").mkdir()
    found = run_jobs([job(tmp_path, 1, FINISHES % 1)], local, slots=1, grace_s=5)
    assert found[0].state == "finished"
    assert "runs.csv cannot be written" in capsys.readouterr().err


DRIVER = """
import sys
from pathlib import Path
from tests.sweeps.test_sweeps import job, local
from rlx.sweeps.jobs import run_jobs
folder = Path(sys.argv[1])
write = "open('pid', 'w').write(str(os.getpid()))\\n"
polite = "import signal, time, sys\\n" + {polite!r}
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n"
made = [job(folder, 0, polite + write + "time.sleep(600)"),
        job(folder, 1, deaf + write + "time.sleep(600)"), job(folder, 2, "")]
run_jobs(made, local, slots=2, grace_s=float(sys.argv[2]))
"""
POLITE = """
def end(*_):
    import json
    json.dump({"state": "interrupted", "evaluation_return": None}, open("summary.json", "w"))
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
"""


def driver(folder: Path, grace_s: float) -> tuple[subprocess.Popen, list[int]]:
    """A sweep of three jobs, two of them under way, and their process ids."""
    code = DRIVER.replace("{polite!r}", repr(POLITE))
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(grace_s)])
    files = [folder / str(n) / "pid" for n in (0, 1)]
    until(lambda: all(f.exists() and f.read_text() for f in files), "jobs that started")
    return process, [int(f.read_text()) for f in files]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_job_the_deaf_ones_after_a_while(tmp_path, number):
    process, pids = driver(tmp_path, grace_s=1.0)
    process.send_signal(number)
    assert process.wait(WAIT_S) != 0
    assert all(map(is_gone, pids))
    rows = table(tmp_path)
    assert [row["state"] for row in rows] == ["interrupted", "failed", ""]
    assert "SIGKILL" in rows[1]["error"]


def test_jobs_end_with_a_sweep_that_is_killed(tmp_path):
    process, pids = driver(tmp_path, grace_s=60.0)
    process.kill()
    process.wait(WAIT_S)
    until(lambda: is_gone(pids[0]), "the polite job's end")
    assert json.loads((tmp_path / "0" / "summary.json").read_text())["state"] == "interrupted"
    os.kill(pids[1], signal.SIGKILL)  # SIGTERM is all that a job is sent


def test_a_run_that_a_batch_system_and_its_sweep_tell_to_end_still_saves():
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with sigterm_interrupts():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # does not kill the runs that are ending


def test_slots_share_cores_and_gpus():
    assert [share_of_cores(slot, [0, 1, 2, 3], 2) for slot in (0, 1, 2)] == [[0, 1], [2, 3], [0, 1]]
    assert share_of_cores(1, [4, 5], 8) == [4, 5]
    assert share_of_gpus(3, [], 1) == {}
    assert share_of_gpus(1, ["2", "5"], 1) == {"CUDA_VISIBLE_DEVICES": "5"}
    half = {"CUDA_VISIBLE_DEVICES": "2", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450"}
    assert share_of_gpus(2, ["2", "5"], 2) == half
    assert share_of_gpus(0, ["2", "5"], 1, slots=3) == half  # more jobs than was said


@pytest.mark.parametrize(
    "bad",
    [
        {"grace_s": -1},
        {"grace_s": "soon"},
        {"gpus": 0},
        {"environment": "A=1"},
        {"jobs_per_gpu": None},
        {"n_jobs": True},
    ],
)
def test_settings_of_a_launcher_are_refused_before_anything_begins(bad):
    given = {"n_jobs": 2, "cpus_per_job": None, "gpus": None, "jobs_per_gpu": 1}
    given |= {"skip_done": False, "grace_s": 60, "environment": {}}
    launcher = ProcessLauncher(**(given | bad))
    with pytest.raises(Refused, match=rf"^rlx: hydra.launcher.{next(iter(bad))}="):
        launcher.setup(hydra_context=HydraContext(None, None), task_function=None, config=None)


@pytest.mark.xdist_group("in turn")  # as all tests with Ray
def test_jobs_as_ray_tasks_are_lost_singly_and_never_started_again(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_GRPC_SERVER", "kept from jobs")
    from rlx.sweeps.ray_jobs import cluster_of_sweep

    begun = "open('begun', 'a').write('x'); open('pid', 'w').write(str(os.getpid()))\n"
    polite = "import signal, sys, time\n" + POLITE + begun + "time.sleep(600)"
    keys = "assert not any(k.startswith('RAY_') and 'AUTH' not in k for k in os.environ)\n"
    made = [
        job(tmp_path, 0, keys + "assert os.environ['MINE'] == '1'\n" + FINISHES % 1.5),
        job(tmp_path, 1, "raise ValueError('the env broke')"),
        job(tmp_path, 2, polite),  # its task will be killed
        job(tmp_path, 3, polite),  # and this one ended early
    ]

    def kill_a_task(one: Job) -> bool:
        if one.number == 2 and (one.folder / "pid").exists():
            pid = int((one.folder / "pid").read_text() or 0)
            if pid and not is_gone(pid):
                stat = Path(f"/proc/{pid}/stat").read_text()
                os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
        return one.number == 3 and (one.folder / "pid").exists()

    shares = {"cpus": 0.5, "gpus": 0, "resources": {}, "environment": {"MINE": "1"}, "grace_s": 20}
    heeded = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of what a script starts with &
    with cluster_of_sweep(None, **shares) as cluster:
        signal.signal(signal.SIGINT, heeded)
        for nobody_has in ({"gpus": 9}, {"resources": {"foo": 1}}):
            refused = pytest.raises(ConfigError, match="a run would never begin; the cluster has 0")
            with refused, cluster_of_sweep(None, **(shares | nobody_has)):
                pass
        found = run_jobs(made, cluster.start, slots=2, grace_s=20, watch=kill_a_task)
    assert [one.state for one in found] == ["finished", "failed", "failed", "pruned"]
    assert found[1].error == "ended with status 1: ValueError: the env broke"
    assert "was lost (WorkerCrashedError)" in found[2].error
    assert (tmp_path / "2" / "begun").read_text() == "x"
    until(lambda: is_gone(int((tmp_path / "2" / "pid").read_text())), "the end of a lost job")
    assert found[3].summary["state"] == "interrupted"


# --- sweeps of programs that only look like runs ---


class Given:
    """A sweep as Hydra hands it over, and launches of it; each job leaves what a run leaves."""

    def __init__(self, folder: Path, monkeypatch, *overrides: str) -> None:
        monkeypatch.setattr(sys, "argv", ["rlx-train"])
        self.folder = folder / "sweep"
        self.common = [f"hydra.sweep.dir={quote(str(self.folder))}", *overrides]
        self.started: list[Job] = []

    def sweep(self) -> Sweep:
        return Sweep(self._load([]), self._load)

    def _load(self, given: list[str]) -> DictConfig:
        return compose([*self.common, *given], keep_hydra=True)

    def launch(self, *batch: str, sweep: Sweep | None = None, code: str = FINISHES % 1, **how):
        how = {"skip_done": False, "also": lambda cfg: []} | how

        def start(one: Job, slot: int) -> LocalProcess:
            (one.folder / "env.json").write_text("{}")
            saved = [text for text in one.command if text.startswith(("seed=", "acting"))]
            (one.folder / ".hydra").mkdir(exist_ok=True)
            OmegaConf.save(compose(saved), one.folder / ".hydra" / "config.yaml")
            self.started.append(one)
            chdir = f"import os; os.chdir({str(one.folder)!r})\n"
            return local(replace(one, command=(sys.executable, "-c", chdir + code)), slot)

        each = [text.split() for text in batch]
        sweep = sweep or self.sweep()
        return sweep.launch(each, len(sweep._jobs), start, slots=lambda _: 2, grace_s=5, **how)


def test_jobs_that_would_share_a_folder_are_refused(tmp_path, monkeypatch):
    given = Given(tmp_path, monkeypatch, "hydra.sweep.subdir=n${agent.n_step}/run")
    with pytest.raises(Refused, match=r"subdir.*jobs 0 and 2 would share .*n3/run"):
        given.launch("agent.n_step=3", "agent.n_step=1", "agent.n_step=3 seed=1")
    assert not given.started
    given.launch("agent.n_step=3", "agent.n_step=1")
    assert [row["folder"] for row in table(given.folder)] == ["n3/run", "n1/run"]


def test_only_one_sweep_is_at_work_in_a_folder(tmp_path, monkeypatch):
    given = Given(tmp_path, monkeypatch)
    given.sweep()
    with only_one(given.folder), pytest.raises(Refused, match="another process is at work in it"):
        given.launch("seed=0")
    given.launch("seed=0", code="raise SystemExit(1)")
    held = only_one(given.folder / "0")  # a run that outlives its sweep
    with held, pytest.raises(Refused, match=r"sweep/0: another process is at work"):
        given.launch("seed=0", skip_done=True)
    given.launch("seed=0", skip_done=True)
    assert "resume=auto" in given.started[-1].command


def test_a_sweep_goes_on_on_another_cluster(tmp_path, monkeypatch):
    given, batch = Given(tmp_path, monkeypatch), ["acting=ray_pool seed=0"]
    for port in (1, 2):
        also = [f"acting.address='10.0.0.1:{port}'"]
        how = {"skip_done": port == 2, "also": lambda _, also=also: also}
        given.launch(*batch, code="1 / 0", **how)
    assert len(given.started) == 2
    (given.folder / "0" / ".hydra" / "config.yaml").write_text("a: [")
    with pytest.raises(Refused, match=r"0/.hydra/config.yaml cannot be read"):
        given.launch(*batch, skip_done=True)


def test_a_run_that_was_interrupted_is_no_success(tmp_path, monkeypatch, capsys):
    interrupted = FINISHES.replace("finished", "interrupted") % 1
    given = Given(tmp_path, monkeypatch)
    found = given.launch("seed=0", "seed=1", code=interrupted)
    assert [one.status for one in found] == [JobStatus.FAILED] * 2
    with pytest.raises(JobFailed, match=r"job 1 \(seed=1\): interrupted"):
        _ = found[1].return_value
    assert "job 0 (seed=0) interrupted: skip_done=true goes on" in capsys.readouterr().err


def test_a_bad_trial_of_a_search_fails_and_the_others_run(tmp_path, monkeypatch):
    given = Given(tmp_path, monkeypatch)
    sweep = given.sweep()
    sweep.searched = frozenset({"seed", "agent.n_step"})
    with pytest.raises(Refused, match=r"seed=-1 \(command line, job 0\)"):  # there is no good one
        given.launch("seed=-1", sweep=sweep)
    found = given.launch("seed=-1 agent.n_step=1", "seed=1 agent.n_step=1", sweep=sweep)
    assert [one.status.name for one in found] == ["FAILED", "COMPLETED"]
    assert given.launch("seed=-2", sweep=sweep)[0].status == JobStatus.FAILED
    assert [row["state"] for row in table(given.folder)] == [
        *("not started", "finished", "not started"),
    ]
    assert table(given.folder)[2]["error"].startswith("seed=-2")
    assert [row["agent.n_step"] for row in table(given.folder)] == ["1", "1", ""]


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "sweep").write_text("in the way")
    with pytest.raises(Refused, match=r"^rlx: hydra.sweep.dir=.*cannot be written"):
        Given(tmp_path, monkeypatch).sweep()


# --- whole sweeps --------------------------------------------------------------------------------


def sweep(folder: Path, *overrides: str) -> list[str]:
    given = ["-m", "hydra/launcher=rlx", f"hydra.sweep.dir={folder / 'sweep'}", *TINY, *overrides]
    return [sys.executable, "-m", "rlx.train", *given]


def done(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


def test_a_sweep_loses_a_killed_run_only_and_goes_on_with_it(tmp_path):
    own = ["seed=0,1", "hydra.launcher.n_jobs=2", "total_env_steps=3000"]
    process = subprocess.Popen(
        sweep(tmp_path, *own), cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    first, second = tmp_path / "sweep" / "0", tmp_path / "sweep" / "1"
    until(lambda: list(second.glob("checkpoints/[0-9]*")), "a checkpoint")
    os.kill(json.loads((second / "status.json").read_text())["pid"], signal.SIGKILL)
    told = process.communicate(timeout=240)[1]
    assert process.returncode == 1, told
    assert "job 1 (seed=1) failed after" in told
    assert "was killed by SIGKILL" in told
    assert "Traceback" not in told
    assert [row["state"] for row in table(tmp_path / "sweep")] == ["finished", "failed"]

    refused = done(sweep(tmp_path, *own), tmp_path)
    assert refused.returncode == 1
    assert "hydra.launcher.skip_done=true goes on" in refused.stderr
    on = "hydra.launcher.skip_done=true"
    changed = done(sweep(tmp_path, *own, on, "agent.discount=0.5"), tmp_path)
    assert changed.returncode == 1
    assert "agent.discount=0.5 (job 0): was 0.99" in changed.stderr
    bad = done(sweep(tmp_path, *own, on, "agent.discount=0.997,7"), tmp_path)
    assert "agent.discount=7" in bad.stderr
    assert "(job 1)" in bad.stderr

    ended = (first / "summary.json").stat().st_mtime_ns
    again = done(sweep(tmp_path, *own, on), tmp_path)
    assert again.returncode == 0, again.stderr
    assert "job 0" not in again.stderr
    assert (first / "summary.json").stat().st_mtime_ns == ended
    assert [row["state"] for row in table(tmp_path / "sweep")] == ["finished", "finished"]
    rows = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    steps = [row["env_steps"] for row in rows]
    assert steps == sorted(steps)
    assert (second / ".hydra").exists()


@pytest.mark.parametrize("bad", ["cpus_per_job=0", "n_jobs=two"])
def test_impossible_shares_are_refused_in_one_line(bad, tmp_path):
    found = done(sweep(tmp_path, "seed=0,1", f"hydra.launcher.{bad}"), tmp_path)
    assert found.returncode == 1
    assert f"rlx: hydra.launcher.{bad}: must be an integer of at least 1" in found.stderr
    assert "Traceback" not in found.stderr


def test_submitits_local_executor_runs_a_sweep(tmp_path):
    given = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", "seed=0,1"]
    given += ["hydra.sweep.dir=sweep", *TINY]
    found = done([sys.executable, "-m", "rlx.train", "-m", *given], tmp_path)
    assert found.returncode == 0, found.stderr
    summaries = (tmp_path / "sweep" / job / "summary.json" for job in "01")
    assert [json.loads(path.read_text())["state"] for path in summaries] == ["finished"] * 2


def test_the_last_line_of_a_console_is_told(tmp_path):
    (tmp_path / "console.log").write_text("one\n\nlast words\n\n")
    assert jobs._last_line(tmp_path / "console.log") == "last words"
    assert jobs._last_line(tmp_path / "none.log") == ""
    (tmp_path / "console.log").write_text("last words\n" + "\r".join(f"{i} %" for i in range(9)))
    assert jobs._last_line(tmp_path / "console.log") == "8 %"
    with (tmp_path / "console.log").open("ab") as file:
        file.truncate(1 << 33)  # a sparse file of 8 GB
        file.write(b"\nand still\n")
    assert jobs._last_line(tmp_path / "console.log") == "and still"
