"""An actor in a process of its own, on this machine or another. Nothing here knows Ray.

Its methods are what a pool calls over the wire; JAX is loaded only by `prepare`, after the
environment variables of `thread_limits` have been set for the process.
"""

from __future__ import annotations

import os
import pickle
from time import time
from typing import Any

from rlx.acting.wire import Answer, Compression, pack, widened
from rlx.cluster.whereabouts import Whereabouts, lower_priority, whereabouts
from rlx.problems import or_run_failed
from rlx.types import Request, Weights


class RemoteActor:
    """One life of one actor.

    plan: a pickled `rlx.acting.plan.Plan`, opened only in `prepare`. compile_cache: compiled
    policies are kept for the other actors of this machine.
    """

    def __init__(
        self,
        *,
        plan: bytes,
        index: int,
        chain: int,
        compression: Compression,
        compile_cache: bool,
    ) -> None:
        self._plan, self._index, self._chain = plan, index, chain
        self._compression: Compression = compression
        self._compile_cache = compile_cache
        self._actor: Any = None
        self._taken_s = 0.0

    def hello(self) -> Whereabouts:
        """Tells where the process runs; its answer says that it lives."""
        return whereabouts()

    def prepare(self, cores: tuple[int, ...] | None) -> None:
        """Opens the environments and compiles the policy; then it can act.

        cores: the CPU cores that all threads of this process share; None: any.
        """
        if cores is not None:
            os.sched_setaffinity(0, cores)
        from rlx.acting.policy import prepare_process  # loads JAX

        plan = pickle.loads(self._plan)
        prepare_process(compile_cache=self._compile_cache, on_cpu=plan.device == "cpu")
        plan.compile()
        with or_run_failed():
            self._actor = plan.actor(self._index, self._chain)
        lower_priority()

    def collect(
        self, weights: Weights, env_steps: int, want_env_steps: int, want_blocks: int | None
    ) -> Answer:
        """Acts for one request; `weights` is an object of the store, read without a copy."""
        is_new = weights.version != self._actor.weights_version
        request = Request(
            weights=widened(weights) if is_new else None,
            env_steps=env_steps,
            want_env_steps=want_env_steps,
            want_blocks=want_blocks,
        )
        if is_new:
            self._taken_s = time()
        rollout, raw_bytes, wire_bytes = pack(self._actor.collect(request), self._compression)
        return Answer(
            rollout=rollout,
            raw_bytes=raw_bytes,
            wire_bytes=wire_bytes,
            weights_version=weights.version,
            weights_taken_s=self._taken_s,
        )
