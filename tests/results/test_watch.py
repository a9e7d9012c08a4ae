"""The page and its JSON over HTTP, on real runs: one finished, one failed, one killed."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import yaml

from rlx import watch
from rlx.config.options import read_options
from rlx.problems import ConfigError
from rlx.results.live import EVALUATION, TRAIN, LiveRuns, RowsFile, thin
from tests.training.test_run import EVALUATED, ROOT, TINY

HOSTILE = "<img src=x onerror='document.title=1'> & no more"
# One process: a run that finishes, one that fails in its second interval, one without an end.
RUNS = """
import sys
import rlx
from rlx.training.stages import Stages
folder, text, *tiny = sys.argv[1:]
run = lambda name, *more: rlx.run(rlx.compose([*tiny, *more]), f"{folder}/{name}")
run("finished", "total_env_steps=600", "tags=[done]")
learn = Stages.learn
def learn_and_fail(loop):
    learn(loop)
    if loop.count.env_steps > 300:
        raise ValueError(text)
Stages.learn = learn_and_fail
try:
    run("failed")
except ValueError:
    pass
Stages.learn = learn
run("sweep/0", "total_env_steps=100_000_000", "replay.ratio=0.05")
"""
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
QUIET = ("first-run", "default-browser-check", "sandbox")


def until(found: Callable[[], Any], what: str, seconds: float = 90) -> Any:
    """Waits until `found` gives something, and returns that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A folder of runs, and the process of the one that goes on."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = [sys.executable, "-c", RUNS, str(folder), HOSTILE, *TINY, EVALUATED]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def is_running() -> bool:
        assert process.poll() is None, process.stderr.read()
        path = folder / "sweep" / "0" / "metrics.jsonl"
        return path.exists() and b"\n" in path.read_bytes()

    try:
        until(is_running, "a run that goes on")
        yield folder, process
    finally:
        process.kill()
        process.communicate()


class Client:
    """A server of a folder, and questions to it."""

    def __init__(self, folder: Path) -> None:
        self.server = watch.open_server(folder, "127.0.0.1", 0)
        self.address = self.server.server_address[:2]
        Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[Any, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer, data

    def json(self, path: str) -> Any:
        answer, data = self.ask(path)
        assert answer.status == 200, data
        return json.loads(data)

    def runs(self) -> dict[str, Any]:
        return {run["name"]: run for run in self.json("/api/runs")["runs"]}

    def run(self, name: str, *metrics: str) -> Any:
        query = "".join(f"&metric={quote(metric, safe='')}" for metric in metrics)
        return self.json(f"/api/run?name={quote(name, safe='')}{query}")


@pytest.fixture
def serve():
    clients: list[Client] = []

    def serve(folder: Path) -> Client:
        clients.append(Client(folder))
        return clients[-1]

    yield serve
    for client in clients:
        client.server.shutdown()
        client.server.server_close()


@pytest.fixture(scope="module")
def ended(live, tmp_path_factory):
    """A copy of the folder in which nothing moves."""
    folder = tmp_path_factory.mktemp("ended") / "runs"
    shutil.copytree(live[0], folder, ignore=shutil.ignore_patterns("sweep"))
    return folder


@pytest.fixture
def copied(ended, tmp_path):
    folder = Path(shutil.copytree(ended, tmp_path / "runs"))
    (folder / "finished" / ".hydra" / "config.yaml").touch()  # as if it had just begun
    return folder


def add_row(folder: Path, *, end: str = "\n", **changes: Any) -> None:
    path = folder / "metrics.jsonl"
    row = json.loads(path.read_bytes().splitlines()[0]) | changes
    with path.open("a") as file:
        file.write(json.dumps(row) + end)


def set_status(folder: Path, **changes: Any) -> None:
    path = folder / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- the runs ------------------------------------------------------------------------------------


def test_a_live_run_moves_and_is_known_as_dead_once_it_is_killed(live, serve):
    folder, process = live
    client = serve(folder)
    assert {name: run["state"] for name, run in client.runs().items()} == {
        "failed": "failed",
        "finished": "finished",
        "sweep/0": "running",
    }
    first = client.runs()["sweep/0"]
    assert first["total_env_steps"] == 100_000_000
    later = until(
        lambda: (r := client.runs()["sweep/0"])["env_steps"] > first["env_steps"] and r, "a row"
    )
    assert len(later["train"][0]) > len(first["train"][0]) or len(later["train"][0]) == 48
    assert later["left_s"] > 60
    assert later["env_steps_per_s"] > 0
    assert "% of the time" in later["bottleneck"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    dead = client.runs()["sweep/0"]
    assert (dead["state"], dead["left_s"]) == ("died", None)
    assert f"process {process.pid} is gone; resume={folder}/sweep/0" in dead["note"]


def test_what_ended_runs_came_to(ended, serve):
    runs = serve(ended).runs()
    summary = json.loads((ended / "finished" / "summary.json").read_text())
    finished = runs["finished"]
    assert finished["env_steps"] == summary["env_steps"] >= 600
    for name in ("updates", "train_return", "evaluation_return"):
        assert finished[name] == summary[name] is not None
    assert finished["evaluation"][1][-1] == summary["evaluation_return"]
    assert (finished["env"], finished["agent"], finished["seed"]) == ("CartPole-v1", "R2D2", 0)
    assert finished["note"] == ""
    assert runs["failed"]["note"] == f"ValueError: {HOSTILE}"


def test_curves_of_any_metric_grow_by_what_was_added(copied, serve):
    client, name = serve(copied), "learner/grad_norm"
    before = client.run("finished", name, "no/such", EVALUATION)
    assert before["curves"].keys() == {name, EVALUATION}
    assert {name, TRAIN, EVALUATION, "time/acting"} <= set(before["metrics"])
    assert "no/such" not in before["metrics"]
    add_row(copied / "finished", env_steps=5000, **{name: 2.5})
    after = client.run("finished", name)["curves"][name]
    assert after == [[*before["curves"][name][0], 5000], [*before["curves"][name][1], 2.5]]
    assert client.run("finished", "updates")["curves"]["updates"][0][-1] == 5000


def test_actors_and_their_restarts(copied, serve):
    acting = {"ready": 3.0, "wanted": 4.0}
    gauges = {f"acting/actors_{name}": n for name, n in acting.items()} | {"acting/restarts": 2.0}
    add_row(copied / "finished", **gauges)
    run = serve(copied).runs()["finished"]
    assert [run[name] for name in ("actors_ready", "actors_wanted", "restarts")] == [3, 4, 2]


def test_half_a_line_waits_for_its_end_and_a_broken_one_is_passed_over(copied):
    rows = RowsFile(copied / "finished" / "metrics.jsonl")
    rows.poll()
    count = len(rows.columns["env_steps"])
    add_row(copied / "finished", env_steps=7000, end="")
    rows.poll()
    assert len(rows.columns["env_steps"]) == count
    with (copied / "finished" / "metrics.jsonl").open("a") as file:
        file.write("\n{half\n[1]\n")
    add_row(copied / "finished", env_steps=8000)
    rows.poll()
    assert list(rows.columns["env_steps"][count:]) == [7000, 8000]


@pytest.mark.parametrize("longer", [False, True])
def test_a_file_that_a_resume_shortened_is_read_anew(copied, longer):
    path = copied / "finished" / "metrics.jsonl"
    rows = RowsFile(path)
    rows.poll()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])
    for env_steps in (900, 910, 920, 930, 940)[: 5 if longer else 1]:
        add_row(copied / "finished", env_steps=env_steps)
    assert (path.stat().st_size > len(b"".join(lines))) == longer
    rows.poll()
    first = json.loads(lines[0])["env_steps"]
    assert list(rows.columns["env_steps"])[:2] == [first, 900]
    assert len(rows.columns["env_steps"]) == (6 if longer else 2)


def test_only_what_was_added_is_read(copied, monkeypatch):
    path = copied / "finished" / "metrics.jsonl"
    rows = RowsFile(path)
    taken: list[bytes] = []
    take = RowsFile._take
    monkeypatch.setattr(
        RowsFile, "_take", lambda self, line: (taken.append(line), take(self, line))
    )
    rows.poll()
    rows.poll()
    assert len(taken) == len(path.read_bytes().splitlines())
    add_row(copied / "finished", env_steps=9999)
    taken.clear()
    rows.poll()
    assert [json.loads(line)["env_steps"] for line in taken] == [9999]


def test_states_that_only_the_process_shows(copied):
    run = copied / "finished"

    def state() -> tuple[str, str]:
        (found,) = (r for r in LiveRuns(copied).all() if r["name"] == "finished")
        return found["state"], found["note"]

    now = datetime.now(UTC)
    old = (now - timedelta(minutes=12)).isoformat(timespec="seconds")
    set_status(run, state="running", pid=os.getpid(), updated_at=now.isoformat())
    assert state() == ("running", "")
    set_status(run, updated_at=old)
    assert state() == ("silent", f"process {os.getpid()} told nothing for 12 minutes")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
    set_status(run, pid=gone.pid, updated_at=now.isoformat())
    assert state()[0] == "died"  # ended, though nobody asked yet how
    gone.wait()
    assert state()[0] == "died"
    set_status(run, host=f"not-{platform.node()}")  # of which this machine knows nothing
    assert state() == ("running", "")
    (run / "status.json").unlink()
    assert state()[0] == "starting"
    os.utime(run / ".hydra" / "config.yaml", (0, 0))
    assert state()[0] == "died"


def test_a_resumed_run_is_told_by_what_it_was_resumed_with(copied):
    folder = copied / "finished" / ".hydra" / "resume-1"
    folder.mkdir()
    (folder / "config.yaml").write_text("total_env_steps: 777\n")
    (folder / "overrides.yaml").write_text("- total_env_steps=777\n")
    runs = {run["name"]: run for run in LiveRuns(copied).all()}
    assert runs["finished"]["total_env_steps"] == 777


@pytest.mark.parametrize(
    "name", ["status.json", "summary.json", "metrics.jsonl", ".hydra/config.yaml"]
)
@pytest.mark.parametrize(
    "content", [b"", b"[1, 2]", b'{"state": [1], "env_steps": "x"}\n', b"\xff\x00{"]
)
def test_files_that_hold_anything_do_not_stop_the_others(copied, serve, name, content):
    (copied / "finished" / name).write_bytes(content)
    runs = serve(copied).runs()
    assert runs["failed"]["state"] == "failed"
    assert runs["finished"]["state"] in ("finished", "starting")


BOMB = "a0: &a0 [xxxxxxxxxxxxxxxx]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (".hydra/config.yaml", "[" * 50_000),
        (".hydra/config.yaml", "seed: " + "9" * 400),
        (".hydra/overrides.yaml", BOMB),
        (".hydra/overrides.yaml", "\n".join(f"- a{i}={'x' * 900}" for i in range(1000))),
        (".hydra/hydra.yaml", BOMB),
        ("status.json", '{"a":' * 50_000),
        ("status.json", json.dumps({"state": "x" * 1_000_000, "error": "y" * 1_000_000})),
        ("summary.json", '{"evaluation_return": ' + "1" * 400 + "}"),
        ("metrics.jsonl", "[" * 50_000 + "\n"),
        ("metrics.jsonl", "x" * 5_000_000 + "\n"),
        ("metrics.jsonl", '{"env_steps": 1, "train/return_mean": 1e308}\n' * 200),
        ("metrics.jsonl", '{"env_steps": ' + "1" * 400 + "}\n"),
        ("metrics.jsonl", json.dumps({"env_steps": 1} | {f"m{i}" * 99: 1 for i in range(9999)})),
    ],
    ids=lambda text: text[:20],
)
def test_one_hostile_file_costs_that_file(copied, serve, name, content):
    (copied / "finished" / name).write_text(content)
    client = serve(copied)
    answer, data = client.ask("/api/runs")
    assert answer.status == 200
    assert len(data) < 1_000_000
    assert {run["name"] for run in json.loads(data)["runs"]} >= {"failed", "finished"}
    assert client.ask(f"/api/run?name=finished&metric={quote('train/return_mean', safe='')}")[1]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((h, 200) for h in ("localhost", "LOCALHOST:80", "127.0.0.1:8080", "[::1]:1", "10.0.0.7")),
        *((h, 403) for h in ("evil.example", "evil.example:8080", "localhost.evil.example", "")),
        ("known.example:1", 200),
    ],
)
def test_only_names_of_this_machine_are_answered(copied, host, status):
    with watch.open_server(copied, "127.0.0.1", 0, ["known.example"]) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        for path in ("/", "/api/runs"):
            connection = http.client.HTTPConnection(*server.server_address)
            connection.request("GET", path, headers={"Host": host})
            assert connection.getresponse().status == status
            connection.close()
        server.shutdown()


def test_metrics_are_known_by_any_row_and_not_by_the_last_alone(copied):
    path = copied / "finished" / "metrics.jsonl"
    last = json.loads(path.read_bytes().splitlines()[-1])
    row = dict.fromkeys(last) | {"env_steps": last["env_steps"] + 1}  # without an update
    path.write_bytes(path.read_bytes() + json.dumps(row).encode() + b"\n")
    run = LiveRuns(copied).one("finished", ["learner/loss"])
    assert "learner/loss" in run["metrics"]
    assert run["curves"]["learner/loss"][1]


def test_what_may_not_be_read_does_not_stop_the_others(tmp_path, closed):
    for name in ("folder", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text('{"state": "finished"}')
    (tmp_path / "folder" / "metrics.jsonl").mkdir()  # as one of another user: open fails
    found = {run["name"]: run["state"] for run in LiveRuns(tmp_path).all()}
    assert found == {"folder": "finished", "open": "finished"}


def test_a_run_that_went_away_is_left_out(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text("{}")
    runs = LiveRuns(tmp_path)
    assert len(runs.all()) == 2
    shutil.rmtree(tmp_path / "a")
    assert len(runs.all()) == 1


def test_small_parts():
    pairs = [(float(i), float(i % 2)) for i in range(1001)]
    xs, ys = thin(pairs, 11)
    assert (len(xs), xs[-1], ys[-1], ys[0]) == (11, 1000, 0, 0.5)
    assert thin(pairs[:3], 11) == [[0, 1, 2], [0, 1, 0]]
    assert thin([(0, 1), (2, 3), (4, 5), (6, 7), (8, 100)], 3) == [[1, 5, 8], [2, 6, 100]]


def test_a_run_of_several_tasks_names_them(copied, serve):
    path = copied / "finished" / ".hydra" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["env"] = {"ids": ["Here-v0", "There-v1"]}
    path.write_text(yaml.safe_dump(settings))
    runs = serve(copied).runs()
    assert runs["finished"]["env"] == "Here-v0, There-v1"
    assert "," not in runs["failed"]["env"]


# --- the server ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/../../etc/passwd", 404),
        ("/watch.py", 404),
        ("//elsewhere/", 404),
        ("/api/run?name=..", 404),
        ("/api/run?name=%2Fetc", 404),
        ("/api/run?name=finished%2F..%2Ffailed", 404),
        ("/api/run?name=finished%00", 404),
        ("/api/run", 400),
        ("/api/run?name=a&name=b", 400),
        ("/api/run?name=finished" + "&metric=a" * 65, 400),
    ],
)
def test_bad_requests(ended, serve, path, status):
    answer, data = serve(ended).ask(path)
    assert answer.status == status
    assert json.loads(data).keys() == {"error"}


def test_only_get(ended, serve):
    client = serve(ended)
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"):
        answer, _ = client.ask("/api/runs", method)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET")


def test_large_answers_are_packed_for_those_who_can_unpack_them(ended, serve):
    client = serve(ended)
    answer, data = client.ask("/", **{"Accept-Encoding": "gzip"})
    assert answer.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(data) == client.ask("/")[1] == watch.PAGE.read_bytes()


def test_the_page_asks_no_other_host_and_makes_no_markup_of_texts():
    page = watch.PAGE.read_text()
    urls = set(re.findall(r"https?://[^\"'\s]+", page))
    assert urls <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(", page)
    policy = watch.content_policy(page)
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/=]{44}';", policy)


def test_it_says_its_url_refuses_a_taken_port_and_ends_with_ctrl_c(ended):
    start = [sys.executable, "-m", "rlx.watch", f"runs={ended}"]
    process = subprocess.Popen(
        [*start, "port=0"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        port = urlsplit(url.group()).port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/api/runs")  # and stays open
        assert len(json.loads(connection.getresponse().read())["runs"]) == 2
        with pytest.raises(ConfigError, match=f"port={port}: cannot be .* port=0 for a free one"):
            watch.open_server(ended, "127.0.0.1", port)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, err, out.strip()) == (0, "", "")


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("runs=/no/such", "runs=/no/such: no such folder"),
        ("port=99999", "port=99999: accepted: an int >= 0 and <= 65,535"),
        ("port=x", "port=x: accepted: an int >= 0"),
        ("prot=1", "prot=1: no such option; did you mean port?"),
        ("host=no.such.invalid", "host=no.such.invalid: no such host"),
    ],
)
def test_bad_options_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, argument, says):
    monkeypatch.setattr(sys, "argv", ["rlx.watch", f"runs={tmp_path}", "port=0", argument])
    with pytest.raises(SystemExit) as left:
        watch.main()
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"rlx.watch: {says}")


def test_it_listens_on_this_machine_alone_unless_told():
    options = read_options(watch.Options, [])
    assert (options.runs, options.host, options.port) == ("outputs", "127.0.0.1", 8080)


# --- the page ------------------------------------------------------------------------------------


def browse(url: str, folder: Path) -> str:
    """The page's elements after its scripts ran for a while."""
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--disable-gpu", *(f"--no-{what}" for what in QUIET)),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={folder}", "--virtual-time-budget=3000", "--dump-dom", url),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed, which this test opens")
def test_a_browser_shows_all_runs_and_one_and_runs_nothing_that_they_say(ended, serve, tmp_path):
    url = serve(ended).server.url
    page = browse(url, tmp_path / "one")
    cards = re.findall(r'<a class="card" href="#([^"]+)"', page)
    assert sorted(cards) == ["failed", "finished"]
    assert "&lt;img src=x onerror=" in page
    assert "<img" not in page
    assert "<title>rlx.watch</title>" in page
    assert re.search(r'<path class="train" d="M[\d.]+ [\d.]+L', page)
    assert 'id="lost" role="alert" hidden' in page
    page = browse(f"{url}#finished", tmp_path / "other")
    titles = re.findall(r'<svg role="img" aria-label="([^"]+)"', page)
    assert titles[:2] == ["return over env steps", "learner/loss"]
    assert 'title="learner/grad_norm"' in page


def test_the_page_is_in_the_wheel(tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    files = WheelBuilder(str(ROOT)).recurse_included_files()
    assert "rlx/watch_page.html" in {file.distribution_path for file in files}
