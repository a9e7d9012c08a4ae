"""Finds rlx's own files."""

from __future__ import annotations

from pathlib import Path


def config_dir() -> Path:
    """The folder of YAML groups: inside the package in a wheel, beside it in a checkout."""
    here = Path(__file__).resolve().parent.parent
    for folder in (here / "conf", here.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"rlx's conf/ is neither in {here} nor in {here.parent}; install rlx again."
    )
