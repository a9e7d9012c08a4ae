"""A run records the code it was made with; Git's answers are bytes of any encoding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlx.runs import provenance
from rlx.runs.folders import is_used

DIFF = b"diff --git a/x b/x\n+caf\xe9 \xff\xfe\x00\n"


@pytest.fixture
def git(tmp_path, monkeypatch):
    """A `git` that answers with bytes which are no UTF-8."""
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    program.write_bytes(b"#!/bin/sh\nprintf 'diff --git a/x b/x\\n+caf\\351 \\377\\376\\000\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_bytes_that_are_no_utf8_are_kept_as_they_are(git, tmp_path, locale):
    code = (
        "import sys, pathlib; from rlx.runs.provenance import save; save(pathlib.Path(sys.argv[1]))"
    )
    own = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for number in ("", "-1"):
        line = [sys.executable, "-c", code, str(tmp_path)]
        subprocess.run(line, env={**os.environ, **own}, check=True, timeout=60)
        assert (tmp_path / f"git{number}.diff").read_bytes().startswith(DIFF)
        json.loads((tmp_path / f"env{number}.json").read_bytes())


@pytest.mark.parametrize("answer", ["exit 1", "kill -9 $$", "exec false"])
def test_git_ends_no_run(git, tmp_path, answer):
    git.write_text(f"#!/bin/sh\n{answer}\n")
    provenance.save(tmp_path)
    assert json.loads((tmp_path / "env.json").read_bytes())["git"] is None
    assert not (tmp_path / "git.diff").exists()


def test_a_folder_counts_as_used_when_all_was_written(git, tmp_path):
    (tmp_path / "git.diff").mkdir()  # it cannot be written
    with pytest.raises(OSError, match="directory"):
        provenance.save(tmp_path)
    assert not is_used(tmp_path)


def test_the_revision_of_the_checkout_is_known():
    root = Path(__file__).resolve().parents[2]
    asked = ["git", "-C", str(root), "rev-parse", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    expected = done.stdout.strip() if (root / ".git").exists() else None
    assert provenance.record()["git"] == expected
