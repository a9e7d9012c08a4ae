"""Memory in huge pages: asked for where the kernel and glibc give them, once, and by commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest

from rlx.machine import memory
from tests.conftest import SMALL


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files of a kernel that gives huge pages to those who ask."""
    modes = tmp_path / "sys/kernel/mm/transparent_hugepage/enabled"
    modes.parent.mkdir(parents=True)
    modes.write_text("always [madvise] never\n")
    return tmp_path


def test_what_was_in_the_environment_stays(root, monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: (2, 35))
    before = {"HOME": "/x", "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    after = memory.with_huge_pages(before, root)
    assert after == before | {"GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.hugetlb=1"}
    assert memory.with_huge_pages(after, root) is None  # a command begins anew once


@pytest.mark.parametrize("modes", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_nothing_is_done_where_the_kernel_gives_them_to_all_or_none(root, modes):
    path = root / "sys/kernel/mm/transparent_hugepage/enabled"
    path.unlink() if modes is None else path.write_text(modes)
    assert memory.with_huge_pages({}, root) is None


@pytest.mark.parametrize("given", ["glibc.malloc.hugetlb=0", "a.b=1:glibc.malloc.hugetlb=2"])
def test_what_the_user_said_of_them_is_kept(root, given):
    assert memory.with_huge_pages({"GLIBC_TUNABLES": given}, root) is None


@pytest.mark.parametrize("library", ["glibc 2.34", "musl 1.2", "glibc x", None])
def test_nothing_is_done_with_another_library(root, monkeypatch, library):
    monkeypatch.setattr(os, "confstr", lambda name: library)
    assert memory.with_huge_pages({}, root) is None


def test_a_run_has_them_and_keeps_its_arguments_and_its_process(tmp_path):
    wanted = memory.with_huge_pages({})
    if wanted is None:
        pytest.skip("this machine gives none to those who ask")
    environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    line = [sys.executable, "-m", "rlx.train", *SMALL, f"hydra.run.dir={tmp_path / 'a run'}"]
    process = subprocess.Popen(line, env=environ, cwd=tmp_path, stderr=subprocess.DEVNULL)
    has, ends_s = f"GLIBC_TUNABLES={wanted['GLIBC_TUNABLES']}".encode(), monotonic() + 120
    try:
        while has not in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
            assert process.poll() is None
            assert monotonic() < ends_s, "the process has no such environment"
            sleep(0.01)
        given = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[1:-1]
        assert given == [word.encode() for word in line[1:]]
        while not (tmp_path / "a run" / "metrics.jsonl").exists():
            assert process.poll() is None
            assert monotonic() < ends_s, "the run did not begin"
            sleep(0.05)
    finally:
        process.kill()
        process.wait()
