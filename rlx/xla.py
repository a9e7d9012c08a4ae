"""What XLA reads from the environment, once, when it starts in a process: set it before."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
# YNNPACK's convolutions run at two thirds the speed of Eigen's (experiments/benchmarks/learner.md).
OWN_CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
KNOWN_BY = ("0.10.1", "0.10.2")  # jaxlib: XLA ends the process at a flag that it does not know


def add_flag(flag: str) -> None:
    """Adds to XLA_FLAGS, unless that flag is there already, with whatever value."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    name = flag.partition("=")[0]
    if name not in [other.partition("=")[0] for other in flags]:
        os.environ["XLA_FLAGS"] = " ".join([*flags, flag])


def fast_convolutions() -> list[str]:
    """Flags for fast convolutions on CPUs, as far as this jaxlib knows them."""
    return [OWN_CONVOLUTIONS] if version("jaxlib") in KNOWN_BY else []


def prepare(settings: Mapping[str, Any] | None = None) -> None:
    """Before JAX is used in a process that learns or evaluates; later it changes nothing.

    settings: a run's, with learner.memory_fraction (of a GPU's memory) and deterministic.
    """
    for flag in fast_convolutions():
        add_flag(flag)
    if settings is None:
        return
    if (fraction := settings["learner"]["memory_fraction"]) is not None:
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(fraction)
    if settings["deterministic"]:
        add_flag(DETERMINISTIC)
