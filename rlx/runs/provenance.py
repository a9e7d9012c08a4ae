"""Records what a run was made with: versions, machine, git revision, uncommitted changes."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

PACKAGES = (
    *("rlx", "jax", "jaxlib", "flax", "optax", "numpy"),
    *("envpool", "gymnasium", "ray", "hydra-core", "omegaconf"),
)


def save(folder: Path) -> None:
    """Writes env.json and, where there are uncommitted changes, git.diff.

    A resumed run keeps the first ones and adds env-1.json, env-2.json, ...
    """
    number = len(list(folder.glob("env*.json")))
    suffix = f"-{number}" if number else ""
    record = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "git": _git("rev-parse", "HEAD"),
    }
    (folder / f"env{suffix}.json").write_text(json.dumps(record, indent=2) + "\n")
    if diff := _git("diff", "HEAD", "--", "."):
        (folder / f"git{suffix}.diff").write_text(diff + "\n")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Git's answer about the checkout that holds rlx; None where rlx is not in one."""
    root = Path(__file__).resolve().parent.parent
    tracked = ("ls-files", "--error-unmatch", "rlx/types.py")  # not merely a venv in a checkout
    try:
        for command in (tracked, arguments):
            done = subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
