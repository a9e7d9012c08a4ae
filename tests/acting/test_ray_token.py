"""Clusters with and without a token, joined and started by real runs and real drivers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlx.cluster import token as ray_token
from rlx.cluster.cluster import Cluster
from rlx.problems import ConfigError

KEYS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
TOKEN, OTHER = "a" * 64, "b" * 64
# A driver that hears of an actor which asks the driver for an object: what a wrong mode breaks.
DRIVER = """
import sys
import numpy as np, ray
from rlx.cluster.cluster import Cluster
cluster = Cluster(address=None if sys.argv[1] == "own" else sys.argv[1], store_bytes=0)
@ray.remote(num_cpus=0)
class Sum:
    def of(self, references): return float(ray.get(references[0]).sum())
print("sum", ray.get(Sum.remote().of.remote([ray.put(np.ones(300_000))]), timeout=60))
cluster.close()
import os
print("left", sorted(key for key in os.environ if key.startswith("RAY_AUTH")))
"""


def environment(home: Path, **changes: str) -> dict[str, str]:
    """The variables of a user whose home is `home`, with these settings of tokens and no others."""
    rest = {key: value for key, value in os.environ.items() if key not in KEYS}
    return rest | {"HOME": str(home)} | changes


@contextmanager
def started(**token: str) -> Iterator[str]:
    """The address of a cluster that `ray start` has started, by a user with an empty home."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # pytest's is too long for Ray's sockets
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--head", "--block", f"--port={port}", "--num-cpus=2", f"--temp-dir={folder}")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
    head = subprocess.Popen(
        [*command, "--include-dashboard=false", "--disable-usage-stats"],
        env=environment(folder, PYTHONUNBUFFERED="1", **token),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert any("Ray runtime started" in line for line in head.stdout), head.wait(30)
        yield f"127.0.0.1:{port}"
    finally:
        head.send_signal(signal.SIGTERM)
        head.communicate(timeout=60)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """A cluster that asks for TOKEN."""
    with started(RAY_AUTH_TOKEN=TOKEN) as address:
        yield address


@pytest.fixture(scope="module")
def unguarded() -> Iterator[str]:
    with started(RAY_AUTH_MODE="disabled") as address:
        yield address


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def with_token(home: Path, token: str) -> Path:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(token)
    return home


def driver(address: str, settings: dict[str, str]) -> str:
    """The driver's output; its one line of refusal if it is refused."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, address],
        env=settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 or "ConfigError" in done.stderr, done.stderr
    return done.stdout or done.stderr.splitlines()[-1]


WORKS = "sum 300000.0\nleft {}\n"


def test_a_token_in_the_home_folder_opens_the_cluster_that_asks_for_it(guarded, home):
    """Ray alone, given host:port, would not show it."""
    settings = environment(with_token(home, TOKEN))
    assert driver(guarded, settings) == WORKS.format([])


def test_auto_shows_the_token_too(guarded, home):
    settings = environment(home, RAY_ADDRESS=guarded, RAY_AUTH_TOKEN=TOKEN)
    assert driver("auto", settings) == WORKS.format(["RAY_AUTH_TOKEN"])


def test_auto_tries_what_it_finds(home):
    """Ray finds the processes of a dead cluster, too, and would ask it for minutes."""
    says = driver("auto", environment(home, RAY_ADDRESS="127.0.0.1:1"))
    assert "acting.address=auto: cannot be reached " in says
    assert " port 1 for " in says


def test_what_listens_and_is_no_cluster_is_refused(monkeypatch):
    monkeypatch.setattr(ray_token, "ASK_S", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address}, asked for"):
            Cluster(address=address, store_bytes=0)


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("x" * 90, "would have names of more than 107 bytes; set RAY_TMPDIR to a folder with a"),
        ("a file", "Ray cannot start here: "),
    ],
)
def test_where_an_own_cluster_cannot_start_a_line_says_what_to_set(home, tmp_path, folder, says):
    (tmp_path / "a file").touch()
    told = driver("own", environment(home, TMPDIR=str(tmp_path / folder)))
    assert "acting.address=null: " in told
    assert says in told
    assert "RAY_TMPDIR" in told


def test_an_own_cluster_needs_no_home(home):
    settings = environment(home) | {"HOME": "/proc/nothing"}
    assert driver("own", settings) == WORKS.format([])


REFUSALS = [
    ({"RAY_AUTH_TOKEN": OTHER}, "refused the token from RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN, or"),
    ({}, "asks for a token, and there is none here; set RAY_AUTH_TOKEN, or write "),
    ({"RAY_AUTH_MODE": "disabled"}, "asks for a token, but RAY_AUTH_MODE=disabled is set here"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSALS)
def test_what_has_not_the_right_token_is_told_what_to_do(guarded, home, changes, says):
    assert says in driver(guarded, environment(home, **changes))


def test_a_run_with_another_token_is_one_line_and_status_2(guarded, home):
    command = [sys.executable, "-m", "rlx.train", "acting=ray_pool", f"acting.address={guarded}"]
    done = subprocess.run(
        [*command, f"hydra.run.dir={home / 'run'}"],
        env=environment(home, RAY_AUTH_TOKEN=OTHER),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("rlx: ")]
    assert f"acting.address={guarded}: the cluster there refused the token from " in line
    assert "Traceback" not in done.stderr
    assert "gcs_client" not in done.stderr  # what Ray prints every second until it gives up
    assert not (home / "run" / "env.json").exists()


def test_a_path_without_a_token_is_refused(guarded, home):
    settings = environment(home, RAY_AUTH_TOKEN_PATH=str(home / "none"))
    says = f"RAY_AUTH_TOKEN_PATH={home / 'none'}: no file with a token; write one or unset it"
    assert driver(guarded, settings).endswith(says)


@pytest.mark.parametrize("address", ["auto", "host:port"])
def test_a_token_is_not_shown_to_a_cluster_that_asks_for_none(unguarded, home, address):
    """Its actors would never answer this driver."""
    settings = environment(with_token(home, TOKEN), RAY_ADDRESS=unguarded)
    assert driver("auto" if address == "auto" else unguarded, settings) == WORKS.format([])


def test_a_mode_that_an_open_cluster_cannot_work_with_is_refused(unguarded, home):
    settings = environment(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    says = "the cluster there asks for no token, but RAY_AUTH_MODE=token is set here; unset it"
    assert driver(unguarded, settings).endswith(says)


def test_an_own_cluster_writes_no_token_into_the_home_folder(tmp_path):
    """Here it could not; in a folder that several runs share, they would overwrite each other's."""
    (tmp_path / "home").write_text("a file")
    assert driver("own", environment(tmp_path / "home")) == WORKS.format([])


@pytest.mark.slow  # three clusters
@pytest.mark.parametrize("where", ["home", "environment", "switched off"])
def test_an_own_cluster_uses_the_token_that_is_there(home, where):
    changes = {
        "environment": {"RAY_AUTH_TOKEN": TOKEN},
        "switched off": {"RAY_AUTH_MODE": "disabled"},
    }.get(where, {})
    if where == "home":
        with_token(home, TOKEN)
    assert driver("own", environment(home, **changes)) == WORKS.format(sorted(changes))
