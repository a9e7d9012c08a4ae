"""Distributed recurrent-replay reinforcement learning, configured with Hydra, on JAX."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

_program = os.path.basename(sys.argv[0]) if sys.argv else ""
_is_module = _program == "-m" and any(word.startswith("rlx.") for word in sys.orig_argv[1:4])
if _is_module or (_program.startswith("rlx-") and not _program.endswith(".py")):  # rlx-train
    from rlx.machine.signals import interrupts_in_a_line

    interrupts_in_a_line()
    if _program == "rlx-train" or {"rlx.train", "rlx.bench"} & {*sys.orig_argv[1:4]}:
        from rlx.machine.memory import begin_with_huge_pages

        begin_with_huge_pages()

if TYPE_CHECKING:
    from rlx.api import compose as compose
    from rlx.api import load as load
    from rlx.api import make as make
    from rlx.api import run as run
    from rlx.config.targets import allow as allow

_HOMES = {
    "compose": "rlx.api",
    "load": "rlx.api",
    "make": "rlx.api",
    "run": "rlx.api",
    "allow": "rlx.config.targets",
}
__all__ = ["allow", "compose", "load", "make", "run"]


def __getattr__(name: str) -> Any:
    # Lazy: thin actors import rlx.types without Hydra and JAX.
    if name not in _HOMES:
        raise AttributeError(f"rlx has no {name!r}; it offers {', '.join(__all__)}.")
    return getattr(importlib.import_module(_HOMES[name]), name)
