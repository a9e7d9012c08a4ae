"""The environment variables that XLA reads once, when it starts in a process: set them before."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlx.machine import compiled

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
# YNNPACK's convolutions run at two thirds the speed of Eigen's (experiments/benchmarks/learner.md).
OWN_CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
# Releases of jaxlib that are faster with it: XLA ends the process at a flag that it does not know,
# and jaxlib 0.11 and 0.12 know this one but gain too little of it (docs/learner.md).
GAIN_BY = ("0.10.1", "0.10.2")


def add_flag(flag: str) -> None:
    """Adds to XLA_FLAGS, unless that flag is there already, with whatever value."""
    given = _given()
    if given is not None and not _of_name(_name(flag), given):
        os.environ["XLA_FLAGS"] = f"{given} {flag}".strip()


def fast_convolutions() -> list[str]:
    """Flags for fast convolutions on CPUs, where this jaxlib knows them and gains from them.

    Processes with an environment of their own get them, too; what the user set is kept.
    """
    if version("jaxlib") not in GAIN_BY:
        return []
    return _of_name(_name(OWN_CONVOLUTIONS), _given() or "")[-1:] or [OWN_CONVOLUTIONS]


def _given() -> str | None:
    """The flags of XLA_FLAGS, which may name a file of them; None if that cannot be read."""
    given = os.environ.get("XLA_FLAGS", "")
    if not given.strip() or given.lstrip().startswith("-"):
        return given
    try:
        return Path(given).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None  # XLA says so


def _of_name(name: str, flags: str) -> list[str]:
    return [flag for flag in flags.split() if _name(flag) == name]


def _name(flag: str) -> str:
    return flag.partition("=")[0]


def prepare(settings: Mapping[str, Any] | None = None, *, compile_cache: bool = True) -> None:
    """Sets XLA up; call it before JAX is used, as it changes nothing later.

    settings: a run's that begins, with learner.memory_fraction (of a GPU's memory), deterministic
    and compile_cache. compile_cache: of a process that trains nothing.
    """
    for flag in fast_convolutions():
        add_flag(flag)
    if settings is None:
        return compiled.keep(compile_cache)
    if (fraction := settings["learner"]["memory_fraction"]) is not None:
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(fraction)
    if settings["deterministic"]:
        add_flag(DETERMINISTIC)
    compiled.keep(settings["compile_cache"])
