"""Records what a run was made with: versions, machine, git revision, uncommitted changes."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from rlx.runs.files import write_json, write_whole

GIT_S = 60.0  # for an answer, on a slow disk
PACKAGES = (
    *("rlx", "jax", "jaxlib", "flax", "optax", "numpy"),
    *("envpool", "gymnasium", "ray", "hydra-core", "omegaconf"),
)


def save(folder: Path) -> None:
    """Writes env.json and, where there are uncommitted changes, git.diff.

    A resumed run keeps the first ones and adds env-1.json, env-2.json, ... env.json comes last: it
    marks the folder as used. Git, whatever it answers or lacks, never ends a run.
    """
    number = len(list(folder.glob("env*.json")))
    suffix = f"-{number}" if number else ""
    found = record()
    if diff := changes():
        write_whole(folder / f"git{suffix}.diff", diff + b"\n")
    write_json(folder / f"env{suffix}.json", found)


def record() -> dict[str, Any]:
    """Versions, machine and git revision of this process; None for what is not there."""
    revision = _git("rev-parse", "HEAD")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "git": revision.decode(errors="replace") if revision else None,
    }


def changes() -> bytes | None:
    """Git's diff of what is not committed in rlx's checkout; None where there is no checkout."""
    return _git("diff", "--no-ext-diff", "--no-textconv", "HEAD", "--", ".")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> bytes | None:
    """Git's answer, bytes of any encoding, about the checkout of rlx; None where there is none."""
    root = Path(__file__).resolve().parents[2]
    tracked = ("ls-files", "--error-unmatch", "rlx/types.py")  # not merely a venv in a checkout
    try:
        for command in (tracked, arguments):
            done = subprocess.run(
                ["git", "-C", str(root), *command],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=GIT_S,
                check=True,
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
