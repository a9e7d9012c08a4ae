"""Real environments with something wrong: they hang, raise, or kill their process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlx.envs.envpool import EnvPool, EnvPoolLanes
from rlx.types import EnvSpec

Fault = Literal["hangs", "raises", "dies", "raises_at_once", "hangs_at_once"]


@dataclass(frozen=True, kw_only=True)
class FaultyFamily:
    """`inner`, whose lanes do `fault` after so many steps; only once if `once` names a file."""

    inner: EnvPool
    fault: Fault
    after: int
    once: str | None = None

    def spec(self) -> EnvSpec:
        return self.inner.spec()

    def make(self, *, lanes: int, seeds: Sequence[int]) -> Any:
        if self.fault == "raises_at_once":
            raise RuntimeError("no such simulator: licence expired")
        if self.fault == "hangs_at_once":
            time.sleep(3600)
        return Faulty(self.inner.make(lanes=lanes, seeds=seeds), self)


class Faulty:
    """Passes everything on, until it is time."""

    def __init__(self, env: EnvPoolLanes, family: FaultyFamily) -> None:
        self._env, self._family, self._steps = env, family, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def step(self, action: Any, lane: Any) -> Any:
        self._env.send(action, lane)
        return self.recv()

    def recv(self) -> Any:
        self._steps += 1
        if self._steps > self._family.after and self._is_time():
            fault = self._family.fault
            print(f"about to: {fault}", flush=True, file=os.fdopen(os.dup(2), "w"))
            if fault == "hangs":
                time.sleep(3600)
            if fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the simulator is out of coal")
        return self._env.recv()

    def _is_time(self) -> bool:
        if self._family.once is None:
            return True
        try:
            Path(self._family.once).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
