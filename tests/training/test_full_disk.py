"""A full disk, and a limit on the size of files: one line each, and the way on if there is one."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import SMALL

MORE = ["evaluation.final_episodes=0", "logging.every_env_steps=100"]


def train(*arguments: str, most: int | None = None) -> subprocess.CompletedProcess[str]:
    """A run whose files may not be larger than `most` bytes."""
    line = [sys.executable, "-m", "rlx.train", *arguments]

    def limited() -> None:
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    return subprocess.run(
        line, preexec_fn=limited, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", disk], check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("rlx: ")]


def test_a_full_disk_at_a_checkpoint_is_a_line_and_the_way_on(small_disk):
    run = small_disk / "run"
    keep = "checkpoint.keep=9"
    done = train(*SMALL, *MORE, keep, "total_env_steps=9000", f"hydra.run.dir={run}")
    assert done.returncode == 1
    assert told(done) == [
        f"rlx: {run} cannot be written (No space left on device); make room there",
        f"rlx: resume={run} goes on from the last checkpoint",
    ]
    with (small_disk / "more").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    done = train(f"resume={run}")
    assert done.returncode == 2
    (line,) = told(done)
    assert line.startswith("rlx: resume=")
    assert "(No space left on device); make room, then resume again" in line
    assert not list((run / ".hydra").glob("resume-*"))
    (small_disk / "more").unlink()
    newest = max((run / "checkpoints").glob("[0-9]*"))
    shutil.copytree(run, small_disk.parent / "copy")
    done = train(f"resume={small_disk.parent / 'copy'}", f"total_env_steps={int(newest.name) + 20}")
    assert done.returncode == 0, done.stderr


def test_files_that_may_not_grow_are_a_line(tmp_path):
    arguments = (*SMALL, *MORE, "total_env_steps=3000", f"hydra.run.dir={tmp_path / 'run'}")
    done = train(*arguments, most=20_000)
    assert (done.returncode, len(told(done))) == (2, 1)
    assert "cannot be made or written (File too large)" in done.stderr
    assert not os.path.exists(tmp_path / "run" / ".hydra")
    done = train(*arguments, most=200_000)
    assert done.returncode == 1
    assert (
        told(done)[0]
        == f"rlx: {tmp_path / 'run'} cannot be written (File too large); make room there"
    )


def test_a_full_shared_memory_is_named(tmp_path):
    """Locks between processes take room there, and their error names no file."""
    full = "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 8k /dev/zero > /dev/shm/x; "
    own = (*SMALL, "logging.tensorboard=true", f"hydra.run.dir={tmp_path / 'run'}")
    line = [sys.executable, "-m", "rlx.train", *own]
    within = ["unshare", "--mount", "bash", "-c"]
    if subprocess.run([*within, "mount -t tmpfs tmpfs /dev/shm"], capture_output=True).returncode:
        pytest.skip("only root may mount")
    done = subprocess.run(
        [*within, full + 'exec "$@"', "bash", *line], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert told(done) == [
        "rlx: /dev/shm cannot be written (No space left on device); make room there"
    ]
