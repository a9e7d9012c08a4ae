"""Packs what actors on other machines are made of, as bytes."""

from __future__ import annotations

from typing import Any

from ray import cloudpickle

from rlx.problems import refuse

LARGEST_PLAN = 1_000_000  # bytes, pickled


def pickled(made_of: Any) -> bytes:
    """Packs what actors are made of, to travel; raises ConfigError if it cannot."""
    try:
        packed = cloudpickle.dumps(made_of)
    except Exception as error:  # it is anybody's code
        line = " ".join(str(error).split())[:200]
        says = f"cannot be pickled for actors in other processes ({line}); use acting=local, or "
        raise refuse("env", says + "keep open files, locks and lambdas out of it") from error
    if len(packed) > LARGEST_PLAN:
        says = f"is {len(packed):,} bytes when pickled; actors take at most {LARGEST_PLAN:,}: "
        raise refuse("env", says + "let each environment load its data itself")
    return packed
