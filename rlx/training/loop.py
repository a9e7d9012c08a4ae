"""The training loop: keep, act, agree, learn. Read this first, then `rlx.training.stages`.

With `acting=local` it is exactly sequential: the same seed gives the same bits. The host never
waits for the update it has just started, only for the one before.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

from rlx.machine.signals import stop_on_signals
from rlx.runs.files import full_disk_is_a_failure
from rlx.training.keeper import Keeper, Stopped
from rlx.training.parts import Parts
from rlx.training.stages import Stages


def train(parts: Parts, stop: threading.Event | None = None) -> dict[str, Any]:
    """Runs to `total_env_steps`, or until `stop` (None: a signal); returns the summary."""
    stopping = nullcontext(stop) if stop else stop_on_signals()
    with full_disk_is_a_failure(parts.output_dir), stopping as stop:
        stages = Stages(parts, stop)
        keeper = Keeper(stages)
        try:
            keeper.begin()
            stages.publish()
            while not stages.finished() and not stages.stopped():
                keeper.keep()  # before the others: what is due at the end is left to `end`
                stages.act()
                stages.agree(is_writing=keeper.is_writing)
                stages.learn()
            stages.raise_failure()
            try:
                summary = keeper.end("finished" if stages.finished() else "interrupted")
            except Stopped:
                summary = keeper.end("interrupted")
            stages.raise_failure()  # of a hook, at the end
            return summary
        except BaseException as error:
            keeper.fail(error)
            raise
        finally:
            keeper.close()
